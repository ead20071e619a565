"""The training loss: what a model predicts, and a learned variance between its two bounds.

    loss = mean((target - prediction)^2) + bound

The target is the noise, as published, or the velocity, or the flow on a straight line from latents to noise
(:data:`Target`). At the noisiest steps an error in the noise is one in the clean latents 150 times as large;
an error in the velocity or the flow stays as it is, which models that are trained briefly need.

``bound`` is the variational bound of one step in bits per dimension. It sees a detached prediction, so
it trains the variance channels only. Both are plain means over a sample, without weights. The flow has no
such bound: its line leaves no variance to learn.

Everything here is float32 (tables float64) whatever the autocast: squared differences of half-precision
numbers lose what the last steps of training are about.

Source: Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", eq. 3-5, 14, 15
(https://arxiv.org/abs/2102.09672); velocity: Salimans & Ho 2022 (https://arxiv.org/abs/2202.00512), app. D;
flow: Lipman et al. 2022 (https://arxiv.org/abs/2210.02747); min-SNR: Hang et al. 2023
(https://arxiv.org/abs/2303.09556), eq. 4 and section 3.3.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pixcell.diffusion.noise_schedules import FlowSchedule, NoiseSchedule, Target

__all__ = ["FlowSchedule", "LossTerms", "NoiseSchedule", "Target", "denoising_loss"]


@dataclass(frozen=True)
class LossTerms:
    """The loss of each sample, and its parts. Float32, shape (batch,)."""

    loss: Float[Tensor, " batch"]
    mse: Float[Tensor, " batch"]
    """Unweighted squared error of the target; where ``clean_below`` says so, of the clean latents."""
    bound: Float[Tensor, " batch"] | None
    """Variational bound in bits per dimension; None without learned variance."""


def denoising_loss(
    prediction: Float[Tensor, "batch out_channels height width"],
    latents: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    timesteps: Int[Tensor, " batch"],
    schedule: NoiseSchedule | FlowSchedule,
    min_snr_gamma: float | None = None,
    target: Target = "noise",
    clean_below: int | None = None,
) -> LossTerms:
    """Compare a model's output at ``schedule.add_noise(latents, noise, timesteps)`` with the truth.

    Args:
        prediction: The model's output: the target, and variance logits behind it if they are learned.
        latents: Clean ones, normalised.
        noise: What was added.
        timesteps: Of ``schedule.timesteps``.
        schedule: The one the noise was added by; for the flow a :class:`FlowSchedule`.
        min_snr_gamma: Weigh the squared error so that every target's counts as ``min(snr, gamma)`` times that
            of the clean latents, and nearly clean steps do not dominate (5 in the paper). None: no weights.
        target: What the model predicts.
        clean_below: At timesteps below this one count the error of the clean latents that follow from the
            prediction, instead of the target's own. The reference has it as an option (``snr_loss``), at 250,
            and leaves it off. It all but silences these timesteps.

    Raises:
        ValueError: If the prediction has neither once nor twice the channels of the latents, or target and
            schedule do not fit, or both weightings are asked for.
    """
    channels = latents.shape[1]
    _check(prediction.shape[1], channels, schedule, target)
    if clean_below is not None and min_snr_gamma is not None:
        raise ValueError("min_snr_gamma and clean_below are two ways of weighing errors; give one of them")
    with torch.autocast(latents.device.type, enabled=False):
        latents, noise, prediction = latents.float(), noise.float(), prediction.float()
        predicted, logits = prediction[:, :channels], prediction[:, channels:]
        truth = _truth(latents, noise, timesteps, schedule, target)
        mse = (truth - predicted).square().flatten(1).mean(1)
        weight = torch.ones_like(mse)
        snr = schedule.snr_at(timesteps)
        if min_snr_gamma is not None:
            weight = snr.clamp(max=min_snr_gamma) * _error_in_clean(snr, target)
        if clean_below is not None:
            mse = torch.where(timesteps < clean_below, _error_in_clean(snr, target) * mse, mse)
        if not logits.shape[1]:
            return LossTerms(weight * mse, mse, None)
        assert isinstance(schedule, NoiseSchedule)  # _check has seen to it
        noisy = schedule.add_noise(latents, noise, timesteps)
        as_noise = predicted if target == "noise" else schedule.noise_in(noisy, predicted, timesteps)
        bound = _bound(as_noise.detach(), logits, latents, noisy, timesteps, schedule)
        return LossTerms(weight * mse + bound, mse, bound)


def _check(out_channels: int, channels: int, schedule: NoiseSchedule | FlowSchedule, target: Target) -> None:
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{out_channels} output channels fit {channels} latent channels neither once nor twice"
        )
    if (target == "flow") != isinstance(schedule, FlowSchedule):
        raise ValueError(f"target {target!r} does not go with a {type(schedule).__name__}; see schedule_for")
    if target == "flow" and out_channels != channels:
        raise ValueError("the flow has no variance to learn: give the model as many channels as the latents")


def _truth(
    latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule | FlowSchedule, target: Target
) -> Tensor:
    if isinstance(schedule, FlowSchedule):
        return schedule.velocity(latents, noise)
    return noise if target == "noise" else schedule.velocity(latents, noise, timesteps)


def _error_in_clean(snr: Float[Tensor, " batch"], target: Target) -> Float[Tensor, " batch"]:
    """How large a squared error of the target is in the clean latents that follow from it."""
    if target == "velocity":
        return 1 / (snr + 1)  # latents = sqrt(alpha_bar) noisy - sqrt(1 - alpha_bar) velocity
    if target == "flow":
        return 1 / (snr.sqrt() + 1).square()  # latents = noisy - sigma flow
    return 1 / snr  # latents = (noisy - sqrt(1 - alpha_bar) noise) / sqrt(alpha_bar)


def _bound(
    noise_prediction: Tensor,
    logits: Tensor,
    latents: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
) -> Tensor:
    """Bits per dimension: KL from the step's posterior to the model's; at t = 0 likelihood of the data."""
    alpha_bar = schedule.alpha_bar
    clean_prediction = (
        _at(alpha_bar.rsqrt(), timesteps) * noisy
        - _at((1 / alpha_bar - 1).sqrt(), timesteps) * noise_prediction
    )
    of_clean, of_noisy = schedule.posterior_mean_of_clean, schedule.posterior_mean_of_noisy
    mean = _at(of_clean, timesteps) * latents + _at(of_noisy, timesteps) * noisy
    model_mean = _at(of_clean, timesteps) * clean_prediction + _at(of_noisy, timesteps) * noisy

    log_variance = _at(schedule.posterior_log_variance, timesteps)
    share = (logits + 1) / 2  # eq. 15: between the smallest and the largest variance, on a log scale
    model_log_variance = share * _at(schedule.betas.log(), timesteps) + (1 - share) * log_variance

    divergence = 0.5 * (
        model_log_variance
        - log_variance
        - 1
        + (log_variance - model_log_variance).exp()
        + (mean - model_mean).square() * (-model_log_variance).exp()
    )
    surprise = -_log_likelihood_of_bin(latents, model_mean, 0.5 * model_log_variance)
    divergence, surprise = (term.flatten(1).mean(1) / math.log(2) for term in (divergence, surprise))
    return torch.where(timesteps == 0, surprise, divergence)


def _log_likelihood_of_bin(values: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the 8-bit bin around a value under a Gaussian, ends open.

    Made for pixels in [-1, 1]; the published objective applies it to latents as it is. It concerns one
    timestep in a thousand and only the variance there.
    """
    inverse_std, centred = (-log_std).exp(), values - mean
    upper = _normal_cdf(inverse_std * (centred + 1 / 255))
    lower = _normal_cdf(inverse_std * (centred - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12).log()
    below, above = upper.clamp(min=1e-12).log(), (1 - lower).clamp(min=1e-12).log()
    return torch.where(values < -0.999, below, torch.where(values > 0.999, above, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))).tanh())


def _at(table: Tensor, timesteps: Tensor) -> Tensor:
    """Look up float64 values, as float32 that broadcasts over (batch, channels, height, width)."""
    return table.float().to(timesteps.device)[timesteps][:, None, None, None]
