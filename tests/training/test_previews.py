"""A preview sheet shows its pictures, and gives them back."""

import numpy as np
from PIL import Image

from pixcell.provenance import read_provenance
from pixcell.training.previews import Preview, picture_rows, preview_path, read_preview, save_preview


def coloured(red, green, blue, side=8):
    return np.full((side, side, 3), (red, green, blue), np.uint8)


RED, BLUE = coloured(200, 0, 0), coloured(0, 0, 200)


def test_rows_of_pictures_stand_under_each_other():
    sheet = picture_rows({"above": [RED, RED], "below": [BLUE]})
    assert sheet.shape == (2 * (8 + 20 + 4), 2 * (8 + 4) + 4, 3)
    assert tuple(sheet[20 + 4, 4 + 4]) == (200, 0, 0)
    assert tuple(sheet[32 + 20 + 4, 4 + 4]) == (0, 0, 200)


def test_a_saved_sheet_gives_its_pictures_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    rows = {
        "real, held out": list(rng.integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)),
        "generated": list(rng.integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)),
        "generated, guidance 3": list(rng.integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)),
    }
    preview = Preview.of_rows(rows, {"mse": 0.5}, ["slide-a/0_0/0_0", "slide-b/0_0/0_0", "slide-c/0_0/0_0"])
    save_preview(tmp_path, 40, preview, "tiny, step 40 of 80")
    _, found = read_preview(preview_path(tmp_path, 40))
    assert list(found) == list(rows)
    for caption, pictures in rows.items():
        np.testing.assert_array_equal(np.stack(found[caption]), np.stack(pictures))


def test_a_sheet_says_of_which_run_and_step_it_is(tmp_path):
    save_preview(tmp_path / "nano", 7, Preview.of_rows({"real": [RED]}, {}), "a title")
    record = read_provenance(preview_path(tmp_path / "nano", 7))
    assert (record["preview_of"], record["step"], record["synthetic"]) == ("nano", 7, True)


def test_a_picture_that_is_no_sheet_is_kept_whole(tmp_path):
    written = save_preview(tmp_path, 1, Preview(coloured(1, 2, 3, 64)), "a curve")
    sheet, rows = read_preview(preview_path(tmp_path, 1))
    np.testing.assert_array_equal(sheet, written)
    assert rows == {}


def test_a_name_longer_than_its_column_does_not_run_into_the_next():
    names = ["a-slide-with-a-very-long-name/12345_67890/3_3", ""]
    sheet = picture_rows({"real": [coloured(0, 0, 0, 60)] * 2}, names)
    head = sheet[:20]
    assert (head[:, 4:64] < 250).any()
    assert (head[:, 64:] == 255).all()


def test_previews_of_other_versions_are_shown_whole(tmp_path):
    path = tmp_path / "old.png"
    Image.fromarray(RED).save(path)
    sheet, rows = read_preview(path)
    np.testing.assert_array_equal(sheet, RED)
    assert rows == {}
