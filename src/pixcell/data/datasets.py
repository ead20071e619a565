"""Torch datasets of fields, cut from what a tile source holds.

A field is the square a model sees: 256, 512 or 1024 pixels. Fields are cut from the stored latents and
embedding grids of whole tiles, so a tile is encoded once whatever size is trained on. The fields of a tile
are counted in row-major order.
"""

import contextlib
import errno
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from pixcell.data.index import tiles_where
from pixcell.data.sealed import OpenFiles
from pixcell.data.tile_source import BlockSource, TileColumn, TileImages, TileSource
from pixcell.errors import (
    CorruptShard,
    MissingColumn,
    StoreError,
    StoreMismatch,
    UnreadableTile,
    listed,
)
from pixcell.geometry import Box

__all__ = ["BlockSource", "FieldDataset", "TileColumn", "TileImages", "TileSource"]

# What the machine lacks, and not a tile: another tile would fail as well.
_NOT_OF_A_TILE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_BLOCK = "block of the row"  # no attribute is called so


class FieldDataset(Dataset[dict[str, Any]]):
    """Fields of tiles, with the latents, embeddings and pixels under them.

    An item is a dictionary of

    - ``posterior_mean``, ``posterior_std``: (channels, height, width), as stored (not normalised);
    - ``embedding_grid``: (rows, columns, dim), one embedding per embedded field under this one;
    - ``image``: (3, size, size) uint8;
    - ``key``: ``"<slide>/<x>_<y>/<row>_<column>"``: tile position in level-0 pixels, field in the tile.

    It holds what was asked for, in the stored dtype. Batches are read in the order in which they lie on disk.
    Pickles; survives forks; opens a bounded number of files.

    Attributes:
        parts: The fields of each source, as ranges of indices.
        groups: The fields of each value of ``group_by``, as ranges of indices; None is for tiles without one.
            Empty without ``group_by``.
    """

    def __init__(
        self,
        source: TileSource | Sequence[TileSource],
        *,
        size: int,
        latents: str | None = None,
        embeddings: str | None = None,
        images: bool = False,
        where: Mapping[str, Sequence[str]] | None = None,
        group_by: str | None = None,
    ) -> None:
        """Choose tiles and columns.

        Args:
            source: A store, or several whose columns were made alike.
            size: Side of a field, in pixels; it must divide the tile.
            latents: Column of posteriors.
            embeddings: Column of embedding grids.
            images: Whether to decode pixels.
            where: Attributes of tiles to take, such as ``{"split": ["train"]}``; all must hold. ``slide_id``
                counts as one.
            group_by: Attribute of tiles. Within a source, tiles with the same value then stand together;
                else they stand as in its index.

        Raises:
            MissingColumn: If a column is not there, or not complete for the chosen tiles.
            StoreMismatch: If ``size`` does not fit the tiles or a column, or sources were made differently.
            StoreError: If no tile remains, or no tile has such an attribute.
        """
        if not (latents or embeddings or images):
            raise ValueError("ask for latents, embeddings or images; otherwise an item would be empty")
        sources = [source] if isinstance(source, TileSource) else list(source)
        if not sources:
            raise StoreError("no tile store was given.")
        self.size, self.images = size, images
        self._parts = [
            _Part(one, size, latents, embeddings, images, where or {}, group_by) for one in sources
        ]
        first = self._parts[0]
        for part in self._parts[1:]:
            part.must_equal(first)
        self._starts = np.cumsum([0] + [len(part) for part in self._parts])
        self.parts = [range(start, end) for start, end in pairwise(self._starts.tolist())]
        self.groups = self._groups(group_by) if group_by else {}

    def _groups(self, attribute: str) -> dict[str | None, list[range]]:
        known = sorted({name for part in self._parts for name in part.attributes})
        if attribute not in known:
            near = get_close_matches(attribute, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Attributes: {listed(known)}."
            raise StoreError(f"no tile of the store has an attribute {attribute!r}.{hint}")
        groups: dict[str | None, list[range]] = {}
        for start, part in zip(self._starts.tolist(), self._parts, strict=False):
            each = part.fields_per_tile
            for value, tiles in part.groups.items():
                fields = range(start + tiles.start * each, start + tiles.stop * each)
                groups.setdefault(value, []).append(fields)
        return groups

    @property
    def mpp(self) -> float:
        """Microns per pixel of every field."""
        return self._parts[0].source.mpp

    @property
    def made_by(self) -> dict[str, Mapping[str, Any]]:
        """What made the columns: ``latents`` and ``embeddings``, where asked for."""
        return {kind: column.made_by for kind, column in self._parts[0].columns.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of an item, without reading one."""
        batch = self._parts[0].empty_batch(0, self.size, self.images)
        shapes = {kind: tuple(values.shape[1:]) for kind, values in batch.items()}
        if latents := shapes.pop("latents", None):
            half = (latents[0] // 2, *latents[1:])
            shapes |= {"posterior_mean": half, "posterior_std": half}
        names = {"embeddings": "embedding_grid", "images": "image"}
        return {names.get(kind, kind): shape for kind, shape in shapes.items()}

    @property
    def num_tiles(self) -> int:
        """Number of tiles the fields are cut from."""
        return sum(len(part.tile) for part in self._parts)

    @property
    def is_read_in_blocks(self) -> bool:
        """Whether one of the sources is a :class:`BlockSource`."""
        return any(isinstance(part.source, BlockSource) for part in self._parts)

    @property
    def blocks_at_once(self) -> int:
        """How many blocks are shuffled together where a recipe does not say it."""
        sources = [part.source for part in self._parts]
        return max((one.blocks_at_once for one in sources if isinstance(one, BlockSource)), default=16)

    def prepare(self, window: int) -> None:
        """Get the sources ready to be read in windows of so many blocks.

        Raises:
            StoreError: If one cannot hold them at once.
        """
        for part in self._parts:
            if isinstance(part.source, BlockSource):
                part.source.prepare(window)

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Return first index and number of fields of each block that is best read at one time.

        Of a source that is no :class:`BlockSource`, the tiles of a slide are a block. Tiles of one block that
        belong to two groups count as two blocks.
        """
        starts, sizes = [], []
        for start, part in zip(self._starts.tolist(), self._parts, strict=False):
            first = np.append(part.block_starts, len(part.tile)) * part.fields_per_tile
            starts.append(start + first[:-1])
            sizes.append(np.diff(first))
        return np.concatenate(starts), np.concatenate(sizes)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Read a batch; the torch loader calls this when it is there.

        Raises:
            UnreadableTile: At the first tile whose bytes cannot be read or do not decode.
        """
        places = [self._place(int(index)) for index in indices]
        tensors = self._parts[0].empty_batch(len(places), self.size, self.images)
        arrays = {kind: tensor.numpy() for kind, tensor in tensors.items()}
        for row in sorted(range(len(places)), key=places.__getitem__):
            number, tile, field = places[row]
            part = self._parts[number]
            try:
                part.read_into(arrays, row, tile, field)
            except CorruptShard as error:
                raise part.unreadable(tile, str(error)) from error
            except OSError as error:
                if error.errno in _NOT_OF_A_TILE:
                    raise
                raise part.unreadable(tile, f"{error}.") from error
        batch: dict[str, Any] = {}
        for kind, values in tensors.items():
            if kind == "latents":
                batch["posterior_mean"], batch["posterior_std"] = values.chunk(2, dim=1)
            else:
                batch["embedding_grid" if kind == "embeddings" else "image"] = values
        batch["key"] = [self._parts[number].key(tile, field) for number, tile, field in places]
        return [_Field(batch, row) for row in range(len(places))]

    def readable(self, indices: Sequence[int]) -> list[int]:
        """Return those of some fields that can be read, by reading them one by one."""
        result = []
        for index in indices:
            with contextlib.suppress(UnreadableTile):
                self.__getitems__([index])
                result.append(index)
        return result

    def key(self, index: int) -> str:
        """Return the key of an item without reading it."""
        number, tile, field = self._place(index)
        return self._parts[number].key(tile, field)

    def _place(self, index: int) -> tuple[int, int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"field {index} of {len(self)}")
        index %= len(self)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        tile, field = divmod(index - int(self._starts[number]), self._parts[number].fields_per_tile)
        return number, tile, field


class _Field(dict[str, Any]):
    """An item that remembers the batch it was read with, so that the loader need not copy it once more."""

    def __init__(self, batch: Mapping[str, Any], row: int) -> None:
        super().__init__({name: values[row] for name, values in batch.items()})
        self.batch, self.row = batch, row

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _collate(items: Sequence[Any], *, collate_fn_map: Any = None) -> Any:
    """Stack items; a batch that was read in one go is stacked already."""
    batch = items[0].batch
    whole = len(items) == len(batch["key"])
    if whole and all(item.batch is batch and item.row == row for row, item in enumerate(items)):
        return dict(batch)
    return default_collate([dict(item) for item in items])


# How torch lets a type of item bring its own way of being stacked.
default_collate_fn_map[_Field] = _collate


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
    """Make room for a batch; in a loader's worker, where the main process can see it without a copy."""
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    if get_worker_info() is None:
        return torch.empty(shape, dtype=kind)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=kind).set_(storage, 0, shape)  # type: ignore[call-overload]


@dataclass
class _Cut:
    """How a field of the dataset falls on the fields of a column."""

    column: TileColumn
    per_side: int

    def box(self, row: int, column: int) -> Box:
        return Box(column * self.per_side, row * self.per_side, self.per_side, self.per_side)


class _Part:
    """The chosen tiles of one source. Holds 24 bytes per tile, so that memory stays small at any size.

    Attributes:
        groups: Its tiles by value of the attribute they are grouped by: ranges of rows.
        block_starts: First row of each block.
        attributes: Names that could be grouped by.
    """

    def __init__(
        self,
        source: TileSource,
        size: int,
        latents: str | None,
        embeddings: str | None,
        images: bool,
        where: Mapping[str, Sequence[str]],
        group_by: str | None,
    ) -> None:
        if size <= 0 or source.tile_size % size:
            raise StoreMismatch(
                f"fields of {size} px cannot be cut from tiles of {source.tile_size} px. "
                f"Sizes that fit: {listed(_divisors(source.tile_size))}."
            )
        self.source = source
        self.fields_per_side = source.tile_size // size
        self.fields_per_tile = self.fields_per_side**2
        names = {"latents": latents, "embeddings": embeddings}
        self._cuts = {kind: self._cut(kind, name, size) for kind, name in names.items() if name}
        index = source.index()
        if isinstance(source, BlockSource):
            index = index.append_column(_BLOCK, pa.array(np.asarray(source.blocks(), np.int64)))
        rows = tiles_where(index, where)
        if images and "images" not in source.columns():
            raise MissingColumn(
                f"a source of tiles has no images (only {listed(source.columns())}), and pixels are needed, "
                "if only to show real tissue beside what is made. Pack the store again with images."
            )
        self.attributes = [one.name for one in rows.schema if one.type in (pa.string(), pa.large_string())]
        rows, self.groups = _grouped(rows, group_by if group_by in self.attributes else None)
        self.slide_ids: list[str] = pc.unique(rows["slide_id"]).to_pylist()
        self._complete_in(names)
        self.slide = pc.index_in(rows["slide_id"], pa.array(self.slide_ids, rows["slide_id"].type)).to_numpy()
        self.tile, self.x, self.y = (rows[key].to_numpy() for key in ("tile", "x", "y"))
        together = rows[_BLOCK].to_numpy() if _BLOCK in rows.column_names else self.slide
        borders = np.flatnonzero(np.diff(together)) + 1
        self.block_starts = np.union1d(borders, [0, *(tiles.start for tiles in self.groups.values())])
        self._images = OpenFiles(source.images, limit=16)

    def __len__(self) -> int:
        return len(self.tile) * self.fields_per_tile

    @property
    def columns(self) -> dict[str, TileColumn]:
        return {kind: cut.column for kind, cut in self._cuts.items()}

    def _cut(self, kind: str, name: str, size: int) -> _Cut:
        column = self.source.column(name)
        if (stored := column.made_by.get("kind", kind)) != kind:
            raise StoreMismatch(f"column {name!r} holds {stored}, not {kind}. Name a column of {kind}.")
        field_size = self.source.tile_size // column.shape[0]
        if size % field_size:
            raise StoreMismatch(
                f"fields of {size} px cannot be cut from column {name!r}, which was made of fields of "
                f"{field_size} px. Use a multiple of {field_size}, or encode with --field-size {size}."
            )
        return _Cut(column, size // field_size)

    def _complete_in(self, names: Mapping[str, str | None]) -> None:
        for kind, cut in self._cuts.items():
            missing = [slide_id for slide_id in self.slide_ids if slide_id not in cut.column.num_tiles]
            if missing:
                raise MissingColumn(
                    f"column {names[kind]!r} lacks {len(missing)} of {len(self.slide_ids)} slides "
                    f"({listed(missing)}). Run `pixcell encode` to complete it."
                )

    def must_equal(self, first: "_Part") -> None:
        if self.source.mpp != first.source.mpp:
            raise StoreMismatch(
                f"stores of {first.source.mpp} and {self.source.mpp} microns per pixel cannot be mixed."
            )
        for kind, cut in self._cuts.items():
            other = first._cuts[kind]
            same_field = cut.column.shape[2:] == other.column.shape[2:] and cut.per_side == other.per_side
            if cut.column.made_by != other.column.made_by or not same_field:
                raise StoreMismatch(
                    f"the {kind} of two stores were made differently: {dict(other.column.made_by)} and "
                    f"{dict(cut.column.made_by)}. Encode both in the same way."
                )

    def empty_batch(self, count: int, size: int, images: bool) -> dict[str, torch.Tensor]:
        batch = {}
        for kind, cut in self._cuts.items():
            shape, side = cut.column.shape[2:], cut.per_side
            if kind == "latents":
                channels, height, width = shape
                batch[kind] = _empty((count, channels, side * height, side * width), cut.column.dtype)
            else:
                batch[kind] = _empty((count, side, side, *shape), cut.column.dtype)
        if images:
            batch["images"] = _empty((count, 3, size, size), np.dtype(np.uint8))
        return batch

    def read_into(self, batch: Mapping[str, np.ndarray], row: int, tile: int, field: int) -> None:
        slide_id, tile_in_slide = self.slide_ids[self.slide[tile]], int(self.tile[tile])
        field_row, field_column = divmod(field, self.fields_per_side)
        for kind, cut in self._cuts.items():
            out, box = batch[kind][row], cut.box(field_row, field_column)
            if kind == "embeddings" or cut.per_side == 1:
                cut.column.read_into(out, slide_id, tile_in_slide, box)
            else:
                fields = np.empty((box.height, box.width, *cut.column.shape[2:]), cut.column.dtype)
                cut.column.read_into(fields, slide_id, tile_in_slide, box)
                out[:] = fields.transpose(2, 0, 3, 1, 4).reshape(out.shape)
        if "images" in batch:
            batch["images"][row] = self._pixels(slide_id, tile_in_slide, field_row, field_column)

    def _pixels(self, slide_id: str, tile: int, row: int, column: int) -> np.ndarray:
        image = self._images[slide_id].image(tile)
        side = self.source.tile_size
        if image.shape != (side, side, 3):
            raise CorruptShard(
                f"tile {tile} of slide {slide_id!r} is {image.shape[1]} x {image.shape[0]} px; the store "
                f"holds tiles of {side} px. Tile the slide again."
            )
        size = side // self.fields_per_side
        return image[row * size : (row + 1) * size, column * size : (column + 1) * size].transpose(2, 0, 1)

    def unreadable(self, tile: int, reason: str) -> UnreadableTile:
        slide_id, row = self.slide_ids[self.slide[tile]], int(self.tile[tile])
        return UnreadableTile(slide_id, row, int(self.x[tile]), int(self.y[tile]), reason)

    def key(self, tile: int, field: int) -> str:
        row, column = divmod(field, self.fields_per_side)
        return f"{self.slide_ids[self.slide[tile]]}/{self.x[tile]}_{self.y[tile]}/{row}_{column}"


def _grouped(rows: pa.Table, attribute: str | None) -> tuple[pa.Table, dict[str | None, range]]:
    """Put rows with the same value together, else in the order they had; say where each value stands."""
    if attribute is None:
        return rows, {None: range(len(rows))}
    values = sorted(pc.unique(rows[attribute]).drop_null().to_pylist())
    codes = pc.index_in(rows[attribute], pa.array(values, rows[attribute].type)).fill_null(-1).to_numpy()
    order = np.argsort(codes, kind="stable")
    ends = np.searchsorted(codes[order], np.arange(-1, len(values)), side="right").tolist()
    named = zip([None, *values], pairwise([0, *ends]), strict=True)
    groups = {value: range(start, end) for value, (start, end) in named if start < end}
    if not np.array_equal(order, np.arange(len(rows))):
        rows = rows.take(pa.array(order))
    return rows, groups


def _divisors(number: int) -> list[int]:
    return [size for size in range(32, number + 1) if number % size == 0]
