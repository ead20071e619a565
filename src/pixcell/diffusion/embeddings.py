"""Ways between embeddings: interpolation and mixtures.

    between = path(torch.stack([normal, tumour]), 9)       # (9, rows, columns, dim), for 9 pictures

Embeddings of learned encoders lie near a shell: they differ much in direction and little in length. The
straight line between two of them leads through its inside, where no tissue is. So directions turn along the
great circle, at constant speed, and lengths go their own way (``slerp``); ``lerp`` is the straight line.

Embeddings are (..., dim): a vector, a grid of fields, a batch of grids. Every vector is treated by itself;
so the field at the top left turns into the field at the top left.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pixcell.errors import ModelError

__all__ = ["lerp", "mix", "path", "slerp"]

_PARALLEL = 1e-4
"""Angle below which an arc is a line: they differ by its square, which float32 does not hold."""
_OPPOSITE = 1e-4
"""Length of the sum of two unit vectors below which no way around is the shortest."""
_MOST_STEPS = 200


def lerp(
    start: Float[Tensor, "*grid dim"], end: Float[Tensor, "..."], weight: float | Tensor
) -> Float[Tensor, "*grid dim"]:
    """Return a point of the straight line from ``start`` (weight 0) to ``end`` (1), or beyond them.

    Args:
        start: Embeddings.
        end: As many.
        weight: One, or one per vector: a tensor of the shape of ``start`` without its last dimension.

    Raises:
        ModelError: If shapes differ, or something is not finite.
    """
    dtype = start.dtype
    start, end, weight = _checked(start, end, weight)
    return (start + weight * (end - start)).to(dtype)


def slerp(
    start: Float[Tensor, "*grid dim"], end: Float[Tensor, "..."], weight: float | Tensor
) -> Float[Tensor, "*grid dim"]:
    """Return a point of the arc from ``start`` (weight 0) to ``end`` (1).

    The direction turns at constant speed; the length goes in a straight line. A zero vector has no direction:
    the way from or to it is straight.

    Args:
        start: Embeddings.
        end: As many.
        weight: 0 to 1; one, or one per vector, as in :func:`lerp`.

    Raises:
        ModelError: If shapes differ, something is not finite, the weight is outside, or two vectors point in
            opposite directions: then every way around is as long as the others.

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3.
    """
    dtype = start.dtype
    start, end, weight = _checked(start, end, weight)
    if bool((weight < 0).any()) or bool((weight > 1).any()):
        raise ModelError("the weight of an arc is 0 (start) to 1 (end); only lerp goes beyond.")
    lengths = start.norm(dim=-1, keepdim=True), end.norm(dim=-1, keepdim=True)
    straight = (lengths[0] == 0) | (lengths[1] == 0)
    units = [
        vector / torch.where(straight, 1, length)
        for vector, length in zip((start, end), lengths, strict=True)
    ]
    apart, together = (
        (units[0] - units[1]).norm(dim=-1, keepdim=True),
        (units[0] + units[1]).norm(dim=-1, keepdim=True),
    )
    if bool(((together < _OPPOSITE) & ~straight).any()):
        raise ModelError(
            "two embeddings point in opposite directions, and no way around is the shortest. Put a third one "
            "between them (path), or use lerp."
        )
    angle = 2 * torch.atan2(apart, together)
    sine = torch.where(angle < _PARALLEL, 1, torch.sin(angle))
    shares = [
        torch.where(angle < _PARALLEL, share, torch.sin(share * angle) / sine)
        for share in (1 - weight, weight)
    ]
    length = lengths[0] + weight * (lengths[1] - lengths[0])
    arc = length * (shares[0] * units[0] + shares[1] * units[1])
    return torch.where(straight, start + weight * (end - start), arc).to(dtype)


def path(
    stops: Float[Tensor, "stops *grid dim"], num: int, *, spherical: bool = True
) -> Float[Tensor, "num *grid dim"]:
    """Return ``num`` points of the way through all stops, from the first to the last, evenly spread.

    Each stretch between two stops takes the same share of the points, however far they are apart.

    Args:
        stops: At least two.
        num: At least two.
        spherical: Along arcs; else along straight lines.

    Raises:
        ModelError: If there are too few stops or points, or as in :func:`slerp`.

    Examples:
        >>> path(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 3).mul(2).square().round().tolist()
        [[4.0, 0.0], [2.0, 2.0], [0.0, 4.0]]
    """
    if len(stops) < 2 or num < 2:
        raise ModelError(
            f"a path of {num} points through {len(stops)} stop(s) is none; both must be at least 2."
        )
    places = torch.linspace(0, len(stops) - 1, num, dtype=torch.float64)
    before = places.floor().long().clamp(max=len(stops) - 2)
    weights = (places - before).to(stops.device)
    before = before.to(stops.device)
    between = slerp if spherical else lerp
    shape = (num, *stops.shape[1:-1])
    return between(
        stops[before],
        stops[before + 1],
        weights.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous(),
    )


def mix(
    embeddings: Float[Tensor, "number *grid dim"],
    weights: Float[Tensor, "..."] | None = None,
    *,
    spherical: bool = True,
) -> Float[Tensor, "*grid dim"]:
    """Return one embedding between several: their weighted mean.

    Spherical: direction and length for themselves, as in :func:`slerp`, which is the case of two. The
    direction is the point of the sphere whose squared angles to the others have the smallest weighted sum.

    Args:
        embeddings: What is mixed.
        weights: 0 or more; divided by their sum. None: equal.
        spherical: Else the plain mean, which is shorter than what it is made of.

    Raises:
        ModelError: If weights are negative or all zero, something is not finite, or directions cancel, so
            that no mean is the nearest.

    Source: Buss and Fillmore 2001, "Spherical averages and applications to spherical splines", algorithm A1.
    """
    if not len(embeddings):
        raise ModelError("there is nothing to mix.")
    values = embeddings.double()
    shares = torch.ones(len(values)) if weights is None else weights
    if shares.shape != (len(values),):
        raise ModelError(f"{len(values)} embeddings were given with {tuple(shares.shape)} weights.")
    shares = shares.to(values)
    if not (bool(values.isfinite().all()) and bool(shares.isfinite().all())):
        raise ModelError("embeddings or weights hold NaN or infinity.")
    if bool((shares < 0).any()) or not bool(shares.sum() > 0):
        raise ModelError("weights of a mixture are 0 or more, and not all 0.")
    shares = (shares / shares.sum()).reshape(-1, *[1] * (values.ndim - 1))
    if not spherical:
        return (shares * values).sum(dim=0).to(embeddings.dtype)
    lengths = values.norm(dim=-1, keepdim=True)
    units = torch.where(lengths == 0, 0, values / torch.where(lengths == 0, 1, lengths))
    pulls = torch.where(lengths == 0, 0, shares)  # a zero vector has no direction, only a length
    pulls = pulls / pulls.sum(dim=0).clamp(min=torch.finfo(pulls.dtype).tiny)
    direction = _mean_direction(units, pulls)
    return ((shares * lengths).sum(dim=0) * direction).to(embeddings.dtype)


def _mean_direction(units: Tensor, pulls: Tensor) -> Tensor:
    """Return (..., dim) unit vectors; zero where all the given vectors are zero."""
    mean = (pulls * units).sum(dim=0)
    length = mean.norm(dim=-1, keepdim=True)
    nothing = (units == 0).all(dim=-1, keepdim=True).all(dim=0)
    if bool(((length < _OPPOSITE) & ~nothing).any()):
        raise ModelError("the directions of these embeddings cancel: they have no mean. Change the weights.")
    mean = mean / torch.where(nothing, 1, length)
    for _ in range(_MOST_STEPS):
        cosine = (units * mean).sum(dim=-1, keepdim=True)
        aside = units - cosine * mean
        sine = aside.norm(dim=-1, keepdim=True)
        angle = torch.atan2(sine, cosine)
        step = (pulls * torch.where(sine > 0, angle / torch.where(sine > 0, sine, 1), 1) * aside).sum(dim=0)
        far = step.norm(dim=-1, keepdim=True)
        turned = torch.cos(far) * mean + torch.sin(far) * step / torch.where(far > 0, far, 1)
        mean = turned / torch.where(nothing, 1, turned.norm(dim=-1, keepdim=True))
        if float(far.max()) < 1e-12:
            return mean
    raise ModelError(
        "these embeddings lie too far around the sphere for a mean direction to be found. Change the "
        "weights, or mix with spherical=False."
    )


def _checked(start: Tensor, end: Tensor, weight: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if start.shape != end.shape:
        raise ModelError(
            f"embeddings of {tuple(start.shape)} and {tuple(end.shape)} have no way between them: "
            "their shapes differ."
        )
    exact = torch.promote_types(start.dtype, torch.float32)  # stores hold float16; angles need more
    start, end = start.to(exact), end.to(exact)
    weight = torch.as_tensor(weight, dtype=exact, device=start.device)
    if weight.ndim:
        if weight.shape != start.shape[:-1]:
            raise ModelError(
                f"weights of {tuple(weight.shape)} were given for vectors of {tuple(start.shape[:-1])}; "
                "give one for all, or one for each."
            )
        weight = weight[..., None]
    for values in (start, end, weight):
        if not bool(values.isfinite().all()):
            raise ModelError("embeddings or weights hold NaN or infinity.")
    return start, end, weight
