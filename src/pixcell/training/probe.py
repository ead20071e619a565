"""A few steps of a run that leave nothing behind: to know how long it will take before it begins.

The steps are those of the loop, by the same parts: loader, engine, optimiser, averages. Weights do move, in
memory; nothing is written.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pixcell.errors import RecipeError
from pixcell.training.averages import AveragedWeights
from pixcell.training.determinism import BatchPlan
from pixcell.training.engine import Engine
from pixcell.training.flops import matmul_precision
from pixcell.training.loading import MicroBatch, load_batches
from pixcell.training.objectives import Objective, order_of
from pixcell.training.optimizers import OptimizerConfig, learning_rate, make_optimizer
from pixcell.training.trainer_config import TrainerConfig

__all__ = ["Probe", "Rehearsal", "StepTimes", "probe"]

_MOST_STEPS = 12
_NO_END = 10**9


@dataclass(frozen=True)
class StepTimes:
    """Where the seconds of one step went, in one process."""

    waiting: float
    """For the loader."""
    computing: float
    """Forward and backward of all micro-batches."""
    moving: float
    """Clipping, optimiser, averages."""
    loss: float
    """Mean over the samples of the step."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.waiting + self.computing + self.moving


@dataclass(frozen=True)
class Probe:
    """What one micro-batch and one move of the weights cost, as medians over the steps timed."""

    micro_batch_size: int
    num_steps: int
    """Timed ones; at least one more came first, to warm up."""
    waiting_s: float
    """For the loader, per micro-batch."""
    computing_s: float
    """Forward and backward of a micro-batch."""
    moving_s: float
    """Clipping, optimiser and averages, per step."""
    peak_bytes: int | None
    """Most memory that tensors took on a GPU; None on a processor, where nobody counts."""

    def seconds_per_step(self, samples: int) -> float:
        """Return how long a step takes in which this process has so many samples."""
        return samples / self.micro_batch_size * (self.waiting_s + self.computing_s) + self.moving_s


class Rehearsal:
    """Takes steps of a run in this process, and writes nothing.

    Args:
        objective: What is trained; its weights move.
        optimizer: How.
        config: The run's; ``batch_size`` samples a step.
    """

    def __init__(self, objective: Objective, optimizer: OptimizerConfig, config: TrainerConfig) -> None:
        if len(objective.samples) < config.batch_size:
            raise RecipeError(
                f"there are {len(objective.samples)} samples, fewer than one batch of {config.batch_size}: "
                "lower trainer.batch_size, or tile more slides."
            )
        self.objective, self.optimizer, self.config = objective, optimizer, config
        self.engine = Engine(objective, lambda model: make_optimizer(model, optimizer), config)
        self.averages = AveragedWeights(objective.trainable, config.ema_decays, config.ema_warmup)
        self.micro_batch_size = config.micro_batch_size or config.batch_size
        self.step = 0
        self._num_steps = config.num_steps(len(objective.samples))
        self._batches = self._loader()

    def take_step(self) -> StepTimes:
        """Take one step; return where its time went."""
        config, waiting, computing, losses = self.config, 0.0, 0.0, []
        with matmul_precision(config.matmul_precision):
            count = config.batch_size // self.micro_batch_size
            for place in range(count):
                started = self._now()
                micro = next(self._batches)
                read = self._now()
                found = self.engine.forward_backward(
                    {**micro.samples, "step": self.step},
                    1 / config.batch_size,
                    is_last=place == count - 1,
                    counts=micro.readable,
                )
                losses.append(found.per_sample)
                waiting, computing = waiting + read - started, computing + self._now() - read
            started = self._now()
            rate = learning_rate(self.optimizer, self.step, self._num_steps)
            self.engine.move_weights(rate, self.optimizer.clip_norm)
            self.averages.update(self.step)
            moving = self._now() - started
        self.step += 1
        return StepTimes(waiting, computing, moving, float(torch.cat(losses).mean()))

    def _now(self) -> float:
        if self.engine.device.type != "cpu":
            torch.accelerator.synchronize(self.engine.device)
        return time.perf_counter()

    def _loader(self) -> Iterator[MicroBatch]:
        samples, config = self.objective.samples, self.config
        plan = BatchPlan(
            order_of(samples, config.seed),
            batch_size=config.batch_size,
            micro_batch_size=self.micro_batch_size,
            first_step=0,
            last_step=_NO_END,
        )
        return load_batches(
            samples,
            plan,
            seed=config.seed,
            workers=config.workers,
            pin_memory=self.engine.device.type == "cuda",
            on_bad_tile=config.on_bad_tile,
        )


def probe(
    objective: Objective, optimizer: OptimizerConfig, config: TrainerConfig, most_seconds: float = 20.0
) -> Probe:
    """Time steps of one micro-batch each.

    Args:
        objective: What is trained; its weights move.
        optimizer: How.
        config: The run's. ``micro_batch_size`` samples pass at once.
        most_seconds: No further step begins after so long. Two are taken in any case: one to warm up.
    """
    started = time.perf_counter()
    size = config.micro_batch_size or config.batch_size
    rehearsal = Rehearsal(objective, optimizer, config.with_changes(batch_size=size, micro_batch_size=size))
    rehearsal.take_step()
    if rehearsal.engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rehearsal.engine.device)
    times = [rehearsal.take_step()]
    while len(times) < _MOST_STEPS and time.perf_counter() - started < most_seconds:
        times.append(rehearsal.take_step())
    on_gpu = rehearsal.engine.device.type == "cuda"
    return Probe(
        micro_batch_size=size,
        num_steps=len(times),
        waiting_s=statistics.median(one.waiting for one in times),
        computing_s=statistics.median(one.computing for one in times),
        moving_s=statistics.median(one.moving for one in times),
        peak_bytes=torch.cuda.max_memory_allocated(rehearsal.engine.device) if on_gpu else None,
    )
