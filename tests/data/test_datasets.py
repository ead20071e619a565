"""A field is a square of a stored tile: the same numbers, whoever asks, in whatever order."""

import errno
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from data.tile_source_contract import TileSourceContract
from golden_vectors import load
from pixcell.data.datasets import FieldDataset
from pixcell.data.sealed import OpenFile
from pixcell.data.store import TileStore
from pixcell.data.tile_source import BlockSource
from pixcell.errors import CorruptShard, MissingColumn, StoreError, StoreMismatch, UnreadableTile
from pixcell.geometry import Box
from stores import EMBEDDINGS_MADE_BY, LATENTS_MADE_BY, TILING, fill, records_of, small_store, tiles_of

SLIDES = {"A 1": 5, "Präparat Ω 組織": 3}
EVERYTHING = {"latents": "latents-tiny", "embeddings": "embeddings-tiny", "images": True}


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "store")


class TestTileStore(TileSourceContract):
    @pytest.fixture
    def source(self, store):
        return store


class ArrayColumn:
    """A column in memory: a second implementation keeps the protocol honest."""

    def __init__(self, made_by: dict, arrays: dict[str, np.ndarray]) -> None:
        self.made_by, self.arrays = made_by, arrays
        first = next(iter(arrays.values()))
        self.shape, self.dtype = first.shape[1:], first.dtype
        self.num_tiles = {slide_id: len(array) for slide_id, array in arrays.items()}

    def read_into(self, out: np.ndarray, slide_id: str, tile: int, fields: Box) -> None:
        array = self.arrays[slide_id][tile]
        out[:] = array[fields.y : fields.bottom, fields.x : fields.right]


class ArraySource:
    tile_size, mpp = 128, 0.5

    def columns(self) -> list[str]:
        return ["images", "latents-tiny", "embeddings-tiny"]

    def index(self) -> pa.Table:
        rows = [
            {"slide_id": slide_id, "tile": tile, "x": 1000 + 256 * tile, "y": 512}
            for slide_id, count in SLIDES.items()
            for tile in range(count)
        ]
        return pa.Table.from_pylist(rows)

    def column(self, name: str) -> ArrayColumn:
        shapes = {"latents-tiny": (4, 4, 8, 4, 4), "embeddings-tiny": (4, 4, 6)}
        if name not in shapes:
            raise MissingColumn(f"no column {name!r}")
        made_by = LATENTS_MADE_BY if name == "latents-tiny" else EMBEDDINGS_MADE_BY
        return ArrayColumn(
            made_by, {one: records_of(one, count, shapes[name]) for one, count in SLIDES.items()}
        )

    def images(self, slide_id: str) -> "ArrayImages":
        if slide_id not in SLIDES:
            raise StoreError(f"no slide {slide_id!r}")
        return ArrayImages()


class ArrayImages:
    def image(self, tile: int) -> np.ndarray:
        return np.full((128, 128, 3), tile, np.uint8)


class TestArraySource(TileSourceContract):
    @pytest.fixture
    def source(self):
        return ArraySource()


def test_the_store_and_the_arrays_it_was_made_from_give_the_same_fields(store):
    columns = {"latents": "latents-tiny", "embeddings": "embeddings-tiny"}
    ours = FieldDataset(store, size=64, **columns)
    theirs = FieldDataset(ArraySource(), size=64, **columns)
    assert len(ours) == len(theirs) == 32
    for left, right in zip(ours, theirs, strict=True):
        assert left["key"] == right["key"]
        for name in ("posterior_mean", "posterior_std", "embedding_grid"):
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_fields_of_a_tile_put_side_by_side_are_the_tile(store, size):
    fields = FieldDataset(store, size=size, **EVERYTHING)
    tiles = FieldDataset(store, size=128, **EVERYTHING)
    side = 128 // size
    assert len(fields) == len(tiles) * side**2
    for tile in (0, 6):
        items = [fields[tile * side**2 + i] for i in range(side**2)]
        whole = tiles[tile]
        for name in ("posterior_mean", "posterior_std", "image"):
            rows = [
                torch.cat([item[name] for item in items[side * r : side * (r + 1)]], 2) for r in range(side)
            ]
            torch.testing.assert_close(torch.cat(rows, 1), whole[name], rtol=0, atol=0)
        grids = [
            torch.cat([one["embedding_grid"] for one in items[side * r : side * (r + 1)]], 1)
            for r in range(side)
        ]
        torch.testing.assert_close(torch.cat(grids, 0), whole["embedding_grid"], rtol=0, atol=0)


def test_shapes_types_and_keys_are_as_documented(store):
    item = FieldDataset(store, size=64, **EVERYTHING)[7]
    assert {name: tuple(value.shape) for name, value in item.items() if name != "key"} == {
        "posterior_mean": (4, 8, 8),
        "posterior_std": (4, 8, 8),
        "embedding_grid": (2, 2, 6),
        "image": (3, 64, 64),
    }
    assert item["posterior_mean"].dtype == item["embedding_grid"].dtype == torch.float16
    assert item["image"].dtype == torch.uint8
    assert item["key"] == "A 1/1256_512/1_1"
    assert item["key"] == FieldDataset(store, size=64, **EVERYTHING).key(7)


def test_posterior_mean_and_std_are_the_two_halves_of_the_channels(store):
    item = FieldDataset(store, size=32, latents="latents-tiny")[5]
    record = records_of("A 1", 5, (4, 4, 8, 4, 4))[0, 1, 1]
    np.testing.assert_array_equal(item["posterior_mean"], record[:4])
    np.testing.assert_array_equal(item["posterior_std"], record[4:])


def same(left: dict, right: dict) -> bool:
    return left["key"] == right["key"] and all(
        torch.equal(left[name], right[name]) for name in left if name != "key"
    )


def test_a_batch_in_any_order_holds_the_items_asked_for(store):
    dataset = FieldDataset(store, size=32, **EVERYTHING)
    indices = [127, 3, 3, 90, 0, -1, 64]
    for index, item in zip(indices, dataset.__getitems__(indices), strict=True):
        assert same(item, dataset[index])
    for outside in (128, -129):
        with pytest.raises(IndexError):
            dataset[outside]


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (2, "spawn")])
def test_a_loader_gives_the_same_batches_whoever_its_workers_are(store, workers, start):
    dataset = FieldDataset(store, size=64, **EVERYTHING)
    dataset[0], dataset[31]  # files are open before the fork
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    loader = DataLoader(
        dataset, batch_size=5, sampler=order, num_workers=workers, multiprocessing_context=start
    )
    found = []
    for batch in loader:
        names = [name for name in batch if name != "key"]
        for row, key in enumerate(batch["key"]):
            found.append({"key": key, **{name: batch[name][row] for name in names}})
    assert len(found) == len(order)
    assert all(same(item, dataset[index]) for item, index in zip(found, order, strict=True))


def test_a_part_of_a_batch_still_stacks(store):
    dataset = FieldDataset(store, size=64, **EVERYTHING)
    items = dataset.__getitems__([4, 9, 2])
    batch = torch.utils.data.default_collate([items[2], items[0], dataset[30]])
    assert batch["key"] == [dataset.key(2), dataset.key(4), dataset.key(30)]
    assert torch.equal(batch["posterior_std"][1], dataset[4]["posterior_std"])


def test_items_pickle_as_plain_dictionaries(store):
    item = FieldDataset(store, size=64, **EVERYTHING)[3]
    again = pickle.loads(pickle.dumps(item))
    assert type(again) is dict
    assert same(item, again)


def test_a_dataset_pickles_small_and_reads_the_same(store):
    dataset = FieldDataset(store, size=32, **EVERYTHING)
    dataset[100]
    data = pickle.dumps(dataset)
    assert same(pickle.loads(data)[100], dataset[100])
    assert len(data) < 10_000


# ── choosing tiles ───────────────────────────────────────────────────────────────────────────────


def test_where_keeps_tiles_with_the_attribute(store):
    dataset = FieldDataset(
        store, size=128, images=True, where={"split": ["test"], "organ": ["colon", "lung"]}
    )
    assert dataset.num_tiles == len(dataset) == 3
    assert {dataset.key(i).split("/")[0] for i in range(3)} == {"Präparat Ω 組織"}
    assert len(FieldDataset(store, size=128, images=True, where={"slide_id": ["A 1"]})) == 5


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ({"split": ["valid"]}, "no tile remains where split is valid. Values there: test, train"),
        (
            {"split": ["train"], "organ": ["colon"]},
            "no tile remains where organ is colon. Values there: breast",
        ),
        ({"splt": ["train"]}, "no attribute|has an attribute 'splt'. Did you mean 'split'"),
    ],
)
def test_nothing_left_is_an_error_that_says_what_there_is(store, where, match):
    with pytest.raises(StoreError, match=match):
        FieldDataset(store, size=128, images=True, where=where)


def test_an_empty_store_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="no tiles yet"):
        FieldDataset(TileStore.create(tmp_path / "store", TILING), size=128, images=True)


def test_a_missing_column_names_those_that_exist(store):
    with pytest.raises(MissingColumn, match="there: embeddings-tiny, latents-tiny"):
        FieldDataset(store, size=64, latents="latents-sd35")


def test_a_column_must_be_complete_for_the_chosen_slides_only(store):
    store.write_images("B", tiles_of("B", 2, split="later"), {})
    with pytest.raises(MissingColumn, match=r"lacks 1 of 3 slides \(B\)"):
        FieldDataset(store, size=64, latents="latents-tiny")
    assert len(FieldDataset(store, size=128, latents="latents-tiny", where={"split": ["train", "test"]})) == 8


@pytest.mark.parametrize(
    ("size", "match"), [(48, "48 px cannot be cut from tiles of 128"), (16, "fields of 32 px")]
)
def test_a_size_that_does_not_fit_names_sizes_that_do(store, size, match):
    with pytest.raises(StoreMismatch, match=match):
        FieldDataset(store, size=size, latents="latents-tiny")


def test_asking_for_nothing_is_a_programming_mistake(store):
    with pytest.raises(ValueError, match="would be empty"):
        FieldDataset(store, size=64)


def test_a_tile_of_another_size_is_reported_not_cut(tmp_path):
    store = TileStore.create(tmp_path / "store", TILING)
    # The record says 128 px, the JPEG has 64.
    pairs = zip(tiles_of("A", 1), tiles_of("A", 1, size=64), strict=True)
    store.write_images("A", [(tile, jpeg) for (tile, _), (_, jpeg) in pairs], {})
    with pytest.raises(CorruptShard, match="64 x 64 px"):
        FieldDataset(store, size=64, images=True)[0]


# ── bytes that are read ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bytes_read(monkeypatch):
    """How many bytes were read from shards of records, and from how many places."""
    reads = []
    plain = OpenFile.read_into

    def counted(self, buffer, offset):
        reads.append(len(buffer))
        plain(self, buffer, offset)

    monkeypatch.setattr(OpenFile, "read_into", counted)
    return reads


@pytest.mark.parametrize(("size", "stretches"), [(32, 1), (64, 2), (128, 1)])
def test_a_field_reads_its_own_records_and_not_its_tile(store, bytes_read, size, stretches):
    """One stretch of bytes for the smallest field and for a whole tile, one a row of fields between."""
    dataset = FieldDataset(store, size=size, latents="latents-tiny")
    dataset[0]  # opens the file and reads its header
    bytes_read.clear()
    dataset[1]
    assert sum(bytes_read) == (size // 8) ** 2 * 8 * 2  # 8 channels of float16 at an eighth of the side
    assert len(bytes_read) == stretches


def test_an_epoch_of_small_fields_reads_each_byte_of_the_column_once(store, bytes_read):
    dataset = FieldDataset(store, size=32, latents="latents-tiny", embeddings="embeddings-tiny")
    dataset.__getitems__([0, len(dataset) - 1])
    bytes_read.clear()
    order = np.random.default_rng(0).permutation(len(dataset))
    for start in range(0, len(order), 10):
        dataset.__getitems__(order[start : start + 10].tolist())
    records = [records_of("A 1", 8, shape).nbytes for shape in ((4, 4, 8, 4, 4), (4, 4, 6))]
    assert sum(bytes_read) == sum(records)


# ── groups and blocks ────────────────────────────────────────────────────────────────────────────


def test_tiles_of_one_value_stand_together_in_the_order_they_had(tmp_path):
    store = TileStore.create(tmp_path / "store", TILING)
    for slide_id, organ in (("A", "lung"), ("B", "breast"), ("C", "lung"), ("D", None)):
        fill(store, slide_id, 2, **({"organ": organ} if organ else {}))
    dataset = FieldDataset(store, size=64, latents="latents-tiny", group_by="organ")
    assert dataset.groups == {None: [range(0, 8)], "breast": [range(8, 16)], "lung": [range(16, 32)]}
    slides = [dataset.key(index).split("/")[0] for index in range(0, 32, 4)]
    assert slides == ["D", "D", "B", "B", "A", "A", "C", "C"]
    plain = FieldDataset(store, size=64, latents="latents-tiny")
    by_key = {plain.key(index): index for index in range(len(plain))}
    assert all(same(dataset[index], plain[by_key[dataset.key(index)]]) for index in range(len(dataset)))
    assert plain.groups == {}


def test_a_group_of_several_stores_has_a_range_in_each(store, tmp_path):
    other = TileStore.create(tmp_path / "other", TILING)
    fill(other, "C", 2, organ="colon")
    both = FieldDataset([store, other], size=128, images=True, group_by="organ")
    assert both.parts == [range(0, 8), range(8, 10)]
    assert both.groups == {"breast": [range(0, 5)], "colon": [range(5, 8), range(8, 10)]}


def test_an_attribute_to_group_by_that_no_tile_has_is_refused(store):
    with pytest.raises(StoreError, match=r"has an attribute 'orgn'\. Did you mean 'organ'"):
        FieldDataset(store, size=128, images=True, group_by="orgn")


class BlockArrays(ArraySource):
    """Arrays whose tiles are read three at a time, over the borders of slides."""

    blocks_at_once = 2

    def prepare(self, window):
        self.window = window

    def blocks(self) -> np.ndarray:
        return np.arange(sum(SLIDES.values())) // 3


def test_blocks_are_those_of_the_source_and_slides_where_it_has_none(store):
    source = BlockArrays()
    assert isinstance(source, BlockSource)
    dataset = FieldDataset(source, size=64, latents="latents-tiny")
    dataset.prepare(dataset.blocks_at_once)
    assert (source.window, FieldDataset(store, size=64, latents="latents-tiny").blocks_at_once) == (2, 16)
    assert not isinstance(store, BlockSource)
    dataset = FieldDataset([BlockArrays(), store], size=64, latents="latents-tiny")
    starts, sizes = dataset.blocks()
    assert starts.tolist() == [0, 12, 24, 32, 52]
    assert sizes.tolist() == [12, 12, 8, 20, 12]
    assert dataset.is_read_in_blocks
    assert not FieldDataset(store, size=64, latents="latents-tiny").is_read_in_blocks


def test_chosen_tiles_keep_their_blocks(store):
    dataset = FieldDataset(
        BlockArrays(), size=64, latents="latents-tiny", where={"slide_id": ["Präparat Ω 組織"]}
    )
    starts, sizes = dataset.blocks()
    assert (starts.tolist(), sizes.tolist()) == ([0, 4], [4, 8])  # tiles 5; 6 and 7


# ── what cannot be read ──────────────────────────────────────────────────────────────────────────


def test_a_tile_that_cannot_be_read_is_named_and_the_others_can_be(store, tmp_path):
    shard = store.shard_path("images", "A 1")
    data = bytearray(shard.read_bytes())
    jpeg = store.images("A 1").jpeg(2)
    place = data.find(jpeg)
    data[place : place + len(jpeg)] = bytes(len(jpeg))
    shard.write_bytes(bytes(data))
    dataset = FieldDataset(store, size=64, images=True)
    with pytest.raises(
        UnreadableTile, match=r"tile 2 of slide 'A 1', at x=1512, y=512, cannot be read"
    ) as met:
        dataset.__getitems__([0, 9, 31])
    assert (met.value.slide_id, met.value.tile, met.value.x, met.value.y) == ("A 1", 2, 1512, 512)
    again = pickle.loads(pickle.dumps(met.value))
    assert (str(again), again.reason) == (str(met.value), met.value.reason)
    assert dataset.readable([0, 8, 9, 11, 31]) == [0, 31]


def test_a_record_that_is_cut_off_is_that_of_a_tile(store, monkeypatch):
    dataset = FieldDataset(store, size=64, latents="latents-tiny")

    def fail(self, buffer, offset):
        raise OSError(errno.EIO, "Input/output error")

    dataset[0]
    monkeypatch.setattr(OpenFile, "read_into", fail)
    with pytest.raises(UnreadableTile, match=r"tile 4 of slide 'A 1'.*Input/output error"):
        dataset[17]


def test_a_machine_without_free_files_is_no_fault_of_a_tile(store, monkeypatch):
    dataset = FieldDataset(store, size=64, latents="latents-tiny")

    def fail(self, buffer, offset):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(OpenFile, "read_into", fail)
    with pytest.raises(OSError, match="Too many open files"):
        dataset[17]


def test_shapes_are_known_without_reading(store, monkeypatch):
    for size in (32, 128):
        dataset = FieldDataset(store, size=size, **EVERYTHING)
        item = dataset[0]
        assert dataset.shapes == {name: tuple(item[name].shape) for name in item if name != "key"}


# ── several stores ───────────────────────────────────────────────────────────────────────────────


def test_several_stores_follow_each_other(store, tmp_path):
    other = TileStore.create(tmp_path / "other", TILING)
    fill(other, "C", 2)
    both = FieldDataset([store, other], size=64, **EVERYTHING)
    one, two = FieldDataset(store, size=64, **EVERYTHING), FieldDataset(other, size=64, **EVERYTHING)
    assert len(both) == len(one) + len(two)
    assert all(same(both[i], one[i]) for i in range(len(one)))
    assert all(same(both[len(one) + i], two[i]) for i in range(len(two)))
    mixed = both.__getitems__([len(both) - 1, 0])
    assert same(mixed[0], two[len(two) - 1])
    assert same(mixed[1], one[0])


def test_stores_encoded_by_different_encoders_do_not_mix(store, tmp_path):
    other = TileStore.create(tmp_path / "other", TILING)
    fill(other, "C", 2, embeddings_made_by={**EMBEDDINGS_MADE_BY, "encoder": {"name": "other"}})
    with pytest.raises(StoreMismatch, match="embeddings of two stores were made differently"):
        FieldDataset([store, other], size=64, embeddings="embeddings-tiny")


def test_stores_of_different_resolution_do_not_mix(store, tmp_path):
    other = TileStore.create(tmp_path / "other", {**TILING, "mpp": 0.25})
    tiles = [(type(tile)(**{**tile.__dict__, "mpp": 0.25}), jpeg) for tile, jpeg in tiles_of("C", 1)]
    other.write_images("C", tiles, {})
    with pytest.raises(StoreMismatch, match=r"0\.5 and 0\.25 microns"):
        FieldDataset([store, other], size=64, images=True)


# ── crops of the published training code ─────────────────────────────────────────────────────────


class Published(ArraySource):
    """Three sources of the published layout as slides; every patch holds the recorded features."""

    tile_size = 32

    def __init__(self) -> None:
        self.tensors, self.about = load("lowres_crop")
        names = self.about["extra"]["names_in_order"]
        self.places = [(name.split("/")[0], name.split("/")[-1].removesuffix(".jpeg")) for name in names]

    def index(self) -> pa.Table:
        rows: list[dict] = []
        for source, place in self.places:
            tile = sum(row["slide_id"] == source for row in rows)
            x, y = map(int, place.split("_"))
            rows.append({"slide_id": source, "tile": tile, "x": x, "y": y})
        return pa.Table.from_pylist(rows)

    def column(self, name: str) -> ArrayColumn:
        latents = self.tensors["in.vae_feat"].reshape(16, 4, 4, 4, 4).permute(1, 3, 0, 2, 4)
        values = latents if name == "latents" else self.tensors["in.ssl_feat"].reshape(4, 4, -1)
        sources = sorted({source for source, _ in self.places})
        made_by = {"kind": name, "field_size": 8}
        return ArrayColumn(made_by, {source: np.stack([values.numpy()] * 4) for source in sources})

    def images(self, slide_id: str) -> "Published":
        return self

    def image(self, tile: int) -> np.ndarray:
        return self.tensors["in.image"].numpy()


@pytest.mark.parametrize("factor", [4, 2])
def test_fields_of_a_patch_are_the_published_crops(factor):
    source = Published()
    fields = FieldDataset(source, size=32 // factor, latents="latents", embeddings="embeddings", images=True)
    for number in range(factor**2):
        item = fields[number]
        found = {
            "latent": torch.cat([item["posterior_mean"], item["posterior_std"]]),
            "tokens": item["embedding_grid"].flatten(0, 1),
            "image": item["image"].permute(1, 2, 0),
        }
        for name, value in found.items():
            expected = source.tensors[f"out.{name}_f{factor}_{number}"]
            torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "length"), [(32, "length_1024"), (16, "length_512"), (8, "length_256")])
def test_a_global_index_is_the_published_patch_and_crop(size, length):
    source = Published()
    fields = FieldDataset(source, size=size, latents="latents", embeddings="embeddings")
    assert len(fields) == source.about["extra"][length]
    side = 32 // size
    for number in range(len(fields)):
        patch, crop = divmod(number, side**2)
        row, column = divmod(crop, side)
        assert fields.key(number) == f"{'/'.join(source.places[patch])}/{row}_{column}"
