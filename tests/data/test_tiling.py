"""Tiles lie on a grid, inside the slide, and every place of it is accounted for."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixcell.data.qc import draw_overlay
from pixcell.data.slides import Slide
from pixcell.data.tiling import SlideCutter, TilingConfig, TilingRecipe, check_enlargement, tile_grid
from pixcell.errors import RecipeError, SlideError, UnknownResolution
from pixcell.geometry import Box

SMALL = TilingConfig(tile_size=256)


@pytest.mark.parametrize("mpp", [0.25, 0.2271, 0.499, 0.5, 0.55])
@pytest.mark.parametrize("stride", [None, 128, 200])
def test_tiles_lie_inside_and_one_step_apart(mpp, stride):
    config = TilingConfig(tile_size=256, stride=stride)
    area = Box(37, 11, 3001, 2027)
    boxes = tile_grid(area, mpp, config)
    step = config.step * 0.5 / mpp
    for box in boxes:
        assert Box(area.x - 1, area.y - 1, area.width + 2, area.height + 2).contains(box)
    columns = sorted({box.x for box in boxes})
    assert np.abs(np.diff(columns) - step).max() <= max(1, 0.01 * step)
    assert len(boxes) == len(columns) * len({box.y for box in boxes})
    # No further column or row would have fitted, and what is left over is the same on both sides.
    assert area.width - (columns[-1] + boxes[0].width - columns[0]) < step + 1
    assert abs((columns[0] - area.x) - (area.right - columns[-1] - boxes[0].width)) <= 2


def test_an_area_of_exactly_one_tile_gives_one_tile():
    assert tile_grid(Box(0, 0, 256, 256), 0.5, SMALL) == [Box(0, 0, 256, 256)]
    assert tile_grid(Box(0, 0, 254, 256), 0.5, SMALL) == []


def test_a_slide_too_coarse_for_the_tiles_is_refused_with_the_way_out():
    with pytest.raises(SlideError, match=r"enlarge it 16 times.*--set tiling\.mpp=8"):
        check_enlargement(8.0, TilingConfig(), "prostate.tiff")
    check_enlargement(0.55, TilingConfig(), "fine.svs")


def test_a_stride_that_leaves_gaps_is_refused():
    from pixcell.config import parse_recipe

    with pytest.raises(RecipeError, match="stride 300 is larger than tile_size 256"):
        parse_recipe(TilingRecipe, {"name": "x", "tiling": {"tile_size": 256, "stride": 300}})
    with pytest.raises(RecipeError, match="multiple of 128"):
        parse_recipe(TilingRecipe, {"name": "x"}, ["tiling.tile_size=1000"])


@pytest.mark.parametrize("name", ["tiles-20x", "tiles-256"])
def test_the_recipes_of_the_package_say_what_the_defaults_say(name):
    """A recipe is complete, and nobody is surprised by what it leaves out."""
    from pixcell.config import load_recipe

    tiling = load_recipe(TilingRecipe, name).tiling
    assert tiling == TilingConfig(tile_size=1024 if name == "tiles-20x" else 256)


def test_one_thread_or_many_cut_the_same_tiles_in_the_same_order(drawn_slide):
    with SlideCutter(drawn_slide.path, "a", SMALL, threads=1) as one:
        expected = list(one)
    with SlideCutter(drawn_slide.path, "a", SMALL, threads=5) as many:
        assert list(many) == expected
    assert len(expected) == one.counts["kept"] > 8
    assert one.candidates == many.candidates


def test_a_tile_shows_what_the_slide_shows_there(drawn_slide):
    config = SMALL.with_changes(jpeg_quality=100)
    with SlideCutter(drawn_slide.path, "a", config) as cutter, Slide.open(drawn_slide.path) as slide:
        for tile, jpeg in list(cutter)[::5]:
            stored = np.asarray(Image.open(io.BytesIO(jpeg))).astype(int)
            there = slide.read(Box(tile.x, tile.y, 256, 256)).astype(int)
            # Quality 100 still rounds YCbCr: a few grey levels.
            assert np.abs(stored - there).max() <= 6


def test_a_tile_at_half_the_resolution_covers_twice_the_side(drawn_slide):
    config = SMALL.with_changes(mpp=1.0)
    with SlideCutter(drawn_slide.path, "a", config) as cutter:
        tiles = list(cutter)
        assert cutter.candidates[0].box.width == 512
    assert np.asarray(Image.open(io.BytesIO(tiles[0][1]))).shape == (256, 256, 3)
    assert tiles[0][0].size == 256
    assert tiles[0][0].mpp == 1.0


def test_every_candidate_has_one_fate_and_the_kept_ones_hold_tissue(drawn_slide):
    with SlideCutter(drawn_slide.path, "a", SMALL) as cutter:
        tiles = [tile for tile, _ in cutter]
        assert sum(cutter.counts.values()) == len(cutter.candidates) == 64
        assert min(tile.tissue for tile in tiles) >= SMALL.min_tissue
        assert min(tile.sharpness for tile in tiles) >= SMALL.min_sharpness
        assert cutter.counts["glass"] > 0


def test_the_tissue_found_is_the_tissue_drawn(drawn_slide):
    with SlideCutter(drawn_slide.path, "a", SMALL) as cutter:
        found = cutter.tissue_map.tissue
    truth = np.asarray(
        Image.fromarray(drawn_slide.tissue).resize(found.shape[::-1], Image.Resampling.NEAREST)
    )
    assert (found & truth).sum() / (found | truth).sum() > 0.75


def test_blurred_tiles_are_dropped_and_counted(drawn_slide):
    with SlideCutter(drawn_slide.path, "a", SMALL.with_changes(min_sharpness=100)) as cutter:
        wanted = cutter.counts["kept"]
        assert list(cutter) == []
        assert cutter.counts["blurred"] == wanted > 0
        assert "blurred" in str(cutter.no_tissue())


def test_a_slide_smaller_than_a_tile_names_the_size_it_needs(tmp_path):
    Image.fromarray(np.full((200, 300, 3), 180, np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(SlideError, match=r"300 x 200 pixels.*needs 1024"):
        SlideCutter(tmp_path / "small.png", "small", TilingConfig(), source_mpp=0.5)
    with pytest.raises(UnknownResolution, match="--source-mpp"):
        SlideCutter(tmp_path / "small.png", "small", TilingConfig())


def test_the_overlay_shows_thumbnail_mask_and_tiles_side_by_side(drawn_slide):
    with SlideCutter(drawn_slide.path, "a", SMALL) as cutter:
        list(cutter)
        scale = cutter.slide.width / cutter.thumbnail.shape[1]
        picture = np.asarray(
            draw_overlay(cutter.thumbnail, cutter.tissue_map, cutter.candidates, scale, "Фибро ma 1")
        )
        kept = next(each for each in cutter.candidates if each.verdict == "kept")
    panel, left, top = 900, 12, 56
    ratio = panel / cutter.slide.width
    x, y = round((kept.box.x + 128) * ratio), round((kept.box.y + 128) * ratio)
    first, second, third = (
        picture[top + y, left + x + column * (panel + left)].astype(int) for column in range(3)
    )
    for shown in (second, third):  # both tints are green: less red than the plain thumbnail
        assert shown[0] < first[0]
    corner = picture[top + 2, left + 2 : left + 2 + (panel + left) + 1 : panel + left]
    assert (np.ptp(corner.astype(int), axis=0) <= 2).all()  # bare glass is shown as it is


def test_memory_does_not_hold_the_tiles(drawn_slide):
    """Few tiles are in flight: a reader that stops early has caused little work."""
    with SlideCutter(drawn_slide.path, "a", SMALL, threads=2) as cutter:
        reads: list[Box] = []
        read = cutter.slide.read

        def counted(box: Box, *args: object, **options: object) -> np.ndarray:
            reads.append(box)
            return read(box, *args, **options)  # type: ignore[arg-type]

        cutter.slide.read = counted  # type: ignore[method-assign]
        tiles = iter(cutter)
        next(tiles)
        tiles.close()  # type: ignore[attr-defined]
        assert len(reads) <= 4 * 8 < 64


def test_paths_do_not_enter_the_facts(drawn_slide, tmp_path):
    import shutil

    moved = tmp_path / "elsewhere" / drawn_slide.path.name
    moved.parent.mkdir()
    shutil.copy(drawn_slide.path, moved)
    facts = []
    for path in (Path(drawn_slide.path), moved):
        with SlideCutter(path, "a", SMALL) as cutter:
            list(cutter)
            facts.append(cutter.facts)
    assert facts[0] == facts[1]
