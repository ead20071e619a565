"""Bad tiles are named or have no part, and no loader process ends a run without a word."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pixcell.errors import CorruptShard, RunError, UnreadableTile
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.determinism import BatchPlan
from pixcell.training.dropped import read_dropped
from pixcell.training.loading import dead_loaders_are_errors, load_batches
from pixcell.training.metrics import read_metrics
from pixcell.training.objectives import Losses
from pixcell.training.order import SampleOrder
from tiny_objective import Line, Points, fit, same, weights


class Tiles(Points):
    """Points, of which some are tiles that cannot be read."""

    def __init__(self, count=20, unreadable=()):
        super().__init__(count)
        self.unreadable = unreadable

    def draw(self, indices, rngs):
        for index in indices:
            if index in self.unreadable:
                raise UnreadableTile("slide-1", index, 10 * index, 0, "its JPEG has no end.")
        return [
            {**one, "process": os.getpid()} for one in super().draw(indices, rngs)
        ]  # fmt: skip


def batches(samples, steps=5, batch=4, micro=None, **options):
    plan = BatchPlan(
        SampleOrder(len(samples), 0),
        batch_size=batch,
        micro_batch_size=micro or batch,
        first_step=0,
        last_step=steps,
    )
    return load_batches(samples, plan, seed=0, **options)


# ── bad tiles ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_tile_is_an_error_with_slide_tile_and_way_out(workers):
    with pytest.raises(
        UnreadableTile, match=r"^tile 7 of slide 'slide-1', at x=70, y=0.*JPEG has no end.*--on-bad-tile drop"
    ):
        list(batches(Tiles(unreadable=[7]), workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_of_samples_arrive_as_themselves(workers):
    class Broken(Points):
        def draw(self, indices, rngs):
            raise CorruptShard("shard 3 is gone.")

    with pytest.raises(CorruptShard, match=r"^shard 3 is gone\.$"):
        list(batches(Broken(), workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dropped_tile_takes_no_other_with_it(workers):
    bad = [3, 7, 8]
    whole = list(batches(Tiles(), workers=workers))
    left = list(batches(Tiles(unreadable=bad), workers=workers, on_bad_tile="drop"))
    for one, other in zip(whole, left, strict=True):
        keys = list(one.samples["key"])
        lost = [row for row, key in enumerate(keys) if int(key.removeprefix("point-")) in bad]
        assert other.keys == [key for row, key in enumerate(keys) if row not in lost]
        assert [dropped.tile for dropped in other.dropped] == [
            int(keys[row].removeprefix("point-")) for row in lost
        ]
        assert [dropped.position for dropped in other.dropped] == lost
        assert (other.readable is None) == (not lost)
        kept = [row for row in range(4) if row not in lost]
        for name in ("x", "y"):
            assert torch.equal(one.samples[name][kept], other.samples[name][kept])
            assert one.samples[name].shape == other.samples[name].shape
    assert sorted(dropped.tile for batch in left for dropped in batch.dropped) == bad


def test_a_micro_batch_without_a_readable_tile_keeps_its_shape():
    order = SampleOrder(20, 0)
    bad = [order[place] for place in range(4)]
    first = next(batches(Tiles(unreadable=bad), on_bad_tile="drop"))
    assert first.keys == []
    assert first.samples["x"].shape == (4, 1)
    assert not first.readable.any()
    assert len(first.dropped) == 4


def test_samples_none_of_which_can_be_read_are_an_error():
    with pytest.raises(RunError, match="none of 64 samples in a row can be read"):
        next(batches(Tiles(unreadable=range(20)), on_bad_tile="drop"))


class Blind(Line):
    """The line, fitted without some points: what dropping them must come to."""

    def __init__(self, without):
        super().__init__(Tiles())
        self.without = {f"point-{index}" for index in without}

    def loss(self, batch):
        losses = super().loss(batch)
        counts = torch.tensor([key not in self.without for key in batch["key"]])
        return Losses(torch.where(counts, losses.per_sample, 0.0), losses.parts)


BAD = (3, 7, 8, 12)


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_a_dropped_sample_has_no_part_in_the_weights_however_the_batch_is_spread(tmp_path, micro):
    fit(tmp_path / "dropped", Line(Tiles(unreadable=BAD)), on_bad_tile="drop", micro_batch_size=micro)
    fit(tmp_path / "blind", Blind(BAD), micro_batch_size=micro)
    assert same(weights(tmp_path / "dropped"), weights(tmp_path / "blind"))
    whole = tmp_path / "whole"
    fit(whole, Blind(BAD))
    for name, value in weights(tmp_path / "dropped").items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=1e-4, atol=1e-6)


def test_loader_processes_drop_the_same_samples(tmp_path):
    for workers in (0, 2):
        fit(
            tmp_path / str(workers), Line(Tiles(unreadable=BAD)), on_bad_tile="drop", workers=workers, steps=6
        )
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))
    assert read_dropped(tmp_path / "0") == read_dropped(tmp_path / "2")


def test_dropped_samples_are_counted_listed_and_not_in_the_figures(tmp_path):
    _, outcome = fit(tmp_path, Line(Tiles(unreadable=BAD)), on_bad_tile="drop", steps=10)
    assert outcome.num_dropped == 8  # two epochs of twenty
    dropped = read_dropped(tmp_path)
    assert sorted(one.tile for one in dropped) == sorted(2 * BAD)
    order = SampleOrder(20, 0)
    for one in dropped:
        assert order[(one.step - 1) * 4 + one.position] == one.tile
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    for line in lines:
        assert line["dropped"] == sum(one.step <= line["step"] for one in dropped)
        assert line["twice"] == pytest.approx(2 * line["loss"], rel=1e-5)  # means over the same samples
    first = json.loads((tmp_path / "dropped.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (first["slide_id"], first["reason"]) == ("slide-1", "its JPEG has no end.")


def test_the_mean_loss_is_that_of_the_samples_that_were_read(tmp_path):
    """Copies that fill the rows of unreadable tiles must not show."""
    order = SampleOrder(20, 0)
    objective, kept = Line(Tiles(unreadable=[order[1]])), []
    plain = objective.loss

    def loss(batch):
        losses = plain(batch)
        kept.append(losses.per_sample.detach())
        return losses

    objective.loss = loss
    fit(tmp_path, objective, on_bad_tile="drop", steps=1)
    (line,) = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert line["loss"] == pytest.approx(float(kept[0][[0, 2, 3]].mean()), rel=1e-6)


def test_going_on_takes_back_what_was_dropped_after_the_checkpoint(tmp_path):
    class Killed(Exception):
        pass

    def die(calls):
        if calls == 6:
            raise Killed

    samples = Tiles(unreadable=BAD)
    with pytest.raises(Killed):
        fit(tmp_path / "parts", Line(samples, on_loss=die), on_bad_tile="drop")
    assert Checkpoint.find(tmp_path / "parts").step == 3
    fit(tmp_path / "parts", Line(samples), on_bad_tile="drop")
    _, whole = fit(tmp_path / "whole", Line(samples), on_bad_tile="drop")
    assert read_dropped(tmp_path / "parts") == read_dropped(tmp_path / "whole")
    assert whole.num_dropped == len(read_dropped(tmp_path / "whole")) > 0
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_run_that_met_a_bad_tile_can_go_on_without_it(tmp_path):
    order = SampleOrder(20, 0)
    samples = Tiles(unreadable=[order[17]])  # of the fifth step
    with pytest.raises(UnreadableTile):
        fit(tmp_path, Line(samples), steps=5)
    assert not (tmp_path / "dropped.jsonl").exists()
    _, outcome = fit(tmp_path, Line(samples), on_bad_tile="drop", steps=5)
    assert (outcome.step, outcome.num_dropped) == (5, 1)


def test_a_step_without_a_readable_sample_ends_the_run(tmp_path):
    order = SampleOrder(20, 0)
    bad = [order[place] for place in range(16, 20)]
    with pytest.raises(RunError, match=r"no sample of step 5 of .* can be read: tile .* of slide 'slide-1'"):
        fit(tmp_path, Line(Tiles(unreadable=bad)), on_bad_tile="drop")
    assert Checkpoint.find(tmp_path).step == 3


# ── loader processes ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_stop_that_reaches_a_loader_too_does_not_take_its_samples(number):
    loaded = batches(Tiles(), steps=40, workers=1)
    with dead_loaders_are_errors(1):
        process = int(next(loaded).samples["process"][0])
        assert process != os.getpid()
        os.kill(process, number)
        assert len(list(loaded)) == 39


def test_a_loader_that_dies_is_an_error_that_says_what_to_do():
    def train():
        loaded = batches(Tiles(), steps=400, workers=1)
        os.kill(int(next(loaded).samples["process"][0]), signal.SIGKILL)
        list(loaded)

    message = r"a loader process died: DataLoader worker.*Lower trainer\.workers \(now 1"
    with pytest.raises(RunError, match=message), dead_loaders_are_errors(1):
        train()
    # Another process that ends raises the error no more: the loader is gone, whoever keeps the error.
    assert subprocess.run([sys.executable, "-c", ""], check=True).returncode == 0


def test_a_mistake_inside_of_a_loader_keeps_its_traceback():
    class Wrong(Points):
        def draw(self, indices, rngs):
            raise RuntimeError("a mistake of a programmer")

    with pytest.raises(RuntimeError, match="a mistake of a programmer"), dead_loaders_are_errors(1):
        list(batches(Wrong(), workers=1))


def test_a_program_ends_although_an_error_keeps_its_loader():
    """Loaders ignore SIGTERM, by which Python would end them before it waits for them."""
    program = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from test_loading import Points, batches

class Wrong(Points):
    def draw(self, indices, rngs):
        raise RuntimeError("a mistake of a programmer")

try:
    list(batches(Wrong(), workers=1))
except RuntimeError as error:
    kept = error
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
