"""Tissue is what is stained; pen, dust, borders and bare glass are not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pixcell.data.tissue import TissueConfig, TissueMap, find_tissue, sharpness_of
from pixcell.geometry import Box

GLASS = (243, 242, 241)
STAINS = {
    "haematoxylin and eosin": (186, 117, 154),
    "pale immunostain": (212, 208, 224),
    "DAB": (135, 99, 69),
    "silver": (40, 30, 18),
    "brain, eosin only": (221, 167, 193),
}
PENS = {
    "blue": (29, 41, 115),
    "green": (49, 162, 140),
    "red": (205, 35, 55),
    "black": (25, 24, 26),
}
MPP = 8.0  # of the thumbnails here


def glass(height: int = 300, width: int = 400) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 1.0, (height, width, 1))
    return np.clip(np.array(GLASS) + noise, 0, 255).astype(np.uint8)


def disc(shape: tuple[int, ...], y: int, x: int, radius: int) -> np.ndarray:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def paint(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Lay a dye over what is there: densities add."""
    image[mask] = np.clip(image[mask] * (np.array(colour) / np.array(GLASS)), 0, 255)


def found(image: np.ndarray, **changes: object) -> TissueMap:
    return find_tissue(image, 1.0, MPP, TissueConfig(**changes))


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("stain", STAINS)
def test_stained_tissue_is_found_however_pale_or_dark(stain):
    image = glass()
    truth = disc(image.shape, 150, 200, 90)
    paint(image, truth, STAINS[stain])
    result = found(image)
    assert overlap(result.tissue, truth) > 0.9  # a rim of one or two pixels is blur
    assert not result.pen.any()


@pytest.mark.parametrize("pen", PENS)
def test_pen_on_glass_is_pen_and_not_tissue(pen):
    image = glass()
    stroke = np.zeros(image.shape[:2], bool)
    stroke[100:140, 40:360] = True
    paint(image, stroke, PENS[pen])
    result = found(image)
    assert result.pen[stroke].mean() > 0.99
    assert not result.tissue.any()


@pytest.mark.parametrize("pen", PENS)
def test_pen_over_tissue_is_taken_out_of_it(pen):
    image = glass()
    tissue, stroke = disc(image.shape, 150, 200, 110), np.zeros(image.shape[:2], bool)
    stroke[130:170, 20:380] = True
    paint(image, tissue, STAINS["haematoxylin and eosin"])
    paint(image, stroke, PENS[pen])
    result = found(image)
    assert result.pen[stroke & tissue].mean() > 0.95
    assert not (result.pen & result.tissue).any()
    away = ~ndimage.binary_dilation(stroke, iterations=8)
    assert overlap(result.tissue & away, tissue & away) > 0.9


def test_an_ink_can_be_left_out_for_a_stain_of_its_colour():
    image = glass()
    truth = disc(image.shape, 150, 200, 90)
    paint(image, truth, PENS["green"])
    assert not found(image).tissue.any()
    assert overlap(found(image, pens=("blue", "red", "black")).tissue, truth) > 0.9


def test_grey_things_are_not_tissue():
    """Dust, a coverslip's edge, a shadow: they darken all colours alike."""
    image = glass()
    for y, x in ((50, 60), (200, 330), (270, 20)):
        paint(image, disc(image.shape, y, x, 6), (120, 120, 119))
    image[:, 180:183] = (90, 90, 90)
    image[220:, :] = (image[220:, :] * 0.85).astype(np.uint8)
    assert not found(image).tissue.any()


def test_a_coloured_fringe_is_too_thin_to_be_tissue():
    image = glass()
    image[:, 180:183] = (200, 150, 190)
    assert not found(image).tissue.any()


def test_a_black_scanner_border_is_neither_tissue_nor_pen():
    image = glass()
    truth = disc(image.shape, 150, 220, 70)
    paint(image, truth, STAINS["haematoxylin and eosin"])
    image[:, :60] = (3, 2, 4)
    image[270:] = (3, 2, 4)
    result = found(image)
    assert not result.pen.any()
    assert overlap(result.tissue, truth) > 0.9


def test_blank_glass_holds_nothing():
    result = found(glass())
    assert not result.tissue.any()
    assert not result.pen.any()


def test_a_slide_that_is_all_tissue_is_all_tissue():
    image = glass()
    paint(image, np.ones(image.shape[:2], bool), STAINS["brain, eosin only"])
    assert found(image).tissue.all()


def test_small_lumens_are_tissue_and_large_ones_are_glass():
    image = glass()
    tissue = disc(image.shape, 150, 200, 130)
    paint(image, tissue, STAINS["haematoxylin and eosin"])
    small, large = disc(image.shape, 150, 130, 15), disc(image.shape, 150, 250, 50)
    image[small | large] = GLASS
    result = found(image)
    assert result.tissue[small].all()
    assert result.tissue[disc(image.shape, 150, 250, 45)].mean() == 0


def test_the_lamp_does_not_matter():
    """A darker, yellower lamp multiplies every pixel; densities against its own glass stay the same."""
    image = glass()
    paint(image, disc(image.shape, 150, 200, 90), STAINS["pale immunostain"])
    yellow = (image * np.array([0.97, 0.96, 0.93])).astype(np.uint8)
    assert overlap(found(image).tissue, found(yellow).tissue) > 0.97


def test_a_finer_thumbnail_gives_the_same_map():
    image = glass()
    paint(image, disc(image.shape, 150, 200, 90), STAINS["haematoxylin and eosin"])
    fine = np.repeat(np.repeat(image, 4, axis=0), 4, axis=1)
    coarse, finer = found(image), find_tissue(fine, 1.0, MPP / 4)
    assert finer.scale == 4.0
    np.testing.assert_array_equal(coarse.tissue, finer.tissue)


def test_fractions_of_parts_add_up_to_the_whole():
    """Whatever the grid, tissue is neither lost between boxes nor counted twice."""
    rng = np.random.default_rng(1)
    tissue = rng.random((40, 60)) < 0.3
    where = TissueMap(tissue, ~tissue, scale=7.3)
    whole = Box(0, 0, 438, 292)
    for size in (1, 2, 73, 146):
        if whole.width % size or whole.height % size:
            continue
        parts = list(whole.split(size)) if size > 2 else [Box(0, 0, 219, 292), Box(219, 0, 219, 292)]
        total = sum(where.tissue_fraction(box) * box.area for box in parts)
        assert total == pytest.approx(tissue.sum() * 7.3**2, rel=1e-9)
    assert where.tissue_fraction(whole) + where.pen_fraction(whole) == pytest.approx(1)


def test_there_is_no_tissue_outside_of_the_slide():
    where = TissueMap(np.ones((10, 10), bool), np.zeros((10, 10), bool), scale=8)
    assert where.tissue_fraction(Box(80, 0, 40, 40)) == 0
    assert where.tissue_fraction(Box(60, 0, 40, 80)) == pytest.approx(0.5)


def test_a_wrong_array_is_refused():
    with pytest.raises(ValueError, match="uint8"):
        find_tissue(np.zeros((10, 10, 3), np.float32), 1.0)


def texture() -> np.ndarray:
    rng = np.random.default_rng(2)
    nuclei = ndimage.gaussian_filter((rng.random((512, 512)) < 0.004).astype(np.float32), 2.0) > 0.01
    return np.where(nuclei[..., None], (90, 60, 130), (210, 150, 190)).astype(np.uint8)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image.astype(np.float32), (sigma, sigma, 0)).round().astype(np.uint8)


def test_sharpness_falls_with_blur_and_ignores_contrast_and_glass():
    image = texture()
    steps = [sharpness_of(blurred(image, sigma)) for sigma in (0, 1, 2, 3, 5)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 0.8 > 0.5 > steps[4]
    pale = (200 + image * 0.2).astype(np.uint8)
    assert sharpness_of(pale) == pytest.approx(steps[0], rel=0.1)  # rounding to 8 bits
    half = image.copy()
    half[256:] = GLASS
    assert sharpness_of(half) == pytest.approx(steps[0], rel=0.15)


def test_noise_does_not_pass_for_detail():
    """The camera's noise adds the same to every difference, and cancels."""
    image = blurred(texture(), 5).astype(np.float32)
    noisy = image + np.random.default_rng(3).normal(0, 3, image.shape)
    assert sharpness_of(np.clip(noisy, 0, 255).astype(np.uint8)) < 0.5


def test_a_plain_tile_has_no_sharpness():
    assert sharpness_of(np.full((64, 64, 3), 200, np.uint8)) == 0.0


def close_up(shared_data: Path, name: str, mpp: float) -> TissueMap:
    pixels = np.asarray(Image.open(shared_data / name).convert("RGB"))
    return find_tissue(pixels, 1.0, mpp)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("no-tissue-green-pen", 0.6),
        ("no-tissue-red-pen", 0.4),
        ("medium-nuclei-score-green-pen-level1", 0.3),
        ("very-low-nuclei-score-red-pen-level1", 0.3),
    ],
)
def test_real_pen_marks_are_found(shared_data, name, least):
    assert close_up(shared_data, f"histolab_tcga_tiles/{name}.jpg", 1.0).pen.mean() > least


@pytest.mark.parametrize("name", ["no-tissue", "no-tissue2", "no-tissue-line", "no-tissue-green-pen"])
def test_real_glass_dust_and_coverslips_are_no_tissue(shared_data, name):
    assert close_up(shared_data, f"histolab_tcga_tiles/{name}.jpg", 1.0).tissue.mean() < 0.02


def test_real_tissue_is_no_pen(shared_data):
    """Bone, blood, blue white balance and pigment have been mistaken for ink before."""
    sets = {
        "osteosarcoma/*/*": 1.0,
        "oral_hires/*": 0.25,
        "brecahad/images/*": 0.25,
        "crc_val_he_7k/*/*": 0.5,
    }
    checked = [
        (path, mpp) for pattern, mpp in sets.items() for path in sorted(shared_data.glob(pattern))[::4]
    ]
    assert len(checked) > 30
    marked = [path.name for path, mpp in checked if close_up(shared_data, str(path), mpp).pen.mean() > 0.01]
    assert marked == []


def test_the_prostate_section_keeps_its_tissue_and_loses_its_pen(shared_data):
    from pixcell.data.slides import Slide

    with Slide.open(shared_data / "wsi" / "prostate_whole_section_lowres.tiff", source_mpp=8.0) as slide:
        where = find_tissue(slide.thumbnail(1024), slide.width / 1024, slide.mpp)
        height, width = slide.height, slide.width

    def box(x: float, y: float) -> Box:
        return Box(round(x * width), round(y * height), 80, 80)

    for place in ((0.3, 0.55), (0.75, 0.75), (0.35, 0.15), (0.75, 0.4), (0.45, 0.5)):
        assert where.tissue_fraction(box(*place)) > 0.8, place  # stroma, glands with lumens, nodule
    for place in ((0.1, 0.8), (0.6, 0.75), (0.5, 0.7), (0.95, 0.1)):
        assert where.tissue_fraction(box(*place)) < 0.05, place  # glass between and around
    for place in ((0.3, 0.03), (0.555, 0.33), (0.46, 0.065), (0.01, 0.16)):
        assert where.pen_fraction(box(*place)) > 0.3, place  # green on glass and tissue, blue


@pytest.mark.parametrize("radius", [0, 1, 2.4, 7, 38])
def test_growing_by_doubled_stretches_is_the_maximum_over_a_square(radius):
    from scipy import ndimage

    from pixcell.data.tissue import _grown

    mask = np.random.default_rng(0).random((90, 140)) > 0.97
    square = ndimage.maximum_filter(mask, 2 * round(radius) + 1, mode="nearest")
    np.testing.assert_array_equal(_grown(mask, radius), square)
