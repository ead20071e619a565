"""A store keeps every tile as it was given, whoever writes and whatever happens meanwhile."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest

from pixcell.data.columns import sidecar_of
from pixcell.data.images import write_image_shard
from pixcell.data.store import TileStore
from pixcell.data.tiling import Tile
from pixcell.errors import (
    CorruptShard,
    MissingColumn,
    NoTissue,
    OutputError,
    StoreError,
    StoreMismatch,
)
from pixcell.geometry import Box
from stores import (
    EMBEDDINGS_MADE_BY,
    LATENTS_MADE_BY,
    TILING,
    contents,
    fill,
    jpeg_of,
    records_of,
    small_store,
    tiles_of,
)

SLIDE = "Präparat Ω 組織"


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "store")


def start(*arguments: str, **options) -> subprocess.Popen:
    script = Path(__file__).parents[1] / "stores.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(script), *arguments], env=environment, **options)


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# ── what goes in comes out ───────────────────────────────────────────────────────────────────────


def test_jpeg_bytes_and_facts_come_back_unchanged(store):
    with store.images(SLIDE) as shard:
        assert len(shard) == 3
        assert shard.slide == {"fingerprint": SLIDE}
        for i, (tile, jpeg) in enumerate(tiles_of(SLIDE, 3, organ="colon", split="test")):
            assert shard.jpeg(i) == jpeg
            names = ("x", "y", "tissue", "pen", "sharpness", "name", "attributes")
            assert shard.tiles[i] == {name: getattr(tile, name) for name in names}


def test_pixels_come_back_as_the_jpeg_says(store):
    from io import BytesIO

    from PIL import Image

    with store.images("A 1") as shard:
        expected = np.asarray(Image.open(BytesIO(shard.jpeg(2))))
        # Two JPEG libraries round the last bit differently.
        assert np.abs(shard.image(2).astype(int) - expected).max() <= 2


def test_a_jpeg_that_is_cut_short_is_not_decoded_to_grey(tmp_path):
    """The decoder itself says nothing."""
    store = TileStore.create(tmp_path / "store", TILING)
    whole = jpeg_of(0)
    (tile, _), *_ = tiles_of("A", 1)
    half = [(tile, whole), (tile, whole + b"more behind the end"), (tile, whole[: len(whole) // 2])]
    write_image_shard(store.shard_path("images", "A"), half, {}, "A")
    with store.images("A") as shard:
        np.testing.assert_array_equal(shard.image(1), shard.image(0))
        with pytest.raises(CorruptShard, match=r"tile 2 of .* cut short"):
            shard.image(2)


def test_a_jpeg_of_any_length_comes_back_across_the_chunks_of_the_file(tmp_path):
    store = TileStore.create(tmp_path / "store", TILING)
    random = np.random.default_rng(0)
    lengths = [6, 1 << 18, (1 << 18) - 6, 700_000, 7]
    jpegs = [b"\xff\xd8\xff\xda" + random.bytes(length - 6) + b"\xff\xd9" for length in lengths]
    tiles = [tile for tile, _ in tiles_of("long", len(jpegs))]
    store.write_images("long", zip(tiles, jpegs, strict=True), {})
    with store.images("long") as shard:
        assert [shard.jpeg(i) for i in range(len(shard))] == jpegs


@pytest.mark.parametrize("column", ["latents-tiny", "embeddings-tiny"])
def test_any_box_of_fields_equals_the_same_cut_of_the_whole_record(store, column):
    opened = store.column(column)
    records = records_of("A 1", 5, opened.shape)
    np.testing.assert_array_equal(opened.array("A 1"), records)
    np.testing.assert_array_equal(opened.read("A 1", 4), records[4])
    for box in (Box(0, 0, 1, 1), Box(3, 1, 1, 3), Box(0, 2, 4, 2), Box(1, 1, 2, 2)):
        part = opened.read("A 1", 2, box)
        np.testing.assert_array_equal(part, records[2, box.y : box.bottom, box.x : box.right])


def test_reading_outside_is_an_error(store):
    column = store.column("latents-tiny")
    with pytest.raises(IndexError):
        column.read("A 1", 5)
    with pytest.raises(ValueError, match="reach outside"):
        column.read("A 1", 0, Box(3, 0, 2, 1))
    with pytest.raises(MissingColumn, match="not in column"):
        column.read("B", 0)
    with store.images("A 1") as shard, pytest.raises(IndexError):
        shard.jpeg(-1)


def test_shards_open_with_plain_numpy_and_h5py(store):
    array = np.load(store.path / "latents-tiny" / "A 1.npy")
    np.testing.assert_array_equal(array, records_of("A 1", 5, (4, 4, 8, 4, 4)))
    with h5py.File(store.path / "images" / "A 1.h5") as file:
        assert file["x"][()].tolist() == [1000 + 256 * i for i in range(5)]


# ── the same input, the same bytes ───────────────────────────────────────────────────────────────


def test_the_same_tiles_make_the_same_bytes(tmp_path, store):
    assert contents(small_store(tmp_path / "other").path) == contents(store.path)
    store.index()
    again = small_store(tmp_path / "again")
    again.index()
    assert contents(again.path) == contents(store.path)


def test_what_is_there_stays_and_is_not_made_again(store):
    before = contents(store.path)

    def untouched():
        raise AssertionError("a finished slide was asked for again")
        yield

    assert store.write_images("A 1", untouched(), {"fingerprint": "A 1"}) == 5
    store.write_column(
        "latents-tiny",
        "A 1",
        untouched(),
        shape=(4, 4, 8, 4, 4),
        dtype="float16",
        made_by=LATENTS_MADE_BY,
        num_tiles=5,
    )
    assert contents(store.path) == before


# ── the index ────────────────────────────────────────────────────────────────────────────────────


def test_the_index_has_one_row_per_tile_with_its_attributes(store):
    rows = store.index().to_pylist()
    assert len(rows) == store.num_tiles == 8
    expected = {"slide_id": "A 1", "tile": 4, "x": 2024, "y": 512, "tissue": 0.75, "pen": 0.0}
    assert rows[4] == {**expected, "sharpness": 1.25, "name": "", "organ": "breast", "split": "train"}
    assert [row["organ"] for row in rows] == ["breast"] * 5 + ["colon"] * 3


def test_the_index_follows_the_shards_and_can_be_deleted_at_any_time(store):
    first = store.index()
    fill(store, "B", 2, stain="HE")
    rows = store.index().to_pylist()
    assert [row["slide_id"] for row in rows] == ["A 1"] * 5 + ["B"] * 2 + [SLIDE] * 3
    assert [row["stain"] for row in rows[4:8]] == [None, "HE", "HE", None]
    grown = (store.path / "index.parquet").read_bytes()

    (store.path / "index.parquet").unlink()
    TileStore.open(store.path).index()
    assert (store.path / "index.parquet").read_bytes() == grown
    (store.path / "index.parquet").write_bytes(grown[: len(grown) // 2])
    assert TileStore.open(store.path).index().to_pylist() == rows

    (store.path / "images" / "B.h5").unlink()
    assert store.index() == first
    assert TileStore.open(store.path).index() == first


def test_the_index_has_room_for_the_names_of_tens_of_millions_of_tiles(store):
    """Plain Arrow strings end at two gigabytes per column, and sorting fails there."""
    kinds = {field.name: field.type for field in store.index().schema}
    assert {kinds[name] for name in ("slide_id", "name", "organ", "split")} == {pa.large_string()}
    assert {field.type for field in TileStore.open(store.path).index().schema} == set(kinds.values())


def test_an_attribute_cannot_shadow_a_column_of_the_index(store):
    with pytest.raises(StoreError, match="'tissue' cannot be the name of an attribute"):
        store.write_images("B", tiles_of("B", 1, tissue="liver"), {})


# ── settings that do not fit ─────────────────────────────────────────────────────────────────────


def test_another_tiling_is_refused_and_the_difference_named(store):
    with pytest.raises(StoreMismatch, match=r"mpp is 0\.5 in the store and 0\.25 here"):
        TileStore.create(store.path, {**TILING, "mpp": 0.25})
    TileStore.create(store.path, TILING)


def test_a_column_cannot_be_continued_by_another_encoder(store):
    made_by = {**EMBEDDINGS_MADE_BY, "encoder": {"name": "tiny", "sha256": "f" * 64}}
    with pytest.raises(StoreMismatch, match=r"made_by\.encoder\.sha256 is 'ee.* and 'ff"):
        fill(store, "B", 2, embeddings_made_by=made_by)
    assert not store.has("embeddings-tiny", "B")


def test_a_column_begun_by_two_encoders_at_once_is_found_when_read(store):
    sidecar = sidecar_of(store.shard_path("latents-tiny", "A 1"))
    facts = json.loads(sidecar.read_text())
    facts["made_by"]["codec"]["sha256"] = "0" * 64
    sidecar.write_text(json.dumps(facts))
    with pytest.raises(StoreMismatch, match=r"mixes two makers.*codec\.sha256"):
        store.column("latents-tiny")
    assert [(one.column, one.slide_id) for one in store.verify()] == [("latents-tiny", "*")]


def test_a_column_knows_from_which_images_it_was_made(store):
    shard = store.shard_path("images", "A 1")
    shard.unlink()
    store.write_images("A 1", tiles_of("other tissue", 5), {"fingerprint": "A 1"})
    with pytest.raises(StoreMismatch, match="made from other images"):
        store.column("latents-tiny")
    with pytest.raises(StoreMismatch, match="made from other images"):
        fill(store, "A 1", 5)
    assert {(one.column, one.slide_id) for one in store.verify()} == {
        ("latents-tiny", "A 1"),
        ("embeddings-tiny", "A 1"),
    }


def test_another_slide_of_the_same_id_is_refused(store):
    with pytest.raises(StoreMismatch, match=r"taken .* by another slide"):
        store.write_images("A 1", tiles_of("A 1", 5), {"fingerprint": "another"})


@pytest.mark.parametrize(
    ("tile", "jpeg", "error", "match"),
    [
        (Tile("B", 0, 0, 256, 0.5, 1, 0, 1), jpeg_of(0), StoreMismatch, "256 px at 0.5 mpp"),
        (Tile("B", 0, 0, 128, 0.25, 1, 0, 1), jpeg_of(0), StoreMismatch, "0.25 mpp"),
        (Tile("B", 7, 9, 128, 0.5, 1, 0, 1), b"\x89PNG", StoreError, "x=7, y=9 .* is not a JPEG"),
        (Tile("B", 7, 9, 128, 0.5, 1, 0, 1), jpeg_of(0)[:-400], StoreError, "x=7, y=9 .* cut short"),
    ],
)
def test_a_tile_that_does_not_belong_leaves_nothing_behind(store, tile, jpeg, error, match):
    before = contents(store.path)
    with pytest.raises(error, match=match):
        store.write_images("B", [*tiles_of("B", 2), (tile, jpeg)], {})
    assert contents(store.path) == before
    assert not list(store.path.rglob("*.tmp-*"))


def test_no_tile_is_no_shard(store):
    with pytest.raises(NoTissue, match="'B' gave no tile"):
        store.write_images("B", [], {})
    assert store.slide_ids() == ["A 1", SLIDE]


@pytest.mark.parametrize(("count", "shape"), [(1, (2, 2, 3)), (3, (2, 2, 3)), (2, (2, 2, 4))])
def test_records_must_be_one_per_tile_and_of_the_stated_shape(store, count, shape):
    store.write_images("B", tiles_of("B", 2), {})
    facts = {"shape": (2, 2, 3), "dtype": "float16", "made_by": {"kind": "embeddings"}}
    with pytest.raises(StoreError, match="records"):
        store.write_column("new", "B", [np.zeros((count, *shape), np.float16)], num_tiles=2, **facts)
    with pytest.raises(StoreMismatch, match=r"2 tiles .* 3 records"):
        store.write_column("new", "B", [], num_tiles=3, **facts)
    assert "new" not in store.columns()


@pytest.mark.parametrize("slide_id", ["", ".hidden", "a/b", "a\nb", "a\x00b", "x" * 221])
def test_a_slide_id_that_is_no_file_name_is_refused(store, slide_id):
    with pytest.raises(StoreError, match=r"slide id|bytes"):
        store.write_images(slide_id, tiles_of("B", 1), {})


@pytest.mark.parametrize("column", ["../images", "qc", "images/x", "", "a b"])
def test_a_column_name_that_is_no_plain_folder_is_refused(store, column):
    with pytest.raises(StoreError, match="cannot be the name of a column"):
        store.has(column, "A 1")


def test_what_is_no_store_is_not_opened_and_not_written_into(tmp_path, store):
    with pytest.raises(StoreError, match=r"no store\.json"):
        TileStore.open(tmp_path / "nothing")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(StoreError, match="not empty and is no tile store"):
        TileStore.create(tmp_path / "thesis", TILING)
    facts = json.loads((store.path / "store.json").read_text())
    (store.path / "store.json").write_text(json.dumps({**facts, "version": 2}))
    with pytest.raises(StoreError, match=r"version 2.*Update pixcell"):
        TileStore.open(store.path)


def test_missing_things_are_named(store):
    with pytest.raises(MissingColumn, match=r"there: embeddings-tiny, latents-tiny"):
        store.column("latents-sd35")
    with pytest.raises(StoreError, match=r"no slide 'B'. It has 2: A 1"):
        store.images("B")


# ── damage ───────────────────────────────────────────────────────────────────────────────────────


def test_an_undamaged_store_has_no_problems(store):
    assert store.verify() == []


@pytest.mark.parametrize("column", ["images", "latents-tiny", "embeddings-tiny"])
@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_verify_finds_a_flipped_bit_anywhere(store, column, place):
    shard = store.shard_path(column, "A 1")
    data = bytearray(shard.read_bytes())
    data[int(place * len(data))] ^= 4
    shard.write_bytes(data)
    assert ("A 1", column) in {(problem.slide_id, problem.column) for problem in store.verify()}


@pytest.mark.parametrize("column", ["images", "latents-tiny"])
@pytest.mark.parametrize("change", ["cut short", "empty", "one byte more"])
def test_a_shard_of_another_length_is_found_and_not_read(store, column, change):
    shard = store.shard_path(column, "A 1")
    data = shard.read_bytes()
    shard.write_bytes({"cut short": data[:-100], "empty": b"", "one byte more": data + b"\n"}[change])
    assert ("A 1", column) in {(problem.slide_id, problem.column) for problem in store.verify()}
    read = store.images if column == "images" else lambda slide: store.column(column).read(slide, 0)
    with pytest.raises(CorruptShard):
        read("A 1")


def test_a_lost_description_is_found(store):
    sidecar_of(store.shard_path("latents-tiny", "A 1")).unlink()
    assert [(one.column, one.slide_id) for one in store.verify()] == [("latents-tiny", "A 1")]
    with pytest.raises(CorruptShard, match="nothing says what made"):
        store.column("latents-tiny")


def test_a_column_of_another_length_than_the_images_is_found(store):
    for suffix in (".npy", ".json"):
        folder = store.path / "latents-tiny"
        shutil.copy(folder / f"{SLIDE}{suffix}", folder / f"A 1{suffix}")
    reasons = [problem.reason for problem in store.verify()]
    assert len(reasons) == 1
    assert "has 3 tiles, the images have 5" in reasons[0]


def test_columns_without_images_are_found(store):
    (store.path / "images" / "A 1.h5").unlink()
    assert {one.slide_id for one in store.verify()} == {"A 1"}


# ── many writers, and writers that die ───────────────────────────────────────────────────────────


def test_two_processes_writing_other_and_the_same_slides_lose_nothing(tmp_path):
    both = tmp_path / "both"
    names = [f"slide {i}" for i in range(6)]
    writers = [
        start("fill_many", str(both), *names[:4]),
        start("fill_many", str(both), *reversed(names[2:])),
        start("fill_many", str(both), *names[:4]),
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    store = TileStore.open(both)
    assert store.slide_ids() == names
    assert store.verify() == []
    assert store.num_tiles == 120
    assert not list(both.rglob("*.tmp-*"))

    alone = TileStore.create(tmp_path / "alone", TILING)
    for name in names:
        fill(alone, name, 20, organ="breast")
    alone.index()
    assert contents(both) == contents(alone.path)


def test_a_writer_that_comes_second_keeps_what_the_first_made(store):
    """The shard appears while the second writer is still at work, and holds other bytes."""

    def slow():
        yield np.ones((2, 2, 2, 3), np.float16)
        facts = {"shape": (2, 2, 3), "dtype": "float16", "made_by": {"kind": "embeddings"}, "num_tiles": 2}
        store.write_column("new", "B", [np.zeros((2, 2, 2, 3), np.float16)], **facts)

    store.write_images("B", tiles_of("B", 2), {})
    facts = {"shape": (2, 2, 3), "dtype": "float16", "made_by": {"kind": "embeddings"}, "num_tiles": 2}
    store.write_column("new", "B", slow(), **facts)
    assert not store.column("new").array("B").any()
    assert store.verify() == []


def test_a_writer_that_comes_second_with_another_encoder_does_not_rewrite_the_description(store):
    """Else the column would name the second encoder for what the first one made, and nobody would know."""
    options = {"shape": (4, 4, 6), "dtype": np.float16, "num_tiles": 5}
    other = {**EMBEDDINGS_MADE_BY, "encoder": {"name": "other", "sha256": "f" * 64}}
    records = records_of("A 1", 5, (4, 4, 6))

    def overtaken():
        yield records[:1]
        TileStore.open(store.path).write_column("raced", "A 1", [records + 1], made_by=other, **options)
        yield records[1:]

    with pytest.raises(StoreMismatch, match=r"encoder.name is 'other' in the store and 'tiny' here"):
        store.write_column("raced", "A 1", overtaken(), made_by=EMBEDDINGS_MADE_BY, **options)
    column = store.column("raced")
    assert column.made_by == other
    np.testing.assert_array_equal(column.array("A 1"), records + 1)


def test_a_writer_killed_in_the_middle_leaves_no_half_shard(store, tmp_path):
    before = contents(store.path)
    writer = start("write_until_killed", str(store.path), stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    assert [path for path in store.path.rglob("*.tmp-*") if path.stat().st_size]
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    assert contents(store.path) == before
    assert not store.has("images", "killed")
    assert store.verify() == []

    fill(store, "killed", 4)
    undisturbed = small_store(tmp_path / "undisturbed")
    fill(undisturbed, "killed", 4)
    assert contents(store.path) == contents(undisturbed.path)


@pytest.mark.parametrize("place", ["images/x.h5", "new-column/x.npy", "qc/x.jpg", "index.parquet"])
def test_leftovers_of_killed_writers_go_when_they_are_old(store, place):
    old, young = (store.path / f"{place}.tmp-{letter * 12}" for letter in "ab")
    old.parent.mkdir(exist_ok=True)
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    TileStore.create(store.path, TILING)
    assert not old.exists()
    assert young.exists()


def test_a_full_disk_is_an_output_error_and_leaves_no_half_shard(store, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pixcell.data.images.seal", full)
    before = contents(store.path)
    with pytest.raises(OutputError, match="disk is full"):
        store.write_images("B", tiles_of("B", 2), {})
    assert contents(store.path) == before
    assert not list(store.path.rglob("*.tmp-*"))


def test_a_store_that_may_only_be_read_can_be_read(store, monkeypatch):
    def read_only(*arguments, **options):
        raise OutputError("cannot write: the file system is read-only")

    monkeypatch.setattr("pixcell.data.index.write_whole", read_only)
    assert len(TileStore.open(store.path).index()) == 8


# ── use from many places ─────────────────────────────────────────────────────────────────────────


def test_a_column_opens_few_files_at_a_time_and_travels_without_them(tmp_path):
    store = TileStore.create(tmp_path / "store", TILING)
    for i in range(12):
        fill(store, f"s{i}", 2)
    column = store.column("latents-tiny", max_open=3)
    start_count = num_open_files()
    expected = {f"s{i}": column.read(f"s{i}", 1) for i in range(12)}
    assert num_open_files() - start_count == 3
    travelled = pickle.loads(pickle.dumps(column))
    assert num_open_files() - start_count == 3
    for slide_id, record in expected.items():
        np.testing.assert_array_equal(travelled.read(slide_id, 1), record)


def test_a_store_pickles(store):
    again = pickle.loads(pickle.dumps(store))
    assert (again.path, again.tile_size, again.mpp) == (store.path, 128, 0.5)
    assert again.index() == store.index()


def test_the_summary_counts(store):
    fill(store, "B", 2)
    store.shard_path("latents-tiny", "B").unlink()
    summaries = {one.name: one for one in store.summary()}
    assert list(summaries) == ["images", "embeddings-tiny", "latents-tiny"]
    assert (summaries["latents-tiny"].num_slides, summaries["latents-tiny"].num_missing) == (2, 1)
    assert summaries["latents-tiny"].shape == (4, 4, 8, 4, 4)
    assert summaries["latents-tiny"].made_by == LATENTS_MADE_BY
