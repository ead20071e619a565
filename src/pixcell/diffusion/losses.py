"""The training loss: predicted noise, and a learned variance between its two bounds.

    loss = mean((target - prediction)^2) + bound

The target is the noise, as published, or the velocity, ``sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0``.
At the noisiest steps an error in the noise is one in the clean latents 150 times as large; an error in the
velocity stays as it is, which models that are trained briefly need.

``bound`` is the variational bound of one step in bits per dimension. It sees a detached prediction, so
it trains the variance channels only. Both are plain means over a sample, without weights.

Schedule: 1000 steps, betas linear from 1e-4 to 2e-2. Everything here is float32 (tables float64) whatever the
autocast: squared differences of half-precision numbers lose what the last steps of training are about.

Source: Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", eq. 3-5, 14, 15
(https://arxiv.org/abs/2102.09672); velocity: Salimans & Ho 2022 (https://arxiv.org/abs/2202.00512), app. D;
min-SNR: Hang et al. 2023 (https://arxiv.org/abs/2303.09556), eq. 4 and section 3.3.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["LossTerms", "NoiseSchedule", "Target", "denoising_loss"]

Target = Literal["noise", "velocity"]
"""What a denoiser predicts."""


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise each timestep holds.

    ``alpha_bar[t]`` is the share of signal variance left at timestep ``t``; 0 is nearly clean.
    """

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2

    @functools.cached_property
    def betas(self) -> Float[Tensor, " timesteps"]:
        """Noise variance added per step, float64."""
        return torch.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=torch.float64)

    @functools.cached_property
    def alpha_bar(self) -> Float[Tensor, " timesteps"]:
        """Cumulative product of ``1 - beta``, float64."""
        return (1 - self.betas).cumprod(0)

    @functools.cached_property
    def alpha_bar_before(self) -> Float[Tensor, " timesteps"]:
        """``alpha_bar`` one step earlier; 1 before the first."""
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @functools.cached_property
    def posterior_variance(self) -> Float[Tensor, " timesteps"]:
        """Variance of ``q(x_{t-1} | x_t, x_0)`` (eq. 10, there called beta tilde)."""
        return self.betas * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_log_variance(self) -> Float[Tensor, " timesteps"]:
        """Its logarithm; the first entry, which would be log 0, repeats the second."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @functools.cached_property
    def posterior_mean_of_clean(self) -> Float[Tensor, " timesteps"]:
        """Weight of the clean latents in the posterior mean (eq. 11)."""
        return self.betas * self.alpha_bar_before.sqrt() / (1 - self.alpha_bar)

    @functools.cached_property
    def posterior_mean_of_noisy(self) -> Float[Tensor, " timesteps"]:
        """Weight of the noisy latents in the posterior mean (eq. 11)."""
        return (1 - self.alpha_bar_before) * (1 - self.betas).sqrt() / (1 - self.alpha_bar)

    @functools.cached_property
    def snr(self) -> Float[Tensor, " timesteps"]:
        """Signal variance over noise variance."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def add_noise(
        self,
        latents: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return noisy latents (eq. 8), float32."""
        signal = _at(self.alpha_bar.sqrt(), timesteps)
        return signal * latents.float() + _at((1 - self.alpha_bar).sqrt(), timesteps) * noise.float()

    def velocity(
        self,
        latents: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return where noisy latents are heading as noise grows (Salimans & Ho, appendix D), float32."""
        signal = _at(self.alpha_bar.sqrt(), timesteps)
        return signal * noise.float() - _at((1 - self.alpha_bar).sqrt(), timesteps) * latents.float()

    def noise_in(
        self,
        noisy: Float[Tensor, "batch channels height width"],
        velocity: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the noise that noisy latents of this velocity hold, float32."""
        signal = _at(self.alpha_bar.sqrt(), timesteps)
        return signal * velocity.float() + _at((1 - self.alpha_bar).sqrt(), timesteps) * noisy.float()


@dataclass(frozen=True)
class LossTerms:
    """The loss of each sample, and its parts. Float32, shape (batch,)."""

    loss: Float[Tensor, " batch"]
    mse: Float[Tensor, " batch"]
    """Unweighted squared error of the noise, or of the velocity where that is the target."""
    bound: Float[Tensor, " batch"] | None
    """Variational bound in bits per dimension; None without learned variance."""


def denoising_loss(
    prediction: Float[Tensor, "batch out_channels height width"],
    latents: Float[Tensor, "batch channels height width"],
    noise: Float[Tensor, "batch channels height width"],
    timesteps: Int[Tensor, " batch"],
    schedule: NoiseSchedule,
    min_snr_gamma: float | None = None,
    target: Target = "noise",
) -> LossTerms:
    """Compare a model's output at ``schedule.add_noise(latents, noise, timesteps)`` with the truth.

    Args:
        prediction: The model's output: the target, and variance logits behind it if they are learned.
        latents: Clean ones, normalised.
        noise: What was added.
        timesteps: 0 to ``num_timesteps - 1``.
        schedule: The one the noise was added by.
        min_snr_gamma: Weigh the squared error by ``min(snr, gamma) / snr``, so that nearly clean steps do not
            dominate (5 in the paper); for velocity by ``min(snr, gamma) / (snr + 1)``. None: no weights.
        target: What the model predicts.

    Raises:
        ValueError: If the prediction has neither once nor twice the channels of the latents.
    """
    channels = latents.shape[1]
    if prediction.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"{prediction.shape[1]} output channels fit {channels} latent channels neither once nor twice"
        )
    with torch.autocast(latents.device.type, enabled=False):
        latents, noise, prediction = latents.float(), noise.float(), prediction.float()
        predicted, logits = prediction[:, :channels], prediction[:, channels:]
        truth = noise if target == "noise" else schedule.velocity(latents, noise, timesteps)
        mse = (truth - predicted).square().flatten(1).mean(1)
        weight = torch.ones_like(mse)
        if min_snr_gamma is not None:
            snr = schedule.snr.to(timesteps.device)[timesteps].float()
            weight = snr.clamp(max=min_snr_gamma) / (snr if target == "noise" else snr + 1)
        if not logits.shape[1]:
            return LossTerms(weight * mse, mse, None)
        noisy = schedule.add_noise(latents, noise, timesteps)
        noise_prediction = predicted if target == "noise" else schedule.noise_in(noisy, predicted, timesteps)
        bound = _bound(noise_prediction.detach(), logits, latents, noisy, timesteps, schedule)
        return LossTerms(weight * mse + bound, mse, bound)


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
