"""Any canvas from a denoiser of one size: predict in overlapping windows and blend the predictions.

    whole = windowed(guided(denoiser_of(transformer), 2.0), size=128, stride=64)
    latents = sample_latents(whole, scheduler, noise, Conditioning(grid), 20)     # noise of any size

The result is a denoiser again. At one timestep the clean latents are linear in the prediction, so blending
predictions is blending the clean latents that the windows see, as published large-image samplers do; and the
steps of schedulers are elementwise. So a canvas needs no sampler of its own.

What a window is conditioned on comes from the conditions of the canvas:

    fields_under      the embeddings of the fields that the window covers: windows start on borders of fields
    between_fields    interpolated between embeddings: windows start anywhere

Sources: Bar-Tal et al. 2023, "MultiDiffusion" (https://arxiv.org/abs/2302.08113), eq. 5, for the mean over
windows; Graikos et al. 2024 (https://arxiv.org/abs/2312.07330) for conditions between embeddings.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.conditioning import LATENTS_PER_FIELD, Conditioning, Denoiser
from pixcell.errors import ModelError
from pixcell.geometry import Box, window_starts
from pixcell.models.blending import WindowWeight, window_weight

__all__ = ["WindowConditions", "arc_between", "between_fields", "fields_under", "window_boxes", "windowed"]

WindowConditions = Callable[[Conditioning, Box, int], Conditioning]
"""From the conditions of a canvas, a window in it, and the latents along a field: the window's conditions."""

# Cosine from which on vectors are taken for parallel: where published code draws the line.
_STRAIGHT = 0.9995


def window_boxes(height: int, width: int, size: int, stride: int) -> list[Box]:
    """Return square windows that cover a canvas, row by row; the last ones end at its borders.

    Args:
        height: Of the canvas, in latents.
        width: Of the canvas, in latents.
        size: Side of a window, in latents.
        stride: Step between windows, in latents.

    Raises:
        ModelError: If a window does not fit, or the stride would leave gaps.

    Examples:
        >>> [(box.x, box.y) for box in window_boxes(8, 14, size=8, stride=4)]
        [(0, 0), (4, 0), (6, 0)]
    """
    _check_stride(size, stride)
    if min(height, width) < size:
        raise ModelError(
            f"a canvas of {height} x {width} latents is smaller than a window of {size} x {size}: "
            "make it larger, or sample it without windows."
        )
    rows, columns = (window_starts(extent, size, stride) for extent in (height, width))
    return [Box(x, y, size, size) for y in rows for x in columns]


def fields_under(conditioning: Conditioning, box: Box, latents_per_field: int) -> Conditioning:
    """Return the embeddings of the fields that a window covers, as PixCell's large images do.

    Raises:
        ModelError: If the window does not start and end on borders of fields.
    """
    sides = (box.x, box.y, box.width, box.height)
    if conditioning.embedding_grid is not None and any(side % latents_per_field for side in sides):
        raise ModelError(
            f"a window of {box.height} x {box.width} latents at ({box.x}, {box.y}) does not fall on the "
            f"embedding grid, which has one embedding per {latents_per_field} x {latents_per_field} latents. "
            f"Take size and stride as multiples of {latents_per_field}, or interpolate with between_fields."
        )
    return conditioning.window(box, latents_per_field)


def between_fields(conditioning: Conditioning, box: Box, latents_per_field: int) -> Conditioning:
    """Return embeddings interpolated between those of the fields around a window.

    Each field of the window takes the embedding at its own place: a mixture of the up to four fields that it
    overlaps, by spherical interpolation within rows and then between rows, on the embeddings as they are. A
    window on borders of fields has what :func:`fields_under` gives it.

    Source: Graikos et al. 2024 (https://arxiv.org/abs/2312.07330), for windows of one field.

    Raises:
        ModelError: If the window is no whole number of fields. Its place is free.
    """
    grid, control = conditioning.embedding_grid, conditioning.control_latents
    if grid is not None:
        if box.width % latents_per_field or box.height % latents_per_field:
            raise ModelError(
                f"a window of {box.height} x {box.width} latents is no whole number of fields of "
                f"{latents_per_field} x {latents_per_field} latents; choose its size as a multiple."
            )
        grid = _resampled(grid, 2, box.x, box.width, latents_per_field)
        grid = _resampled(grid, 1, box.y, box.height, latents_per_field)
    if control is not None:
        control = control[..., *_area(box)]
    return replace(conditioning, embedding_grid=grid, control_latents=control)


def arc_between(
    start: Float[Tensor, "*batch dim"], end: Float[Tensor, "*batch dim"], share: Float[Tensor, "..."]
) -> Float[Tensor, "*batch dim"]:
    """Return a mixture of two vectors along the arc between their directions, as large-image samplers do.

    The vectors count with their own lengths: ``(sin((1 - share) a) start + sin(share a) end) / sin(a)`` with
    ``a`` the angle between them; nearly parallel or opposite ones are mixed in a straight line. Where lengths
    differ this is not :func:`pixcell.diffusion.embeddings.slerp`, whose direction turns at constant speed.

    Args:
        start: Where ``share`` is 0.
        end: Where it is 1.
        share: Of ``end``, 0 to 1; its shape must broadcast to that of the vectors.
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=-1)[..., None]
    is_straight = cosine.abs() > _STRAIGHT
    angle = cosine.masked_fill(is_straight, 0).acos()
    arc = (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / angle.sin()
    return torch.where(is_straight, torch.lerp(start, end, share), arc)


def windowed(
    denoiser: Denoiser,
    size: int,
    stride: int,
    *,
    weight: WindowWeight | Float[Tensor, "size size"] = "hann",
    conditions: WindowConditions = fields_under,
    latents_per_field: int = LATENTS_PER_FIELD,
    windows_per_call: int = 1,
) -> Denoiser:
    """Return a denoiser of canvases of any size, made of one that knows ``size`` x ``size`` latents.

    A canvas of one window is denoised as without windows, to the last bit.

    Args:
        denoiser: Of windows. Guide it before, ``windowed(guided(...))``, so that memory is that of windows; a
            guidance scale per sample must meet all samples: ``guided(windowed(...), scales)``.
        size: Side of a window, in latents: what the model was trained on (128 for 1024 pixels).
        stride: Step between windows, in latents. Equal to ``size``: no overlap.
        weight: How windows share a place. Published large-image samplers take "uniform".
        conditions: What a window is conditioned on: :func:`fields_under` or :func:`between_fields`.
        latents_per_field: Latents along the side of the field of one embedding.
        windows_per_call: Windows that the denoiser is given at once, each with all samples of the batch.

    Raises:
        ModelError: If such windows are not possible. At the call, before the denoiser is: if the canvas is
            smaller than a window, if its conditions cover another size, or do not fit the windows.
    """
    _check_stride(size, stride)
    if windows_per_call < 1:
        raise ModelError(f"{windows_per_call} windows per call are not possible; take 1 or more.")
    weights = window_weight(weight, size, size) if isinstance(weight, str) else weight.float()
    if tuple(weights.shape) != (size, size) or not (weights.isfinite() & (weights > 0)).all():
        raise ValueError(f"a weight for windows is {size} x {size} positive numbers")

    def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        batch_size, _, height, width = latents.shape
        boxes = window_boxes(height, width, size, stride)
        _check_cover(conditioning, height, width, latents_per_field)
        parts = [conditions(conditioning, box, latents_per_field) for box in boxes]

        own = weights.to(latents.device)
        total = own.new_zeros(height, width)
        for box in boxes:
            total[_area(box)] += own
        # Made when the first answer is there: it may hold a learned variance behind the prediction.
        prediction: Tensor | None = None
        for start in range(0, len(boxes), windows_per_call):
            chosen = slice(start, start + windows_per_call)
            windows = torch.cat([latents[..., *_area(box)] for box in boxes[chosen]])
            times = timestep if timestep.numel() == 1 else timestep.repeat(len(windows) // batch_size)
            predicted = denoiser(windows, times, Conditioning.cat(parts[chosen]))
            if prediction is None:
                prediction = predicted.new_zeros(
                    batch_size, predicted.shape[1], height, width, dtype=torch.float32
                )
            for box, part in zip(boxes[chosen], predicted.split(batch_size), strict=True):
                prediction[..., *_area(box)] += part * (own / total[_area(box)])
        assert prediction is not None, "a canvas has at least one window"
        return prediction.to(latents.dtype)

    return denoise


def _area(box: Box) -> tuple[slice, slice]:
    return slice(box.y, box.bottom), slice(box.x, box.right)


def _resampled(grid: Tensor, axis: int, start: int, length: int, latents_per_field: int) -> Tensor:
    """Return the embeddings along an axis at latents ``start``, ``start + latents_per_field``, ..."""
    places = torch.arange(start, start + length, latents_per_field, device=grid.device)
    before = places // latents_per_field
    after = (before + 1).clamp(max=grid.shape[axis] - 1)  # the outermost embeddings reach to the border
    share = (places % latents_per_field / latents_per_field).to(grid.dtype)
    share = share.view([-1 if dim == axis else 1 for dim in range(grid.ndim)])
    return arc_between(grid.index_select(axis, before), grid.index_select(axis, after), share)


def _check_stride(size: int, stride: int) -> None:
    if not 0 < stride <= size:
        raise ModelError(
            f"windows of {size} latents every {stride} do not cover a canvas: the stride must be between 1 "
            "and the size of a window."
        )


def _check_cover(conditioning: Conditioning, height: int, width: int, latents_per_field: int) -> None:
    """Refuse conditions of another canvas: the part of them under a window would be the wrong one."""
    grid, control = conditioning.embedding_grid, conditioning.control_latents
    if grid is not None:
        rows, columns = (side * latents_per_field for side in grid.shape[1:3])
        if (rows, columns) != (height, width):
            raise ModelError(
                f"a grid of {grid.shape[1]} x {grid.shape[2]} embeddings covers {rows} x {columns} latents, "
                f"the canvas has {height} x {width}: give one embedding per {latents_per_field} x "
                f"{latents_per_field} latents."
            )
    if control is not None and tuple(control.shape[2:]) != (height, width):
        raise ModelError(
            f"the control covers {control.shape[2]} x {control.shape[3]} latents, the canvas has "
            f"{height} x {width}: give a control image as large as the picture."
        )
