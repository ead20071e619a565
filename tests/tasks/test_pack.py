"""``pixcell pack`` from the command line, and what ``pixcell inspect`` says of its result."""

import sys

import pytest

from pixcell import cli
from pixcell.data.pack_format import Manifest
from pixcell.errors import OutputError
from pixcell.tasks.inspect import inspect
from pixcell.tasks.pack import pack_store
from stores import contents, fill, small_store
from training_fixtures import small_disk

__all__ = ["small_disk"]  # fixture


def test_the_command_takes_columns_tiles_and_sizes_as_people_write_them(tmp_path, monkeypatch, capsys):
    store = small_store(tmp_path / "store")
    fill(store, "B", 2, organ="lung", split="train")
    columns = ["--columns", "latents-tiny,images", "--where", "organ=lung", "--where", "organ=colon"]
    command = ["pack", str(store.path), str(tmp_path / "packed"), *columns, "--shard-size", "30 KB"]
    monkeypatch.setattr(sys, "argv", ["pixcell", *command, "--workers", "1", "--set", "seed=3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "images, latents-tiny" in capsys.readouterr().out
    manifest = Manifest.from_bytes((tmp_path / "packed" / "pack.json").read_bytes(), "pack.json")
    assert (manifest.num_tiles, len(manifest.shards)) == (5, 2)
    assert (list(manifest.columns), manifest.request["seed"]) == (["latents-tiny"], 3)


def test_a_full_disk_ends_it_with_the_way_out_and_it_goes_on_when_there_is_room(tmp_path, small_disk):
    small_store(tmp_path / "store")
    whole = pack_store(tmp_path / "store", tmp_path / "whole", shard_size=30_000, workers=1).folder
    disk = small_disk("400k")
    (disk / "other").write_bytes(bytes(330_000))
    with pytest.raises(OutputError, match="the disk is full"):
        pack_store(tmp_path / "store", disk / "packed", shard_size=30_000, workers=1)
    (disk / "other").unlink()
    pack_store(tmp_path / "store", disk / "packed", shard_size=30_000, workers=1)
    assert contents(disk / "packed") == contents(whole)


def test_inspect_explains_a_pack_and_finds_damage(tmp_path):
    small_store(tmp_path / "store")
    packed = pack_store(tmp_path / "store", tmp_path / "packed", shard_size=30_000, workers=1).folder
    explained = inspect(packed, verify=True)
    assert explained.kind == "pack of shards"
    assert explained.problems == []
    assert "latents-tiny" in str(explained.as_json())
    shard = packed / "shards" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    (problem,) = inspect(packed, verify=True).problems
    assert "000001.tar was changed after it was written" in str(problem)
