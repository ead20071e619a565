"""What accelerate hides from the loop: devices, processes, precision, and how the model is wrapped.

Whatever the launcher chose, a step computes the same sums, and the state of a run has one layout: whole
tensors under the names of the trainable module, as one process would have them. So a run can go on with
another number of processes, or under another engine.

    one process    python -m pixcell train RECIPE
    DDP            torchrun --nproc-per-node 4 -m pixcell train RECIPE
    FSDP2          accelerate launch --config_file fsdp2.yaml -m pixcell train RECIPE
    DeepSpeed      accelerate launch --config_file deepspeed.yaml -m pixcell train RECIPE

The recipe decides what is computed (precision, micro-batches, compiling, clipping); what an accelerate config
says of these is not used. That config decides how the work is spread.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    send_to_device,
)
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.distributed import DistError

from pixcell.errors import PixCellError, RecipeError, RunError
from pixcell.models.weights import fit_weights
from pixcell.training.objectives import Losses, Objective
from pixcell.training.sharding import (
    Unsharded,
    block_names,
    fsdp_plugin,
    is_sharded,
    keep_float32,
    like,
    whole,
)
from pixcell.training.trainer_config import TrainerConfig
from pixcell.training.zero import ZeroEngine, hidden_from_accelerate, zero_settings

__all__ = ["Engine"]

_PATIENCE = timedelta(hours=1)
"""How long processes wait for each other: previews and checkpoints are made by one while the others wait."""

_COMPILE: dict[str, Any] = {}
"""Options of ``torch.compile``."""


class Engine:
    """Holds the wrapped model and its optimiser, on as many processes as the launcher started.

    Args:
        objective: What is trained.
        make_optimizer: Called with the trainable module.
        config: Precision, device, compiling, gradient checkpointing.

    Raises:
        RecipeError: If launcher, recipe and machine do not fit each other.
    """

    def __init__(
        self,
        objective: Objective,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: TrainerConfig,
    ) -> None:
        settings = zero_settings()
        if settings is not None and config.precision == "fp16":
            raise RecipeError("trainer.precision fp16 is not possible under DeepSpeed: choose bf16 or fp32.")
        self.accelerator = _accelerator(config)
        self.trainable = objective.trainable
        if config.gradient_checkpointing:
            _enable_gradient_checkpointing(self.trainable)
        self.trainable.train()
        self.trainable.to(self.device)
        objective.move_to(self.device)
        losses = _LossOf(objective, self.accelerator)
        if config.compile:
            _compile(losses)
        self._plain = Unsharded(self.trainable)
        optimizer = make_optimizer(self.trainable)
        self._zero: ZeroEngine | None = None
        if settings is not None:
            _must_be_adamw(optimizer, "DeepSpeed")
        if settings is not None and self.num_processes > 1:
            self._zero = ZeroEngine(losses, optimizer, settings, self.device, self.num_processes)
            self.model, self.optimizer = self._zero.model, self._zero.optimizer
        else:
            if self.accelerator.distributed_type == DistributedType.FSDP:
                _must_be_adamw(optimizer, "FSDP2")
            self.model, self.optimizer = self.accelerator.prepare(losses, optimizer)
        self.is_sharded = is_sharded(self.trainable)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and talks."""
        return bool(self.accelerator.is_main_process)

    @property
    def num_processes(self) -> int:
        """Processes that train together."""
        return int(self.accelerator.num_processes)

    @property
    def process_index(self) -> int:
        """The number of this process; 0 is the main one."""
        return int(self.accelerator.process_index)

    @property
    def has_loss_scale(self) -> bool:
        """Whether gradients that overflow are met by a smaller loss scale (fp16)."""
        return self.accelerator.scaler is not None

    def __str__(self) -> str:
        """Say how the work is spread, for a log.

        ``1 process on cpu``, or ``4 processes (FSDP2 over nccl) on cuda``.
        """
        if self.num_processes == 1:
            return f"1 process on {self.device.type}"
        engine = "FSDP2" if self.is_sharded else "DDP"
        if self._zero:
            engine = f"DeepSpeed ZeRO {self._zero.stage}"
        backend = self.accelerator.state.backend
        return f"{self.num_processes} processes ({engine} over {backend}) on {self.device.type}"

    # -- a step -------------------------------------------------------------------------------------------

    def forward_backward(
        self, batch: Mapping[str, Any], share: float, is_last: bool, counts: Tensor | None = None
    ) -> Losses:
        """Compute the losses of a micro-batch and add ``share`` of their sum to the gradients.

        Args:
            batch: Collated samples.
            share: One over the samples a step of this process.
            counts: Which rows have a part in it, and are returned. None: all.
            is_last: Whether the step's gradients are complete with it. Only then do processes exchange them,
                unless each keeps a part only: then whole ones would take the memory that was to be saved.
        """
        wait = not is_last and not self.is_sharded and self._zero is None
        with self._peers(), self.accelerator.no_sync(self.model) if wait else contextlib.nullcontext():
            found = self.model(send_to_device(batch, self.device))
            per_sample = found["per_sample"]
            if counts is not None:
                per_sample = torch.where(counts.to(self.device), per_sample, 0.0)
            loss = per_sample.sum() * share
            if self._zero:
                self._zero.backward(loss, is_last)
            else:
                self.accelerator.backward(loss)
        rows = slice(None) if counts is None else counts.to(self.device)
        times = found["times"]
        return Losses(
            found["per_sample"].detach()[rows],
            {name: values.detach()[rows] for name, values in found["parts"].items()},
            None if times is None else times[rows],
        )

    def move_weights(self, rate: float, clip_norm: float | None) -> float:
        """Clip, take the optimiser's step, forget the gradients; return their norm before clipping.

        A step whose gradient is not finite is not taken.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self._zero:
            with self._peers():
                return self._zero.step(clip_norm)
        with self._peers():
            length = self.accelerator.clip_grad_norm_(self.model.parameters(), clip_norm or math.inf)
            norm = float(whole(length))
        if math.isfinite(norm) or self.has_loss_scale:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    # -- between processes --------------------------------------------------------------------------------

    def sums(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Add scalars up over all processes, in one exchange."""
        stacked = torch.stack([value.to(self.device, torch.float32) for value in values.values()])
        with self._peers():
            total = self.accelerator.reduce(stacked, "sum").tolist()
        return dict(zip(values, total, strict=True))

    def lists(self, values: list[Any]) -> list[Any]:
        """Join the lists of all processes, in their order. Every process calls it."""
        with self._peers():
            return list(gather_object(values))

    def in_main(self, action: Callable[[], None]) -> None:
        """Do something in the main process while the others wait. If it fails, all of them end.

        Raises:
            PixCellError: What the action raised, in the main process.
            RunError: In the others.
        """
        done = False
        try:
            if self.is_main:
                action()
            done = True
        finally:  # the others must hear of a failure: they would wait for ever
            failed = self.sums({"failed": torch.tensor(float(not done))})["failed"]
        if failed:
            raise RunError("the main process failed; its message says why.")

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        """Say plainly that another process is gone, where the exchange with it breaks off."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, PixCellError) or not _is_lost_peer(error):
                raise
            raise RunError(
                f"process {self.process_index} lost the others: one of them was killed, or failed and says "
                "why. The same command goes on from the last checkpoint."
            ) from error

    # -- the whole state, as one process would have it ------------------------------------------------------

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole of tensors that may be spread over processes. Every process calls it.

        What is spread comes back in the main process only, in main memory; the rest is not copied.
        """
        if not self.is_sharded:
            return {name: value.detach() for name, value in values.items()}
        gathered = {}
        for name, value in values.items():
            full = whole(value)
            if self.is_main:
                gathered[name] = full.cpu()
        return gathered

    def weights(self) -> dict[str, Tensor]:
        """Return the state dictionary of the trainable module. Every process calls it."""
        return self.whole(self.trainable.state_dict())

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Put a whole state dictionary into the trainable module. Every process calls it.

        Raises:
            WrongWeights: If names or shapes differ.
        """
        if self.is_sharded:
            own = self.trainable.state_dict()
            weights = {
                name: like(value, own[name]) if name in own and value.shape == own[name].shape else value
                for name, value in weights.items()
            }
        fit_weights(self.trainable, weights, source)
        if self._zero:
            self._zero.refresh()

    def optimizer_state(self) -> dict[str, Any]:
        """Return the state of optimiser and loss scale. Every process calls it."""
        if self._zero:
            with self._peers():
                return {"optimizer": self._zero.state(keep=self.is_main), "scaler": None}
        state, scaler = self.optimizer.state_dict(), self.accelerator.scaler
        if self.is_sharded:
            state = {**state, "state": {place: self.whole(kept) for place, kept in state["state"].items()}}
        return {"optimizer": state, "scaler": scaler.state_dict() if scaler is not None else None}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`optimizer_state` returned. Every process calls it."""
        kept = state["optimizer"]
        if self._zero:
            return self._zero.load_state(kept)
        if self.is_sharded:
            weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            spread = {
                place: {
                    name: like(value, weights[place]) if value.shape == weights[place].shape else value
                    for name, value in moments.items()
                }
                for place, moments in kept["state"].items()
            }
            kept = {**kept, "state": spread}
        self.optimizer.load_state_dict(kept)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the trainable module hold other weights for the length of a block, in evaluation mode.

        Its own come back bit for bit. In the main process only, which then can use the module alone.

        Args:
            weights: A whole one for each parameter, by name; more may be there.
        """
        self.trainable.eval()
        holding = self._plain.holding(weights, self.device) if self.is_sharded else self._pointing(weights)
        try:
            with holding, torch.compiler.set_stance("force_eager"):  # other shapes are not worth compiling
                yield
        finally:
            self.trainable.train()

    @contextlib.contextmanager
    def _pointing(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Exchange the memory behind each parameter: nothing is copied."""
        own = dict(self.trainable.named_parameters())
        kept = {name: weight.data for name, weight in own.items()}
        try:
            for name, weight in own.items():
                weight.data = weights[name].detach().to(weight)
            yield
        finally:
            for name, weight in own.items():
                weight.data = kept[name]


class _LossOf(nn.Module):
    """The losses as a module's forward: the form in which launchers wrap a model."""

    def __init__(self, objective: Objective, accelerator: Accelerator) -> None:
        super().__init__()
        self.trainable = objective.trainable
        self._loss, self._autocast = objective.loss, accelerator.autocast
        self._no_split_modules = block_names(objective.trainable)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        with self._autocast():
            losses = self._loss(batch)
        # Wrappers look for tensors in dictionaries; they do not see into other objects.
        return {"per_sample": losses.per_sample, "parts": dict(losses.parts), "times": losses.times}


def _must_be_adamw(optimizer: torch.optim.Optimizer, engine: str) -> None:
    """Refuse optimisers that look at whole tensors where no process has one."""
    if not isinstance(optimizer, torch.optim.AdamW):
        raise RecipeError(
            f"the optimizer {type(optimizer).__name__} looks at whole tensors, which no process has "
            f"under {engine}: choose optimizer.name=adamw, or train under DDP."
        )


def _accelerator(config: TrainerConfig) -> Accelerator:
    # The state is shared by all Accelerators of a process and refuses another precision; one program may
    # train an autoencoder in bf16 and then a denoiser in fp32.
    AcceleratorState._reset_state()
    plugin = fsdp_plugin()
    try:
        with hidden_from_accelerate():
            accelerator = Accelerator(
                # On a machine without GPUs processes find each other only if they are told that it has none.
                cpu=config.device == "cpu" or not torch.accelerator.is_available(),
                mixed_precision="no" if config.precision == "fp32" else config.precision,
                dynamo_backend="no",
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                fsdp_plugin=plugin,
                kwargs_handlers=[
                    InitProcessGroupKwargs(timeout=_PATIENCE),
                    DistributedDataParallelKwargs(
                        gradient_as_bucket_view=True
                    ),  # no second copy of gradients
                ],
            )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise RecipeError(f"this machine, launcher or precision does not go: {error}") from error
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise RecipeError(
            f"the launcher started {started} processes, and accelerate joins {accelerator.num_processes} of "
            f"them on {accelerator.device.type}: each would train alone. Try trainer.device=cpu, or start "
            "one process."
        )
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise RecipeError("trainer.precision fp16 needs a GPU: on a CPU choose bf16 or fp32.")
    if plugin is not None and accelerator.num_processes > 1:
        keep_float32(plugin)
        # accelerate shards on GPUs only and would train by DDP on CPUs without a word; torch can do both.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def _is_lost_peer(error: RuntimeError) -> bool:
    said = str(error)
    return isinstance(error, DistError) or "gloo" in said.lower() or "by peer" in said


def _compile(losses: _LossOf) -> None:
    """Compile in place, which leaves names as they are: each repeated block, or the loss where none is."""
    names = {
        name for part in losses.trainable.modules() for name in getattr(part, "_repeated_blocks", None) or ()
    }
    blocks = [part for part in losses.trainable.modules() if type(part).__name__ in names]
    for part in blocks or [losses]:
        part.compile(**_COMPILE)


def _enable_gradient_checkpointing(trainable: nn.Module) -> None:
    """Switch it on in every part that has it: a model may be trained with a helper beside it."""
    models = [
        part
        for part in trainable.modules()
        if isinstance(part, ModelMixin) and part._supports_gradient_checkpointing
    ]
    if not models:
        raise RecipeError(
            f"trainer.gradient_checkpointing is not possible for {type(trainable).__name__}: set it to false."
        )
    for model in models:
        model.enable_gradient_checkpointing()
