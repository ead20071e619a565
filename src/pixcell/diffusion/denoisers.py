"""A transformer as a denoiser: the place where conditions become tokens."""

import contextlib
import threading
from typing import Any

import torch
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.control import Control
from pixcell.diffusion.memory import SamplingMemory
from pixcell.errors import ModelError
from pixcell.models.transformer import PixCellTransformer2DModel

__all__ = ["denoiser_of"]


def denoiser_of(
    transformer: PixCellTransformer2DModel,
    control: Control | None = None,
    *,
    with_variance: bool = False,
    timesteps: Tensor | None = None,
) -> Denoiser:
    """Return a transformer as a denoiser: conditions become tokens, variance channels are left out.

    What the steps of a sampling have in common is computed once; see :mod:`pixcell.diffusion.memory`.

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
    memory = SamplingMemory(transformer, timesteps)
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
