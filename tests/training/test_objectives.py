"""The protocol: the guide's own objective, helpers of training, and a few weights of a frozen model."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pixcell.tasks.encode import encode_store
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.metrics import read_metrics
from pixcell.training.objectives import Grown, Losses, Objective, Preview, Samples
from pixcell.training.optimizers import AdamWConfig
from pixcell.training.recipe import build_objective
from pixcell.training.trainer import Trainer
from pixcell.training.trainer_config import TrainerConfig
from training_fixtures import make_store

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "objectives.md"


def code_blocks():
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def as_in_the_guide(tmp_path, monkeypatch, codec_folder):
    """A folder with the store that the guide speaks of."""
    from pixcell.models.codec import LatentCodec

    monkeypatch.chdir(tmp_path)
    make_store(Path("stores/mine"), LatentCodec.from_pretrained(codec_folder))
    encode_store(Path("stores/mine"), encoder="stain-texture", field_size=64)
    return {}


def test_the_objective_of_the_guide_is_trained_as_it_stands(as_in_the_guide, capsys):
    names = as_in_the_guide
    written, used = code_blocks()
    exec(compile(written, "guide", "exec"), names)
    exec(compile(used, "guide", "exec"), names)
    objective = names["ColourProbe"](names["fields"])
    assert isinstance(objective, Objective)
    assert isinstance(objective.samples, Samples)
    outcome = names["outcome"]
    assert f"{outcome.step} {outcome.loss}" in capsys.readouterr().out
    assert load_file(outcome.checkpoint.pipeline / "probe.safetensors")["weight"].shape[0] == 3
    lines = read_metrics(Path("runs/probe/metrics.jsonl"))
    errors = [line["held_out/error"] for line in lines if "held_out/error" in line]
    assert len(errors) == 3
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]  # embeddings that measure colours do tell the colour


class Numbers:
    """Numbers and their doubles."""

    def __len__(self):
        return 16

    def draw(self, indices, rngs):
        return [
            {"x": torch.tensor([float(index)]), "y": torch.tensor([2.0 * index]), "key": f"number-{index}"}
            for index in indices
        ]


class Small:
    """What the objectives below have in common."""

    def __init__(self):
        torch.manual_seed(0)
        self.samples, self.facts, self.steps = Numbers(), {"name": "numbers"}, []

    def move_to(self, device):
        self.device = device

    def preview(self):
        return Preview(np.zeros((8, 8, 3), np.uint8))

    def export(self, folder, previous):
        folder.mkdir()


class WithHelper(Small):
    """A model, and a helper that pulls at it from beside during the first steps."""

    def __init__(self):
        super().__init__()
        self.model, self.helper = nn.Linear(1, 1), nn.Linear(1, 1)
        self.trainable = nn.ModuleDict({"model": self.model, "helper": self.helper})

    def loss(self, batch):
        self.steps.append(batch["step"])
        predicted = self.model(batch["x"] / 16)
        apart = (predicted - batch["y"] / 16).square().mean(1)
        if batch["step"] < 3:
            helped = (self.helper(predicted) - batch["y"] / 16).square().mean(1)
            return Losses(apart + helped, {"apart": apart, "helped": helped})
        rest = sum(0 * weight.sum() for weight in self.helper.parameters())
        return Losses(apart + rest, {"apart": apart})


class Adapted(Small):
    """A frozen model, of which two weights are trained."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(1, 64), nn.Linear(64, 1)).requires_grad_(False)
        last = self.model[1].requires_grad_(True)
        self.trainable = nn.ParameterDict({"weight": last.weight, "bias": last.bias})

    def move_to(self, device):
        self.model.to(device)

    def loss(self, batch):
        return Losses((self.model(batch["x"] / 16) - batch["y"] / 16).square().mean(1))


def fit(objective, run, steps=6):
    config = TrainerConfig(
        steps=steps, batch_size=4, micro_batch_size=2, checkpoint_every=3, log_every=1, tensorboard=False,
        device="cpu",
    )  # fmt: skip
    return Trainer(objective, AdamWConfig(lr=0.05), config, run).fit()


def state_of(run):
    return load_file(Checkpoint.find(run).state / "weights.safetensors")


@pytest.mark.parametrize("kind", [WithHelper, Adapted])
def test_parts_are_trained_and_stopped_runs_go_on_as_if_nothing_had_been(tmp_path, kind):
    fit(kind(), tmp_path / "whole")
    fit(kind(), tmp_path / "parts", steps=3)
    fit(kind(), tmp_path / "parts")
    one, other = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [line["loss"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]


def test_a_batch_knows_its_step(tmp_path):
    """Each step comes in two micro-batches, also after a resume."""
    objective = WithHelper()
    fit(objective, tmp_path, steps=3)
    again = WithHelper()
    fit(again, tmp_path)
    assert objective.steps + again.steps == [step for step in range(6) for _ in range(2)]


def test_of_a_frozen_model_a_checkpoint_holds_what_was_trained(tmp_path):
    objective = Adapted()
    before = {name: value.clone() for name, value in objective.model.state_dict().items()}
    fit(objective, tmp_path)
    assert set(state_of(tmp_path)) == {"weight", "bias"}
    after = objective.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.weight", "1.bias"}


def test_an_objective_says_whether_its_model_grew(recipe, codec_recipe):
    denoising = build_objective(recipe())
    assert isinstance(denoising, Grown)
    assert denoising.growth is None
    assert not isinstance(build_objective(codec_recipe()), Grown)
