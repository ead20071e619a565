"""A folder of slides becomes a store; the same command again changes nothing."""

import csv
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixcell.data.metadata import read_metadata
from pixcell.data.store import TileStore
from pixcell.data.tiling import TilingConfig, TilingRecipe
from pixcell.errors import MetadataError, SomeFailed, StoreMismatch
from pixcell.tasks.tile import _slide_ids, tile_slides

RECIPE = TilingRecipe(name="test", tiling=TilingConfig(tile_size=256))


@pytest.fixture
def slides(drawn_slide, tmp_path) -> Path:
    """Two slides with awkward names, and a file that is no slide."""
    folder = tmp_path / "slides"
    (folder / "Fall 2").mkdir(parents=True)
    shutil.copy(drawn_slide.path, folder / "Fall 2" / "Präparat 1 組織.tiff")
    with Image.open(drawn_slide.path) as image:
        image.crop((300, 300, 1500, 1300)).save(folder / "b.png")
    (folder / "notes.txt").write_text("not a slide")
    return folder


def digests(store: Path) -> dict[str, str]:
    files = [path for path in sorted(store.rglob("*")) if path.is_file()]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tiled(slides: Path, store: Path, **options: object):
    return tile_slides(slides, store, RECIPE, source_mpp=0.5, **{"workers": 1, **options})


def test_every_slide_gets_tiles_a_picture_and_a_line(slides, tmp_path):
    result = tiled(slides, tmp_path / "store")
    assert [each.slide for each in result.slides] == ["Präparat 1 組織", "b"]
    store = TileStore.open(tmp_path / "store")
    assert sorted(store.slide_ids()) == ["Präparat 1 組織", "b"]
    assert store.num_tiles == result.num_tiles > 8
    for slide_id in store.slide_ids():
        Image.open(tmp_path / "store" / "qc" / f"{slide_id}.jpg").verify()
    with (tmp_path / "store" / "reports" / "tiling.csv").open(encoding="utf-8") as file:
        lines = {line["slide"]: line for line in csv.DictReader(file)}
    for each in result.slides:
        assert int(lines[each.slide]["kept"]) == each.num_tiles == len(store.images(each.slide))
        assert lines[each.slide]["status"] == "tiled"
    assert not (tmp_path / "store" / "reports" / "tiling-failures.csv").exists()


def test_the_store_remembers_what_became_of_every_candidate(slides, tmp_path):
    """Counts are known only when the last tile is written; the shard must hold the final ones."""
    tiled(slides, tmp_path / "store")
    shard = TileStore.open(tmp_path / "store").images("Präparat 1 組織")
    assert shard.slide["counts"]["kept"] == len(shard)
    assert sum(shard.slide["counts"].values()) == 64
    assert shard.slide["mpp"] == 0.5
    assert shard.image(0).shape == (256, 256, 3)


def test_the_same_command_again_changes_no_byte(slides, tmp_path):
    tiled(slides, tmp_path / "store")
    before = digests(tmp_path / "store")
    again = tiled(slides, tmp_path / "store")
    assert {each.status for each in again.slides} == {"was there"}
    assert digests(tmp_path / "store") == before


def test_workers_change_no_byte(slides, tmp_path):
    tiled(slides, tmp_path / "one", workers=1)
    tiled(slides, tmp_path / "two", workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_store_of_another_tiling_is_refused_and_says_what_differs(slides, tmp_path):
    tiled(slides / "b.png", tmp_path / "store")
    before = digests(tmp_path / "store")
    other = RECIPE.with_changes(tiling=RECIPE.tiling.with_changes(min_tissue=0.7))
    with pytest.raises(StoreMismatch, match="min_tissue"):
        tile_slides(slides, tmp_path / "store", other, source_mpp=0.5, workers=1)
    assert digests(tmp_path / "store") == before


def test_a_slide_that_changed_under_its_name_is_not_passed_over(slides, tmp_path):
    tiled(slides / "b.png", tmp_path / "store")
    with Image.open(slides / "b.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(slides / "b.png")
    with pytest.raises(SomeFailed, match=r"another slide has this name.*delete"):
        tiled(slides / "b.png", tmp_path / "store")


def test_a_damaged_shard_of_an_earlier_run_does_not_hide_what_this_one_did(slides, tmp_path):
    tiled(slides / "b.png", tmp_path / "store")
    shard = tmp_path / "store" / "images" / "b.h5"
    shard.write_bytes(shard.read_bytes()[:-100])
    (slides / "b.png").rename(tmp_path / "b.png")
    tiled(slides, tmp_path / "store")
    with (tmp_path / "store" / "reports" / "tiling.csv").open(encoding="utf-8") as file:
        lines = {row["slide"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}
    assert lines["Präparat 1 組織"] == ("tiled", "")
    assert lines["b"][0] == "failed"
    assert "does not end in its checksum" in lines["b"][1]


def test_another_resolution_for_a_finished_slide_is_not_passed_over(slides, tmp_path):
    tiled(slides / "b.png", tmp_path / "store")
    with pytest.raises(SomeFailed, match=r"mpp 0\.5, now it has 0\.25"):
        tile_slides(slides / "b.png", tmp_path / "store", RECIPE, source_mpp=0.25, workers=1)


def test_the_table_gives_resolution_and_labels(slides, tmp_path):
    table = tmp_path / "cohort.csv"
    table.write_text(
        "\ufeffslide,mpp,organ,stain\nb.png,0.5,breast,HE\nPräparat 1 組織,,skin,\n", encoding="utf-8"
    )
    tile_slides(slides, tmp_path / "store", RECIPE, metadata=table, workers=1)
    store = TileStore.open(tmp_path / "store")
    assert store.images("b").tiles[0]["attributes"] == {"organ": "breast", "stain": "HE"}
    assert store.images("b").slide["resolution"] == "given by the user"
    other = store.images("Präparat 1 組織")
    assert other.tiles[0]["attributes"] == {"organ": "skin"}
    assert other.slide["resolution"] != "given by the user"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,mpp\nb,half\n", "line 2: mpp is 'half'"),
        ("slide,mpp\nb,-0.5\n", "positive number"),
        ("slide,mpp\nb,nan\n", "positive number"),
        ("name,mpp\nb,0.5\n", "no column 'slide'; its columns are: name, mpp"),
        ("slide;mpp\nb;0.5\n", "separated by ';'"),
        ("slide,mpp\nb,0.5\nb.png,0.5\n", "lines 2 and 3 are both about b.png"),
        ("slide,mpp\nc,0.5\n", "line 2: there is no 'c' under"),
        ("slide,mpp\nb\n", "line 2: the number of cells"),
        ("slide,x\nb,1\n", "cannot be called 'x'"),
        ("slide,organ,organ\nb,1,2\n", "'organ' is empty or stands twice"),
        ("", "is empty"),
    ],
)
def test_a_wrong_table_is_refused_before_anything_is_written(slides, tmp_path, text, message):
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(MetadataError, match=message):
        tile_slides(slides, tmp_path / "store", RECIPE, metadata=table, workers=1)
    assert not (tmp_path / "store").exists()


def test_a_table_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "table.csv").write_bytes(b"slide,organ\nb,\xff\xfe\n")
    with pytest.raises(MetadataError, match="UTF-8"):
        read_metadata(tmp_path / "table.csv", "slide")


def test_slides_of_one_name_are_told_apart_by_their_folders(tmp_path):
    root = tmp_path

    def ids(*names: str) -> list[str]:
        return _slide_ids([root / name for name in names], root)

    assert ids("a.svs", "b.svs") == ["a", "b"]
    assert ids("p/a.svs", "q/a.svs", "c.svs") == ["p__a", "q__a", "c"]
    assert ids("p/x/a.svs", "q/x/a.svs") == ["p__x__a", "q__x__a"]
    assert ids("a.svs", "q/a.svs") == ["a", "q__a"]
    assert ids("a.svs", "a.tiff") == ["a.svs", "a.tiff"]
    assert ids("p/A.svs", "q/a.svs") == ["p__A", "q__a"]  # one file on systems that ignore case
    assert ids("tab\there.svs") == ["tab_here"]


def test_a_slide_keeps_its_name_when_a_namesake_joins(slides, tmp_path):
    """Cut alone it is "b"; beside another "b" it would be named after its folder, and be there twice."""
    tiled(slides / "b.png", tmp_path / "store")
    with Image.open(slides / "b.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(slides / "Fall 2" / "b.png")
    result = tiled(slides, tmp_path / "store")
    assert {each.slide: each.status for each in result.slides} == {
        "b": "was there",
        "Fall 2__b": "tiled",
        "Präparat 1 組織": "tiled",
    }


# ── ready-made tiles ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def images(drawn_slide, tmp_path) -> Path:
    """Images in two folders: exact tiles as JPEG, one that is larger, one as PNG."""
    folder = tmp_path / "images"
    with Image.open(drawn_slide.path) as image:
        pixels = image.convert("RGB").crop((600, 600, 1400, 1400))
    for name, size in (("tumour/1.jpg", 256), ("tumour/2.jpg", 256), ("normal/large.png", 600)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels.crop((0, 0, size, size)).save(folder / name)
        pixels = pixels.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return folder


def test_ready_made_images_enter_with_their_labels(images, tmp_path):
    table = tmp_path / "images.csv"
    table.write_text(
        "image,label,organ,mpp\ntumour/1.jpg,tumour,lung,0.5\n"
        "tumour/2.jpg,tumour,,0.5\nnormal/large.png,normal,lung,0.5\n"
    )
    result = tile_slides(images, tmp_path / "store", RECIPE, metadata=table, ready_made=True, workers=1)
    assert {each.slide: each.num_tiles for each in result.slides} == {"normal": 4, "tumour": 2}
    store = TileStore.open(tmp_path / "store")
    tumour = store.images("tumour")
    assert [tile["name"] for tile in tumour.tiles] == ["tumour/1.jpg", "tumour/2.jpg"]
    assert [tile["attributes"] for tile in tumour.tiles] == [
        {"label": "tumour", "organ": "lung"},
        {"label": "tumour"},
    ]
    # 600 px hold two tiles each way, in the middle.
    assert [(tile["x"], tile["y"]) for tile in store.images("normal").tiles] == [
        (44, 44),
        (300, 44),
        (44, 300),
        (300, 300),
    ]
    Image.open(tmp_path / "store" / "qc" / "tumour.jpg").verify()


def test_a_jpeg_that_is_a_tile_keeps_its_bytes(images, tmp_path):
    tile_slides(images, tmp_path / "store", RECIPE, source_mpp=0.5, ready_made=True, workers=1)
    store = TileStore.open(tmp_path / "store")
    assert store.images("tumour").jpeg(0) == (images / "tumour" / "1.jpg").read_bytes()
    stored = store.images("normal").image(0).astype(int)
    original = np.asarray(Image.open(images / "normal" / "large.png")).astype(int)[44:300, 44:300]
    assert np.abs(stored - original).mean() < 3


def test_images_are_gathered_by_the_slide_column(images, tmp_path):
    table = tmp_path / "images.csv"
    table.write_text("image,slide\ntumour/1.jpg,case 1\ntumour/2.jpg,case 2\nnormal/large.png,case 1\n")
    tile_slides(
        images, tmp_path / "store", RECIPE, metadata=table, source_mpp=0.5, ready_made=True, workers=1
    )
    store = TileStore.open(tmp_path / "store")
    assert sorted(store.slide_ids()) == ["case 1", "case 2"]
    assert len(store.images("case 1")) == 5
    before = digests(tmp_path / "store")
    tile_slides(
        images, tmp_path / "store", RECIPE, metadata=table, source_mpp=0.5, ready_made=True, workers=2
    )
    assert digests(tmp_path / "store") == before


def test_an_image_that_is_too_small_is_named_or_left_out_as_asked(images, tmp_path):
    Image.new("RGB", (200, 200), (180, 120, 150)).save(images / "tumour" / "0.png")
    with pytest.raises(SomeFailed, match=r"tumour/0\.png.*200 x 200.*on_unreadable=drop"):
        tile_slides(images, tmp_path / "store", RECIPE, source_mpp=0.5, ready_made=True, workers=1)
    assert TileStore.open(tmp_path / "store").slide_ids() == ["normal"]
    lenient = RECIPE.with_changes(tiling=RECIPE.tiling.with_changes(on_unreadable="drop"))
    result = tile_slides(images, tmp_path / "other", lenient, source_mpp=0.5, ready_made=True, workers=1)
    tumour = next(each for each in result.slides if each.slide == "tumour")
    assert (tumour.num_tiles, tumour.counts["unreadable"]) == (2, 1)
    assert "tumour/0.png" in tumour.reason


def test_ready_made_images_are_filtered_only_on_request(images, tmp_path):
    Image.new("RGB", (256, 256), (243, 243, 243)).save(images / "normal" / "glass.png")
    everything = tile_slides(images, tmp_path / "all", RECIPE, source_mpp=0.5, ready_made=True, workers=1)
    strict = RECIPE.with_changes(tiling=RECIPE.tiling.with_changes(filter_ready_made=True))
    filtered = tile_slides(images, tmp_path / "some", strict, source_mpp=0.5, ready_made=True, workers=1)
    assert everything.num_tiles == 7
    assert filtered.num_tiles < 7
    assert sum(each.counts["glass"] for each in filtered.slides) >= 1


def test_ready_made_images_need_a_resolution(images, tmp_path):
    with pytest.raises(SomeFailed, match="--source-mpp"):
        tile_slides(images, tmp_path / "store", RECIPE, ready_made=True, workers=1)


def test_the_five_real_slides(shared_data, tmp_path):
    """Four state their resolution; the fifth needs the table."""
    recipe = TilingRecipe(name="real", tiling=TilingConfig(tile_size=256))
    with pytest.raises(SomeFailed, match="prostate_whole_section_lowres") as caught:
        tile_slides(shared_data / "wsi", tmp_path / "store", recipe, workers=1)
    assert len(caught.value.failures) == 1
    store = TileStore.open(tmp_path / "store")
    counts = {slide_id: len(store.images(slide_id)) for slide_id in store.slide_ids()}
    assert counts.pop("os2_ki67_pyramid") == 9
    assert len(counts) == 3
    assert 30 <= counts["CMU-1-Small-Region"] <= 50
    assert counts["brecahad_fields_montage_pyramid"] > 60
