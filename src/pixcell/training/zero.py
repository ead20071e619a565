"""Gradients and moments spread over processes by DeepSpeed (ZeRO 1 and 2), under our own loop.

Every process holds all weights; ZeRO 1 gives each a part of the optimiser's moments, ZeRO 2 also of the
gradients. Only the settings come by way of accelerate: its own use of DeepSpeed takes the optimiser's step
within ``backward``, leaves precision to DeepSpeed, and knows no CPU. Weights, gradients and moments are
float32 and autocast decides the precision of products, as everywhere; so the sums are those of one process.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(https://arxiv.org/abs/1910.02054), by the authors' package ``deepspeed`` (extra ``deepspeed``).
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from pixcell.errors import MissingExtra, RecipeError, RunError, listed

__all__ = ["ZeroEngine", "hidden_from_accelerate", "zero_settings"]

_ASKED_FOR = "ACCELERATE_USE_DEEPSPEED"
_EXCHANGE = ("stage", "reduce_bucket_size", "allgather_bucket_size", "overlap_comm")
"""What may be said of ZeRO: it changes where things are, and when they are exchanged."""

_NOT_USED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
"""What stands in every such file, and in the recipe."""

_BUCKET = 500_000_000
"""Values that DeepSpeed exchanges at once; it keeps that many beside the model."""


def zero_settings() -> dict[str, Any] | None:
    """Return how DeepSpeed is to spread and exchange, if accelerate's config asks for DeepSpeed.

    Returns:
        The section ``zero_optimization`` of DeepSpeed's own settings.

    Raises:
        MissingExtra: If ``deepspeed`` is not installed.
        RecipeError: If there is more in it than that: a run would not be what its recipe says.
    """
    if os.environ.get(_ASKED_FOR, "false").lower() != "true":
        return None
    if find_spec("deepspeed") is None:
        raise MissingExtra("deepspeed", "deepspeed", "an accelerate config for DeepSpeed")
    try:
        settings: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    except ValueError as error:
        raise RecipeError(f"the accelerate config for DeepSpeed does not go: {error}") from error
    zero = {name: value for name, value in settings.pop("zero_optimization").items() if _says(value)}
    if zero.get("stage") not in (1, 2):
        raise RecipeError(
            f"DeepSpeed is used with zero_stage 1 or 2, and the accelerate config says {zero.get('stage')}. "
            "To spread weights, too (stage 3), use FSDP2: recipes/accelerate/fsdp2.yaml."
        )
    unknown = [name for name in zero if name not in _EXCHANGE and not name.startswith("stage3_")]
    unknown += [name for name, value in settings.items() if _says(value) and name not in _NOT_USED]
    if unknown:
        raise RecipeError(
            f"DeepSpeed's {listed(unknown)} would change the run behind its recipe: remove it from the "
            "accelerate config or the DeepSpeed file that it names. What may stand there: "
            f"{listed(_EXCHANGE, 9)}."
        )
    return {name: value for name, value in zero.items() if name in _EXCHANGE}


def _says(value: Any) -> bool:
    """Return whether a setting says anything: sections can be switched off, values left to others."""
    if isinstance(value, Mapping):
        return value.get("enabled", value.get("device", True)) not in (False, None, "auto", "none")
    return value not in (None, "auto")


@contextlib.contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Let accelerate find devices and processes as for DDP, while it is told of DeepSpeed."""
    asked = os.environ.pop(_ASKED_FOR, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_ASKED_FOR] = asked


class ZeroEngine:
    """A module and its optimiser, wrapped by DeepSpeed.

    Its state goes in and out whole, in the layout of one process.

    Args:
        losses: What a step calls; on ``device`` already.
        optimizer: AdamW: it must not mind that its weights are one long vector.
        settings: Of :func:`zero_settings`.
        device: Where this process computes.
        num_processes: That train together.

    Raises:
        RecipeError: If DeepSpeed chose another device.
    """

    def __init__(
        self,
        losses: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        device: torch.device,
        num_processes: int,
    ) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        if (found := get_accelerator().device_name()) != device.type:
            raise RecipeError(
                f"DeepSpeed computes on {found}, and the run on {device.type}: set "
                f"DS_ACCELERATOR={device.type} in the environment."
            )
        if device.type == "cpu":
            # gloo exchanges all that training does; a faster way for inference would be compiled first, for
            # minutes, and hangs on processors without AVX2.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._weights = [weight for weight in losses.parameters() if weight.requires_grad]
        size = sum(weight.numel() for weight in self._weights)
        buckets = {name: min(_BUCKET, size) for name in ("reduce_bucket_size", "allgather_bucket_size")}
        zero = {name: count + count % 2 for name, count in buckets.items()} | settings
        self.stage = int(zero["stage"])
        self.model, self.optimizer, *_ = deepspeed.initialize(
            model=losses,
            optimizer=optimizer,
            config={
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": 0.0,  # given with each step
                "gradient_accumulation_steps": 1,  # the loop says which micro-batch is the last
                "train_micro_batch_size_per_gpu": 1,  # for its own figures, which nobody reads
                "train_batch_size": num_processes,
            },
        )

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add to the gradients; ``is_last``: they are complete with it."""
        self.model.set_gradient_accumulation_boundary(is_last)
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, clip_norm: float | None) -> float:
        """Clip, move the weights, forget the gradients; return their norm before clipping.

        A step whose gradient is not finite is not taken, and the norm is infinite.
        """
        self.optimizer.clip_grad = clip_norm or 0.0
        self.model.step()
        return float(self.optimizer._global_grad_norm)

    def refresh(self) -> None:
        """Take over weights that were put into the module from outside."""
        self.optimizer.refresh_fp32_params()

    def state(self, keep: bool) -> dict[str, Any]:
        """Return the optimiser's state as one process has it. Every process calls it.

        Args:
            keep: Whether this process wants the moments: they are whole, in main memory. The others get none.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        (group,) = self.optimizer.param_groups
        (flat,) = group["params"]
        own = self.optimizer.optimizer.state.get(flat, {})
        moments = [name for name, value in own.items() if value.shape == flat.shape]
        kept: dict[int, dict[str, Tensor]] = {}
        for place, weight in enumerate(self._weights if own else ()):
            whole = {name: safe_get_full_optimizer_state(weight, name) for name in moments}
            if keep:
                kept[place] = {name: value.cpu().clone() for name, value in {**own, **whole}.items()}
        return {
            "state": kept,
            "param_groups": [{**group, "params": list(range(len(self._weights)))}],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned, or from a state of one process. Every process calls it.

        Raises:
            RunError: If it cannot be one vector.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        moments: Mapping[int, Mapping[str, Tensor]] = state["state"]
        (group,), (saved,) = self.optimizer.param_groups, state["param_groups"]
        steps = {float(values["step"]) for values in moments.values()}
        if len(steps) > 1 or len(moments) not in (0, len(self._weights)):
            raise RunError(
                "under DeepSpeed all weights take the same steps, and in this run some were left out of some "
                "steps: go on with it in one process, under DDP, or under FSDP2."
            )
        group.update({name: value for name, value in saved.items() if name != "params"})
        if not moments:
            return
        (flat,) = group["params"]
        self.optimizer.optimizer.state[flat] = {
            name: value.to(flat.device, copy=True) if name == "step" else torch.zeros_like(flat)
            for name, value in moments[0].items()
        }
        self.optimizer._lazy_init_hp_params_optimizer_state()
        for place, weight in enumerate(self._weights):
            for name, value in moments[place].items():
                if name != "step":
                    safe_set_full_optimizer_state(weight, value.to(weight.device), name)
