"""From features to numbers: how far two sets of pictures are from each other.

A set is an array (pictures, dim), one feature vector per picture; everything is computed in float64. A
distance between real and synthetic pictures means little alone: report it beside the distance between two
halves of the real ones (:func:`split_halves`), at the same count, since the Frechet distance falls with it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from pixcell.errors import EvaluationError

__all__ = [
    "Coverage",
    "KernelDistance",
    "PairSimilarity",
    "TooFewPictures",
    "frechet_distance",
    "frechet_standard_error",
    "kernel_distance",
    "paired_similarity",
    "precision_recall",
    "split_halves",
]

_ROWS_AT_ONCE = 2048
"""Rows of a distance matrix in memory at a time: 2048 x 50,000 float64 is 0.8 GB."""


class TooFewPictures(EvaluationError):
    """A metric has no meaning for so few pictures; the message says how many it takes."""


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancy: the mean over random subsets, and how far subsets scatter."""

    value: float
    std: float
    subset_size: int
    num_subsets: int


@dataclass(frozen=True)
class Coverage:
    """Precision: synthetic pictures that lie among the real. Recall: real ones among the synthetic."""

    precision: float
    recall: float
    neighbours: int


@dataclass(frozen=True)
class PairSimilarity:
    """How like its own reference each synthetic picture is, against how like everybody else's.

    Attributes:
        cosine: Cosine similarity of each pair.
        mismatched: Mean cosine similarity of each synthetic picture to the references of the others.
        nearest_share: Share of synthetic pictures for which no other reference is nearer than their own;
            chance is one in the number of references.
        num_references: Different references among the pairs.
    """

    cosine: Float[np.ndarray, " pairs"]
    mismatched: Float[np.ndarray, " pairs_or_none"]
    nearest_share: float
    num_references: int


def frechet_distance(first: Float[np.ndarray, "n dim"], second: Float[np.ndarray, "m dim"]) -> float:
    """Return the Frechet distance of two Gaussians fitted to the sets.

        |mean_1 - mean_2|^2 + tr(cov_1 + cov_2 - 2 (cov_1^(1/2) cov_2 cov_1^(1/2))^(1/2))

    The trace of the root is the sum of the singular values of ``a_1 a_2^T`` for any ``a`` with
    ``a^T a = cov``; here the triangle of a QR decomposition of the centred features. So no covariance is
    squared up and no root taken, and nothing turns complex or negative where features hardly vary.

    It is biased: the fewer the pictures, the larger. Compare only values of equal counts.

    Raises:
        TooFewPictures: If a set has no more pictures than dimensions, so that its covariance is singular.

    Source: Heusel et al. 2017, eq. 6 (https://arxiv.org/abs/1706.08500); Dowson & Landau 1982.
    """
    first, second = _checked(first, second)
    dim = first.shape[1]
    if min(len(first), len(second)) <= dim:
        raise TooFewPictures(
            f"the Frechet distance in {dim} dimensions needs at least {dim + 1} pictures on each side "
            f"(ten times as many to be steady), and there are {len(first)} and {len(second)}. "
            "The kernel distance is unbiased at any count: use that, or add pictures"
        )
    mean_difference = first.mean(0) - second.mean(0)
    factor_1, factor_2 = _covariance_factor(first), _covariance_factor(second)
    trace_of_root = np.linalg.svd(factor_1 @ factor_2.T, compute_uv=False).sum()
    distance = (
        mean_difference @ mean_difference + (factor_1**2).sum() + (factor_2**2).sum() - 2 * trace_of_root
    )
    return max(float(distance), 0.0)  # a set against itself ends some rounding below zero


def frechet_standard_error(
    first: Float[np.ndarray, "n dim"],
    second: Float[np.ndarray, "m dim"],
    rng: np.random.Generator,
    num_groups: int = 10,
) -> float:
    """Return the standard error of the Frechet distance, by leaving out one tenth of both sets at a time.

    A bootstrap is no help here: drawing with replacement repeats pictures, which raises the distance itself.

    Raises:
        TooFewPictures: If a set minus a tenth is too small for its covariance.

    Source: the delete-a-group jackknife (Kott 2001, J. Official Statistics 17(4)).
    """
    first, second = _checked(first, second)
    groups = [rng.permutation(np.arange(len(features)) % num_groups) for features in (first, second)]
    estimates = np.array(
        [
            frechet_distance(first[groups[0] != group], second[groups[1] != group])
            for group in range(num_groups)
        ]
    )
    return float(np.sqrt((num_groups - 1) / num_groups * np.sum((estimates - estimates.mean()) ** 2)))


def kernel_distance(
    first: Float[np.ndarray, "n dim"],
    second: Float[np.ndarray, "m dim"],
    rng: np.random.Generator | np.random.RandomState,
    subset_size: int = 1000,
    num_subsets: int = 100,
) -> KernelDistance:
    """Return the squared MMD with the kernel ``(x . y / dim + 1)^3``, unbiased, averaged over subsets.

    Unbiased at any count; so it can fall a little below zero where the sets are alike.

    Args:
        first: Features of one set.
        second: Features of the other.
        rng: Draws the subsets.
        subset_size: Pictures of each set in a subset; at most half of the smaller set is used, so that
            subsets differ and their scatter says something.
        num_subsets: How many are averaged.

    Raises:
        TooFewPictures: If a set has fewer than two pictures.

    Source: Binkowski et al. 2018, section 3 and appendix A (https://arxiv.org/abs/1801.01401).
    """
    first, second = _checked(first, second)
    smaller = min(len(first), len(second))
    if smaller < 2:
        raise TooFewPictures(
            f"the kernel distance needs at least 2 pictures on each side, and there are {len(first)} and "
            f"{len(second)}"
        )
    size = max(2, min(subset_size, smaller // 2))
    values = np.array(
        [
            _squared_mmd(
                first[rng.choice(len(first), size, replace=False)],
                second[rng.choice(len(second), size, replace=False)],
            )
            for _ in range(num_subsets)
        ]
    )
    return KernelDistance(float(values.mean()), float(values.std()), size, num_subsets)


def precision_recall(
    real: Float[np.ndarray, "n dim"], synthetic: Float[np.ndarray, "m dim"], neighbours: int = 3
) -> Coverage:
    """Return how many synthetic pictures look real, and how much of the real variety is covered.

    A picture lies among a set if it is inside the ball of any member; a member's ball reaches to its third
    nearest neighbour within its own set.

    Raises:
        TooFewPictures: If a set has no more pictures than ``neighbours``.

    Source: Kynkaanniemi et al. 2019, eqs. 1 to 3 (https://arxiv.org/abs/1904.06991).
    """
    real, synthetic = _checked(real, synthetic)
    if min(len(real), len(synthetic)) <= neighbours:
        raise TooFewPictures(
            f"precision and recall look at {neighbours} neighbours and need at least {neighbours + 1} "
            f"pictures on each side; there are {len(real)} and {len(synthetic)}"
        )
    return Coverage(
        precision=_share_inside(synthetic, real, _radii(real, neighbours)),
        recall=_share_inside(real, synthetic, _radii(synthetic, neighbours)),
        neighbours=neighbours,
    )


def paired_similarity(
    synthetic: Float[np.ndarray, "pairs dim"],
    references: Float[np.ndarray, "references dim"],
    reference_of: Int[np.ndarray, " pairs"],
) -> PairSimilarity:
    """Return the cosine similarity of each synthetic picture to its reference and to the others'.

    Args:
        synthetic: Features of the generated pictures.
        references: Features of the real pictures they were made after, each once.
        reference_of: Row of ``references`` for each synthetic picture.

    With a single reference there is nobody to be compared with: ``mismatched`` is empty, and
    ``nearest_share`` is 1.
    """
    synthetic, references = _checked(synthetic, references)
    units, num_references = _unit(references), len(references)
    own, mismatched, num_nearest = np.empty(len(synthetic)), np.empty(len(synthetic)), 0
    for start in range(0, len(synthetic), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        cosines = _unit(synthetic[rows]) @ units.T
        own[rows] = np.take_along_axis(cosines, reference_of[rows, None], axis=1)[:, 0]
        mismatched[rows] = (cosines.sum(1) - own[rows]) / max(num_references - 1, 1)
        # References may repeat; a tie with its own is a hit.
        num_nearest += int((cosines.max(1) <= own[rows] + 1e-12).sum())
    if num_references < 2:
        mismatched = np.empty(0)
    return PairSimilarity(own, mismatched, num_nearest / len(synthetic), num_references)


def split_halves(
    groups: Sequence[Hashable], rng: np.random.Generator
) -> tuple[Int[np.ndarray, " half"], Int[np.ndarray, " other"]]:
    """Split rows at random into two halves that differ by one group at most; none stands on both.

    Args:
        groups: What each row must stay together with: its slide, or its picture.
        rng: Draws the order in which groups are dealt out.

    Examples:
        >>> one, other = split_halves(["a", "a", "b", "b"], np.random.default_rng(0))
        >>> sorted([one.tolist(), other.tolist()])
        [[0, 1], [2, 3]]
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    dealt: tuple[list[int], list[int]] = ([], [])
    names = list(members)
    # In random order, each to the smaller side. Dealt by size, groups of unlike sizes would fall into the
    # same halves every time, and a scatter over splits would mean nothing.
    for index in rng.permutation(len(names)):
        min(dealt, key=len).extend(members[names[index]])
    return np.array(sorted(dealt[0]), dtype=np.int64), np.array(sorted(dealt[1]), dtype=np.int64)


def _checked(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features are (pictures, dim) of one dim, not {first.shape} and {second.shape}")
    for features in (first, second):
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise EvaluationError(
                f"{len(broken)} of {len(features)} feature vectors hold NaN or infinity (the first is number "
                f"{broken[0]}); no distance can be computed from them"
            )
    return first.astype(np.float64), second.astype(np.float64)


def _covariance_factor(features: np.ndarray) -> np.ndarray:
    """Return a triangle ``a`` with ``a^T a`` the covariance of the features."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def _squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within_1, within_2 = kernel(first, first), kernel(second, second)
    n, m = len(first), len(second)
    # Without the diagonals: a picture compared with itself is what biases the plain estimate.
    return float(
        (within_1.sum() - np.trace(within_1)) / (n * (n - 1))
        + (within_2.sum() - np.trace(within_2)) / (m * (m - 1))
        - 2 * kernel(first, second).mean()
    )


def _distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    squared = (rows**2).sum(1)[:, None] + (others**2).sum(1)[None] - 2 * rows @ others.T
    return np.sqrt(np.clip(squared, 0, None))


def _radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    radii = [
        # The nearest of all is the picture itself, so the k-th neighbour stands at place k.
        np.partition(_distances(features[start : start + _ROWS_AT_ONCE], features), neighbours, axis=1)[
            :, neighbours
        ]
        for start in range(0, len(features), _ROWS_AT_ONCE)
    ]
    return np.concatenate(radii)


def _share_inside(pictures: np.ndarray, members: np.ndarray, radii: np.ndarray) -> float:
    inside = [
        (_distances(pictures[start : start + _ROWS_AT_ONCE], members) <= radii).any(1)
        for start in range(0, len(pictures), _ROWS_AT_ONCE)
    ]
    return float(np.concatenate(inside).mean())


def _unit(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if not norms.all():
        raise EvaluationError("a feature vector is all zero; it has no direction and no cosine similarity")
    return features / norms
