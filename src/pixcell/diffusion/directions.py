"""Leading directions of many grids of embeddings, by passes over them.

Up to 2048 numbers a grid, the covariance itself is summed up and decomposed. Beyond, randomised subspace
iteration finds the leading ones (Halko et al. 2011, "Finding structure with randomness", algorithm 4.4).
Only the coefficients of every grid along these directions are kept in memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pixcell.errors import ModelError

__all__ = ["DEFAULT_RANK", "Batches", "Coefficients", "coefficients_of"]

DEFAULT_RANK = 256
_EXACT_SIZE = 2048
_EXTRA = 16
"""Directions more than asked for, which make the others accurate."""
_POWER_PASSES = 4

Batches = Callable[[], Iterable[Tensor]]
"""Starts a pass over all grids: batches (number, rows, columns, dim), each time in the same order."""


@dataclass(frozen=True)
class Coefficients:
    """Grids along their leading directions.

    Attributes:
        mean: Of all, flattened.
        variance: Of each dimension.
        basis: Orthonormal directions, the leading one first.
        values: Of each grid, float64.
        shape: Rows, columns and width of a grid.
    """

    mean: Float[Tensor, " size"]
    variance: Float[Tensor, " size"]
    basis: Float[Tensor, "rank size"]
    values: Float[Tensor, "number rank"]
    shape: tuple[int, int, int]

    @property
    def spread(self) -> Float[Tensor, " rank"]:
        """Variance along each direction."""
        return self.values.square().mean(dim=0)

    @property
    def explained(self) -> float:
        """Share of all variance that lies along the directions."""
        return float(self.spread.sum() / self.variance.sum())


def coefficients_of(batches: Batches, rank: int | None = None, seed: int = 0) -> Coefficients:
    """Find the leading directions of grids, and every grid's coefficients along them.

    Args:
        batches: Starts a pass over the grids.
        rank: Number of directions. None: at most 256.
        seed: Of the search for them, where there are too many dimensions to look at all.

    Raises:
        ModelError: If there are fewer than two grids, they hold NaN, all are equal, or the rank is not
            possible.
    """
    number, mean, variance, shape = _moments(batches)
    size = len(mean)
    most = min(size, number - 1)
    if rank is not None and not 1 <= rank <= most:
        raise ModelError(
            f"rank {rank} is not possible with {number} embeddings of {size} numbers: choose 1 to {most}."
        )
    rank = min(most, DEFAULT_RANK) if rank is None else rank

    def centered() -> Iterable[Tensor]:
        for batch in batches():
            yield batch.flatten(1).double() - mean

    if size <= _EXACT_SIZE:
        covariance = torch.zeros(size, size, dtype=torch.float64)
        for part in centered():
            covariance += part.T @ part
        basis = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[:rank]
    else:
        basis = _leading_directions(centered, size, rank, min(size, rank + _EXTRA), seed)
    # Either sign is right; the same one each time.
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    values = torch.cat([part @ basis.T for part in centered()])
    return Coefficients(mean, variance, basis, values, shape)


def _moments(batches: Batches) -> tuple[int, Tensor, Tensor, tuple[int, int, int]]:
    """Number, mean and variance, by the pairwise update of Chan et al. 1979; and the shape of a grid."""
    number, shape = 0, (0, 0, 0)
    mean = squares = torch.zeros(0, dtype=torch.float64)
    for batch in batches():
        if not bool(batch.isfinite().all()):
            raise ModelError("the embeddings hold NaN or infinity. Encode the store again in float32.")
        values = batch.flatten(1).double()
        if not number:
            _, *sides = batch.shape
            shape = (sides[0], sides[1], sides[2])
            mean, squares = torch.zeros(values.shape[1]).double(), torch.zeros(values.shape[1]).double()
        count, own = len(values), values.mean(dim=0)
        apart = own - mean
        squares = squares + (values - own).square().sum(dim=0)
        squares = squares + apart.square() * (number * count / (number + count))
        mean, number = mean + apart * (count / (number + count)), number + count
    if number < 2:
        raise ModelError(f"{number} embedding(s) are too few to fit anything; at least 2 are needed.")
    if not bool(squares.sum() > 0):
        raise ModelError("all embeddings are equal: there is nothing to draw from.")
    return number, mean, squares / number, shape


def _leading_directions(
    centered: Callable[[], Iterable[Tensor]], size: int, rank: int, wide: int, seed: int
) -> Tensor:
    """Subspace iteration: multiply a random block by the covariance, pass after pass; then rotate it."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.linalg.qr(torch.randn(size, wide, generator=generator, dtype=torch.float64)).Q

    def by_covariance(block: Tensor) -> Tensor:
        rough, total = block.float(), torch.zeros_like(block)  # float32 products: twice as fast
        for part in centered():
            single = part.float()
            total += single.T @ (single @ rough)
        return total

    for _ in range(_POWER_PASSES):
        block = torch.linalg.qr(by_covariance(block)).Q
    small = block.T @ by_covariance(block)
    rotation = torch.linalg.eigh((small + small.T) / 2).eigenvectors.flip(1)[:, :rank]
    return (block @ rotation).T
