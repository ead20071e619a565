"""A checkpoint is there as a whole, or not at all."""

import hashlib
import json
import multiprocessing
import os

import pytest

from pixcell.errors import OutputError, RunError
from pixcell.training.checkpoints import (
    Checkpoint,
    exclusively,
    link_or_copy,
    prune,
    remove_unfinished,
    write_checkpoint,
)


def write(folder):
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "weights").write_bytes(b"weights")
    (folder / "state").mkdir()
    (folder / "state" / "optimizer").write_bytes(b"moments")


def test_what_was_written_is_found_and_verifies(tmp_path):
    write_checkpoint(tmp_path, 20, write, {"note": "x"})
    write_checkpoint(tmp_path, 100, write)
    last = Checkpoint.find(tmp_path)
    last.verify()
    assert (last.step, last.path.name) == (100, "step-00000100")
    first = Checkpoint.find(tmp_path / "checkpoints" / "step-00000020")
    assert (first.step, first.facts["note"]) == (20, "x")
    assert (first.pipeline / "weights").read_bytes() == b"weights"


@pytest.mark.parametrize("damage", ["changed", "missing", "facts"])
def test_damage_is_named_with_the_way_out(tmp_path, damage):
    checkpoint = write_checkpoint(tmp_path, 5, write)
    victim = checkpoint.path / ("checkpoint.json" if damage == "facts" else "state/optimizer")
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(b"moment!")
    with pytest.raises(RunError, match=rf"{victim.name}.*Delete .*step-00000005"):
        Checkpoint.find(tmp_path).verify()


def test_a_failure_while_writing_leaves_the_one_before(tmp_path):
    write_checkpoint(tmp_path, 1, write)

    def fail(folder):
        write(folder)
        raise KeyError("broken")

    with pytest.raises(KeyError):
        write_checkpoint(tmp_path, 2, fail)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_full_disk_is_a_message_and_the_one_before_stays(small_disk):
    disk = small_disk("1m")
    write_checkpoint(disk, 1, write)
    with pytest.raises(OutputError, match="disk is full"):
        write_checkpoint(disk, 2, lambda folder: (folder / "big").write_bytes(bytes(2 << 20)))
    Checkpoint.find(disk).verify()
    assert Checkpoint.find(disk).step == 1


def test_unfinished_ones_are_no_checkpoints_and_are_removed(tmp_path):
    write_checkpoint(tmp_path, 1, write)
    left = tmp_path / "checkpoints" / ".unfinished-step-00000002-abc"
    left.mkdir()
    assert Checkpoint.find(tmp_path).step == 1
    remove_unfinished(tmp_path)
    assert not left.exists()


def test_only_the_last_are_kept(tmp_path):
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step, write)
    prune(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000010",
    ]


def test_some_are_kept_for_good(tmp_path):
    for step in (10, 20, 25, 30, 40, 45):
        write_checkpoint(tmp_path, step, write)
    deleted = prune(tmp_path, keep_last=1, keep_every=20)
    assert [path.name[-2:] for path in deleted] == ["10", "25", "30"]
    assert sorted(path.name[-2:] for path in (tmp_path / "checkpoints").iterdir()) == ["20", "40", "45"]


def test_the_way_out_says_where_the_run_goes_on(tmp_path):
    first = write_checkpoint(tmp_path, 5, write)
    last = write_checkpoint(tmp_path, 100, write)
    for checkpoint, way_out in (
        (last, "Delete .*step-00000100 to go on from the checkpoint before it, step-00000005"),
        (first, "Delete .*step-00000005 to begin the run anew; there is no checkpoint before it"),
    ):
        (checkpoint.state / "optimizer").write_bytes(b"moment!")
        with pytest.raises(RunError, match=way_out):
            checkpoint.verify()
    elsewhere = tmp_path / "elsewhere"
    last.path.rename(elsewhere)
    with pytest.raises(RunError, match="Copy it again from its run"):
        Checkpoint.find(elsewhere).verify()


def test_a_damaged_file_that_checkpoints_share_is_not_met_by_deleting_one(tmp_path):
    first = write_checkpoint(tmp_path, 1, write)
    last = write_checkpoint(tmp_path, 2, lambda folder: link_or_copy(first.pipeline, folder / "pipeline"))
    original = (first.pipeline / "weights").read_bytes()
    (last.pipeline / "weights").write_bytes(b"WEIGHTS")
    with pytest.raises(RunError, match=rf"share this file.*put back.*{hashlib.sha256(original).hexdigest()}"):
        last.verify()
    (last.pipeline / "weights").write_bytes(original)
    last.verify()
    first.verify()


def test_a_folder_without_checkpoints_says_what_it_is(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        Checkpoint.find(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RunError, match="holds no checkpoint yet"):
        Checkpoint.find(tmp_path)


def test_a_run_has_one_writer(tmp_path):
    with exclusively(tmp_path), pytest.raises(RunError, match="another process"), exclusively(tmp_path):
        pass
    with exclusively(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="loaders are forked on Unix")
def test_a_loader_that_outlives_its_trainer_does_not_hold_the_run(tmp_path):
    context = multiprocessing.get_context("fork")
    begun, done = context.Event(), context.Event()
    with exclusively(tmp_path):
        loader = context.Process(target=lambda: begun.set() or done.wait(60))
        loader.start()
        assert begun.wait(60)
    try:
        with exclusively(tmp_path):
            assert loader.is_alive()
    finally:
        done.set()
        loader.join()


def test_frozen_files_share_their_bytes(tmp_path):
    source = tmp_path / "vae"
    source.mkdir()
    (source / "weights").write_bytes(b"frozen")
    link_or_copy(source, tmp_path / "again")
    assert (tmp_path / "again" / "weights").stat().st_ino == (source / "weights").stat().st_ino


def test_facts_are_plain_json(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 3, write, {"held_out/psnr_db": 21.5})
    content = json.loads((checkpoint.path / "checkpoint.json").read_text())
    assert content["held_out/psnr_db"] == 21.5
    assert sorted(content["files"]) == ["pipeline/weights", "state/optimizer"]
