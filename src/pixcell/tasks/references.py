"""What `pixcell sample` makes pictures after: references, seen through the encoder of the model, or draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixcell.data.slides import Slide, find_slides
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.priors import EmbeddingPrior
from pixcell.errors import ModelError, SlideError, UnknownResolution
from pixcell.files import sha256_of
from pixcell.geometry import Box, scale_between
from pixcell.models.encoders import Encoder, load_encoder
from pixcell.provenance import hash_of, read_provenance

__all__ = ["SHEET_NAME", "Draws", "Reference", "draws_from", "encoder_of", "pictures_in", "read_reference"]

SHEET_NAME = "contact_sheet.png"
"""In a folder of samples; it is none of them."""


@dataclass(frozen=True)
class Reference:
    """A picture to imitate, as the model's encoder sees it."""

    name: str
    sha256: str
    pixels: np.ndarray
    resolution: str
    embedding_grid: Tensor


@dataclass(frozen=True)
class Draws:
    """Conditions drawn from a prior, one per picture."""

    prior: EmbeddingPrior
    name: str
    seed: int
    label: str | None
    temperature: float

    def of(self, indices: Sequence[int]) -> Conditioning:
        """Return the conditions of some pictures."""
        return self.prior.conditioning(self.seed, indices, label=self.label, temperature=self.temperature)

    @property
    def record(self) -> dict[str, Any]:
        """What a picture's record says; with seed and index it decides the draw."""
        return {
            "name": self.name,
            "sha256": self.prior.sha256,
            "label": self.label,
            "temperature": self.temperature,
        }

    def __str__(self) -> str:
        return f"drawn from prior {self.name}" + (f", {self.label}" if self.label is not None else "")


def encoder_of(
    pipeline: PixCellPipeline, given: str | None, weights: Path | None, download: bool, device: torch.device
) -> Encoder:
    """Load the encoder that a model was trained with.

    Args:
        pipeline: Of the model; its facts name the encoder.
        given: Where the encoder is, if not under that name.
        weights: Its weight file.
        download: Whether weights may be downloaded.
        device: Where it runs.

    Raises:
        ModelError: If the model names none and none is given, or the given one is another.
    """
    known = pipeline.facts.get("encoder", {})
    name = given or known.get("name")
    if name is None:
        raise ModelError(
            "the model does not say which encoder it was trained with (it has no pixcell.json). "
            "Name it, for example --set encoder=uni2-h, or sample with --unconditional."
        )
    loaded = load_encoder(name, weights=weights, download=download, device=device)
    if known.get("sha256") not in (None, loaded.sha256):
        raise ModelError(
            f"encoder {loaded.name} ({loaded.sha256[:12]}) is not the one the model was trained with: "
            f"{known['name']} ({known['sha256'][:12]}). Its embeddings would mean nothing to the model."
        )
    width = pipeline.transformer.config.caption_channels
    if loaded.dim != width:
        raise ModelError(
            f"encoder {loaded.name} makes embeddings {loaded.dim} wide, the model takes {width}. "
            "Use the encoder that the model was trained with."
        )
    return loaded


def pictures_in(like: Sequence[Path]) -> list[Path]:
    """Return the pictures themselves, and those in the folders.

    Raises:
        SlideError: If a folder holds none, or is a tile store.
    """
    files = []
    for path in map(Path, like):
        if (path / "store.json").is_file():
            raise SlideError(
                f"{path} is a tile store; its pictures are overviews for people. Give pictures of tissue."
            )
        found = find_slides(path) if path.is_dir() else [path]
        # Where a folder of samples is imitated, its contact sheet is none of them.
        taken = [
            file for file in found if not (path.is_dir() and file.name == SHEET_NAME and _is_sheet(file))
        ]
        if not taken:
            raise SlideError(f"there is no picture in {path}. Give pictures, or a folder that holds some.")
        files += taken
    return files


def _is_sheet(path: Path) -> bool:
    return bool((read_provenance(path) or {}).get("contact_sheet"))


def read_reference(
    path: Path, pipeline: PixCellPipeline, encoder: Encoder, source_mpp: float | None
) -> Reference:
    """Cut the centre of a picture at the model's resolution, and encode it.

    Raises:
        UnreadableSlide: If it is no image.
        SlideError: If it is smaller than the model's pictures, or does not state its resolution.
    """
    pixels, resolution = _centre(path, pipeline.sample_size, pipeline.facts.get("mpp"), source_mpp)
    tile = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    grid = encoder.grid(tile, pipeline.sample_size // pipeline.transformer.grid_size).cpu()
    Conditioning(grid).check_finite()
    digest = sha256_of(path) if path.is_file() else hash_of(pixels)
    return Reference(path.name, digest, pixels, resolution, grid[0])


def _centre(path: Path, size: int, mpp: float | None, source_mpp: float | None) -> tuple[np.ndarray, str]:
    """Return the middle of a picture at the model's resolution, and what that resolution was read from.

    A plain image that does not state its resolution is taken pixel for pixel: it is a picture of the size
    that the model makes, or is cut to it. A slide must state it. (size, size, 3) uint8.
    """
    with Slide.open(path, source_mpp) as slide:
        if slide.resolution is None and slide.backend != "image":
            raise UnknownResolution(path)
        if slide.resolution is None or mpp is None:
            scale, told = 1.0, "not stated: taken pixel for pixel"
        else:
            scale, told = scale_between(slide.mpp, mpp), f"{slide.mpp:.4g} mpp, {slide.resolution.source}"
        side = round(size * scale)
        if min(slide.width, slide.height) < side:
            at = "" if mpp is None else f" at {mpp:.4g} microns per pixel"
            raise SlideError(
                f"{path.name} is {slide.width} x {slide.height} pixels ({told}); the model makes pictures of "
                f"{size} x {size}{at}, for which it must have {side} x {side}. Give a larger piece of tissue."
            )
        box = Box((slide.width - side) // 2, (slide.height - side) // 2, side, side)
        return slide.read(box, size=(size, size)), told


def draws_from(
    folder: Path,
    pipeline: PixCellPipeline,
    seed: int,
    label: str | None,
    temperature: float,
    encoder: str | None,
) -> Draws:
    """Load a prior, and refuse one that does not fit the model.

    Args:
        folder: That ``pixcell prior`` wrote.
        pipeline: Of the model.
        seed: Of the draws.
        label: Which tissue to draw. None: any.
        temperature: How far draws lie from the centres of the prior.
        encoder: Name of the model's encoder, where the model does not tell.

    Raises:
        MissingWeights, WrongWeights: If there is no prior, or it is damaged.
        ModelError: If it is of another encoder, grid or resolution, or has no such label.
    """
    prior = EmbeddingPrior.load(folder)
    prior.check_fits(
        pipeline.facts,
        grid_size=pipeline.transformer.grid_size,
        dim=pipeline.transformer.config.caption_channels,
        encoder=encoder,
    )
    prior.check_draw(label, temperature)
    return Draws(prior, folder.resolve().name, seed, label, float(temperature))
