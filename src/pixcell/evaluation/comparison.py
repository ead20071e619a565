"""How two sets of features compare: each distance with its uncertainty and with its floor.

The floor is the same measure between two halves of the real set, at the same count: what a perfect generator
would score. Beside it stands the synthetic set measured against one of these halves, also at that count; only
these two figures may be compared with each other.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pixcell.evaluation.metrics import (
    PairSimilarity,
    TooFewPictures,
    frechet_distance,
    frechet_standard_error,
    kernel_distance,
    paired_similarity,
    precision_recall,
    split_halves,
)

__all__ = ["NUM_SPLITS", "Measure", "PairFigures", "SplitUnit", "compare_pairs", "compare_sets", "split_unit"]

SplitUnit = Literal["slide", "picture", "field"]

NUM_SPLITS = 5
"""Random halvings of the real set that a floor is averaged over."""
_MIN_GROUPS = 4
_Metric = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[float, float | None]]
"""(real, synthetic, random generator) to the figure and, where it comes along for free, its scatter."""


@dataclass(frozen=True)
class Measure:
    """One figure, with what is needed to read it.

    Attributes:
        name: Key in reports: ``frechet``, ``kernel``, ``precision``, ``recall``.
        title: In words.
        better: Which direction is good.
        value: All real pictures against all synthetic ones; None where it has no meaning.
        reason: Why there is no value.
        uncertainty: Of ``value``.
        uncertainty_kind: What the uncertainty is.
        floor: Real half against real half, mean over random splits.
        floor_std: Scatter over the splits.
        matched: Real half against synthetic, at the count of the floor.
        matched_std: Its scatter over the same splits.
        matched_count: Fields on each side for ``floor`` and ``matched``.
    """

    name: str
    title: str
    better: Literal["lower", "higher"]
    value: float | None = None
    reason: str | None = None
    uncertainty: float | None = None
    uncertainty_kind: str | None = None
    floor: float | None = None
    floor_std: float | None = None
    matched: float | None = None
    matched_std: float | None = None
    matched_count: int | None = None


@dataclass(frozen=True)
class PairFigures:
    """How like its reference each synthetic picture is.

    Attributes:
        num_pairs: Pictures with a known reference.
        num_references: Different references.
        found_by: ``like`` (their record), ``file name``, or None.
        reason: Why there are no figures.
        cosine_mean: Mean cosine similarity of pairs.
        cosine_std: Its scatter over pairs.
        mismatched_mean: Mean cosine similarity to the references of other pictures.
        nearest_share: Share of pictures that are nearest to their own reference; chance is
            ``1 / num_references``.
    """

    num_pairs: int
    num_references: int
    found_by: str | None
    reason: str | None = None
    cosine_mean: float | None = None
    cosine_std: float | None = None
    mismatched_mean: float | None = None
    nearest_share: float | None = None


def split_unit(groups: Sequence[Hashable], kind: Literal["folder", "store"], is_cut: bool) -> SplitUnit:
    """Return what stays together when the real set is halved: slides where there are enough of them."""
    if len(set(groups)) < _MIN_GROUPS:
        return "field" if is_cut or kind == "store" else "picture"
    return "slide" if kind == "store" else "picture"


def compare_sets(
    real: np.ndarray,
    synthetic: np.ndarray,
    groups: Sequence[Hashable],
    seed: int,
    subset_size: int = 1000,
    num_subsets: int = 100,
) -> list[Measure]:
    """Compute every measure of two sets of features (rows, dim), with floors.

    Args:
        real: Features of real fields.
        synthetic: Features of generated fields.
        groups: What each real row must stay together with when the real set is halved.
        seed: Decides splits and subsets; the same seed gives the same figures.
        subset_size: Of the kernel distance.
        num_subsets: Of the kernel distance.
    """
    rng = np.random.default_rng(seed)

    def kernel(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> tuple[float, float | None]:
        found = kernel_distance(first, second, rng, subset_size, num_subsets)
        return found.value, found.std

    metrics: dict[str, tuple[str, Literal["lower", "higher"], _Metric]] = {
        "frechet": ("Frechet distance", "lower", lambda one, other, _: (frechet_distance(one, other), None)),
        "kernel": ("Kernel distance", "lower", kernel),
        "precision": (
            "Precision",
            "higher",
            lambda one, other, _: (precision_recall(one, other).precision, None),
        ),
        "recall": ("Recall", "higher", lambda one, other, _: (precision_recall(one, other).recall, None)),
    }
    splits = [_matched_split(groups, len(synthetic), rng) for _ in range(NUM_SPLITS)]
    return [_measured(name, *metric, real, synthetic, splits, seed) for name, metric in metrics.items()]


def compare_pairs(
    synthetic: np.ndarray, references: np.ndarray, reference_of: np.ndarray, found_by: str
) -> tuple[PairFigures, PairSimilarity]:
    """Compare generated pictures with their references; see :func:`paired_similarity` for the arguments."""
    pairs = paired_similarity(synthetic, references, reference_of)
    figures = PairFigures(
        num_pairs=len(synthetic),
        num_references=pairs.num_references,
        found_by=found_by,
        cosine_mean=float(pairs.cosine.mean()),
        cosine_std=float(pairs.cosine.std()),
        mismatched_mean=float(pairs.mismatched.mean()) if len(pairs.mismatched) else None,
        nearest_share=pairs.nearest_share if pairs.num_references > 1 else None,
    )
    return figures, pairs


def _matched_split(
    groups: Sequence[Hashable], num_synthetic: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw two halves of the real rows and a set of synthetic rows, all of one count."""
    one, other = split_halves(groups, rng)
    count = min(len(one), len(other), num_synthetic)
    drawn = [rng.choice(rows, count, replace=False) for rows in (one, other, np.arange(num_synthetic))]
    return drawn[0], drawn[1], drawn[2]


def _measured(
    name: str,
    title: str,
    better: Literal["lower", "higher"],
    metric: _Metric,
    real: np.ndarray,
    synthetic: np.ndarray,
    splits: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    seed: int,
) -> Measure:
    try:
        value, scatter = metric(real, synthetic, np.random.default_rng(seed))
    except TooFewPictures as error:
        return Measure(name, title, better, reason=f"{error}.")
    facts: dict[str, Any] = {"value": value}
    if scatter is not None:
        facts |= {"uncertainty": scatter, "uncertainty_kind": "scatter over random subsets"}
    if name == "frechet":
        facts |= _frechet_uncertainty(real, synthetic, seed)
    try:
        floors, matched = [], []
        for index, (one, other, drawn) in enumerate(splits):
            floors.append(metric(real[one], real[other], np.random.default_rng([seed, index]))[0])
            matched.append(metric(real[one], synthetic[drawn], np.random.default_rng([seed, index]))[0])
    except TooFewPictures as error:
        return Measure(name, title, better, reason=f"No floor: for halves of the real set, {error}.", **facts)
    return Measure(
        name,
        title,
        better,
        floor=float(np.mean(floors)),
        floor_std=float(np.std(floors)),
        matched=float(np.mean(matched)),
        matched_std=float(np.std(matched)),
        matched_count=len(splits[0][0]),
        **facts,
    )


def _frechet_uncertainty(real: np.ndarray, synthetic: np.ndarray, seed: int) -> dict[str, Any]:
    try:
        error = frechet_standard_error(real, synthetic, np.random.default_rng(seed))
    except TooFewPictures:
        return {"uncertainty_kind": "unknown: too few pictures to leave a tenth out"}
    return {"uncertainty": error, "uncertainty_kind": "standard error, leaving out a tenth at a time"}
