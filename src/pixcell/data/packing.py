"""Write a store as a pack, shard by shard; see ``pack_format`` for the layout.

Tiles are shuffled once, so that every shard is a sample of all slides; every shard but the last has as many.
The order is written down before the first shard. A shard then depends on the store and its number only: it
may be made by any process, again after a crash, and has the same bytes each time.

    PACK/packing/request.json    what was asked for; there until the pack is complete
    PACK/packing/plan.arrow      one row per tile, in the order of the shards
    PACK/packing/000000.json     of a finished shard: size, checksum, where its tiles begin
"""

import functools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixcell.data.columns import Column, differences, npy_header
from pixcell.data.images import is_whole_jpeg
from pixcell.data.index import INDEX_COLUMNS, tiles_where
from pixcell.data.pack_format import (
    INDEX_FILE,
    MANIFEST_FILE,
    OWN_COLUMNS,
    FileFacts,
    Manifest,
    PackedColumn,
    SampleLayout,
    is_pack,
    member_header,
    padding_of,
    shard_name,
)
from pixcell.data.sealed import OpenFiles
from pixcell.data.store import TileStore
from pixcell.errors import CorruptShard, MissingColumn, OutputError, StoreError, StoreMismatch, listed
from pixcell.files import sha256_of, write_json, write_whole, writing_to
from pixcell.provenance import hash_of

__all__ = ["PackWriter"]

_STORE_TILE, _OFFSET, _IMAGE_BYTES = OWN_COLUMNS
_JSON_BYTES = (
    1024  # of a tile's facts with its tar header, about; only the number of tiles in a shard hangs on it
)
_MEASURED = 16  # slides, and tiles of each, whose JPEGs tell how large a tile is
_RECORD = 10240  # tar files end on a whole record


class PackWriter:
    """A pack that is being made from a store; pickles, so that processes can share the shards.

    Attributes:
        folder: Of the pack.
        num_tiles: In all.
        num_shards: In all.
        columns: Columns that are packed, in the order of their members.
    """

    def __init__(
        self,
        store: TileStore,
        folder: Path,
        *,
        columns: Sequence[str] | None = None,
        where: Mapping[str, Sequence[str]] = MappingProxyType({}),
        shard_bytes: int = 512_000_000,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        """Begin a pack, or go on with one that was begun in the same way.

        Args:
            store: Whose tiles.
            folder: New, empty, or a pack of the same request.
            columns: Columns to take, ``images`` among them. None: all.
            where: Attributes of tiles to take, such as ``{"split": ["train"]}``; all must hold.
            shard_bytes: About how large a shard is.
            shuffle: Whether tiles are shuffled over the shards. Otherwise slides stay together.
            seed: Of the shuffle.

        Raises:
            MissingColumn: If a column is not there, or not complete for the chosen tiles.
            StoreError: If no tile remains, a shard would not hold one tile, or the folder holds other things.
            StoreMismatch: If the folder holds a pack of another request; names what differs.
            OutputError: If the folder cannot be written.
        """
        self.store, self.folder = store, folder
        names = _chosen(store, columns)
        opened = {name: store.column(name) for name in names if name != "images"}
        self.columns = {
            name: PackedColumn(column.made_by, column.shape, column.dtype) for name, column in opened.items()
        }
        self.has_images = "images" in names
        rows = tiles_where(store.index(), where)
        slide_ids = pc.unique(rows["slide_id"]).to_pylist()
        for name, column in opened.items():
            if missing := [slide_id for slide_id in slide_ids if slide_id not in column.num_tiles]:
                raise MissingColumn(
                    f"column {name!r} lacks {len(missing)} of {len(slide_ids)} slides ({listed(missing)}). "
                    "Run `pixcell encode` to complete it, or name the columns to take with --columns."
                )
        self.layout = SampleLayout(self.columns)
        for name in (*(f"{column}.npy" for column in self.columns), "jpg", "json"):
            member_header(f"{_key(999_999, 99_999)}.{name}", 0)
        self.num_tiles = len(rows)
        self.tiles_per_shard = self._tiles_per_shard(slide_ids, shard_bytes)
        self.num_shards = math.ceil(self.num_tiles / self.tiles_per_shard)
        checksums = store.checksums()
        self.request: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "tiling": store.tiling,
                    "columns": {name: column.as_json() for name, column in self.columns.items()},
                    "images": self.has_images,
                    "where": {key: sorted(map(str, values)) for key, values in sorted(where.items())},
                    "shard_bytes": int(shard_bytes),
                    "shuffle": shuffle,
                    "seed": seed,
                    "num_slides": len(slide_ids),
                    "num_tiles": self.num_tiles,
                    "images_sha256": hash_of({slide_id: checksums[slide_id] for slide_id in slide_ids}),
                }
            )
        )
        self._begin(rows, shuffle, seed)

    def _tiles_per_shard(self, slide_ids: Sequence[str], shard_bytes: int) -> int:
        tile_bytes = self.layout.image_start + _JSON_BYTES
        if self.has_images:
            jpegs: list[int] = []
            for slide_id in slide_ids[:: math.ceil(len(slide_ids) / _MEASURED)]:
                images = self.store.images(slide_id)
                tiles = range(0, len(images), math.ceil(len(images) / _MEASURED))
                jpegs += [len(images.jpeg(tile)) for tile in tiles]
            tile_bytes += sum(jpegs) // len(jpegs)
        if shard_bytes < tile_bytes:
            raise StoreError(
                f"shards of {shard_bytes:,} bytes do not hold one tile: with "
                f"{listed([*self.columns, *(['images'] if self.has_images else [])])} a tile takes about "
                f"{tile_bytes:,} bytes. Give a larger --shard-size; 256MB to 1GB suits object storage."
            )
        return shard_bytes // tile_bytes

    # ── what is there already ────────────────────────────────────────────────────────────────────

    @property
    def _working(self) -> Path:
        return self.folder / "packing"

    def _begin(self, rows: pa.Table, shuffle: bool, seed: int) -> None:
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.finished = self._manifest() if is_pack(self.folder) else None
        if self.finished is not None:
            self._must_be_same(self.finished.request)
            return
        request = self._working / "request.json"
        if request.is_file():
            try:
                self._must_be_same(json.loads(request.read_text(encoding="utf-8")))
            except ValueError as error:
                raise StoreError(
                    f"{request} cannot be understood ({error}). Delete {self.folder} and pack again."
                ) from error
            return
        others = [item for item in self.folder.iterdir() if item.name[0] != "." and item != self._working]
        if others:
            raise StoreError(
                f"{self.folder} is not empty and is no pack (it holds "
                f"{listed(sorted(item.name for item in others))}). Choose a new or empty folder."
            )
        self._write_plan(rows, shuffle, seed)
        write_json(request, self.request)

    def _must_be_same(self, request: Mapping[str, Any]) -> None:
        if found := differences(request, self.request):
            found = [text.replace("in the store", "in the pack") for text in found]
            raise StoreMismatch(
                f"{self.folder} holds a pack that was asked for in another way: {'; '.join(found)}. "
                "Ask for the same again, or choose another folder."
            )

    def _manifest(self) -> Manifest:
        path = self.folder / MANIFEST_FILE
        return Manifest.from_bytes(path.read_bytes(), str(path))

    def _write_plan(self, rows: pa.Table, shuffle: bool, seed: int) -> None:
        """Write down which tile stands where, once: later versions of NumPy may shuffle in another way."""
        slides = pc.index_in(rows["slide_id"], pc.unique(rows["slide_id"])).to_numpy()
        # Rows of a slide follow each other; with some left out, those that remain are counted anew.
        first = np.flatnonzero(np.diff(slides, prepend=-1))
        tile = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows)))
        rows = rows.append_column(_STORE_TILE, rows["tile"]).set_column(
            rows.column_names.index("tile"), "tile", pa.array(tile, pa.int32())
        )
        if shuffle:
            rows = rows.take(pa.array(np.random.default_rng(seed).permutation(len(rows))))
        rows = rows.replace_schema_metadata(None)
        with (
            write_whole(self._working / "plan.arrow") as temporary,
            pa.OSFile(str(temporary), "wb") as file,
            pa.ipc.new_file(file, rows.schema) as writer,
        ):
            writer.write_table(rows.combine_chunks(), max_chunksize=1 << 16)

    def _plan(self) -> pa.Table:
        if self.finished is not None:
            return pq.read_table(self.folder / INDEX_FILE).drop_columns([_OFFSET, _IMAGE_BYTES])
        return pa.ipc.open_file(pa.memory_map(str(self._working / "plan.arrow"))).read_all()

    def shards_left(self) -> list[int]:
        """Return the numbers of the shards that are not there yet."""
        return [number for number in range(self.num_shards) if not self._is_done(number)]

    def _is_done(self, number: int) -> bool:
        path = self.folder / shard_name(number)
        if self.finished is not None:
            return path.is_file() and path.stat().st_size == self.finished.shards[number].num_bytes
        return path.is_file() and self._facts_path(number).is_file()

    def _facts_path(self, number: int) -> Path:
        return self._working / f"{number:06d}.json"

    # ── the shards ───────────────────────────────────────────────────────────────────────────────

    def write_shard(self, number: int) -> int:
        """Write one shard unless it is there; return how many tiles it has.

        Raises:
            CorruptShard: If a record or an image of the store is damaged.
            StoreMismatch: If a shard of a finished pack cannot be made as it was.
            OutputError: If the place is read-only or full.
        """
        first = number * self.tiles_per_shard
        count = min(self.tiles_per_shard, self.num_tiles - first)
        if self._is_done(number):
            return count
        # In the working folder, which goes when the pack is complete, with all that crashes left there.
        written = self._working / Path(shard_name(number)).name
        with write_whole(written) as temporary, temporary.open("wb") as file:
            offsets, image_bytes = self._fill(file, number, self._plan().slice(first, count).to_pylist())
        facts = {"num_bytes": written.stat().st_size, "sha256": sha256_of(written)}
        if self.finished is None:
            write_json(self._facts_path(number), {**facts, "offsets": offsets, "image_bytes": image_bytes})
        elif facts["sha256"] != self.finished.shards[number].sha256:
            raise StoreMismatch(
                f"{self.folder / shard_name(number)} is missing or damaged and cannot be made again: "
                f"{self.store.path} holds other records now. Copy it from another copy of the pack, or pack "
                "into a new folder."
            )
        with writing_to(self.folder):
            (self.folder / "shards").mkdir(exist_ok=True)
            written.replace(self.folder / shard_name(number))
        return count

    def _fill(
        self, file: BinaryIO, number: int, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], list[int]]:
        columns, images = _opened(self.store.path, tuple(self.columns), str(self.request["images_sha256"]))
        offsets, image_bytes = [], []
        for place, row in enumerate(rows):
            key, slide_id, tile = _key(number, place), row["slide_id"], row[_STORE_TILE]
            offsets.append(file.tell())
            for name, column in columns.items():
                record = np.ascontiguousarray(column.read(slide_id, tile))
                content = npy_header(column.shape, column.dtype) + record.tobytes()
                _add(file, f"{key}.{name}.npy", content)
            jpeg = images[slide_id].jpeg(tile) if self.has_images else b""
            if self.has_images:
                if not is_whole_jpeg(jpeg):
                    raise CorruptShard(
                        f"tile {tile} of slide {slide_id!r} is no whole JPEG. Tile the slide again."
                    )
                _add(file, f"{key}.jpg", jpeg)
            image_bytes.append(len(jpeg))
            _add(file, f"{key}.json", self._facts_of(row))
        end = file.tell() + 2 * 512  # two empty blocks end an archive
        file.write(bytes(2 * 512 + -end % _RECORD))
        return offsets, image_bytes

    def _facts_of(self, row: Mapping[str, Any]) -> bytes:
        facts = {name: row[name] for name in INDEX_COLUMNS}
        attributes = {
            name: value
            for name, value in sorted(row.items())
            if name not in INDEX_COLUMNS and name not in OWN_COLUMNS and value is not None
        }
        facts |= {"mpp": self.store.mpp, "tile_size": self.store.tile_size, "attributes": attributes}
        return json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()

    # ── the end ──────────────────────────────────────────────────────────────────────────────────

    def finish(self) -> Manifest:
        """Write the index and the description, when all shards are there.

        Raises:
            OutputError: If a shard is missing, or the place cannot be written.
        """
        if left := self.shards_left():
            raise OutputError(f"{self.folder} lacks {len(left)} of {self.num_shards} shards; pack again.")
        if self.finished is None:
            facts = [json.loads(self._facts_path(n).read_text("utf-8")) for n in range(self.num_shards)]
            table = self._plan()
            for name, key, kind in (
                (_OFFSET, "offsets", pa.int64()),
                (_IMAGE_BYTES, "image_bytes", pa.int32()),
            ):
                table = table.append_column(name, pa.array([x for one in facts for x in one[key]], kind))
            with write_whole(self.folder / INDEX_FILE) as temporary:
                pq.write_table(table, temporary)
            index = self.folder / INDEX_FILE
            manifest = Manifest(
                tiling=self.store.tiling,
                columns=self.columns,
                has_images=self.has_images,
                num_tiles=self.num_tiles,
                tiles_per_shard=self.tiles_per_shard,
                index=FileFacts(INDEX_FILE, index.stat().st_size, sha256_of(index)),
                shards=tuple(
                    FileFacts(shard_name(number), one["num_bytes"], one["sha256"])
                    for number, one in enumerate(facts)
                ),
                request=self.request,
            )
            with write_whole(self.folder / MANIFEST_FILE) as temporary:
                temporary.write_bytes(manifest.to_bytes())
            self.finished = manifest
        shutil.rmtree(self._working, ignore_errors=True)
        return self.finished


def _chosen(store: TileStore, columns: Sequence[str] | None) -> list[str]:
    present = store.columns()
    wanted = present if columns is None else list(dict.fromkeys(columns))
    if not wanted:
        raise StoreError(
            f"{store.path} holds nothing to pack. Run `pixcell tile` and `pixcell encode` first."
        )
    for name in wanted:
        if name not in present:
            raise MissingColumn(f"{store.path} has no column {name!r} (there: {listed(present, 10)}).")
    return [name for name in present if name in wanted]


def _key(shard: int, place: int) -> str:
    return f"{shard:06d}-{place:05d}"


def _add(file: BinaryIO, name: str, content: bytes) -> None:
    file.write(member_header(name, len(content)))
    file.write(content)
    file.write(bytes(padding_of(len(content))))


@functools.lru_cache(maxsize=1)
def _opened(place: Path, names: tuple[str, ...], state: str) -> tuple[dict[str, Column], OpenFiles[Any]]:
    """Open a store once per process, for all shards that it makes; ``state`` tells contents apart."""
    del state
    store = TileStore.open(place)
    return {name: store.column(name) for name in names}, OpenFiles(store.images, limit=128)
