"""A generated picture says that it is synthetic, and how to make it again."""

import numpy as np
import pytest
from PIL import Image

from pixcell.errors import UnreadableSlide
from pixcell.provenance import environment, hash_of, read_provenance, save_synthetic_png

PICTURE = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)


def test_the_record_comes_back_with_the_mark(tmp_path):
    save_synthetic_png(tmp_path / "a.png", PICTURE, {"seed": 3, "organ": "肺"})
    assert read_provenance(tmp_path / "a.png") == {"synthetic": True, "seed": 3, "organ": "肺"}
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == PICTURE).all()
        assert "Synthetic" in image.info["Description"]


def test_the_same_picture_and_record_are_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_synthetic_png(tmp_path / name, PICTURE, {"seed": 3, "b": 1, "a": 2})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_of_others_has_no_record(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    assert read_provenance(tmp_path / "a.png") is None


@pytest.mark.parametrize("record", ["not json", "[1]"])
def test_a_damaged_record_is_not_taken_for_none(tmp_path, record):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt("pixcell", record)
    Image.fromarray(PICTURE).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(UnreadableSlide, match="damaged"):
        read_provenance(tmp_path / "a.png")


def test_a_text_file_is_not_a_picture(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(UnreadableSlide):
        read_provenance(tmp_path / "a.png")


def test_a_picture_of_a_slides_size_is_refused_by_name(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadableSlide, match=r"a\.png .* too large"):
        read_provenance(tmp_path / "a.png")


def test_floats_are_not_written_as_pictures(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        save_synthetic_png(tmp_path / "a.png", PICTURE.astype(float), {})


def test_arrays_that_differ_only_in_shape_have_other_hashes():
    assert hash_of(np.zeros((2, 3))) != hash_of(np.zeros((3, 2)))


def test_the_environment_names_the_versions_that_matter():
    assert {"pixcell", "python", "torch", "diffusers"} <= set(environment())
