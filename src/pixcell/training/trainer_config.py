"""What a recipe says about the loop itself: how long, how much at a time, how precisely, and what is kept."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pixcell.config import Config
from pixcell.training.loading import OnBadTile
from pixcell.training.metrics import WandbConfig
from pixcell.training.stop_rules import SpikeConfig

__all__ = ["TrainerConfig"]


class TrainerConfig(Config):
    """How long, how much at a time, how precisely, and what is kept."""

    steps: int | None = Field(None, gt=0)
    """Optimiser steps of the whole run."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run instead of ``steps``: how often as many samples as there are pass, rounded up to
    whole steps. Of mixed groups some come more often than that, others less."""
    batch_size: int = Field(gt=0)
    """Samples a step, over all processes and micro-batches."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Samples that pass through one device at once; gradients add up. None: its whole share of the batch."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of products inside the model (autocast). Weights, moments, averages and losses are float32."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """What float32 products may be rounded to: ``high`` permits TF32, ``medium`` bf16."""
    compile: bool = False
    """Compile the model's blocks for this machine (``torch.compile``): minutes at the start, faster steps."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third more time."""
    ema_decays: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field((0.9999,), min_length=1)
    """Of the running averages of the weights. The first is what previews, ``pipeline/`` and figures show; the
    others are there to choose from later. ``ema_decay: 0.9999`` is short for one."""
    ema_warmup: bool = True
    """Keep less of an average in the beginning, so that the start is forgotten: ``(1 + step) / (10 + step)``
    where that is below the decay (for 0.9999 during 90,000 steps). The released code does not."""
    spike: SpikeConfig | None = SpikeConfig()
    """When a loss counts as run away, which ends the run with an error. None: never."""
    max_hours: float | None = Field(None, gt=0)
    """Time limit of one start, checkpoint included: the run saves and stops before it, and can go on. None:
    there is none."""
    checkpoint_every: int = Field(2000, gt=0)
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = Field(3, gt=0)
    """Checkpoints that are kept, counted from the end."""
    keep_every: int | None = Field(None, gt=0)
    """Of the others, those at multiples of so many steps are kept too. None: none of them."""
    log_every: int = Field(20, gt=0)
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    """Show the run at Weights & Biases, too: ``{project: ...}``."""
    mfu: bool = True
    """Log the share of the device's peak that goes into the model. Its FLOPs are counted at the start, for
    which one sample goes forward on the processor: a second for a small model, more for a large one."""
    report: bool = True
    """Write ``report.html`` when the training ends; ``pixcell report RUN`` does so at any time."""
    workers: int = Field(0, ge=0)
    """Loader processes; 0 prepares samples between steps. Does not change the run."""
    device: Literal["auto", "cpu"] = "auto"
    """``auto``: the accelerator that the launcher assigns, else the CPU."""
    on_bad_tile: OnBadTile = "fail"
    """A tile that cannot be read ends the run, or is dropped from its batch: it has no part in the loss, is
    listed in ``dropped.jsonl``, and is never replaced by another one."""
    seed: int = Field(0, ge=0, lt=2**63)

    def num_steps(self, num_samples: int) -> int:
        """Return the steps of the whole run on so many samples.

        Examples:
            >>> TrainerConfig(epochs=2, batch_size=16).num_steps(100)
            13
            >>> TrainerConfig(epochs=1.1, batch_size=10).num_steps(100)  # 1.1 * 100 is 110.00000000000001
            11
        """
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # one of the two is given
        return math.ceil(Fraction(repr(self.epochs)) * num_samples / self.batch_size)

    @model_validator(mode="before")
    @classmethod
    def _one_decay_is_a_list_of_one(cls, content: Any) -> Any:
        if not isinstance(content, Mapping) or "ema_decay" not in content:
            return content
        if "ema_decays" in content:
            raise ValueError("ema_decay and ema_decays are two ways of saying one thing; give one of them")
        return {
            "ema_decays": [content["ema_decay"]],
            **{key: value for key, value in content.items() if key != "ema_decay"},
        }

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            if self.steps is None:
                raise ValueError("give the length of the run, as steps or as epochs")
            raise ValueError(
                f"steps {self.steps} and epochs {self.epochs:g} are two lengths of one run; give one of them "
                "(--set trainer.steps=null takes the steps of a recipe out)"
            )
        return self

    @model_validator(mode="after")
    def _averages_and_checkpoints_can_be_told_apart(self) -> Self:
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"ema_decays {list(self.ema_decays)} names one decay twice")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of checkpoint_every {self.checkpoint_every}: "
                "most of what it is to keep would never be written"
            )
        return self
