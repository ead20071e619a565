"""What the trainer knows about a task: nothing but this protocol.

An objective says what is trained, which samples there are, what the loss of a batch is, how to look at the
result, and how to save it for use. The trainer does the rest: devices, steps, averages, checkpoints, resume.
Pass your own object with these members to :class:`pixcell.training.trainer.Trainer`; no registration.

What is trained may be a whole model, a model with a helper that only training needs, or a few weights of one:

    a model                 trainable = model
    a model and a helper    trainable = nn.ModuleDict({"model": model, "helper": helper})
    some of its weights     trainable = nn.ParameterDict(...) of these, the model itself standing elsewhere

Weights that want no gradient are neither moved nor averaged, and are kept with each checkpoint all the same.
So what is large and frozen stands elsewhere: ``move_to`` brings it to the device, ``facts`` names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pixcell.training.determinism import Order
from pixcell.training.order import SampleOrder
from pixcell.training.previews import Preview, picture_rows

__all__ = [
    "Grown",
    "Losses",
    "Objective",
    "OrderedSamples",
    "Preview",
    "Samples",
    "order_of",
    "picture_rows",
    "spread_over",
]


@dataclass(frozen=True)
class Losses:
    """The losses of a batch, by sample: so that a stop rule can name the worst and figures can be binned."""

    per_sample: Float[Tensor, " batch"]
    """Float32. The trainer minimises the mean over the whole batch of a step."""
    parts: Mapping[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    """What the loss is made of, or other figures of each sample, for the log."""
    times: Float[Tensor, " batch"] | None = None
    """How noisy each sample was, from 0 (clean) to 1. None where there is no such thing."""


@runtime_checkable
class Samples(Protocol):
    """Where training samples come from. Crosses into loader processes, so it must pickle."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def draw(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> list[dict[str, Any]]:
        """Return samples, each as tensors of fixed shapes and its name as ``key``.

        Everything random about a sample (crop, noise, time, dropout) is drawn here, from its own generator
        and nothing else: that is what makes a resumed run equal to one that was left alone.

        Raises:
            UnreadableTile: If one of them cannot be read. Asked for one by one, the others must come.
        """


@runtime_checkable
class OrderedSamples(Samples, Protocol):
    """Samples that come in an order of their own; others come each once an epoch, well shuffled."""

    def order(self, seed: int) -> Order:
        """Return the order of a run."""


def order_of(samples: Samples, seed: int) -> Order:
    """Return the order in which a run takes samples: their own, or each once an epoch, well shuffled."""
    return samples.order(seed) if isinstance(samples, OrderedSamples) else SampleOrder(len(samples), seed)


@runtime_checkable
class Objective(Protocol):
    """A training task."""

    @property
    def trainable(self) -> nn.Module:
        """What the optimiser moves and the averages follow; frozen parts stand elsewhere."""

    @property
    def samples(self) -> Samples:
        """What it is trained on."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What must be equal for a run to go on: which data, made by which models. JSON values."""

    def move_to(self, device: torch.device) -> None:
        """Bring frozen parts to where the training runs."""

    def loss(self, batch: Mapping[str, Any]) -> Losses:
        """Return the losses of a batch.

        Args:
            batch: Collated samples, and ``step``: the number of the step, from 0. Outside of training there
                may be no step; that counts as the first.
        """

    def preview(self) -> Preview:
        """Look at the model as it is (the trainer puts the averages in place). Touch no global chance."""

    def export(self, folder: Path, previous: Path | None) -> None:
        """Write the model for use into an empty folder.

        Args:
            folder: Where.
            previous: The last export of this run, whose frozen files may be linked instead of written.
        """


@runtime_checkable
class Grown(Protocol):
    """An objective whose model started from another one may say so: ``growth.json`` in the run keeps it."""

    @property
    def growth(self) -> Mapping[str, Any] | None:
        """What was carried, rebuilt and dropped, as JSON values. None: from scratch, or the run goes on."""


def spread_over(count: int, total: int) -> list[int]:
    """Return up to ``count`` numbers below ``total``, evenly spread: the samples held out of training.

    At most half of all are held out.

    Examples:
        >>> spread_over(3, 12), spread_over(4, 2)
        ([2, 6, 10], [1])
    """
    count = min(count, total // 2)
    return [total * (2 * place + 1) // (2 * count) for place in range(count)]
