"""What ``state/`` of a checkpoint holds: all that a run needs to go on, however many processes go on with it.

    state/
    ├── weights.safetensors     of the trainable module, whole
    ├── averages.safetensors    of its parameters
    ├── optimizer.pt            moments, and the loss scale of fp16
    └── progress.json           step, seconds, and which data

Gathering is a matter of all processes; writing is the main one's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixcell.errors import RunError
from pixcell.files import write_json
from pixcell.training.averages import AveragedWeights
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.engine import Engine

__all__ = ["RunState"]


@dataclass(frozen=True)
class RunState:
    """Everything a run needs to go on, whole tensors and plain values."""

    step: int
    """Optimiser steps taken."""
    seconds: float
    """Spent on training so far."""
    data: Mapping[str, Any]
    """Facts about the data; they must be equal for a run to go on."""
    weights: Mapping[str, Tensor]
    averages: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]

    @classmethod
    def gather(
        cls, engine: Engine, averages: AveragedWeights, step: int, seconds: float, data: Mapping[str, Any]
    ) -> Self:
        """Collect the state of a run that may be spread over processes. Every process calls it."""
        return cls(
            step, seconds, data, engine.weights(), engine.whole(averages.averages), engine.optimizer_state()
        )

    def write(self, folder: Path) -> None:
        """Fill an empty folder."""
        folder.mkdir()
        for name, values in (("weights", self.weights), ("averages", self.averages)):
            save_file(
                {key: value.contiguous() for key, value in values.items()}, folder / f"{name}.safetensors"
            )
        torch.save(dict(self.optimizer), folder / "optimizer.pt")
        progress = {"step": self.step, "seconds": self.seconds, "data": self.data}
        write_json(folder / "progress.json", progress)

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        """Read a checkpoint's state.

        Raises:
            RunError: If a file is missing or not what was written.
        """
        checkpoint.verify()
        folder = checkpoint.state
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        return cls(
            progress["step"],
            progress["seconds"],
            progress["data"],
            load_file(folder / "weights.safetensors"),
            load_file(folder / "averages.safetensors"),
            torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True),
        )

    def must_be_of(self, data: Mapping[str, Any], run: Path) -> None:
        """Refuse to go on with other data.

        Raises:
            RunError: Names what differs.
        """
        differences = _differences(self.data, json.loads(json.dumps(data)))
        if differences:
            raise RunError(
                f"{run} cannot go on: its data are not those it began with ({'; '.join(differences)}). "
                "Choose another folder with --run to train on the new data."
            )

    def restore(self, engine: Engine, averages: AveragedWeights, source: str) -> None:
        """Put the state back where it was gathered from. Every process calls it.

        Raises:
            WrongWeights: If the model is another one.
        """
        engine.load_weights(self.weights, source)
        averages.load(self.averages)
        engine.load_optimizer_state(self.optimizer)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say which values differ between two nested mappings."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r} and is {new!r}")
    return found
