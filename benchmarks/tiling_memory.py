"""Peak memory of tiling does not grow with the slide: one area, and eight times that.

    python benchmarks/tiling_memory.py

Each size is tiled in a process of its own; its peak resident memory is what the kernel counted.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage

from pixcell.data.store import TileStore
from pixcell.data.tiling import TilingRecipe
from pixcell.tasks.tile import tile_slides

BLOCK = 1024


def draw(path: Path, across: int, down: int) -> None:
    """Write a slide of stained texture in blocks; drawing real tissue of this size would take minutes."""
    rng = np.random.default_rng(0)
    nuclei = ndimage.gaussian_filter((rng.random((BLOCK, BLOCK)) < 0.003).astype(np.float32), 3) > 0.008
    tissue = np.where(nuclei[..., None], (90, 60, 130), (210, 150, 190)).astype(np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for factor in (1, 4, 16):
            small = np.ascontiguousarray(tissue[::factor, ::factor])
            side = small.shape[0]

            tile = max(16, min(256, side))

            def tiles(small: np.ndarray = small, side: int = side, tile: int = tile) -> object:
                for row in range(down * side // tile):
                    for column in range(across * side // tile):
                        y, x = row * tile % side, column * tile % side
                        yield small[y : y + tile, x : x + tile]

            file.write(
                tiles(), shape=(down * side, across * side, 3), dtype=np.uint8, tile=(tile, tile),
                photometric="rgb", compression="jpeg", resolution=(20000 / factor, 20000 / factor),
                resolutionunit="CENTIMETER", metadata=None, subfiletype=int(factor > 1),
            )  # fmt: skip


def tile_once(slide: Path, store: Path, workers: int) -> None:
    tile_slides(slide, store, TilingRecipe(name="memory"), workers=workers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    print(f"{TileStore.open(store).num_tiles} {peak:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--side", type=int, default=8, help="side of the small slide, in tiles of 1024 px")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--once", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        tile_once(*options.once, options.workers)
        return
    print("| slide | tiles | peak resident memory |\n|---|---|---|")
    peaks = []
    with tempfile.TemporaryDirectory() as name:
        for across, down in ((options.side, options.side), (4 * options.side, 2 * options.side)):
            slide = Path(name) / f"{across}.tiff"
            draw(slide, across, down)
            command = [
                sys.executable,
                __file__,
                "--workers",
                str(options.workers),
                "--once",
                str(slide),
                f"{name}/{across}",
            ]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            peaks.append(float(answer[1]))
            print(f"| {across * BLOCK} x {down * BLOCK} px | {answer[0]} | {peaks[-1]:.0f} MiB |", flush=True)
    print(f"\nEight times the area: {peaks[1] / peaks[0]:.2f} times the memory.")


if __name__ == "__main__":
    main()
