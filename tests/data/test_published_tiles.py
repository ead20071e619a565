"""The published layout read in place gives what its import into a store gives."""

import numpy as np
import pytest
import torch

from data.tile_source_contract import TileSourceContract
from pixcell.data import published_tiles, sealed
from pixcell.data.datasets import BlockSource, FieldDataset
from pixcell.data.published_layout import PUBLISHED_CODEC
from pixcell.data.published_tiles import PublishedConfig, PublishedSource
from pixcell.data.store import TileStore
from pixcell.errors import CorruptShard, MissingColumn, StoreError
from pixcell.geometry import Box
from pixcell.tasks.published import import_published_layout
from published import NAMES, latents_of, write_published, write_published_index

TINY = PublishedConfig(latents="latents-tiny", embeddings="embeddings-tiny")
COLUMNS = {"latents": "latents-sd3", "embeddings": "embeddings-uni2-h"}


def numbers_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(32, 128, 128)).astype(np.float16)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Five tiles in four slides; they are only read."""
    return write_published(tmp_path_factory.mktemp("published"), latents_of=numbers_of)


class TestPublishedSource(TileSourceContract):
    """A folder in the published layout does what every tile source must do."""

    @pytest.fixture
    def source(self, published):
        return PublishedSource(published, TINY)


@pytest.mark.parametrize("size", [256, 512, 1024])
@pytest.mark.parametrize("window", [0, 4])
def test_every_field_and_its_number_are_those_of_the_imported_store(published, tmp_path, size, window):
    import_published_layout(published, tmp_path / "store", workers=1)
    source = PublishedSource(published)
    if window:
        source.prepare(window)
    ours = FieldDataset(source, size=size, **COLUMNS, images=size == 512)
    theirs = FieldDataset(TileStore.open(tmp_path / "store"), size=size, **COLUMNS, images=size == 512)
    assert len(ours) == len(theirs) == 5 * (1024 // size) ** 2
    for index in range(len(ours)):
        one, other = ours[index], theirs[index]
        assert one["key"] == other["key"]
        for name in one.keys() - {"key"}:
            assert torch.equal(one[name], other[name]), f"{name} of {one['key']}"


def test_its_index_is_that_of_the_imported_store(published, tmp_path):
    import_published_layout(published, tmp_path / "store", latents=False, embeddings=False, workers=1)
    imported = TileStore.open(tmp_path / "store").index()
    assert PublishedSource(published).index().to_pylist() == imported.to_pylist()


def test_any_bits_survive(tmp_path):
    """Infinities and NaNs of every kind among them."""
    source = PublishedSource(write_published(tmp_path))
    out = np.empty((2, 1, 32, 32, 32), np.float16)
    source.column("latents-sd3").read_into(out, "TCGA-A", 1, Box(3, 1, 1, 2))
    expected = latents_of(2)[:, 32:96, 96:128]
    np.testing.assert_array_equal(out[:, 0].transpose(1, 0, 2, 3).reshape(32, 64, 32).view(np.uint16),
                                  expected.view(np.uint16))  # fmt: skip


def test_a_header_of_another_version_is_read(tmp_path):
    write_published(tmp_path)
    path = tmp_path / "patches" / NAMES["gtex"][0].replace(".jpeg", "_sd3_vae.npy")
    array = np.load(path)
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    out = np.empty((4, 4, 32, 32, 32), np.float16)
    source = PublishedSource(tmp_path)
    source.column("latents-sd3").read_into(out, "Leber 1", 0, Box(0, 0, 4, 4))
    np.testing.assert_array_equal(out[2, 3].view(np.uint16), array[:, 64:96, 96:128].view(np.uint16))


def test_a_long_list_of_tiles_makes_blocks_of_several(published, monkeypatch):
    monkeypatch.setattr(published_tiles, "_MOST_BLOCKS", 2)
    source = PublishedSource(published)
    assert source.blocks().tolist() == [0, 0, 0, 1, 1]
    assert source.blocks_at_once == 85


# ── how much is read ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bytes_read(monkeypatch):
    """Bytes that were read, and names of files that were opened."""
    counted: dict[str, list] = {"bytes": [], "opened": []}
    plain, opened = sealed.OpenFile.read_into, published_tiles.OpenFile
    monkeypatch.setattr(
        sealed.OpenFile,
        "read_into",
        lambda file, buffer, offset: (counted["bytes"].append(len(buffer)), plain(file, buffer, offset)),
    )
    monkeypatch.setattr(
        published_tiles, "OpenFile", lambda path: (counted["opened"].append(path.name), opened(path))[1]
    )
    return counted


def test_in_random_order_a_field_reads_a_quarter_of_the_latents_and_its_own_embedding(published, bytes_read):
    dataset = FieldDataset(PublishedSource(published), size=256, **COLUMNS)
    dataset[7]
    latents, headers = 32 * 128 * 128 * 2, 2 * 128
    assert sum(bytes_read["bytes"]) == latents // 4 + 2 * 1536 + headers


@pytest.mark.parametrize("size", [256, 512])
def test_in_windows_of_tiles_each_file_is_read_once(published, bytes_read, size):
    """Not once for each of the fields of a tile."""
    source = PublishedSource(published)
    assert isinstance(source, BlockSource)
    assert source.blocks().tolist() == [0, 1, 2, 3, 4]
    source.prepare(2)
    dataset = FieldDataset(source, size=size, **COLUMNS)
    per_tile = (1024 // size) ** 2
    order = np.random.default_rng(0)
    for window in ([0, 3], [4, 1], [2]):
        fields = [tile * per_tile + field for tile in window for field in range(per_tile)]
        for index in order.permutation(fields):
            dataset[int(index)]
    assert sum(bytes_read["bytes"]) == 5 * (2 * 32 * 128 * 128 + 2 * 16 * 1536 + 2 * 128)
    assert sorted(bytes_read["opened"]) == sorted(
        name.rpartition("/")[2].removesuffix(".jpeg") + suffix
        for group in NAMES.values()
        for name in group
        for suffix in ("_sd3_vae.npy", "_uni.npy")
    )


# ── folders that are not as published ────────────────────────────────────────────────────────────


def test_columns_are_those_that_the_first_tile_has(tmp_path):
    write_published(tmp_path)
    for path in tmp_path.rglob("*_uni.npy"):
        path.unlink()
    source = PublishedSource(tmp_path)
    assert source.columns() == ["images", "latents-sd3"]
    with pytest.raises(MissingColumn, match=r"no column 'embeddings-uni2-h'.*\(there: latents-sd3;"):
        source.column("embeddings-uni2-h")


def test_features_below_features_are_found_and_both_places_are_not_chosen_from(tmp_path):
    write_published(tmp_path, features="features")
    assert set(PublishedSource(tmp_path).columns()) == {"images", *COLUMNS.values()}
    write_published(tmp_path)
    with pytest.raises(StoreError, match="both beside the images and below features/"):
        PublishedSource(tmp_path)
    config = PublishedConfig(features_in="features")
    assert set(PublishedSource(tmp_path, config).columns()) == {"images", *COLUMNS.values()}


def test_sources_can_be_chosen(published):
    source = PublishedSource(published, PublishedConfig(sources=["gtex"]))
    assert source.num_tiles == {"Leber 1": 1}
    with pytest.raises(StoreError, match="no source 'cptac'; it has gtex, tcga_diagnostic"):
        PublishedSource(published, PublishedConfig(sources=["cptac"]))


def test_an_empty_index_is_an_error(tmp_path):
    write_published_index(tmp_path, {"gtex": []})
    with pytest.raises(StoreError, match=r"names no tile|holds"):
        PublishedSource(tmp_path)


def test_an_autoencoder_that_cannot_have_made_the_latents_is_refused(published):
    with pytest.raises(StoreError, match="4 channels"):
        PublishedSource(published, codec={**PUBLISHED_CODEC, "latent_channels": 4})


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("side", [1, 4])
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda path: path.unlink(), "is missing. Make the features of this tile"),
        (lambda path: np.save(path, np.zeros((16, 128, 128), np.float16)), "holds .16, 128, 128"),
        (lambda path: np.save(path, np.zeros((32, 128, 128), np.float32)), "float32"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "bytes instead of 1048704"),
        (lambda path: path.write_bytes(b""), "cannot be read as an array"),
    ],
    ids=["missing", "shape", "dtype", "cut short", "empty"],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, spoil, match, side, window):
    write_published(tmp_path)
    # Not the first tile, which decides which columns there are.
    spoil(tmp_path / "patches" / NAMES["tcga_diagnostic"][2].replace(".jpeg", "_sd3_vae.npy"))
    source = PublishedSource(tmp_path)
    source.prepare(window)
    out = np.empty((side, side, 32, 32, 32), np.float16)
    with pytest.raises(CorruptShard, match=match):
        source.column("latents-sd3").read_into(out, "TCGA-A", 1, Box(0, 0, side, side))


def test_missing_images_and_cut_jpegs_are_errors_that_name_them(tmp_path):
    write_published(tmp_path)
    image = tmp_path / "patches" / NAMES["gtex"][0]
    image.write_bytes(image.read_bytes()[:-500])
    images = PublishedSource(tmp_path).images("Leber 1")
    assert len(images) == 1
    with pytest.raises(CorruptShard, match=r"0_0\.jpeg is cut short"):
        images.image(0)
    image.unlink()
    with pytest.raises(CorruptShard, match="there is no such file"):
        images.image(0)
    with pytest.raises(IndexError, match="tile 1 of 1"):
        images.jpeg(1)
