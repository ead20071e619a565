"""What a training will take, before anything starts: parameters, memory, steps, time and disk.

Nothing is written. Counted are parameters, FLOPs, and what stays in memory from step to step; activations
are estimated on tensors without content; time is measured on a few steps of the real model and data, where
both are here. A plan for many GPUs can therefore be made on a laptop.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers.models.modeling_utils import ModelMixin
from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from pixcell.console import facts, table
from pixcell.errors import MissingWeights, RecipeError
from pixcell.training.flops import Peak, count_flops, flop_use, peak_of, published_peak
from pixcell.training.memory import StateBytes, activation_bytes, bytes_of, hollow, state_bytes
from pixcell.training.outline import Outline, outline_of
from pixcell.training.probe import Probe, probe
from pixcell.training.recipe import TrainRecipe, build_objective

__all__ = ["Plan", "plan"]

_USUAL_USE = 0.4
"""Share of a GPU's peak that a well fed transformer of this size comes to, about."""
_SHORTEST_STEP_S = 0.1
"""Below that a GPU waits for the processor more than it computes."""
_GPUS = ("A100", "H100")
_LONGEST_PROBE_S = 60.0
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """What a recipe will take."""

    name: str
    num_processes: int
    parameters: Mapping[str, int]
    """Trained ones, by part of the model."""
    memory: Mapping[str, Mapping[str, int]]
    """Bytes per device, by engine and part."""
    micro_batch_size: int
    batch_size: int
    num_samples: int | None
    num_steps: int | None
    """Of the whole run; None where it follows from the number of samples and that is not known."""
    flops_per_sample: int
    probe: Probe | None
    peak: Peak | None
    """Of the device that was probed."""
    not_probed: str | None
    """Why there is no probe."""
    checkpoint_bytes: int
    """Of one checkpoint, without the frozen autoencoder."""
    num_checkpoints: int | None
    """That stay on disk at the end."""
    codec_bytes: int
    """On disk once: checkpoints share it."""
    assumed: str | None

    @property
    def seconds_per_step(self) -> float | None:
        """By the probe, if every process is as fast as this one and they lose no time on each other."""
        return (
            None if self.probe is None else self.probe.seconds_per_step(self.batch_size // self.num_processes)
        )

    @property
    def seconds(self) -> float | None:
        """Of all steps, without checkpoints and previews."""
        if self.seconds_per_step is None or self.num_steps is None:
            return None
        return self.seconds_per_step * self.num_steps

    @property
    def disk_bytes(self) -> int | None:
        """Of the run at its end, without previews and logs."""
        if self.num_checkpoints is None:
            return None
        return self.num_checkpoints * self.checkpoint_bytes + self.codec_bytes

    def __rich__(self) -> Group:
        """Lay the plan out for a terminal."""
        shown: list[RenderableType] = [
            facts(f"Plan of {self.name}", self._run()),
            table("Parameters (trained)", ("part", "number"), _with_sum(self.parameters, _count)),
            *(table(f"Memory per device, {name}", ("part", "bytes"), _with_sum(parts, _size))
              for name, parts in self.memory.items()),
            facts("Time", self._time()),
            facts("Disk", self._disk()),
        ]  # fmt: skip
        if self.assumed:
            shown.insert(0, Text(f"Assumed: {self.assumed}.", style="yellow"))
        return Group(*shown)

    def _run(self) -> dict[str, object]:
        share = self.batch_size // self.num_processes
        batch = f"{self.batch_size} over {self.num_processes} process(es)"
        if share != self.micro_batch_size:
            batch += f", in {share // self.micro_batch_size} micro-batches of {self.micro_batch_size}"
        steps = "epochs of an unknown number of samples" if self.num_steps is None else f"{self.num_steps:,}"
        known: dict[str, object] = {"batch": batch, "steps": steps}
        if self.num_samples is not None:
            known["samples"] = f"{self.num_samples:,} (held-out ones left out)"
            known["steps an epoch"] = f"{self.num_samples / self.batch_size:,.1f}"
            if self.num_steps is not None:
                known["epochs"] = f"{self.num_steps * self.batch_size / self.num_samples:.2f}"
        known["FLOPs"] = f"{self.flops_per_sample / 1e9:,.2f} GFLOP a sample, forward and backward"
        if self.num_steps is not None:
            known["FLOPs"] = f"{known['FLOPs']}; {self._flops_of_all():.3g} in all"
        return known

    def _flops_of_all(self) -> float:
        return float(self.flops_per_sample) * self.batch_size * (self.num_steps or 0)

    def _time(self) -> dict[str, object]:
        if self.probe is None or self.peak is None or self.seconds_per_step is None:
            return {"not probed": self.not_probed, **self._time_elsewhere()}
        found, size = self.probe, self.probe.micro_batch_size
        rate = self.batch_size / self.seconds_per_step / self.num_processes
        known: dict[str, object] = {
            "probed": f"{found.num_steps} steps of {size} sample(s) here: {found.computing_s:.3g} s forward "
            f"and backward, {found.waiting_s:.2g} s waiting for data, {found.moving_s:.2g} s optimiser and "
            "averages",
            "a step": f"{self.seconds_per_step:.3g} s, {rate:.3g} samples/s a process",
            "FLOP use": f"{flop_use(self.flops_per_sample, rate, self.peak):.0%} of {self.peak}",
        }
        if found.peak_bytes is not None:
            known["memory measured"] = f"{_size(found.peak_bytes)} at most, of tensors, in one process"
        if self.seconds is not None:
            known["in all"] = f"{_duration(self.seconds)}, without checkpoints and previews"
        if self.num_processes > 1:
            known["assumed"] = (
                f"{self.num_processes} processes as fast as this one, no time lost between them"
            )
        return known

    def _time_elsewhere(self) -> dict[str, object]:
        """By FLOPs alone, for GPUs that most people know."""
        if self.num_steps is None:
            return {}
        lines: dict[str, object] = {}
        for gpu in _GPUS:
            peak = published_peak(gpu, "bf16") or math.inf
            seconds = self._flops_of_all() / (peak * _USUAL_USE * self.num_processes)
            if seconds / self.num_steps > _SHORTEST_STEP_S:
                name = f"{self.num_processes} x {gpu}, bf16"
                lines[name] = f"about {_duration(seconds)}, at {_USUAL_USE:.0%} of the published peak"
        return lines or {"on a GPU": "steps too short for the peak to say how long they take"}

    def _disk(self) -> dict[str, object]:
        known: dict[str, object] = {"a checkpoint": _size(self.checkpoint_bytes)}
        if self.codec_bytes:
            known["autoencoder"] = f"{_size(self.codec_bytes)}, shared by all checkpoints"
        if self.disk_bytes is not None:
            known["in all"] = f"{_size(self.disk_bytes)} for the {self.num_checkpoints} checkpoint(s) kept"
            known["while writing"] = f"{_size(self.checkpoint_bytes)} more"
        return known


def plan(recipe: TrainRecipe, processes: int = 1, with_probe: bool = True) -> Plan:
    """Work out what a recipe will take.

    Args:
        recipe: The whole run.
        processes: Devices that train together; one process each.
        with_probe: Whether to time a few steps here. It takes about half a minute.

    Raises:
        RecipeError: If sizes do not fit each other, or the number of processes.
        StoreError: If a store is there and something is wrong with it, or sizes are known from nowhere.
        ModelError: If there is no such model.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("--plan runs in one process: start it without a launcher, with --processes N.")
    config, outline = recipe.trainer, outline_of(recipe)
    micro = _micro_batch_size(recipe, processes)
    if outline.num_samples is not None and outline.num_samples < config.batch_size:
        raise RecipeError(
            f"there are {outline.num_samples} samples, fewer than one batch of {config.batch_size}: "
            "lower trainer.batch_size, or tile more slides."
        )
    with torch.device("meta"):
        model = outline.make_model()
    kept = state_bytes(model, recipe.optimizer, len(config.ema_decays))
    flops, activations = _of_a_micro_batch(recipe, outline, micro)
    num_steps = None
    if config.steps is not None or outline.num_samples is not None:
        num_steps = config.num_steps(outline.num_samples or 0)
    found, peak, why = _probed(recipe, outline, micro, flops) if with_probe else (None, None, "--no-probe")
    return Plan(
        name=recipe.name,
        num_processes=processes,
        parameters=_by_part(model),
        memory=_memory(model, kept, activations, outline.codec_bytes, micro, processes),
        micro_batch_size=micro,
        batch_size=config.batch_size,
        num_samples=outline.num_samples,
        num_steps=num_steps,
        flops_per_sample=flops,
        probe=found,
        peak=peak,
        not_probed=why,
        checkpoint_bytes=2 * kept.weights + kept.averages + kept.moments,
        num_checkpoints=None if num_steps is None else _num_kept(recipe, num_steps),
        codec_bytes=outline.codec_bytes,
        assumed=outline.assumed,
    )


def _micro_batch_size(recipe: TrainRecipe, processes: int) -> int:
    config = recipe.trainer
    share, rest = divmod(config.batch_size, processes)
    micro = config.micro_batch_size or share
    if not share or rest or share % micro:
        raise RecipeError(
            f"trainer.batch_size {config.batch_size} is not a whole number of micro-batches of "
            f"{micro or 'at least one sample'} on {processes} process(es)."
        )
    return micro


def _of_a_micro_batch(recipe: TrainRecipe, outline: Outline, micro: int) -> tuple[int, int]:
    """FLOPs of a sample, and bytes of activations of a micro-batch."""
    with hollow():
        model = outline.make_model()
        flops = count_flops(model, lambda: outline.loss(model, 1))
        if recipe.trainer.gradient_checkpointing:
            for module in model.modules():
                if isinstance(module, ModelMixin) and module._supports_gradient_checkpointing:
                    module.enable_gradient_checkpointing()
        autocast = _AUTOCAST[recipe.trainer.precision]
        return flops, activation_bytes(model, lambda: outline.loss(model, micro), autocast)


def _memory(
    model: nn.Module, kept: StateBytes, activations: int, codec: int, micro: int, processes: int
) -> dict[str, dict[str, int]]:
    states = {
        "weights": kept.weights,
        "gradients": kept.gradients,
        "moments of the optimiser": kept.moments,
        "running averages": kept.averages,
    }
    here = {f"activations of {micro} sample(s), estimated": activations}
    if codec:
        here["frozen autoencoder"] = codec
    if processes == 1:
        return {"one process": {**states, **here}}
    blocks = sorted(bytes_of(block.parameters()) for part in _lists_in(model) for block in part)
    spread = {f"{name}, 1/{processes}": -(-size // processes) for name, size in states.items()}
    return {
        "DDP": {**states, **here},
        "FSDP2": {**spread, "two blocks, gathered": 2 * blocks[-1] if blocks else kept.weights, **here},
    }


def _by_part(model: nn.Module) -> dict[str, int]:
    """Trained parameters of each part, blocks of a list together."""
    parts: dict[str, int] = {}
    for name, module in [("", model)] if not isinstance(model, nn.ModuleDict) else list(model.items()):
        prefix = f"{name}." if name else ""
        for child, inner in module.named_children():
            count = sum(weight.numel() for weight in inner.parameters() if weight.requires_grad)
            many = (
                f" ({len(inner)} of {_count(count // len(inner))})"
                if isinstance(inner, nn.ModuleList)
                else ""
            )
            if count:
                parts[f"{prefix}{child}{many}"] = count
        own = sum(weight.numel() for weight in module.parameters(recurse=False) if weight.requires_grad)
        if own:
            parts[f"{prefix}tables of its own"] = own
    return parts


def _lists_in(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]


def _num_kept(recipe: TrainRecipe, num_steps: int) -> int:
    """Checkpoints on disk at the end: the last ones, and those that are kept for good."""
    config = recipe.trainer
    written = {*range(config.checkpoint_every, num_steps + 1, config.checkpoint_every), num_steps}
    last = set(sorted(written)[-config.keep_last :])
    return len(last | {step for step in written if config.keep_every and step % config.keep_every == 0})


def _probed(
    recipe: TrainRecipe, outline: Outline, micro: int, flops: int
) -> tuple[Probe | None, Peak | None, str | None]:
    """Time a few steps; or say why not."""
    if outline.num_samples is None:
        return None, None, "there are no data here to probe with"
    config = recipe.trainer
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    peak = peak_of(torch.device("cuda" if on_gpu else "cpu"), config.precision, config.matmul_precision)
    one = flops / peak.flops_per_s
    if one > _LONGEST_PROBE_S:
        return None, None, f"a single sample would take {_duration(one)} here, or longer"
    size = max(1, min(micro, int(_LONGEST_PROBE_S / one)))
    # What a model starts from does not make it slower.
    changes = {"init": None, "redraw_unconditional": False} if recipe.model.name == "transformer" else {}
    scratch = recipe.with_changes(model={**recipe.model.model_dump(), **changes})
    try:
        objective = build_objective(scratch)
    except MissingWeights as error:
        return None, None, f"the training could not start here: {error}"
    return probe(objective, recipe.optimizer, config.with_changes(micro_batch_size=size)), peak, None


def _with_sum(parts: Mapping[str, int], written: Callable[[int], str]) -> list[tuple[str, str]]:
    rows = [(name, written(number)) for name, number in parts.items()]
    return [*rows, ("in all", written(sum(parts.values())))]


def _count(number: int) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 10_000 else f"{number:,}"


def _size(number: int) -> str:
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"
