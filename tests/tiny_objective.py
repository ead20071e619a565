"""The smallest training there is: a line through points. And how tests run it and look at what it leaves."""

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from pixcell.training.checkpoints import Checkpoint
from pixcell.training.objectives import Losses, Preview
from pixcell.training.optimizers import AdamWConfig
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
    """Weights and averages of a run's last checkpoint, or of that of a step, by file and name."""
    place = (
        Checkpoint.find(run) if step is None else Checkpoint.find(run / "checkpoints" / f"step-{step:08d}")
    )
    return {
        f"{file.stem}.{name}": value
        for file in sorted(place.state.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def same(one, other):
    """Whether two such collections are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
