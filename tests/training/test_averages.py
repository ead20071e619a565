"""Averages of weights."""

import pytest
import torch
from torch import nn

from pixcell.errors import RunError
from pixcell.training.averages import AveragedWeights


def test_the_average_follows_the_paper_formula_once_it_is_warm():
    model = nn.Linear(2, 1, bias=False)
    averages = AveragedWeights(model, [0.9])
    expected = model.weight.detach().clone()
    for step in range(200, 205):  # (1 + step) / (10 + step) is above 0.9 from step 80 on
        with torch.no_grad():
            model.weight += 1
        averages.update(step)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(averages.averages[0]["weight"], expected)


def test_without_warm_up_the_decay_is_the_same_from_the_first_step():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averages = AveragedWeights(model, [0.9], warmup=False)
    nn.init.ones_(model.weight)
    for step, expected in enumerate((0.1, 0.19, 0.271)):
        averages.update(step)
        assert averages.averages[0]["weight"].item() == pytest.approx(expected)


def test_each_decay_has_its_own_average_as_if_it_were_the_only_one():
    model = nn.Linear(2, 2)
    several = AveragedWeights(model, [0.9, 0.5])
    alone = [AveragedWeights(model, [decay]) for decay in (0.9, 0.5)]
    for step in range(100, 105):
        with torch.no_grad():
            model.weight += 1
        for averages in (several, *alone):
            averages.update(step)
    assert several.decays == (0.9, 0.5)
    for values, one in zip(several.averages, alone, strict=True):
        assert torch.equal(values["weight"], one.averages[0]["weight"])
    assert not torch.equal(several.averages[0]["weight"], several.averages[1]["weight"])


def test_averages_are_float32_whatever_the_weights_are():
    """At 0.9999 a step moves the average by less than bfloat16 can tell."""
    model = nn.Linear(2, 2).bfloat16()
    averages = AveragedWeights(model, [0.9999])
    before = averages.averages[0]["weight"].clone()
    with torch.no_grad():
        model.weight += 1
    averages.update(10**6)
    moved = averages.averages[0]["weight"] - before
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4), rtol=0.02, atol=0)


def test_the_first_average_has_forgotten_most_of_the_start():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averages = AveragedWeights(model, [0.9999])
    nn.init.ones_(model.weight)
    averages.update(0)
    assert averages.averages[0]["weight"].item() == pytest.approx(0.9)


def test_frozen_weights_are_not_averaged():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    assert set(AveragedWeights(model, [0.9]).averages[0]) == {"0.weight", "0.bias"}


def test_averages_of_another_model_are_refused():
    with pytest.raises(RunError, match="another model"):
        AveragedWeights(nn.Linear(1, 1), [0.9]).load([{"weight": torch.zeros(1, 1)}])


def test_another_number_of_averages_is_refused():
    averages = AveragedWeights(nn.Linear(1, 1), [0.9, 0.99])
    with pytest.raises(RunError, match="1 averages were saved, and there are 2 decays"):
        averages.load(averages.averages[:1])
