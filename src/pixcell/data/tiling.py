"""Where a slide is cut into tiles, and which of them are worth keeping.

Tiles lie on a regular grid, wholly inside the slide, with what is left over shared between the borders.
Tissue and pen are judged on the thumbnail, before anything is read; sharpness on the tile itself. Reading,
judging and JPEG encoding all leave Python's lock, so that threads keep every core busy on one slide; tiles
come out in the order of the grid whatever the number of threads.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import imagecodecs
import numpy as np
from pydantic import Field, model_validator

from pixcell.config import Config
from pixcell.data.slides import Slide
from pixcell.data.tissue import TissueConfig, TissueMap, find_tissue, sharpness_of
from pixcell.errors import NoTissue, SlideError, UnreadableSlide
from pixcell.geometry import Box, scale_between

__all__ = [
    "VERDICTS",
    "Candidate",
    "SlideCutter",
    "Tile",
    "TilingConfig",
    "TilingRecipe",
    "Verdict",
    "check_enlargement",
    "encode_jpeg",
    "tile_grid",
]

Verdict = Literal["kept", "glass", "pen", "blurred", "unreadable"]
VERDICTS: tuple[Verdict, ...] = ("kept", "glass", "pen", "blurred", "unreadable")

# Tiles per errand of a thread: neighbours share blocks of the scanner's file, and a reader's cache is small.
_ERRAND = 8
_BLOCK = 128  # pixels of an overview that has to be pieced together


class TilingConfig(Config):
    """How a slide is cut into tiles."""

    mpp: float = Field(0.5, gt=0)
    """Resolution of a stored tile, in microns per pixel (0.5 is about 20x)."""
    tile_size: int = Field(1024, gt=0, multiple_of=128)
    """Side of a stored tile, in pixels at ``mpp``. Models see fields of 128, 256, 512 or 1024 of them."""
    stride: int | None = Field(None, gt=0)
    """Step between tiles, in pixels at ``mpp``. None: no overlap."""
    min_tissue: float = Field(0.5, ge=0, le=1)
    """Least share of tissue. Half keeps the rims of a section, where much of the interest is, and leaves a
    model too little glass to learn from."""
    max_pen: float = Field(0.01, ge=0, le=1)
    """Largest share of pen. One percent of a 1024-px tile is a square of 100 px, and a model that sees ink
    draws ink."""
    min_sharpness: float = Field(0.5, ge=0)
    """Least sharpness (see :func:`pixcell.data.tissue.sharpness_of`). Tissue in focus measures 0.65 to 2.5,
    blur of three pixels 0.43 to 0.55. 0 keeps everything."""
    max_upsampling: float = Field(1.25, ge=1)
    """How much a slide may be enlarged to reach ``mpp``. Detail that was not scanned cannot be had."""
    jpeg_quality: int = Field(90, ge=1, le=100)
    """Quality of stored tiles. Most scanners store 70 to 90 themselves."""
    jpeg_subsampling: Literal["444", "422", "420"] = "444"
    """Resolution of colour in stored tiles. 444 keeps all of it: colour is what a stain is."""
    on_unreadable: Literal["fail", "drop"] = "fail"
    """A tile that does not decode: the slide fails, or goes without that tile (counted and listed)."""
    filter_ready_made: bool = False
    """Whether ready-made tiles must pass ``min_tissue``, ``max_pen`` and ``min_sharpness`` too."""
    tissue: TissueConfig = TissueConfig()
    """How tissue and pen are found."""

    @model_validator(mode="after")
    def _stride_leaves_no_gap(self) -> Self:
        if self.stride is not None and self.stride > self.tile_size:
            raise ValueError(
                f"stride {self.stride} is larger than tile_size {self.tile_size}: "
                "tissue between tiles would be lost"
            )
        return self

    @property
    def step(self) -> int:
        """Pixels at ``mpp`` from one tile to the next."""
        return self.stride or self.tile_size

    @property
    def tissue_for_tiles(self) -> TissueConfig:
        """``tissue`` with holes of at most a quarter of a tile: no tile shall lie in a lumen."""
        quarter = (self.tile_size * self.mpp) ** 2 / 4
        return self.tissue.with_changes(max_hole_um2=min(self.tissue.max_hole_um2, quarter))


class TilingRecipe(Config):
    """A complete description of a tiling run."""

    name: str
    """What it is called."""
    tiling: TilingConfig = TilingConfig()
    """How slides are cut."""


@dataclass(frozen=True)
class Tile:
    """Where a stored tile sits, and what is known about it."""

    slide_id: str
    x: int
    """Left edge, in level-0 pixels."""
    y: int
    """Upper edge, in level-0 pixels."""
    size: int
    """Side, in pixels at ``mpp``."""
    mpp: float
    tissue: float
    """Share of tissue, 0 to 1."""
    pen: float
    """Share of pen, 0 to 1."""
    sharpness: float
    name: str = ""
    """File that a ready-made tile came from; empty for a tile of a slide."""
    attributes: Mapping[str, str] = field(default_factory=dict)
    """Labels: organ, stain, split, ..."""


@dataclass(frozen=True)
class Candidate:
    """A place of the grid and what became of it."""

    box: Box
    tissue: float
    pen: float
    verdict: Verdict


def tile_grid(area: Box, source_mpp: float, config: TilingConfig) -> list[Box]:
    """Return the places of tiles in an area, in level-0 pixels, row by row.

    Examples:
        >>> config = TilingConfig(mpp=0.5, tile_size=128)
        >>> [(box.x, box.y, box.width) for box in tile_grid(Box(0, 0, 600, 300), 0.25, config)]
        [(44, 22, 256), (300, 22, 256)]
    """
    scale = scale_between(source_mpp, config.mpp)
    side, step = config.tile_size * scale, config.step * scale
    # Rounding of mpp may leave an area one pixel short of a whole tile; the reader pads with white.
    across, down = (int((extent + 1 - side) // step) + 1 for extent in (area.width, area.height))
    if across < 1 or down < 1:
        return []
    left, top = (
        max(0.0, (extent - (count - 1) * step - side) / 2)
        for extent, count in ((area.width, across), (area.height, down))
    )
    return [
        Box(area.x + round(left + column * step), area.y + round(top + row * step), round(side), round(side))
        for row in range(down)
        for column in range(across)
    ]


def check_enlargement(source_mpp: float, config: TilingConfig, name: str) -> None:
    """Refuse a slide that is much coarser than the tiles asked for.

    Raises:
        SlideError: With the resolution that would fit.
    """
    enlargement = source_mpp / config.mpp
    if enlargement > config.max_upsampling * 1.01:
        raise SlideError(
            f"{name} has {source_mpp:g} microns per pixel; tiles at {config.mpp:g} would enlarge it "
            f"{enlargement:.3g} times (tiling.max_upsampling is {config.max_upsampling:g}). "
            f"Ask for coarser tiles: --set tiling.mpp={source_mpp:g}"
        )


def encode_jpeg(image: np.ndarray, config: TilingConfig) -> bytes:
    """Return the JPEG bytes of a (height, width, 3) uint8 image; same pixels, same bytes."""
    return bytes(
        imagecodecs.jpeg8_encode(
            image, level=config.jpeg_quality, colorspace="RGB", outcolorspace="YCBCR",
            subsampling=config.jpeg_subsampling,
        )
    )  # fmt: skip


class SlideCutter:
    """Cuts one slide: iterate it once for the tiles, then read what became of every candidate.

    Attributes:
        slide: The opened slide.
        thumbnail: Its overview, (height, width, 3) uint8.
        tissue_map: Tissue and pen over it.
        candidates: All places of the grid; verdicts are final once the iteration has ended.
        unreadable: Places that did not decode, with the reason (``on_unreadable="drop"``).
    """

    def __init__(
        self,
        path: Path,
        slide_id: str,
        config: TilingConfig,
        source_mpp: float | None = None,
        attributes: Mapping[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        """Open a slide and judge its grid on the thumbnail.

        Raises:
            UnreadableSlide: If it cannot be read.
            UnknownResolution: If it states none and none is given.
            SlideError: If it is too coarse for the tiles asked for, or smaller than one.
        """
        self.path, self.slide_id, self.config, self.threads = path, slide_id, config, threads
        self.attributes = dict(attributes or {})
        self.slide = Slide.open(path, source_mpp)
        self._lock = threading.Lock()
        try:
            self._survey()
        except BaseException:
            self.close()
            raise

    def _survey(self) -> None:
        slide, config = self.slide, self.config
        check_enlargement(slide.mpp, config, self.path.name)
        boxes = tile_grid(slide.bounds, slide.mpp, config)
        if not boxes:
            needed = round(config.tile_size * scale_between(slide.mpp, config.mpp))
            raise SlideError(
                f"{self.path.name} is {slide.bounds.width} x {slide.bounds.height} pixels, but one tile of "
                f"{config.tile_size} px at {config.mpp:g} mpp needs {needed}. "
                "Ask for smaller tiles: --set tiling.tile_size=256"
            )
        self.unreadable: list[dict[str, Any]] = []
        self.thumbnail = self._overview()
        scale = max(slide.width, slide.height) / max(self.thumbnail.shape[:2])
        self.tissue_map: TissueMap = find_tissue(self.thumbnail, scale, slide.mpp, config.tissue_for_tiles)
        self.candidates = [self._judged(box) for box in boxes]

    def _overview(self) -> np.ndarray:
        """Return the thumbnail. A corrupt place in one level shall not hide the slide."""
        # Finer than the mask is of no use but to the eye: 1024 pixels are enough for a picture.
        slide, tissue = self.slide, self.config.tissue
        needed = round(max(slide.width, slide.height) * slide.mpp / tissue.map_mpp)
        side = min(tissue.thumbnail_side, max(needed, 1024))
        for smaller in (side, side // 2, side // 4, side // 8):
            try:
                return slide.thumbnail(smaller)
            except UnreadableSlide:
                continue  # coarser levels hold the same picture in other bytes
        scale = max(1.0, max(slide.width, slide.height) / side)
        thumbnail = np.full((round(slide.height / scale), round(slide.width / scale), 3), 255, np.uint8)
        for y in range(0, thumbnail.shape[0], _BLOCK):
            for x in range(0, thumbnail.shape[1], _BLOCK):
                block = thumbnail[y : y + _BLOCK, x : x + _BLOCK]
                height, width = block.shape[:2]
                box = Box(round(x * scale), round(y * scale), round(width * scale), round(height * scale))
                try:
                    block[:] = slide.read(box, size=(height, width))
                except UnreadableSlide as error:
                    if self.config.on_unreadable == "fail":
                        raise self._unreadable(error) from error
                    self.unreadable.append({"x": box.x, "y": box.y, "reason": error.reason})
        return thumbnail

    def _unreadable(self, error: UnreadableSlide) -> UnreadableSlide:
        return UnreadableSlide(
            self.path,
            f"{error.reason}. Copy or scan the slide again, or go without such tiles: "
            "--set tiling.on_unreadable=drop",
        )

    def _judged(self, box: Box) -> Candidate:
        tissue = round(self.tissue_map.tissue_fraction(box), 4)
        pen = round(self.tissue_map.pen_fraction(box), 4)
        verdict: Verdict = "kept"
        if pen > self.config.max_pen:
            verdict = "pen"
        elif tissue < self.config.min_tissue:
            verdict = "glass"
        return Candidate(box, tissue, pen, verdict)

    def __iter__(self) -> Iterator[tuple[Tile, bytes]]:
        """Yield each kept tile with its JPEG bytes, in the order of the grid, in flat memory.

        Raises:
            UnreadableSlide: If a tile does not decode and ``on_unreadable`` is ``"fail"``.
        """
        wanted = [index for index, candidate in enumerate(self.candidates) if candidate.verdict == "kept"]
        errands = [wanted[start : start + _ERRAND] for start in range(0, len(wanted), _ERRAND)]
        with ThreadPoolExecutor(self.threads) as pool:
            ahead: deque[Future[list[tuple[Tile, bytes]]]] = deque()
            try:
                for errand in errands:
                    ahead.append(pool.submit(self._cut, errand))
                    if len(ahead) > self.threads + 1:
                        yield from ahead.popleft().result()
                while ahead:
                    yield from ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _cut(self, errand: Sequence[int]) -> list[tuple[Tile, bytes]]:
        config, tiles = self.config, []
        for index in errand:
            candidate = self.candidates[index]
            box = candidate.box
            try:
                image = self.slide.read(box, config.mpp, size=(config.tile_size, config.tile_size))
            except UnreadableSlide as error:
                if config.on_unreadable == "fail":
                    raise self._unreadable(error) from error
                self._note(index, "unreadable", {"x": box.x, "y": box.y, "reason": error.reason})
                continue
            sharpness = round(sharpness_of(image), 4)
            if sharpness < config.min_sharpness:
                self._note(index, "blurred")
                continue
            tile = Tile(
                self.slide_id, box.x, box.y, config.tile_size, config.mpp,
                candidate.tissue, candidate.pen, sharpness, attributes=self.attributes,
            )  # fmt: skip
            tiles.append((tile, encode_jpeg(image, config)))
        return tiles

    def _note(self, index: int, verdict: Verdict, unreadable: dict[str, Any] | None = None) -> None:
        with self._lock:
            self.candidates[index] = replace(self.candidates[index], verdict=verdict)
            if unreadable:
                self.unreadable.append(unreadable)

    @property
    def counts(self) -> dict[Verdict, int]:
        """Number of candidates per verdict."""
        found = Counter(candidate.verdict for candidate in self.candidates)
        return {verdict: found[verdict] for verdict in VERDICTS}

    @property
    def facts(self) -> dict[str, Any]:
        """What the store remembers about the slide. No paths and no times: same slide, same facts."""
        slide, pixel_mm = self.slide, self.tissue_map.scale * self.slide.mpp / 1000
        return {
            "source": self.path.name,
            "fingerprint": slide.fingerprint,
            "backend": slide.backend,
            "width": slide.width,
            "height": slide.height,
            "mpp": slide.mpp,
            "resolution": slide.resolution.source if slide.resolution else "",
            "colour": slide.colour,
            "attributes": self.attributes,
            "tissue_mm2": round(float(self.tissue_map.tissue.sum()) * pixel_mm**2, 3),
            "counts": self.counts,
            "unreadable": sorted(self.unreadable, key=lambda place: (place["y"], place["x"])),
        }

    def no_tissue(self) -> NoTissue:
        """Return the error that says why a slide gave no tile."""
        counts = self.counts
        dropped = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        return NoTissue(
            f"{self.path.name} gave no tile: of {len(self.candidates)} candidates {dropped} "
            f"({float(self.tissue_map.tissue.mean()):.1%} of the slide is tissue). Look at its picture in "
            "the qc folder; tiling.min_tissue, max_pen and min_sharpness decide."
        )

    def close(self) -> None:
        """Close the slide."""
        self.slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
