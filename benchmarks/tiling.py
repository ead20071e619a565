"""Tiling with both cores, against the loop that everybody writes first.

    python benchmarks/tiling.py --real ../shared/data/wsi --repeats 5

Baselines read the very tiles that `tile_slides` keeps (their list is given to them for free: no thumbnail,
mask, sharpness, checksums or overlays) with OpenSlide's `read_region`, resample with PIL where needed, and
save JPEGs of the same quality and subsampling with PIL:

    (a) in one process      (b) the tiles halved between two processes

Repetitions are interleaved, so that a machine whose speed drifts treats all alike; medians are reported.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image

from pixcell.config import load_recipe
from pixcell.data.drawn import draw_slide
from pixcell.data.slides import Slide, find_slides
from pixcell.data.store import TileStore
from pixcell.data.tiling import TilingConfig, TilingRecipe
from pixcell.geometry import Box, scale_between
from pixcell.tasks.tile import tile_slides

Place = tuple[Path, int, int, int, Path]  # slide, x, y, level-0 side, output file


def save_tiles(job: tuple[list[Place], TilingConfig]) -> int:
    places, config = job
    subsampling = {"444": 0, "422": 1, "420": 2}[config.jpeg_subsampling]
    handles: dict[Path, openslide.OpenSlide] = {}
    for path, x, y, side, target in places:
        if path not in handles:
            handles[path] = openslide.OpenSlide(path)
        slide = handles[path]
        level = slide.get_best_level_for_downsample(side / config.tile_size)
        width = round(side / slide.level_downsamples[level])
        image = slide.read_region((x, y), level, (width, width)).convert("RGB")
        if width != config.tile_size:
            image = image.resize((config.tile_size, config.tile_size), Image.Resampling.BICUBIC)
        image.save(target, quality=config.jpeg_quality, subsampling=subsampling)
    return len(places)


def one_process(places: list[Place], config: TilingConfig) -> None:
    save_tiles((places, config))


def two_processes(places: list[Place], config: TilingConfig) -> None:
    half = len(places) // 2
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(save_tiles, [(places[:half], config), (places[half:], config)])


def enlarged(path: Path, target: Path, across: int, down: int) -> None:
    """Write a slide that repeats the middle of a real one: real pixels, and the size of a real slide."""
    with Slide.open(path) as slide:
        width, height = slide.bounds.width // 2048 * 2048, slide.bounds.height // 2048 * 2048
        left, top = (slide.width - width) // 2, (slide.height - height) // 2
        pixels, mpp = slide.read(Box(left, top, width, height)), slide.mpp
    with tifffile.TiffWriter(target, bigtiff=True) as file:
        for factor in (1, 2, 4, 8):
            small = np.asarray(Image.fromarray(pixels).reduce(factor))
            rows, columns = small.shape[0] // 256, small.shape[1] // 256
            tiles = (
                small[row % rows * 256 :, column % columns * 256 :][:256, :256]
                for row in range(rows * down)
                for column in range(columns * across)
            )
            density = 1e4 / (mpp * factor)
            file.write(
                tiles, shape=(rows * down * 256, columns * across * 256, 3), dtype=np.uint8, tile=(256, 256),
                photometric="rgb", compression="jpeg", compressionargs={"level": 80},
                resolution=(density, density), resolutionunit="CENTIMETER", metadata=None,
                subfiletype=int(factor > 1),
            )  # fmt: skip


def places_of(store: Path, slides: list[Path], config: TilingConfig, out: Path) -> list[Place]:
    places: list[Place] = []
    tiles = TileStore.open(store)
    for path in slides:
        with Slide.open(path) as slide, tiles.images(path.stem) as shard:
            side = round(config.tile_size * scale_between(slide.mpp, config.mpp))
            places += [
                (path, tile["x"], tile["y"], side, out / f"{path.stem}_{tile['x']}_{tile['y']}.jpg")
                for tile in shard.tiles
            ]
    return places


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock and processor seconds, those of child processes included."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    function()
    return time.perf_counter() - start, sum(os.times()[:4]) - before


def compare(name: str, folder: Path, recipe: TilingRecipe, repeats: int, scratch: Path) -> None:
    slides, store, out = find_slides(folder), scratch / "store", scratch / "files"
    tile_slides(folder, store, recipe, workers=2)
    out.mkdir(exist_ok=True)
    places = places_of(store, slides, recipe.tiling, out)
    times: dict[str, list[tuple[float, float]]] = {"pixcell": [], "one": [], "two": []}
    for _ in range(repeats):
        shutil.rmtree(store)
        times["pixcell"].append(timed(lambda: tile_slides(folder, store, recipe, workers=2)))
        times["one"].append(timed(lambda: one_process(places, recipe.tiling)))
        times["two"].append(timed(lambda: two_processes(places, recipe.tiling)))
    wall, cpu = (
        [statistics.median(run[which] for run in times[key]) for key in ("pixcell", "one", "two")]
        for which in (0, 1)
    )
    cells = [f"{seconds:.2f} ({busy:.2f})" for seconds, busy in zip(wall, cpu, strict=True)]
    ratios = [f"{wall[1] / wall[0]:.2f}", f"{wall[2] / wall[0]:.2f}", f"{cpu[1] / cpu[0]:.2f}"]
    tiles = f"{len(places)} x {recipe.tiling.tile_size} px"
    print("| " + " | ".join([name, str(len(slides)), tiles, *cells, *ratios]) + " |", flush=True)
    shutil.rmtree(store)
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--real", type=Path, help="folder of real slides with CMU-1-Small-Region.svs and others"
    )
    parser.add_argument("--side", type=int, default=16384, help="side of the drawn slides; 0: none")
    parser.add_argument("--copies", type=int, default=2, help="how often each slide is there")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    large, small = load_recipe(TilingRecipe, "tiles-20x"), load_recipe(TilingRecipe, "tiles-256")
    print("Seconds of the clock (of the processor); ratios above 1 mean that pixcell is faster.\n")
    print(
        "| slides | files | tiles | pixcell | (a) one | (b) two | a / ours | b / ours | a / ours, processor |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        drawn, single, real = (scratch / kind for kind in ("drawn", "single", "real"))
        for folder in (drawn, single, real):
            folder.mkdir()
        if options.real:
            enlarged(options.real / "CMU-1-Small-Region.svs", real / "cmu.tiff", 8, 8)
            enlarged(options.real / "brecahad_fields_montage_pyramid.tiff", real / "brecahad.tiff", 4, 6)
            shutil.copy(real / "cmu.tiff", single)
            _copy_all(real, options.copies)
            compare("real pixels", real, large, options.repeats, scratch)
            compare("one slide of real pixels", single, large, options.repeats, scratch)
            compare("one slide of real pixels", single, small, options.repeats, scratch)
        if options.side:
            for seed, mpp in ((1, 0.5), (2, 0.25)):
                draw_slide(drawn / f"{seed}.tiff", options.side, options.side, mpp, seed)
            _copy_all(drawn, options.copies)
            compare("drawn, 0.5 and 0.25 mpp", drawn, large, options.repeats, scratch)


def _copy_all(folder: Path, copies: int) -> None:
    for path in list(folder.iterdir()):
        for copy in range(1, copies):
            shutil.copy(path, path.with_stem(f"{path.stem}-{copy}"))


if __name__ == "__main__":
    main()
