"""Rates over time, and the steps of optimisers."""

import json

import pytest
import torch
from torch import nn

from golden_vectors import FOLDER, load, weights
from pixcell.config import Config, parse_recipe
from pixcell.errors import RecipeError
from pixcell.training.optimizers import (
    AdamWConfig,
    CameConfig,
    OptimizerConfig,
    learning_rate,
    make_optimizer,
)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_rises_in_a_line_to_the_full_rate(schedule):
    config = AdamWConfig(lr=2.0, warmup_steps=4, schedule=schedule)
    assert [learning_rate(config, step, 100) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_warm_up_is_that_of_pathldm_a_step_ahead():
    """The published one begins at a millionth, so that its first step changes nothing; else they agree."""
    published = json.loads((FOLDER / "pathldm-prompts.json").read_text())["lr_multiplier"]
    config = AdamWConfig(lr=1.0, warmup_steps=1000)
    for step in map(int, published.keys() - {"0"}):
        assert learning_rate(config, step - 1, 200_000) == pytest.approx(published[str(step)], abs=1e-6)


def test_a_constant_rate_does_not_know_how_long_the_run_is():
    config = AdamWConfig(lr=2.0, warmup_steps=4)
    assert {learning_rate(config, step, total) for step in (4, 50, 99) for total in (100, 1000)} == {2.0}


def test_a_cosine_ends_at_its_share():
    config = AdamWConfig(lr=2.0, schedule="cosine", final_lr_share=0.1)
    assert learning_rate(config, 50, 100) == pytest.approx(1.1)
    assert learning_rate(config, 100, 100) == pytest.approx(0.2)


def test_frozen_weights_are_not_moved():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    assert len(make_optimizer(model, AdamWConfig()).param_groups[0]["params"]) == 2


@pytest.mark.parametrize("run", [0, 1])
def test_came_takes_the_recorded_steps(run):
    """Values after each step, at the published settings and at a large rate with decay."""
    tensors, about = load("came_steps")
    settings = {key: about["config"][key] for key in ("betas", "eps", "clip_threshold")}
    model = nn.ParameterDict(weights(tensors))
    optimizer = make_optimizer(model, CameConfig(**settings, **about["config"]["runs"][run]))
    for step in range(about["config"]["steps"]):
        for name, weight in model.items():
            weight.grad = tensors[f"in.grad_{name}"][step].clone()
        optimizer.step()
        for name, weight in model.items():
            expected = tensors[f"out.traj_{run}_{name}"][step]
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-7)


def test_came_keeps_half_of_what_adamw_keeps():
    def num_kept(config):
        layer = nn.Linear(256, 256, bias=False)
        optimizer = make_optimizer(layer, config)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        (state,) = optimizer.state.values()
        return sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))

    assert num_kept(CameConfig()) / num_kept(AdamWConfig()) == pytest.approx(0.5, abs=0.01)


def test_came_defaults_are_those_of_the_released_code():
    _, about = load("came_steps")
    config = CameConfig()
    assert (list(config.betas), list(config.eps)) == (about["config"]["betas"], about["config"]["eps"])
    assert (config.clip_threshold, config.weight_decay) == (about["config"]["clip_threshold"], 0.0)


class Choice(Config):
    optimizer: OptimizerConfig = AdamWConfig()


def test_a_recipe_that_names_no_optimizer_means_adamw():
    assert parse_recipe(Choice, {"optimizer": {"lr": 0.5}}).optimizer == AdamWConfig(lr=0.5)
    chosen = parse_recipe(Choice, {"optimizer": {"lr": 0.5}}, ["optimizer.name=came"]).optimizer
    assert chosen == CameConfig(lr=0.5)
    assert parse_recipe(Choice, {"optimizer": chosen.model_dump(mode="json")}).optimizer == chosen


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=sgd", "the name of an optimizer is adamw or came"),
        ("beta1=0.5", r"unknown key 'optimizer\.came\.beta1'. Did you mean 'betas'"),
        ("betas=[0.9,0.999,1.5]", "less than 1"),
        ("eps=[1.0e-30,0.0]", "greater than 0"),
    ],
)
def test_what_came_does_not_know_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(Choice, {"optimizer": {"name": "came"}}, [f"optimizer.{override}"])
