"""A slide answers the same question the same way, whatever the file behind it is."""

import concurrent.futures
import errno
import importlib.util
import os
import pickle
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from pixcell.data.backends import OpenSlideBackend
from pixcell.data.slides import Slide, find_slides
from pixcell.errors import MissingExtra, SlideError, UnknownResolution, UnreadableSlide
from pixcell.geometry import Box

_spec = importlib.util.spec_from_file_location("slide_files", Path(__file__).with_name("slide_files.py"))
files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(files)

HALF_MICRON = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
REAL = ["CMU-1-Small-Region.svs", "cmu1_region_pyramid.tiff", "os2_ki67_pyramid.tiff",
        "brecahad_fields_montage_pyramid.tiff", "prostate_whole_section_lowres.tiff"]  # fmt: skip


def largest_difference(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return files.textured(700, 500)


@pytest.fixture(scope="module")
def pyramid(picture, tmp_path_factory) -> Path:
    return files.write_pyramid(tmp_path_factory.mktemp("pyramid") / "slide.tif", picture, **HALF_MICRON)


# ── formats ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["pages", "subifds", "unmarked", "ome"])
def test_pyramids_of_every_layout_have_their_levels(tmp_path, picture, kind):
    path = files.write_pyramid(
        tmp_path / ("slide.ome.tif" if kind == "ome" else "slide.tif"), picture, kind=kind
    )
    with Slide.open(path, source_mpp=0.5) as slide:
        assert [(level.width, level.height, level.downsample) for level in slide.levels] == [
            (700, 500, 1.0), (350, 250, 2.0), (175, 125, 4.0)
        ]  # fmt: skip
        assert largest_difference(slide.read(Box(0, 0, 700, 500)), picture) == 0
        coarse = slide.read(Box(0, 0, 700, 500), mpp=2.0)
        assert largest_difference(coarse, np.asarray(Image.fromarray(picture).reduce(2).reduce(2))) == 0


@pytest.mark.parametrize("name", ["field.png", "field.bmp", "field.tif", "field.webp"])
def test_a_plain_image_is_a_slide_of_one_level(tmp_path, picture, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    Image.fromarray(picture).save(tmp_path / name, **options)
    with Slide.open(tmp_path / name) as slide:
        assert (slide.width, slide.height, len(slide.levels)) == (700, 500, 1)
        assert slide.resolution is None
        assert largest_difference(slide.read(Box(3, 5, 100, 90)), picture[5:95, 3:103]) == 0


def test_an_aperio_slide_takes_its_resolution_from_the_scanner(tmp_path, picture):
    path = files.write_aperio(tmp_path / "case.svs", picture, "AppMag = 20|MPP = 0.4990")
    with Slide.open(path) as slide:
        assert slide.mpp == 0.499
        assert slide.resolution.source == "openslide.mpp-x/y"
        assert slide.properties["openslide.vendor"] == "aperio"


def test_a_dicom_folder_is_a_slide(tmp_path, picture):
    pytest.importorskip("wsidicom")
    folder = files.write_dicom(tmp_path / "case 7", picture, mpp=0.25)
    with Slide.open(folder) as slide, Slide.open(folder / "level0.dcm") as by_file:
        assert (slide.backend, slide.mpp, slide.resolution.source) == ("dicom", 0.25, "DICOM PixelSpacing")
        assert largest_difference(slide.read(Box(0, 0, 700, 500)), picture) == 0
        assert slide.read(Box(-50, -50, 40, 40)).min() == 255
        assert slide.fingerprint == by_file.fingerprint
    assert find_slides(tmp_path) == [folder]


def test_two_dicom_series_in_one_folder_must_be_told_apart(tmp_path, picture):
    pytest.importorskip("wsidicom")
    files.write_dicom(tmp_path / "two", picture, series="1.2.3.4", name="a")
    files.write_dicom(tmp_path / "two", picture, series="1.2.3.9", name="b")
    with pytest.raises(UnreadableSlide, match="2 DICOM series"):
        Slide.open(tmp_path / "two")


def test_dicom_without_its_extra_names_the_command(tmp_path, picture, monkeypatch):
    pytest.importorskip("wsidicom")
    folder = files.write_dicom(tmp_path / "case", picture)
    monkeypatch.setitem(sys.modules, "wsidicom", None)
    with pytest.raises(MissingExtra, match=r"pixcell\[dicom\]"):
        Slide.open(folder)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mpp", [0.5, 0.7, 1.0, 1.3, 2.0, 3.1])
def test_a_colour_is_where_it_was_painted_at_every_resolution(tmp_path, mpp):
    path = files.write_pyramid(tmp_path / "slide.tif", files.quadrants(1024, 1024), **HALF_MICRON)
    with Slide.open(path) as slide:
        side = 8  # around the meeting point of the four colours, 512 | 512
        reach = round(side * mpp / 0.5)
        seen = slide.read(Box(512 - reach, 512 - reach, 2 * reach, 2 * reach), mpp=mpp, size=(16, 16))
    for rows, columns, colour in [(0, 0, (200, 40, 40)), (0, 10, (40, 180, 60)), (10, 0, (50, 60, 190)),
                                  (10, 10, (128, 128, 128))]:  # fmt: skip
        # Two pixels on either side of the border may mix.
        part = seen[rows : rows + 6, columns : columns + 6]
        assert largest_difference(part, np.broadcast_to(np.uint8(colour), part.shape)) <= 1


@pytest.mark.parametrize("mpp", [0.61, 0.8, 1.0, 1.7, 2.4])
def test_neighbouring_boxes_continue_each_other_without_a_seam(pyramid, mpp):
    """A box read in one piece equals the same box read in four, whatever the resampling."""
    with Slide.open(pyramid) as slide:
        whole = slide.read(Box(40, 40, 400, 400), mpp=mpp, size=(100, 100))
        quarters = [[slide.read(Box(40 + x, 40 + y, 200, 200), mpp=mpp, size=(50, 50)) for x in (0, 200)]
                    for y in (0, 200)]  # fmt: skip
    joined = np.concatenate([np.concatenate(row, axis=1) for row in quarters])
    # One of 255: PIL rounds its weights anew for every call.
    assert largest_difference(joined, whole) <= 1


def test_reducing_averages_instead_of_dropping_pixels(tmp_path):
    """A checkerboard of single pixels becomes grey, not black or white."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    with Slide.open(tmp_path / "board.png", source_mpp=0.5) as slide:
        small = slide.read(Box(16, 16, 128, 128), mpp=2.0)
    assert abs(float(small.mean()) - 127.5) < 2
    assert small.std() < 8


def test_enlarging_invents_no_shift(pyramid, picture):
    with Slide.open(pyramid) as slide:
        large = slide.read(Box(100, 100, 100, 100), mpp=0.25)
    back = np.asarray(Image.fromarray(large).reduce(2))
    assert large.shape == (200, 200, 3)
    assert np.abs(back.astype(int) - picture[100:200, 100:200]).mean() < 1.5


def test_beyond_the_slide_is_white(pyramid, picture):
    with Slide.open(pyramid) as slide:
        corner = slide.read(Box(-10, -20, 60, 60))
        assert (corner[:20] == 255).all()
        assert (corner[:, :10] == 255).all()
        assert largest_difference(corner[20:, 10:], picture[:40, :50]) == 0
        assert (slide.read(Box(5000, 5000, 64, 64), mpp=2.0) == 255).all()
        far = slide.read(Box(690, 490, 400, 400), mpp=1.0)
        assert (far[20:, :] == 255).all()


def test_a_level_that_was_rounded_down_has_no_white_border(tmp_path):
    """703 halves to 351: the last column of level 0 has no pixel of its own, and is tissue all the same."""
    path = files.write_pyramid(tmp_path / "odd.tif", np.full((501, 703, 3), 90, np.uint8), **HALF_MICRON)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[1].shape == (251, 352, 3)  # PIL rounds up: cut to what most programs write
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(np.full((501, 703, 3), 90, np.uint8), tile=(128, 128), photometric="rgb", **HALF_MICRON)
        tiff.write(np.full((250, 351, 3), 90, np.uint8), tile=(128, 128), photometric="rgb", subfiletype=1)
    with Slide.open(path) as slide:
        assert slide.levels[1].downsample == 2.0
        assert slide.read(Box(0, 0, 703, 501), mpp=1.0).max() == 90


def test_a_size_wins_over_rounding(pyramid):
    with Slide.open(pyramid) as slide:
        assert slide.read(Box(0, 0, 333, 333), mpp=1.0).shape == (166, 166, 3)
        assert slide.read(Box(0, 0, 333, 333), mpp=1.0, size=(167, 160)).shape == (167, 160, 3)


def test_resolutions_within_a_percent_are_taken_as_stored(pyramid, picture):
    with Slide.open(pyramid, source_mpp=0.4990) as slide:
        assert largest_difference(slide.read(Box(7, 9, 200, 100), mpp=0.5), picture[9:109, 7:207]) == 0


def test_the_thumbnail_shows_the_whole_slide(pyramid):
    with Slide.open(pyramid) as slide:
        assert slide.thumbnail(100).shape == (71, 100, 3)
        assert slide.thumbnail(10_000).shape == (500, 700, 3)


def test_a_large_image_without_levels_is_reduced_in_parts(tmp_path, monkeypatch, picture):
    """Reading in parts, as huge slides need, gives what reading at once gives."""
    Image.fromarray(picture).save(tmp_path / "flat.png")
    with Slide.open(tmp_path / "flat.png") as slide:
        at_once = slide.thumbnail(60)
        monkeypatch.setattr("pixcell.data.slides._MOST_PIXELS_AT_ONCE", 5_000)
        assert largest_difference(slide.thumbnail(60), at_once) <= 1


def test_threads_read_what_one_thread_reads(pyramid):
    boxes = [Box(x, y, 150, 150) for x in range(0, 600, 50) for y in range(0, 400, 50)]
    with Slide.open(pyramid) as slide, concurrent.futures.ThreadPoolExecutor(8) as pool:
        alone = [slide.read(box, mpp=0.9) for box in boxes]
        together = list(pool.map(lambda box: slide.read(box, mpp=0.9), boxes))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_slide_is_not_sent_to_other_processes(pyramid):
    with Slide.open(pyramid) as slide, pytest.raises(TypeError, match="path"):
        pickle.dumps(slide)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "jpeg"])
def test_short_way_and_openslide_give_the_same_pixels(tmp_path, picture, compression):
    path = files.write_pyramid(tmp_path / "slide.tif", picture, compression=compression, **HALF_MICRON)
    reference = OpenSlideBackend(path)
    with Slide.open(path) as slide:
        assert slide.backend == "tiff"
        for level, (width, height) in enumerate(reference.levels):
            box = Box(0, 0, width, height)
            assert np.array_equal(slide._backend.region(level, box), reference.region(level, box))
    reference.close()


# ── resolution ───────────────────────────────────────────────────────────────────────────────────


def test_the_users_word_is_the_last(pyramid):
    with Slide.open(pyramid, source_mpp=0.23) as slide:
        assert (slide.mpp, slide.resolution.source) == (0.23, "given by the user")


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_resolution_that_is_no_length_is_refused(pyramid, mpp):
    with pytest.raises(SlideError, match="positive number"):
        Slide.open(pyramid, source_mpp=mpp)


def test_without_a_resolution_microns_are_an_error_and_pixels_are_not(tmp_path, picture):
    path = files.write_pyramid(tmp_path / "slide.tif", picture)
    with Slide.open(path) as slide:
        assert slide.resolution is None
        assert slide.read(Box(0, 0, 64, 64)).shape == (64, 64, 3)
        with pytest.raises(UnknownResolution, match="--source-mpp"):
            slide.read(Box(0, 0, 64, 64), mpp=0.5)


@pytest.mark.parametrize("dpi", [72, 96, 300, 600])
def test_print_densities_are_not_a_microscopes(tmp_path, picture, dpi):
    Image.fromarray(picture).save(tmp_path / "a.png", dpi=(dpi, dpi))
    Image.fromarray(picture).save(tmp_path / "a.jpg", dpi=(dpi, dpi))
    files.write_pyramid(tmp_path / "a.tif", picture, resolution=(dpi, dpi), resolutionunit="INCH")
    for path in find_slides(tmp_path):
        with Slide.open(path) as slide:
            assert slide.resolution is None, path
            assert "not a microscope's" in slide.properties["pixcell.resolution-remark"]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_density_of_a_microscope_is_believed(tmp_path, picture, name):
    if name == "a.png":
        Image.fromarray(picture).save(tmp_path / name, dpi=(50_800, 50_800))
    else:
        tifffile.imwrite(tmp_path / name, picture, resolution=(50_800, 50_800), resolutionunit="INCH")
    with Slide.open(tmp_path / name) as slide:
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(("unit", "size"), [("µm", 0.25), ("nm", 250.0), ("mm", 0.00025)])
def test_ome_states_the_unit_of_its_pixels(tmp_path, picture, unit, size):
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit,
                "PhysicalSizeY": size, "PhysicalSizeYUnit": unit}  # fmt: skip
    path = files.write_pyramid(tmp_path / "a.ome.tif", picture, kind="ome", metadata=metadata)
    with Slide.open(path) as slide:
        assert slide.mpp == pytest.approx(0.25)
        assert slide.resolution.source == "OME-XML PhysicalSizeX/Y"


def test_imagej_calibration_is_read(tmp_path, picture):
    path = tmp_path / "imagej.tif"
    tifffile.imwrite(path, picture, imagej=True, resolution=(2.0, 2.0), metadata={"unit": "um"})
    with Slide.open(path) as slide:
        assert (slide.mpp, slide.resolution.source) == (0.5, "ImageJ calibration")


def test_an_objective_alone_gives_ten_over_its_power(tmp_path, picture):
    path = files.write_aperio(tmp_path / "case.svs", picture, "AppMag = 40")
    with Slide.open(path) as slide:
        assert slide.mpp == 0.25
        assert "objective 40x" in slide.resolution.source


def test_pixels_that_are_not_square_are_presented_square(tmp_path):
    """Twice as wide as high in microns: a circle must come out round, and boxes count square pixels."""
    y, x = np.mgrid[0:400, 0:200]
    circle = np.where(np.hypot((x - 100) * 2, y - 200) < 150, 0, 255).astype(np.uint8)
    path = tmp_path / "flat.tif"
    tifffile.imwrite(path, circle, resolution=(10_000, 20_000), resolutionunit="CENTIMETER")
    with Slide.open(path) as slide:
        assert (slide.mpp, slide.resolution.mpp_x, slide.resolution.mpp_y) == (0.5, 1.0, 0.5)
        assert (slide.width, slide.height) == (400, 400)
        for mpp in (None, 1.0):
            dark = slide.read(Box(0, 0, 400, 400), mpp=mpp)[..., 0] < 128
            assert abs(np.ptp(np.nonzero(dark.any(0))) - np.ptp(np.nonzero(dark.any(1)))) <= 2
        # The right half, asked for in square pixels, is the right half.
        assert np.array_equal(slide.read(Box(200, 0, 200, 400), size=(400, 200))[:, -40:].min(), 255)


def test_sides_that_nearly_agree_count_as_square(tmp_path, picture):
    tifffile.imwrite(tmp_path / "a.tif", picture, resolution=(20_000, 20_060), resolutionunit="CENTIMETER")
    with Slide.open(tmp_path / "a.tif") as slide:
        assert (slide.width, slide.height) == (700, 500)
        assert slide.mpp == pytest.approx((0.5 * 1e4 / 20_060) ** 0.5)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────


def test_missing_and_empty_files_are_said_to_be_that(tmp_path):
    (tmp_path / "empty.svs").touch()
    with pytest.raises(UnreadableSlide, match="0 bytes"):
        Slide.open(tmp_path / "empty.svs")
    with pytest.raises(UnreadableSlide, match="no such file"):
        Slide.open(tmp_path / "nowhere.svs")


def test_text_named_svs_is_said_to_be_text(tmp_path):
    (tmp_path / "notes.svs").write_text("Tumour, grade 2.\n" * 40)
    with pytest.raises(UnreadableSlide, match="text file"):
        Slide.open(tmp_path / "notes.svs")


def test_random_bytes_are_no_slide(tmp_path):
    (tmp_path / "noise.tif").write_bytes(b"II*\0" + np.random.default_rng(0).bytes(5_000))
    with pytest.raises(UnreadableSlide):
        Slide.open(tmp_path / "noise.tif")


@pytest.mark.parametrize("suffix", [".tif", ".svs", ".png", ".jpg"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_slide_is_refused_when_it_is_opened(tmp_path, picture, suffix, share):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".svs":
        files.write_aperio(path, picture)
    elif suffix == ".tif":
        files.write_pyramid(path, picture, compression="jpeg", **HALF_MICRON)
    else:
        Image.fromarray(picture).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UnreadableSlide, match=r"cut\."):
        Slide.open(path)


@pytest.mark.parametrize("suffix", [".tif", ".svs"])
def test_a_corrupt_tile_fails_alone_and_is_named(tmp_path, picture, suffix):
    path = tmp_path / f"hurt{suffix}"
    files.write_aperio(path, picture) if suffix == ".svs" else files.write_pyramid(
        path, picture, compression="jpeg", tile=(256, 256), num_levels=1, **HALF_MICRON
    )
    _destroy_tile(path, 1)
    with Slide.open(path) as slide:
        with pytest.raises(UnreadableSlide, match=r"x 300, y 10, 64 x 64"):
            slide.read(Box(300, 10, 64, 64))
        assert slide.read(Box(0, 0, 200, 200)).shape == (200, 200, 3)
        assert slide.read(Box(300, 300, 100, 100)).shape == (100, 100, 3)


def test_a_tile_that_breaks_off_is_corrupt_though_the_decoder_is_content(tmp_path, picture):
    path = files.write_pyramid(
        tmp_path / "broken.tif", picture, compression="jpeg", tile=(256, 256), num_levels=1
    )
    _destroy_tile(path, 0, keep=0.6)
    with Slide.open(path) as slide, pytest.raises(UnreadableSlide, match="breaks off"):
        slide.read(Box(0, 0, 100, 100))


def test_openslide_recovers_after_a_corrupt_tile(tmp_path, picture):
    """OpenSlide refuses everything after one error; the reader opens the file afresh."""
    path = files.write_aperio(tmp_path / "hurt.svs", picture)
    _destroy_tile(path, 1)
    backend = OpenSlideBackend(path)
    before = backend.region(0, Box(0, 0, 200, 200))
    for _ in range(2):
        with pytest.raises(openslide.OpenSlideError):
            backend.region(0, Box(300, 10, 64, 64))
        assert np.array_equal(backend.region(0, Box(0, 0, 200, 200)), before)
    backend.close()


def test_tiles_that_a_scanner_left_out_are_white(tmp_path, picture):
    """A tile of zero bytes is glass: in a generic pyramid by our reader, in OpenSlide's by its alpha."""
    path = files.write_pyramid(tmp_path / "sparse.tif", picture, num_levels=1, **HALF_MICRON)
    _empty_tile(path, 0)
    with Slide.open(path) as slide:
        assert slide.read(Box(0, 0, 128, 128)).min() == 255
        assert largest_difference(slide.read(Box(128, 0, 100, 100)), picture[:100, 128:228]) == 0
    reference = OpenSlideBackend(path)
    assert reference.region(0, Box(0, 0, 128, 128)).min() == 255
    reference.close()


def test_fluorescence_and_stacks_are_refused_by_name(tmp_path):
    tifffile.imwrite(
        tmp_path / "five.tif", np.zeros((5, 64, 64), np.uint8), metadata={"axes": "CYX"}, ome=True
    )
    with pytest.raises(UnreadableSlide, match="5 channels"):
        Slide.open(tmp_path / "five.tif")
    tifffile.imwrite(tmp_path / "z.tif", np.zeros((4, 64, 64), np.uint8), metadata={"axes": "ZYX"}, ome=True)
    with pytest.raises(UnreadableSlide, match="4 along Z"):
        Slide.open(tmp_path / "z.tif")


# ── finding and knowing ──────────────────────────────────────────────────────────────────────────


def test_names_with_blanks_and_other_scripts_are_read(tmp_path, picture):
    for name in ("Fall 12 (Leber).tif", "Präparat № 7.tif", "肝組織 切片.svs"):
        if name.endswith("svs"):
            files.write_aperio(tmp_path / name, picture)
        else:
            files.write_pyramid(tmp_path / name, picture, **HALF_MICRON)
        with Slide.open(tmp_path / name) as slide:
            assert (slide.mpp, slide.read(Box(0, 0, 9, 9)).shape) == (0.5, (9, 9, 3))
    assert len(find_slides(tmp_path)) == 3


def test_a_folder_gives_its_slides_sorted_and_nothing_else(tmp_path):
    for name in (
        "b/two.svs",
        "a/one.tif",
        "b/.hidden.svs",
        ".cache/three.svs",
        "notes.txt",
        "table.csv",
        "c.PNG",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_slides(tmp_path)] == [
        "a/one.tif", "b/two.svs", "c.PNG"
    ]  # fmt: skip
    assert find_slides(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_pictures_of_a_store_beside_the_slides_are_no_slides(tmp_path):
    """``pixcell tile . store`` twice must not tile its own overviews."""
    for name in ("a.svs", "store/store.json", "store/qc/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_slides(tmp_path) == [tmp_path / "a.svs"]
    assert find_slides(tmp_path / "store" / "qc") == [tmp_path / "store" / "qc" / "a.jpg"]


def test_threads_decode_images_side_by_side(tmp_path, monkeypatch, picture):
    """The lock around PIL's global limit is not held while pixels are decoded."""
    Image.fromarray(picture).save(tmp_path / "a.png")
    inside, real = threading.Barrier(2, timeout=20), PngImagePlugin.PngImageFile.load

    def load(image):
        inside.wait()
        return real(image)

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(Slide.open, [tmp_path / "a.png"] * 2))) == 2


def test_grey_with_more_bits_than_pil_converts_is_refused_not_turned_white(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(">u2").tobytes()
    (tmp_path / "ramp.pgm").write_bytes(b"P5 64 64 65535\n" + ramp)
    with pytest.raises(UnreadableSlide, match="int32 pixels have no stated black and white"):
        Slide.open(tmp_path / "ramp.pgm")


def test_a_folder_that_may_not_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    scandir = os.scandir

    def refused(place):  # the tests may run as root, whom no permission stops
        if Path(place).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UnreadableSlide, match="cannot be listed"):
        find_slides(tmp_path)


def test_a_folder_without_slides_and_a_missing_path_are_errors(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UnreadableSlide, match="no slide"):
        find_slides(tmp_path)
    with pytest.raises(UnreadableSlide, match="no such file or folder"):
        find_slides(tmp_path / "nowhere")
    with pytest.raises(UnreadableSlide, match="without DICOM"):
        Slide.open(tmp_path)


def test_the_fingerprint_follows_the_content_and_not_the_name(tmp_path, pyramid, picture):
    copy = tmp_path / "elsewhere" / "other name.tif"
    copy.parent.mkdir()
    shutil.copyfile(pyramid, copy)
    other = files.write_pyramid(tmp_path / "slide.tif", picture[::-1].copy(), **HALF_MICRON)
    with Slide.open(pyramid) as one, Slide.open(copy) as same, Slide.open(other) as different:
        assert one.fingerprint == same.fingerprint
        assert one.fingerprint != different.fingerprint


# ── real slides ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "mpp", "num_levels"),
    list(zip(REAL, [0.499, 0.499, 0.2271, 0.25, None], [1, 4, 3, 5, 4], strict=True)),
)
def test_real_slides_have_the_resolution_and_the_pixels_of_openslide(shared_data, name, mpp, num_levels):
    path = shared_data / "wsi" / name
    reference = OpenSlideBackend(path)
    with Slide.open(path) as slide:
        assert slide.backend == "tiff"
        assert len(slide.levels) == num_levels
        if mpp is None:
            assert slide.resolution is None
        else:
            assert slide.mpp == pytest.approx(mpp, rel=1e-3)
        for level, (width, height) in enumerate(reference.levels):
            # OpenSlide blends where a place falls between pixels of a level: compare whole levels.
            whole = reference.region(level, Box(0, 0, width, height))
            for box in (Box(0, 0, width, height), Box(width // 3, height // 4, width // 2, height // 2)):
                stored = slide._backend.region(level, box)
                assert np.array_equal(stored, whole[box.y : box.bottom, box.x : box.right]), (level, box)
    reference.close()


@pytest.mark.parametrize(
    ("name", "mpp"),
    [("OS-1-detail.ome.tif", 0.2271), ("OS-2-ndpi.ome.tif", 0.2271), ("OS-2-vsi.ome.tif", 0.34605)],
)
def test_real_ome_tiffs_that_openslide_refuses_are_read(shared_data, name, mpp):
    path = shared_data / "openslide_crops" / name
    assert openslide.OpenSlide.detect_format(str(path)) is None
    with Slide.open(path) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-3)
        assert slide.resolution.source == "OME-XML PhysicalSizeX/Y"
        assert 60 < slide.thumbnail(256).mean() < 250


def _segments(path: Path) -> tuple[tuple[int, ...], tuple[int, ...], tifffile.TiffTag]:
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        return page.dataoffsets, page.databytecounts, page.tags["TileByteCounts"]


def _destroy_tile(path: Path, index: int, keep: float = 0.0) -> None:
    """Overwrite a stored tile with zeros, from a share of it on."""
    offsets, lengths, _ = _segments(path)
    first = offsets[index] + int(lengths[index] * keep)
    with path.open("r+b") as file:
        file.seek(first)
        file.write(bytes(offsets[index] + lengths[index] - first))


def _empty_tile(path: Path, index: int) -> None:
    """Set the stored length of a tile to zero, as scanners do for glass."""
    _, _, tag = _segments(path)
    size = {3: 2, 4: 4}[int(tag.dtype)]
    with path.open("r+b") as file:
        file.seek(tag.valueoffset + index * size)
        file.write(bytes(size))
