"""Whatever is stored, RGB8 comes out, and a pixel's colour never depends on its neighbours."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from pixcell.data.colour import ColourProfile, PixelFormat, lay_on_white
from pixcell.data.slides import Slide
from pixcell.errors import UnreadableSlide
from pixcell.geometry import Box

_spec = importlib.util.spec_from_file_location("slide_files", Path(__file__).with_name("slide_files.py"))
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)


def pixels(path: Path) -> tuple[np.ndarray, str]:
    with Slide.open(path) as slide:
        return slide.read(Box(0, 0, slide.width, slide.height)), slide.colour


def swapped_profile() -> bytes:
    """An ICC profile like sRGB with red and green exchanged: its effect cannot be missed."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {}
    for entry in range(int.from_bytes(icc[128:132], "big")):
        start = 132 + 12 * entry
        entries[bytes(icc[start : start + 4])] = slice(start + 4, start + 12)
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    icc[red], icc[green] = icc[green], icc[red]
    icc[84:100] = bytes(16)  # the checksum of the profile no longer holds
    return bytes(icc)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return files.textured(200, 120)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif"])
def test_grey_becomes_three_equal_channels(tmp_path, picture, name):
    Image.fromarray(picture[..., 0]).save(tmp_path / name)
    seen, report = pixels(tmp_path / name)
    assert np.array_equal(seen, np.repeat(picture[..., :1], 3, axis=2))
    assert "8-bit grey" in report


@pytest.mark.parametrize("name", ["sixteen.png", "sixteen.tif"])
def test_sixteen_bits_keep_the_most_significant_eight(tmp_path, name):
    values = np.linspace(0, 65_535, 200 * 100).astype(np.uint16).reshape(100, 200)
    Image.fromarray(values).save(tmp_path / name)
    seen, report = pixels(tmp_path / name)
    assert np.array_equal(seen[..., 1], values >> 8)
    assert "16" in report


def test_a_dark_tile_of_a_sixteen_bit_slide_stays_dark(tmp_path):
    """Nothing is stretched to what a tile happens to hold."""
    values = np.full((256, 512, 3), 2_000, np.uint16)
    values[:, 256:] = 60_000
    path = files.write_pyramid(tmp_path / "a.tif", values, num_levels=1)
    with Slide.open(path) as slide:
        assert slide.read(Box(0, 0, 256, 256)).max() == 2_000 >> 8
        assert slide.read(Box(256, 0, 256, 256)).min() == 60_000 >> 8


@pytest.mark.parametrize("place", ["tag", "ome"])
def test_a_stated_depth_of_twelve_bits_is_used(tmp_path, place):
    values = np.full((64, 64, 3), 4_095, np.uint16)
    values[:32] = 2_048
    path = tmp_path / "twelve.tif"
    if place == "tag":
        tifffile.imwrite(path, values, photometric="rgb", extratags=[(281, "H", 3, (4_095,) * 3)])
    else:
        tifffile.imwrite(path, values, ome=True, photometric="rgb",
                         metadata={"axes": "YXS", "SignificantBits": 12})  # fmt: skip
    seen, report = pixels(path)
    assert (seen[:32] == 128).all()
    assert (seen[32:] == 255).all()
    assert "12 stated bits" in report


def test_floating_point_is_zero_to_one_and_nan_is_glass(tmp_path):
    values = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    values[:8] = np.nan
    tifffile.imwrite(tmp_path / "float.tif", values)
    seen, report = pixels(tmp_path / "float.tif")
    assert np.array_equal(seen[20, :, 0], np.rint(values[20] * 255))
    assert (seen[:8] == 255).all()
    assert "float32" in report


def test_floating_point_beyond_its_range_is_an_error_not_a_guess(tmp_path):
    tifffile.imwrite(tmp_path / "float.tif", np.full((64, 64, 3), 213.0, np.float32), photometric="rgb")
    with Slide.open(tmp_path / "float.tif") as slide, pytest.raises(UnreadableSlide, match="213"):
        slide.read(Box(0, 0, 64, 64))


@pytest.mark.parametrize("name", ["bits.png", "bits.tif"])
def test_one_bit_is_black_and_white(tmp_path, name):
    board = np.indices((64, 64)).sum(0) % 2 == 0
    Image.fromarray(board).save(tmp_path / name)
    seen, _ = pixels(tmp_path / name)
    assert np.array_equal(seen[..., 2], board * 255)


def test_white_is_zero_where_the_file_says_so(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((64, 64), 10, np.uint8), photometric="miniswhite")
    seen, report = pixels(tmp_path / "a.tif")
    assert (seen == 245).all()
    assert "0 is white" in report


@pytest.mark.parametrize("name", ["palette.png", "palette.tif"])
def test_palettes_are_looked_up(tmp_path, name):
    Image.fromarray(files.quadrants(64, 64)).quantize(8).save(tmp_path / name)
    seen, report = pixels(tmp_path / name)
    assert np.abs(seen.astype(int) - files.quadrants(64, 64)).max() <= 8
    assert "palette" in report


@pytest.mark.parametrize("name", ["alpha.png", "alpha.tif"])
def test_alpha_is_laid_on_white(tmp_path, picture, name):
    alpha = np.full(picture.shape[:2], 255, np.uint8)
    alpha[:40], alpha[40:80] = 0, 128
    Image.fromarray(np.dstack([picture, alpha])).save(tmp_path / name)
    seen, report = pixels(tmp_path / name)
    assert (seen[:40] == 255).all()
    half = np.rint(picture[40:80] * (128 / 255) + 255 * (127 / 255))
    assert np.abs(seen[40:80] - half).max() <= 1
    assert np.array_equal(seen[80:], picture[80:])
    assert "straight alpha" in report


def test_premultiplied_and_straight_alpha_agree():
    straight = np.full((1, 1, 3), 100, np.uint8)
    premultiplied = np.full((1, 1, 3), 50, np.uint8)
    alpha = np.full((1, 1), 128, np.uint8)
    one, other = lay_on_white(straight, alpha), lay_on_white(premultiplied, alpha, premultiplied=True)
    assert abs(int(one[0, 0, 0]) - int(other[0, 0, 0])) <= 1


def test_a_fourth_channel_without_a_meaning_is_left_out(tmp_path, picture):
    values = np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(pixels(tmp_path / "a.tif")[0], picture)


def test_planar_channels_come_together(tmp_path, picture):
    tifffile.imwrite(tmp_path / "a.tif", picture.transpose(2, 0, 1).copy(), photometric="rgb",
                     planarconfig="separate", tile=(64, 64))  # fmt: skip
    assert np.array_equal(pixels(tmp_path / "a.tif")[0], picture)


def test_cmyk_jpegs_are_converted(tmp_path):
    Image.fromarray(files.quadrants(64, 64)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    seen, report = pixels(tmp_path / "a.jpg")
    assert np.abs(seen[8, 8].astype(int) - (200, 40, 40)).max() < 12
    assert "CMYK" in report


def test_a_camera_that_was_turned_gives_an_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rows are columns
    Image.fromarray(files.quadrants(128, 64)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen, report = pixels(tmp_path / "a.jpg")
    assert seen.shape == (128, 64, 3)
    assert np.abs(seen[10, 10].astype(int) - (50, 60, 190)).max() < 12  # lower left came up
    assert "orientation 6" in report


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.svs"])
def test_a_profile_is_applied_and_named(tmp_path, name):
    red = np.full((256, 256, 3), (200, 40, 40), np.uint8)
    red[:64] = 255
    path = tmp_path / name
    if name == "a.tif":
        files.write_pyramid(path, red, num_levels=1, iccprofile=swapped_profile())
    elif name == "a.svs":
        files.write_aperio(path, red, iccprofile=swapped_profile())
    else:
        Image.fromarray(red).save(path, icc_profile=swapped_profile())
    seen, report = pixels(path)
    assert seen[200, 128, 1] > 150 > seen[200, 128, 0], "red and green are exchanged by this profile"
    assert seen[10, 10].min() >= 254, "white stays white"
    assert "applied (to sRGB)" in report


def test_srgb_changes_nothing_and_says_so(tmp_path, picture):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(picture).save(tmp_path / "a.png", icc_profile=icc)
    seen, report = pixels(tmp_path / "a.png")
    assert np.array_equal(seen, picture)
    assert "is sRGB" in report


def test_a_broken_profile_is_reported_and_the_pixels_stay(tmp_path, picture):
    files.write_pyramid(tmp_path / "a.tif", picture, num_levels=1, iccprofile=b"not a profile" * 20)
    seen, report = pixels(tmp_path / "a.tif")
    assert np.array_equal(seen, picture)
    assert "cannot be applied" in report


def test_no_profile_is_reported(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert "no ICC profile" in pixels(tmp_path / "a.png")[1]


def test_pure_white_stays_white_under_any_profile():
    white = np.full((4, 4, 3), 255, np.uint8)
    profile = ColourProfile(swapped_profile())
    assert profile.is_applied
    assert np.array_equal(profile.apply(white), white)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_spread_over_the_full_range(bits):
    values = np.arange(1 << bits, dtype=np.uint8).reshape(1, -1, 1)
    seen = PixelFormat(1, bits=bits).to_rgb8(values)[0, :, 0]
    assert (seen[0], seen[-1]) == (0, 255)
    assert (np.diff(seen.astype(int)) > 0).all()
