"""Sinusoidal features of a time: cosines first, of any width."""

import torch

from golden_vectors import load
from tiny_models import tiny_transformer


def test_the_transformer_sees_the_recorded_features():
    """Width 256, and times that are no whole numbers.

    An angle near 999 is a multiple of 6.1e-5 in float32: a last bit of its frequency moves it by as much.
    """
    tensors, _ = load("timestep_features")
    features = tiny_transformer().adaln_single.emb.time_proj(tensors["in.t"])
    torch.testing.assert_close(features, tensors["out.features_256"], rtol=0, atol=6.2e-5)
