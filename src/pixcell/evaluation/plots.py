"""The picture of a report: where the two sets lie, how far apart they are, and how pairs look."""

import io
from collections.abc import Mapping, Sequence

import numpy as np

from pixcell.evaluation.comparison import Measure
from pixcell.evaluation.metrics import PairSimilarity
from pixcell.evaluation.pictures import PLOT_SOFTWARE
from pixcell.evaluation.report import Report

__all__ = ["REAL", "SYNTHETIC", "draw_course", "draw_plot"]

REAL = "#4a6fa5"
SYNTHETIC = "#c2417c"
_GREY = "#8a8f98"
_STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
_MAX_POINTS = 3000


def draw_plot(
    real: np.ndarray,
    synthetic: np.ndarray,
    measures: Sequence[Measure],
    pairs: PairSimilarity | None,
    extractor: str,
    seed: int = 0,
) -> bytes:
    """Draw a PNG: features in a plane, distances beside their floors, and the likeness of pairs.

    Args:
        real: Features (rows, dim).
        synthetic: Features (rows, dim).
        measures: Figures of the report.
        pairs: Similarities, or None.
        extractor: Name of the space.
        seed: Chooses the points that are drawn where there are too many.
    """
    # The object interface: pyplot would pick a window system and keep every figure alive.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(_STYLE):
        figure = Figure(figsize=(13.5, 4.3), dpi=140, layout=ConstrainedLayoutEngine(w_pad=0.14))
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 4, width_ratios=[1.2, 0.5, 0.5, 1])
        _draw_plane(axes[0], real, synthetic, extractor, seed)
        distances = [measure for measure in measures if measure.better == "lower"]
        for place, measure in zip(axes[1:3], distances, strict=True):
            _draw_distance(place, measure)
        _draw_pairs(axes[3], pairs, measures)
        buffer = io.BytesIO()
        # No clock time and no version inside: the same figures give the same bytes. The name keeps the plot
        # from being taken for a sample where a report is written into the folder of the samples.
        figure.savefig(buffer, format="png", metadata={"Software": PLOT_SOFTWARE})
    return buffer.getvalue()


def draw_course(reports: Mapping[int, Report]) -> bytes:
    """Draw a PNG: the figures of a run's checkpoints over their steps, each beside its floor.

    Args:
        reports: By step; all in the same feature space.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    steps = sorted(reports)
    extractor = reports[steps[0]].extractor["name"]
    with rc_context(_STYLE):
        figure = Figure(figsize=(13.5, 3.6), dpi=140, layout=ConstrainedLayoutEngine(w_pad=0.14))
        FigureCanvasAgg(figure)
        for axes, name in zip(
            figure.subplots(1, 4), ("frechet", "kernel", "precision", "recall"), strict=True
        ):
            measures = [reports[step].measure(name) for step in steps]
            _draw_line(axes, steps, measures)
        if figure.axes[0].get_legend_handles_labels()[0]:
            figure.axes[0].legend(frameon=False, loc="upper right")
        figure.suptitle(f"in the space of {extractor}, both sides at equal count", fontsize=10, color=_GREY)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": PLOT_SOFTWARE})
    return buffer.getvalue()


def _draw_line(axes, steps: Sequence[int], measures: Sequence[Measure]) -> None:  # type: ignore[no-untyped-def]
    axes.set_title(measures[0].title, loc="left")
    known = [
        (step, each)
        for step, each in zip(steps, measures, strict=True)
        if each.matched is not None and each.floor is not None
    ]
    if not known:
        _say(axes, "too few pictures")
        return
    places = [step for step, _ in known]
    for values, scatter, colour, label in (
        (
            [e.matched for _, e in known],
            [e.matched_std or 0 for _, e in known],
            SYNTHETIC,
            "real / synthetic",
        ),
        ([e.floor for _, e in known], [e.floor_std or 0 for _, e in known], _GREY, "real / real"),
    ):
        axes.errorbar(places, values, scatter, color=colour, marker="o", markersize=4, capsize=3, label=label)
    axes.set_xlabel(f"step ({known[-1][1].matched_count} a side)")
    axes.set_ylim(bottom=min(0, *axes.get_ylim()))


def _draw_plane(axes, real, synthetic, extractor, seed) -> None:  # type: ignore[no-untyped-def]
    """The two directions in which the real set varies most; the synthetic set is projected onto them."""
    rng = np.random.default_rng(seed)
    centre = real.mean(0)
    _, spread, directions = np.linalg.svd((_some(real, rng) - centre).astype(np.float64), full_matrices=False)
    plane = directions[:2].T
    if plane.shape[1] < 2:  # two pictures span a line
        plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    share = spread[:2] ** 2 / max((spread**2).sum(), 1e-30)
    for features, colour, marker, label in (
        (real, REAL, "o", f"real ({len(real)})"),
        (synthetic, SYNTHETIC, "^", f"synthetic ({len(synthetic)})"),
    ):
        points = (_some(features, rng) - centre) @ plane
        size = float(np.clip(3000 / len(points), 5, 34))
        axes.scatter(
            *points.T, s=size, c=colour, marker=marker, alpha=0.6, linewidths=0, label=label, rasterized=True
        )
    axes.set_title(f"Features in the space of {extractor}", loc="left")
    axes.set_xlabel(f"first direction of the real set ({share[0]:.0%} of its variance)")
    axes.set_ylabel(f"second ({share[1]:.0%})" if len(share) > 1 else "")
    axes.set_xticks([])
    axes.set_yticks([])
    legend = axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2)
    for handle in legend.legend_handles:
        handle.set_sizes([36])
        handle.set_alpha(1)


def _draw_distance(axes, measure: Measure) -> None:  # type: ignore[no-untyped-def]
    """A distance beside its floor, at the count of the floor; whiskers are the scatter over random splits."""
    axes.set_title(measure.title, loc="left")
    if measure.floor is None or measure.matched is None:
        _say(axes, "too few pictures")
        return
    values = [measure.floor, measure.matched]
    scatter = [measure.floor_std or 0, measure.matched_std or 0]
    bars = axes.bar(
        [0, 1], values, 0.62, color=[_GREY, SYNTHETIC], yerr=scatter, capsize=4, error_kw={"linewidth": 1}
    )
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks([0, 1], ["real /\nreal", "real /\nsynthetic"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel(f"{measure.matched_count} a side")
    axes.margins(y=0.16)
    axes.set_yticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _draw_pairs(axes, pairs: PairSimilarity | None, measures: Sequence[Measure]) -> None:  # type: ignore[no-untyped-def]
    """How like their references the pictures are; without pairs, precision and recall."""
    if pairs is None:
        _draw_coverage(axes, measures)
        return
    axes.set_title("Similarity to the reference", loc="left")
    everything = np.concatenate([pairs.cosine, pairs.mismatched])
    margin = 0.02 + 0.05 * float(np.ptp(everything))
    bins = np.linspace(everything.min() - margin, min(everything.max() + margin, 1.02), 26)
    if len(pairs.mismatched):
        axes.hist(pairs.mismatched, bins, color=_GREY, alpha=0.75, label="references of others (mean)")
        axes.axvline(pairs.mismatched.mean(), color=_GREY, linestyle="--", linewidth=1)
    axes.hist(pairs.cosine, bins, color=SYNTHETIC, alpha=0.7, label="its own reference")
    axes.axvline(pairs.cosine.mean(), color=SYNTHETIC, linestyle="--", linewidth=1)
    axes.set_xlabel("cosine similarity of features")
    axes.set_ylabel("synthetic pictures")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_coverage(axes, measures: Sequence[Measure]) -> None:  # type: ignore[no-untyped-def]
    axes.set_title("Precision and recall", loc="left")
    shown = [each for each in measures if each.better == "higher" and each.value is not None]
    if not shown:
        _say(axes, "No pairs, and too few pictures\nfor precision and recall.")
        return
    places = np.arange(len(shown))
    width = 0.36 if shown[0].floor is not None else 0.5
    if shown[0].floor is not None:
        floors = axes.bar(
            places - 0.19, [each.floor for each in shown], width, color=_GREY, label="real / real"
        )
        axes.bar_label(floors, fmt="%.2f", padding=3)
    values = [each.value if each.matched is None else each.matched for each in shown]
    offset = 0.19 if shown[0].floor is not None else 0.0
    axes.bar_label(
        axes.bar(places + offset, values, width, color=SYNTHETIC, label="real / synthetic"),
        fmt="%.2f",
        padding=3,
    )
    axes.set_xticks(places, [each.title for each in shown])
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.5, 1])
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def _say(axes, text: str) -> None:  # type: ignore[no-untyped-def]
    axes.text(0.5, 0.5, text, ha="center", va="center", color=_GREY, transform=axes.transAxes)
    axes.set_axis_off()


def _some(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if len(features) <= _MAX_POINTS:
        return features
    return features[rng.choice(len(features), _MAX_POINTS, replace=False)]
