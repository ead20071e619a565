"""What a recipe says about the loop itself: how long, how much at a time, how precisely, and what is kept."""

from typing import Literal

from pydantic import Field

from pixcell.config import Config
from pixcell.training.metrics import WandbConfig

__all__ = ["TrainerConfig"]


class TrainerConfig(Config):
    """How long, how much at a time, how precisely, and what is kept."""

    steps: int = Field(gt=0)
    """Optimiser steps of the whole run."""
    batch_size: int = Field(gt=0)
    """Samples a step, over all processes and micro-batches."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Samples that pass through one device at once; gradients add up. None: its whole share of the batch."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of products inside the model (autocast). Weights, moments, averages and losses are float32."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """What float32 products may be rounded to: ``high`` permits TF32, ``medium`` bf16."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    checkpoint_every: int = Field(2000, gt=0)
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = Field(3, gt=0)
    """Checkpoints that are kept."""
    log_every: int = Field(20, gt=0)
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    """Show the run at Weights & Biases, too: ``{project: ...}``."""
    workers: int = Field(0, ge=0)
    """Loader processes; 0 prepares samples between steps. Does not change the run."""
    device: Literal["auto", "cpu"] = "auto"
    """``auto``: the accelerator that the launcher assigns, else the CPU."""
    seed: int = Field(0, ge=0, lt=2**63)
