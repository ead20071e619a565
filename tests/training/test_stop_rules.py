"""What ends a run early: losses beyond hope, signals, and the clock."""

import math
import os
import signal
import time
from functools import partial

import pytest

from pixcell.errors import RunError
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.stop_rules import FiniteRule, SpikeConfig, SpikeRule, StopRequests
from tiny_objective import Line, Points, fit

needs_posix = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="SIGUSR1 is a POSIX signal")


def batch():
    return [("a", 0.5), ("b", math.nan), ("c", 2.0)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused_with_its_batch_worst_first(value):
    rule = FiniteRule("run", has_loss_scale=False)
    rule.check_loss(1.0, 6, batch, "")
    with pytest.raises(
        RunError, match=rf"loss became {value} at step 7 of run.*b \(loss nan\), c .*Go back\."
    ):
        rule.check_loss(value, 7, batch, "Go back. ")


def test_a_gradient_may_overflow_under_a_loss_scale_but_not_for_ever():
    with pytest.raises(RunError, match="gradient became inf at step 1"):
        FiniteRule("run", has_loss_scale=False).check_gradient(math.inf, 1, batch, "")
    rule = FiniteRule("run", has_loss_scale=True)
    for step in range(1, 101):
        rule.check_gradient(math.inf, step, batch, "")
    rule.check_gradient(1.0, 101, batch, "")
    for step in range(102, 202):
        rule.check_gradient(math.inf, step, batch, "")
    with pytest.raises(RunError, match="each of the 100 steps before"):
        rule.check_gradient(math.inf, 202, batch, "")
    with pytest.raises(
        RunError, match="loss became nan at step 203 of run, on"
    ):  # of steps before it no word
        rule.check_loss(math.nan, 203, batch, "")


SPIKE = SpikeConfig(factor=3, window=4, patience=2)


def take(rule, losses):
    for step, loss in enumerate(losses, 1):
        rule.check(loss, step, partial(list, [(f"sample-of-step-{step}", loss)]))


@pytest.mark.parametrize(
    "losses",
    [
        [1, 1, 1, 9, 1, 9, 1, 9],  # one bad batch at a time
        [1, 9, 9, 9, 9],  # before the window is half full nobody knows what is usual
        [1, 1.5, 2.2, 3.4, 5, 7.6, 11.4],  # growing, but never three times the median of the last four
        [-1, -1, -1, 9, 9, 9],  # a multiple of a negative loss means nothing
    ],
)
def test_a_loss_that_comes_back_or_is_usual_is_no_spike(losses):
    take(SpikeRule(SPIKE, "run"), losses)


def test_a_loss_that_ran_away_is_refused_with_the_batch_on_which_it_did():
    message = r"ran away: from step 4 to step 5 .* 3 times its median of 1, and is 8 now.*sample-of-step-4"
    with pytest.raises(RunError, match=message):
        take(SpikeRule(SPIKE, "run"), [1, 1, 1, 9, 8])


def test_without_a_rule_nothing_is_a_spike():
    take(SpikeRule(None, "run"), [1, 1, 1, 1e9, 1e9, 1e9])


def test_a_run_that_diverges_ends_and_keeps_its_checkpoints(tmp_path):
    """A learning rate a thousand times too large."""
    from pixcell.training.optimizers import AdamWConfig

    with pytest.raises(RunError, match="ran away"):
        fit(
            tmp_path,
            optimizer=AdamWConfig(lr=5.0),
            steps=60,
            spike=SpikeConfig(factor=1.5, window=4, patience=3),
        )
    Checkpoint.find(tmp_path).verify()


@needs_posix
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)]
)
def test_a_signal_that_comes_twice_at_once_means_the_same_as_one(number):
    with StopRequests(None, time.monotonic()) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    now = time.monotonic()
    with StopRequests(None, now) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        with pytest.raises(KeyboardInterrupt):
            stop._request(signal.SIGINT, None)


@needs_posix
def test_a_cluster_s_warning_saves_and_the_run_goes_on(tmp_path):
    def warn(calls):
        if calls == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    _, outcome = fit(tmp_path, Line(on_loss=warn))
    assert (outcome.step, outcome.stopped_by) == (5, "SIGUSR1")
    assert Checkpoint.find(tmp_path).step == 5
    assert fit(tmp_path)[1].stopped_by is None


def test_the_clock_leaves_time_for_a_step_and_a_checkpoint(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stop = StopRequests(max_hours=1, started=0.0)
    stop.took(10.0)
    stop.took(0.0, 100.0)
    clock[0] = 3600 - 2 * (10 + 100) - 1
    assert stop.reason is None
    clock[0] += 2
    assert stop.reason == "trainer.max_hours"


def test_a_time_limit_saves_and_the_run_goes_on(tmp_path):
    _, outcome = fit(tmp_path, Line(on_loss=lambda _: time.sleep(0.1)), steps=200, max_hours=2 / 3600)
    assert outcome.stopped_by == "trainer.max_hours"
    assert 0 < outcome.step < 20
    assert Checkpoint.find(tmp_path).step == outcome.step
    assert fit(tmp_path, steps=outcome.step + 1)[1].step == outcome.step + 1


def test_the_worst_samples_are_named_with_their_losses(tmp_path):
    with pytest.raises(RunError, match=r"on the batch point-\d+ \(loss nan\), point-\d+ \(loss 0?\."):
        fit(tmp_path, Line(Points(bad=(7,))))
