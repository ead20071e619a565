"""A transformer as a denoiser, which computes once what a sampling repeats.

What a condition comes to in each block, and what a timestep comes to, depend on no latents. A denoiser keeps
both: conditions it meets again, and the modulation of all the timesteps it was told of. It keeps them only
without gradients and in evaluation mode, compares conditions by their values, and forgets everything as soon
as the weights, their precision, their device or their adapters have changed.
"""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.control import Control
from pixcell.errors import ModelError
from pixcell.models.blocks import PreparedCondition, TimeModulation
from pixcell.models.transformer import PixCellTransformer2DModel

__all__ = ["denoiser_of"]

_MOST_BYTES = 256 * 2**20
"""Memory for kept conditions. A sampling in many parts may need more; the oldest are then made anew."""


def denoiser_of(
    transformer: PixCellTransformer2DModel,
    control: Control | None = None,
    *,
    with_variance: bool = False,
    timesteps: Tensor | None = None,
) -> Denoiser:
    """Return a transformer as a denoiser: conditions become tokens, variance channels are left out.

    Args:
        transformer: Predicts noise, or another target.
        control: A control branch (:func:`~pixcell.diffusion.control.control_by`), asked before each call.
        with_variance: Leave the learned variance in, behind the prediction: for schedulers that take it.
        timesteps: All that will be asked for, where they are known: one call then modulates for all of them.
            Others may be asked for too.

    Raises:
        ModelError: If a variance is wanted that the transformer has not learned.
    """
    if with_variance and not transformer.learns_variance:
        raise ModelError(
            f"the model predicts {transformer.out_channels} channels for {transformer.config.in_channels} of "
            "the latents, so it has learned no variance. Take a scheduler that needs none, or another model."
        )
    memory = _Memory(transformer, timesteps)
    contexts = _CacheContexts(transformer)

    def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        dtype, device, rows = transformer.dtype, latents.device, latents.shape[0]
        conditioning = conditioning.to(device)
        null = transformer.unconditional_embedding.to(device)  # the model itself may still wait elsewhere
        tokens = conditioning.tokens(null, rows).to(dtype)
        residuals = None if control is None else control(latents, timestep, conditioning)
        time, condition, dropped = memory.recall(timestep, tokens, _dropped(conditioning, tokens))
        with contexts.of(timestep, rows):
            output = transformer(
                latents.to(dtype), time, condition, residuals, return_dict=False, dropped=dropped
            )[0]
        wanted = output if with_variance else output[:, : latents.shape[1]]
        return wanted.to(latents.dtype)

    return denoise


def _dropped(conditioning: Conditioning, tokens: Tensor) -> Tensor | None:
    """The samples without a condition."""
    if conditioning.embedding_grid is None:
        return torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    return conditioning.dropped


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


class _Memory:
    """What a denoiser has computed with the weights as they are."""

    def __init__(self, transformer: PixCellTransformer2DModel, timesteps: Tensor | None) -> None:
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
        """Return what a forward pass takes: timestep, condition, dropped samples; computed, if it can be."""
        transformer = self._transformer
        if transformer.config.unconditional_positions:
            dropped = None  # the tokens have been replaced already, and nothing else differs
        # Weights that wait on another device come with the forward pass, not before it.
        away = tokens.device != transformer.device
        if torch.is_grad_enabled() or transformer.training or away:
            return timestep, tokens, dropped
        state = _state_of(transformer)
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


def _state_of(transformer: PixCellTransformer2DModel) -> tuple[Any, ...] | None:
    """What prepared numbers depend on besides condition and timestep. None: changes could not be seen.

    Every tensor with its version, which each change in place raises, and its place in memory; the settings of
    adapters; and the values of two biases, because what writes through ``.data`` (as averages of weights do
    when they are swapped in) raises no version.
    """
    parts = (
        transformer.caption_projection,
        transformer.y_pos_embed,
        transformer.adaln_single,
        *(getattr(block.attn2, name) for block in transformer.transformer_blocks for name in _PROJECTIONS),
    )
    modules = [module for part in parts if part is not None for module in part.modules()]
    tensors = [tensor for module in modules for tensor in _own_tensors(module)]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    witnesses = (transformer.caption_projection.linear_2.bias, transformer.adaln_single.linear.bias)
    return (
        tuple((id(tensor), tensor.data_ptr(), tensor.dtype, tensor._version) for tensor in tensors),
        tuple(_adapter_settings(module) for module in modules if hasattr(module, "merged_adapters")),
        tuple(float(witness.detach().float().sum()) for witness in witnesses),
    )


_PROJECTIONS = ("to_k", "to_v", "to_out")


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield tensor


def _adapter_settings(module: Any) -> tuple[Any, ...]:
    """Of a peft layer: which adapters count, how much, and whether they are part of the weight already."""
    scaling = tuple(sorted(getattr(module, "scaling", {}).items()))
    return tuple(module.active_adapters), scaling, module.disable_adapters, tuple(module.merged_adapters)


class _CacheContexts:
    """Names for the states of diffusers' feature caches, which remember the last call of the same name.

    Several calls at one timestep are parts of a batch: each has a name of its own. Parts that run side by
    side in several threads cannot be told apart.
    """

    def __init__(self, transformer: PixCellTransformer2DModel) -> None:
        self._transformer = transformer
        self._timestep: float | None = None
        self._number, self._thread = 0, 0
        if transformer.is_cache_enabled:
            transformer._reset_stateful_cache()  # an interrupted sampling leaves its state behind

    def of(self, timestep: Tensor, rows: int) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the next call."""
        if not self._transformer.is_cache_enabled:
            return contextlib.nullcontext()
        thread = threading.get_ident()
        if self._timestep is None:
            self._thread = thread
        elif thread != self._thread:
            raise ModelError(
                "a feature cache remembers one call after the other; parts of a batch that run side by side "
                "would get each other's features. Sample without fixed_batch, or call disable_cache()."
            )
        value = float(timestep.flatten()[0])
        self._number = self._number + 1 if value == self._timestep else 0
        self._timestep = value
        return self._transformer.cache_context(f"call {self._number} of {rows} samples")
