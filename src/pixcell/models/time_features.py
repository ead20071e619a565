"""Sines and cosines of timesteps, of the same frequencies on every machine.

    [cos(t f_0), ..., cos(t f_127), sin(t f_0), ..., sin(t f_127)]      f_k = 10000 ** (-k / 128)

A frequency that is off in its last bit turns the angle of ``t = 999`` by 3e-5, which shows in the prediction.
The exponential of torch rounds up to five of the 128 another way from processor to processor, so they are
constants here: exponentials rounded from float64, except for two whose exact values lie within 0.03 of a last
place from the middle of two float32 numbers. Where the golden cases were made, the released code rounded
these two up.

Source: Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models"
(https://arxiv.org/abs/2102.09672), and its code; Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), 3.5.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

__all__ = ["TimeFeatures"]

_NUM_FREQUENCIES = 128
_ROUNDED_UP = (12, 106)


def _frequencies() -> np.ndarray:
    exponents = (
        np.float32(-math.log(10000)) * np.arange(_NUM_FREQUENCIES, dtype=np.float32) / _NUM_FREQUENCIES
    )
    rounded = np.exp(exponents.astype(np.float64)).astype(np.float32)
    for place in _ROUNDED_UP:
        rounded[place] = np.nextafter(rounded[place], np.float32(1))
    return rounded


_FREQUENCIES = _frequencies().tolist()


class TimeFeatures(nn.Module):
    """Timesteps to 256 features each, in float32 whatever the precision of the model around."""

    def forward(self, timesteps: Shaped[Tensor, " rows"]) -> Float[Tensor, "rows 256"]:
        """Return cosines, then sines.

        Args:
            timesteps: 0 to 999, fractions allowed.
        """
        # No buffer: one would follow the model into half precision.
        frequencies = torch.tensor(_FREQUENCIES, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)
