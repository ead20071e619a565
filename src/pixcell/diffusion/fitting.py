"""How a prior over embeddings is fitted: per label a Gaussian, or a mixture by expectation maximisation.

Grids are looked at along their leading directions (:mod:`pixcell.diffusion.directions`), in which everything
fits into memory.

Covariances are shrunk, so that few embeddings do not claim more than they know: that of a component towards
the mean covariance of all components (in its own size), and that one towards independent dimensions, each by
as much as its number of samples asks for (:func:`oas_intensity`). What this takes from the variance of a
dimension is given back as noise of that dimension.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.directions import Coefficients
from pixcell.diffusion.priors import EmbeddingPrior
from pixcell.errors import ModelError

__all__ = ["clusters", "fit_mixture", "oas_intensity", "rows_by_label"]

_FLAT = 1e-12
"""Share of the largest variance below which a direction holds nothing but rounding."""
_LOST = 1e-12
"""Share of a row in all components together below which it belongs to none."""
_MOST_ROUNDS = 200
_SETTLED = 1e-5
"""Expectation maximisation ends when the mean log density per number changes by less."""


def fit_mixture(
    found: Coefficients,
    facts: Mapping[str, Any],
    *,
    labels: Sequence[str] | None = None,
    components: int = 1,
    shrinkage: float | None = None,
    seed: int = 0,
) -> EmbeddingPrior:
    """Fit a mixture of Gaussians to grids of embeddings.

    Args:
        found: The grids, along their leading directions.
        facts: At least ``encoder``, ``field_size`` and ``mpp``; kept with the prior.
        labels: One per grid, in order; each label gets components of its own. None: without.
        components: Gaussians per label, at most: what holds fewer than two grids is left out. 1: a Gaussian.
        shrinkage: 0 trusts every covariance as measured, 1 leaves the variance of each dimension only. None:
            by the number of embeddings.
        seed: Of the clusters that a mixture starts from.

    Raises:
        ModelError: If there are too few embeddings, numbers make no sense, or a mixture does not settle.
    """
    if components < 1:
        raise ModelError(f"{components} components are no mixture; 1 is a Gaussian.")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ModelError(f"shrinkage {shrinkage} must be 0 (as measured) to 1 (variances only).")
    groups = rows_by_label(len(found.values), labels)
    for name, rows in groups.items():
        if len(rows) < 2 * components:
            whose = "" if name is None else f" of label {name!r}"
            raise ModelError(
                f"{len(rows)} embedding(s){whose} are too few for {components} component(s), which need two "
                "each. Tile more slides, ask for fewer components, or leave the label out (where)."
            )
    # In units of their spread all directions are of one size, which keeps the arithmetic exact.
    scale = found.spread.clamp(min=_FLAT * float(found.spread.max())).sqrt()
    number = len(found.values)
    rows_of = {name: found.values[rows] for name, rows in groups.items()}
    mixture, rounds = _settled(rows_of, scale, components, shrinkage, seed)
    weights, centers = mixture.weights, mixture.centers * scale
    covariances = mixture.covariances * scale[:, None] * scale
    if shrinkage is None:
        loose = oas_intensity(_correlation_trace(found), len(found.variance), number)
    else:
        loose = shrinkage
    covariances = (1 - loose) * covariances
    num_rows, num_columns, dim = found.shape
    return EmbeddingPrior(
        mean=found.mean.float(),
        basis=found.basis.float(),
        residual_std=_residual_variance(found, weights, centers, covariances).sqrt().float(),
        weights=weights.float(),
        centers=centers.float(),
        factors=_factors(covariances).float(),
        labels=mixture.labels,
        facts={
            **facts,
            "encoder": {**facts["encoder"], "dim": dim},
            "rows": num_rows,
            "columns": num_columns,
            "number": number,
            "per_label": {name: len(rows) for name, rows in groups.items() if name is not None},
            "components_per_label": components,
            "rank": len(found.basis),
            "explained": found.explained,
            "shrinkage": {
                "asked_for": shrinkage,
                "towards_independence": loose,
                "towards_common": list(mixture.intensities),
            },
            "rounds": rounds,
            "seed": seed,
        },
    )


def _residual_variance(found: Coefficients, weights: Tensor, centers: Tensor, covariances: Tensor) -> Tensor:
    """What the mixture along the directions leaves of the variance of each dimension."""
    mean = weights @ centers
    within = (weights[:, None, None] * covariances).sum(dim=0)
    between = (weights[:, None] * centers).T @ centers - mean[:, None] * mean
    return (found.variance - (found.basis * ((within + between) @ found.basis)).sum(dim=0)).clamp(min=0)


def rows_by_label(number: int, labels: Sequence[str] | None) -> dict[str | None, Tensor]:
    """Return which rows carry each label, labels sorted; without labels all rows, under None.

    Raises:
        ModelError: If there are not as many labels as rows.
    """
    if labels is None:
        return {None: torch.arange(number)}
    if len(labels) != number:
        raise ModelError(f"{number} embeddings were given with {len(labels)} labels.")
    places: dict[str, list[int]] = {name: [] for name in sorted(set(labels))}
    for place, name in enumerate(labels):
        places[name].append(place)
    return {name: torch.tensor(rows) for name, rows in places.items()}


def _correlation_trace(found: Coefficients) -> float:
    """Trace of the squared correlation matrix of all dimensions, as directions and residual tell it."""
    deviation = found.variance.sqrt()
    alive = deviation > 0
    loadings = (found.basis * found.spread.sqrt()[:, None])[:, alive] / deviation[alive]
    rest = (1 - loadings.square().sum(dim=0)).clamp(min=0)
    low = loadings @ loadings.T
    return float(low.square().sum() + 2 * (rest * loadings.square().sum(dim=0)).sum() + rest.square().sum())


def oas_intensity(trace_of_square: float, size: int, number: float) -> float:
    """Return how far a covariance whose mean variance is 1 is to be shrunk to the identity; 0 to 1.

    Args:
        trace_of_square: Of the sample covariance.
        size: Its rows; also its trace.
        number: Samples that it was estimated from.

    Source: Chen et al. 2010, "Shrinkage algorithms for MMSE covariance estimation", eq. 23
    (https://arxiv.org/abs/0907.4698).
    """
    above = (1 - 2 / size) * trace_of_square + size**2
    below = (number + 1 - 2 / size) * (trace_of_square - size)
    return 1.0 if below <= 0 else min(1.0, above / below)


# ── mixtures ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Mixture:
    """Components of all labels; weights add up to 1."""

    labels: tuple[str | None, ...]
    weights: Tensor
    centers: Tensor
    covariances: Tensor
    intensities: tuple[float, ...]


def _settled(
    values: Mapping[str | None, Tensor], scale: Tensor, components: int, shrinkage: float | None, seed: int
) -> tuple[_Mixture, int]:
    """Fit components to the rows of each label; return them, and after how many rounds.

    Labels are fitted together, since they share the covariance that theirs are shrunk to. In units of
    ``scale``; the first clusters are looked for without, where long directions count for more.
    """
    whitened = {name: rows / scale for name, rows in values.items()}
    shares = {name: _first_shares(rows, components, seed) for name, rows in values.items()}
    before = -math.inf
    for number in range(1, _MOST_ROUNDS + 1):
        mixture = _maximised(whitened, shares, shrinkage)
        if components == 1:
            return mixture, number
        log_densities = {name: _log_densities(rows, mixture, name) for name, rows in whitened.items()}
        totals = {name: torch.logsumexp(each, dim=1, keepdim=True) for name, each in log_densities.items()}
        now = float(torch.cat(list(totals.values())).mean()) / len(scale)
        if abs(now - before) < _SETTLED:
            return mixture, number
        before = now
        shares = {name: _clouds(torch.exp(each - totals[name])) for name, each in log_densities.items()}
    raise ModelError(
        f"the mixture of {components} did not settle in {_MOST_ROUNDS} rounds. Ask for fewer components, or "
        "for more shrinkage."
    )


def _first_shares(rows: Tensor, components: int, seed: int) -> Tensor:
    if components == 1:
        return torch.ones(len(rows), 1, dtype=torch.float64)
    belongs, _ = clusters(rows, components, seed)
    return _clouds(torch.nn.functional.one_hot(belongs, components).double())


def _clouds(shares: Tensor) -> Tensor:
    """Leave out components that hold fewer than two grids: no cloud can be told from them."""
    kept = shares[:, shares.sum(dim=0) >= 2]
    # Whose component was left out belongs to the others alike, until the next round says more.
    lost = kept.sum(dim=1, keepdim=True) < _LOST
    return torch.where(lost, 1 / kept.shape[1], kept / kept.sum(dim=1, keepdim=True).clamp(min=_LOST))


def _maximised(
    whitened: Mapping[str | None, Tensor], shares: Mapping[str | None, Tensor], shrinkage: float | None
) -> _Mixture:
    """The components that make the shares likeliest, shrunk."""
    labels: list[str | None] = []
    counts, centers, covariances = [], [], []
    for name, rows in whitened.items():
        for share in shares[name].T:
            count = share.sum()
            center = share @ rows / count
            apart = rows - center
            labels.append(name)
            counts.append(count)
            centers.append(center)
            covariances.append((apart * share[:, None]).T @ apart / count)
    number = torch.stack(counts)
    weights = number / number.sum()
    shrunk, intensities = _shrunk(torch.stack(covariances), weights, number, shrinkage)
    return _Mixture(tuple(labels), weights, torch.stack(centers), shrunk, intensities)


def _shrunk(
    covariances: Tensor, weights: Tensor, counts: Tensor, shrinkage: float | None
) -> tuple[Tensor, tuple[float, ...]]:
    """Move covariances towards their mean, each in its own size; return how far."""
    if len(covariances) == 1:
        return covariances, ()
    size = covariances.shape[-1]
    common = (weights[:, None, None] * covariances).sum(dim=0)
    (factor,) = _factors(common[None])
    results, intensities = [], []
    for covariance, count in zip(covariances, counts, strict=True):
        # In units of the common one, "like it" is the identity.
        half = torch.linalg.solve_triangular(factor, covariance, upper=False)
        relative = torch.linalg.solve_triangular(factor, half.T, upper=False)
        level = float(relative.trace()) / size
        if shrinkage is not None:
            intensity = shrinkage
        elif level > 0:
            intensity = oas_intensity(float(relative.square().sum()) / level**2, size, float(count))
        else:
            intensity = 1.0
        results.append((1 - intensity) * covariance + intensity * level * common)
        intensities.append(intensity)
    return torch.stack(results), tuple(intensities)


def _log_densities(whitened: Tensor, mixture: _Mixture, label: str | None) -> Tensor:
    """(number, components of the label): log of weight times density."""
    own = [place for place, name in enumerate(mixture.labels) if name == label]
    columns = []
    for place, factor in zip(own, _factors(mixture.covariances[own]), strict=True):
        apart = torch.linalg.solve_triangular(factor, (whitened - mixture.centers[place]).T, upper=False)
        log_size = factor.diagonal().log().sum()
        columns.append(mixture.weights[place].log() - log_size - 0.5 * apart.square().sum(dim=0))
    return torch.stack(columns, dim=1) - 0.5 * whitened.shape[1] * math.log(2 * math.pi)


def _factors(covariances: Tensor) -> Tensor:
    """Lower triangular factors; where a covariance is flat, it gets the least that can be factored."""
    flat = 1e-10 * covariances.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=1e-30)
    eye = torch.eye(covariances.shape[-1], dtype=covariances.dtype)
    return torch.linalg.cholesky(covariances + flat[:, None, None] * eye)


def clusters(values: Float[Tensor, "number rank"], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sort rows into ``count`` clusters by k-means; return whose each row is, and the centres.

    The first centres are drawn as k-means++ does, by the seed.

    Raises:
        ModelError: If there are fewer different rows than clusters.

    Source: Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful seeding".
    """
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(values)))]
    nearest = torch.full((len(values),), math.inf, dtype=values.dtype)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (values - values[chosen[-1]]).square().sum(dim=1))
        chances = nearest.double().numpy()
        if not chances.sum() > 0:
            raise ModelError(
                f"there are fewer than {count} different embeddings to make {count} clusters of."
            )
        chosen.append(int(rng.choice(len(values), p=chances / chances.sum())))
    centers = values[chosen]
    belongs = torch.full((len(values),), -1)
    for _ in range(_MOST_ROUNDS):
        moved = torch.cdist(values, centers).argmin(dim=1)
        if torch.equal(moved, belongs):
            break
        belongs = moved
        members = torch.nn.functional.one_hot(belongs, count).to(values.dtype)
        counts = members.sum(dim=0)
        # A centre that lost all its rows stays where it is.
        means = (members.T @ values) / counts.clamp(min=1)[:, None]
        centers = torch.where(counts[:, None] > 0, means, centers)
    return belongs, centers
