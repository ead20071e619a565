"""The one training loop.

A step: its micro-batches forward and backward, clip, move the weights, move the average. Everything random
about a step is a function of (seed, step, position) (see :mod:`pixcell.training.determinism`), so the state
of a run is the weights, the averages, the optimiser's moments and the number of the step, and nothing else: a
run that was killed goes on as if nothing had happened. On one CPU process the weights are equal bit for bit;
GPUs and several processes add up in another order and agree within rounding.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pixcell.console import console, progress
from pixcell.errors import RecipeError, RunError, listed
from pixcell.files import writing_to
from pixcell.training.averages import AveragedWeights
from pixcell.training.checkpoints import Checkpoint, prune, remove_unfinished, write_checkpoint
from pixcell.training.determinism import BatchPlan, Order
from pixcell.training.dropped import Dropped, DroppedLog
from pixcell.training.engine import Engine
from pixcell.training.figures import Figures, ModelFlops, note_of, sums_of
from pixcell.training.flops import matmul_precision, peak_of
from pixcell.training.loading import MicroBatch, dead_loaders_are_errors, load_batches
from pixcell.training.metrics import MetricsLog
from pixcell.training.objectives import Losses, Objective, order_of
from pixcell.training.optimizers import OptimizerConfig, learning_rate, make_optimizer
from pixcell.training.previews import save_preview
from pixcell.training.run_state import RunState
from pixcell.training.stop_rules import FiniteRule, SpikeRule, StopRequests
from pixcell.training.trainer_config import TrainerConfig

__all__ = ["Outcome", "Trainer"]

_TOLD, _MISSING = "told to stop", "could not be read"


@dataclass(frozen=True)
class Outcome:
    """How a call of :meth:`Trainer.fit` ended."""

    step: int
    checkpoint: Checkpoint
    stopped_by: str | None
    """The signal that ended it early, or ``trainer.max_hours``; None: the run is complete."""
    loss: float | None
    """Mean over the last logged steps; None if no step was left to take."""
    seconds: float
    """Spent on training in all, over every resume."""
    samples_per_s: float | None
    num_steps: int
    """Steps of the whole run."""
    num_dropped: int
    """Samples that the run went without so far, because their tile could not be read."""


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
        self.num_steps = config.num_steps(self.order.num_samples)
        self.averages = AveragedWeights(objective.trainable, config.ema_decays, config.ema_warmup)
        self.step, self.seconds = 0, 0.0
        self.last_checkpoint: Checkpoint | None = None
        self._dropped: DroppedLog | None = None

    def fit(self, resume: bool = True, started: float | None = None) -> Outcome:
        """Train to the last step, from the last checkpoint if there is one.

        SIGTERM, SIGUSR1 (which clusters send before a time limit), the first Ctrl-C and
        ``trainer.max_hours`` finish the step, save, and return.

        Args:
            resume: Go on from the last checkpoint.
            started: When the clock of ``trainer.max_hours`` began (``time.monotonic()``). None: now.

        Raises:
            RunError: If the loss is not a finite number or ran away, the checkpoint is damaged or of other
                data, or another process is gone.
            OutputError: If the disk is full; the last checkpoint stays usable.
        """
        stop = StopRequests(self.config.max_hours, time.monotonic() if started is None else started)
        if self.engine.is_main:
            with writing_to(self.run):
                self.run.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.run)
        if resume:
            self._resume()
        if self.engine.is_main:
            self._dropped = DroppedLog(self.run, self.step)
        if self.engine.num_processes > 1:
            console.print(f"Training on {self.engine}.", markup=False)
        with (
            dead_loaders_are_errors(self.config.workers),
            matmul_precision(self.config.matmul_precision),
            stop,
            self._metrics() as metrics,
            progress(f"train {self.label}", self.num_steps, self.step) as advance,
        ):
            return self._fit(stop, metrics, advance)

    def _fit(self, stop: StopRequests, metrics: "MetricsLog | None", advance: Callable[..., None]) -> Outcome:
        config = self.config
        figures = self._figures()
        loss = samples_per_s = note = None
        self._finite = FiniteRule(self.run.name, self.engine.has_loss_scale)
        self._spike = SpikeRule(config.spike, self.run.name)
        stopped = False
        for batches in self._steps():
            rate = learning_rate(self.optimizer_config, self.step, self.num_steps)
            started = time.monotonic()
            sums, gradient_norm, stopped = self._take_step(batches, rate, stop)
            seconds = time.monotonic() - started
            figures.add(sums, gradient_norm, seconds)
            stop.took(seconds)
            self.seconds += seconds
            if self.step % config.log_every == 0 or self.step == self.num_steps or stopped:
                line = figures.line(self.step, self.engine.device)
                line |= {"lr": rate, "seconds": self.seconds}
                line["epoch"] = self.step * config.batch_size / self.order.num_samples
                if self._dropped is not None and config.on_bad_tile == "drop":
                    line["dropped"] = self._dropped.count
                loss, samples_per_s, note = line["loss"], line["samples_per_s"], note_of(line)
                if metrics:
                    metrics.write(self.step, line)
            advance(1, note=note)
            if self.step % config.checkpoint_every == 0 or self.step == self.num_steps or stopped:
                started = time.monotonic()
                self._save(metrics)
                figures.saved(time.monotonic() - started)
                stop.took(0.0, time.monotonic() - started)
            if stopped:
                break
        assert self.last_checkpoint is not None
        # Processes stop together, whichever was told to.
        reasons = self.engine.lists([stop.reason]) if stopped else []
        reason = next((one for one in reasons if one is not None), None)
        return Outcome(
            self.step,
            self.last_checkpoint,
            reason if self.step < self.num_steps else None,
            loss,
            self.seconds,
            samples_per_s,
            self.num_steps,
            self._dropped.count if self._dropped else 0,
        )

    def _take_step(
        self, batches: Iterator[MicroBatch], rate: float, stop: StopRequests
    ) -> tuple[dict[str, float], float, bool]:
        """One optimiser step; return its figures' sums, the gradient's norm, and whether to stop."""
        engine, count = self.engine, self._num_micro_batches
        share = engine.num_processes / self.config.batch_size
        losses: list[Losses] = []
        keys: list[str] = []
        dropped: list[Dropped] = []
        for place in range(count):
            micro = next(batches)
            keys += micro.keys
            dropped += micro.dropped
            samples = {**micro.samples, "step": self.step}
            losses.append(engine.forward_backward(samples, share, place == count - 1, micro.readable))
        # One exchange a step: the losses, whether any process was told to stop (they must stop together), and
        # how many samples are missing.
        told, missing = torch.tensor(float(stop.reason is not None)), torch.tensor(float(len(dropped)))
        sums = engine.sums({**sums_of(losses), _TOLD: told, _MISSING: missing})
        stopped = sums.pop(_TOLD) > 0
        if sums.pop(_MISSING) > 0:
            self._note_dropped(dropped)

        def batch() -> list[tuple[str, float]]:
            found = torch.cat([one.per_sample for one in losses]).tolist()
            return engine.lists(list(zip(keys, found, strict=True)))

        mean, kept = sums["loss"] / sums["samples"], self.last_checkpoint
        way_out = f"The weights of step {kept.step} are kept in {kept.path}. " if kept else ""
        self._finite.check_loss(mean, self.step + 1, batch, way_out)
        self._spike.check(mean, self.step + 1, batch)
        gradient_norm = engine.move_weights(rate, self.optimizer_config.clip_norm)
        self._finite.check_gradient(gradient_norm, self.step + 1, batch, way_out)
        self.averages.update(self.step)
        self.step += 1
        return sums, gradient_norm, stopped

    def _note_dropped(self, dropped: list[Dropped]) -> None:
        """List the samples that the step goes without. Every process calls it."""
        dropped = self.engine.lists(dropped)
        if self._dropped is not None:
            if self._dropped.count == 0:
                console.print(f"dropped {dropped[0]} All are listed in {self._dropped.path}.", markup=False)
            self._dropped.write(dropped)
        if len(dropped) == self.config.batch_size:
            raise RunError(
                f"no sample of step {self.step + 1} of {self.run.name} can be read: {dropped[0]} "
                "Is the disk or the network gone? See what can be read: pixcell inspect STORE --verify."
            )

    # -- what the trainer reads ---------------------------------------------------------------------------

    def _order(self) -> Order:
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
        return order_of(self.objective.samples, config.seed)

    def _steps(self) -> Iterator[Iterator[MicroBatch]]:
        """Yield, for each step left, where its micro-batches come from."""
        config = self.config
        plan = BatchPlan(
            self.order,
            batch_size=config.batch_size,
            micro_batch_size=config.batch_size // self.engine.num_processes // self._num_micro_batches,
            first_step=self.step,
            last_step=self.num_steps,
            rank=self.engine.process_index,
            world=self.engine.num_processes,
        )
        batches = load_batches(
            self.objective.samples,
            plan,
            seed=config.seed,
            workers=config.workers,
            pin_memory=self.engine.device.type == "cuda",
            on_bad_tile=config.on_bad_tile,
        )
        for _ in range(self.step, self.num_steps):
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
        return Figures(self.num_steps, config.checkpoint_every, self.optimizer_config.clip_norm, flops)

    def _save(self, metrics: MetricsLog | None) -> None:
        """Write a checkpoint of the step just taken, and a preview beside the run."""
        state = RunState.gather(self.engine, self.averages, self.step, self.seconds, self._data_facts())
        self.engine.in_main(lambda: self._write(state, metrics))
        if not self.engine.is_main:
            self.last_checkpoint = Checkpoint.last(self.run)

    def _write(self, state: RunState, metrics: MetricsLog | None) -> None:
        previous = self.last_checkpoint
        with self.engine.holding({**state.weights, **state.averages[0]}):
            figures = self._preview(metrics)

            def write(folder: Path) -> None:
                self.objective.export(folder / "pipeline", previous.pipeline if previous else None)
                state.write(folder / "state")

            self.last_checkpoint = write_checkpoint(
                self.run, self.step, write, {"run": self.run.name, **figures}
            )
        prune(self.run, self.config.keep_last, self.config.keep_every)

    def _preview(self, metrics: MetricsLog | None) -> dict[str, float]:
        """Write a picture of the model as it is; return the figures that go with it."""
        preview = self.objective.preview()
        seen = self.step * self.config.batch_size
        title = f"{self.run.name}, step {self.step:,} of {self.num_steps:,}, {seen:,} samples seen"
        picture = save_preview(self.run, self.step, preview, title)
        figures = {f"held_out/{name}": value for name, value in preview.figures.items()}
        # Before the checkpoint: killed in between, the line is taken back and written again.
        if metrics:
            metrics.write(self.step, figures)
            metrics.write_picture(self.step, "preview", picture)
        return figures

    def _resume(self) -> None:
        checkpoint = Checkpoint.last(self.run)
        seen = self.engine.lists([checkpoint.step if checkpoint else 0])
        if len(set(seen)) > 1:
            raise RunError(
                f"the processes see different checkpoints in {self.run} (of steps {listed(seen)}): the run "
                "folder must be on a file system that all machines share."
            )
        if checkpoint is None:
            return
        self.engine.in_main(checkpoint.verify)
        state = RunState.read(checkpoint)
        state.must_be_of(self._data_facts(), self.run)
        state.restore(self.engine, self.averages, str(checkpoint.state))
        self.step, self.seconds, self.last_checkpoint = state.step, state.seconds, checkpoint
        goes_on = f"goes on from step {self.step} of" if self.step < self.num_steps else "is complete:"
        console.print(f"{self.run} {goes_on} {self.num_steps} steps.", markup=False)

    def _data_facts(self) -> dict[str, Any]:
        return {"num_samples": self.order.num_samples, **self.order.facts, **self.objective.facts}
