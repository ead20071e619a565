"""The published PixCell layout as a tile source, read where it lies.

See ``published_layout`` for the folders. Nothing is copied: the fields of a tile are cut from its ``.npy``
files. There a channel is a whole image, so a 256-px field is 32 stretches of rows, spread over a mebibyte. In
random order, only these stretches are read (a quarter of the file). Visited in blocks (``prepare``), a file
is read once, whole, and its fields are served from memory.

Tiles have the numbers and order that they get when the layout is imported into a store.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pixcell.config import Config
from pixcell.data.columns import npy_header, read_fields
from pixcell.data.images import decode_tile
from pixcell.data.index import INDEX_COLUMNS
from pixcell.data.published_index import TILE_SIZE, name_parts, read_index, slides_in
from pixcell.data.published_layout import (
    FILE_SHAPES,
    PUBLISHED_CODEC,
    RECORD_SHAPES,
    SUFFIXES,
    FeaturePlace,
    ImportedColumn,
    published_columns,
    to_record,
)
from pixcell.data.sealed import OpenFile, OpenFiles
from pixcell.errors import CorruptShard, MissingColumn, StoreError, listed
from pixcell.geometry import Box

__all__ = ["PublishedColumn", "PublishedConfig", "PublishedImages", "PublishedSource"]

_DTYPE = np.dtype(np.float16)
_TILES_AT_ONCE = 256
_MOST_BLOCKS = 4_000_000


class PublishedConfig(Config):
    """What a folder in the published layout does not say of itself."""

    mpp: float = Field(0.5, gt=0)
    """Microns per pixel; published tiles are 20x."""
    sources: list[str] | None = None
    """Sources of the index to take. None: all."""
    features_in: FeaturePlace | None = None
    """Where features are. None: wherever the first tile has them, if that is one place only."""
    latents: str = "latents-sd3"
    """Name that the latents get as a column."""
    embeddings: str = "embeddings-uni2-h"
    """Name that the embeddings get as a column."""
    codec: str | None = None
    """The autoencoder that made the latents: a folder or a name. Training compares its weights."""


class PublishedSource:
    """Tiles of a folder in the published layout. Pickles as its path."""

    def __init__(
        self,
        root: Path,
        config: PublishedConfig | None = None,
        codec: Mapping[str, Any] = PUBLISHED_CODEC,
        window: int = 0,
    ) -> None:
        """Read the index; files of tiles are opened when they are needed.

        Args:
            root: The folder above ``patches/``.
            config: What the folder does not say; as published unless given.
            codec: Facts about the autoencoder that made the latents.
            window: Tiles in a window; see :meth:`prepare`.

        Raises:
            StoreError: If the folder is not as published, or features are in two places.
        """
        config = config or PublishedConfig()
        self.root, self.config, self._codec, self._window = Path(root), config, dict(codec), window
        index = read_index(self.root)
        wanted = list(index) if config.sources is None else config.sources
        for source in wanted:
            if source not in index:
                raise StoreError(f"{root} has no source {source!r}; it has {listed(sorted(index), 10)}.")
        slides = slides_in({source: names for source, names in index.items() if source in wanted})
        if not slides:
            raise StoreError(f"the index of {root} names no tile.")
        self._slides = {one.slide_id: one for one in sorted(slides, key=lambda one: one.slide_id)}
        first = next(iter(self._slides.values())).names[0]
        self._columns: dict[str, tuple[str, ImportedColumn, FeaturePlace]] = {}
        for kind, column in published_columns(codec, config.latents, config.embeddings).items():
            place = self._place_of_features(first, SUFFIXES[kind])
            if place is not None:
                self._columns[column.name] = (SUFFIXES[kind], column, place)

    def _place_of_features(self, name: str, suffix: str) -> FeaturePlace | None:
        relative = name.removesuffix(".jpeg") + suffix
        found = [
            place
            for place, folder in (("beside", "patches"), ("features", "features"))
            if (self.root / folder / relative).is_file() and self.config.features_in in (None, place)
        ]
        if len(found) > 1:
            raise StoreError(
                f"{self.root} has features both beside the images and below features/ ({relative}). Say "
                "which to read: data.published.features_in=beside or data.published.features_in=features."
            )
        return found[0] if found else None  # type: ignore[return-value]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self.config, self._codec, self._window)

    @property
    def tile_size(self) -> int:
        """Side of a tile, in pixels."""
        return TILE_SIZE

    @property
    def mpp(self) -> float:
        """Microns per pixel."""
        return self.config.mpp

    @property
    def num_tiles(self) -> dict[str, int]:
        """Number of tiles per slide."""
        return {slide_id: len(slide.names) for slide_id, slide in self._slides.items()}

    def columns(self) -> list[str]:
        """Return ``images``, and the columns whose features the first tile has."""
        return ["images", *self._columns]

    @functools.cached_property
    def _index(self) -> pa.Table:
        columns: dict[str, list[Any]] = {name: [] for name in (*INDEX_COLUMNS, "cohort", "source")}
        for slide_id, slide in self._slides.items():
            for tile, name in enumerate(slide.names):
                *_, x, y = name_parts(name)
                row = (slide_id, tile, x, y, 1.0, 0.0, 0.0, name, slide.cohort, slide.source)
                for values, value in zip(columns.values(), row, strict=True):
                    values.append(value)
        return pa.table({key: pa.array(values, _type_of(key)) for key, values in columns.items()})

    def index(self) -> pa.Table:
        """Return one row per tile, as the store that imports this layout would; ``x`` and ``y`` are numbers
        of the file names, whose unit is not documented.
        """
        return self._index

    def column(self, name: str) -> "PublishedColumn":
        """Open a column.

        Raises:
            MissingColumn: If the tiles have no such features.
        """
        if name not in self._columns:
            raise MissingColumn(
                f"{self.root} has no column {name!r} of latents or embeddings (there: "
                f"{listed(list(self._columns)) or 'none'}; the published layout has them as "
                "*_sd3_vae.npy and *_uni.npy)."
            )
        suffix, column, place = self._columns[name]
        return PublishedColumn(self, column, suffix, place)

    def images(self, slide_id: str) -> "PublishedImages":
        """Open the images of a slide.

        Raises:
            StoreError: If the slide is not in the index.
        """
        return PublishedImages(self, slide_id)

    # ── for orders that read in large pieces ─────────────────────────────────────────────────────

    @functools.cached_property
    def _tiles_per_block(self) -> int:
        """One, so that shuffling is as good as can be; more where the list of blocks would grow too long."""
        return -(-len(self._index) // _MOST_BLOCKS)

    @property
    def blocks_at_once(self) -> int:
        """Blocks that are shuffled together, where a recipe does not say how many: some 256 tiles."""
        return max(16, _TILES_AT_ONCE // self._tiles_per_block)

    def blocks(self) -> np.ndarray:
        """Return which block each row of the index lies in: a block is a tile, whose fields share files."""
        return np.arange(len(self._index)) // self._tiles_per_block

    def prepare(self, window: int) -> None:
        """Get ready for windows of so many blocks: each process keeps two of them (1.1 MiB a tile)."""
        self._window = window * self._tiles_per_block

    def name_of(self, slide_id: str, tile: int) -> str:
        """Return a tile's name below ``patches/``."""
        if slide_id not in self._slides:
            known = list(self._slides)
            raise StoreError(f"{self.root} has no slide {slide_id!r}. It has {len(known)}: {listed(known)}")
        names: Sequence[str] = self._slides[slide_id].names
        if not 0 <= tile < len(names):
            raise IndexError(f"tile {tile} of {len(names)} in slide {slide_id!r}")
        return names[tile]


def _type_of(column: str) -> pa.DataType:
    return INDEX_COLUMNS.get(column, pa.large_string())


class PublishedColumn:
    """One kind of published features, as records of 256-px fields, ``(4, 4, ...)``."""

    def __init__(
        self, source: PublishedSource, column: ImportedColumn, suffix: str, place: FeaturePlace
    ) -> None:
        """Use :meth:`PublishedSource.column`."""
        self.source, self._column, self._suffix, self._place = source, column, suffix, place
        self.num_tiles = source.num_tiles
        self._whole: OpenFiles[np.ndarray] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self._column, self._suffix, self._place)

    @property
    def name(self) -> str:
        """Of the column."""
        return self._column.name

    @property
    def made_by(self) -> Mapping[str, Any]:
        """What made it, as far as the layout records it."""
        return self._column.made_by

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the record of one tile."""
        return RECORD_SHAPES[self._suffix]

    @property
    def dtype(self) -> np.dtype:
        """Of the records."""
        return _DTYPE

    def read_into(self, out: np.ndarray, slide_id: str, tile: int, fields: Box) -> None:
        """Read some fields of a tile into a contiguous array of their size and dtype.

        Raises:
            CorruptShard: If the tile's file is missing, cut short, or not as published.
        """
        rows, columns = self.shape[:2]
        if fields.x < 0 or fields.y < 0 or fields.right > columns or fields.bottom > rows:
            raise ValueError(f"fields {fields} reach outside the {rows} x {columns} fields of a tile")
        name = self.source.name_of(slide_id, tile)
        # Room for two windows: the next one begins while the last one ends.
        if (kept := 2 * self.source._window) and (self._whole is None or self._whole.limit < kept):
            self._whole = OpenFiles(self._read_whole, kept)
        if self._whole is not None:
            record = self._whole[name]
        elif len(self.shape) == 3:  # embeddings stand field by field in the file already
            file, start = self._open(name)
            read_fields(out, file, start, self.shape, fields)
            return
        elif (fields.width, fields.height) == (columns, rows):
            record = self._read_whole(name)
        else:
            self._read_rows(out, name, fields)
            return
        out[...] = record[fields.y : fields.bottom, fields.x : fields.right]

    def _read_whole(self, name: str) -> np.ndarray:
        file, start = self._open(name)
        array = np.empty(FILE_SHAPES[self._suffix], _DTYPE)
        file.read_into(memoryview(array).cast("B"), start)  # type: ignore[arg-type]
        return np.ascontiguousarray(to_record(array, self._suffix))

    def _read_rows(self, out: np.ndarray, name: str, fields: Box) -> None:
        """Read the rows of latents under some fields, channel by channel, and nothing else of the file."""
        channels, height, width = FILE_SHAPES[self._suffix]
        cells = height // self.shape[0]
        file, start = self._open(name)
        band = np.empty((channels, cells * fields.height, width), _DTYPE)
        for channel in range(channels):
            first = (channel * height + fields.y * cells) * width * _DTYPE.itemsize
            file.read_into(memoryview(band[channel]).cast("B"), start + first)  # type: ignore[arg-type]
        columns = band[:, :, fields.x * cells : fields.right * cells]
        split = columns.reshape(channels, fields.height, cells, fields.width, cells)
        out[...] = split.transpose(1, 3, 0, 2, 4)

    def _open(self, name: str) -> tuple[OpenFile, int]:
        """Open a tile's file and find where its numbers begin.

        Raises:
            CorruptShard: If it is missing, or is not as published.
        """
        folder = "patches" if self._place == "beside" else "features"
        path = self.source.root / folder / (name.removesuffix(".jpeg") + self._suffix)
        shape = FILE_SHAPES[self._suffix]
        try:
            file = OpenFile(path)
        except FileNotFoundError:
            raise CorruptShard(f"{path} is missing. Make the features of this tile.") from None
        header = npy_header(shape, _DTYPE)
        start = len(header)
        if file.read(min(start, file.size), 0) != header:  # some other program's way to write a header
            start = _start_in(path, shape)
        size = start + 2 * int(np.prod(shape))
        if file.size < size:
            raise CorruptShard(f"{path} has {file.size} bytes instead of {size}. Make the features again.")
        return file, start


def _start_in(path: Path, shape: tuple[int, ...]) -> int:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptShard(f"{path} cannot be read as an array: {error}.") from error
    if array.shape != shape or array.dtype != _DTYPE or not array.flags.c_contiguous:
        raise CorruptShard(
            f"{path} holds {array.shape} {array.dtype}; a published one holds {shape} {_DTYPE}, row by row."
        )
    return int(array.offset)


class PublishedImages:
    """The JPEG files of one slide."""

    def __init__(self, source: PublishedSource, slide_id: str) -> None:
        """Use :meth:`PublishedSource.images`."""
        source.name_of(slide_id, 0)
        self.source, self.slide_id = source, slide_id

    def __len__(self) -> int:
        return self.source.num_tiles[self.slide_id]

    def jpeg(self, tile: int) -> bytes:
        """Return the bytes of a tile's file.

        Raises:
            CorruptShard: If there is no such file.
        """
        path = self.source.root / "patches" / self.source.name_of(self.slide_id, tile)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise CorruptShard(f"{path} is in the index, but there is no such file.") from None

    def image(self, tile: int) -> np.ndarray:
        """Return the pixels of a tile, (height, width, 3) uint8.

        Raises:
            CorruptShard: If the JPEG is cut short or does not decode.
        """
        name = self.source.name_of(self.slide_id, tile)
        return decode_tile(self.jpeg(tile), f"{self.source.root / 'patches' / name}", "Copy it again.")
