"""Everything that can be wrong with a store, found by reading every byte of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pixcell.data.columns import Column, read_sidecar, sidecar_of, stale_message
from pixcell.data.images import ImageShard
from pixcell.data.sealed import SEAL_BYTES, broken_seal
from pixcell.errors import CorruptShard, MissingColumn, StoreMismatch

if TYPE_CHECKING:
    from pixcell.data.store import TileStore

__all__ = ["Problem", "problems_in"]


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written, or does not fit to the rest."""

    column: str
    slide_id: str
    """``*`` where it concerns the whole column."""
    reason: str


def problems_in(store: "TileStore") -> Iterator[Problem]:
    """Yield what is wrong: changed or missing bytes, lost descriptions, columns that do not fit images."""
    num_tiles: dict[str, int] = {}
    checksums: dict[str, str] = {}
    for slide_id in store.slide_ids():
        path = store.shard_path("images", slide_id)
        try:
            shard = ImageShard(path)
            num_tiles[slide_id], checksums[slide_id] = len(shard), shard.checksum
            reason = broken_seal(path)
        except CorruptShard as error:
            reason = str(error)
        if reason:
            yield Problem("images", slide_id, reason)
    for column in store.columns():
        if column == "images":
            continue
        for slide_id in store.slide_ids(column):
            shard_path = store.shard_path(column, slide_id)
            for reason in _problems_of(shard_path, num_tiles.get(slide_id), checksums.get(slide_id)):
                yield Problem(column, slide_id, reason)
        yield from _mixed_makers(store.path / column)


def _problems_of(shard: Path, num_tiles: int | None, checksum: str | None) -> Iterator[str]:
    try:
        facts = read_sidecar(shard)
    except CorruptShard as error:
        yield str(error)
        return
    if num_tiles is None:
        yield f"{shard} belongs to a slide whose images are missing or damaged."
    elif facts["num_tiles"] != num_tiles:
        yield f"{shard} has {facts['num_tiles']} tiles, the images have {num_tiles}."
    elif facts["images_sha256"] != checksum:
        yield stale_message(shard.parent.name, shard.name.removesuffix(".npy"))
    if reason := broken_seal(shard):
        yield reason
        return
    try:
        array = np.load(shard, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        yield f"{shard} is no array: {error}."
        return
    stated = (facts["num_tiles"], *facts["shape"])
    size = array.offset + array.nbytes + SEAL_BYTES
    if array.shape != stated or array.dtype != facts["dtype"] or shard.stat().st_size != size:
        yield f"{shard} holds {array.shape} {array.dtype}; {sidecar_of(shard).name} states {stated}."


def _mixed_makers(folder: Path) -> Iterator[Problem]:
    try:
        Column(folder)
    except StoreMismatch as error:
        yield Problem(folder.name, "*", str(error))
    except (CorruptShard, MissingColumn):
        return  # a lost description, which was reported with its slide; or the column is gone meanwhile
