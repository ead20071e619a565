"""What ``state/`` of a checkpoint holds: all that a run needs to go on, however many processes go on with it.

    state/
    ├── weights.safetensors     of the trainable module, whole
    ├── averages.safetensors    of its parameters, at the first decay; averages-0.999.safetensors: at another
    ├── optimizer.pt            moments, and the loss scale of fp16
    └── progress.json           step, seconds, decays, and which data

Gathering is a matter of all processes; writing is the main one's.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixcell.errors import RunError, listed
from pixcell.files import write_json
from pixcell.training.averages import AveragedWeights
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.differences import differences
from pixcell.training.engine import Engine

__all__ = ["RunState", "WeightsChoice", "weights_of"]

WeightsChoice = Annotated[str, Field(pattern=r"^(trained|averaged(-[0-9.e-]+)?)$")]
"""``trained``: as the optimiser left them; ``averaged``: at the first decay; ``averaged-0.999``: at that."""

_WEIGHTS = "weights.safetensors"


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
    ema_decays: Sequence[float | None]
    """None in runs begun before decays were written down."""
    averages: Sequence[Mapping[str, Tensor]]
    """In the order of the decays."""
    optimizer: Mapping[str, Any]

    @classmethod
    def gather(
        cls, engine: Engine, averages: AveragedWeights, step: int, seconds: float, data: Mapping[str, Any]
    ) -> Self:
        """Collect the state of a run that may be spread over processes. Every process calls it."""
        return cls(
            step,
            seconds,
            data,
            engine.weights(),
            averages.decays,
            [engine.whole(values) for values in averages.averages],
            engine.optimizer_state(),
        )

    def write(self, folder: Path) -> None:
        """Fill an empty folder."""
        folder.mkdir()
        files = [_WEIGHTS, *(_averages_file(self.ema_decays, place) for place in range(len(self.averages)))]
        for file, values in zip(files, (self.weights, *self.averages), strict=True):
            save_file({name: value.contiguous() for name, value in values.items()}, folder / file)
        torch.save(dict(self.optimizer), folder / "optimizer.pt")
        progress = {
            "step": self.step,
            "seconds": self.seconds,
            "ema_decays": list(self.ema_decays),
            "data": self.data,
        }
        write_json(folder / "progress.json", progress)

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        """Read the state of a checkpoint, which is verified already: one process does that, and all read."""
        folder = checkpoint.state
        progress = _progress(folder)
        decays = _decays_in(progress)
        return cls(
            progress["step"],
            progress["seconds"],
            progress["data"],
            load_file(folder / _WEIGHTS),
            decays,
            [load_file(folder / _averages_file(decays, place)) for place in range(len(decays))],
            torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True),
        )

    def must_be_of(self, data: Mapping[str, Any], run: Path) -> None:
        """Refuse to go on with other data.

        Raises:
            RunError: Names what differs.
        """
        if found := differences(self.data, json.loads(json.dumps(data))):
            raise RunError(
                f"{run} cannot go on: its data are not those it began with ({'; '.join(found)}). "
                "Choose another folder with --run to train on the new data."
            )

    def restore(self, engine: Engine, averages: AveragedWeights, source: str) -> None:
        """Put the state back where it was gathered from. Every process calls it.

        Raises:
            WrongWeights: If the model is another one.
            RunError: If other averages are wanted than were kept.
        """
        if list(self.ema_decays) not in ([None], list(averages.decays)):
            raise RunError(
                f"{source} keeps averages of decay {listed(self.ema_decays)}, and trainer.ema_decays asks "
                f"for {listed(averages.decays)}; an average cannot be begun in the middle of a run."
            )
        engine.load_weights(self.weights, source)
        averages.load(self.averages)
        engine.load_optimizer_state(self.optimizer)


def weights_of(checkpoint: Checkpoint, which: str, names: Collection[str]) -> dict[str, Tensor] | None:
    """Return weights of one model from a checkpoint's state, verified.

    Args:
        checkpoint: Of a run.
        which: ``trained``, ``averaged`` (at the first decay), or ``averaged-<decay>``. Buffers are the
            trained ones in any case: they are not averaged.
        names: Of the model's tensors. A run may train other parts beside it; the model's then stand together
            under the name of their part.

    Returns:
        The weights by the model's own names. None: the run did not train this model.

    Raises:
        RunError: If a file is damaged, or no such average is kept; names what there is.
    """
    checkpoint.verify("state")
    folder = checkpoint.state
    decays = _decays_in(_progress(folder))
    choices = {"trained": "", "averaged": _averages_file(decays, 0)}
    choices |= {f"averaged-{decay}": _averages_file(decays, place) for place, decay in enumerate(decays)}
    if which not in choices:
        kept = ["trained", *(f"averaged-{decay}" for decay in decays if decay is not None)]
        raise RunError(
            f"{checkpoint.path} keeps no weights {which!r}. Choose one of: averaged, {listed(kept, 9)}."
        )
    weights = load_file(folder / _WEIGHTS)
    if choices[which]:
        weights |= load_file(folder / choices[which])
    starts = {name.removesuffix(some) for some in list(names)[:1] for name in weights if name.endswith(some)}
    for start in sorted(starts, key=len):
        found = {name: weights[start + name] for name in names if start + name in weights}
        if len(found) == len(names):
            return found
    return None


def _progress(folder: Path) -> dict[str, Any]:
    progress: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    return progress


def _decays_in(progress: Mapping[str, Any]) -> list[float | None]:
    return list(progress.get("ema_decays", [None]))


def _averages_file(decays: Sequence[float | None], place: int) -> str:
    return f"averages-{decays[place]}.safetensors" if place else "averages.safetensors"
