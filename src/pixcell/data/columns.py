"""A column of fixed-size records, one immutable ``.npy`` per slide: latents, embeddings.

Records are field-major, ``(rows, columns, ...)``, and stored without gaps. So the latents of one 256-pixel
field are one stretch of bytes whose place is computed, not looked up, and fields beside each other are read
at once. Beside each shard a ``.json`` says what made it; the shard itself ends in its checksum (``sealed``).
"""

import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pixcell.data.sealed import SEAL_BYTES, OpenFile, OpenFiles, seal
from pixcell.errors import CorruptShard, MissingColumn, StoreError, StoreMismatch
from pixcell.files import write_json, write_whole
from pixcell.geometry import Box

__all__ = [
    "Column",
    "differences",
    "npy_header",
    "read_fields",
    "read_sidecar",
    "sidecar_of",
    "stale_message",
    "write_column_shard",
]

_FORMAT = "pixcell-column-1"


def sidecar_of(shard: Path) -> Path:
    """Return the path of the file that says what made a shard."""
    return shard.with_name(shard.name.removesuffix(".npy") + ".json")


def read_sidecar(shard: Path) -> dict[str, Any]:
    """Return what is known of a shard: ``made_by``, ``shape``, ``dtype``, ``num_tiles``, ``images_sha256``.

    Raises:
        CorruptShard: If the file is missing or is no such description.
    """
    path = sidecar_of(shard)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["format"] == _FORMAT and isinstance(content["made_by"], dict)
        content["shape"] = tuple(int(side) for side in content["shape"])
        content["dtype"] = np.dtype(content["dtype"])
        content["num_tiles"] = int(content["num_tiles"])
        content["images_sha256"] = str(content["images_sha256"])
    except FileNotFoundError:
        raise CorruptShard(
            f"{path} is missing, so nothing says what made {shard.name}. "
            "Delete the shard and encode the slide again."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptShard(
            f"{path} does not describe a shard ({error}). "
            "Delete it with its shard and encode the slide again."
        ) from error
    if not known:
        raise CorruptShard(f"{path} is not of the format {_FORMAT!r}; a newer pixcell may have written it.")
    return content


def differences(stored: Any, given: Any, place: str = "") -> list[str]:
    """Say in words where two JSON-like values differ.

    Examples:
        >>> differences({"mpp": 0.5, "size": 1}, {"mpp": 0.25, "size": 1})
        ['mpp is 0.5 in the store and 0.25 here']
    """
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        found = []
        for key in sorted({*stored, *given}, key=str):
            inner = f"{place}.{key}" if place else str(key)
            if key not in given:
                found.append(f"{inner} is {stored[key]!r} in the store and absent here")
            elif key not in stored:
                found.append(f"{inner} is absent in the store and {given[key]!r} here")
            else:
                found += differences(stored[key], given[key], inner)
        return found
    return [] if stored == given else [f"{place or 'it'} is {stored!r} in the store and {given!r} here"]


def stale_message(column: str, slide_id: str) -> str:
    """Say that a shard was made from images that are not there any more, and what to do."""
    return (
        f"column {column!r} of slide {slide_id!r} was made from other images than the ones in the store. "
        f"Delete {column}/{slide_id}.npy and .json and run `pixcell encode` again."
    )


def write_column_shard(
    shard: Path,
    records: Iterable[np.ndarray],
    *,
    shape: tuple[int, ...],
    dtype: np.dtype,
    made_by: Mapping[str, Any],
    num_tiles: int,
    images_sha256: str,
) -> None:
    """Write one slide of a column from batches ``(n, *shape)``, in flat memory.

    The description goes first and depends on the inputs only, so that it fits whichever of two writers
    finishes first; the shard appears when it is complete and is never replaced.

    Raises:
        StoreError: If the records are of another shape or dtype, or not ``num_tiles`` in all.
        StoreMismatch: If another writer was faster and made the shard of something else.
        OutputError: If the place is read-only or full.
    """
    facts = {
        "format": _FORMAT,
        "made_by": dict(made_by),
        "shape": list(shape),
        "dtype": dtype.name,
        "num_tiles": num_tiles,
        "images_sha256": images_sha256,
    }
    count = 0
    with write_whole(shard, keep_existing=True) as temporary:
        with temporary.open("wb") as file:
            file.write(npy_header((num_tiles, *shape), dtype))
            for batch in records:
                if batch.shape[1:] != shape or batch.dtype != dtype:
                    raise StoreError(
                        f"column {shard.parent.name!r} holds records {shape} {dtype}, "
                        f"but a batch of {batch.shape} {batch.dtype} was given."
                    )
                file.write(np.ascontiguousarray(batch).data)
                count += len(batch)
        if count != num_tiles:
            raise StoreError(
                f"slide {shard.name.removesuffix('.npy')!r} has {num_tiles} tiles, but {count} records were "
                f"given for column {shard.parent.name!r}. Every tile needs exactly one."
            )
        seal(temporary)
        if not shard.exists():  # the description of a faster writer stays with its shard
            write_json(sidecar_of(shard), facts)
    stored = json.loads(sidecar_of(shard).read_text(encoding="utf-8"))
    if found := differences(stored, facts):
        raise StoreMismatch(
            f"while slide {shard.name.removesuffix('.npy')!r} was encoded, something else wrote it into "
            f"column {shard.parent.name!r}: {'; '.join(found)}. Give one of the two columns another name."
        )


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the header of version 1.0 of the ``.npy`` format; its length depends on its content only."""
    buffer = io.BytesIO()
    facts = {"descr": dtype.str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


class Column:
    """One column of a store, open for reading.

    May be used from many threads and after a fork, and travels to spawned workers; at most ``max_open`` files
    are open at a time.

    Attributes:
        name: Folder of the column.
        made_by: What made it: kind, encoder with weights hash, field size, source column.
        shape: Shape of the record of one tile; ``(rows, columns, ...)`` of its fields.
        dtype: Of the records.
        num_tiles: Number of tiles per slide, for the slides that are done.
    """

    def __init__(self, folder: Path, max_open: int = 128) -> None:
        """Open a column and check that all its shards were made alike.

        Raises:
            MissingColumn: If there is no finished shard.
            StoreMismatch: If two shards were made by different things.
            CorruptShard: If a shard has lost its description.
        """
        self.folder, self.name = folder, folder.name
        shards = sorted(folder.glob("*.npy")) if folder.is_dir() else []
        if not shards:
            raise MissingColumn(f"{folder.parent} has no column {folder.name!r}. Run `pixcell encode` first.")
        self.num_tiles: dict[str, int] = {}
        self.made_from: dict[str, str] = {}
        first = read_sidecar(shards[0])
        self.made_by: dict[str, Any] = first["made_by"]
        self.shape: tuple[int, ...] = first["shape"]
        self.dtype: np.dtype = first["dtype"]
        for shard in shards:
            facts = read_sidecar(shard)
            for key in ("made_by", "shape", "dtype"):
                if facts[key] != first[key]:
                    raise StoreMismatch(
                        f"column {self.name!r} mixes two makers: {shards[0].name} and {shard.name} differ ("
                        + "; ".join(_between(first[key], facts[key], key, shards[0].name, shard.name))
                        + "). Delete the shards of one of them."
                    )
            slide_id = shard.name.removesuffix(".npy")
            self.num_tiles[slide_id] = facts["num_tiles"]
            self.made_from[slide_id] = facts["images_sha256"]
        self._record_bytes = math.prod(self.shape) * self.dtype.itemsize
        self._files = OpenFiles(self._open, max_open)

    @property
    def slide_ids(self) -> list[str]:
        """Slides that are done, sorted."""
        return sorted(self.num_tiles)

    def read(self, slide_id: str, tile: int, fields: Box | None = None) -> np.ndarray:
        """Read the record of one tile, or of some of its fields.

        Args:
            slide_id: Which slide.
            tile: Row of the tile in the slide.
            fields: Which fields, counted in fields (x is the column). None: all.

        Returns:
            ``(fields.height, fields.width, ...)``, a fresh array.

        Raises:
            MissingColumn: If the slide is not done.
            CorruptShard: If the file is not what was written.
        """
        box = fields if fields is not None else Box(0, 0, self.shape[1], self.shape[0])
        result = np.empty((box.height, box.width, *self.shape[2:]), self.dtype)
        self.read_into(result, slide_id, tile, box)
        return result

    def read_into(self, out: np.ndarray, slide_id: str, tile: int, fields: Box) -> None:
        """Read fields of a tile into a contiguous array of their size and dtype; see :meth:`read`."""
        file, start = self._files[slide_id]
        if not 0 <= tile < self.num_tiles[slide_id]:
            raise IndexError(f"tile {tile} of {self.num_tiles[slide_id]} in slide {slide_id!r}")
        read_fields(out, file, start + tile * self._record_bytes, self.shape, fields)

    def array(self, slide_id: str) -> np.ndarray:
        """Return all records of a slide, ``(tiles, *shape)``, mapped into memory, read-only."""
        _, start = self._files[slide_id]
        shape = (self.num_tiles[slide_id], *self.shape)
        return np.memmap(self._shard(slide_id), self.dtype, mode="r", offset=start, shape=shape)

    def _shard(self, slide_id: str) -> Path:
        return self.folder / f"{slide_id}.npy"

    def _open(self, slide_id: str) -> tuple[OpenFile, int]:
        """Open a shard and find where its records begin."""
        if slide_id not in self.num_tiles:
            raise MissingColumn(
                f"slide {slide_id!r} is not in column {self.name!r} yet. Run `pixcell encode` to complete it."
            )
        header = npy_header((self.num_tiles[slide_id], *self.shape), self.dtype)
        file = OpenFile(self._shard(slide_id))
        size = len(header) + self.num_tiles[slide_id] * self._record_bytes + SEAL_BYTES
        if file.size != size or file.read(len(header), 0) != header:
            raise CorruptShard(
                f"{file.path} is not the array that its description states ({file.size} bytes instead of "
                f"{size}, or another header). Delete it with its .json and encode the slide again."
            )
        return file, len(header)


def read_fields(
    out: np.ndarray, file: OpenFile, record_start: int, shape: tuple[int, ...], fields: Box
) -> None:
    """Read fields of a field-major record that begins at a byte of a file, and nothing else of it.

    Args:
        out: Contiguous array of the fields' size, in the dtype of the record.
        file: Where the record is.
        record_start: First byte of the record in the file.
        shape: Of the whole record, ``(rows, columns, ...)``.
        fields: Which fields, counted in fields (x is the column).

    Raises:
        CorruptShard: If the file ends before the record does.
    """
    rows, columns = shape[:2]
    if fields.x < 0 or fields.y < 0 or fields.right > columns or fields.bottom > rows:
        raise ValueError(f"fields {fields} reach outside the {rows} x {columns} fields of a tile")
    size = math.prod(shape[2:]) * out.dtype.itemsize
    buffer = memoryview(out).cast("B")  # type: ignore[arg-type]
    # Fields of one row lie beside each other; whole rows do, too.
    stretches = 1 if fields.width == columns else fields.height
    length = len(buffer) // stretches
    for stretch in range(stretches):
        offset = record_start + ((fields.y + stretch) * columns + fields.x) * size
        file.read_into(buffer[stretch * length : (stretch + 1) * length], offset)


def _between(stored: Any, given: Any, key: str, first: str, second: str) -> list[str]:
    return [
        text.replace("in the store", f"in {first}").replace("here", f"in {second}")
        for text in differences(stored, given, key)
    ]
