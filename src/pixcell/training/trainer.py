"""The one training loop.

A step: its micro-batches forward and backward, clip, move the weights, move the average. Everything random
about a step is a function of (seed, step, position) (see :mod:`pixcell.training.determinism`), so the state
of a run is the weights, the averages, the optimiser's moments and the number of the step, and nothing else: a
run that was killed goes on as if nothing had happened. On one CPU process the weights are equal bit for bit;
GPUs and several processes add up in another order and agree within rounding.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pixcell.console import console, progress
from pixcell.errors import RecipeError, RunError
from pixcell.files import writing_to
from pixcell.training.averages import AveragedWeights
from pixcell.training.checkpoints import Checkpoint, prune, remove_unfinished, write_checkpoint
from pixcell.training.determinism import BatchPlan, Ticket, rng_for
from pixcell.training.engine import Engine
from pixcell.training.figures import Figures, ModelFlops, note_of, sums_of
from pixcell.training.flops import peak_of
from pixcell.training.metrics import MetricsLog
from pixcell.training.objectives import Losses, Objective, Samples
from pixcell.training.optimizers import OptimizerConfig, learning_rate, make_optimizer
from pixcell.training.order import SampleOrder
from pixcell.training.previews import save_preview
from pixcell.training.run_state import RunState
from pixcell.training.trainer_config import TrainerConfig

__all__ = ["Outcome", "Trainer"]

_TOLD = "told to stop"


@dataclass(frozen=True)
class Outcome:
    """How a call of :meth:`Trainer.fit` ended."""

    step: int
    checkpoint: Checkpoint
    stopped_by: str | None
    """The signal that ended it early; None: the run is complete."""
    loss: float | None
    """Mean over the last logged steps; None if no step was left to take."""
    seconds: float
    """Spent on training in all, over every resume."""
    samples_per_s: float | None


class Trainer:
    """Trains one objective in one run folder.

    Args:
        objective: What to train.
        optimizer: How weights move.
        config: How long, and what is kept.
        run: The run folder.
        label: Shown beside the progress bar.
        flops_per_sample: Of a training step, for the figure ``flop_use`` (MFU). None: that is left out.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: OptimizerConfig,
        config: TrainerConfig,
        run: Path,
        label: str = "",
        flops_per_sample: float | None = None,
    ) -> None:
        self.objective, self.optimizer_config, self.config, self.run = objective, optimizer, config, run
        self.label, self.flops_per_sample = label or run.name, flops_per_sample
        self.engine = Engine(objective, lambda model: make_optimizer(model, optimizer), config)
        self.order = self._order()
        self.averages = AveragedWeights(objective.trainable, config.ema_decays)
        self.step, self.seconds = 0, 0.0
        self.last_checkpoint: Checkpoint | None = None

    def fit(self, resume: bool = True) -> Outcome:
        """Train to the last step, from the last checkpoint if there is one.

        SIGTERM (a cluster's time limit) and the first Ctrl-C finish the step, save, and return.

        Raises:
            RunError: If the loss is not a finite number, or the checkpoint is damaged or of other data.
            OutputError: If the disk is full; the last checkpoint stays usable.
        """
        if self.engine.is_main:
            with writing_to(self.run):
                self.run.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.run)
        if resume:
            self._resume()
        with (
            _matmul_precision(self.config.matmul_precision),
            _StopSignals() as stop,
            self._metrics() as metrics,
            progress(f"train {self.label}", self.config.steps, self.step) as advance,
        ):
            return self._fit(stop, metrics, advance)

    def _fit(
        self, stop: "_StopSignals", metrics: "MetricsLog | None", advance: Callable[..., None]
    ) -> Outcome:
        config = self.config
        figures = self._figures()
        loss = samples_per_s = note = None
        stopped = False
        for batches in self._steps():
            rate = learning_rate(self.optimizer_config, self.step, config.steps)
            started = time.monotonic()
            sums, gradient_norm, stopped = self._take_step(batches, rate, stop)
            figures.add(sums, gradient_norm, time.monotonic() - started)
            self.seconds += time.monotonic() - started
            if self.step % config.log_every == 0 or self.step == config.steps:
                line = figures.line(self.step, self.engine.device)
                line |= {"lr": rate, "seconds": self.seconds}
                line["epoch"] = self.step * config.batch_size / self.order.num_samples
                loss, samples_per_s, note = line["loss"], line["samples_per_s"], note_of(line)
                if metrics:
                    metrics.write(self.step, line)
            advance(1, note=note)
            if self.step % config.checkpoint_every == 0 or self.step == config.steps or stopped:
                started = time.monotonic()
                self._save(metrics)
                figures.saved(time.monotonic() - started)
            if stopped:
                break
        assert self.last_checkpoint is not None
        name = (
            signal.Signals(stop.requested).name if stop.requested else "another process" if stopped else None
        )
        return Outcome(
            self.step,
            self.last_checkpoint,
            name if self.step < config.steps else None,
            loss,
            self.seconds,
            samples_per_s,
        )

    def _take_step(
        self, batches: Iterator[Mapping[str, Any]], rate: float, stop: "_StopSignals"
    ) -> tuple[dict[str, float], float, bool]:
        """One optimiser step; return its figures' sums, the gradient's norm, and whether to stop."""
        engine, count = self.engine, self._num_micro_batches
        share = engine.num_processes / self.config.batch_size
        losses: list[Losses] = []
        keys: list[str] = []
        for place in range(count):
            batch = {**next(batches), "step": self.step}
            keys += batch["key"]
            losses.append(engine.forward_backward(batch, share, is_last=place == count - 1))
        # One exchange a step: the losses, and whether any process was told to stop (they must stop together).
        told = torch.tensor(float(stop.requested > 0))
        sums = engine.sums({**sums_of(losses), _TOLD: told})
        stopped = sums.pop(_TOLD) > 0
        self._check_finite("loss", sums["loss"], keys)
        gradient_norm = engine.move_weights(rate, self.optimizer_config.clip_norm)
        if not engine.has_loss_scale:  # under fp16 an overflow is met by the loss scale, not by stopping
            self._check_finite("gradient", gradient_norm, keys)
        self.averages.update(self.step)
        self.step += 1
        return sums, gradient_norm, stopped

    def _check_finite(self, what: str, value: float, keys: list[str]) -> None:
        if math.isfinite(value):
            return
        keys = self.engine.lists(keys)
        kept = self.last_checkpoint
        way_out = f"The weights of step {kept.step} are kept in {kept.path}. " if kept else ""
        raise RunError(
            f"the {what} became {value} at step {self.step + 1} of {self.run.name}, on the batch "
            f"{', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}. {way_out}"
            "A smaller optimizer.lr, a longer warm-up, optimizer.clip_norm or another precision may help."
        )

    # -- what the trainer reads ---------------------------------------------------------------------------

    def _order(self) -> SampleOrder:
        config, count = self.config, len(self.objective.samples)
        world = self.engine.num_processes
        if count < config.batch_size:
            raise RecipeError(
                f"there are {count} samples, fewer than one batch of {config.batch_size}: "
                "lower trainer.batch_size, or tile more slides."
            )
        share, rest = divmod(config.batch_size, world)
        if rest or share % (config.micro_batch_size or share):
            raise RecipeError(
                f"trainer.batch_size {config.batch_size} is not a whole number of micro-batches of "
                f"{config.micro_batch_size or share} on {world} process(es)."
            )
        self._num_micro_batches = share // (config.micro_batch_size or share)
        return SampleOrder(count, config.seed)

    def _steps(self) -> Iterator[Iterator[Mapping[str, Any]]]:
        """Yield, for each step left, where its micro-batches come from."""
        config = self.config
        plan = BatchPlan(
            self.order,
            batch_size=config.batch_size,
            micro_batch_size=config.batch_size // self.engine.num_processes // self._num_micro_batches,
            first_step=self.step,
            last_step=config.steps,
            rank=self.engine.process_index,
            world=self.engine.num_processes,
        )
        batches = iter(
            DataLoader(
                _Drawn(self.objective.samples, config.seed),
                batch_sampler=plan,
                num_workers=config.workers,
                pin_memory=self.engine.device.type == "cuda",
                # DataLoader draws a seed for its workers; from here, not from the process's own chance.
                generator=torch.Generator().manual_seed(config.seed),
            )
        )
        for _ in range(self.step, config.steps):
            yield batches

    # -- what it writes -----------------------------------------------------------------------------------

    def _metrics(self) -> "contextlib.AbstractContextManager[MetricsLog | None]":
        if not self.engine.is_main:
            return contextlib.nullcontext()
        return MetricsLog(self.run, self.step, self.config.tensorboard, self.config.wandb)

    def _figures(self) -> Figures:
        config, flops = self.config, None
        if self.flops_per_sample is not None and self.engine.is_main:
            peak = peak_of(self.engine.device, config.precision, config.matmul_precision)
            flops = ModelFlops(self.flops_per_sample, peak, self.engine.num_processes)
        return Figures(config.steps, config.checkpoint_every, self.optimizer_config.clip_norm, flops)

    def _save(self, metrics: MetricsLog | None) -> None:
        """Write a checkpoint of the step just taken, and a preview beside the run."""
        state = RunState.gather(self.engine, self.averages, self.step, self.seconds, self._data_facts())
        if self.engine.is_main:
            previous = self.last_checkpoint
            with self.engine.holding(state.averages[0]):
                figures = self._preview(metrics)

                def write(folder: Path) -> None:
                    self.objective.export(folder / "pipeline", previous.pipeline if previous else None)
                    state.write(folder / "state")

                self.last_checkpoint = write_checkpoint(
                    self.run, self.step, write, {"run": self.run.name, **figures}
                )
            prune(self.run, self.config.keep_last, self.config.keep_every)
        self.engine.wait_for_everyone()
        if not self.engine.is_main:
            self.last_checkpoint = Checkpoint.last(self.run)

    def _preview(self, metrics: MetricsLog | None) -> dict[str, float]:
        """Write a picture of the model as it is; return the figures that go with it."""
        preview = self.objective.preview()
        seen = self.step * self.config.batch_size
        title = f"{self.run.name}, step {self.step:,} of {self.config.steps:,}, {seen:,} samples seen"
        picture = save_preview(self.run, self.step, preview, title)
        figures = {f"held_out/{name}": value for name, value in preview.figures.items()}
        # Before the checkpoint: killed in between, the line is taken back and written again.
        if metrics:
            metrics.write(self.step, figures)
            metrics.write_picture(self.step, "preview", picture)
        return figures

    def _resume(self) -> None:
        checkpoint = Checkpoint.last(self.run)
        if checkpoint is None:
            return
        state = RunState.read(checkpoint)
        state.must_be_of(self._data_facts(), self.run)
        state.restore(self.engine, self.averages, str(checkpoint.state))
        self.step, self.seconds, self.last_checkpoint = state.step, state.seconds, checkpoint
        console.print(f"{self.run} goes on from step {self.step} of {self.config.steps}.", markup=False)

    def _data_facts(self) -> dict[str, Any]:
        return {"num_samples": self.order.num_samples, **self.objective.facts}


class _Drawn(Dataset[dict[str, Any]]):
    """Samples by ticket: which one, and the chance of its step and position."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __getitems__(self, tickets: Sequence[Ticket]) -> list[dict[str, Any]]:
        """Read a micro-batch; the torch loader calls this when it is there."""
        rngs = [rng_for(self.seed, step, position) for _, step, position in tickets]
        return self.samples.draw([index for index, _, _ in tickets], rngs)

    def __getitem__(self, ticket: Ticket) -> dict[str, Any]:
        return self.__getitems__([ticket])[0]


class _StopSignals:
    """Turns SIGTERM and Ctrl-C into a wish to stop after the step; the second one acts as usual."""

    requested = 0

    def __enter__(self) -> "_StopSignals":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, _frame: object) -> None:
        self.requested = number
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
