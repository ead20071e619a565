"""Rates over time, and the steps of optimisers."""

import json
import sys

import pytest
import torch
from diffusers.optimization import get_constant_schedule_with_warmup
from torch import nn

from golden_vectors import FOLDER, load, weights
from pixcell.config import Config, parse_recipe
from pixcell.errors import MissingExtra, RecipeError
from pixcell.training.optimizers import (
    AdamW8bitConfig,
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


@pytest.mark.parametrize("processes", [1, 16])
def test_warm_up_of_the_released_code_is_that_of_its_library(processes):
    """There the schedule of diffusers moves once for each process at every step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-5)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=100)
    config = CameConfig(warmup_steps=100, warmup="from-zero", warmup_advance=processes)
    for step in range(110):
        assert learning_rate(config, step, 1000) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-18)
        optimizer.step()
        for _ in range(processes):
            schedule.step()


def test_a_cosine_begins_where_the_warm_up_ends_however_fast_it_was():
    config = AdamWConfig(lr=1.0, schedule="cosine", warmup_steps=100, warmup="from-zero", warmup_advance=16)
    rates = [learning_rate(config, step, 50) for step in range(51)]
    assert rates[:8] == pytest.approx([0, 0.16, 0.32, 0.48, 0.64, 0.8, 0.96, 1.0])
    assert rates[7:] == sorted(rates[7:], reverse=True)
    assert rates[50] == pytest.approx(0)


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


def steps_of(config, gradients, start=((1.0, -2.0), (0.5, 3.0))):
    """The weight after each step with the given gradients; None: the weight had none."""
    model = nn.ParameterDict(
        {"w": nn.Parameter(torch.tensor(start)), "other": nn.Parameter(torch.ones(2, 2))}
    )
    optimizer = make_optimizer(model, config)
    path = []
    for gradient in gradients:
        model["w"].grad = None if gradient is None else torch.tensor(gradient)
        model["other"].grad = torch.ones(2, 2)
        optimizer.step()
        path.append(model["w"].detach().clone())
    return path


@pytest.mark.parametrize("config", [AdamWConfig(lr=0.1), CameConfig(lr=0.1)], ids=lambda config: config.name)
def test_a_weight_without_a_gradient_stays_and_one_with_zeros_stays_finite(config):
    """CAME divides by roots of means of squares; those of zeros are its eps, 1e-30."""
    zero, some = ((0.0, 0.0), (0.0, 0.0)), ((1.0, 0.0), (0.0, 0.0))
    path = steps_of(config, [None, zero, some, zero])
    start = torch.tensor(((1.0, -2.0), (0.5, 3.0)))
    assert torch.equal(path[0], start)
    assert torch.equal(path[1], start)
    assert path[2][0, 0] < 1
    assert all(weight.isfinite().all() for weight in path)
    # A whole row and column without gradients does not move, whatever the others do.
    assert torch.equal(path[3][1, 1], start[1, 1])


@pytest.mark.parametrize("config", [AdamWConfig(lr=0.1), CameConfig(lr=0.1)], ids=lambda config: config.name)
def test_moments_go_through_a_file_bit_for_bit_in_float32(config, tmp_path):
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = make_optimizer(model, config)
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1 / 3)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = make_optimizer(other, config)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for old, new in zip(model.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state[old].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == torch.float32
                assert torch.equal(again.state[new][name], value)
            else:
                assert again.state[new][name] == value


def test_eight_bits_keep_a_quarter_of_what_adamw_keeps_and_go_nearly_the_same_way():
    pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
    gradients = torch.randn(20, 64, 128, generator=torch.Generator().manual_seed(0))
    kept, moved = {}, {}
    for config in (AdamWConfig(lr=1e-3), AdamW8bitConfig(lr=1e-3)):
        model = nn.Linear(128, 64, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = make_optimizer(model, config)
        for gradient in gradients:
            model.weight.grad = gradient.clone()
            optimizer.step()
        (state,) = optimizer.state.values()
        kept[config.name] = sum(
            value.nbytes for name, value in state.items() if "qmap" not in name and torch.is_tensor(value)
        )  # the tables of codes are shared by all tensors
        moved[config.name] = model.weight.detach()
    assert kept["adamw-8bit"] / kept["adamw"] == pytest.approx(0.25, abs=0.01)
    error = (moved["adamw-8bit"] - moved["adamw"]).norm() / moved["adamw"].norm()
    assert 0 < error < 0.05


def test_eight_bits_without_the_package_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"adamw-8bit needs .*pixcell\[8bit\]"):
        make_optimizer(nn.Linear(1, 1), AdamW8bitConfig())


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
        ("name=sgd", "the name of an optimizer is adamw, adamw-8bit or came"),
        ("beta1=0.5", r"unknown key 'optimizer\.beta1'. Did you mean 'betas'"),
        ("betas=[0.9,0.999,1.5]", "less than 1"),
        ("eps=[1.0e-30,0.0]", "greater than 0"),
    ],
)
def test_what_came_does_not_know_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(Choice, {"optimizer": {"name": "came"}}, [f"optimizer.{override}"])
