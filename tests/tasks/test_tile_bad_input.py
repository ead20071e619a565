"""A bad slide fails alone, with its reason; what was done stays done."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pixcell.data.store import TileStore
from pixcell.data.tiling import TilingConfig, TilingRecipe
from pixcell.errors import OutputError, SlideError, SomeFailed, UnreadableSlide
from pixcell.tasks.tile import tile_slides

RECIPE = TilingRecipe(name="test", tiling=TilingConfig(tile_size=256))


def failures_of(folder: Path, store: Path, recipe: TilingRecipe = RECIPE, workers: int = 1) -> dict[str, str]:
    """Tile, expect failures, and return their reasons as the CSV lists them."""
    with pytest.raises(SomeFailed) as caught:
        tile_slides(folder, store, recipe, workers=workers)
    assert caught.value.exit_code == 1
    with (store / "reports" / "tiling-failures.csv").open(encoding="utf-8") as file:
        listed = {line["slide"]: line["reason"] for line in csv.DictReader(file)}
    assert listed == dict(caught.value.failures)
    return listed


def with_corrupt_middle(source: Path, target: Path) -> tuple[int, int]:
    """Copy a slide and wreck one JPEG segment of level 0 inside the tissue; return its place (x, y)."""
    shutil.copy(source, target)
    with tifffile.TiffFile(target) as file:
        page = file.pages[0]
        across = -(-page.imagewidth // page.tilewidth)
        down = -(-page.imagelength // page.tilelength)
        index = (down // 2) * across + across // 2
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        place = (index % across * page.tilewidth, index // across * page.tilelength)
    with target.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * count)
    return place


def test_bad_slides_are_listed_and_the_good_one_is_done(drawn_slide, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copy(drawn_slide.path, folder / "good.tiff")
    (folder / "empty.svs").touch()
    (folder / "text.svs").write_text("These are not pixels.\n" * 20)
    content = Path(drawn_slide.path).read_bytes()
    (folder / "truncated.tiff").write_bytes(content[: len(content) // 3])
    Image.new("RGB", (600, 600), (180, 120, 150)).save(folder / "no-mpp.png")
    glass = np.full((1024, 1024, 3), 243, np.uint8)
    tifffile.imwrite(
        folder / "no-tissue.tiff", glass, tile=(256, 256), photometric="rgb",
        resolution=(20000, 20000), resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip

    listed = failures_of(folder, tmp_path / "store")
    assert sorted(listed) == ["empty", "no-mpp", "no-tissue", "text", "truncated"]
    assert "empty (0 bytes)" in listed["empty"]
    assert "--source-mpp" in listed["no-mpp"]
    assert "gave no tile" in listed["no-tissue"]
    assert "cannot be read" in listed["text"]
    assert "cannot be read" in listed["truncated"]
    store = TileStore.open(tmp_path / "store")
    assert store.slide_ids() == ["good"]
    assert store.verify() == []
    assert (tmp_path / "store" / "qc" / "no-tissue.jpg").is_file()  # so that one can see why

    for path in folder.iterdir():
        if path.stem != "good":
            path.unlink()
    tile_slides(folder, tmp_path / "store", RECIPE, workers=1)
    assert not (tmp_path / "store" / "reports" / "tiling-failures.csv").exists()


def test_a_corrupt_tile_in_the_middle_fails_the_slide_and_names_the_place(drawn_slide, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    with_corrupt_middle(drawn_slide.path, folder / "hurt.tiff")
    listed = failures_of(folder, tmp_path / "store")
    assert "cannot be decoded" in listed["hurt"]
    assert "x 1024, y 1024" in listed["hurt"]
    assert "tiling.on_unreadable=drop" in listed["hurt"]
    assert TileStore.open(tmp_path / "store").slide_ids() == []


def test_a_corrupt_tile_is_left_out_and_listed_on_request(drawn_slide, tmp_path):
    x, y = with_corrupt_middle(drawn_slide.path, tmp_path / "hurt.tiff")
    recipe = RECIPE.with_changes(tiling=RECIPE.tiling.with_changes(on_unreadable="drop"))
    whole = tile_slides(drawn_slide.path, tmp_path / "whole", recipe, workers=1)
    hurt = tile_slides(tmp_path / "hurt.tiff", tmp_path / "store", recipe, workers=2)
    lost = hurt.slides[0].counts["unreadable"]
    assert lost >= 1
    assert hurt.num_tiles == whole.num_tiles - lost
    assert f"left out x={x}, y={y}" in hurt.slides[0].reason
    # The neighbours are the same tiles as those of the sound slide.
    sound, kept = (TileStore.open(tmp_path / name) for name in ("whole", "store"))
    images = {(tile["x"], tile["y"]): i for i, tile in enumerate(sound.images("drawn").tiles)}
    for i, tile in enumerate(kept.images("hurt").tiles):
        assert kept.images("hurt").jpeg(i) == sound.images("drawn").jpeg(images[tile["x"], tile["y"]])


@pytest.mark.parametrize("ready_made", [False, True])
@pytest.mark.parametrize("mpp", [0, -0.5, float("nan"), float("inf")])
def test_a_resolution_that_is_no_length_stops_before_it_starts(drawn_slide, tmp_path, mpp, ready_made):
    with pytest.raises(SlideError, match="no positive number"):
        tile_slides(drawn_slide, tmp_path / "store", RECIPE, source_mpp=mpp, ready_made=ready_made)
    assert not (tmp_path / "store").exists()


def test_a_folder_without_slides_says_so(tmp_path):
    (tmp_path / "slides").mkdir()
    with pytest.raises(UnreadableSlide, match="no slide or image"):
        tile_slides(tmp_path / "slides", tmp_path / "store", RECIPE, workers=1)


def test_a_file_where_the_store_should_be_is_refused(drawn_slide, tmp_path):
    (tmp_path / "store").write_text("mine")
    with pytest.raises(OutputError, match="folder"):
        tile_slides(drawn_slide.path, tmp_path / "store", RECIPE, workers=1)
    assert (tmp_path / "store").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 900 KiB; skips where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(place)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip() or 'no permission'}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command on this system")
def test_a_full_disk_is_one_clear_error_and_loses_no_finished_slide(small_disk, drawn_slide, tmp_path):
    with Image.open(drawn_slide.path) as image:
        image.crop((800, 800, 1100, 1100)).save(tmp_path / "small.png")
    tile_slides(tmp_path / "small.png", small_disk / "store", RECIPE, source_mpp=0.5, workers=1)
    finished = TileStore.open(small_disk / "store").images("small").jpeg(0)
    with pytest.raises(OutputError, match="the disk is full; free some space"):
        tile_slides(drawn_slide.path, small_disk / "store", RECIPE, workers=1)
    store = TileStore.open(small_disk / "store")
    assert store.slide_ids() == ["small"]
    assert store.images("small").jpeg(0) == finished
    assert not list((small_disk / "store" / "images").glob("*.tmp-*"))


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount command on this system")
def test_a_read_only_place_is_one_clear_error(small_disk, drawn_slide):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="read-only"):
        tile_slides(drawn_slide.path, small_disk / "store", RECIPE, workers=1)


_RUN = """
import sys
from pathlib import Path
from pixcell.data.tiling import TilingConfig, TilingRecipe
from pixcell.tasks.tile import tile_slides
if __name__ == "__main__":
    recipe = TilingRecipe(name="test", tiling=TilingConfig(tile_size=256, stride=64))
    tile_slides(Path(sys.argv[1]), Path(sys.argv[2]), recipe, workers=1)
"""


def test_killed_in_the_middle_and_run_again_the_store_is_the_same_byte_for_byte(drawn_slide, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    shutil.copy(drawn_slide.path, folder / "a.tiff")
    with Image.open(drawn_slide.path) as image:
        image.crop((300, 300, 1500, 1300)).save(folder / "b.png", dpi=(50800, 50800))  # 0.5 mpp
    command = [sys.executable, "-c", _RUN, str(folder)]
    store = tmp_path / "killed"
    process = subprocess.Popen([*command, str(store)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    # In the middle: a shard is being written, under its temporary name.
    while not list(store.glob("images/*.tmp-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(store.glob("images/*.tmp-*")), "it was not killed in the middle"
    assert not list(store.glob("images/*.h5"))

    subprocess.run([*command, str(store)], check=True, stderr=subprocess.DEVNULL)
    subprocess.run([*command, str(tmp_path / "calm")], check=True, stderr=subprocess.DEVNULL)
    for path in (tmp_path / "calm").rglob("*"):
        if path.is_file():
            assert (store / path.relative_to(tmp_path / "calm")).read_bytes() == path.read_bytes(), path.name
    assert TileStore.open(store).slide_ids() == ["a", "b"]
