"""Modules and weights: the transformer, the autoencoder and its latents, the encoders."""
