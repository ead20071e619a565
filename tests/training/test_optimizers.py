"""Rates over time, and averages of weights."""

import pytest
import torch
from torch import nn

from pixcell.errors import RunError
from pixcell.training.optimizers import AveragedWeights, OptimizerConfig, learning_rate, make_optimizer


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_rises_in_a_line_to_the_full_rate(schedule):
    config = OptimizerConfig(lr=2.0, warmup_steps=4, schedule=schedule)
    assert [learning_rate(config, step, 100) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_a_constant_rate_does_not_know_how_long_the_run_is():
    config = OptimizerConfig(lr=2.0, warmup_steps=4)
    assert {learning_rate(config, step, total) for step in (4, 50, 99) for total in (100, 1000)} == {2.0}


def test_a_cosine_ends_at_its_share():
    config = OptimizerConfig(lr=2.0, schedule="cosine", final_lr_share=0.1)
    assert learning_rate(config, 50, 100) == pytest.approx(1.1)
    assert learning_rate(config, 100, 100) == pytest.approx(0.2)


def test_the_average_follows_the_paper_formula_once_it_is_warm():
    model = nn.Linear(2, 1, bias=False)
    averages = AveragedWeights(model, decay=0.9)
    expected = model.weight.detach().clone()
    for step in range(200, 205):  # (1 + step) / (10 + step) is above 0.9 from step 80 on
        with torch.no_grad():
            model.weight += 1
        averages.update(step)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(averages.averages["weight"], expected)


def test_the_first_average_has_forgotten_most_of_the_start():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averages = AveragedWeights(model, decay=0.9999)
    nn.init.ones_(model.weight)
    averages.update(0)
    assert averages.averages["weight"].item() == pytest.approx(0.9)


def test_weights_come_back_bit_for_bit_even_after_an_error():
    model = nn.Linear(3, 3)
    averages = AveragedWeights(model, decay=0.5)
    with torch.no_grad():
        model.weight += 1 / 3
    before = model.weight.detach().clone()

    def look_and_fail():
        with averages.in_place():
            assert torch.equal(model.weight, averages.averages["weight"])
            assert torch.equal(averages.displaced["weight"], before)
            raise KeyError

    with pytest.raises(KeyError):
        look_and_fail()
    assert torch.equal(model.weight, before)
    assert averages.displaced == {}


def test_frozen_weights_are_neither_moved_nor_averaged():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    assert set(AveragedWeights(model, 0.9).averages) == {"0.weight", "0.bias"}
    assert len(make_optimizer(model, OptimizerConfig()).param_groups[0]["params"]) == 2


def test_averages_of_another_model_are_refused():
    with pytest.raises(RunError, match="another model"):
        AveragedWeights(nn.Linear(1, 1), 0.9).load({"weight": torch.zeros(1, 1)})
