"""The tile store: a folder of columns; a column is one immutable file per slide.

    STORE/store.json                    format, and how tiles were cut
    STORE/images/<slide>.h5             the JPEG bytes as cut, positions, labels
    STORE/<column>/<slide>.npy, .json   fixed-size records, and what made them
    STORE/index.parquet                 one row per tile; derived, may be deleted at any time

Row *i* of a slide is the same tile in every column. A shard is written aside, synced and named when it is
complete; afterwards it never changes. So "the file exists" means "done": work can be stopped and started, and
many machines work on one store without locks.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from pixcell.data.columns import Column, differences, read_sidecar, stale_message, write_column_shard
from pixcell.data.images import ImageShard, TileRecord, is_whole_jpeg, write_image_shard
from pixcell.data.index import INDEX_COLUMNS, up_to_date_index
from pixcell.data.integrity import Problem, problems_in
from pixcell.data.sealed import sealed_digest
from pixcell.errors import MissingColumn, StoreError, StoreMismatch
from pixcell.files import remove_leftovers, write_whole, writing_to

__all__ = ["ColumnSummary", "Problem", "TileStore", "check_slide_id"]

_FORMAT, _VERSION = "pixcell-tiles", 1
_NOT_COLUMNS = {"images", "qc", "reports"}
_COLUMN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class ColumnSummary:
    """What a store holds of one column."""

    name: str
    num_slides: int
    num_missing: int
    """Slides with images that are not in this column yet."""
    num_bytes: int
    shape: tuple[int, ...] | None
    """Of one tile's record; None for images."""
    made_by: Mapping[str, Any]


def check_slide_id(slide_id: str) -> str:
    """Return a slide id if it can be a file name everywhere in a store.

    Blanks and letters of any script are welcome.

    Raises:
        StoreError: Names the rule that the id breaks.
    """
    if not slide_id or slide_id.startswith(".") or "/" in slide_id or not slide_id.isprintable():
        raise StoreError(
            f"{slide_id!r} cannot be a slide id: it must not be empty, begin with a dot, or contain '/' or "
            "control characters. Rename the slide."
        )
    if len(slide_id.encode()) > 220:
        raise StoreError(
            f"slide id {slide_id[:40]!r}... has {len(slide_id.encode())} bytes; file names allow 220. "
            "Rename the slide."
        )
    return slide_id


class TileStore:
    """All tiles of a set of slides, with columns.

    Cheap to open, and pickles as its path; workers open it anew.
    """

    def __init__(self, path: Path, tiling: Mapping[str, Any]) -> None:
        """Use :meth:`open` or :meth:`create`."""
        self.path = path
        self.tiling = dict(tiling)
        self._digests: dict[str, tuple[int, int, str]] = {}

    @classmethod
    def create(cls, path: Path, tiling: Mapping[str, Any]) -> Self:
        """Open a store, making it first if there is none.

        Args:
            path: Folder of the store; new, empty, or a store already.
            tiling: How tiles are cut; at least ``tile_size`` and ``mpp``.

        Raises:
            StoreMismatch: If the store's tiles are cut in another way; names what differs.
            StoreError: If the folder holds something else.
            OutputError: If the place cannot be written.
        """
        from pixcell import __version__

        path = Path(path)
        wanted = json.loads(json.dumps(dict(tiling), allow_nan=False))
        for key in ("tile_size", "mpp"):
            if not isinstance(wanted.get(key), int | float) or wanted[key] <= 0:
                raise ValueError(f"a tiling needs a positive {key}, not {wanted.get(key)!r}")
        with writing_to(path):
            path.mkdir(parents=True, exist_ok=True)
        others = [item for item in path.iterdir() if ".tmp-" not in item.name and item.name[0] != "."]
        if not (path / "store.json").exists():
            # Asked again: another machine may have made the store since the folder was listed.
            if others and not (path / "store.json").exists():
                raise StoreError(f"{path} is not empty and is no tile store. Choose a new or empty folder.")
            content = {
                "format": _FORMAT,
                "version": _VERSION,
                "tiling": wanted,
                "created_by": {"pixcell": __version__},
            }
            with write_whole(path / "store.json", keep_existing=True) as temporary:
                temporary.write_text(
                    json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
        store = cls.open(path)
        if found := differences(store.tiling, wanted):
            raise StoreMismatch(
                f"{path} holds tiles that were cut in another way: {'; '.join(found)}. "
                "Use the same tiling, or another folder."
            )
        store.remove_leftovers()
        return store

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a store.

        Raises:
            StoreError: If there is none, or a newer version of the package wrote it.
        """
        path = Path(path)
        try:
            content = json.loads((path / "store.json").read_text(encoding="utf-8"))
            is_store = content["format"] == _FORMAT
            version, tiling = int(content["version"]), dict(content["tiling"])
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{path} is no tile store: it has no store.json. Make one with `pixcell tile SLIDES {path}`."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path / 'store.json'} cannot be understood ({error}).") from error
        if not is_store or version > _VERSION:
            raise StoreError(
                f"{path} has format {content['format']!r} version {version}; this pixcell reads "
                f"{_FORMAT!r} up to version {_VERSION}. Update pixcell."
            )
        return cls(path, tiling)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.tiling)

    @property
    def tile_size(self) -> int:
        """Side of a tile, in pixels."""
        return int(self.tiling["tile_size"])

    @property
    def mpp(self) -> float:
        """Microns per pixel of a tile."""
        return float(self.tiling["mpp"])

    # ── what is there ────────────────────────────────────────────────────────────────────────────

    def slide_ids(self, column: str = "images") -> list[str]:
        """Return the slides that are done in a column, sorted."""
        suffix = ".h5" if column == "images" else ".npy"
        folder = self.path / column
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))

    def columns(self) -> list[str]:
        """Return the columns that have at least one finished shard, ``images`` first."""
        names = [
            entry.name
            for entry in os.scandir(self.path)
            if entry.is_dir() and _COLUMN_NAME.fullmatch(entry.name) and entry.name not in _NOT_COLUMNS
        ]
        return [name for name in ["images", *sorted(names)] if self.slide_ids(name)]

    def has(self, column: str, slide_id: str) -> bool:
        """Tell whether a slide is done in a column."""
        return self.shard_path(column, slide_id).exists()

    def shard_path(self, column: str, slide_id: str) -> Path:
        """Return where the shard of a slide is, or will be.

        Raises:
            StoreError: If the column or the slide cannot have that name.
        """
        if column != "images" and (column in _NOT_COLUMNS or not _COLUMN_NAME.fullmatch(column)):
            raise StoreError(
                f"{column!r} cannot be the name of a column: use letters, digits, '-', '_' and '.', "
                f"and none of {', '.join(sorted(_NOT_COLUMNS))}."
            )
        return self.path / column / (check_slide_id(slide_id) + (".h5" if column == "images" else ".npy"))

    # ── images ───────────────────────────────────────────────────────────────────────────────────

    def write_images(
        self, slide_id: str, tiles: Iterable[tuple[TileRecord, bytes]], slide: Mapping[str, Any]
    ) -> int:
        """Store the tiles of one slide; return how many it has.

        A slide that is there already stays as it is, and ``tiles`` is not looked at.

        Args:
            slide_id: Name of the slide in the store.
            tiles: Each tile with its JPEG bytes, streamed.
            slide: Facts about the slide as JSON values; ``fingerprint`` tells one slide from another.

        Raises:
            StoreMismatch: If another slide has this id, or a tile is not cut as this store's tiles are.
            NoTissue: If there is no tile.
        """
        shard = self.shard_path("images", slide_id)
        if not shard.exists():
            write_image_shard(shard, self._checked(slide_id, tiles), slide, slide_id)
        stored = ImageShard(shard)
        theirs, ours = stored.slide.get("fingerprint"), slide.get("fingerprint")
        if theirs != ours:
            raise StoreMismatch(
                f"slide id {slide_id!r} is taken in {self.path} by another slide (fingerprint {theirs}, "
                f"this one has {ours}). Rename one of the two slides."
            )
        return len(stored)

    def _checked(
        self, slide_id: str, tiles: Iterable[tuple[TileRecord, bytes]]
    ) -> Iterator[tuple[TileRecord, bytes]]:
        for tile, jpeg in tiles:
            if tile.size != self.tile_size or tile.mpp != self.mpp:
                raise StoreMismatch(
                    f"a tile of slide {slide_id!r} has {tile.size} px at {tile.mpp} mpp; {self.path} holds "
                    f"tiles of {self.tile_size} px at {self.mpp} mpp."
                )
            if not is_whole_jpeg(jpeg):
                place = tile.name or f"at x={tile.x}, y={tile.y}"
                raise StoreError(
                    f"the tile {place} of slide {slide_id!r} is not a JPEG, or one that is cut short."
                )
            if taken := set(tile.attributes) & set(INDEX_COLUMNS):
                raise StoreError(
                    f"{sorted(taken)[0]!r} cannot be the name of an attribute: the index has a column of "
                    "that name. Rename it in the metadata."
                )
            yield tile, jpeg

    def images(self, slide_id: str) -> ImageShard:
        """Open the images of a slide.

        Raises:
            StoreError: If the slide is not in the store.
            CorruptShard: If its file is damaged.
        """
        shard = self.shard_path("images", slide_id)
        if not shard.exists():
            known = self.slide_ids()
            listed = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
            raise StoreError(f"{self.path} has no slide {slide_id!r}. It has {len(known)}: {listed}")
        return ImageShard(shard)

    # ── columns of fixed-size records ────────────────────────────────────────────────────────────

    def write_column(
        self,
        column: str,
        slide_id: str,
        records: Iterable[np.ndarray],
        *,
        shape: tuple[int, ...],
        dtype: np.dtype | type | str,
        made_by: Mapping[str, Any],
        num_tiles: int,
    ) -> None:
        """Store one slide of a column, from batches of records ``(n, *shape)`` in the order of its tiles.

        A slide that is there already stays as it is, and ``records`` is not looked at.

        Args:
            column: Name of the column.
            slide_id: Which slide; its images must be in the store.
            records: Batches, streamed.
            shape: Of one tile's record, field-major: ``(rows, columns, ...)``.
            dtype: Of the records.
            made_by: What makes the column: kind, encoder with weights hash, field size, source column.
            num_tiles: Number of records to come.

        Raises:
            StoreMismatch: If the column was begun by something else; names what differs. Or if the number of
                tiles is not that of the images.
        """
        shard = self.shard_path(column, slide_id)
        with self.images(slide_id) as images:
            if len(images) != num_tiles:
                raise StoreMismatch(
                    f"slide {slide_id!r} has {len(images)} tiles in {self.path}, but {num_tiles} records "
                    f"were announced for column {column!r}."
                )
            checksum = images.checksum
        made_by = json.loads(json.dumps(dict(made_by), allow_nan=False))
        facts: dict[str, Any] = {"made_by": made_by, "shape": tuple(shape), "dtype": np.dtype(dtype)}
        self._same_maker(column, facts)
        if shard.exists():
            if read_sidecar(shard)["images_sha256"] != checksum:
                raise StoreMismatch(stale_message(column, slide_id))
            return
        write_column_shard(
            shard,
            records,
            shape=facts["shape"],
            dtype=facts["dtype"],
            made_by=made_by,
            num_tiles=num_tiles,
            images_sha256=checksum,
        )

    def _same_maker(self, column: str, facts: Mapping[str, Any]) -> None:
        for slide_id in self.slide_ids(column)[:1]:
            stored = read_sidecar(self.shard_path(column, slide_id))
            if found := differences({key: stored[key] for key in facts}, facts):
                raise StoreMismatch(
                    f"column {column!r} of {self.path} was made by something else: {'; '.join(found)}. "
                    "Use the same settings, or give the new column another name."
                )

    def column(self, name: str, max_open: int = 128) -> Column:
        """Open a column for reading.

        Raises:
            MissingColumn: If there is none of that name; lists those that exist.
            StoreMismatch: If its shards do not belong together, or not to these images.
        """
        present = self.columns()
        if name == "images" or name not in present:
            there = ", ".join(present[1:]) or "none yet"
            raise MissingColumn(
                f"{self.path} has no column {name!r} of latents or embeddings (there: {there}). "
                "Run `pixcell encode` first."
            )
        column = Column(self.path / name, max_open)
        checksums = self.checksums()
        for slide_id, checksum in column.made_from.items():
            if checksums.get(slide_id) != checksum:
                raise StoreMismatch(stale_message(name, slide_id))
        return column

    def remove_leftovers(self) -> None:
        """Delete what killed writers left half-written more than a day ago, in every folder of the store."""
        for folder in (self.path, *(each for each in self.path.iterdir() if each.is_dir())):
            remove_leftovers(folder)

    # ── the index ────────────────────────────────────────────────────────────────────────────────

    def checksums(self) -> dict[str, str]:
        """Return the checksum that each images shard states, by slide."""
        result = {}
        for slide_id in self.slide_ids():
            shard = self.shard_path("images", slide_id)
            facts = shard.stat()
            known = self._digests.get(slide_id)
            if known is None or known[:2] != (facts.st_mtime_ns, facts.st_size):
                known = self._digests[slide_id] = (facts.st_mtime_ns, facts.st_size, sealed_digest(shard))
            result[slide_id] = known[2]
        return result

    def index(self) -> pa.Table:
        """Return one row per tile, by slide and position in the slide.

        Columns: ``slide_id``, ``tile`` (row in the slide), ``x``, ``y`` (level-0 pixels), ``tissue``,
        ``pen``, ``sharpness``, ``name``, then every attribute (label, organ, stain, split, ...), null where a
        tile has none. Kept in ``index.parquet`` and made again when shards were added, replaced or removed.
        """
        return up_to_date_index(self.path / "index.parquet", self.checksums(), self.images)

    @property
    def num_tiles(self) -> int:
        """Number of tiles of all slides."""
        return len(self.index())

    # ── integrity ────────────────────────────────────────────────────────────────────────────────

    def verify(self) -> list[Problem]:
        """Read every byte; return everything that is not as it was written, or does not fit together."""
        return list(problems_in(self))

    def summary(self) -> list[ColumnSummary]:
        """Return what the store holds of each column."""
        slides = set(self.slide_ids())
        result = []
        for name in self.columns():
            done = self.slide_ids(name)
            facts = {} if name == "images" else read_sidecar(self.shard_path(name, done[0]))
            result.append(
                ColumnSummary(
                    name=name,
                    num_slides=len(done),
                    num_missing=len(slides - set(done)),
                    num_bytes=sum(self.shard_path(name, slide_id).stat().st_size for slide_id in done),
                    shape=facts.get("shape"),
                    made_by=facts.get("made_by", {}),
                )
            )
        return result
