"""The mathematics of sampling and of the loss."""
