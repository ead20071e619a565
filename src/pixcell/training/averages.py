"""The running average of the weights: what is sampled from."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixcell.errors import RunError

__all__ = ["AveragedWeights"]


class AveragedWeights:
    """Exponential moving average of a model's weights, in float32: what is sampled from.

    ``average = decay * average + (1 - decay) * weight`` after every step, over parameters only (buffers are
    constants here). Early on the decay is ``(1 + step) / (10 + step)`` where that is smaller, so that the
    random start is forgotten: a run of a thousand steps at 0.999 would else be averaged with it.

    Args:
        model: Whose weights.
        decay: Share that is kept each step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {name: weight.detach().float().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step`` (0 is the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [weight.detach().float() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Go on from saved averages.

        Raises:
            RunError: If they are of another model.
        """
        if set(averages) != set(self.averages):
            odd = sorted(set(averages) ^ set(self.averages))
            raise RunError(f"the saved averages are of another model: {', '.join(odd[:3])} differ(s).")
        with torch.no_grad():
            for name, average in self.averages.items():
                average.copy_(averages[name])
