"""A pack as a tile source: fields are read at computed places inside of tar shards.

The folder may be on this machine or behind any address that fsspec reads; then shards are fetched whole as
they are needed, and kept in a bounded cache. Rows of the index stand in the order of the shards, so whoever
visits them in blocks (``blocks``) fetches each shard once.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixcell.data.columns import read_fields
from pixcell.data.images import decode_tile
from pixcell.data.integrity import Problem
from pixcell.data.pack_format import (
    MANIFEST_FILE,
    OWN_COLUMNS,
    FileFacts,
    Manifest,
    PackedColumn,
    SampleLayout,
    is_pack,
)
from pixcell.data.sealed import OpenFile, OpenFiles
from pixcell.data.shard_cache import CacheConfig, RemoteFolder, ShardCache
from pixcell.errors import CorruptShard, MissingColumn, StoreError, listed
from pixcell.files import sha256_of
from pixcell.geometry import Box

__all__ = ["PackedImages", "ShardColumn", "ShardSource"]

_OPEN_HERE = 64
_OPEN_FETCHED = 8  # a file that the cache removed takes its room until it is closed


class ShardSource:
    """The tiles of a pack. Cheap to open, and pickles as its address; workers open it anew.

    Attributes:
        blocks_at_once: Shards that are shuffled together, where a recipe does not say how many. Fixed, so
            that the order of samples does not hang on where a pack lies.
    """

    blocks_at_once = 16

    def __init__(self, place: str, manifest: Manifest, cache: CacheConfig) -> None:
        """Use :meth:`open`."""
        self.place, self.manifest, self._config = place, manifest, cache
        self.layout = SampleLayout(manifest.columns)
        self._cache: ShardCache | None = None
        if "://" in place:
            remote = RemoteFolder(place, cache.attempts)
            self._cache = ShardCache(remote, manifest.identity, cache)
        self._damaged: dict[str, str] = {}
        self._shards = OpenFiles(self._open_shard, _OPEN_FETCHED if self._cache else _OPEN_HERE)

    @classmethod
    def open(cls, place: str | Path, cache: CacheConfig | None = None) -> Self:
        """Open a pack.

        Args:
            place: Its folder, or its address, such as ``s3://bucket/brca`` or ``https://host/brca``.
            cache: Where shards from elsewhere are kept.

        Raises:
            StoreError: If there is no finished pack, it cannot be fetched, or a newer version of the package
                wrote it.
        """
        place, cache = str(place), cache or CacheConfig()
        if "://" in place:
            data = RemoteFolder(place, cache.attempts).read(MANIFEST_FILE)
        else:
            if not is_pack(Path(place)):
                raise StoreError(
                    f"{place} is no finished pack: it has no {MANIFEST_FILE}. Make one with "
                    f"`pixcell pack STORE {place}`; run that again if it was stopped."
                )
            data = (Path(place) / MANIFEST_FILE).read_bytes()
        return cls(place, Manifest.from_bytes(data, f"{place}/{MANIFEST_FILE}"), cache)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.place, self._config)

    @property
    def tiling(self) -> Mapping[str, Any]:
        """How tiles were cut."""
        return self.manifest.tiling

    @property
    def tile_size(self) -> int:
        """Side of a tile, in pixels."""
        return int(self.tiling["tile_size"])

    @property
    def mpp(self) -> float:
        """Microns per pixel of a tile."""
        return float(self.tiling["mpp"])

    @property
    def num_tiles(self) -> int:
        """Number of tiles of all slides."""
        return self.manifest.num_tiles

    def columns(self) -> list[str]:
        """Return the columns that were packed, ``images`` first."""
        return [*(["images"] if self.manifest.has_images else []), *self.manifest.columns]

    def index(self) -> pa.Table:
        """Return one row per tile in the order of the shards, with the columns of a store's index."""
        return self._table.drop_columns(list(OWN_COLUMNS))

    def column(self, name: str) -> "ShardColumn":
        """Open a column.

        Raises:
            MissingColumn: If it was not packed; lists those that were.
        """
        if name not in self.manifest.columns:
            raise MissingColumn(
                f"{self.place} has no column {name!r} of latents or embeddings (there: "
                f"{listed(list(self.manifest.columns)) or 'none'}). Pack the store again with this column."
            )
        return ShardColumn(self, name)

    def images(self, slide_id: str) -> "PackedImages":
        """Open the images of a slide.

        Raises:
            MissingColumn: If images were not packed.
            StoreError: If the slide is not in the pack.
        """
        if not self.manifest.has_images:
            raise MissingColumn(f"{self.place} was packed without images. Pack the store again with them.")
        if slide_id not in self._places.num_tiles:
            known = sorted(self._places.num_tiles)
            raise StoreError(f"{self.place} has no slide {slide_id!r}. It has {len(known)}: {listed(known)}")
        return PackedImages(self, slide_id)

    # ── for orders that read in large pieces ─────────────────────────────────────────────────────

    def blocks(self) -> np.ndarray:
        """Return which shard each row of the index lies in; ascending."""
        return np.arange(self.num_tiles) // self.manifest.tiles_per_shard

    def prepare(self, window: int) -> None:
        """Get ready to be read in windows of so many shards at once.

        Raises:
            StoreError: If the cache cannot hold them.
        """
        if self._cache is not None:
            largest = max(shard.num_bytes for shard in self.manifest.shards)
            window = min(window, len(self.manifest.shards))
            self._cache.must_hold(window * largest + self.manifest.index.num_bytes, f"{window} shards")

    # ── where things are ─────────────────────────────────────────────────────────────────────────

    @functools.cached_property
    def _table(self) -> pa.Table:
        # The cache may remove a file as soon as it was fetched: it is read through a descriptor.
        file = self._open(self.manifest.index)
        return pq.read_table(pa.BufferReader(file.read(file.size, 0)))

    @functools.cached_property
    def _places(self) -> "_Places":
        return _Places.of(self._table)

    def _place_of(self, slide_id: str, tile: int) -> tuple[OpenFile, int, int]:
        """Return a tile's shard, where it begins there, and its row."""
        row = self._places.row_of(slide_id, tile)
        shard = self._shards[str(row // self.manifest.tiles_per_shard)]
        return shard, int(self._places.offset[row]), row

    def _open_shard(self, number: str) -> OpenFile:
        if number in self._damaged:  # not fetched again for each of its tiles
            raise CorruptShard(self._damaged[number])
        try:
            return self._open(self.manifest.shards[int(number)])
        except CorruptShard as error:
            self._damaged[number] = str(error)
            raise

    def _open(self, facts: FileFacts) -> OpenFile:
        for _ in range(10):
            path = self._cache.path_of(facts) if self._cache else Path(self.place) / facts.name
            try:
                file = OpenFile(path)
            except FileNotFoundError:
                if self._cache:  # another process made room between the two lines
                    continue
                raise CorruptShard(f"{path} is missing. {self._way_out}") from None
            if file.size != facts.num_bytes:
                raise CorruptShard(
                    f"{path} has {file.size} bytes instead of {facts.num_bytes}. {self._way_out}"
                )
            return file
        raise StoreError(
            f"{facts.name} was removed from the cache ten times before it could be opened: the cache is too "
            "small for so many processes. Allow more with data.cache.size."
        )

    @property
    def _way_out(self) -> str:
        if self._cache:
            return f"Delete {self._cache.folder}; it is fetched again."
        return "Run the `pixcell pack` that made it again, or copy it again."

    def verify(self) -> list[Problem]:
        """Read every byte of a pack on this machine; return everything that is not as it was written.

        Raises:
            StoreError: If the pack is elsewhere; what is fetched is compared with its checksum anyway.
        """
        if self._cache is not None:
            raise StoreError(f"{self.place} is elsewhere. Verify it where it is, or copy it here.")
        return list(self._problems())

    def _problems(self) -> Iterator[Problem]:
        for facts in (self.manifest.index, *self.manifest.shards):
            path = Path(self.place) / facts.name
            if not path.is_file():
                yield Problem("pack", facts.name, f"{path} is missing.")
            elif path.stat().st_size != facts.num_bytes:
                yield Problem("pack", facts.name, f"{path} does not have {facts.num_bytes} bytes.")
            elif sha256_of(path) != facts.sha256:
                yield Problem("pack", facts.name, f"{path} was changed after it was written.")


@dataclass(frozen=True)
class _Places:
    """Where the tiles of each slide are: rows of the index, by slide and position in the slide."""

    num_tiles: Mapping[str, int]
    first: Mapping[str, int]
    row: np.ndarray
    offset: np.ndarray
    image_bytes: np.ndarray

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        slide_ids = pc.unique(table["slide_id"])
        slide = pc.index_in(table["slide_id"], slide_ids).to_numpy()
        rows = np.lexsort((table["tile"].to_numpy(), slide))
        starts = np.searchsorted(slide[rows], np.arange(len(slide_ids) + 1))
        names = slide_ids.to_pylist()
        return cls(
            num_tiles=dict(zip(names, np.diff(starts).tolist(), strict=True)),
            first=dict(zip(names, starts[:-1].tolist(), strict=True)),
            row=rows,
            offset=table["__offset__"].to_numpy(),
            image_bytes=table["__image_bytes__"].to_numpy(),
        )

    def row_of(self, slide_id: str, tile: int) -> int:
        if slide_id not in self.first:
            raise MissingColumn(f"slide {slide_id!r} is not in the pack.")
        if not 0 <= tile < self.num_tiles[slide_id]:
            raise IndexError(f"tile {tile} of {self.num_tiles[slide_id]} in slide {slide_id!r}")
        return int(self.row[self.first[slide_id] + tile])


class ShardColumn:
    """One packed column of fixed-size records, open for reading; may be used from many threads."""

    def __init__(self, source: ShardSource, name: str) -> None:
        """Use :meth:`ShardSource.column`."""
        self.source, self.name = source, name
        self._facts: PackedColumn = source.manifest.columns[name]
        self._record_start = source.layout.record_starts[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.name)

    @property
    def made_by(self) -> Mapping[str, Any]:
        """What made it: kind, encoder with weights hash, field size, source column."""
        return self._facts.made_by

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the record of one tile; ``(rows, columns, ...)`` of its fields."""
        return self._facts.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the records."""
        return self._facts.dtype

    @property
    def num_tiles(self) -> Mapping[str, int]:
        """Number of tiles per slide."""
        return self.source._places.num_tiles

    def read_into(self, out: np.ndarray, slide_id: str, tile: int, fields: Box) -> None:
        """Read some fields of a tile into a contiguous array of their size and dtype.

        Raises:
            MissingColumn: If the slide was not packed.
            CorruptShard: If the shard is not what was written.
            StoreError: If the shard cannot be fetched.
        """
        shard, start, _ = self.source._place_of(slide_id, tile)
        read_fields(out, shard, start + self._record_start, self.shape, fields)


class PackedImages:
    """The tiles of one slide of a pack, as JPEG bytes and as pixels."""

    def __init__(self, source: ShardSource, slide_id: str) -> None:
        """Use :meth:`ShardSource.images`."""
        self.source, self.slide_id = source, slide_id

    def __len__(self) -> int:
        return self.source._places.num_tiles[self.slide_id]

    def jpeg(self, tile: int) -> bytes:
        """Return the JPEG bytes of a tile, as the store had them."""
        shard, start, row = self.source._place_of(self.slide_id, tile)
        count = int(self.source._places.image_bytes[row])
        return shard.read(count, start + self.source.layout.image_start)

    def image(self, tile: int) -> np.ndarray:
        """Return the pixels of a tile, (height, width, 3) uint8.

        Raises:
            CorruptShard: If the JPEG is cut short or does not decode.
        """
        place = f"tile {tile} of slide {self.slide_id!r} in {self.source.place}"
        return decode_tile(self.jpeg(tile), place, self.source._way_out)
