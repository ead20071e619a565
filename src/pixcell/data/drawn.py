"""Drawn tissue: slides for tests, examples and the first run, where no real slide is at hand.

Haematoxylin and eosin are painted as optical densities, as light meets them in a section: collagen fibres
that follow a flow, glands with a lumen and a ring of nuclei, solid nests of epithelium, clusters of
lymphocytes, fat, clefts, dust on the glass and strokes of a marker pen. Every length is in microns. It looks
like tissue; it is not a model of any, and nothing about medicine can be learnt from it.

The picture is made in strips and depends on the size, the resolution and the seed only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from pixcell.data.painter import TissuePainter, pen_colours
from pixcell.files import write_whole
from pixcell.geometry import Box

__all__ = ["DrawnSlide", "Square", "draw_slide", "draw_tissue"]

_STRIP = 512


@dataclass(frozen=True)
class Square:
    """A plain square painted over everything, for asking where a pixel went."""

    box: Box
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class DrawnSlide:
    """What was drawn, with the truth that a test can ask for."""

    path: Path
    width: int
    height: int
    mpp: float
    seed: int
    num_levels: int
    num_nuclei: int
    squares: tuple[Square, ...]
    tissue: np.ndarray = field(repr=False)
    """(height, width) bool map of where tissue was drawn, coarse."""
    pen: np.ndarray = field(repr=False)
    """(height, width) bool map of pen strokes, of the same size as ``tissue``."""
    map_scale: float
    """Level-0 pixels per pixel of the maps."""


def draw_slide(
    path: Path,
    width: int = 4096,
    height: int = 4096,
    mpp: float = 0.5,
    seed: int = 0,
    *,
    pen: bool | Sequence[str] = False,
    tissue: bool = True,
    states_mpp: bool = True,
    squares: Sequence[Square] = (),
    quality: int = 87,
) -> DrawnSlide:
    """Draw a slide and save it as a pyramidal TIFF of JPEG tiles, which OpenSlide and others open.

    Args:
        path: Where; written whole or not at all. End it in ``.tiff``.
        width: Level-0 width in pixels.
        height: Level-0 height in pixels.
        mpp: Microns per pixel, stated in the resolution tags.
        seed: Another seed is another patient: other shapes, proportions and shades of stain.
        pen: Strokes of a marker: True for one of each colour, or names out of blue, green, red, black.
        tissue: False draws bare glass with some dust.
        states_mpp: False leaves the resolution out of the file.
        squares: Painted last, at every level.
        quality: Of the JPEG tiles.

    Returns:
        What was drawn and where.

    Raises:
        ValueError: If a size is not positive or a pen has no such colour.
        OutputError: If the place cannot be written.
    """
    painter = TissuePainter(width, height, mpp, seed, pen_colours(pen), tissue)
    sizes = [(height, width)]
    while max(sizes[-1]) > 512:
        sizes.append((max(1, sizes[-1][0] // 2), max(1, sizes[-1][1] // 2)))
    reduced = np.full((*(sizes[1] if len(sizes) > 1 else (1, 1)), 3), 255, np.uint8)

    def level0() -> Iterator[np.ndarray]:
        for top in range(0, height, _STRIP):
            strip = painter.strip(top, min(height, top + _STRIP))
            _paint_squares(strip, top, squares)
            half = Image.fromarray(strip).reduce(2) if len(sizes) > 1 else None
            if half is not None:
                rows = reduced[top // 2 : top // 2 + half.height]
                rows[:] = np.asarray(half)[: rows.shape[0], : rows.shape[1]]
            yield from _tiles(strip)

    resolution = (1e4 / mpp, 1e4 / mpp) if states_mpp else None
    unit = "CENTIMETER" if states_mpp else None
    options = {
        "tile": (256, 256),
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": quality},
        "dtype": np.uint8,
        "metadata": None,
        "software": "pixcell (drawn, not real tissue)",
    }
    with (
        write_whole(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=width * height > 1 << 30) as tiff,
    ):
        tiff.write(
            level0(),
            shape=(height, width, 3),
            resolution=resolution,
            resolutionunit=unit,
            description="Drawn tissue: synthetic, not a patient's sample",
            **options,
        )
        level = reduced
        for number, size in enumerate(sizes[1:], start=1):
            if number > 1:
                level = np.asarray(Image.fromarray(level).reduce(2))[: size[0], : size[1]]
            scaled = (resolution[0] / 2**number, resolution[1] / 2**number) if resolution else None
            tiff.write(
                _tiles(level),
                shape=(*size, 3),
                subfiletype=1,
                resolution=scaled,
                resolutionunit=unit,
                **options,
            )
    return DrawnSlide(
        path=path,
        width=width,
        height=height,
        mpp=mpp,
        seed=seed,
        num_levels=len(sizes),
        num_nuclei=painter.num_nuclei,
        squares=tuple(squares),
        tissue=painter.tissue_truth,
        pen=painter.pen_truth,
        map_scale=painter.map_scale,
    )


def draw_tissue(width: int, height: int, mpp: float = 0.5, seed: int = 0, full: bool = True) -> np.ndarray:
    """Return drawn tissue as (height, width, 3) uint8.

    Args:
        width: In pixels.
        height: In pixels.
        mpp: Microns per pixel.
        seed: Another seed, another piece.
        full: Tissue from border to border. False: a section on glass, as :func:`draw_slide` shows it.
    """
    painter = TissuePainter(width, height, mpp, seed, [], tissue=True, full=full)
    return np.concatenate([painter.strip(top, min(height, top + _STRIP)) for top in range(0, height, _STRIP)])


def _tiles(rows: np.ndarray, size: int = 256) -> Iterator[np.ndarray]:
    """Cut rows into tiles as TIFF wants them: whole ones, the last repeating its border."""
    height, width = rows.shape[:2]
    padded = np.pad(rows, ((0, -height % size), (0, -width % size), (0, 0)), mode="edge")
    for y in range(0, height, size):
        for x in range(0, width, size):
            yield padded[y : y + size, x : x + size]


def _paint_squares(strip: np.ndarray, top: int, squares: Sequence[Square]) -> None:
    rows = Box(0, top, strip.shape[1], strip.shape[0])
    for square in squares:
        seen = square.box.intersection(rows)
        if seen:
            strip[seen.y - top : seen.bottom - top, seen.x : seen.right] = square.colour
