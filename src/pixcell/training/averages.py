"""Running averages of the weights: what is sampled from.

One is usual; several of different lengths cost four bytes a weight and decay each, and let the best be chosen
afterwards instead of trained for.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixcell.errors import RunError
from pixcell.training.sharding import like

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """Exponential moving averages of a model's weights, in float32.

    ``average = decay * average + (1 - decay) * weight`` after every step, over parameters only (buffers are
    constants here). With ``warmup`` the decay is ``(1 + step) / (10 + step)`` where that is smaller, so that
    the random start is forgotten: a run of a thousand steps at 0.999 would else be averaged with it.

    Args:
        model: Whose weights. Where they are spread over processes, so are the averages.
        decays: Share that each average keeps of itself every step.
        warmup: Whether they keep less in the beginning.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float], warmup: bool = True) -> None:
        self.decays, self.warmup = tuple(decays), warmup
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages: tuple[dict[str, Tensor], ...] = tuple(
            {name: weight.detach().float().clone() for name, weight in self._weights.items()}
            for _ in self.decays
        )
        """By decay, in their order; by the name of the weight."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step`` (0 is the first)."""
        weights = [_here(weight).float() for weight in self._weights.values()]
        for decay, averages in zip(self.decays, self.averages, strict=True):
            kept = min(decay, (1 + step) / (10 + step)) if self.warmup else decay
            torch._foreach_lerp_([_here(average) for average in averages.values()], weights, 1 - kept)

    @torch.no_grad()
    def load(self, saved: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from saved averages, whole ones, in the order of the decays.

        Raises:
            RunError: If they are of another model, or their number is another.
        """
        if len(saved) != len(self.averages):
            raise RunError(f"{len(saved)} averages were saved, and there are {len(self.averages)} decays.")
        for averages, values in zip(self.averages, saved, strict=True):
            if odd := sorted(set(averages) ^ set(values)):
                raise RunError(f"the saved averages are of another model: {', '.join(odd[:3])} differ(s).")
            for name, average in averages.items():
                average.copy_(like(values[name], average))


def _here(weight: Tensor) -> Tensor:
    """The part of a tensor that this process holds: the whole, unless it is spread over processes."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight
