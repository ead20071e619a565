"""A pack is the same whoever makes it and however often it is killed, and any WebDataset reader opens it."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pixcell.data.pack_format import Manifest
from pixcell.data.packing import PackWriter
from pixcell.data.store import TileStore
from pixcell.errors import MissingColumn, OutputError, StoreError, StoreMismatch
from pixcell.files import sha256_of
from pixcell.tasks.pack import pack_store
from stores import LATENTS_MADE_BY, TILING, contents, fill, records_of, small_store, tiles_of

SHARD = 30_000
"""Three tiles of the small store, of which there are eight."""


@pytest.fixture
def store(tmp_path):
    return small_store(tmp_path / "store")


@pytest.fixture
def packed(store, tmp_path) -> Path:
    pack_store(store.path, tmp_path / "packed", shard_size=SHARD, workers=1)
    return tmp_path / "packed"


def manifest_of(folder: Path) -> Manifest:
    return Manifest.from_bytes((folder / "pack.json").read_bytes(), "pack.json")


def test_every_tile_is_in_one_shard_with_its_bytes_and_facts(store, packed):
    found = {}
    for shard in sorted((packed / "shards").glob("*.tar")):
        with tarfile.open(shard) as file:
            members = {member.name: file.extractfile(member).read() for member in file}
        assert [name.split(".", 1)[1] for name in members][:4] == [
            "embeddings-tiny.npy",
            "latents-tiny.npy",
            "jpg",
            "json",
        ]
        for name in members:
            key, _, ending = name.partition(".")
            if ending == "json":
                facts = json.loads(members[name])
                found[facts["slide_id"], facts["tile"]] = (key, facts, members)
    rows = store.index().to_pylist()
    assert len(rows) == len(found) == 8
    for row in rows:
        key, facts, members = found[row["slide_id"], row["tile"]]
        assert (facts["x"], facts["y"], facts["mpp"], facts["tile_size"]) == (row["x"], row["y"], 0.5, 128)
        assert facts["attributes"] == {"organ": row["organ"], "split": row["split"]}
        with store.images(row["slide_id"]) as images:
            assert members[f"{key}.jpg"] == images.jpeg(row["tile"])
        for column in ("latents-tiny", "embeddings-tiny"):
            stored = np.load(io.BytesIO(members[f"{key}.{column}.npy"]))
            np.testing.assert_array_equal(stored, store.column(column).read(row["slide_id"], row["tile"]))


def test_the_webdataset_package_reads_it(store, packed):
    webdataset = pytest.importorskip("webdataset")
    shards = sorted(str(path) for path in (packed / "shards").glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    assert len(samples) == 8
    for sample in samples:
        facts = sample["json"]
        expected = store.column("latents-tiny").read(facts["slide_id"], facts["tile"])
        np.testing.assert_array_equal(sample["latents-tiny.npy"], expected)
        assert sample["jpg"].shape == (128, 128, 3)
    assert len({sample["__key__"] for sample in samples}) == 8


def test_shards_hold_about_as_much_as_was_asked_for_and_are_a_mixture_of_slides(store, packed):
    sizes = [path.stat().st_size for path in sorted((packed / "shards").glob("*.tar"))]
    assert len(sizes) == 3
    assert all(0.5 * SHARD < size < 1.5 * SHARD for size in sizes[:-1])
    slides = pq.read_table(packed / "index.parquet")["slide_id"].to_pylist()
    assert len(set(slides[3:6])) == 2


def test_the_description_states_size_and_checksum_of_every_file(packed):
    manifest = manifest_of(packed)
    assert len(manifest.shards) == 3
    for facts in (manifest.index, *manifest.shards):
        path = packed / facts.name
        assert (facts.num_bytes, facts.sha256) == (path.stat().st_size, sha256_of(path))
    assert manifest.columns["latents-tiny"].made_by == LATENTS_MADE_BY
    assert sorted(path.name for path in packed.iterdir()) == ["index.parquet", "pack.json", "shards"]


# ── the same request, the same bytes ─────────────────────────────────────────────────────────────


def test_two_processes_make_the_same_bytes_as_one(store, packed, tmp_path):
    pack_store(store.path, tmp_path / "again", shard_size=SHARD, workers=2)
    assert contents(tmp_path / "again") == contents(packed)


def test_a_pack_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(store, tmp_path):
    script = Path(__file__).parents[1] / "stores.py"
    work = tmp_path / "work"
    ended = subprocess.run(
        [sys.executable, str(script), "kill_while_packing", str(store.path), str(work)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 50, "each file is synced, named, and its folder synced"


def test_a_finished_pack_is_left_alone_and_a_lost_shard_is_made_again(store, packed):
    before, times = contents(packed), {path: path.stat().st_mtime_ns for path in packed.rglob("*.*")}
    again = pack_store(store.path, packed, shard_size=SHARD, workers=1)
    assert (again.num_written, again.num_shards) == (0, 3)
    assert {path: path.stat().st_mtime_ns for path in packed.rglob("*.*")} == times
    (packed / "shards" / "000001.tar").unlink()
    (packed / "shards" / "000002.tar").write_bytes(b"cut short")
    assert pack_store(store.path, packed, shard_size=SHARD, workers=1).num_written == 2
    assert contents(packed) == before


def test_a_lost_shard_of_records_that_are_others_now_is_not_made_up(store, packed, tmp_path):
    (packed / "shards" / "000000.tar").unlink()
    before = contents(packed)
    column = store.path / "latents-tiny"
    for shard in column.glob("*.npy"):
        slide_id = shard.name.removesuffix(".npy")
        count, shard_facts = len(store.images(slide_id)), store.column("latents-tiny")
        shard.unlink()
        store.write_column(
            "latents-tiny",
            slide_id,
            [records_of("others", count, shard_facts.shape)],
            shape=shard_facts.shape,
            dtype=np.float16,
            made_by=LATENTS_MADE_BY,
            num_tiles=count,
        )
    # Opened by its path, as another process would.
    from pixcell.data import packing

    packing._opened.cache_clear()
    with pytest.raises(StoreMismatch, match="holds other records now"):
        pack_store(store.path, packed, shard_size=SHARD, workers=1)
    assert {name: data for name, data in contents(packed).items() if not name.startswith("packing")} == before


# ── what is packed ───────────────────────────────────────────────────────────────────────────────


def test_chosen_columns_and_tiles_alone_are_packed_and_counted_anew(tmp_path, store):
    fill(store, "B", 2, organ="lung", split="train")
    pack_store(
        store.path,
        tmp_path / "packed",
        columns=["latents-tiny"],
        where={"split": ["train"]},
        shard_size=SHARD,
        workers=1,
    )
    manifest = manifest_of(tmp_path / "packed")
    assert (manifest.num_tiles, list(manifest.columns), manifest.has_images) == (7, ["latents-tiny"], False)


def test_without_shuffling_slides_stay_together(tmp_path, store):
    pack_store(store.path, tmp_path / "packed", shard_size=SHARD, shuffle=False, workers=1)
    table = pq.read_table(tmp_path / "packed" / "index.parquet")
    assert table.select(store.index().column_names).to_pylist() == store.index().to_pylist()


def test_another_seed_is_another_order(tmp_path, store, packed):
    pack_store(store.path, tmp_path / "other", shard_size=SHARD, seed=1, workers=1)
    first, second = (pq.read_table(folder / "index.parquet") for folder in (packed, tmp_path / "other"))
    order = lambda table: list(zip(*(table[key].to_pylist() for key in ("slide_id", "tile")), strict=True))  # noqa: E731
    assert order(first) != order(second)
    assert sorted(order(first)) == sorted(order(second))


# ── requests that cannot be met ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"columns": ["latents-sd3"]}, MissingColumn, "no column 'latents-sd3'.*there: images, embeddings"),
        ({"where": {"organ": ["liver"]}}, StoreError, "no tile remains where organ is liver"),
        ({"where": {"orgn": ["lung"]}}, StoreError, "Did you mean 'organ'"),
        ({"shard_size": 1000}, StoreError, "shards of 1,000 bytes do not hold one tile"),
    ],
)
def test_a_request_that_cannot_be_met_leaves_nothing_behind(tmp_path, store, options, error, match):
    with pytest.raises(error, match=match):
        pack_store(store.path, tmp_path / "packed", **{"shard_size": SHARD, **options}, workers=1)
    assert not (tmp_path / "packed").exists()


def test_an_incomplete_column_is_refused_unless_it_is_left_out(tmp_path, store):
    store.write_images("B", tiles_of("B", 2), {})
    with pytest.raises(MissingColumn, match=r"lacks 1 of 3 slides \(B\)"):
        pack_store(store.path, tmp_path / "packed", shard_size=SHARD, workers=1)
    pack_store(store.path, tmp_path / "packed", columns=["images"], shard_size=SHARD, workers=1)
    assert manifest_of(tmp_path / "packed").num_tiles == 10


def test_an_empty_store_cannot_be_packed(tmp_path):
    store = TileStore.create(tmp_path / "empty", TILING)
    with pytest.raises(StoreError, match="nothing to pack"):
        pack_store(store.path, tmp_path / "packed")


def test_another_request_for_the_same_folder_names_the_difference(store, packed):
    with pytest.raises(StoreMismatch, match="seed is 0 in the pack and 1 here"):
        pack_store(store.path, packed, shard_size=SHARD, seed=1, workers=1)
    fill(store, "B", 2, split="train")
    with pytest.raises(StoreMismatch, match="num_tiles is 8 in the pack and 10 here"):
        pack_store(store.path, packed, shard_size=SHARD, workers=1)


def test_other_folders_are_not_written_into(tmp_path, store):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(StoreError, match=r"is no pack \(it holds chapter.txt\)"):
        pack_store(store.path, tmp_path / "thesis", shard_size=SHARD)
    with pytest.raises(OutputError, match="is the store itself"):
        pack_store(store.path, store.path, shard_size=SHARD)


def test_a_column_whose_name_no_tar_header_holds_is_refused_before_anything_is_written(tmp_path, store):
    name = "latents-" + "x" * 90
    for slide_id, count in (("A 1", 5), ("Präparat Ω 組織", 3)):
        facts = {"shape": (4, 4, 2), "dtype": "float16", "made_by": LATENTS_MADE_BY, "num_tiles": count}
        store.write_column(name, slide_id, [records_of("a", count, (4, 4, 2))], **facts)
    with pytest.raises(StoreError, match="tar headers hold 100"):
        pack_store(store.path, tmp_path / "packed", shard_size=SHARD)
    assert not (tmp_path / "packed").exists()


def test_a_pack_is_not_complete_while_a_shard_is_missing(store, tmp_path):
    writer = PackWriter(store, tmp_path / "packed", shard_bytes=SHARD)
    writer.write_shard(0)
    assert writer.shards_left() == [1, 2]
    with pytest.raises(OutputError, match="lacks 2 of 3 shards"):
        writer.finish()
