"""Folders of images that somebody else has cut: they enter a store as they are, with their labels.

Each image becomes a centred grid of tiles (often just one), and images are gathered into one shard per
``slide`` of the CSV, or per folder. A JPEG that already is exactly one tile keeps its bytes: encoding it
again would only lose quality.
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pixcell.data.slides import Slide
from pixcell.data.tiling import (
    VERDICTS,
    Candidate,
    Tile,
    TilingConfig,
    Verdict,
    check_enlargement,
    encode_jpeg,
    tile_grid,
)
from pixcell.data.tissue import find_tissue, sharpness_of
from pixcell.errors import NoTissue, SlideError, UnreadableSlide
from pixcell.geometry import Box
from pixcell.provenance import hash_of

__all__ = ["ImageCutter", "ReadyMade"]


@dataclass(frozen=True)
class ReadyMade:
    """One image of a folder."""

    path: Path
    name: str
    """Its path relative to the folder; the tile's ``name`` in the store."""
    mpp: float | None = None
    """Microns per pixel, where the file does not state it."""
    attributes: Mapping[str, str] | None = None


class ImageCutter:
    """Cuts the images of one shard; the counterpart of ``SlideCutter``, and used in the same way.

    Attributes:
        counts: Number of candidates per verdict, once the iteration has ended.
        examples: Some candidates with their pictures, for the overview.
    """

    _SHOWN = 48

    def __init__(
        self, images: Sequence[ReadyMade], slide_id: str, config: TilingConfig, threads: int = 1
    ) -> None:
        """Take the images of one shard, in the order in which their tiles shall stand."""
        self.images, self.slide_id, self.config, self.threads = list(images), slide_id, config, threads
        self._verdicts: Counter[Verdict] = Counter()
        self._unreadable: list[dict[str, Any]] = []
        self._fingerprints: list[str] = []
        self._mpps: set[float] = set()
        self._resolutions: set[str] = set()
        self.examples: list[tuple[np.ndarray, Candidate]] = []

    def __iter__(self) -> Iterator[tuple[Tile, bytes]]:
        """Yield each kept tile with its JPEG bytes, image by image, in flat memory.

        Raises:
            UnreadableSlide: If an image cannot be read and ``on_unreadable`` is ``"fail"``.
            SlideError: If an image is too small or too coarse (same rule).
        """
        with ThreadPoolExecutor(self.threads) as pool:
            ahead: deque[Future[_Cut]] = deque()
            try:
                for image in self.images:
                    ahead.append(pool.submit(self._cut, image))
                    if len(ahead) > 4 * self.threads:
                        yield from self._taken(ahead.popleft().result())
                while ahead:
                    yield from self._taken(ahead.popleft().result())
            finally:
                for future in ahead:
                    future.cancel()

    def _taken(self, cut: "_Cut") -> Iterator[tuple[Tile, bytes]]:
        self._verdicts.update(candidate.verdict for _, candidate in cut.candidates)
        if cut.unreadable:
            self._verdicts["unreadable"] += 1
            self._unreadable.append({"name": cut.name, "reason": cut.unreadable})
        self._mpps |= cut.mpps
        self._resolutions |= cut.resolutions
        self.examples += cut.candidates[: self._SHOWN - len(self.examples)]
        yield from cut.tiles

    def _cut(self, image: ReadyMade) -> "_Cut":
        cut = _Cut(image.name, [], [], set(), set())
        try:
            with Slide.open(image.path, image.mpp) as slide:
                cut.mpps.add(slide.mpp)
                cut.resolutions.add(slide.resolution.source if slide.resolution else "")
                self._cut_slide(slide, image, cut)
        except SlideError as error:
            if self.config.on_unreadable == "fail":
                raise SlideError(
                    f"{image.name}: {error} Leave such images out with --set tiling.on_unreadable=drop"
                ) from error
            return replace(cut, tiles=[], candidates=[], unreadable=str(error))
        return cut

    def _cut_slide(self, slide: Slide, image: ReadyMade, cut: "_Cut") -> None:
        config = self.config
        check_enlargement(slide.mpp, config, image.path.name)
        boxes = tile_grid(slide.bounds, slide.mpp, config)
        if not boxes:
            raise SlideError(
                f"{image.path.name} is {slide.width} x {slide.height} pixels at {slide.mpp:g} mpp, less than "
                f"one tile of {config.tile_size} px at {config.mpp:g} mpp."
            )
        thumbnail = slide.thumbnail(config.tissue.thumbnail_side)
        scale = max(slide.width, slide.height) / max(thumbnail.shape[:2])
        tissue_map = find_tissue(thumbnail, scale, slide.mpp, config.tissue_for_tiles)
        whole = Box(0, 0, slide.width, slide.height)
        for box in boxes:
            pixels = slide.read(box, config.mpp, size=(config.tile_size, config.tile_size))
            tissue = round(tissue_map.tissue_fraction(box), 4)
            pen, sharpness = round(tissue_map.pen_fraction(box), 4), round(sharpness_of(pixels), 4)
            candidate = Candidate(box, tissue, pen, self._verdict(tissue, pen, sharpness))
            cut.candidates.append((_small(pixels), candidate))
            if candidate.verdict != "kept":
                continue
            tile = Tile(
                self.slide_id, box.x, box.y, config.tile_size, config.mpp, tissue, pen, sharpness,
                name=image.name, attributes=dict(image.attributes or {}),
            )  # fmt: skip
            as_stored = _as_stored(image.path, config.tile_size) if box == whole else None
            cut.tiles.append((tile, as_stored or encode_jpeg(pixels, config)))

    def _verdict(self, tissue: float, pen: float, sharpness: float) -> Verdict:
        if not self.config.filter_ready_made:
            return "kept"
        if pen > self.config.max_pen:
            return "pen"
        if tissue < self.config.min_tissue:
            return "glass"
        return "blurred" if sharpness < self.config.min_sharpness else "kept"

    @property
    def counts(self) -> dict[Verdict, int]:
        """Number of candidates per verdict."""
        return {verdict: self._verdicts[verdict] for verdict in VERDICTS}

    def fingerprint(self) -> str:
        """Identity of the images, their names, resolutions and labels.

        Raises:
            UnreadableSlide: If one of them is gone.
        """
        from pixcell.files import sha256_of

        try:
            return hash_of(
                [
                    [image.name, sha256_of(image.path), image.mpp, dict(image.attributes or {})]
                    for image in self.images
                ]
            )
        except OSError as error:
            raise UnreadableSlide(Path(error.filename or "?"), error.strerror or str(error)) from error

    def facts(self, fingerprint: str) -> dict[str, Any]:
        """What the store remembers about the shard."""
        return {
            "source": f"{len(self.images)} images",
            "fingerprint": fingerprint,
            "backend": "image",
            "mpp": min(self._mpps, default=None),
            "resolution": ", ".join(sorted(self._resolutions)),
            "attributes": {},
            "counts": self.counts,
            "unreadable": self._unreadable,
        }

    def no_tissue(self) -> NoTissue:
        """Return the error that says why there is no tile."""
        counts = ", ".join(f"{number} {verdict}" for verdict, number in self.counts.items() if number)
        return NoTissue(f"the {len(self.images)} images of {self.slide_id!r} gave no tile ({counts}).")


@dataclass(frozen=True)
class _Cut:
    """What became of one image."""

    name: str
    tiles: list[tuple[Tile, bytes]]
    candidates: list[tuple[np.ndarray, Candidate]]
    mpps: set[float]
    resolutions: set[str]
    unreadable: str = ""


def _small(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((144, 144), Image.Resampling.BOX))


def _as_stored(path: Path, tile_size: int) -> bytes | None:
    """Return the bytes of a JPEG that decodes to the very tile: RGB, this size, no profile, not turned."""
    try:
        with Image.open(path) as image:
            plain = (
                image.format == "JPEG"
                and image.mode == "RGB"
                and image.size == (tile_size, tile_size)
                and "icc_profile" not in image.info
                and image.getexif().get(0x0112, 1) == 1
            )
    except (UnidentifiedImageError, OSError):
        return None
    return path.read_bytes() if plain else None
