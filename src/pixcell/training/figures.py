"""What the steps of a run say of themselves: means of losses, also by time; gradients, speed, what is left.

Each process adds up its own samples (:func:`sums_of`); the sums of all processes and steps since the last log
line give the means (:class:`Window`). So a mean is over samples, however they were spread.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixcell.training.flops import Peak, flop_use
from pixcell.training.objectives import Losses

__all__ = [
    "NUM_TIME_BINS",
    "Figures",
    "ModelFlops",
    "Pace",
    "Window",
    "note_of",
    "peak_memory_gib",
    "sums_of",
]

NUM_TIME_BINS = 8
"""Equal parts of [0, 1], from clean to noise, whose losses are told apart."""

_COUNT = "samples"
_BINS = [
    f"loss_by_time/{place / NUM_TIME_BINS:.3f}-{(place + 1) / NUM_TIME_BINS:.3f}"
    for place in range(NUM_TIME_BINS)
]


def sums_of(micro_batches: Sequence[Losses]) -> dict[str, Tensor]:
    """Return what one process adds to the figures of a step: scalars, summed over its samples."""
    sums = {_COUNT: torch.tensor(float(sum(len(losses.per_sample) for losses in micro_batches)))}
    for losses in micro_batches:
        found = {name: values.sum() for name, values in {"loss": losses.per_sample, **losses.parts}.items()}
        # A part may have its place in some steps only.
        found |= {_count_of(name): torch.tensor(len(values)) for name, values in losses.parts.items()}
        if losses.times is not None:
            found |= _sums_by_time(losses.per_sample, losses.times)
        for name, total in found.items():
            sums[name] = sums.get(name, 0.0) + total.detach().float()
    return sums


def _sums_by_time(per_sample: Tensor, times: Tensor) -> dict[str, Tensor]:
    """The sum of losses and the number of samples of each bin, also of empty ones: processes must agree."""
    bins = (times.detach() * NUM_TIME_BINS).long().clamp(0, NUM_TIME_BINS - 1)
    inside = torch.nn.functional.one_hot(bins, NUM_TIME_BINS).to(per_sample.device, torch.float32)
    # Not a product: one loss that is no number would spoil the other bins.
    totals = torch.where(inside.bool(), per_sample.detach().float()[:, None], 0.0).sum(0)
    counts = inside.sum(0)
    return {
        **dict(zip(_BINS, totals, strict=True)),
        **{_count_of(name): count for name, count in zip(_BINS, counts, strict=True)},
    }


def _count_of(name: str) -> str:
    """Under which name the samples of a sum are counted, where they are not all of the step."""
    return f"{name}:{_COUNT}"


class Window:
    """Figures since the last log line. Checkpoints and previews are no training time.

    Args:
        clip_norm: Gradients longer than this are clipped. None: none are.
    """

    def __init__(self, clip_norm: float | None = None) -> None:
        self._clip_norm = clip_norm
        self.seconds = 0.0
        self.totals: dict[str, float] = {}
        self.norms: list[float] = []

    def add(self, sums: Mapping[str, float], gradient_norm: float, seconds: float) -> None:
        """Take in a step: sums over the samples of all processes, the norm before clipping, the time."""
        self.seconds += seconds
        self.norms.append(gradient_norm)
        for name, total in sums.items():
            self.totals[name] = self.totals.get(name, 0.0) + total

    def summary(self) -> dict[str, float]:
        """Return the figures of these steps.

        - ``loss`` and its parts, and ``loss_by_time/<from>-<to>`` for each part of the way from clean (0) to
          noise (1) that a sample fell into: means over samples;
        - ``gradient_norm``: mean over steps, before clipping; ``gradient_norm_max``; ``clipped``: share of
          steps whose gradient was clipped; ``overflows``: steps that fp16 left out;
        - ``samples_per_s``.
        """
        figures: dict[str, float] = {}
        for name, total in self.totals.items():
            count = self.totals.get(_count_of(name), self.totals[_COUNT])
            if name != _COUNT and not name.endswith(_count_of("")) and count > 0:
                figures[name] = total / count
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        if finite:
            figures |= {"gradient_norm": sum(finite) / len(finite), "gradient_norm_max": max(finite)}
            if self._clip_norm is not None:
                figures["clipped"] = sum(norm > self._clip_norm for norm in finite) / len(finite)
        if len(finite) < len(self.norms):
            figures["overflows"] = len(self.norms) - len(finite)
        return {**figures, "samples_per_s": self.totals[_COUNT] / max(self.seconds, 1e-9)}


class Pace:
    """How long the rest of a run takes, by the steps and checkpoints of this start.

    Args:
        steps: Of the whole run.
        checkpoint_every: Steps between checkpoints.
    """

    def __init__(self, steps: int, checkpoint_every: int) -> None:
        self._steps, self._checkpoint_every = steps, checkpoint_every
        self._per_step, self._per_checkpoint = math.nan, 0.0

    def took(self, steps: int, seconds: float) -> None:
        """Note how long some steps took. Recent ones count most: machines are shared."""
        latest = seconds / steps
        self._per_step = latest if math.isnan(self._per_step) else 0.7 * self._per_step + 0.3 * latest

    def saved(self, seconds: float) -> None:
        """Note how long a checkpoint took, its preview included."""
        self._per_checkpoint = seconds

    def seconds_left(self, step: int) -> float:
        """Return the seconds from a step to the end, checkpoints included; NaN before the first step."""
        every = self._checkpoint_every
        checkpoints = -(-self._steps // every) - step // every if step < self._steps else 0
        return (self._steps - step) * self._per_step + checkpoints * self._per_checkpoint


class Figures:
    """The log lines of one start of a run.

    Args:
        steps: Of the whole run.
        checkpoint_every: Steps between checkpoints.
        clip_norm: Gradients longer than this are clipped. None: none are.
        model_flops: What a sample costs and what the devices could do. None: not known.
    """

    def __init__(
        self,
        steps: int,
        checkpoint_every: int,
        clip_norm: float | None = None,
        model_flops: "ModelFlops | None" = None,
    ) -> None:
        self._clip_norm, self._model_flops = clip_norm, model_flops
        self._pace, self._window = Pace(steps, checkpoint_every), Window(clip_norm)

    def add(self, sums: Mapping[str, float], gradient_norm: float, seconds: float) -> None:
        """Take in a step; see :meth:`Window.add`."""
        self._window.add(sums, gradient_norm, seconds)

    def saved(self, seconds: float) -> None:
        """Note how long a checkpoint took, its preview included."""
        self._pace.saved(seconds)

    def line(self, step: int, device: torch.device) -> dict[str, float]:
        """Return the figures since the last line, and begin anew.

        To those of :meth:`Window.summary` come ``flop_use`` (MFU: the share of what the devices could do that
        went into the model, 0 to 1), ``seconds_left`` and ``memory_gib``: the most that this process held.
        """
        window, self._window = self._window, Window(self._clip_norm)
        figures = window.summary()
        self._pace.took(len(window.norms), window.seconds)
        if self._model_flops is not None:
            figures["flop_use"] = self._model_flops.use(figures["samples_per_s"])
        figures["seconds_left"] = self._pace.seconds_left(step)
        memory = peak_memory_gib(device)
        return figures if memory is None else {**figures, "memory_gib": memory}


@dataclass(frozen=True)
class ModelFlops:
    """What training takes, and what there is."""

    per_sample: float
    """FLOPs of a training step, by sample."""
    peak: Peak
    """Of one device."""
    num_devices: int = 1

    def use(self, samples_per_s: float) -> float:
        """Return the share of what the devices could do that went into the model."""
        return flop_use(self.per_sample, samples_per_s, self.peak, self.num_devices)


def note_of(figures: Mapping[str, float]) -> str:
    """Return a log line's figures as a person reads them below a progress bar.

    On a second line stand the losses by time; ``-`` where no sample was.

    Examples:
        >>> note_of({"loss": 0.5, "gradient_norm": 1.25, "lr": 1e-4, "samples_per_s": 60.0, "flop_use": 0.4})
        'loss 0.5000, gradient 1.2, lr 0.0001, 60.0 images/s, MFU 40%'
    """
    parts = [f"loss {figures['loss']:.4f}"]
    if "gradient_norm" in figures:
        parts.append(f"gradient {figures['gradient_norm']:.2g}")
    parts += [f"lr {figures['lr']:.2g}", f"{figures['samples_per_s']:.1f} images/s"]
    if "flop_use" in figures:
        parts.append(f"MFU {100 * figures['flop_use']:.3g}%")
    note = ", ".join(parts)
    if any(name in figures for name in _BINS):
        by_time = (f"{figures[name]:.2g}" if name in figures else "-" for name in _BINS)
        note += f"\nloss from clean to noise: {' '.join(by_time)}"
    return note


def peak_memory_gib(device: torch.device) -> float | None:
    """Return the most memory that this process held so far, in GiB; None where the system does not tell.

    Of a GPU: what tensors took on it. Else: what of the process lay in main memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)
