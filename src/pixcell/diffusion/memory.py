"""What a sampling repeats is computed once.

What a condition comes to in each block, and what a timestep comes to, depend on no latents. A denoiser keeps
both: conditions it meets again, and the modulation of all the timesteps it was told of. It keeps them only
without gradients and in evaluation mode, compares conditions by their values, and forgets everything as soon
as the weights, their precision, their device, their adapters or the autocast have changed.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixcell.models.blocks import PreparedCondition, TimeModulation
from pixcell.models.transformer import PixCellTransformer2DModel

__all__ = ["SamplingMemory"]

_MOST_BYTES = 256 * 2**20
"""Memory for kept conditions. A sampling in many parts may need more; the oldest are then made anew."""


@dataclass(frozen=True)
class _Kept:
    """A prepared condition, and what it was made of."""

    tokens: Tensor
    dropped: Tensor | None
    condition: PreparedCondition

    def is_for(self, tokens: Tensor, dropped: Tensor | None) -> bool:
        if self.tokens.shape != tokens.shape or not torch.equal(self.tokens, tokens):
            return False
        if dropped is None or self.dropped is None:
            return dropped is self.dropped
        return torch.equal(self.dropped, dropped)


class SamplingMemory:
    """What has been computed with the weights as they are.

    Args:
        transformer: A denoiser or its control branch.
        timesteps: All that will be asked for, where they are known. Others may be asked for too.
    """

    def __init__(self, transformer: PixCellTransformer2DModel, timesteps: Tensor | None = None) -> None:
        self._transformer = transformer
        self._timesteps = [] if timesteps is None else [float(timestep) for timestep in timesteps]
        self._times = timesteps
        self._lock = threading.Lock()  # parts of a batch may run side by side
        self._state: tuple[Any, ...] | None = None
        self._kept: list[_Kept] = []
        self._modulations: TimeModulation | None = None

    def recall(
        self, timestep: Tensor, tokens: Tensor, dropped: Tensor | None
    ) -> tuple[Tensor | TimeModulation, Tensor | PreparedCondition, Tensor | None]:
        """Return what a forward pass takes, computed already where that is possible.

        Args:
            timestep: One for all samples, or one each.
            tokens: Embeddings of the condition, "no condition" tokens in place of those that are dropped.
            dropped: Samples without a condition.

        Returns:
            Timestep, condition and dropped samples, for the forward pass.
        """
        transformer = self._transformer
        if transformer.config.unconditional_positions:
            dropped = None  # the tokens have been replaced already, and nothing else differs
        computing = torch.is_grad_enabled() or transformer.training
        state = None if computing else _state_of(transformer, tokens.device)
        if state is None:
            return timestep, tokens, dropped
        with self._lock:
            if state != self._state:
                self._state, self._kept, self._modulations = state, [], None
            time = self._modulation(timestep)
            found = next((kept for kept in self._kept if kept.is_for(tokens, dropped)), None)
        if found is None:
            found = _Kept(tokens.clone(), dropped, transformer.prepare(tokens, dropped))
            with self._lock:
                if state == self._state:
                    self._keep(found)
        return time, found.condition, None

    def _modulation(self, timestep: Tensor) -> Tensor | TimeModulation:
        if timestep.numel() != 1 or float(timestep) not in self._timesteps or self._times is None:
            return timestep
        if self._modulations is None:
            self._modulations = self._transformer.modulation(self._times.to(timestep.device))
        return self._modulations.row(self._timesteps.index(float(timestep)))

    def _keep(self, found: _Kept) -> None:
        self._kept.append(found)
        while sum(kept.condition.num_bytes for kept in self._kept) > _MOST_BYTES:
            self._kept.pop(0)


def _state_of(transformer: PixCellTransformer2DModel, device: torch.device) -> tuple[Any, ...] | None:
    """What prepared numbers depend on besides condition and timestep.

    None where they cannot be prepared: weights that wait on another device come with the forward pass, not
    before it; and of those made in inference mode changes cannot be seen.

    Every tensor with its version, which each change in place raises, and its place in memory; the settings
    of adapters; the autocast; and the values of all biases and of adapters, because what writes through
    ``.data`` (as averages of weights and other adapters do when they are swapped in) raises no version.
    """
    parts = (
        transformer.caption_projection,
        transformer.y_pos_embed,
        transformer.adaln_single,
        *(getattr(block.attn2, name) for block in transformer.transformer_blocks for name in _PROJECTIONS),
    )
    modules = [module for part in parts if part is not None for module in part.modules()]
    tensors = [tensor for module in modules for tensor in _own_tensors(module)]
    if any(tensor.is_inference() or tensor.device != device for tensor in tensors):
        return None
    witnesses = [tensor for tensor in tensors if tensor.ndim == 1]
    for module in modules:
        if hasattr(module, "merged_adapters"):
            witnesses += [
                value for name, value in module.named_parameters() if not name.startswith("base_layer.")
            ]
    return (
        tuple((id(tensor), tensor.data_ptr(), tensor.dtype, tensor._version) for tensor in tensors),
        tuple(_adapter_settings(module) for module in modules if hasattr(module, "merged_adapters")),
        _values_of(witnesses),
        torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None,
    )


def _values_of(tensors: Sequence[Tensor]) -> tuple[float, ...]:
    """Two numbers that differ where values do; one wait for the device."""
    exact = torch.float32 if tensors[0].device.type == "mps" else torch.float64
    values = torch.cat([tensor.detach().flatten().to(exact) for tensor in tensors])
    places = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    return tuple(torch.stack([values.sum(), (values * places).sum()]).tolist())


_PROJECTIONS = ("to_k", "to_v", "to_out")


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor


def _adapter_settings(module: Any) -> tuple[Any, ...]:
    """Of a peft layer: which adapters count, how much, and whether they are part of the weight already."""
    scaling = tuple(sorted(getattr(module, "scaling", {}).items()))
    return tuple(module.active_adapters), scaling, module.disable_adapters, tuple(module.merged_adapters)
