"""Weights spread over processes (FSDP2): how they are split, put together, and looked at whole.

Every block of a model is one unit: its weights are gathered when its turn comes and given up after it. What
the blocks leave over (embeddings, the last layer) is the unit of the whole. Gathered weights are float32 and
autocast decides the precision of products, as everywhere; so the sums are those of one process.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from pixcell.errors import RecipeError

__all__ = ["Unsharded", "block_names", "fsdp_plugin", "is_sharded", "like", "whole"]


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """Return accelerate's settings if its config asks for FSDP.

    Raises:
        RecipeError: If they are such that a run could not be what its recipe says.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise RecipeError("FSDP is used in version 2 only: set fsdp_version: 2 in the accelerate config.")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise RecipeError("fsdp_offload_params is not supported: set it to false in the accelerate config.")
    if plugin.activation_checkpointing:
        raise RecipeError(
            "fsdp_activation_checkpointing is the recipe's to decide: set it to false in the accelerate "
            "config, and trainer.gradient_checkpointing=true."
        )
    plugin.cpu_ram_efficient_loading = False  # every process has read the weights already
    plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
    return plugin


def keep_float32(plugin: FullyShardedDataParallelPlugin) -> None:
    """Undo what accelerate adds for bf16: it would round latents and noise before the loss sees them."""
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def block_names(trainable: nn.Module) -> list[str]:
    """Return the classes of blocks that models within declare as units (diffusers' ``_no_split_modules``)."""
    names = [name for part in trainable.modules() for name in getattr(part, "_no_split_modules", None) or ()]
    return list(dict.fromkeys(names))


def is_sharded(module: nn.Module) -> bool:
    """Return whether weights of a module are spread over processes."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def whole(value: Tensor) -> Tensor:
    """Return the whole of a tensor. Every process calls it, in the same order."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, target: Tensor) -> Tensor:
    """Spread a whole tensor as another one of its shape is spread. Every process has the same ``value``."""
    if not isinstance(target, DTensor):
        return value
    mesh = target.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, target.placements, src_data_rank=None)


class Unsharded:
    """A module as it was before it was sharded, for previews and export in one process.

    Made before sharding. A sharded module cannot be called or saved by one process alone: its hooks would
    wait for the others. So for the length of a block it gets its own class, hooks and parameters back.

    Args:
        module: Not sharded yet.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [
            (part, prefix + "." if prefix else "", type(part), _hooks_of(part))
            for prefix, part in module.named_modules()
        ]

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
        """Let the module hold whole weights, by name; the shards come back bit for bit."""
        kept = []
        try:
            for part, prefix, plain_class, plain_hooks in self._parts:
                sharded = {name: part.__dict__[name] for name in ("_parameters", *plain_hooks)}
                kept.append((part, type(part), sharded))
                part.__class__ = plain_class
                part.__dict__.update({name: hooks.copy() for name, hooks in plain_hooks.items()})
                part._parameters = {
                    name: None
                    if weight is None
                    else nn.Parameter(weights[prefix + name].to(device), requires_grad=weight.requires_grad)
                    for name, weight in part._parameters.items()
                }
            yield
        finally:
            for part, sharded_class, sharded in kept:
                part.__class__ = sharded_class
                part.__dict__.update(sharded)


def _hooks_of(part: nn.Module) -> dict[str, dict[int, object]]:
    """Copies: sharding adds to the dictionaries themselves."""
    return {
        name: value.copy() for name, value in part.__dict__.items() if "_hooks" in name and value is not None
    }
