"""The published samplers of large images, step for step.

They are a DDIM loop over windows. What is theirs, and not diffusers', is which times it visits:

    timesteps     T - 1, T - 1 - d, T - 1 - 2d, ... with d = T // steps

:data:`PIXCELL` and :data:`GRAIKOS` hold what differs between the two. The windows, their equal weights and
their conditions are those of :func:`~pixcell.diffusion.windows.windowed`; decoding in windows is
:meth:`LatentCodec.decode <pixcell.models.codec.LatentCodec.decode>` with ``weight="gaussian"``.

For pictures, any scheduler of :mod:`pixcell.diffusion.sampling` does as well or better on the same windows:
these two are here so that published results can be repeated.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.noise_schedules import NoiseSchedule
from pixcell.errors import ModelError

__all__ = ["GRAIKOS", "PIXCELL", "LargeImageOutput", "LargeImageScheduler", "one_late"]

PIXCELL: dict[str, Any] = {
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "eta": 0.0,
    "ends_clean": False,
}
"""Of PixCell (4096 pixels): deterministic, and never at the clean latents: it ends at the noise of timestep
0, whose standard deviation is 0.01. Guidance is written ``(w + 1) c - w u``: w = 2 is a scale of 3."""

GRAIKOS: dict[str, Any] = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "eta": 1.0,
    "ends_clean": True,
}
"""Of Graikos et al. 2024, on PathLDM's U-Net: fresh noise each step, with the variance of a step of a single
timestep, however long the step is. The network is told one timestep more than it was trained with:
:func:`one_late`. The default w = 3 is a guidance scale of 4."""


@dataclass
class LargeImageOutput(BaseOutput):
    """What a step returns."""

    prev_sample: Tensor
    """Latents at the next time."""
    pred_original_sample: Tensor
    """The clean latents that the prediction means."""


class LargeImageScheduler(SchedulerMixin, ConfigMixin):
    """DDIM at the times of the published large-image samplers.

    Args:
        num_train_timesteps: Length of the noise schedule.
        beta_start: First step's share of noise.
        beta_end: Last step's share of noise.
        beta_schedule: "linear", or "scaled_linear" (linear in the square root).
        prediction_type: "epsilon" or "v_prediction".
        eta: Share of fresh noise; 0 is deterministic.
        ends_clean: Let the last step arrive at the clean latents, instead of at the noise of timestep 0.

    Raises:
        ModelError: If a value is none of these.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear"] = "linear",
        prediction_type: str = "epsilon",
        eta: float = 0.0,
        ends_clean: bool = False,
    ) -> None:
        if beta_schedule not in ("linear", "scaled_linear"):
            raise ModelError(f"beta_schedule {beta_schedule!r} is neither 'linear' nor 'scaled_linear'.")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(f"prediction_type {prediction_type!r} is neither 'epsilon' nor 'v_prediction'.")
        schedule = NoiseSchedule(num_train_timesteps, beta_start, beta_end, beta_schedule)
        self.betas, self.alphas_cumprod = schedule.betas, schedule.alpha_bar
        self.timesteps = torch.empty(0, dtype=torch.int64)
        self.num_inference_steps: int | None = None

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps to visit.

        Args:
            num_inference_steps: Where it does not divide the number of training steps there are more steps
                than asked for, as in the published code.
            device: Where ``timesteps`` lie.
            timesteps: Falling, instead of a number of steps.

        Raises:
            ModelError: If there are no such steps.
        """
        total = len(self)
        if timesteps is None:
            if num_inference_steps is None or not 1 <= num_inference_steps <= total:
                raise ModelError(
                    f"{num_inference_steps} sampling steps are not possible; choose 1 to {total}."
                )
            step = total // num_inference_steps
            timesteps = list(range(total - 1, -1, -step))
        falling = all(before > after for before, after in itertools.pairwise(timesteps))
        if not timesteps or not falling or timesteps[0] >= total or timesteps[-1] < 0:
            raise ModelError(f"timesteps must fall within {total - 1} to 0; got {timesteps[:5]}.")
        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.tensor(timesteps, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """Return the latents as they are: the network takes them unscaled."""
        return sample

    def step(
        self,
        model_output: Float[Tensor, "batch channels height width"],
        timestep: Tensor | int,
        sample: Float[Tensor, "batch channels height width"],
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Float[Tensor, "batch channels height width"] | None = None,
        return_dict: bool = True,
    ) -> LargeImageOutput | tuple[Tensor, Tensor]:
        """Go from one time to the next.

        Source: Song et al. 2020, "Denoising diffusion implicit models" (https://arxiv.org/abs/2010.02502),
        eq. 12, with ``sigma**2 = eta**2 * beta_t * (1 - alpha_bar_s) / (1 - alpha_bar_t)`` for the step from
        t to s. (Eq. 16 has the share of noise of the whole step in place of ``beta_t``.)

        Args:
            model_output: What the network predicts.
            timestep: Where ``sample`` is; one of ``timesteps``.
            sample: Latents.
            generator: For the fresh noise, if ``eta`` is not 0.
            variance_noise: Fresh noise to take instead of drawing it.
            return_dict: Return an object instead of a tuple.

        Raises:
            ValueError: If ``timestep`` is none of ``timesteps``.
        """
        place = (self.timesteps == int(timestep)).nonzero()
        if not len(place):
            raise ValueError(f"timestep {int(timestep)} is none of those set by set_timesteps")
        number = int(place[0, 0])
        alpha_bar = self.alphas_cumprod[int(timestep)]
        if number + 1 < len(self.timesteps):
            after = self.alphas_cumprod[int(self.timesteps[number + 1])]
        else:
            after = self.alphas_cumprod.new_ones(()) if self.config.ends_clean else self.alphas_cumprod[0]
        variance = self.config.eta**2 * self.betas[int(timestep)] * (1 - after) / (1 - alpha_bar)

        signal, noise = float(alpha_bar.sqrt()), float((1 - alpha_bar).sqrt())
        if self.config.prediction_type == "epsilon":
            predicted_noise, clean = model_output, (sample - noise * model_output) / signal
        else:
            predicted_noise = signal * model_output + noise * sample
            clean = signal * sample - noise * model_output
        left = float((1 - after - variance).clamp(min=0).sqrt())
        result = float(after.sqrt()) * clean + left * predicted_noise
        if variance > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            result = result + float(variance.sqrt()) * variance_noise
        return LargeImageOutput(result, clean) if return_dict else (result, clean)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return clean latents with the noise of a timestep, one for all or one per sample."""
        alpha_bar = self.alphas_cumprod[timesteps.reshape(-1).cpu()].to(original_samples)[:, None, None, None]
        return alpha_bar.sqrt() * original_samples + (1 - alpha_bar).sqrt() * noise


def one_late(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser that is told the next noisier timestep, as Graikos et al. tell theirs: 1 to 1000."""

    def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(latents, timestep + 1, conditioning)

    return denoise
