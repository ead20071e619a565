"""How overlapping windows share a place: one weight per place of a window.

    uniform    every window that covers a place counts the same
    hann       a raised cosine: most in the middle, next to nothing at the border
    gaussian   ``exp(-r**2 / sigma**2)`` with r the distance from the middle: published decoding

A weighted mean divides by the sum of the weights, so only their ratios matter, and a place that one window
covers keeps that window's value, whatever the weight is.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["WindowWeight", "gaussian_weight", "window_weight"]

WindowWeight = Literal["uniform", "hann", "gaussian"]


def window_weight(kind: WindowWeight, height: int, width: int) -> Float[Tensor, "{height} {width}"]:
    """Return the weight of each place of a window, float32 and larger than 0.

    Args:
        kind: See the top of the module. "gaussian" is the published one, with its ``sigma`` of 0.8.
        height: Of the window, in latents or pixels.
        width: Of the window.

    Raises:
        ValueError: If there is no such weight.
    """
    if kind == "uniform":
        return torch.ones(height, width)
    if kind == "hann":
        return torch.outer(_hann(height), _hann(width)).float()
    if kind == "gaussian":
        return gaussian_weight(height, width)
    raise ValueError(f"no weight {kind!r} for windows; choose one of {', '.join(get_args(WindowWeight))}")


def gaussian_weight(
    height: int, width: int, sigma: float = 0.8, mean: float = 0.0
) -> Float[Tensor, "{height} {width}"]:
    """Return ``exp(-((x - mean)**2 + (y - mean)**2) / sigma**2)``, divided by its largest value, float32.

    The first and last places of a window lie at -1 and 1. (No 2 in the denominator: this ``sigma`` is sqrt(2)
    times a standard deviation.)

    Source: the decoding of large images in "Learned representation-guided diffusion models for large-image
    generation" (Graikos et al., CVPR 2024, https://arxiv.org/abs/2312.07330) and in PixCell, which both take
    ``sigma`` 0.8 and ``mean`` 0.
    """
    rows, columns = (torch.linspace(-1, 1, side, dtype=torch.float64) - mean for side in (height, width))
    weight = torch.outer(torch.exp(-((rows / sigma) ** 2)), torch.exp(-((columns / sigma) ** 2)))
    return (weight / weight.max()).float()


def _hann(length: int) -> Tensor:
    """Return a raised cosine sampled at the middles of its places, so that none is 0."""
    return torch.sin(torch.pi * (torch.arange(length, dtype=torch.float64) + 0.5) / length) ** 2
