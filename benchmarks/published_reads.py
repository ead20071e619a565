"""Stage 1 of PixCell reads 256-px fields of 1024-px tiles: how many bytes and seconds does a sample cost?

The same tiles (latents of 16 channels, embeddings of 1536 numbers) are read

- in the published layout as the published training code does: both files of the tile whole, one field kept;
- in the published layout by ``PublishedSource``: in random order, and in windows of tiles;
- from a tile store, in random order;
- from WebDataset shards (``pixcell pack``): in random order, and in windows of shards.

All sides return the same numbers (checked first), in one process and batches of 64, through the page cache:
each file is read once before it is timed, so that the disk plays no part. Bytes are those that the process
asked the system for (``rchar`` of ``/proc/self/io``). Rounds are interleaved; figures are medians.

    python benchmarks/published_reads.py --work /tmp/published-reads
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from store_reads import EMBEDDINGS, LATENTS, SHAPES, SMALLEST_JPEG

from pixcell.data.datasets import FieldDataset
from pixcell.data.published_tiles import PublishedConfig, PublishedSource
from pixcell.data.shards import ShardSource
from pixcell.data.store import TileStore
from pixcell.data.tiling import Tile
from pixcell.tasks.pack import pack_store
from pixcell.tasks.published import export_published_layout
from pixcell.training.order import BlockOrder, SampleOrder

FIELDS = 16
NAMES = PublishedConfig(latents=LATENTS, embeddings=EMBEDDINGS)


def make(folder: Path, num_slides: int, tiles_per_slide: int) -> None:
    """Write the same random tiles as a store, in the published layout, and as shards."""
    random = np.random.default_rng(0)
    store = TileStore.create(folder / "store", {"tile_size": 1024, "mpp": 0.5})
    for number in range(num_slides):
        slide_id = f"slide-{number:04d}"
        tiles = [Tile(slide_id, 1024 * i, 0, 1024, 0.5, 1.0, 0.0, 1.0) for i in range(tiles_per_slide)]
        store.write_images(slide_id, [(tile, SMALLEST_JPEG) for tile in tiles], {"fingerprint": slide_id})
        for column, shape in SHAPES.items():
            bits = random.integers(0, 1 << 14, (tiles_per_slide, *shape), np.uint16)
            made_by = {"kind": column.split("-")[0], "field_size": 256, "source": "images"}
            facts = {"shape": shape, "dtype": np.float16, "made_by": made_by, "num_tiles": tiles_per_slide}
            store.write_column(column, slide_id, [bits.view(np.float16)], **facts)
    export_published_layout(folder / "store", folder / "published", workers=1)
    pack_store(folder / "store", folder / "packed", shard_size=32_000_000, workers=1)


class AsPublished:
    """Both files of a tile whole, then the cut of one field, as the published training code reads."""

    def __init__(self, root: Path) -> None:
        self.names = sorted(root.rglob("*.jpeg"), key=_place)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self._item(*divmod(index, FIELDS)) for index in indices]

    def _item(self, tile: int, field: int) -> dict[str, Any]:
        path = str(self.names[tile]).removesuffix(".jpeg")
        row, column = divmod(field, 4)
        mean, std = torch.from_numpy(np.load(f"{path}_sd3_vae.npy")).chunk(2)
        embeddings = torch.from_numpy(np.load(f"{path}_uni.npy")).reshape(4, 4, -1)
        rows, columns = slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32)
        return {
            "posterior_mean": mean[:, rows, columns],
            "posterior_std": std[:, rows, columns],
            "embedding_grid": embeddings[row : row + 1, column : column + 1],
        }


def _place(path: Path) -> tuple[str, int]:
    return path.parent.name, int(path.stem.split("_")[0])


def fields_of(source: Any, window: int = 0) -> FieldDataset:
    if window:
        source.prepare(window)
    return FieldDataset(source, size=256, latents=LATENTS, embeddings=EMBEDDINGS)


def sides_in(folder: Path, window_tiles: int) -> dict[str, tuple[Any, Any]]:
    """Each side as a dataset and the order in which it is read."""
    published, packed = folder / "published", folder / "packed"
    store = fields_of(TileStore.open(folder / "store"))
    count = len(store)
    random = SampleOrder(count, seed=0)
    tiles = fields_of(PublishedSource(published, NAMES), window_tiles)
    shards = fields_of(ShardSource.open(packed))
    return {
        "published layout, as published": (AsPublished(published), random),
        "published layout, random": (fields_of(PublishedSource(published, NAMES)), random),
        "published layout, windows": (tiles, BlockOrder(*tiles.blocks(), seed=0, at_once=window_tiles)),
        "tile store, random": (store, random),
        "shards, random": (shards, random),
        "shards, windows": (shards, BlockOrder(*shards.blocks(), seed=0, at_once=4)),
    }


def same_numbers(folder: Path) -> None:
    """Every side must give the same field, or the comparison means nothing."""
    plain = AsPublished(folder / "published")
    others = {
        "published": fields_of(PublishedSource(folder / "published", NAMES)),
        "store": fields_of(TileStore.open(folder / "store")),
        "shards": fields_of(ShardSource.open(folder / "packed")),
    }
    for name, dataset in others.items():
        at = {dataset.key(index): index for index in range(len(dataset))}
        for index in np.random.default_rng(1).integers(0, len(dataset), 64).tolist():
            tile, field = divmod(index, FIELDS)
            slide_id, x = _place(plain.names[tile])
            expected = plain.__getitems__([index])[0]
            item = dataset[at[f"{slide_id}/{x}_0/{field // 4}_{field % 4}"]]
            for key, value in expected.items():
                if not torch.equal(value.view(torch.int16), item[key].view(torch.int16)):
                    raise AssertionError(f"{name}: {key} of field {index} differs")


def bytes_asked_for() -> int:
    line = Path("/proc/self/io").read_text().splitlines()[0]
    return int(line.removeprefix("rchar:"))


def batches(order: Any, first: int, samples: int, size: int = 64) -> Iterator[list[int]]:
    for place in range(first, first + samples, size):
        yield [order[place + position] for position in range(min(size, first + samples - place))]


def cost(dataset: Any, order: Any, first: int, samples: int) -> tuple[float, float]:
    """Return bytes and seconds per sample, stacking included."""
    wanted = list(batches(order, first, samples))  # the order is not what is measured
    before, started = bytes_asked_for(), time.perf_counter()
    for indices in wanted:
        torch.utils.data.default_collate(dataset.__getitems__(indices))
    seconds = time.perf_counter() - started
    return (bytes_asked_for() - before) / samples, seconds / samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="Scratch folder; emptied; 3.3 MB a tile.")
    parser.add_argument("--slides", type=int, default=8)
    parser.add_argument("--tiles", type=int, default=64, help="Per slide.")
    parser.add_argument("--window", type=int, default=128, help="Tiles in a window of the published layout.")
    parser.add_argument("--rounds", type=int, default=4, help="Each is a quarter of an epoch.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.work / "published-reads"
    shutil.rmtree(folder, ignore_errors=True)
    make(folder, arguments.slides, arguments.tiles)
    same_numbers(folder)
    for path in (*folder.rglob("*.npy"), *folder.rglob("*.tar")):
        path.read_bytes()
    sides = sides_in(folder, arguments.window)
    samples = arguments.slides * arguments.tiles * FIELDS // 4
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name, (dataset, order) in sides.items():
            figures[name].append(cost(dataset, order, number * samples, samples))
    shutil.rmtree(folder)

    base_bytes, base_seconds = (
        statistics.median(column) for column in zip(*figures[next(iter(sides))], strict=True)
    )
    tiles = arguments.slides * arguments.tiles
    print(f"{tiles} tiles, {arguments.rounds} rounds of {samples} fields of 256 px, one process")
    print(f"{'':32s} {'KiB a field':>12s} {'us a field':>11s} {'bytes':>7s} {'time':>7s}")
    for name, values in figures.items():
        num_bytes, seconds = (statistics.median(column) for column in zip(*values, strict=True))
        print(
            f"{name:32s} {num_bytes / 1024:12.1f} {seconds * 1e6:11.1f} "
            f"{base_bytes / num_bytes:6.1f}x {base_seconds / seconds:6.1f}x"
        )


if __name__ == "__main__":
    main()
