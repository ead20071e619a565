"""Sets are read whole, in order, by one colour rule, and refused where no resizing makes them alike."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from pixcell.data.store import TileStore
from pixcell.data.tiling import Tile
from pixcell.errors import EvaluationError, UnreadableSlide
from pixcell.evaluation.pictures import PictureSet, check_comparable, fields_of, pairs_of, reading
from pixcell.files import sha256_of
from pixcell.provenance import save_synthetic_png


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def random_images(count, height=80, width=80, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture
def store(tmp_path, tissue):
    """A store of two slides with tiles of 96 pixels."""
    import io

    store = TileStore.create(tmp_path / "store", {"mpp": 0.5, "tile_size": 96})
    for slide in ("one", "two"):
        records = []
        for row, image in enumerate(tissue[:6]):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, format="JPEG", quality=95)
            tile = Tile(slide, row * 96, 0, 96, 0.5, 1.0, 0.0, 1.0, name=f"{slide}-{row}.png", attributes={})
            records.append((tile, buffer.getvalue()))
        store.write_images(slide, records, {"name": slide})
    return store


def test_a_folder_is_read_in_the_order_of_names_with_folders_below_it(tmp_path):
    for index, name in enumerate(
        ["b/2.png", "a.png", "b/1.jpg", ".hidden.png", ".cache/x.png", "notes.txt.png"]
    ):
        save(tmp_path / name, random_images(1, seed=index)[0])
    (tmp_path / "readme.txt").write_text("no picture")
    assert [each.name for each in PictureSet.open(tmp_path).pictures] == [
        "a.png", "b/1.jpg", "b/2.png", "notes.txt.png",
    ]  # fmt: skip


def test_pixels_come_out_as_they_are(tmp_path):
    images = random_images(3)
    for number, image in enumerate(images):
        save(tmp_path / f"{number}.png", image)
    pictures = PictureSet.open(tmp_path)
    for picture, image in zip(pictures.pictures, images, strict=True):
        np.testing.assert_array_equal(pictures.read(picture), image)


def test_alpha_grey_palette_and_16_bits_become_rgb(tmp_path):
    rgba = np.full((80, 80, 4), [200, 100, 50, 0], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    Image.fromarray(np.full((80, 80), 128, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((80, 80, 3), [10, 20, 30], np.uint8)).quantize(4).save(tmp_path / "palette.png")
    tifffile.imwrite(tmp_path / "sixteen.tif", np.full((80, 80, 3), 0x80FF, np.uint16), photometric="rgb")
    pictures = PictureSet.open(tmp_path)
    found = {each.name: pictures.read(each)[40, 40].tolist() for each in pictures.pictures}
    assert found == {
        "alpha.png": [255, 255, 255],
        "grey.png": [128, 128, 128],
        "palette.png": [10, 20, 30],
        "sixteen.tif": [128, 128, 128],
    }


def test_contact_sheets_are_no_samples(tmp_path):
    for name in ("0.png", "1.png", "contact_sheet.png"):
        save(tmp_path / name, random_images(1)[0])
    pictures = PictureSet.open(tmp_path)
    assert len(pictures) == 2
    assert pictures.left_out == ["contact_sheet.png"]


def test_tiles_of_a_store_are_pictures_grouped_by_slide(store, tissue):
    pictures = PictureSet.open(store.path)
    assert (pictures.kind, len(pictures), pictures.mpp) == ("store", 12, [0.5])
    assert {each.group for each in pictures.pictures} == {"one", "two"}
    read = pictures.read(pictures.pictures[7])
    assert np.abs(read.astype(int) - tissue[1]).mean() < 4  # JPEG of quality 95


def test_reading_keeps_the_order_and_ends_early_without_reading_on():
    started = []

    def slow(number):
        started.append(number)
        return number * number

    values = reading(range(10_000), slow)
    assert [next(values) for _ in range(5)] == [0, 1, 4, 9, 16]
    values.close()
    assert len(started) < 1000


def test_a_random_choice_is_the_same_for_the_same_seed(tmp_path):
    for number in range(20):
        save(tmp_path / f"{number:02d}.png", random_images(1)[0])
    pictures = PictureSet.open(tmp_path)
    chosen = [[each.name for each in pictures.chosen(8, seed).pictures] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 8
    assert chosen[0] == sorted(chosen[0])
    assert pictures.chosen(None, 0) is pictures


def test_fields_are_a_centred_grid():
    image = np.zeros((150, 200, 3), np.uint8)
    image[(150 - 64) // 2, (200 - 192) // 2] = 255
    fields = fields_of(image, 64)
    assert len(fields) == 2 * 3
    fields = fields_of(image[:100], 64)
    assert len(fields) == 3
    assert fields_of(image, None)[0] is image


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    for number in range(3):
        save(tmp_path / f"{number}.png", random_images(1)[0])
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(UnreadableSlide, match=r"broken\.png"):
        PictureSet.open(tmp_path)


def test_a_truncated_jpeg_is_named_when_its_pixels_are_needed(tmp_path):
    save(tmp_path / "cut.jpg", random_images(1, 200, 200)[0])
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableSlide, match=r"cut\.jpg"):
        [pictures.read(each) for pictures in [PictureSet.open(tmp_path)] for each in pictures.pictures]


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="holds no pictures"):
        PictureSet.open(tmp_path)
    with pytest.raises(EvaluationError, match="there is no"):
        PictureSet.open(tmp_path / "nowhere")


def sets(tmp_path, real, synthetic):
    """Two folders of pictures, of the sizes given."""
    for name, sizes in (("real", real), ("synthetic", synthetic)):
        for number, (height, width) in enumerate(sizes):
            save(tmp_path / name / f"{number}.png", random_images(1, height, width, seed=number)[0])
    return PictureSet.open(tmp_path / "real"), PictureSet.open(tmp_path / "synthetic")


def test_a_folder_is_not_compared_with_itself_or_with_what_it_contains(tmp_path):
    save(tmp_path / "a" / "x.png", random_images(1)[0])
    save(tmp_path / "a" / "b" / "x.png", random_images(1)[0])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    outer = PictureSet.open(tmp_path / "a")
    with pytest.raises(EvaluationError, match="lies inside"):
        check_comparable(outer, PictureSet.open(tmp_path / "a" / "b"), None)
    with pytest.raises(EvaluationError, match="the same folder"):
        check_comparable(outer, PictureSet.open(tmp_path / "link"), None)


def test_one_picture_is_no_set(tmp_path):
    with pytest.raises(EvaluationError, match=r"SYNTHETIC .* holds 1 picture;.*at least 2"):
        check_comparable(*sets(tmp_path, [(80, 80)] * 2, [(80, 80)]), None)


def test_unlike_shapes_are_refused_and_fields_are_the_way_out(tmp_path):
    unlike = sets(tmp_path, [(80, 80)] * 2, [(80, 120)] * 2)
    with pytest.raises(EvaluationError, match=r"unlike shape .*80 x 80.*120 x 80.*field_size=256"):
        check_comparable(*unlike, None)
    assert check_comparable(*unlike, 64) == []


def test_unlike_sizes_of_one_shape_are_a_warning(tmp_path):
    warnings = check_comparable(*sets(tmp_path, [(80, 80), (96, 96)], [(160, 160)] * 2), None)
    assert any("2 different sizes" in warning for warning in warnings)
    assert any("differ in size" in warning for warning in warnings)


def test_a_field_larger_than_a_picture_is_refused_with_the_largest_that_fits(tmp_path):
    with pytest.raises(EvaluationError, match=r"smaller than a field of 128 px .*at most 80"):
        check_comparable(*sets(tmp_path, [(80, 90)] * 2, [(160, 160)] * 2), 128)


def test_pairs_are_found_by_what_the_records_say(real, synthetic):
    pairs, found_by, warnings = pairs_of(PictureSet.open(real), PictureSet.open(synthetic))
    assert (len(pairs), found_by, warnings) == (12, "like", [])
    assert all(one.name == f"case-{int(other.name[:5]):02d}.png" for one, other in pairs)


def test_pairs_are_found_by_file_names_where_there_are_no_records(tmp_path):
    for name in ("real/a.jpg", "real/b.jpg", "synthetic/b.png", "synthetic/c.png"):
        save(tmp_path / name, random_images(1)[0])
    pairs, found_by, _ = pairs_of(PictureSet.open(tmp_path / "real"), PictureSet.open(tmp_path / "synthetic"))
    assert [(one.name, other.name) for one, other in pairs] == [("b.jpg", "b.png")]
    assert found_by == "file name"


def test_pairs_with_tiles_of_a_store_are_found_by_the_name_they_came_in_with(store, tmp_path):
    save(tmp_path / "synthetic" / "two-3.png", random_images(1, 96, 96)[0])
    pairs, _, _ = pairs_of(PictureSet.open(store.path), PictureSet.open(tmp_path / "synthetic"))
    assert [one.name for one, _ in pairs] == ["two/288_0"]


def test_a_name_that_fits_several_real_pictures_makes_no_pair(tmp_path):
    for name in ("real/x/a.png", "real/y/a.png", "synthetic/a.png"):
        save(tmp_path / name, random_images(1)[0])
    pairs, found_by, warnings = pairs_of(
        PictureSet.open(tmp_path / "real"), PictureSet.open(tmp_path / "synthetic")
    )
    assert (pairs, found_by) == ([], None)
    assert "fits several real pictures" in warnings[0]


def test_a_checksum_tells_apart_references_of_one_name(tmp_path):
    images = random_images(2)
    for folder, image in zip("xy", images, strict=True):
        save(tmp_path / "real" / folder / "a.png", image)
    digest = sha256_of(tmp_path / "real" / "y" / "a.png")
    save_synthetic_png(tmp_path / "synthetic" / "0.png", images[0], {"like": "a.png", "like_sha256": digest})
    pairs, _, warnings = pairs_of(PictureSet.open(tmp_path / "real"), PictureSet.open(tmp_path / "synthetic"))
    assert [one.name for one, _ in pairs] == ["y/a.png"]
    assert warnings == []
