"""Classifier-free guidance, with one meaning of ``guidance_scale`` for the whole package.

    guided = unconditional + guidance_scale * (conditional - unconditional)

So 1.0 is "no guidance" and 0.0 is "ignore the condition". Code that writes
``(1 + w) * conditional - w * unconditional`` means ``guidance_scale = 1 + w``.

**Interval.** At the noisiest timesteps guidance costs variety, at the cleanest it changes nothing that can
be seen. ``interval = (low, high)`` applies it at timesteps from ``low`` to ``high`` only; elsewhere the
prediction is the conditional one, and the unconditional one is not computed.

**Negative conditions.** Something to steer away from can take the place of "no condition".

**Learned variance.** What a model predicts behind its target, in further channels, is not guided: it is that
of the conditional prediction. A variance is no direction to exaggerate, and guided it would leave its bounds.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.errors import ModelError

__all__ = ["check_guidance", "guide", "guided", "usual_guidance_scale"]


def guide(
    conditional: Float[Tensor, "batch channels height width"],
    unconditional: Float[Tensor, "batch channels height width"],
    guidance_scale: float | Float[Tensor, " batch"],
) -> Float[Tensor, "batch channels height width"]:
    """Move a prediction away from its unconditional twin.

    Works for noise, velocity, flow and denoised predictions alike: all are linear in the model output.

    Args:
        conditional: Prediction with the condition.
        unconditional: Prediction without it.
        guidance_scale: One for all, or one per sample.

    Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", eq. 6
    (https://arxiv.org/abs/2207.12598; their ``w`` is our ``guidance_scale - 1``).
    """
    if isinstance(guidance_scale, Tensor):
        guidance_scale = guidance_scale.to(conditional)[:, None, None, None]
    return unconditional + guidance_scale * (conditional - unconditional)


def guided(
    denoiser: Denoiser,
    guidance_scale: float | Float[Tensor, " batch"],
    interval: tuple[float, float] | None = None,
    negative: Conditioning | None = None,
) -> Denoiser:
    """Return a denoiser that guides ``denoiser``.

    Both predictions come from one call, unconditional samples first. Samples that guidance cannot change are
    not predicted twice: those with a scale of 1, all of them outside the interval, and where there is no
    condition.

    Args:
        denoiser: Predicts with and without a condition.
        guidance_scale: One for all, or one per sample.
        interval: Timesteps, lowest and highest, at which to guide. None: at all of them.
        negative: What to steer away from instead of "no condition": conditions of the same kinds, one sample
            for all or one each.

    Raises:
        ModelError: If scale or interval are impossible. At the call, before anything is computed: if their
            number, or that of negative conditions, is not that of the samples.

    Source: interval: Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and
    Distribution Quality in Diffusion Models" (https://arxiv.org/abs/2404.07724), there in noise levels.
    """
    check_guidance(guidance_scale, interval)
    # On the CPU, so that finding the samples to guide never waits for the device.
    scales = torch.as_tensor(guidance_scale, dtype=torch.float32).detach().cpu().reshape(-1)
    if bool((scales == 1).all()):
        return denoiser

    def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.is_empty and negative is None:
            return denoiser(latents, timestep, conditioning)
        size, channels = latents.shape[:2]
        _check_numbers(size, scales, conditioning, negative)
        scale = scales.expand(size)
        if interval is not None:
            times = timestep.detach().cpu().reshape(-1)
            scale = torch.where((times >= interval[0]) & (times <= interval[1]), scale, 1.0)
        rows = (scale != 1).nonzero().flatten()
        if not len(rows):
            return denoiser(latents, timestep, conditioning)
        without = conditioning.dropped_everywhere() if negative is None else _for_each(negative, size)
        chosen: Tensor | slice = slice(None)
        if len(rows) < size:
            chosen = rows.to(latents.device)
            without, scale = without.to(latents.device).select(chosen), scale[rows]
        if timestep.numel() > 1:
            timestep = torch.cat([timestep[chosen], timestep])
        both = Conditioning.cat([without.to(latents.device), conditioning.to(latents.device)])
        prediction = denoiser(torch.cat([latents[chosen], latents]), timestep, both)
        unconditional, conditional = prediction.split([len(rows), size])
        moved = guide(conditional[chosen, :channels], unconditional[:, :channels], _one_if_equal(scale))
        if len(rows) == size:
            return torch.cat([moved, conditional[:, channels:]], dim=1)
        result = conditional.clone()
        result[chosen, :channels] = moved
        return result

    return denoise


def check_guidance(
    guidance_scale: float | Float[Tensor, " batch"], interval: tuple[float, float] | None = None
) -> None:
    """Refuse what cannot guide.

    Raises:
        ModelError: If a scale is not finite or an interval is empty.
    """
    scales = torch.as_tensor(guidance_scale, dtype=torch.float32)
    if scales.ndim > 1 or not scales.isfinite().all():
        raise ModelError(
            f"guidance_scale is {guidance_scale}; give a number, or one per sample (1 is no guidance)."
        )
    if interval is not None and not interval[0] <= interval[1]:
        raise ModelError(
            f"a guidance interval goes from a lower to a higher timestep, such as (200, 800), not {interval}."
        )


def usual_guidance_scale(grid_size: int) -> float:
    """Return the scale that suits published models of pictures with ``grid_size`` fields along a side.

    The paper's best by FID: 2.0 for one field (256 px), 1.2 for 4 x 4 (1024 px). It tells none for 2 x 2,
    which get that of one field.

    Source: Yellapragada et al. 2025, "PixCell" (https://arxiv.org/abs/2506.05127).
    """
    return 1.2 if grid_size >= 4 else 2.0


def _check_numbers(
    size: int, scales: Tensor, conditioning: Conditioning, negative: Conditioning | None
) -> None:
    if len(scales) not in (1, size):
        raise ModelError(
            f"{len(scales)} guidance scales were given for {size} samples; give one, or one each."
        )
    if negative is None:
        return
    if conditioning.is_empty:
        raise ModelError(
            "negative conditions were given, and no conditions to steer towards. "
            "Give conditions too; the model's own tokens for no condition will do."
        )
    if negative.batch_size not in (1, size):
        raise ModelError(
            f"{negative.batch_size} negative conditions were given for {size} samples; give one, or one each."
        )


def _for_each(negative: Conditioning, size: int) -> Conditioning:
    return negative if negative.batch_size == size else negative.repeat(size)


def _one_if_equal(scale: Tensor) -> float | Tensor:
    """A scale that all samples share as a plain number: arithmetic with it rounds once less."""
    return float(scale[0]) if bool((scale == scale[0]).all()) else scale
