"""The loop: what a step does, and that a run is a function of its recipe."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from pixcell.errors import OutputError, RecipeError, RunError
from pixcell.files import sha256_of
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.metrics import read_metrics
from pixcell.training.objectives import Objective
from pixcell.training.optimizers import AdamW8bitConfig, CameConfig
from tiny_objective import ADAMW, Line, Points, fit, same, weights


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


@pytest.mark.parametrize(
    "optimizer", [ADAMW, CameConfig(lr=0.05), AdamW8bitConfig(lr=0.05)], ids=lambda config: config.name
)
def test_stop_and_resume_is_the_undisturbed_run_bit_for_bit(tmp_path, optimizer):
    if optimizer.name == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
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


def test_the_last_steps_before_a_stop_are_in_the_log(tmp_path):
    def stop(calls):
        if calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    fit(tmp_path, Line(on_loss=stop), log_every=4)
    fit(tmp_path, log_every=4)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [4, 5, 8]


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


def test_with_a_damaged_checkpoint_deleted_the_run_goes_on_from_the_one_before(tmp_path):
    """The way out that the message names; lines logged after it are taken back, and written again."""
    fit(tmp_path / "whole")
    _, outcome = fit(tmp_path / "damaged", steps=6)
    (outcome.checkpoint.state / "weights.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match=r"Delete .*step-00000006 to go on from .* step-00000003") as stop:
        fit(tmp_path / "damaged")
    assert str(outcome.checkpoint.path) in str(stop.value)
    shutil.rmtree(outcome.checkpoint.path)
    objective, outcome = fit(tmp_path / "damaged")
    assert (len(objective.seen), outcome.step) == (5, 8)
    assert same(weights(tmp_path / "damaged"), weights(tmp_path / "whole"))
    steps = [line["step"] for line in read_metrics(tmp_path / "damaged" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 9))


def test_several_averages_go_on_bit_for_bit_and_the_first_is_exported(tmp_path):
    decays = (0.9, 0.2, 0.3)  # the first steps keep less than half in any case
    fit(tmp_path / "whole", ema_decays=decays)
    fit(tmp_path / "parts", ema_decays=decays, steps=3)
    _, outcome = fit(tmp_path / "parts", ema_decays=decays)
    state = weights(tmp_path / "parts")
    assert same(state, weights(tmp_path / "whole"))
    exported = np.frombuffer((outcome.checkpoint.pipeline / "weights").read_bytes(), np.float32)
    assert np.array_equal(exported, state["averages.0.weight"].numpy().ravel())
    fit(tmp_path / "alone", ema_decays=(0.2,))
    alone = weights(tmp_path / "alone")
    assert torch.equal(state["averages-0.2.0.weight"], alone["averages.0.weight"])
    assert not torch.equal(state["averages.0.weight"], alone["averages.0.weight"])


def test_other_averages_than_were_kept_are_refused(tmp_path):
    fit(tmp_path, steps=3, ema_decays=(0.9,))
    with pytest.raises(RunError, match=r"keeps averages of decay 0\.9, and .* asks for 0\.9, 0\.5"):
        fit(tmp_path, ema_decays=(0.9, 0.5))


def test_a_run_from_before_decays_were_written_down_goes_on(tmp_path):
    fit(tmp_path / "whole")
    _, outcome = fit(tmp_path / "old", steps=3)
    file = outcome.checkpoint.state / "progress.json"
    progress = json.loads(file.read_text())
    del progress["ema_decays"]
    file.write_text(json.dumps(progress))
    facts = json.loads((outcome.checkpoint.path / "checkpoint.json").read_text())
    facts["files"]["state/progress.json"] = sha256_of(file)
    (outcome.checkpoint.path / "checkpoint.json").write_text(json.dumps(facts))
    fit(tmp_path / "old")
    assert same(weights(tmp_path / "old"), weights(tmp_path / "whole"))


def test_every_so_many_steps_a_checkpoint_is_kept_for_good(tmp_path):
    fit(tmp_path, steps=9, checkpoint_every=1, keep_last=2, keep_every=4)
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [4, 8, 9]


def test_a_disk_that_fills_at_any_moment_leaves_a_checkpoint_and_the_run_goes_on_with_room(
    tmp_path, small_disk
):
    """From no room at all to enough, page by page: for metrics, a preview, each file of a checkpoint."""

    def fill_up(run):
        try:
            fit(run, keep_last=9)
        except OutputError as error:
            return str(error)
        return None

    fit(tmp_path / "whole", keep_last=9)
    disk = small_disk("2m")
    ended = []
    for num_pages in range(0, 60, 5):
        run, ballast = disk / f"run-{num_pages}", disk / "ballast"
        fit(run, steps=3, keep_last=9)
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(max(0, free - num_pages * 4096)))
        said = fill_up(run)
        last = Checkpoint.find(run)
        last.verify()
        assert (last.step == 8) if said is None else "disk is full" in said
        ended.append(last.step)
        ballast.unlink()
        fit(run, keep_last=9)
        assert same(weights(run), weights(tmp_path / "whole")), num_pages
        assert not list((run / "checkpoints").glob(".unfinished-*"))
        shutil.rmtree(run)
    assert (ended[0], ended[-1]) == (3, 8)
    assert 6 in ended


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
