"""Figures of the log are means over samples, told apart by time; and the pace tells what is left."""

import math

import pytest
import torch

from pixcell.training.figures import NUM_TIME_BINS, Figures, ModelFlops, Pace, Window, note_of, sums_of
from pixcell.training.flops import Peak
from pixcell.training.objectives import Losses


def losses(values, times=None, **parts):
    return Losses(
        torch.tensor(values),
        {name: torch.tensor(part) for name, part in parts.items()},
        None if times is None else torch.tensor(times),
    )


def plain(sums):
    return {name: float(total) for name, total in sums.items()}


def summary(*steps, clip_norm=None, norms=None):
    window = Window(clip_norm)
    for place, step in enumerate(steps):
        window.add(plain(sums_of(step)), norms[place] if norms else 1.0, seconds=0.5)
    return window.summary()


def test_means_are_over_samples_however_they_are_cut_into_micro_batches():
    whole = summary([losses([1.0, 2.0, 3.0, 6.0], [0.1, 0.2, 0.6, 0.6], mse=[1.0, 1.0, 2.0, 4.0])])
    parts = summary(
        [losses([1.0], [0.1], mse=[1.0]), losses([2.0, 3.0, 6.0], [0.2, 0.6, 0.6], mse=[1.0, 2.0, 4.0])]
    )
    assert whole == parts
    assert (whole["loss"], whole["mse"]) == (3.0, 2.0)


def test_a_loss_counts_in_the_bin_of_its_time_and_in_no_other():
    figures = summary([losses([1.0, 3.0, 8.0], [0.0, 0.01, 0.999])])
    by_time = {name: value for name, value in figures.items() if name.startswith("loss_by_time/")}
    assert by_time == {"loss_by_time/0.000-0.125": 2.0, "loss_by_time/0.875-1.000": 8.0}


def test_every_time_has_its_bin():
    assert NUM_TIME_BINS == 8
    figures = summary([losses([1.0] * 3, [0.0, 1.0, 0.5])])
    assert sum(name.startswith("loss_by_time/") for name in figures) == 3


def test_bins_weigh_samples_over_steps_of_a_window():
    figures = summary([losses([1.0, 1.0], [0.3, 0.3])], [losses([4.0, 9.0], [0.3, 0.9])])
    assert figures["loss_by_time/0.250-0.375"] == pytest.approx((1 + 1 + 4) / 3)


def test_processes_exchange_the_same_names_whatever_their_times_are():
    assert list(sums_of([losses([1.0], [0.1])])) == list(sums_of([losses([1.0], [0.9])]))


def test_without_times_there_are_no_bins():
    assert not any("time" in name for name in summary([losses([1.0, 2.0])]))


def test_a_loss_that_is_no_number_leaves_the_other_bins_alone():
    figures = summary([losses([math.nan, 2.0], [0.1, 0.9])])
    assert figures["loss_by_time/0.875-1.000"] == 2.0


def test_gradients_are_counted_over_all_steps_of_a_window():
    one = [losses([1.0])]
    figures = summary(one, one, one, one, clip_norm=2.0, norms=[1.0, 3.0, math.inf, 5.0])
    assert (figures["gradient_norm"], figures["gradient_norm_max"]) == (3.0, 5.0)
    assert figures["clipped"] == pytest.approx(2 / 3)
    assert figures["overflows"] == 1


def test_speed_counts_the_samples_of_all_processes():
    assert summary([losses([1.0, 1.0, 1.0])], [losses([1.0])])["samples_per_s"] == pytest.approx(4.0)


def test_what_is_left_is_the_steps_and_the_checkpoints():
    pace = Pace(steps=100, checkpoint_every=30)
    assert math.isnan(pace.seconds_left(0))
    pace.took(10, 20.0)
    assert pace.seconds_left(40) == pytest.approx(60 * 2.0)
    pace.saved(7.0)
    assert pace.seconds_left(40) == pytest.approx(60 * 2.0 + 3 * 7.0)  # at 60, 90 and the last one
    assert pace.seconds_left(100) == 0


def test_a_slow_stretch_moves_the_pace_and_does_not_set_it():
    pace = Pace(steps=100, checkpoint_every=100)
    pace.took(10, 10.0)
    pace.took(10, 100.0)
    assert 1.0 < pace.seconds_left(90) / 10 < 10.0


def test_a_line_has_the_share_of_the_peak_and_begins_anew():
    flops = ModelFlops(2e9, Peak(1e10, "some device", "fp32", is_measured=False), num_devices=2)
    figures = Figures(steps=4, checkpoint_every=2, model_flops=flops)
    for _ in range(2):
        figures.add(plain(sums_of([losses([1.0, 1.0])])), 1.0, 1.0)
        line = figures.line(1, torch.device("cpu"))
        assert line["flop_use"] == pytest.approx(2e9 * 2 / (1e10 * 2))
    assert line["memory_gib"] > 0.01
    assert note_of({**line, "lr": 0.1}).startswith("loss 1.0000, gradient 1, lr 0.1, 2.0 images/s, MFU 20%")


def test_the_note_of_a_line_tells_the_losses_from_clean_to_noise():
    line = {"loss": 1.0, "lr": 0.1, "samples_per_s": 2.0, "loss_by_time/0.875-1.000": 0.25}
    line |= {"loss_by_time/0.000-0.125": 1.5}
    assert note_of(line).endswith("images/s\nloss from clean to noise: 1.5 - - - - - - 0.25")
