"""The curves of a training run, as one picture: what every log line said, over the steps."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pixcell.evaluation.pictures import PLOT_SOFTWARE
from pixcell.evaluation.plots import REAL, SYNTHETIC
from pixcell.tasks.run_history import RunHistory

__all__ = ["draw_curves"]

_GREY = "#8a8f98"
_COLUMNS = 3
_MAX_POINTS = 1500
_BY_TIME = "loss_by_time/"
_OTHER_NAMES = {"psnr_db": "PSNR (dB)", "mse": "squared error"}


def draw_curves(history: RunHistory) -> bytes:
    """Draw a PNG with a panel for each thing that was logged; nothing is drawn that was not.

    Thin lines are what the log says, thick ones a running mean over a twentieth of it. Dotted lines are steps
    at which the run went on after a stop.
    """
    # The object interface: pyplot would pick a window system and keep every figure alive.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(history)
    rows = -(-len(panels) // _COLUMNS)
    style = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(
            figsize=(13.5, 3.5 * rows), dpi=140, layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12)
        )
        FigureCanvasAgg(figure)
        places = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
        for axes, draw in zip(places, panels, strict=False):
            draw(axes, history)
            axes.set_xlim(0, 1.02 * history.step)
            axes.set_xlabel("step")
            for start in history.starts:
                if start.from_step:
                    axes.axvline(start.from_step, color=_GREY, linewidth=0.8, linestyle=":")
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": PLOT_SOFTWARE})
    return buffer.getvalue()


_Panel = Callable[[Any, RunHistory], None]


def _panels(history: RunHistory) -> list[_Panel]:
    """Those that there is something to show in, in the order in which one asks."""
    known = set(history.names())
    panels: list[_Panel] = [_loss]
    panels += [_held_out(name) for name in sorted(history.held_out)]
    if history.names(_BY_TIME):
        panels.append(_loss_by_time)
    if _parts(history):
        panels.append(_loss_parts)
    if "gradient_norm" in known:
        panels.append(_gradient)
    if "lr" in known:
        panels.append(_rate)
    if "samples_per_s" in known:
        panels.append(_speed)
    return panels


def _loss(axes: Any, history: RunHistory) -> None:
    axes.set_title("Loss", loc="left")
    steps, values = history.series("loss")
    _line(axes, steps, values, REAL)
    _cut_the_beginning(axes, [values])


def _held_out(name: str) -> _Panel:
    def draw(axes: Any, history: RunHistory) -> None:
        steps, values = history.held_out[name]
        axes.set_title(f"Held out: {_OTHER_NAMES.get(name, name)}", loc="left")
        axes.plot(steps, values, color=SYNTHETIC, marker="o", markersize=4)

    return draw


def _loss_by_time(axes: Any, history: RunHistory) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    axes.set_title("Loss by time", loc="left")
    colours = _without_yellow()
    edges: set[float] = set()
    shown: list[np.ndarray] = []
    for name in history.names(_BY_TIME):
        start, stop = map(float, name.removeprefix(_BY_TIME).split("-"))
        edges |= {start, stop}
        steps, values = history.series(name)
        smooth = _running_mean(values)
        axes.plot(*_thinned(steps, smooth), color=colours((start + stop) / 2), linewidth=1.3)
        shown.append(smooth)
    _scale(axes, np.concatenate(shown).tolist())
    _cut_the_beginning(axes, shown)
    scale = ScalarMappable(BoundaryNorm(sorted(edges), colours.N), colours)
    bar = axes.figure.colorbar(scale, ax=axes, ticks=[min(edges), max(edges)], aspect=28)
    bar.ax.set_yticklabels(["clean", "noise"])
    bar.outline.set_visible(False)


def _without_yellow() -> Any:
    """A range of colours that all show on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))


def _parts(history: RunHistory) -> list[str]:
    """Figures beside the loss that are no copy of it and none of those with a panel."""
    own = {
        "step", "loss", "lr", "seconds", "epoch", "samples_per_s", "flop_use", "seconds_left", "memory_gib",
        "gradient_norm", "gradient_norm_max", "clipped", "overflows", "dropped",
    }  # fmt: skip
    loss = dict(zip(*history.series("loss"), strict=True))
    found = []
    for name in history.names():
        if name in own or "/" in name:
            continue
        steps, values = history.series(name)
        if values and any(loss.get(step) != value for step, value in zip(steps, values, strict=True)):
            found.append(name)
    return found


def _loss_parts(axes: Any, history: RunHistory) -> None:
    from matplotlib import colormaps

    axes.set_title("Parts of the loss", loc="left")
    values: list[float] = []
    for place, name in enumerate(_parts(history)):
        steps, found = history.series(name)
        smooth = _running_mean(found)
        axes.plot(*_thinned(steps, smooth), color=colormaps["tab10"](place % 10), label=name)
        values += list(smooth)
    _scale(axes, values)
    axes.legend(frameon=False)


def _gradient(axes: Any, history: RunHistory) -> None:
    axes.set_title("Gradient norm before clipping", loc="left")
    steps, values = history.series("gradient_norm")
    if history.names("gradient_norm_max"):
        most_steps, most = history.series("gradient_norm_max")
        axes.plot(*_thinned(most_steps, most), color=_GREY, linewidth=0.8, alpha=0.7, label="largest")
        values = [*values, *most]
    _line(axes, steps, history.series("gradient_norm")[1], REAL, label="mean")
    limit = history.settings.get("optimizer.clip_norm")
    if limit is not None:
        axes.axhline(limit, color=SYNTHETIC, linewidth=1, linestyle="--", label=f"clipped to {limit:g}")
    _scale(axes, [*values, *([limit] if limit else [])])
    axes.legend(frameon=False)


def _rate(axes: Any, history: RunHistory) -> None:
    axes.set_title("Learning rate", loc="left")
    axes.plot(*_thinned(*history.series("lr")), color=REAL)
    axes.set_ylim(bottom=0)


def _speed(axes: Any, history: RunHistory) -> None:
    axes.set_title("Images per second", loc="left")
    _line(axes, *history.series("samples_per_s"), REAL)
    axes.set_ylim(bottom=0)
    steps, use = history.series("flop_use")
    if use:
        twin = axes.twinx()
        twin.plot(*_thinned(steps, [100 * each for each in use]), alpha=0)
        # The same line on another scale: speed times FLOPs of a sample over the peak.
        speed = dict(zip(*history.series("samples_per_s"), strict=True))
        factor = 100 * use[-1] / max(speed[steps[-1]], 1e-9)
        twin.set_ylim(0, axes.get_ylim()[1] * factor)
        twin.set_ylabel("% of peak (MFU)", color=_GREY)
        twin.tick_params(axis="y", colors=_GREY)


def _line(
    axes: Any, steps: Sequence[int], values: Sequence[float], colour: str, label: str | None = None
) -> None:
    """What was logged, thin; its running mean, thick."""
    if len(values) < 40:
        axes.plot(
            steps, values, color=colour, label=label, marker="o" if len(values) < 8 else None, markersize=3
        )
        return
    axes.plot(*_thinned(steps, values), color=colour, linewidth=0.7, alpha=0.4)
    axes.plot(*_thinned(steps, _running_mean(values)), color=colour, linewidth=1.8, label=label)


def _running_mean(values: Sequence[float]) -> np.ndarray:
    """Mean over a twentieth of the log, centred; narrower at the ends, so that nothing is shifted."""
    array = np.asarray(values, float)
    reach = len(array) // 40
    sums = np.concatenate([[0.0], np.cumsum(array)])
    places = np.arange(len(array))
    around = np.minimum(reach, np.minimum(places, len(array) - 1 - places))
    return (sums[places + around + 1] - sums[places - around]) / (2 * around + 1)


def _thinned(steps: Sequence[int], values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours where there are more points than a picture can show."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) <= _MAX_POINTS:
        return x, y
    borders = np.linspace(0, len(x), _MAX_POINTS + 1).astype(int)
    counts = np.diff(borders)
    return np.add.reduceat(x, borders[:-1]) / counts, np.add.reduceat(y, borders[:-1]) / counts


def _cut_the_beginning(axes: Any, curves: Sequence[Sequence[float] | np.ndarray]) -> None:
    """Let the first twentieth, where a loss falls from its start, leave the picture at its top."""
    later = np.concatenate([np.asarray(curve)[len(curve) // 20 :] for curve in curves])
    if len(later) >= 40:
        low, high = float(later.min()), float(later.max())
        axes.set_ylim(top=high + 0.05 * (high - low))


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic where the values lie far apart."""
    if values and min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
