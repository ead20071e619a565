"""``pixcell pack``: write a store as WebDataset shards, for object storage."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pydantic import ByteSize
from rich.table import Table

from pixcell.console import facts, progress
from pixcell.data.packing import PackWriter
from pixcell.data.store import TileStore
from pixcell.errors import OutputError
from pixcell.parallel import Done, default_workers, map_slides
from pixcell.tasks.facts import size_text

__all__ = ["PackResult", "pack_store"]


@dataclass(frozen=True)
class PackResult:
    """A finished pack."""

    folder: Path
    num_tiles: int
    num_shards: int
    num_written: int
    """Shards that this call made; the others were there."""
    num_bytes: int
    columns: tuple[str, ...]

    def __rich__(self) -> Table:
        """Lay the result out for a terminal."""
        return facts(
            f"Pack {self.folder}",
            {
                "tiles": f"{self.num_tiles:,}",
                "shards": f"{self.num_shards:,}, {self.num_written:,} written now",
                "size": size_text(self.num_bytes),
                "columns": ", ".join(self.columns),
            },
        )


def pack_store(
    store: Path,
    folder: Path,
    *,
    columns: Sequence[str] | None = None,
    where: Mapping[str, Sequence[str]] = MappingProxyType({}),
    shard_size: ByteSize | int = 512_000_000,
    shuffle: bool = True,
    seed: int = 0,
    workers: int | None = None,
) -> PackResult:
    """Write a store as WebDataset shards with an index.

    It may be stopped, killed and started again: shards that are there stay, and the files have the same bytes
    as if it had run through. Asked again for a finished pack, it makes what is missing, if anything.

    Args:
        store: A tile store.
        folder: New, empty, or a pack of the same request.
        columns: Columns to take, ``images`` among them. None: all.
        where: Attributes of tiles to take, such as ``{"split": ["train"]}``; all must hold.
        shard_size: About how large a shard is, such as "512MB".
        shuffle: Whether tiles are shuffled over the shards; otherwise slides stay together.
        seed: Of the shuffle.
        workers: Number of processes. None: one per processor.

    Raises:
        StoreError: If the store, a column or the wanted tiles are missing, or ``folder`` holds other things.
        CorruptShard: If a record or an image of the store is damaged.
        OutputError: If ``folder`` cannot be written.
    """
    if folder.resolve() == store.resolve():
        raise OutputError(f"{folder} is the store itself; choose another folder.")
    writer = PackWriter(
        TileStore.open(store),
        folder,
        columns=columns,
        where=where,
        shard_bytes=int(shard_size),
        shuffle=shuffle,
        seed=seed,
    )
    left = writer.shards_left()
    with progress("Packing", writer.num_shards) as advance:
        advance(writer.num_shards - len(left))
        for result in map_slides(
            functools.partial(_write, writer), left, min(workers or default_workers(), max(1, len(left)))
        ):
            if not isinstance(result, Done):
                raise result.error
            advance(note=f"shard {result.item}")
    manifest = writer.finish()
    return PackResult(
        folder=folder,
        num_tiles=manifest.num_tiles,
        num_shards=len(manifest.shards),
        num_written=len(left),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        columns=(*(["images"] if manifest.has_images else []), *manifest.columns),
    )


def _write(writer: PackWriter, number: int) -> int:
    return writer.write_shard(number)
