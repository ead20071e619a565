"""TIFF pyramids of every make, read segment by segment.

A segment is a tile or a strip as stored. Its bytes are fetched with a positioned read and decoded by
imagecodecs outside of the interpreter's lock, so several threads may read one slide; the last segments stay
in a small cache, because neighbouring boxes share them. For JPEG tiles the pixels are those of OpenSlide, bit
for bit (tested on real slides), at a fraction of the time.
"""

import collections
import math
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from pixcell.data.resolution import Resolution
from pixcell.data.tiff_tags import (
    APERIO_JPEG2000,
    NotThisReader,
    pixel_format,
    properties_of,
    resolution_of,
)
from pixcell.geometry import Box

__all__ = ["NotThisReader", "TiffBackend"]

_CACHE_BYTES = 48 << 20


class TiffBackend:
    """Levels of a TIFF: SubIFDs, pages marked as reduced, or plain pages of shrinking size."""

    name = "tiff"

    def __init__(self, path: Path) -> None:
        """Read the structure of the file, and no pixels.

        Raises:
            NotThisReader: If this is no TIFF, or one that is better left to another reader.
            ValueError: If it is a TIFF that nobody could show as a picture of tissue, or a truncated one.
        """
        self._file: Any = None
        try:
            tiff = tifffile.TiffFile(path)
        except (tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError) as error:
            raise NotThisReader(f"not a TIFF ({error})") from error
        with tiff:
            try:
                series, self._levels = _pyramid(tiff)
            except (tifffile.TiffFileError, IndexError, KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"its TIFF structure is damaged ({error})") from error
            base = self._levels[0].page
            self.levels = tuple((level.width, level.height) for level in self._levels)
            self._format, note = pixel_format(tiff, series, base)
            self.pixels = "; ".join(part for part in (self._format.describe(base.dtype), note) if part)
            profile = base.tags.valueof(34675)
            self.icc = bytes(profile) if profile else None
            self.properties = properties_of(tiff, base)
            self.resolution: Resolution | None
            self.resolution, remark = resolution_of(tiff, base)
            if remark:
                self.properties["pixcell.resolution-remark"] = remark
            self.bounds: Box | None = None
            self.jpeg2000 = base.compression in APERIO_JPEG2000
        size = path.stat().st_size
        for level in self._levels:
            level.check(size)
        self._file = _PositionedFile(path)
        self._cache = _SegmentCache(_CACHE_BYTES)

    @property
    def has_gaps(self) -> bool:
        """Tell whether segments are left out (OpenSlide fills them from coarser levels in Aperio files)."""
        return any(level.has_gaps for level in self._levels)

    def region(self, level: int, box: Box) -> np.ndarray:
        """Return (height, width, 3) uint8 of a box that lies inside the level."""
        stored = self._levels[level]
        pixels: np.ndarray | None = None
        for index, place in stored.segments_in(box):
            segment = self._cache.get((level, index))
            if segment is None:
                segment = self._format.to_rgb8(stored.decode(self._file, index))
                self._cache.put((level, index), segment)
            common = place.intersection(box)
            if common is None:
                continue
            if pixels is None:
                pixels = np.empty((box.height, box.width, 3), np.uint8)
            pixels[_inside(common, box)] = segment[_inside(common, place)]
        assert pixels is not None
        return pixels

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class _Level:
    """One level: its size and where its segments are stored. Several pages where channels are apart."""

    def __init__(self, pages: Sequence[Any]) -> None:
        self.page = pages[0].keyframe
        self.height, self.width = self.page.imagelength, self.page.imagewidth
        page = self.page
        self.segment_width = page.tilewidth if page.is_tiled else page.imagewidth
        self.segment_height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        self.columns = math.ceil(self.width / self.segment_width)
        self.rows = math.ceil(self.height / self.segment_height)
        apart = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1
        count = self.columns * self.rows
        # Segment i of the picture is in planes[k][i] for every k.
        self._planes = [
            (
                page.dataoffsets[plane * count : (plane + 1) * count],
                page.databytecounts[plane * count : (plane + 1) * count],
                plane * count,
            )
            for page in pages
            for plane in range(page.keyframe.samplesperpixel if apart else 1)
        ]
        if any(len(offsets) != count or len(lengths) != count for offsets, lengths, _ in self._planes):
            raise ValueError("its TIFF structure is damaged (segments are missing from the table)")
        self._tables, self._header = page.jpegtables, page.jpegheader
        self._decode = page.decode
        self._jpeg = page.compression == tifffile.COMPRESSION.JPEG

    @property
    def has_gaps(self) -> bool:
        return any(0 in lengths for _, lengths, _ in self._planes)

    def check(self, file_size: int) -> None:
        """Refuse a file that ends before its pixels do."""
        end = max(
            (o + n for offsets, lengths, _ in self._planes for o, n in zip(offsets, lengths, strict=True)),
            default=0,
        )
        if end > file_size:
            raise ValueError(
                f"it is truncated: its pixels reach to byte {end:,}, the file ends at {file_size:,}; "
                "copy or download it again"
            )

    def segments_in(self, box: Box) -> Iterator[tuple[int, Box]]:
        """Yield the index and the place of every segment that a box touches."""
        for row in range(box.y // self.segment_height, (box.bottom - 1) // self.segment_height + 1):
            for column in range(box.x // self.segment_width, (box.right - 1) // self.segment_width + 1):
                x, y = column * self.segment_width, row * self.segment_height
                yield (
                    row * self.columns + column,
                    Box(
                        x,
                        y,
                        min(self.segment_width, self.width - x),
                        min(self.segment_height, self.height - y),
                    ),
                )

    def decode(self, file: "_PositionedFile", index: int) -> np.ndarray:
        """Return the samples of a segment; white where it was never stored."""
        planes = []
        for offsets, lengths, first in self._planes:
            if not lengths[index]:
                return self._blank(index)
            data = file.read(offsets[index], lengths[index])
            if self._jpeg and self._header is None and b"\xff\xd9" not in data[-16:]:
                # libjpeg fills the rest of a broken-off image with grey, without an error.
                raise ValueError("a JPEG tile breaks off before its end")
            decoded, _, _ = self._decode(
                data, first + index, jpegtables=self._tables, jpegheader=self._header
            )
            if decoded is None:
                return self._blank(index)
            planes.append(decoded[0])
        return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)

    def _blank(self, index: int) -> np.ndarray:
        height = min(self.segment_height, self.height - index // self.columns * self.segment_height)
        width = min(self.segment_width, self.width - index % self.columns * self.segment_width)
        inverted = self.page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        dtype = self.page.dtype
        white = (
            0
            if inverted
            else True
            if dtype.kind == "b"
            else np.nan
            if dtype.kind == "f"
            else np.iinfo(dtype).max
        )
        samples = len(self._planes) if len(self._planes) > 1 else self.page.samplesperpixel
        return np.full((height, width, samples), white, dtype)


class _PositionedFile:
    """Reads at a place without moving a shared position, from any thread."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            data = os.pread(self._stream.fileno(), length, offset)
        else:  # Windows
            with self._lock:
                self._stream.seek(offset)
                data = self._stream.read(length)
        if len(data) != length:
            raise ValueError("the file ends in the middle of its pixels")
        return data

    def close(self) -> None:
        self._stream.close()


class _SegmentCache:
    """The segments used last, up to a number of bytes; always the newest one, however large."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._segments: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> np.ndarray | None:
        with self._lock:
            segment = self._segments.get(key)
            if segment is not None:
                self._segments.move_to_end(key)
            return segment

    def put(self, key: tuple[int, int], segment: np.ndarray) -> None:
        with self._lock:
            if key in self._segments:  # another thread decoded the same one meanwhile
                return
            self._segments[key] = segment
            self._bytes += segment.nbytes
            while self._bytes > self._limit and len(self._segments) > 1:
                self._bytes -= self._segments.popitem(last=False)[1].nbytes


def _inside(part: Box, whole: Box) -> tuple[slice, slice]:
    return (
        slice(part.y - whole.y, part.bottom - whole.y),
        slice(part.x - whole.x, part.right - whole.x),
    )


def _pyramid(tiff: tifffile.TiffFile) -> tuple[Any, list[_Level]]:
    """Pick the series that is the slide (the largest picture) and collect its levels, finest first."""
    pictures = [series for series in tiff.series if "Y" in series.axes and "X" in series.axes]
    if not pictures:
        raise ValueError("the TIFF holds no picture")
    main = max(pictures, key=lambda series: series.sizes.get("width", 0) * series.sizes.get("height", 0))
    stack = {
        axis: length
        for axis, length in zip(main.axes, main.shape, strict=True)
        if axis not in "YXSC" and length > 1
    }
    if stack:
        listed = ", ".join(f"{length} along {axis}" for axis, length in stack.items())
        raise ValueError(f"it is a stack of pictures ({listed}), not one picture; export a single plane")
    levels = [_Level(list(level.pages)) for level in main.levels]
    if len(levels) == 1:
        # Some programs write a pyramid as pages that are nowhere marked as one.
        base = levels[0]
        for series in pictures:
            page = series.keyframe
            if series is not main and _is_reduced(page, base.page):
                levels.append(_Level(list(series.pages)))
    levels.sort(key=lambda level: -level.width)
    return main, levels


def _is_reduced(page: Any, base: Any) -> bool:
    """Tell whether a page can be the same picture, smaller: same kind, same shape, same way of storing."""
    factor = base.imagewidth / page.imagewidth
    return (
        (page.is_tiled, page.samplesperpixel, page.dtype, page.photometric)
        == (base.is_tiled, base.samplesperpixel, base.dtype, base.photometric)
        and base.is_tiled
        and factor >= 1.5
        and abs(base.imagelength / factor - page.imagelength) <= 1.5
    )
