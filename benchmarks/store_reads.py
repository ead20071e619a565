"""Random 256-pixel fields for training: the tile store against one pair of .npy files per tile.

Two loader workers read random fields (posterior mean and std, and the embedding) from the same tiles, stored

- in the tile store, through ``FieldDataset``: field-major records in one file per slide;
- in the published layout, through a plain dataset: ``np.load`` of the tile's ``(32, 128, 128)`` and
  ``(16, 1536)`` files, then the cut of one field, as the published training code does.

Both sides return the same values (checked), go through the same loader settings, and read through the page
cache: each is read once in full before it is timed, so that the disk plays no part. Runs are interleaved;
figures are medians. Memory is the largest proportional set size of a worker (shared pages count once). Large
stores are sparse files (the arrays are holes), which read as zeros through the same page cache.

    python benchmarks/store_reads.py --work /tmp/store-reads
"""

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from pixcell.data.columns import sidecar_of
from pixcell.data.datasets import FieldDataset
from pixcell.data.store import TileStore
from pixcell.data.tiling import Tile

LATENTS, EMBEDDINGS = "latents-sd35", "embeddings-uni2h"
SHAPES = {LATENTS: (4, 4, 32, 32, 32), EMBEDDINGS: (4, 4, 1536)}
SMALLEST_JPEG = b"\xff\xd8\xff\xda\xff\xd9"  # a beginning, a scan, an end: all that a shard asks of one


class OneFilePerTile(Dataset[dict[str, Any]]):
    """The published layout: whole files are loaded, and one field of them is cut out."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return 16 * len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tile, field = divmod(index, 16)
        row, column = divmod(field, 4)
        name = self.names[tile]
        latents = torch.from_numpy(np.load(self.folder / f"{name}_sd3_vae.npy"))
        embeddings = torch.from_numpy(np.load(self.folder / f"{name}_uni.npy"))
        mean, std = latents.chunk(2)
        rows, columns = slice(32 * row, 32 * row + 32), slice(32 * column, 32 * column + 32)
        return {
            "key": name,
            "posterior_mean": mean[:, rows, columns],
            "posterior_std": std[:, rows, columns],
            "embedding_grid": embeddings.reshape(4, 4, -1)[row : row + 1, column : column + 1],
        }


def make(folder: Path, num_tiles: int, tiles_per_slide: int, sparse: bool) -> None:
    """Write the same tiles in both layouts; ``sparse`` leaves the arrays as holes full of zeros."""
    store = TileStore.create(folder / "store", {"tile_size": 1024, "mpp": 0.5})
    files = folder / "files"
    random = np.random.default_rng(0)
    names = []
    for number in range(num_tiles // tiles_per_slide):
        slide_id = f"slide-{number:05d}"
        tiles = [Tile(slide_id, 1024 * i, 0, 1024, 0.5, 1.0, 0.0, 1.0) for i in range(tiles_per_slide)]
        store.write_images(slide_id, [(tile, SMALLEST_JPEG) for tile in tiles], {"fingerprint": slide_id})
        (files / slide_id).mkdir(parents=True)
        names += [f"{slide_id}/{i}_0" for i in range(tiles_per_slide)]
        if sparse:
            _write_holes(store, files, slide_id, tiles_per_slide)
        else:
            _write_numbers(store, files, slide_id, tiles_per_slide, random)
    (folder / "names.json").write_text(json.dumps(names))


def _write_numbers(
    store: TileStore, files: Path, slide_id: str, count: int, random: np.random.Generator
) -> None:
    for column, shape in SHAPES.items():
        array = random.integers(0, 1 << 14, (count, *shape), np.uint16).view(np.float16)
        facts = {"made_by": _made_by(column), "num_tiles": count, "dtype": np.float16, "shape": shape}
        store.write_column(column, slide_id, [array], **facts)
        for row, record in enumerate(array):
            if column == LATENTS:
                np.save(
                    files / slide_id / f"{row}_0_sd3_vae.npy",
                    record.transpose(2, 0, 3, 1, 4).reshape(32, 128, 128),
                )
            else:
                np.save(files / slide_id / f"{row}_0_uni.npy", record.reshape(16, 1536))


def _write_holes(store: TileStore, files: Path, slide_id: str, count: int) -> None:
    """Give files their names, sizes, headers and descriptions; the zeros between are never written."""
    for column, shape in SHAPES.items():
        shard = store.shard_path(column, slide_id)
        shard.parent.mkdir(exist_ok=True)
        _hole(shard, (count, *shape), b"\nsha256:" + b"0" * 64 + b"\n")
        facts = {
            "format": "pixcell-column-1",
            "made_by": _made_by(column),
            "shape": shape,
            "dtype": "float16",
            "num_tiles": count,
            "images_sha256": store.images(slide_id).checksum,
        }
        sidecar_of(shard).write_text(json.dumps(facts))
    for row in range(count):
        _hole(files / slide_id / f"{row}_0_sd3_vae.npy", (32, 128, 128), b"")
        _hole(files / slide_id / f"{row}_0_uni.npy", (16, 1536), b"")


def _hole(path: Path, shape: tuple[int, ...], end: bytes) -> None:
    with path.open("wb") as file:
        facts = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, facts)
        file.truncate(file.tell() + 2 * math.prod(shape))
        file.seek(0, os.SEEK_END)
        file.write(end)


def _made_by(column: str) -> dict[str, Any]:
    return {"kind": column.split("-")[0], "field_size": 256, "source": "images"}


def datasets_in(folder: Path) -> dict[str, Dataset[dict[str, Any]]]:
    names = json.loads((folder / "names.json").read_text())
    store = TileStore.open(folder / "store")
    return {
        "one .npy pair per tile": OneFilePerTile(folder / "files", names),
        "tile store": FieldDataset(store, size=256, latents=LATENTS, embeddings=EMBEDDINGS),
    }


def same_values(first: Dataset[Any], second: Dataset[Any], count: int = 64) -> None:
    """Both layouts must give the same field for the same index, or the comparison means nothing."""
    for index in np.random.default_rng(1).integers(0, len(first), count).tolist():  # type: ignore[arg-type]
        left, right = first[index], second[index]
        for key in ("posterior_mean", "posterior_std", "embedding_grid"):
            if not torch.equal(left[key].view(torch.int16), right[key].view(torch.int16)):
                raise AssertionError(f"{key} of field {index} differs between the layouts")


@contextlib.contextmanager
def running(dataset: Any, samples: int, batch_size: int, workers: int) -> Iterator[Any]:
    """Give an iterator over random batches whose workers have started."""
    sampler = RandomSampler(
        dataset, replacement=True, num_samples=samples, generator=torch.Generator().manual_seed(0)
    )
    loader = DataLoader(
        dataset, batch_size=batch_size, sampler=sampler, num_workers=workers, prefetch_factor=4
    )
    holder = [iter(loader)]
    next(holder[0])
    yield holder.pop()


def speed(dataset: Dataset[Any], samples: int, batch_size: int, workers: int) -> tuple[float, float]:
    """Return fields per second, and processor microseconds per field in the workers."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with running(dataset, samples, batch_size, workers) as batches:
        for _ in range(8):
            next(batches)
        started, count = time.perf_counter(), 0
        for batch in batches:
            count += len(batch["posterior_mean"])
        rate = count / (time.perf_counter() - started)
        del batches  # the workers end, and their time is counted
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return rate, busy / samples * 1e6


def worker_memory(dataset: Dataset[Any], samples: int, batch_size: int, workers: int) -> float:
    """Return the largest proportional set size that a worker reached, in MiB."""
    largest = 0
    with running(dataset, samples, batch_size, workers) as batches:
        for number, _ in enumerate(batches):
            if number % 20 == 0:
                sizes = [child.memory_full_info().pss for child in psutil.Process().children(recursive=True)]
                largest = max([largest, *sizes])
    return largest / 2**20


def _print_ratio(what: str, above: list[float], below: list[float]) -> None:
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    print(
        f"  ratio of {what}: median {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="Scratch folder; about 2.5 GB; emptied.")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--tiles", type=int, default=1000, help="Tiles with real content, for speed.")
    parser.add_argument("--sparse", type=int, nargs="*", default=[1000, 20000], help="Tiles, for memory.")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch_size, workers = arguments.batch_size, arguments.workers

    folder = arguments.work / "real"
    shutil.rmtree(folder, ignore_errors=True)
    make(folder, arguments.tiles, tiles_per_slide=250, sparse=False)
    datasets = datasets_in(folder)
    slow_one, fast_one = datasets.values()
    same_values(slow_one, fast_one)
    for path in folder.rglob("*.npy"):
        path.read_bytes()
    rates: dict[str, list[float]] = {name: [] for name in datasets}
    costs: dict[str, list[float]] = {name: [] for name in datasets}
    for _ in range(arguments.runs):
        for name, dataset in datasets.items():
            samples = 4000 if name != "tile store" else 24000
            rate, cost = speed(dataset, samples, batch_size, workers)
            rates[name].append(rate)
            costs[name].append(cost)
    print(f"{arguments.tiles} tiles, {workers} workers, batches of {batch_size}, {arguments.runs} runs")
    for name, values in rates.items():
        print(
            f"  {name:24s} median {statistics.median(values):8.0f}  ({min(values):.0f} to {max(values):.0f})"
        )
    slow, fast = rates.values()
    _print_ratio("fields/s", fast, slow)
    slow, fast = costs.values()
    print(f"  worker processor us per field: {statistics.median(slow):.0f}, {statistics.median(fast):.0f}")
    _print_ratio("processor time per field", slow, fast)
    shutil.rmtree(folder)

    for count in arguments.sparse:
        folder = arguments.work / f"sparse-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, count, tiles_per_slide=100, sparse=True)
        for name, dataset in datasets_in(folder).items():
            memory = worker_memory(dataset, 8000, batch_size, workers)
            print(f"  {count:6d} tiles, {name:24s} largest worker {memory:7.1f} MiB")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
