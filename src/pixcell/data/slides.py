"""One ``Slide`` for everything that holds tissue: scanner formats, pyramids, DICOM folders, plain images.

    with Slide.open(Path("case.svs")) as slide:
        field = slide.read(Box(x=12_000, y=8_000, width=2_048, height=2_048), mpp=0.5)

Positions are pixels of level 0, sizes come from microns. Stored pixels that are not square (sides that differ
by more than one percent) are presented as square ones of the finer side, here and everywhere after:
``width``, ``levels`` and every box count those. Beyond the slide, and where a scanner stored nothing, is
white glass.
"""

import functools
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np
from PIL import Image

from pixcell.data.backends import Backend, open_backend
from pixcell.data.colour import ColourProfile
from pixcell.data.dicom import dicom_series, is_dicom
from pixcell.data.resolution import Resolution
from pixcell.errors import SlideError, UnknownResolution, UnreadableSlide
from pixcell.geometry import Box, level_for, scale_between

__all__ = ["SLIDE_SUFFIXES", "Level", "Resolution", "Slide", "find_slides"]

SLIDE_SUFFIXES = frozenset(
    {
        *(
            ".svs",
            ".tif",
            ".tiff",
            ".ndpi",
            ".vms",
            ".vmu",
            ".scn",
            ".mrxs",
            ".svslide",
            ".bif",
            ".czi",
            ".dcm",
        ),
        *(".png", ".jpg", ".jpeg", ".jp2", ".bmp", ".webp"),
    }
)
"""Endings by which slides are found in a folder. A file that is named directly may have any ending."""

_MOST_PIXELS_AT_ONCE = 1 << 24
_SAMPLED_BYTES = 1 << 16


@dataclass(frozen=True)
class Level:
    """A level of the pyramid, in square pixels."""

    width: int
    height: int
    downsample: float
    """Level-0 pixels per pixel of this level."""


class Slide:
    """An opened slide. Reading is safe from several threads; other processes open it by its path."""

    def __init__(self, path: Path, backend: Backend, source_mpp: float | None = None) -> None:
        """Use :meth:`open`."""
        self.path = path
        self._backend = backend
        self.backend = backend.name
        self.resolution = (
            backend.resolution
            if source_mpp is None
            else Resolution(source_mpp, source_mpp, source_mpp, "given by the user")
        )
        stretch_x, stretch_y = self.resolution.stretch if self.resolution else (1.0, 1.0)
        stored_width, stored_height = backend.levels[0]
        self.width, self.height = round(stored_width * stretch_x), round(stored_height * stretch_y)
        # Level-0 square pixels per stored pixel of each level, along x and y.
        self._factors = [
            (factor * stretch_x, factor_y * stretch_y)
            for factor, factor_y in (
                _downsample(stored_width, stored_height, width, height) for width, height in backend.levels
            )
        ]
        self.levels = tuple(
            Level(round(width * stretch_x), round(height * stretch_y), min(x / stretch_x, y / stretch_y))
            for (width, height), (x, y) in zip(backend.levels, self._factors, strict=True)
        )
        self.bounds = self._bounds(stretch_x, stretch_y)
        self._profile = ColourProfile(backend.icc)
        parts = [backend.pixels]
        if backend.name != "image":  # a plain image has had its profile applied when it was decoded
            parts.append(self._profile.report)
        self.colour = "; ".join(parts)
        properties = dict(backend.properties)
        if (stretch_x, stretch_y) != (1.0, 1.0):
            properties["pixcell.stretch"] = (
                f"{stretch_x:.6g} x {stretch_y:.6g} (stored pixels are not square)"
            )
        self.properties: Mapping[str, str] = MappingProxyType(properties)

    @classmethod
    def open(cls, path: Path, source_mpp: float | None = None) -> Self:
        """Open a slide, an image, or a folder of DICOM instances.

        Args:
            path: What to open.
            source_mpp: Microns per pixel of level 0, for a file that does not state it or states it wrongly.
                Stored pixels then count as square.

        Raises:
            UnreadableSlide: If it is missing, empty, truncated, or of no known format.
            MissingExtra: If it is DICOM and wsidicom is not installed.
            SlideError: If ``source_mpp`` is no positive number.
        """
        path = Path(path)
        if source_mpp is not None and not (math.isfinite(source_mpp) and source_mpp > 0):
            raise SlideError(f"a resolution is a positive number of microns per pixel, not {source_mpp}.")
        return cls(path, open_backend(path), source_mpp)

    @property
    def mpp(self) -> float:
        """Microns per pixel of level 0.

        Raises:
            UnknownResolution: If the file does not state it and nobody gave it.
        """
        if self.resolution is None:
            raise UnknownResolution(self.path)
        return self.resolution.mpp

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of the content, the same under another name or in another folder.

        From the size, the first and last 64 KiB and sixteen places between, of every file of the slide:
        enough to tell slides apart without reading gigabytes, not to prove that no byte was changed.
        """
        return _fingerprint(self.path)

    def read(self, box: Box, mpp: float | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return a part of the slide at any resolution.

        The coarsest level that still has every pixel asked for is read with a margin, and resampled with an
        antialiasing filter at exact positions: boxes that touch continue each other without a seam.

        Args:
            box: Level-0 pixels; may reach beyond the slide, where it is white.
            mpp: Resolution of the result. None: that of level 0. Equal within one percent counts as equal.
            size: (height, width) of the result, if rounding must not decide it.

        Returns:
            (height, width, 3) uint8, sRGB if the slide has a profile.

        Raises:
            UnknownResolution: If ``mpp`` is given and the slide's own is unknown.
            UnreadableSlide: If a stored part of the box is corrupt. Other boxes remain readable.
        """
        scale = 1.0 if mpp is None else scale_between(self.mpp, mpp)
        height, width = size or (max(1, round(box.height / scale)), max(1, round(box.width / scale)))
        wanted = min(box.width / width, box.height / height)
        level = level_for(wanted, [each.downsample for each in self.levels])
        factor_x, factor_y = self._factors[level]
        area = _Area(box.x / factor_x, box.y / factor_y, box.right / factor_x, box.bottom / factor_y)
        try:
            pixels = self._resampled(level, area, height, width)
        except _RegionFailed as failed:
            said = " ".join(str(failed.__cause__).split()) or type(failed.__cause__).__name__
            raise UnreadableSlide(
                self.path,
                f"the region x {box.x}, y {box.y}, {box.width} x {box.height} (level 0) "
                f"cannot be decoded: {said}",
            ) from failed.__cause__
        return self._profile.apply(pixels)

    def thumbnail(self, max_side: int = 2048) -> np.ndarray:
        """Return the whole slide, its longer side at most ``max_side`` pixels (never enlarged)."""
        scale = max(1.0, max(self.width, self.height) / max_side)
        size = (max(1, round(self.height / scale)), max(1, round(self.width / scale)))
        return self.read(Box(0, 0, self.width, self.height), size=size)

    def close(self) -> None:
        """Release the file."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a Slide holds an open file and is not sent to other processes: send its path")

    def _bounds(self, stretch_x: float, stretch_y: float) -> Box:
        everything = Box(0, 0, self.width, self.height)
        stated = self._backend.bounds
        if stated is None:
            return everything
        x, y = math.floor(stated.x * stretch_x), math.floor(stated.y * stretch_y)
        width, height = math.ceil(stated.width * stretch_x), math.ceil(stated.height * stretch_y)
        return everything.intersection(Box(x, y, width, height)) or everything

    def _resampled(self, level: int, area: "_Area", height: int, width: int) -> np.ndarray:
        if area.width * area.height > _MOST_PIXELS_AT_ONCE and max(height, width) > 1:
            # A thumbnail of a slide without a pyramid: in parts, so that memory stays flat.
            if height >= width:
                middle, cut = height // 2, area.top + area.height * (height // 2) / height
                upper, lower = (
                    _Area(area.left, area.top, area.right, cut),
                    _Area(area.left, cut, area.right, area.bottom),
                )
                return np.concatenate(
                    [
                        self._resampled(level, upper, middle, width),
                        self._resampled(level, lower, height - middle, width),
                    ]
                )
            middle, cut = width // 2, area.left + area.width * (width // 2) / width
            before, after = (
                _Area(area.left, area.top, cut, area.bottom),
                _Area(cut, area.top, area.right, area.bottom),
            )
            return np.concatenate(
                [
                    self._resampled(level, before, height, middle),
                    self._resampled(level, after, height, width - middle),
                ],
                axis=1,
            )
        scale_x, scale_y = area.width / width, area.height / height
        if _is_whole(area, scale_x, scale_y, height, width):
            return self._pixels(level, Box(round(area.left), round(area.top), width, height), margin=0)[0]
        # Hamming where pixels are merged (sharp, no ringing), cubic where few or none are.
        smoothing = Image.Resampling.HAMMING if min(scale_x, scale_y) >= 1.5 else Image.Resampling.BICUBIC
        margin = math.ceil(2 * max(1.0, scale_x, scale_y)) + 1
        left, top = math.floor(area.left), math.floor(area.top)
        outer = Box(left, top, max(1, math.ceil(area.right) - left), max(1, math.ceil(area.bottom) - top))
        pixels, (x, y) = self._pixels(level, outer, margin)
        place = (area.left - x, area.top - y, area.right - x, area.bottom - y)
        # Rounding may push the frame past the last pixel by a few billionths, which PIL refuses.
        place = (
            max(0.0, place[0]),
            max(0.0, place[1]),
            min(pixels.shape[1], place[2]),
            min(pixels.shape[0], place[3]),
        )
        return np.array(Image.fromarray(pixels).resize((width, height), smoothing, box=place))

    def _pixels(self, level: int, box: Box, margin: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Return the level's pixels in a box, with a margin where the level has one, and their corner.

        Beyond the slide is white. A level whose size was rounded down lacks up to one row and column of
        what it shows: those repeat the last ones.
        """
        width, height = self._backend.levels[level]
        whole = Box(0, 0, width, height)
        grown = Box(box.x - margin, box.y - margin, box.width + 2 * margin, box.height + 2 * margin)
        x, y = min(box.x, max(0, grown.x)), min(box.y, max(0, grown.y))
        right, bottom = max(box.right, min(width, grown.right)), max(box.bottom, min(height, grown.bottom))
        outer = Box(x, y, right - x, bottom - y)
        if whole.contains(outer):
            return self._region(level, outer), (x, y)
        canvas = np.full((outer.height, outer.width, 3), 255, np.uint8)
        stored = outer.intersection(whole)
        if stored is not None:
            left, top = stored.x - x, stored.y - y
            canvas[top : top + stored.height, left : left + stored.width] = self._backend.region(
                level, stored
            )
            if level > 0 and outer.right == width + 1:
                canvas[:, -1] = canvas[:, -2]
            if level > 0 and outer.bottom == height + 1:
                canvas[-1] = canvas[-2]
        return canvas, (x, y)

    def _region(self, level: int, box: Box) -> np.ndarray:
        try:
            return self._backend.region(level, box)
        except MemoryError:
            raise
        except Exception as error:
            # Every reader has its own errors; whatever one says, these pixels cannot be had.
            raise _RegionFailed from error


class _RegionFailed(Exception):
    """A reader could not decode a region; its own error is the cause."""


@dataclass(frozen=True)
class _Area:
    """A rectangle between pixels of a level: positions are real numbers."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


def _is_whole(area: _Area, scale_x: float, scale_y: float, height: int, width: int) -> bool:
    """Tell whether stored pixels can be taken as they are: nothing drifts by more than a tenth of a pixel."""
    return (
        abs(scale_x - 1) * width <= 0.1
        and abs(scale_y - 1) * height <= 0.1
        and abs(area.left - round(area.left)) <= 0.1
        and abs(area.top - round(area.top)) <= 0.1
    )


def _downsample(width: int, height: int, level_width: int, level_height: int) -> tuple[float, float]:
    """Return how many level-0 pixels make one of a level, along x and y.

    Pyramids halve and drop the remainder: 2967 becomes 1483 and 741. The true factor is then exactly 4, not
    2967/741; with the quotient, positions would drift by up to a level pixel across the slide.

    Examples:
        >>> _downsample(2220, 2967, 555, 741)
        (4.0, 4.0)
    """
    factors = []
    for full, reduced in ((width, level_width), (height, level_height)):
        whole = round(full / reduced)
        factors.append(float(whole) if full // whole <= reduced <= -(-full // whole) else full / reduced)
    return factors[0], factors[1]


def find_slides(path: Path) -> list[Path]:
    """Return the slides that a path stands for.

    A file is a slide whatever its ending. A folder gives the slides in it and below, sorted by path; hidden
    files, unknown endings and tile stores are left out. A folder that holds DICOM instances is one slide.

    Raises:
        UnreadableSlide: If there is no such file, no slide in the folder, or a folder that may not be read.
    """
    path = Path(path)
    if not path.exists():
        raise UnreadableSlide(path, f"there is no such file or folder ({path})")
    if not path.is_dir():
        return [path]

    def unlisted(
        error: OSError,
    ) -> None:  # os.walk would pass it over, and its slides would be missed by nobody
        raise UnreadableSlide(
            Path(error.filename), f"the folder cannot be listed ({error.strerror}: {error.filename})"
        ) from error

    found: list[Path] = []
    for place, folders, names in os.walk(path, onerror=unlisted):
        if "store.json" in names:  # a store made in the folder of its slides; its pictures are no slides
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(place)
        files = [folder / name for name in sorted(names) if not name.startswith(".")]
        if any(is_dicom(file) for file in files):
            found.append(folder)
            files = [file for file in files if not is_dicom(file)]
        if any(file.suffix.lower() in (".vms", ".vmu") for file in files):
            # Hamamatsu's old formats keep their pixels in pictures beside the file that names them.
            files = [file for file in files if file.suffix.lower() in (".vms", ".vmu")]
        found += [
            file for file in files if file.suffix.lower() in SLIDE_SUFFIXES and file.suffix.lower() != ".dcm"
        ]
    if not found:
        raise UnreadableSlide(
            path, f"the folder holds no slide or image (known endings: {' '.join(sorted(SLIDE_SUFFIXES))})"
        )
    return sorted(found)


def _fingerprint(path: Path) -> str:
    if path.is_dir() or is_dicom(path):
        files = dicom_series(path)
    elif path.suffix.lower() == ".mrxs" and path.with_suffix("").is_dir():
        files = [path, *sorted(file for file in path.with_suffix("").iterdir() if file.is_file())]
    else:
        files = [path]
    # Sorted by content: the names of the files are no part of the identity.
    digests = sorted(_sampled_digest(file) for file in files)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def _sampled_digest(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}:".encode())
    with file.open("rb") as stream:
        places = sorted({max(0, (size - _SAMPLED_BYTES) * step // 17) for step in range(18)})
        for place in places:
            stream.seek(place)
            digest.update(stream.read(_SAMPLED_BYTES))
    return digest.digest()
