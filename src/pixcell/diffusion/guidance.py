"""Classifier-free guidance, with one meaning of ``guidance_scale`` for the whole package.

    guided = unconditional + guidance_scale * (conditional - unconditional)

So 1.0 is "no guidance" and 0.0 is "ignore the condition". Code that writes
``(1 + w) * conditional - w * unconditional`` means ``guidance_scale = 1 + w``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning, Denoiser

__all__ = ["guide", "guided"]


def guide(
    conditional: Float[Tensor, "batch channels height width"],
    unconditional: Float[Tensor, "batch channels height width"],
    guidance_scale: float | Float[Tensor, " batch"],
) -> Float[Tensor, "batch channels height width"]:
    """Move a prediction away from its unconditional twin.

    Works for noise, velocity and denoised predictions alike: all are linear in the model output.

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


def guided(denoiser: Denoiser, guidance_scale: float | Float[Tensor, " batch"]) -> Denoiser:
    """Return a denoiser that guides ``denoiser``.

    Both predictions come from one call on a batch of twice the size, unconditional half first. Where guidance
    can change nothing, at scale 1 and without any condition, there is one call on the batch as it is.
    """
    if isinstance(guidance_scale, int | float) and guidance_scale == 1:
        return denoiser

    def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.is_empty:
            return denoiser(latents, timestep, conditioning)
        both = Conditioning.cat([conditioning.dropped_everywhere(), conditioning])
        unconditional, conditional = denoiser(torch.cat([latents, latents]), timestep, both).chunk(2)
        return guide(conditional, unconditional, guidance_scale)

    return denoise
