"""Where things are."""

import pytest

from pixcell.geometry import Box, level_for, scale_between, window_starts


@pytest.mark.parametrize("extent", [7, 8, 11, 31])
@pytest.mark.parametrize(("size", "stride"), [(4, 1), (4, 3), (4, 4), (7, 5)])
def test_windows_cover_everything_and_reach_nothing_outside(extent, size, stride):
    covered = {place for start in window_starts(extent, size, stride) for place in range(start, start + size)}
    assert covered == set(range(extent))


@pytest.mark.parametrize(("extent", "size", "stride"), [(3, 4, 4), (9, 4, 5), (9, 4, 0)])
def test_windows_that_cannot_cover_are_refused(extent, size, stride):
    with pytest.raises(ValueError, match=r"window|stride"):
        window_starts(extent, size, stride)


def test_boxes_that_only_touch_have_nothing_in_common():
    assert Box(0, 0, 4, 4).intersection(Box(4, 0, 4, 4)) is None


def test_a_box_contains_itself_and_no_larger_one():
    box = Box(1, 2, 3, 4)
    assert box.contains(box)
    assert not box.contains(Box(1, 2, 4, 4))


def test_a_box_without_pixels_is_refused():
    with pytest.raises(ValueError, match="positive"):
        Box(0, 0, 0, 5)


def test_fields_are_cut_row_by_row():
    assert [(box.x, box.y) for box in Box(8, 16, 8, 8).split(4)] == [(8, 16), (12, 16), (8, 20), (12, 20)]


def test_a_box_that_is_no_whole_number_of_fields_is_refused():
    with pytest.raises(ValueError, match="whole number"):
        list(Box(0, 0, 10, 8).split(4))


@pytest.mark.parametrize(
    ("wanted", "level"), [(1.0, 0), (2.0, 0), (4.0, 1), (15.0, 1), (16.0, 2), (99.0, 2), (0.25, 0)]
)
def test_the_level_read_always_has_the_detail_asked_for(wanted, level):
    assert level_for(wanted, [1.0, 4.0, 16.0]) == level


def test_a_rounded_mpp_is_not_resampled():
    assert scale_between(0.4990, 0.5) == 1.0
    assert scale_between(0.2270, 0.5) == pytest.approx(2.2026, abs=1e-4)
