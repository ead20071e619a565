"""How weights move: the optimiser, and its learning rate over time."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import nn

from pixcell.config import Config
from pixcell.errors import MissingExtra

__all__ = [
    "AdamW8bitConfig",
    "AdamWConfig",
    "CameConfig",
    "OptimizerConfig",
    "learning_rate",
    "make_optimizer",
]

_Share = Annotated[float, Field(ge=0, lt=1)]
"""What a running mean keeps of itself each step."""


class _RateConfig(Config):
    """What every optimiser has: a learning rate, its course, and how far weights and gradients may go."""

    lr: float = Field(2e-5, gt=0)
    """After warm-up. Not scaled by the batch size."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled: each step takes ``lr`` times this share off every weight, biases and norms included: the
    paper gives a value and names no exceptions."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: as it is, or down to ``final_lr_share`` along half a cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Over how many the rate rises in a line: to ``lr`` at the last of them."""
    warmup: Literal["from-first-step", "from-zero"] = "from-first-step"
    """Whether the first step has its share of ``lr`` already (1/n, 2/n, ...), or none (0, 1/n, ...) as in the
    released code, whose first step moves no weight."""
    warmup_advance: int = Field(1, gt=0)
    """How many warm-up steps pass with each step of the optimiser. In the released code they pass once for
    each process: with 16, its 1,000 are over after 63 steps."""
    final_lr_share: float = Field(0.0, ge=0, le=1)
    """Where the cosine ends, as a share of ``lr``."""
    clip_norm: float | None = Field(None, gt=0)
    """Longest gradient, by its norm over all weights. None: not clipped."""


class _AdamConfig(_RateConfig):
    beta1: _Share = 0.9
    beta2: _Share = 0.999
    eps: float = Field(1e-8, gt=0)


class AdamWConfig(_AdamConfig):
    """AdamW: two moments per weight."""

    name: Literal["adamw"] = "adamw"


class AdamW8bitConfig(_AdamConfig):
    """AdamW with moments of eight bits: a quarter of their memory, and coarser.

    They are kept in blocks of 256 with one scale each; tensors below 4,096 values keep theirs in float32.

    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"
    (https://arxiv.org/abs/2110.02861), by the authors' package ``bitsandbytes`` (extra ``8bit``).
    """

    name: Literal["adamw-8bit"] = "adamw-8bit"


class CameConfig(_RateConfig):
    """CAME, with which the released PixCell code trains: one moment per weight, the others by row and column.

    So its state takes half the memory of AdamW's. The second moment of a matrix is kept as the means of its
    rows and of its columns (as Adafactor does), and a step is smaller where it disagrees with the running
    mean of earlier steps. Defaults are those of the released code.

    Source: Luo et al. 2023, "CAME: Confidence-guided Adaptive Memory Efficient Optimization"
    (https://arxiv.org/abs/2307.02047), by the authors' package ``came-pytorch``.
    """

    name: Literal["came"] = "came"
    betas: tuple[_Share, _Share, _Share] = (0.9, 0.999, 0.9999)
    """Of steps, squared gradients, and squared disagreement."""
    eps: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (1e-30, 1e-16)
    """Added to squared gradients, and to squared disagreement."""
    clip_threshold: float = Field(1.0, gt=0)
    """Largest root mean square of a tensor's step before the learning rate."""


def _name_of(value: Any) -> Any:
    return value.get("name", "adamw") if isinstance(value, Mapping) else getattr(value, "name", None)


OptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[AdamW8bitConfig, Tag("adamw-8bit")]
    | Annotated[CameConfig, Tag("came")],
    Discriminator(
        _name_of,
        custom_error_type="unknown_optimizer",
        custom_error_message="the name of an optimizer is adamw, adamw-8bit or came",
    ),
]
"""One of the optimisers; a recipe that names none means AdamW."""


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimiser of all weights that want a gradient, in one group.

    Raises:
        MissingExtra: If a package is needed that is not installed.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if isinstance(config, CameConfig):
        from came_pytorch import CAME

        came: torch.optim.Optimizer = CAME(
            weights,
            lr=config.lr,
            eps=config.eps,
            clip_threshold=config.clip_threshold,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        return came
    if isinstance(config, AdamW8bitConfig):
        low_bits: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(
            weights,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        return low_bits
    return torch.optim.AdamW(
        weights,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=all(weight.device.type in ("cpu", "cuda") for weight in weights),  # one pass over the memory
    )


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "8bit", "optimizer.name adamw-8bit") from error
    return bitsandbytes


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the rate of a step; ``step`` 0 is the first.

    Examples:
        >>> config = AdamWConfig(lr=1.0, warmup_steps=2, schedule="cosine")
        >>> [round(learning_rate(config, step, 6), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
        >>> released = AdamWConfig(lr=1.0, warmup_steps=1000, warmup="from-zero", warmup_advance=16)
        >>> [learning_rate(released, step, 6000) for step in (0, 1, 62, 63)]
        [0.0, 0.016, 0.992, 1.0]
    """
    passed = (step + (config.warmup == "from-first-step")) * config.warmup_advance
    if passed < config.warmup_steps:
        return config.lr * passed / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    warm = math.ceil(config.warmup_steps / config.warmup_advance)
    progress = max(0, step - warm) / max(1, num_steps - warm)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * share)
