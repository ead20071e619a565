"""Nearest rows of a codebook, for autoencoders whose decoder takes nothing else (VQ)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["nearest_rows"]

# Distances of this many positions to all rows at a time: 128 MiB for the 16384 rows of vq-f8.
_POSITIONS = 1024


def nearest_rows(
    latents: Float[Tensor, "batch channels height width"], codebook: Float[Tensor, "rows channels"]
) -> tuple[Float[Tensor, "batch channels height width"], Int[Tensor, "batch height width"]]:
    """Return the row of the codebook that is nearest to each position, and its index.

    Computed in float64 where the device has it: neighbours of a large codebook differ by less than the
    rounding of half precision, and of the reduced float32 of matrix units.

    Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", eq. 1
    (https://arxiv.org/abs/1711.00937).
    """
    exact = torch.float32 if latents.device.type == "mps" else torch.float64
    rows = codebook.to(exact)
    # |z - e|^2 / 2 without |z|^2 / 2, which is the same for every row.
    offset = rows.square().sum(dim=1) / 2
    positions = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    indices = torch.cat(
        [
            torch.addmm(offset, part, rows.T, alpha=-1).argmin(dim=1)
            for part in positions.to(exact).split(_POSITIONS)
        ]
    ).reshape(latents.shape[0], *latents.shape[2:])
    return codebook[indices].movedim(-1, 1).to(latents.dtype), indices
