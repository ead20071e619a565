"""What accelerate hides from the loop: devices, processes, precision, and how the model is wrapped."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, send_to_device
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from pixcell.errors import RecipeError
from pixcell.models.weights import fit_weights
from pixcell.training.objectives import Losses, Objective
from pixcell.training.trainer_config import TrainerConfig

__all__ = ["Engine"]


class Engine:
    """Holds the wrapped model and its optimiser, on as many processes as the launcher started.

    Args:
        objective: What is trained.
        make_optimizer: Called with the trainable module.
        config: Precision, device, gradient checkpointing.
    """

    def __init__(
        self,
        objective: Objective,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: TrainerConfig,
    ) -> None:
        # The state is shared by all Accelerators of a process and refuses another precision; one program may
        # train an autoencoder in bf16 and then a denoiser in fp32.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision="no" if config.precision == "fp32" else config.precision,
        )
        self.trainable = objective.trainable
        if config.gradient_checkpointing:
            _enable_gradient_checkpointing(self.trainable)
        self.trainable.train()
        self.trainable.to(self.device)
        objective.move_to(self.device)
        self.model, self.optimizer = self.accelerator.prepare(
            _LossOf(objective), make_optimizer(self.trainable)
        )

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

    # -- a step -------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Mapping[str, Any], share: float, is_last: bool) -> Losses:
        """Compute the losses of a micro-batch and add ``share`` of their sum to the gradients.

        Args:
            batch: Collated samples.
            share: One over the samples a step of this process.
            is_last: Whether the step's gradients are complete with it: only then do processes exchange them.
        """
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
            found = self.model(send_to_device(batch, self.device))
            self.accelerator.backward(found["per_sample"].sum() * share)
        return Losses(
            found["per_sample"].detach(),
            {name: values.detach() for name, values in found["parts"].items()},
            found["times"],
        )

    def move_weights(self, rate: float, clip_norm: float | None) -> float:
        """Clip, take the optimiser's step, forget the gradients; return their norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), clip_norm or math.inf))
        if math.isfinite(norm) or self.has_loss_scale:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def sums(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Add scalars up over all processes, in one exchange."""
        stacked = torch.stack([value.to(self.device, torch.float32) for value in values.values()])
        total = self.accelerator.reduce(stacked, "sum").tolist()
        return dict(zip(values, total, strict=True))

    def lists(self, values: list[Any]) -> list[Any]:
        """Join the lists of all processes, in their order. Every process calls it."""
        return list(gather_object(values))

    def wait_for_everyone(self) -> None:
        """Go on when every process has come here."""
        self.accelerator.wait_for_everyone()

    # -- the whole state, as one process would have it ------------------------------------------------------

    def whole(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of the whole of tensors that may be spread over processes. Every process calls it."""
        return {name: value.detach().clone() for name, value in values.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the state dictionary of the trainable module. Every process calls it."""
        return self.whole(self.trainable.state_dict())

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Put a whole state dictionary into the trainable module.

        Raises:
            WrongWeights: If names or shapes differ.
        """
        fit_weights(self.trainable, weights, source)

    def optimizer_state(self) -> dict[str, Any]:
        """Return the state of optimiser and loss scale. Every process calls it."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`optimizer_state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    @contextlib.contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Give the trainable module other parameters for the length of a block, and evaluation mode.

        Its own come back bit for bit. In the main process only.
        """
        own = dict(self.trainable.named_parameters())
        kept = {name: own[name].detach().clone() for name in weights}
        self.trainable.eval()
        try:
            _fill(own, weights)
            yield
        finally:
            _fill(own, kept)
            self.trainable.train()


class _LossOf(nn.Module):
    """The losses as a module's forward: the form in which launchers wrap a model."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.trainable = objective.trainable
        self._loss = objective.loss

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        losses = self._loss(batch)
        # Wrappers look for tensors in dictionaries; they do not see into other objects.
        return {"per_sample": losses.per_sample, "parts": dict(losses.parts), "times": losses.times}


@torch.no_grad()
def _fill(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        weights[name].copy_(value)


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
