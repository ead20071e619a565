"""What a sample depends on besides its noise.

A :class:`Conditioning` is carried unopened through guidance, windows, training and pipelines; only the place
that calls the network turns it into tokens and maps. It may hold

    embedding_grid     one embedding per field: what the tissue looks like
    text_states        states of a text encoder: what a report says
    control_latents    a map of latents, for example of a cell mask: where things are

Each row of the batch either has its conditions or has none; rows without get the model's own "no condition"
tokens and no control.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pixcell.errors import ModelError
from pixcell.geometry import Box

__all__ = ["LATENTS_PER_FIELD", "Conditioning", "Denoiser", "encoder_difference"]

LATENTS_PER_FIELD = 32
"""Latents along the side of a 256-pixel field, which has one embedding."""

_CONDITIONS = {
    "embedding_grid": "embeddings",
    "text_states": "text states",
    "control_latents": "control latents",
}
_PER_SAMPLE = (*_CONDITIONS, "dropped", "control_scale")


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a batch. Any may be absent; without one, no sample has a condition.

    Args:
        embedding_grid: One embedding per field of each sample.
        dropped: Rows to be treated as having no condition at all. None: none of them.
        text_states: States of a text encoder for each sample.
        control_latents: Normalised latents of a control image, on the grid of the sample's own.
        control_scale: How much control each sample gets; 0 is none. None: 1 for all.
        encoder: What made the embeddings (``Encoder.made_by()``), so that a model of another encoder can
            refuse them. None: not known.
    """

    embedding_grid: Float[Tensor, "batch rows columns dim"] | None = None
    dropped: Bool[Tensor, " batch"] | None = None
    text_states: Float[Tensor, "_ tokens text_dim"] | None = None
    control_latents: Float[Tensor, "_ channels height width"] | None = None
    control_scale: Float[Tensor, " batch"] | None = None
    encoder: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        grid, text, control = self.embedding_grid, self.text_states, self.control_latents
        if grid is not None and grid.ndim != 4:
            raise ValueError(f"an embedding grid is (batch, rows, columns, dim), not {tuple(grid.shape)}")
        if text is not None and text.ndim != 3:
            raise ValueError(f"text states are (batch, tokens, dim), not {tuple(text.shape)}")
        if control is not None and control.ndim != 4:
            raise ValueError(
                f"control latents are (batch, channels, height, width), not {tuple(control.shape)}"
            )
        sizes = {what: getattr(self, name).shape[0] for name, what in _CONDITIONS.items() if self._has(name)}
        if len(set(sizes.values())) > 1:
            counts = ", ".join(f"{count} {what}" for what, count in sizes.items())
            raise ModelError(f"the conditions of a batch are not equally many: {counts}.")
        for name in ("dropped", "control_scale"):
            rows = getattr(self, name)
            if rows is not None and tuple(rows.shape) != (self.batch_size,):
                raise ValueError(f"{name} has one value for each row of the conditions")
        if self.control_scale is not None and control is None:
            raise ValueError("control_scale scales control latents; there are none")

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
        for name in _CONDITIONS:
            if self._has(name):
                return int(getattr(self, name).shape[0])
        return None

    @property
    def is_empty(self) -> bool:
        """Whether no sample can have a condition, because there is none."""
        return self.batch_size is None

    @property
    def controlled(self) -> Bool[Tensor, " batch"] | None:
        """Which rows have a control: not dropped, and not scaled by 0. None: there is no control."""
        if self.control_latents is None:
            return None
        rows = torch.ones(self.control_latents.shape[0], dtype=torch.bool, device=self._device)
        if self.dropped is not None:
            rows = rows & ~self.dropped
        return rows if self.control_scale is None else rows & (self.control_scale != 0)

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
        self._check_batch(batch_size)
        if self.embedding_grid is None:
            return unconditional_embedding.expand(batch_size, -1, -1)
        tokens = self.embedding_grid.flatten(1, 2)
        if tokens.shape[1:] != unconditional_embedding.shape:
            rows, columns, dim = self.embedding_grid.shape[1:]
            num_tokens, model_dim = unconditional_embedding.shape
            raise ModelError(
                f"a {rows} x {columns} grid of embeddings {dim} wide was given; the model takes {num_tokens} "
                f"embedding(s) {model_dim} wide. Use the encoder and the field size it was trained with."
            )
        return self._undropped(tokens, unconditional_embedding)

    def text(
        self, unconditional_states: Float[Tensor, "tokens dim"], batch_size: int
    ) -> Float[Tensor, "batch tokens dim"]:
        """Return the text that enters cross-attention; dropped rows get ``unconditional_states``.

        Args:
            unconditional_states: States of the text that stands for "no condition", usually the empty one.
            batch_size: Number of samples.

        Raises:
            ModelError: If the states are not of the same number or width.
        """
        self._check_batch(batch_size)
        if self.text_states is None:
            return unconditional_states.expand(batch_size, -1, -1)
        if self.text_states.shape[1:] != unconditional_states.shape:
            (tokens, dim), (own_tokens, own_dim) = self.text_states.shape[1:], unconditional_states.shape
            raise ModelError(
                f"{tokens} text states {dim} wide were given; those of no condition are {own_tokens}, "
                f"{own_dim} wide. Encode both with the same text encoder and the same token policy."
            )
        return self._undropped(self.text_states, unconditional_states)

    def check_finite(self) -> None:
        """Refuse conditions that hold NaN or infinity. Reads the values: once per sampling, not per step.

        Raises:
            ModelError: Names the samples.
        """
        for name, what in _CONDITIONS.items():
            values = getattr(self, name)
            if values is None:
                continue
            bad = ~values.isfinite().flatten(1).all(dim=1)
            if bad.any():
                rows = ", ".join(str(row) for row in bad.nonzero().flatten().tolist()[:8])
                raise ModelError(
                    f"the {what} of sample(s) {rows} hold NaN or infinity. Encode the picture again; "
                    "in half precision an encoder can overflow: use float32 or bfloat16."
                )

    def drop(self, mask: Bool[Tensor, " batch"]) -> "Conditioning":
        """Take all conditions away where ``mask`` is true."""
        if self.is_empty:
            return self
        mask = mask.to(self._device)
        return replace(self, dropped=mask if self.dropped is None else self.dropped | mask)

    def drop_control(self, mask: Bool[Tensor, " batch"]) -> "Conditioning":
        """Take the control alone away where ``mask`` is true; other conditions stay."""
        if self.control_latents is None:
            return self
        return replace(self, control_scale=self._scale().masked_fill(mask.to(self._device), 0.0))

    def dropped_everywhere(self) -> "Conditioning":
        """Take every condition away, keeping sizes: the unconditional twin of a batch."""
        if self.batch_size is None:
            return self
        return self.drop(torch.ones(self.batch_size, dtype=torch.bool))

    def window(self, box: Box, latents_per_field: int = LATENTS_PER_FIELD) -> "Conditioning":
        """Return the conditions under a window; text holds for all of them.

        Args:
            box: In latents. With embeddings, it must start and end on borders of fields.
            latents_per_field: Latents along the side of the field of one embedding.

        Raises:
            ValueError: If it does not, or reaches outside: conditions between two embeddings do not exist.
        """
        grid, control = self.embedding_grid, self.control_latents
        if grid is not None:
            sides = (box.x, box.y, box.width, box.height)
            rows, columns = grid.shape[1:3]
            if any(side % latents_per_field for side in sides):
                raise ValueError(
                    f"{box} does not fall on the embedding grid: every side must be a multiple of "
                    f"{latents_per_field} latents (one field)"
                )
            x, y, width, height = (side // latents_per_field for side in sides)
            if not Box(0, 0, columns, rows).contains(Box(x, y, width, height)):
                raise ValueError(f"{box} reaches outside a grid of {rows} x {columns} fields")
            grid = grid[:, y : y + height, x : x + width]
        if control is not None:
            rows, columns = control.shape[2:]
            if not Box(0, 0, columns, rows).contains(box):
                raise ValueError(f"{box} reaches outside control latents of {rows} x {columns}")
            control = control[:, :, box.y : box.y + box.height, box.x : box.x + box.width]
        return replace(self, embedding_grid=grid, control_latents=control)

    def select(self, rows: slice | Sequence[int] | Tensor) -> "Conditioning":
        """Return the conditions of some samples."""
        chosen = rows if isinstance(rows, slice | Tensor) else list(rows)
        return self._each(lambda values: values[chosen])

    def repeat(self, times: int) -> "Conditioning":
        """Repeat each sample's conditions ``times`` times, copies side by side."""
        return self._each(lambda values: values.repeat_interleave(times, 0))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Conditioning":
        """Move to a device, and conditions to a dtype."""
        moved = self._each(lambda values: values.to(device))
        present = [name for name in _CONDITIONS if self._has(name)]
        return replace(moved, **{name: getattr(moved, name).to(dtype=dtype) for name in present})

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Join batches. All of them have a grid, or none has; so with text. Control may be had by some.

        Raises:
            ValueError: If some have a grid (or text) and others do not: their number of samples is unknown.
            ModelError: If the embeddings come from different encoders, as far as that is known.
        """
        if all(part.is_empty for part in parts):
            return cls()
        for name in ("embedding_grid", "text_states"):
            if len({part._has(name) for part in parts}) > 1:
                raise ValueError(
                    f"a Conditioning without {name} cannot be joined to one with; use drop() instead"
                )
        if any(part.is_empty for part in parts):
            raise ValueError("a Conditioning without conditions cannot be joined to one with; use drop()")
        control = next((part.control_latents for part in parts if part.control_latents is not None), None)
        if control is not None:
            parts = [part._with_blank_control(control) for part in parts]
        encoders = [part.encoder for part in parts if part.encoder is not None]
        if any(encoder_difference(encoders[0], encoder) for encoder in encoders[1:]):
            names = " and ".join(sorted({str(encoder.get("name")) for encoder in encoders}))
            raise ModelError(f"embeddings of different encoders ({names}) cannot be joined.")
        joined: dict[str, Tensor] = {}
        for name in _PER_SAMPLE:
            if any(part._has(name) for part in parts):
                joined[name] = torch.cat([part._rows_of(name) for part in parts])
        return cls(**joined, encoder=encoders[0] if encoders else None)  # type: ignore[arg-type]

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _rows_of(self, name: str) -> Tensor:
        """Return a field, or what its absence means where other parts of a joined batch have it."""
        if self._has(name):
            values: Tensor = getattr(self, name)
            return values
        if name == "control_scale":
            return self._scale()
        return torch.zeros(self.batch_size or 0, dtype=torch.bool, device=self._device)

    def _scale(self) -> Tensor:
        if self.control_scale is not None:
            return self.control_scale
        return torch.ones(self.batch_size or 0, device=self._device)

    @property
    def _device(self) -> torch.device | None:
        return next((getattr(self, name).device for name in _CONDITIONS if self._has(name)), None)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Change everything that has a row per sample."""
        changed: dict[str, Any] = {
            name: change(getattr(self, name)) for name in _PER_SAMPLE if self._has(name)
        }
        return replace(self, **changed)

    def _with_blank_control(self, like: Tensor) -> "Conditioning":
        if self.control_latents is not None:
            return self
        blank = like.new_zeros(self.batch_size or 0, *like.shape[1:])
        return replace(
            self, control_latents=blank, control_scale=torch.zeros(len(blank), device=blank.device)
        )

    def _undropped(self, states: Tensor, unconditional: Tensor) -> Tensor:
        if self.dropped is None:
            return states
        return torch.where(self.dropped[:, None, None], unconditional.to(states), states)

    def _check_batch(self, batch_size: int) -> None:
        if self.batch_size not in (None, batch_size):
            raise ModelError(f"{batch_size} samples were given with {self.batch_size} conditions.")


def encoder_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return in what two encoders differ, as far as both are known: "preprocessing", "sha256" or "name".

    They are equal if their weights and preprocessing are, whatever they are called. Where a hash of the
    weights is not known on both sides, names decide. None: they do not differ.
    """
    is_hashed = one.get("sha256") is not None and other.get("sha256") is not None
    for key in ("preprocessing", "sha256" if is_hashed else "name"):
        if one.get(key) is not None and other.get(key) is not None and not _same(one[key], other[key]):
            return key
    return None


def _same(one: Any, other: Any) -> bool:
    """Compare as JSON values: what was saved has lists for tuples."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


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
