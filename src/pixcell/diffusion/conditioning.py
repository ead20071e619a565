"""What a sample depends on besides its noise.

A :class:`Conditioning` is carried unopened through guidance, windows, training and pipelines; only the place
that calls the network turns it into tokens. Each row of the batch either has a condition or has none; rows
without one get the model's own "no condition" tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pixcell.errors import ModelError
from pixcell.geometry import Box

__all__ = ["LATENTS_PER_FIELD", "Conditioning", "Denoiser"]

LATENTS_PER_FIELD = 32
"""Latents along the side of a 256-pixel field, which has one embedding."""


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a batch.

    Args:
        embedding_grid: One embedding per field of each sample. None: no sample has a condition.
        dropped: Rows to be treated as having no condition. None: none of them.
    """

    embedding_grid: Float[Tensor, "batch rows columns dim"] | None = None
    dropped: Bool[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        grid, dropped = self.embedding_grid, self.dropped
        if grid is not None and grid.ndim != 4:
            raise ValueError(f"an embedding grid is (batch, rows, columns, dim), not {tuple(grid.shape)}")
        if dropped is not None and (grid is None or dropped.shape != grid.shape[:1]):
            raise ValueError("dropped marks rows of the embedding grid: one boolean each")

    @classmethod
    def from_tokens(cls, tokens: Float[Tensor, "batch tokens dim"]) -> "Conditioning":
        """Take row-major tokens of square grids, as published code passes them.

        Raises:
            ModelError: If their number is not a square.
        """
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ModelError(
                f"{tokens.shape[1]} embeddings per sample do not make a square grid of fields (1, 4, 16)."
            )
        return cls(tokens.unflatten(1, (side, side)))

    @property
    def batch_size(self) -> int | None:
        """Number of samples, where it is known: None fits any number."""
        return None if self.embedding_grid is None else self.embedding_grid.shape[0]

    def tokens(
        self, unconditional_embedding: Float[Tensor, "tokens dim"], batch_size: int
    ) -> Float[Tensor, "batch tokens dim"]:
        """Return what enters cross-attention: embeddings in row-major order, or "no condition" tokens.

        Args:
            unconditional_embedding: Of the model (``transformer.unconditional_embedding``).
            batch_size: Number of samples.

        Raises:
            ModelError: If grid and model do not fit.
        """
        if self.embedding_grid is None:
            return unconditional_embedding.expand(batch_size, -1, -1)
        tokens = self.embedding_grid.flatten(1, 2)
        if tokens.shape[0] != batch_size:
            raise ModelError(f"{batch_size} samples were given with {tokens.shape[0]} conditions.")
        if tokens.shape[1:] != unconditional_embedding.shape:
            rows, columns, dim = self.embedding_grid.shape[1:]
            num_tokens, model_dim = unconditional_embedding.shape
            raise ModelError(
                f"a {rows} x {columns} grid of embeddings {dim} wide was given; the model takes {num_tokens} "
                f"embedding(s) {model_dim} wide. Use the encoder and the field size it was trained with."
            )
        if self.dropped is None:
            return tokens
        return torch.where(self.dropped[:, None, None], unconditional_embedding.to(tokens.dtype), tokens)

    def check_finite(self) -> None:
        """Refuse embeddings that hold NaN or infinity. Reads the values: once per sampling, not per step.

        Raises:
            ModelError: Names the samples.
        """
        if self.embedding_grid is None:
            return
        bad = ~self.embedding_grid.isfinite().flatten(1).all(dim=1)
        if bad.any():
            rows = ", ".join(str(row) for row in bad.nonzero().flatten().tolist()[:8])
            raise ModelError(
                f"the embeddings of sample(s) {rows} hold NaN or infinity. Encode the picture again; "
                "in half precision an encoder can overflow: use float32 or bfloat16."
            )

    def drop(self, mask: Bool[Tensor, " batch"]) -> "Conditioning":
        """Take the condition away where ``mask`` is true."""
        if self.embedding_grid is None:
            return self
        mask = mask.to(self.embedding_grid.device)
        return replace(self, dropped=mask if self.dropped is None else self.dropped | mask)

    def dropped_everywhere(self) -> "Conditioning":
        """Take every condition away, keeping sizes: the unconditional twin of a batch."""
        if self.embedding_grid is None:
            return self
        return self.drop(self.embedding_grid.new_ones(self.embedding_grid.shape[0], dtype=torch.bool))

    def window(self, box: Box) -> "Conditioning":
        """Return the conditions under a window.

        Args:
            box: In latents. It must start and end on borders of fields.

        Raises:
            ValueError: If it does not, or reaches outside: conditions between two embeddings do not exist.
        """
        if self.embedding_grid is None:
            return self
        sides = (box.x, box.y, box.width, box.height)
        rows, columns = self.embedding_grid.shape[1:3]
        if any(side % LATENTS_PER_FIELD for side in sides):
            raise ValueError(
                f"{box} does not fall on the embedding grid: every side must be a multiple of "
                f"{LATENTS_PER_FIELD} latents (one field)"
            )
        x, y, width, height = (side // LATENTS_PER_FIELD for side in sides)
        if not Box(0, 0, columns, rows).contains(Box(x, y, width, height)):
            raise ValueError(f"{box} reaches outside a grid of {rows} x {columns} fields")
        return replace(self, embedding_grid=self.embedding_grid[:, y : y + height, x : x + width])

    def select(self, rows: slice | Sequence[int] | Tensor) -> "Conditioning":
        """Return the conditions of some samples."""
        if self.embedding_grid is None:
            return self
        chosen = rows if isinstance(rows, slice | Tensor) else list(rows)
        dropped = None if self.dropped is None else self.dropped[chosen]
        return replace(self, embedding_grid=self.embedding_grid[chosen], dropped=dropped)

    def repeat(self, times: int) -> "Conditioning":
        """Repeat each sample's condition ``times`` times, copies side by side."""
        if self.embedding_grid is None:
            return self
        dropped = None if self.dropped is None else self.dropped.repeat_interleave(times)
        return replace(self, embedding_grid=self.embedding_grid.repeat_interleave(times, 0), dropped=dropped)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Conditioning":
        """Move to a device, and embeddings to a dtype."""
        if self.embedding_grid is None:
            return self
        dropped = None if self.dropped is None else self.dropped.to(device)
        return replace(self, embedding_grid=self.embedding_grid.to(device, dtype), dropped=dropped)

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Join batches. All of them have a grid, or none has.

        Raises:
            ValueError: If some have a grid and others do not: their number of samples is unknown.
        """
        grids = [part.embedding_grid for part in parts]
        if all(grid is None for grid in grids):
            return cls()
        if any(grid is None for grid in grids):
            raise ValueError("a Conditioning without a grid cannot be joined to one with; use drop() instead")
        dropped = None
        if any(part.dropped is not None for part in parts):
            dropped = torch.cat(
                [
                    part.embedding_grid.new_zeros(part.embedding_grid.shape[0], dtype=torch.bool)  # type: ignore[union-attr]
                    if part.dropped is None
                    else part.dropped
                    for part in parts
                ]
            )
        return cls(torch.cat([grid for grid in grids if grid is not None]), dropped)


@runtime_checkable
class Denoiser(Protocol):
    """Predicts the noise in latents; guided and windowed ones are denoisers again."""

    def __call__(
        self,
        latents: Float[Tensor, "batch channels height width"],
        timestep: Tensor,
        conditioning: Conditioning,
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the predicted noise, in the dtype and size of ``latents``."""
