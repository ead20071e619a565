"""The one training loop.

A step: its micro-batches forward and backward, clip, move the weights, move the average. Everything random
about a step is a function of (seed, step, position) (see :mod:`pixcell.training.determinism`), so the state
of a run is the weights, the averages, the optimiser's moments and the number of the step, and nothing else: a
run that was killed goes on as if nothing had happened. On one CPU process the weights are equal bit for bit;
GPUs and several processes add up in another order and agree within rounding.
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, send_to_device
from diffusers.models.modeling_utils import ModelMixin
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pixcell.config import Config
from pixcell.console import console, progress
from pixcell.errors import RecipeError, RunError
from pixcell.files import write_json, writing_to
from pixcell.models.weights import fit_weights
from pixcell.provenance import save_synthetic_png
from pixcell.training.checkpoints import Checkpoint, prune, remove_unfinished, write_checkpoint
from pixcell.training.determinism import BatchPlan, SampleOrder, Ticket, rng_for
from pixcell.training.metrics import MetricsLog
from pixcell.training.objectives import Objective, Samples
from pixcell.training.optimizers import AveragedWeights, OptimizerConfig, learning_rate, make_optimizer

__all__ = ["Outcome", "Trainer", "TrainerConfig"]


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
    workers: int = Field(0, ge=0)
    """Loader processes; 0 prepares samples between steps. Does not change the run."""
    device: Literal["auto", "cpu"] = "auto"
    """``auto``: the accelerator that the launcher assigns, else the CPU."""
    seed: int = Field(0, ge=0, lt=2**63)


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
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: OptimizerConfig,
        config: TrainerConfig,
        run: Path,
        label: str = "",
    ) -> None:
        self.objective, self.optimizer_config, self.config, self.run = objective, optimizer, config, run
        self.label = label or run.name
        # The state is shared by all Accelerators of a process and refuses another precision; one program may
        # train an autoencoder in bf16 and then a denoiser in fp32.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=config.device == "cpu",
            mixed_precision="no" if config.precision == "fp32" else config.precision,
        )
        self.order = self._order()
        if config.gradient_checkpointing:
            _enable_gradient_checkpointing(objective.trainable)
        objective.trainable.train()
        objective.trainable.to(self.accelerator.device)
        objective.move_to(self.accelerator.device)
        self.averages = AveragedWeights(objective.trainable, config.ema_decay)
        self.model, self.optimizer = self.accelerator.prepare(
            _LossOf(objective), make_optimizer(objective.trainable, optimizer)
        )
        self.step, self.seconds = 0, 0.0
        self.last_checkpoint: Checkpoint | None = None

    def fit(self, resume: bool = True) -> Outcome:
        """Train to the last step, from the last checkpoint if there is one.

        SIGTERM (a cluster's time limit) and the first Ctrl-C finish the step, save, and return.

        Raises:
            RunError: If the loss is not a finite number, or the checkpoint is damaged or of other data.
            OutputError: If the disk is full; the last checkpoint stays usable.
        """
        if self.accelerator.is_main_process:
            with writing_to(self.run):
                self.run.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.run)
        if resume:
            self._resume()
        with (
            _matmul_precision(self.config.matmul_precision),
            _StopSignals() as stop,
            self._metrics() as metrics,
            progress(f"train {self.label}", self.config.steps - self.step) as advance,
        ):
            return self._fit(stop, metrics, advance)

    def _fit(
        self, stop: "_StopSignals", metrics: "MetricsLog | None", advance: Callable[..., None]
    ) -> Outcome:
        config = self.config
        window = _Window()
        loss = samples_per_s = note = None
        stopped = False
        for batches in self._steps():
            rate = learning_rate(self.optimizer_config, self.step, config.steps)
            started = time.monotonic()
            parts, gradient_norm, stopped = self._take_step(batches, rate, stop)
            window.add(parts, config.batch_size, time.monotonic() - started)
            self.seconds += time.monotonic() - started
            if self.step % config.log_every == 0 or self.step == config.steps:
                figures = window.summary()
                loss, samples_per_s = figures["loss"], figures["samples_per_s"]
                figures |= {"lr": rate, "gradient_norm": gradient_norm, "seconds": self.seconds}
                figures["epoch"] = self.step * config.batch_size / self.order.num_samples
                if metrics:
                    metrics.write(self.step, figures)
                window = _Window()
                speed = f"{samples_per_s:.1f} images/s"
                note = f"loss {loss:.4f}, lr {rate:.2g}, gradient {gradient_norm:.2g}, {speed}"
            advance(1, note=note)
            if self.step % config.checkpoint_every == 0 or self.step == config.steps or stopped:
                self._save(metrics)
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
        """One optimiser step; return the mean of each loss part, the gradient's norm, and whether to stop."""
        accelerator = self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        count = self._num_micro_batches
        totals: dict[str, Tensor] = {}
        keys: list[str] = []
        for place in range(count):
            batch = send_to_device(next(batches), accelerator.device)
            keys += batch["key"]
            last = place == count - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                parts = self.model(batch)
                accelerator.backward(parts["loss"] / count)
            for name, part in parts.items():
                totals[name] = totals.get(name, 0.0) + part.detach().float() / count
        # One exchange a step: the losses, and whether any process was told to stop (they must stop together).
        told = torch.tensor(float(stop.requested > 0), device=accelerator.device)
        *values, stopped = accelerator.reduce(torch.stack([*totals.values(), told]), "mean").tolist()
        means = dict(zip(totals, values, strict=True))
        self._check_finite("loss", means["loss"], keys)
        clip = self.optimizer_config.clip_norm
        norm = accelerator.clip_grad_norm_(self.objective.trainable.parameters(), clip or math.inf)
        gradient_norm = float(norm)
        if accelerator.scaler is None:  # under fp16 an overflow is met by the loss scale, not by stopping
            self._check_finite("gradient", gradient_norm, keys)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averages.update(self.step)
        self.step += 1
        return means, gradient_norm, stopped > 0

    def _check_finite(self, what: str, value: float, keys: list[str]) -> None:
        if math.isfinite(value):
            return
        keys = gather_object(keys)
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
        world = self.accelerator.num_processes
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
            micro_batch_size=config.batch_size // self.accelerator.num_processes // self._num_micro_batches,
            first_step=self.step,
            last_step=config.steps,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        batches = iter(
            DataLoader(
                _Drawn(self.objective.samples, config.seed),
                batch_sampler=plan,
                num_workers=config.workers,
                pin_memory=self.accelerator.device.type == "cuda",
                # DataLoader draws a seed for its workers; from here, not from the process's own chance.
                generator=torch.Generator().manual_seed(config.seed),
            )
        )
        for _ in range(self.step, config.steps):
            yield batches

    # -- what it writes -----------------------------------------------------------------------------------

    def _metrics(self) -> "contextlib.AbstractContextManager[MetricsLog | None]":
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        return MetricsLog(self.run, self.step, self.config.tensorboard)

    def _save(self, metrics: MetricsLog | None) -> None:
        """Write a checkpoint of the step just taken, and a preview beside the run."""
        if self.accelerator.is_main_process:
            previous = self.last_checkpoint
            with self.averages.in_place():
                self.objective.trainable.eval()
                preview = self.objective.preview()
                path = self.run / "previews" / f"step-{self.step:08d}.png"
                record = {
                    "preview_of": self.run.name,
                    "step": self.step,
                    "note": "rows of real tissue are captioned so",
                }
                save_synthetic_png(path, preview.picture, record)
                figures = {f"held_out/{name}": value for name, value in preview.figures.items()}
                # Before the checkpoint: killed in between, the line is taken back and written again.
                if metrics:
                    metrics.write(self.step, figures)
                    metrics.write_picture(self.step, "preview", preview.picture)
                self.last_checkpoint = write_checkpoint(
                    self.run,
                    self.step,
                    lambda folder: self._write(folder, previous.pipeline if previous else None),
                    {"run": self.run.name, **figures},
                )
                self.objective.trainable.train()
            prune(self.run, self.config.keep_last)
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            self.last_checkpoint = Checkpoint.last(self.run)

    def _write(self, folder: Path, previous: Path | None) -> None:
        """Fill a checkpoint folder. Called with the averages in place."""
        self.objective.export(folder / "pipeline", previous)
        state = folder / "state"
        state.mkdir()
        save_file(self.averages.averages, state / "averages.safetensors")
        weights = {**self.objective.trainable.state_dict(), **self.averages.displaced}
        save_file(
            {name: value.contiguous() for name, value in weights.items()}, state / "weights.safetensors"
        )
        scaler = self.accelerator.scaler
        torch.save(
            {
                "optimizer": self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
            state / "optimizer.pt",
        )
        write_json(
            state / "progress.json",
            {"step": self.step, "seconds": self.seconds, "data": self._data_facts()},
        )

    def _resume(self) -> None:
        checkpoint = Checkpoint.last(self.run)
        if checkpoint is None:
            return
        checkpoint.verify()
        kept = json.loads((checkpoint.state / "progress.json").read_text(encoding="utf-8"))
        differences = _differences(kept["data"], json.loads(json.dumps(self._data_facts())))
        if differences:
            raise RunError(
                f"{self.run} cannot go on: its data are not those it began with ({'; '.join(differences)}). "
                "Choose another folder with --run to train on the new data."
            )
        fit_weights(
            self.objective.trainable,
            load_file(checkpoint.state / "weights.safetensors"),
            str(checkpoint.state),
        )
        self.averages.load(load_file(checkpoint.state / "averages.safetensors"))
        state = torch.load(checkpoint.state / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.last_checkpoint = kept["step"], kept["seconds"], checkpoint
        console.print(f"{self.run} goes on from step {self.step} of {self.config.steps}.", markup=False)

    def _data_facts(self) -> dict[str, Any]:
        return {"num_samples": self.order.num_samples, **self.objective.facts}


def _enable_gradient_checkpointing(model: nn.Module) -> None:
    if not isinstance(model, ModelMixin) or not model._supports_gradient_checkpointing:
        raise RecipeError(
            f"trainer.gradient_checkpointing is not possible for {type(model).__name__}: set it to false."
        )
    model.enable_gradient_checkpointing()


class _LossOf(nn.Module):
    """The loss as a module's forward: the form in which launchers wrap a model."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.trainable = objective.trainable
        self._loss = objective.loss

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._loss(batch)


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


class _Window:
    """Figures since the last log line. Checkpoints and previews are no training time."""

    def __init__(self) -> None:
        self.steps, self.samples, self.seconds = 0, 0, 0.0
        self.totals: dict[str, float] = {}

    def add(self, parts: Mapping[str, float], samples: int, seconds: float) -> None:
        self.steps += 1
        self.samples += samples
        self.seconds += seconds
        for name, part in parts.items():
            self.totals[name] = self.totals.get(name, 0.0) + part

    def summary(self) -> dict[str, float]:
        means = {name: total / self.steps for name, total in self.totals.items()}
        return {**means, "samples_per_s": self.samples / max(self.seconds, 1e-9)}


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


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say which values differ between two nested mappings."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r} and is {new!r}")
    return found
