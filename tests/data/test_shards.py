"""A pack is read as the store it was made from, one contiguous stretch per field, wherever it lies."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.tile_source_contract import TileSourceContract
from pixcell.data import sealed
from pixcell.data.datasets import BlockSource, FieldDataset
from pixcell.data.shard_cache import CacheConfig
from pixcell.data.shards import ShardSource
from pixcell.errors import CorruptShard, MissingColumn, StoreError
from pixcell.geometry import Box
from pixcell.tasks.pack import pack_store
from stores import fill, small_store

SLIDE = "Präparat Ω 組織"
SHARD = 30_000


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "store")


@pytest.fixture
def packed(store, tmp_path) -> Path:
    pack_store(store.path, tmp_path / "packed", shard_size=SHARD, workers=1)
    return tmp_path / "packed"


@pytest.fixture
def source(packed) -> ShardSource:
    return ShardSource.open(packed)


class TestShardSource(TileSourceContract):
    """A pack does what every tile source must do."""


def items_by_key(source) -> dict[str, dict]:
    dataset = FieldDataset(source, size=64, latents="latents-tiny", embeddings="embeddings-tiny", images=True)
    return {item["key"]: item for item in (dataset[index] for index in range(len(dataset)))}


def test_every_field_is_that_of_the_store(store, source):
    ours, theirs = items_by_key(source), items_by_key(store)
    assert ours.keys() == theirs.keys()
    for key, item in ours.items():
        for name in ("posterior_mean", "posterior_std", "embedding_grid", "image"):
            assert torch.equal(item[name], theirs[key][name]), f"{name} of {key}"


def test_the_index_says_what_the_stores_index_says_in_the_order_of_the_shards(store, source):
    order = lambda table: table.sort_by([("slide_id", "ascending"), ("tile", "ascending")])  # noqa: E731
    assert order(source.index()).to_pylist() == store.index().to_pylist()
    assert source.index().column_names == store.index().column_names
    assert source.blocks().tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert isinstance(source, BlockSource)


def test_jpeg_bytes_are_those_of_the_store(store, source):
    images = source.images(SLIDE)
    assert len(images) == 3
    with store.images(SLIDE) as stored:
        assert [images.jpeg(tile) for tile in range(3)] == [stored.jpeg(tile) for tile in range(3)]


def test_a_field_is_one_read_of_its_own_bytes(source, monkeypatch):
    column = source.column("latents-tiny")
    whole = np.empty(column.shape, column.dtype)
    column.read_into(whole, "A 1", 3, Box(0, 0, 4, 4))
    reads = []
    plain = sealed.OpenFile.read_into
    monkeypatch.setattr(
        sealed.OpenFile,
        "read_into",
        lambda file, buffer, offset: (reads.append(len(buffer)), plain(file, buffer, offset)),
    )
    out = np.empty((1, 1, 8, 4, 4), np.float16)
    column.read_into(out, "A 1", 3, Box(2, 1, 1, 1))
    assert reads == [out.nbytes]
    np.testing.assert_array_equal(out[0, 0], whole[1, 2])


def test_tiles_that_were_chosen_are_counted_anew(tmp_path, store):
    fill(store, "B", 4, organ="lung", split="train")
    pack_store(store.path, tmp_path / "some", where={"organ": ["lung", "colon"]}, shard_size=SHARD, workers=1)
    source = ShardSource.open(tmp_path / "some")
    assert dict(source.column("latents-tiny").num_tiles) == {"B": 4, SLIDE: 3}
    with pytest.raises(StoreError, match=r"no slide 'A 1'\. It has 2: B"):
        source.images("A 1")


def test_loader_workers_read_what_one_process_reads(source):
    dataset = FieldDataset(source, size=64, latents="latents-tiny", embeddings="embeddings-tiny")
    alone = [batch["posterior_mean"] for batch in DataLoader(dataset, batch_size=8)]
    shared = [batch["posterior_mean"] for batch in DataLoader(dataset, batch_size=8, num_workers=2)]
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def test_columns_travel_with_their_source(source):
    column = pickle.loads(pickle.dumps(source.column("latents-tiny")))
    out, again = (np.empty((4, 4, 8, 4, 4), np.float16) for _ in range(2))
    source.column("latents-tiny").read_into(out, "A 1", 0, Box(0, 0, 4, 4))
    column.read_into(again, "A 1", 0, Box(0, 0, 4, 4))
    np.testing.assert_array_equal(out, again)


# ── what is not there, or not as it was written ──────────────────────────────────────────────────


def test_reading_outside_and_missing_things_are_named(source):
    column = source.column("latents-tiny")
    out = np.empty((1, 1, 8, 4, 4), np.float16)
    with pytest.raises(IndexError, match="tile 5 of 5"):
        column.read_into(out, "A 1", 5, Box(0, 0, 1, 1))
    with pytest.raises(ValueError, match="reach outside"):
        column.read_into(out, "A 1", 0, Box(4, 0, 1, 1))
    with pytest.raises(MissingColumn, match="slide 'B' is not in the pack"):
        column.read_into(out, "B", 0, Box(0, 0, 1, 1))
    with pytest.raises(MissingColumn, match="there: embeddings-tiny, latents-tiny"):
        source.column("latents-sd3")


def test_a_pack_without_images_says_so(tmp_path, store):
    pack_store(store.path, tmp_path / "bare", columns=["latents-tiny"], shard_size=SHARD, workers=1)
    source = ShardSource.open(tmp_path / "bare")
    assert source.columns() == ["latents-tiny"]
    with pytest.raises(MissingColumn, match="packed without images"):
        source.images("A 1")


@pytest.mark.parametrize("change", ["missing", "cut short"])
def test_a_damaged_shard_is_an_error_with_the_way_out(source, packed, change):
    shard = packed / "shards" / "000001.tar"
    data = shard.read_bytes()
    shard.unlink()
    if change == "cut short":
        shard.write_bytes(data[:-1])
    dataset = FieldDataset(source, size=128, latents="latents-tiny")
    with pytest.raises(CorruptShard, match=r"000001\.tar .*`pixcell pack`"):
        [dataset._parts[0].source.column("latents-tiny").read_into(np.empty((4, 4, 8, 4, 4), np.float16),
         row["slide_id"], row["tile"], Box(0, 0, 4, 4)) for row in source.index().to_pylist()]  # fmt: skip


@pytest.mark.parametrize("name", ["index.parquet", "shards/000000.tar", "shards/000002.tar"])
def test_verify_finds_a_flipped_bit(source, packed, name):
    assert source.verify() == []
    data = bytearray((packed / name).read_bytes())
    data[len(data) // 2] ^= 8
    (packed / name).write_bytes(data)
    assert [problem.slide_id for problem in source.verify()] == [name]


def test_what_is_no_pack_is_not_opened(tmp_path, packed):
    with pytest.raises(StoreError, match=r"no finished pack.*pixcell pack STORE"):
        ShardSource.open(tmp_path)
    path = packed / "pack.json"
    facts = json.loads(path.read_text())
    for change, match in (
        ({"version": 2}, "version 2.*Update pixcell"),
        ({"format": "other"}, "format 'other'"),
        ({"columns": None}, "cannot be understood"),
        (
            {"shards": [{**facts["shards"][0], "name": "../../elsewhere.tar"}]},
            "not called as those of a pack",
        ),
    ):
        path.write_text(json.dumps({**facts, **change}))
        with pytest.raises(StoreError, match=match):
            ShardSource.open(packed)


def test_a_folder_holds_any_window(source):
    source.prepare(1000)
    assert CacheConfig(size="1KB").size == 1000
