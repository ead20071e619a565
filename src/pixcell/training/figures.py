"""What the steps of a run say of themselves: means of losses, and speed.

Each process adds up its own samples (:func:`sums_of`); the sums of all processes and steps since the last log
line give the means (:class:`Window`). So a mean is over samples, however they were spread.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pixcell.training.objectives import Losses

__all__ = ["Window", "sums_of"]

_COUNT = "samples"


def sums_of(micro_batches: Sequence[Losses]) -> dict[str, Tensor]:
    """Return what one process adds to the figures of a step: scalars, summed over its samples."""
    sums = {_COUNT: torch.tensor(float(sum(len(losses.per_sample) for losses in micro_batches)))}
    for losses in micro_batches:
        for name, values in {"loss": losses.per_sample, **losses.parts}.items():
            sums[name] = sums.get(name, 0.0) + values.detach().float().sum()
    return sums


class Window:
    """Figures since the last log line. Checkpoints and previews are no training time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.totals: dict[str, float] = {}

    def add(self, sums: Mapping[str, float], seconds: float) -> None:
        """Take in a step: sums over the samples of all processes, and how long it took."""
        self.seconds += seconds
        for name, total in sums.items():
            self.totals[name] = self.totals.get(name, 0.0) + total

    def summary(self) -> dict[str, float]:
        """Return the mean of the loss and of each part, and ``samples_per_s``."""
        count = self.totals[_COUNT]
        means = {name: total / count for name, total in self.totals.items() if name != _COUNT}
        return {**means, "samples_per_s": count / max(self.seconds, 1e-9)}
