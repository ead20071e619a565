"""The published layout goes into a store and comes out again, byte for byte."""

import csv

import h5py
import numpy as np
import pytest

from pixcell.data.published_index import read_index, slides_in
from pixcell.data.store import TileStore
from pixcell.data.tiling import Tile
from pixcell.errors import MissingColumn, OutputError, SomeFailed, StoreError, StoreMismatch
from pixcell.tasks.published import export_published_layout, import_published_layout
from published import (
    INDEX,
    NAMES,
    embeddings_of,
    latents_of,
    write_published,
    write_published_index,
)
from stores import jpeg_of


def files(root) -> dict[str, bytes]:
    found = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != INDEX}


@pytest.fixture
def published(tmp_path):
    return write_published(tmp_path / "published")


@pytest.fixture
def store(published, tmp_path):
    import_published_layout(published, tmp_path / "store", workers=1)
    return TileStore.open(tmp_path / "store")


@pytest.mark.parametrize("features", ["patches", "features"])
def test_there_and_back_is_lossless(tmp_path, features):
    """Every byte of every image and array, and the order of the index."""
    published = write_published(tmp_path / "published", features=features)
    done = import_published_layout(published, tmp_path / "store", workers=1)
    assert (done.num_slides, done.num_tiles) == (4, 5)
    assert TileStore.open(tmp_path / "store").verify() == []

    place = "beside" if features == "patches" else "features"
    export_published_layout(tmp_path / "store", tmp_path / "back", features_in=place, workers=1)
    assert files(tmp_path / "back") == files(published)
    assert read_index(tmp_path / "back") == read_index(published) == NAMES


def test_the_index_is_written_as_byte_strings_per_source(store, tmp_path):
    export_published_layout(store.path, tmp_path / "back", workers=1)
    with h5py.File(tmp_path / "back" / INDEX) as file:
        assert sorted(file) == ["gtex_1024", "tcga_diagnostic_1024"]
        assert file["gtex_1024"].dtype.kind == "S"
        assert file["tcga_diagnostic_1024"][()].tolist() == [
            name.encode() for name in NAMES["tcga_diagnostic"]
        ]


def test_slides_of_one_name_get_their_cohort_in_front(store):
    assert store.slide_ids() == [
        "Leber 1",
        "TCGA-A",
        "tcga_diagnostic__brca__TCGA-B",
        "tcga_diagnostic__lihc__TCGA-B",
    ]
    rows = {row["name"]: row for row in store.index().to_pylist()}
    row = rows["tcga_diagnostic/lihc/single_1024/TCGA-A/82_17.jpeg"]
    assert (row["x"], row["y"], row["source"], row["cohort"]) == (82, 17, "tcga_diagnostic", "lihc")


def test_a_field_of_the_store_is_the_crop_of_the_published_array(store):
    """Crop (1, 3) of the 4 x 4 grid: rows 32 to 64 and columns 96 to 128 of the latents, embedding 7."""
    latents, embeddings = store.column("latents-sd3"), store.column("embeddings-uni2-h")
    expected = latents_of(2)[:, 32:64, 96:128]
    found = latents.read("TCGA-A", 1)[1, 3]
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(embeddings.read("TCGA-A", 1)[1, 3], embeddings_of(2)[7])


def test_what_the_layout_does_not_record_is_said_not_guessed(store):
    assert store.column("embeddings-uni2-h").made_by["encoder"]["sha256"] == "not recorded"
    assert store.column("latents-sd3").made_by["codec"]["sha256"] == "not recorded"


def test_import_and_export_can_be_repeated(published, store, tmp_path):
    before = files(store.path)
    import_published_layout(published, store.path, workers=1)
    assert files(store.path) == before
    export_published_layout(store.path, tmp_path / "back", workers=1)
    (tmp_path / "back" / INDEX).unlink()
    export_published_layout(store.path, tmp_path / "back", workers=1)
    assert files(tmp_path / "back") == files(published)


def test_two_workers_import_the_same_bytes(published, store, tmp_path):
    import_published_layout(published, tmp_path / "again", workers=2)
    assert files(tmp_path / "again") == files(store.path)


def test_images_alone_and_one_source_alone_can_be_imported(published, tmp_path):
    for path in published.rglob("*.npy"):
        path.unlink()
    done = import_published_layout(
        published, tmp_path / "store", latents=False, embeddings=False, sources=["gtex"], workers=1
    )
    assert done.columns == ("images",)
    assert TileStore.open(tmp_path / "store").slide_ids() == ["Leber 1"]
    with pytest.raises(StoreError, match="no source 'cptac'; it has gtex, tcga_diagnostic"):
        import_published_layout(published, tmp_path / "store", sources=["cptac"])


# ── folders that are not as published ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    [
        "../../secret/single_1024/S/1_1.jpeg",
        "a/b/single_1024/../../../../1_1.jpeg",
        "/etc/b/single_1024/S/1_1.jpeg",
        "a/./b/single_1024/S/1_1.jpeg",
        "a\\..\\b/c/single_1024/S/1_1.jpeg",
        "a/b/single_1024/S/1_1.jpeg\n",
    ],
)
def test_a_name_that_leads_outside_is_not_followed(published, tmp_path, name):
    write_published_index(published, {"gtex": [name]})
    with pytest.raises(StoreError, match="not a plain path below patches/"):
        import_published_layout(published, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "name",
    ["a/b/single_512/S/1_1.jpeg", "a/b/single_1024/S/first.jpeg", "S/1_1.jpeg", "a/b/single_1024/S/1_1.png"],
)
def test_a_name_of_another_form_is_an_error(published, name):
    write_published_index(published, {"gtex": [name]})
    with pytest.raises(StoreError, match="not of the form"):
        read_index(published)


def test_a_folder_without_a_usable_index_says_what_is_missing(published, tmp_path):
    with pytest.raises(StoreError, match=r"not in the published layout.*patch_names_all\.hdf5"):
        read_index(tmp_path)
    write_published_index(published, {"gtex": [NAMES["gtex"][0]] * 2})
    with pytest.raises(StoreError, match="more than once"):
        read_index(published)
    with h5py.File(published / INDEX, "w") as file:
        file["gtex_256"] = np.array([b"x"])
    with pytest.raises(StoreError, match="no dataset named <source>_1024; it has: gtex_256"):
        read_index(published)
    (published / INDEX).write_bytes(b"no HDF5")
    with pytest.raises(StoreError, match="cannot be read as a published index"):
        read_index(published)


def spoil_missing_image(image, latents):
    image.unlink()


def spoil_small_image(image, latents):
    image.write_bytes(jpeg_of(0, size=256))


def spoil_text_image(image, latents):
    image.write_text("no picture")


def spoil_missing_latents(image, latents):
    latents.unlink()


def spoil_shape(image, latents):
    np.save(latents, np.zeros((16, 128, 128), np.float16))


def spoil_dtype(image, latents):
    np.save(latents, np.zeros((32, 128, 128), np.float32))


def spoil_truncated(image, latents):
    latents.write_bytes(latents.read_bytes()[:-1000])


def spoil_empty(image, latents):
    latents.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_missing_image, "there is no such file"),
        (spoil_small_image, "256 x 256 px; published tiles are 1024 px"),
        (spoil_text_image, "cannot be read as a JPEG"),
        (spoil_missing_latents, "has no _sd3_vae.npy"),
        (spoil_shape, "holds (16, 128, 128) float16; a published _sd3_vae.npy holds (32, 128, 128) float16"),
        (spoil_dtype, "float32"),
        (spoil_truncated, "cannot be read as an array"),
        (spoil_empty, "cannot be read as an array"),
    ],
)
def test_one_bad_tile_fails_its_slide_and_no_other(published, tmp_path, spoil, reason):
    stem = published / "patches" / NAMES["tcga_diagnostic"][2].removesuffix(".jpeg")
    spoil(stem.with_name(f"{stem.name}.jpeg"), stem.with_name(f"{stem.name}_sd3_vae.npy"))
    with pytest.raises(SomeFailed, match="1 of the slides failed"):
        import_published_layout(published, tmp_path / "store", workers=1)
    with (tmp_path / "store" / "reports" / "import-failures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == ["TCGA-A"]
    assert reason in rows[0]["reason"]
    store = TileStore.open(tmp_path / "store")
    assert len(store.slide_ids("latents-sd3")) == 3
    assert store.verify() == []
    write_published(published)
    import_published_layout(published, tmp_path / "store", workers=1)
    assert not (tmp_path / "store" / "reports" / "import-failures.csv").exists(), "nothing fails any more"


def test_features_in_both_places_are_not_chosen_from_in_silence(published, tmp_path):
    write_published(published, features="features")
    with pytest.raises(SomeFailed, match="both beside the image and below features/"):
        import_published_layout(published, tmp_path / "store", workers=1)
    import_published_layout(published, tmp_path / "store", features_in="beside", workers=1)


# ── stores that do not fit the layout ────────────────────────────────────────────────────────────


def own_store(path, tile_size=1024, channels=32, dim=1536, columns=("latents", "embeddings")):
    store = TileStore.create(path, {"tile_size": tile_size, "mpp": 0.5})
    tile = Tile("S Ω", 4096, 2048, tile_size, 0.5, 1.0, 0.0, 1.0)
    store.write_images("S Ω", [(tile, jpeg_of(0, tile_size))], {"fingerprint": "1"})
    shapes = {"latents": (4, 4, channels, 32, 32), "embeddings": (4, 4, dim)}
    for kind in columns:
        records = np.zeros((1, *shapes[kind]), np.float16)
        facts = {"shape": shapes[kind], "dtype": "float16", "made_by": {"kind": kind}, "num_tiles": 1}
        store.write_column(f"{kind}-own", "S Ω", [records], **facts)
    return store


def test_a_store_of_own_slides_is_exported_under_the_given_source(tmp_path):
    store = own_store(tmp_path / "store")
    export_published_layout(store.path, tmp_path / "out", source="others", cohort="mine", workers=1)
    name = "others/mine/single_1024/S Ω/4096_2048"
    assert read_index(tmp_path / "out") == {"others": [f"{name}.jpeg"]}
    assert np.load(tmp_path / "out" / "patches" / f"{name}_sd3_vae.npy").shape == (32, 128, 128)
    assert [slide.slide_id for slide in slides_in(read_index(tmp_path / "out"))] == ["S Ω"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tile_size": 512}, StoreMismatch, "tiles of 512 px; the published layout knows only 1024"),
        ({"columns": ["latents"]}, MissingColumn, r"no column of embeddings.*_uni\.npy"),
        ({"columns": ["embeddings"]}, MissingColumn, "no column of latents"),
        ({"channels": 8}, MissingColumn, "16-channel autoencoder"),
        ({"dim": 768}, MissingColumn, "UNI2-h"),
    ],
)
def test_a_store_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, options, error, match):
    store = own_store(tmp_path / "store", **options)
    with pytest.raises(error, match=match):
        export_published_layout(store.path, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_column_that_does_not_fit_or_is_incomplete_is_refused_by_name(store, tmp_path):
    with pytest.raises(StoreMismatch, match="'embeddings-uni2-h' holds records"):
        export_published_layout(store.path, tmp_path / "out", latents_column="embeddings-uni2-h")
    for path in (store.path / "latents-sd3").glob("TCGA-A.*"):
        path.unlink()
    with pytest.raises(MissingColumn, match="lacks 1 slides"):
        export_published_layout(store.path, tmp_path / "out")


def test_a_source_that_leads_outside_is_refused(tmp_path):
    store = own_store(tmp_path / "store")
    with pytest.raises(SomeFailed, match="not a plain path"):
        export_published_layout(store.path, tmp_path / "out", source="..", workers=1)
    assert not (tmp_path / "others").exists()
    assert not list((tmp_path / "out").rglob("*.jpeg"))


def test_other_files_are_never_overwritten(store, tmp_path):
    other = tmp_path / "out" / "patches" / NAMES["gtex"][0]
    other.parent.mkdir(parents=True)
    other.write_bytes(b"someone's")
    with pytest.raises(SomeFailed, match="exists with other content"):
        export_published_layout(store.path, tmp_path / "out", workers=1)
    assert other.read_bytes() == b"someone's"
    assert not (tmp_path / "out" / INDEX).exists()

    write_published_index(tmp_path / "full", {"gtex": NAMES["gtex"]})
    with pytest.raises(OutputError, match="names other tiles"):
        export_published_layout(store.path, tmp_path / "full", workers=1)
