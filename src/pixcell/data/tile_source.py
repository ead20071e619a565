"""Where tiles come from: what a storage must offer so that datasets can read from it.

A tile store, a pack of shards and a folder in the published layout are such storages. Another one is a class
with the members of :class:`TileSource` that passes ``tests/data/tile_source_contract.py``; no registration.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from pixcell.geometry import Box

__all__ = ["BlockSource", "TileColumn", "TileImages", "TileSource"]


@runtime_checkable
class TileColumn(Protocol):
    """Fixed-size records of tiles, ``(rows, columns, ...)``; :class:`pixcell.data.columns.Column` is one."""

    @property
    def made_by(self) -> Mapping[str, Any]:
        """What made the column."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one tile's record."""

    @property
    def dtype(self) -> np.dtype:
        """Of the records."""

    @property
    def num_tiles(self) -> Mapping[str, int]:
        """Number of tiles per slide that is done."""

    def read_into(self, out: np.ndarray, slide_id: str, tile: int, fields: Box) -> None:
        """Read some fields of a tile into a contiguous array."""


@runtime_checkable
class TileImages(Protocol):
    """The pixels of a slide's tiles; :class:`pixcell.data.images.ImageShard` is one."""

    def image(self, tile: int) -> np.ndarray:
        """Return a tile, (height, width, 3) uint8."""


@runtime_checkable
class TileSource(Protocol):
    """Where tiles come from; :class:`pixcell.data.store.TileStore` is one.

    Another storage is a class with these members that passes ``tests/data/tile_source_contract.py``.
    It must pickle, so that worker processes can open it.
    """

    @property
    def tile_size(self) -> int:
        """Side of a tile, in pixels."""

    @property
    def mpp(self) -> float:
        """Microns per pixel."""

    def columns(self) -> list[str]:
        """Return the names of all columns, ``images`` among them."""

    def index(self) -> pa.Table:
        """Return one row per tile: ``slide_id``, ``tile``, ``x``, ``y``, and attributes."""

    def column(self, name: str) -> TileColumn:
        """Open a column of records."""

    def images(self, slide_id: str) -> TileImages:
        """Open the images of a slide."""


@runtime_checkable
class BlockSource(TileSource, Protocol):
    """A source that is read in large pieces, such as shards fetched whole."""

    @property
    def blocks_at_once(self) -> int:
        """How many blocks are shuffled together where a recipe does not say it."""

    def blocks(self) -> np.ndarray:
        """Return for each row of the index the number of the block it is read with.

        Rows of one block stand together in the index.
        """

    def prepare(self, window: int) -> None:
        """Get ready to be read in windows of so many blocks.

        Raises:
            StoreError: If they cannot be held at once.
        """
