"""Averages of weights."""

import pytest
import torch
from torch import nn

from pixcell.errors import RunError
from pixcell.training.averages import AveragedWeights


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


def test_frozen_weights_are_not_averaged():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    assert set(AveragedWeights(model, 0.9).averages) == {"0.weight", "0.bias"}


def test_averages_of_another_model_are_refused():
    with pytest.raises(RunError, match="another model"):
        AveragedWeights(nn.Linear(1, 1), 0.9).load({"weight": torch.zeros(1, 1)})
