"""How much noise each timestep holds: what training mixes in, and what solvers take away.

Two families. In the first, timestep ``t`` (0 to 999) keeps ``alpha_bar[t]`` of the signal's variance:

    noisy = sqrt(alpha_bar) latents + sqrt(1 - alpha_bar) noise

In the second, flow matching, latents and noise lie on a straight line and ``sigma = t / 1000`` (t from 1 to
1000) says how far along:

    noisy = (1 - sigma) latents + sigma noise

Tables are float64; what touches latents is float32.

Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (https://arxiv.org/abs/2006.11239);
Nichol & Dhariwal 2021 (https://arxiv.org/abs/2102.09672); velocity: Salimans & Ho 2022
(https://arxiv.org/abs/2202.00512), app. D; flow: Lipman et al. 2022 (https://arxiv.org/abs/2210.02747), Liu
et al. 2022 (https://arxiv.org/abs/2209.03003).
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

__all__ = [
    "PATHLDM_SCHEDULE",
    "FlowSchedule",
    "NoiseSchedule",
    "Target",
    "schedule_for",
    "spread_timesteps",
    "strided_timesteps",
]

Target = Literal["noise", "velocity", "flow"]
"""What a denoiser predicts.

    noise       what was added
    velocity    sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents
    flow        noise - latents, on the straight line between both
"""


@dataclass(frozen=True)
class NoiseSchedule:
    """A schedule that keeps the variance: ``alpha_bar[t]`` is the share of signal left at timestep ``t``.

    Args:
        num_timesteps: How many there are; 0 is nearly clean.
        beta_start: Noise variance added by the first step.
        beta_end: And by the last.
        beta_schedule: Betas on an even grid ("linear"), or their square roots ("scaled_linear", which the
            code of latent diffusion calls linear).
        kept: Timesteps of that schedule that a shorter process keeps, rising; see :meth:`respaced`. Tables
            and timesteps are then the shorter process's own: entry ``i`` belongs to ``kept[i]``.
    """

    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    kept: tuple[int, ...] | None = None

    @property
    def timesteps(self) -> range:
        """What training draws from."""
        return range(self.num_timesteps if self.kept is None else len(self.kept))

    def respaced(self, kept: Sequence[int]) -> "NoiseSchedule":
        """Return the process that takes only these timesteps, as long as their steps together.

        Source: Nichol & Dhariwal 2021, section 4.
        """
        return replace(self, kept=tuple(sorted(kept)))

    @functools.cached_property
    def betas(self) -> Float[Tensor, " timesteps"]:
        """Noise variance added per step, float64."""
        power = 2 if self.beta_schedule == "scaled_linear" else 1
        ends = (self.beta_start ** (1 / power), self.beta_end ** (1 / power))
        betas = torch.linspace(*ends, self.num_timesteps, dtype=torch.float64) ** power
        if self.kept is None:
            return betas
        alpha_bar = (1 - betas).cumprod(0)[list(self.kept)]
        return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])

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
        """Variance of ``q(x_{t-1} | x_t, x_0)`` (Nichol & Dhariwal, eq. 10, there called beta tilde)."""
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
    def bound_weights(self) -> Float[Tensor, " timesteps"]:
        """Weight of the noise's squared error in the variational bound (Ho et al., eq. 12).

        With the posterior variance as the model's; the first entry, which would be infinite, repeats the
        second. PathLDM logs the error weighed so, and trains without.
        """
        weights = self.betas.square() / (
            2 * self.posterior_variance * (1 - self.betas) * (1 - self.alpha_bar)
        )
        return torch.cat([weights[1:2], weights[1:]])

    @functools.cached_property
    def snr(self) -> Float[Tensor, " timesteps"]:
        """Signal variance over noise variance."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def snr_at(self, timesteps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the signal-to-noise ratio of each sample, float32."""
        return self.snr.to(timesteps.device)[timesteps].float()

    def add_noise(
        self,
        latents: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return noisy latents (Nichol & Dhariwal, eq. 8), float32."""
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


PATHLDM_SCHEDULE = NoiseSchedule(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
"""That of PathLDM and its relatives: 1000 betas, square roots on an even grid."""


@dataclass(frozen=True)
class FlowSchedule:
    """The straight line from latents to noise: ``sigma = timestep / num_timesteps``.

    Timestep 0 would hold no noise and is never trained; ``num_timesteps`` is noise alone.
    """

    num_timesteps: int = 1000

    @property
    def timesteps(self) -> range:
        """What training draws from."""
        return range(1, self.num_timesteps + 1)

    def sigma_at(self, timesteps: Shaped[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the share of noise of each sample, float32."""
        return timesteps.float() / self.num_timesteps

    def snr_at(self, timesteps: Shaped[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return signal variance over noise variance of each sample, float32."""
        sigma = self.sigma_at(timesteps)
        return ((1 - sigma) / sigma).square()

    def add_noise(
        self,
        latents: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
        timesteps: Shaped[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return latents part of the way to the noise, float32."""
        return torch.lerp(latents.float(), noise.float(), self.sigma_at(timesteps)[:, None, None, None])

    def velocity(
        self,
        latents: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the direction of the line, the same at every timestep, float32."""
        return noise.float() - latents.float()


def schedule_for(target: Target) -> NoiseSchedule | FlowSchedule:
    """Return the schedule that models here are trained with for what they predict.

    1000 timesteps; betas linear from 1e-4 to 2e-2 for noise and velocity.
    """
    return FlowSchedule() if target == "flow" else NoiseSchedule()


def spread_timesteps(num_timesteps: int, counts: Sequence[int]) -> list[int]:
    """Return timesteps that a shorter process keeps, rising.

    The schedule is cut into as many equal sections as there are counts; each keeps that many timesteps,
    evenly spread and rounded, its first and its last among them.

    Raises:
        ValueError: If a section has fewer timesteps than it should keep.

    Examples:
        >>> spread_timesteps(1000, [5])
        [0, 250, 500, 749, 999]
        >>> spread_timesteps(10, [2, 3])
        [0, 4, 5, 7, 9]
    """
    size, extra = divmod(num_timesteps, len(counts))
    start, kept = 0, []
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise ValueError(f"a section of {length} timesteps cannot keep {count}")
        stride = (length - 1) / max(count - 1, 1)
        # Summed up and not multiplied: halfway between two timesteps the last bit decides. Published so.
        places = itertools.accumulate([stride] * (count - 1), initial=0.0)
        kept += [start + round(place) for place in places]
        start += length
    return kept


def strided_timesteps(num_timesteps: int, count: int) -> list[int]:
    """Return the timesteps 0, c, 2 c, ... with the stride ``c`` that makes them exactly so many.

    Raises:
        ValueError: If no stride does.

    Examples:
        >>> strided_timesteps(1000, 4)
        [0, 250, 500, 750]
    """
    stride = -(-num_timesteps // count) if count > 0 else 0
    if stride < 1 or len(range(0, num_timesteps, stride)) != count:
        raise ValueError(f"no whole stride makes {count} of {num_timesteps} timesteps")
    return list(range(0, num_timesteps, stride))


def _at(table: Tensor, timesteps: Tensor) -> Tensor:
    """Look up float64 values, as float32 that broadcasts over (batch, channels, height, width)."""
    return table.float().to(timesteps.device)[timesteps][:, None, None, None]
