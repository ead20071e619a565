"""Drawn slides stand in for real ones: they open everywhere, and their truth is known."""

import numpy as np
import openslide
import pytest

from pixcell.data.drawn import Square, draw_slide, draw_tissue
from pixcell.data.slides import Slide
from pixcell.errors import OutputError
from pixcell.geometry import Box


def test_openslide_reads_its_size_levels_and_resolution(drawn_slide):
    with openslide.OpenSlide(str(drawn_slide.path)) as slide:
        assert slide.dimensions == (2048, 2048)
        assert slide.level_downsamples == (1.0, 2.0, 4.0)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)


def test_it_has_the_colours_of_haematoxylin_and_eosin(drawn_slide):
    """Tissue is pink to purple: red and blue above green; glass is nearly white; nuclei are the darkest."""
    with Slide.open(drawn_slide.path) as slide:
        seen = slide.read(Box(0, 0, slide.width, slide.height), size=drawn_slide.tissue.shape).astype(float)
    tissue, glass = seen[drawn_slide.tissue], seen[~drawn_slide.tissue]
    assert 0.1 < drawn_slide.tissue.mean() < 0.9
    assert glass.mean() > 225
    assert tissue[:, 0].mean() > tissue[:, 1].mean() + 20
    assert tissue[:, 2].mean() > tissue[:, 1].mean() + 10
    assert drawn_slide.num_nuclei > 500


def test_nuclei_are_bluer_and_darker_than_the_fibres_between_them():
    seen = draw_tissue(1024, 1024, seed=7).reshape(-1, 3).astype(float)
    dark = seen[seen.sum(1) < np.quantile(seen.sum(1), 0.05)].mean(0)
    bright = seen[seen.sum(1) > np.quantile(seen.sum(1), 0.5)].mean(0)
    assert dark[2] > dark[0] > dark[1], "haematoxylin: blue, then red, then green"
    assert bright[0] > bright[2] > bright[1], "eosin: red, then blue, then green"


def test_equal_seeds_draw_equal_bytes_and_others_do_not(tmp_path):
    one = draw_slide(tmp_path / "a.tiff", 600, 500, seed=4)
    same = draw_slide(tmp_path / "b.tiff", 600, 500, seed=4)
    other = draw_slide(tmp_path / "c.tiff", 600, 500, seed=5)
    assert one.path.read_bytes() == same.path.read_bytes()
    assert one.path.read_bytes() != other.path.read_bytes()


def test_strips_leave_no_seam():
    """Rows on either side of a strip's border differ no more than rows elsewhere do."""
    seen = draw_tissue(400, 1100, seed=1).astype(float)
    steps = np.abs(np.diff(seen, axis=0)).mean(axis=(1, 2))
    assert steps[511] < 1.5 * np.median(steps)
    assert steps[1023] < 1.5 * np.median(steps)


def test_squares_are_where_they_were_asked_for_at_every_level(tmp_path):
    squares = [Square(Box(256, 512, 128, 128), (255, 0, 0)), Square(Box(800, 64, 128, 128), (0, 0, 255))]
    drawn = draw_slide(tmp_path / "a.tiff", 1100, 900, squares=squares)
    with openslide.OpenSlide(str(drawn.path)) as slide:
        for level, factor in enumerate(slide.level_downsamples):
            for square in squares:
                inner = (square.box.x + 32, square.box.y + 32)
                size = (max(1, int(64 / factor)),) * 2
                seen = np.asarray(slide.read_region(inner, level, size))[..., :3]
                # JPEG at quality 87 moves pure colours by a few levels.
                assert np.abs(seen.mean((0, 1)) - square.colour).max() < 12


@pytest.mark.parametrize(("name", "channel"), [("red", 0), ("green", 1), ("blue", 2)])
def test_pens_have_their_colour(tmp_path, name, channel):
    drawn = draw_slide(tmp_path / "a.tiff", 1200, 1200, seed=3, pen=[name], tissue=False)
    with Slide.open(drawn.path) as slide:
        seen = slide.read(Box(0, 0, 1200, 1200), size=drawn.pen.shape).astype(float)
    assert drawn.pen.any()
    marked = seen[drawn.pen].mean(0)
    assert marked.argmax() == channel
    assert marked.max() - marked.min() > 40


def test_an_unknown_pen_is_refused(tmp_path):
    with pytest.raises(ValueError, match="purple"):
        draw_slide(tmp_path / "a.tiff", 100, 100, pen=["purple"])


def test_bare_glass_has_no_tissue(tmp_path):
    drawn = draw_slide(tmp_path / "a.tiff", 900, 700, tissue=False)
    assert (drawn.num_nuclei, drawn.tissue.any()) == (0, np.False_)
    with Slide.open(drawn.path) as slide:
        assert np.median(slide.thumbnail(300)) > 235


def test_a_slide_may_keep_its_resolution_to_itself(tmp_path):
    drawn = draw_slide(tmp_path / "a.tiff", 300, 300, states_mpp=False)
    with Slide.open(drawn.path) as slide:
        assert slide.resolution is None


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        draw_slide(tmp_path / "file" / "a.tiff", 64, 64)
