"""The images column: the JPEG bytes of a slide's tiles as they were cut, and where each was.

One HDF5 file per slide. The JPEGs stand one after another in ``jpeg`` (``offsets`` says where each begins);
``x``, ``y`` (level-0 pixels), ``tissue``, ``pen``, ``sharpness`` and ``name`` have one entry per tile.
``attributes`` holds the distinct sets of labels as JSON, ``attributes_of`` which of them a tile has.
``slide`` is JSON about the slide. Fixed format options and no clock times: same tiles, same bytes.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import h5py
import numpy as np

from pixcell.data.sealed import OpenFile, seal, sealed_digest
from pixcell.errors import CorruptShard, NoTissue
from pixcell.files import write_whole

__all__ = ["ImageShard", "TileRecord", "decode_tile", "is_whole_jpeg", "write_image_shard"]

_CHUNK = 1 << 18
_NUMBERS = {"x": np.int64, "y": np.int64, "tissue": np.float64, "pen": np.float64, "sharpness": np.float64}
_FORMAT = "pixcell-images-1"


@runtime_checkable
class TileRecord(Protocol):
    """What the store keeps of a tile besides its pixels; :class:`pixcell.data.tiling.Tile` is one."""

    @property
    def x(self) -> int:
        """Left edge, in level-0 pixels."""

    @property
    def y(self) -> int:
        """Upper edge, in level-0 pixels."""

    @property
    def size(self) -> int:
        """Side, in pixels at ``mpp``."""

    @property
    def mpp(self) -> float:
        """Microns per pixel."""

    @property
    def tissue(self) -> float:
        """Share of the tile that is tissue."""

    @property
    def pen(self) -> float:
        """Share of the tile that is pen."""

    @property
    def sharpness(self) -> float:
        """How sharp the tile is."""

    @property
    def name(self) -> str:
        """File name of a ready-made tile, or empty."""

    @property
    def attributes(self) -> Mapping[str, str]:
        """Labels: organ, stain, split, ..."""


def is_whole_jpeg(data: bytes) -> bool:
    """Tell whether a JPEG has its beginning and its end.

    A decoder fills what is missing at the end with grey and says nothing. Neither marker can occur inside of
    pixels, and some programs write more behind the end.

    >>> is_whole_jpeg(b"\\xff\\xd8 header \\xff\\xda pixels \\xff\\xd9 padding")
    True
    >>> is_whole_jpeg(b"\\xff\\xd8 thumbnail \\xff\\xd9 header \\xff\\xda pix")
    False
    """
    return data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda") >= 0


def decode_tile(jpeg: bytes, place: str, way_out: str) -> np.ndarray:
    """Return the pixels of a stored JPEG, (height, width, 3) uint8.

    Args:
        jpeg: Its bytes.
        place: Which tile it is, for messages.
        way_out: What to do if it is damaged, for messages.

    Raises:
        CorruptShard: If it is cut short or does not decode.
    """
    from imagecodecs import JpegError, jpeg_decode

    if not is_whole_jpeg(jpeg):
        raise CorruptShard(f"{place} is cut short: its JPEG has no end. {way_out}")
    try:
        return jpeg_decode(jpeg, outcolorspace="RGB")
    except JpegError as error:
        raise CorruptShard(f"{place} does not decode: {error}. {way_out}") from error


def write_image_shard(
    path: Path, tiles: Iterable[tuple[TileRecord, bytes]], slide: Mapping[str, Any], slide_id: str
) -> int:
    """Write the tiles of one slide as they come, in flat memory; return how many there were.

    The file appears when it is complete. If another writer was faster, its file stays.

    Raises:
        NoTissue: If there is no tile.
        OutputError: If the place is read-only or full.
    """
    with write_whole(path, keep_existing=True) as temporary:
        with h5py.File(temporary, "w", libver=("v110", "v110"), track_order=False) as file:
            count = _fill(file, tiles, slide)
        if count == 0:
            raise NoTissue(f"slide {slide_id!r} gave no tile, so there is nothing to store.")
        seal(temporary)
    return count


def _fill(file: h5py.File, tiles: Iterable[tuple[TileRecord, bytes]], slide: Mapping[str, Any]) -> int:
    numbers: dict[str, list[float]] = {key: [] for key in _NUMBERS}
    names: list[str] = []
    sets: dict[str, int] = {}
    set_of: list[int] = []
    offsets = [0]
    jpeg = file.create_dataset(
        "jpeg", shape=(0,), maxshape=(None,), dtype=np.uint8, chunks=(_CHUNK,), track_times=False
    )
    pending = bytearray()
    written = 0

    def flush(size: int) -> None:
        nonlocal written
        jpeg.resize((written + size,))
        block = bytes(pending[:size]).ljust(_CHUNK, b"\0")
        jpeg.id.write_direct_chunk((written,), block)
        del pending[:size]
        written += size

    for tile, data in tiles:
        for key, values in numbers.items():
            values.append(getattr(tile, key))
        names.append(tile.name)
        labels = json.dumps(dict(tile.attributes), sort_keys=True, ensure_ascii=False)
        set_of.append(sets.setdefault(labels, len(sets)))
        offsets.append(offsets[-1] + len(data))
        pending += data
        while len(pending) >= _CHUNK:
            flush(_CHUNK)
    if pending:
        flush(len(pending))

    file.attrs["format"] = _FORMAT
    for key, dtype in _NUMBERS.items():
        file.create_dataset(key, data=np.array(numbers[key], dtype), track_times=False)
    file.create_dataset("offsets", data=np.array(offsets, np.int64), track_times=False)
    file.create_dataset("attributes_of", data=np.array(set_of, np.int32), track_times=False)
    # Fixed-length strings: variable ones sit in a heap whose bytes are not the same each time.
    file.create_dataset("name", data=_texts(names), track_times=False)
    file.create_dataset("attributes", data=_texts(list(sets)), track_times=False)
    about = json.dumps(dict(slide), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    file.create_dataset("slide", data=np.frombuffer(about, np.uint8), track_times=False)
    return len(names)


def _texts(values: list[str]) -> np.ndarray:
    encoded = [value.encode() for value in values]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=0) or 1}")


class ImageShard:
    """The tiles of one slide, open for reading. Row *i* is tile *i* in every column.

    HDF5 is asked once where things are; JPEG bytes are then read with ``pread``, so a shard may be used from
    many threads and survives a fork.

    Attributes:
        slide_id: Whose tiles these are.
        slide: Facts about the slide, as given when it was tiled.
        tiles: A mapping per tile: ``x``, ``y``, ``tissue``, ``pen``, ``sharpness``, ``name``, ``attributes``.
        checksum: SHA-256 of the shard, which columns made from it remember.
    """

    def __init__(self, path: Path) -> None:
        """Open a shard.

        Raises:
            CorruptShard: If it is no image shard, or was cut short.
        """
        self.path = path
        self.slide_id = path.name.removesuffix(".h5")
        self.checksum = sealed_digest(path)
        try:
            with h5py.File(path, "r") as file:
                self._read_table(file)
        except (OSError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CorruptShard(
                f"{path} cannot be read as a shard of images ({reason}). Delete it and tile the slide again."
            ) from error
        self._file = OpenFile(path)

    def _read_table(self, file: h5py.File) -> None:
        if file.attrs.get("format") != _FORMAT:
            raise ValueError(f"format {file.attrs.get('format')!r} is not {_FORMAT!r}")
        self.slide: dict[str, Any] = json.loads(file["slide"][()].tobytes().decode())
        self._table = {key: file[key][()] for key in (*_NUMBERS, "name", "attributes_of")}
        self._sets = [json.loads(labels.decode()) for labels in file["attributes"][()].tolist()]
        self._offsets = file["offsets"][()]
        self._chunk_at: dict[int, int] = {}

        def note(chunk: Any) -> None:
            self._chunk_at[chunk.chunk_offset[0] // _CHUNK] = chunk.byte_offset

        file["jpeg"].id.chunk_iter(note)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @functools.cached_property
    def tiles(self) -> list[dict[str, Any]]:
        """One mapping per tile."""
        columns = {key: self._table[key].tolist() for key in _NUMBERS}
        columns["name"] = [name.decode() for name in self._table["name"].tolist()]
        columns["attributes"] = [dict(self._sets[which]) for which in self._table["attributes_of"].tolist()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def jpeg(self, tile: int) -> bytes:
        """Return the JPEG bytes of a tile, as they were stored."""
        if not 0 <= tile < len(self):
            raise IndexError(f"tile {tile} of {len(self)} in slide {self.slide_id!r}")
        begin, end = int(self._offsets[tile]), int(self._offsets[tile + 1])
        parts = []
        while begin < end:
            chunk, within = divmod(begin, _CHUNK)
            count = min(end - begin, _CHUNK - within)
            parts.append(self._file.read(count, self._chunk_at[chunk] + within))
            begin += count
        return b"".join(parts)

    def image(self, tile: int) -> np.ndarray:
        """Return the pixels of a tile, (height, width, 3) uint8.

        Raises:
            CorruptShard: If the JPEG is cut short or does not decode.
        """
        return decode_tile(
            self.jpeg(tile), f"tile {tile} of {self.path}", "Delete the shard and tile the slide again."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing is left open: the file closes with the last reference to the shard."""
