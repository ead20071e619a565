"""The loop: what a step does, and that a run is a function of its recipe."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pixcell.errors import RecipeError, RunError
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.metrics import read_metrics
from pixcell.training.objectives import Losses, Objective, Preview
from pixcell.training.optimizers import AdamWConfig, CameConfig
from pixcell.training.trainer import Trainer
from pixcell.training.trainer_config import TrainerConfig


class Points:
    """Points near a line, with noise that is drawn anew at each visit."""

    def __init__(self, count=20, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def draw(self, indices, rngs):
        drawn = []
        for index, rng in zip(indices, rngs, strict=True):
            x = np.float32(index / self.count)
            y = np.float32("nan" if index in self.bad else 2 * x + 0.1 * rng.standard_normal())
            drawn.append({"x": torch.tensor([x]), "y": torch.tensor([y]), "key": f"point-{index}"})
        return drawn


class Line:
    """The smallest objective: fit a line."""

    def __init__(self, samples=None, on_loss=None):
        torch.manual_seed(0)
        self.trainable = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.samples, self.on_loss, self.seen, self.facts = samples or Points(), on_loss, [], {"name": "line"}

    def move_to(self, device):
        self.device = device

    def loss(self, batch):
        self.seen.append(list(batch["key"]))
        if self.on_loss:
            self.on_loss(len(self.seen))
        per_sample = (self.trainable(batch["x"]) - batch["y"]).square().mean(1)
        return Losses(per_sample, {"twice": 2 * per_sample})

    def preview(self):
        return Preview(np.zeros((8, 8, 3), np.uint8), {"slope": 1.0})

    def export(self, folder, previous):
        folder.mkdir()
        (folder / "weights").write_bytes(self.trainable[0].weight.detach().numpy().tobytes())


ADAMW = AdamWConfig(lr=0.05)


def fit(run, objective=None, resume=True, device="cpu", optimizer=ADAMW, **settings):
    config = {
        "steps": 8, "batch_size": 4, "checkpoint_every": 3, "log_every": 1, "tensorboard": False,
    }  # fmt: skip
    objective = objective or Line()
    trainer = Trainer(objective, optimizer, TrainerConfig(device=device, **{**config, **settings}), run)
    return objective, trainer.fit(resume)


def weights(run, step=None):
    place = (
        Checkpoint.find(run) if step is None else Checkpoint.find(run / "checkpoints" / f"step-{step:08d}")
    )
    return {
        f"{kind}.{name}": value
        for kind in ("weights", "averages")
        for name, value in load_file(place.state / f"{kind}.safetensors").items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_smallest_objective_keeps_the_protocol():
    assert isinstance(Line(), Objective)


def test_training_lowers_the_loss_and_logs_every_part(tmp_path):
    _, outcome = fit(tmp_path, steps=60, log_every=10)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    assert outcome.loss == lines[-1]["loss"]
    for line in lines:
        assert line["twice"] == pytest.approx(2 * line["loss"], rel=1e-5)
        assert line["lr"] == 0.05
        assert line["gradient_norm"] > 0
        assert line["samples_per_s"] > 0


def test_samples_per_second_counts_all_samples_of_the_interval(tmp_path):
    _, outcome = fit(tmp_path, steps=6, log_every=6, checkpoint_every=6)
    (line,) = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert line["samples_per_s"] * outcome.seconds == pytest.approx(6 * 4, rel=0.01)


@pytest.mark.parametrize("optimizer", [ADAMW, CameConfig(lr=0.05)], ids=lambda config: config.name)
def test_stop_and_resume_is_the_undisturbed_run_bit_for_bit(tmp_path, optimizer):
    whole, _ = fit(tmp_path / "whole", optimizer=optimizer, keep_last=9)
    first, _ = fit(tmp_path / "parts", optimizer=optimizer, steps=3, keep_last=9)
    second, _ = fit(tmp_path / "parts", optimizer=optimizer, keep_last=9)
    assert first.seen + second.seen == whole.seen
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    logged = [
        [
            (line["step"], line.get("loss"), line.get("gradient_norm"))
            for line in read_metrics(path / "metrics.jsonl")
        ]
        for path in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert logged[0] == logged[1]


def test_the_run_does_not_depend_on_global_chance_nor_touches_it(tmp_path):
    fit(tmp_path / "one")
    objective = Line()
    torch.manual_seed(12345)
    np.random.seed(1)
    before = torch.get_rng_state()
    fit(tmp_path / "other", objective)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "other"))
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_processes_do_not_change_the_run(tmp_path):
    fit(tmp_path / "none", steps=4)
    fit(tmp_path / "two", steps=4, workers=2)
    assert same(weights(tmp_path / "none"), weights(tmp_path / "two"))


def test_micro_batches_add_up_to_the_batch(tmp_path):
    whole, _ = fit(tmp_path / "whole")
    parts, _ = fit(tmp_path / "parts", micro_batch_size=2)
    assert [one + other for one, other in zip(parts.seen[::2], parts.seen[1::2], strict=True)] == whole.seen
    for name, value in weights(tmp_path / "whole").items():
        # the same sums in another order
        torch.testing.assert_close(value, weights(tmp_path / "parts")[name], rtol=1e-4, atol=1e-6)


def test_every_epoch_sees_every_sample(tmp_path):
    objective, _ = fit(tmp_path, steps=10)
    seen = [key for batch in objective.seen for key in batch]
    assert sorted(seen[:20]) == sorted(seen[20:]) == sorted({f"point-{index}" for index in range(20)})


def test_the_export_holds_the_averages_and_the_state_the_weights(tmp_path):
    objective, outcome = fit(tmp_path)
    state = weights(tmp_path)
    exported = np.frombuffer((outcome.checkpoint.pipeline / "weights").read_bytes(), np.float32)
    assert np.array_equal(exported, state["averages.0.weight"].numpy().ravel())
    assert torch.equal(objective.trainable[0].weight, state["weights.0.weight"])
    assert not torch.equal(state["averages.0.weight"], state["weights.0.weight"])


def test_only_the_last_checkpoints_stay_and_each_has_its_preview(tmp_path):
    fit(tmp_path, keep_last=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000006",
        "step-00000008",
    ]
    assert sorted(path.stem for path in (tmp_path / "previews").iterdir()) == [
        "step-00000003", "step-00000006", "step-00000008",
    ]  # fmt: skip


def test_a_loss_that_is_not_finite_stops_with_step_batch_and_way_out(tmp_path):
    with pytest.raises(
        RunError, match=r"loss became nan at step 4 .*point-7.*step 3 are kept in .*optimizer\.lr"
    ) as stop:
        fit(tmp_path, Line(Points(bad=(7,))), seed=first_seed_with(7, step=3))
    assert "point-7" in str(stop.value)
    before = weights(tmp_path)
    assert all(value.isfinite().all() for value in before.values())


def first_seed_with(index, step):
    """A seed whose order meets a sample first at the given step."""
    from pixcell.training.order import SampleOrder

    for seed in range(1000):
        order = SampleOrder(20, seed)
        if index in [order[place] for place in range(step * 4, step * 4 + 4)]:
            return seed
    raise AssertionError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_the_step_saves_and_can_be_resumed(tmp_path, number):
    def stop(calls):
        if calls == 5:
            os.kill(os.getpid(), number)

    _, outcome = fit(tmp_path / "stopped", Line(on_loss=stop))
    assert (outcome.step, outcome.stopped_by) == (5, number.name)
    assert Checkpoint.find(tmp_path / "stopped").step == 5
    _, outcome = fit(tmp_path / "stopped")
    assert (outcome.step, outcome.stopped_by) == (8, None)
    fit(tmp_path / "whole")
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_a_complete_run_is_left_as_it_is(tmp_path):
    fit(tmp_path)
    before = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path.is_file() and path.suffix != ".jsonl"
    }
    objective, outcome = fit(tmp_path)
    assert objective.seen == []
    assert (outcome.step, outcome.loss) == (8, None)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_data_than_the_run_began_with_are_refused(tmp_path):
    fit(tmp_path, steps=3)
    with pytest.raises(RunError, match="num_samples was 20 and is 24"):
        fit(tmp_path, Line(Points(24)))


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    _, outcome = fit(tmp_path, steps=3)
    (outcome.checkpoint.state / "optimizer.pt").write_bytes(b"no")
    with pytest.raises(RunError, match=r"optimizer\.pt is not what was written"):
        fit(tmp_path)


def test_fewer_samples_than_a_batch_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="3 samples, fewer than one batch of 4"):
        fit(tmp_path, Line(Points(3)))


def test_a_batch_that_micro_batches_do_not_divide_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="4 is not a whole number of micro-batches of 3"):
        fit(tmp_path, micro_batch_size=3)


def test_two_trainings_of_different_precision_in_one_process(tmp_path):
    _, low = fit(tmp_path / "low", precision="bf16")
    _, full = fit(tmp_path / "full")
    assert low.step == full.step == 8
    assert not same(weights(tmp_path / "low"), weights(tmp_path / "full"))


def run_until_it_dies(recipe_file: Path, run: Path, moment: str, count: int) -> None:
    script = Path(__file__).with_name("dies.py")
    done = subprocess.run(
        [sys.executable, str(script), str(recipe_file), str(run), moment, str(count)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(("moment", "count", "resumes_at"), [("step", 4, 2), ("sync", 24, 2)])
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(tmp_path, recipe, moment, count, resumes_at):
    """SIGKILL in the fourth step, and while the second checkpoint is written (its files are synced)."""
    from pixcell.config import save_recipe
    from pixcell.tasks.train import train

    chosen = recipe("trainer.keep_last=9")
    save_recipe(chosen, tmp_path / "recipe.yaml")
    run_until_it_dies(tmp_path / "recipe.yaml", tmp_path / "killed", moment, count)
    assert Checkpoint.find(tmp_path / "killed").step == resumes_at
    if moment == "sync":
        assert list((tmp_path / "killed" / "checkpoints").glob(".unfinished-*"))
    train(chosen, tmp_path / "killed")
    train(chosen, tmp_path / "whole")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    for step in (2, 4, 6):
        assert same(weights(tmp_path / "killed", step), weights(tmp_path / "whole", step))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".unfinished-*"))
