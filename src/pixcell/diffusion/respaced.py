"""DDIM that walks a list of timesteps exactly, as the first scripts of PixCell and PathLDM did.

diffusers' DDIM takes every step to be ``num_train_timesteps // num_inference_steps`` long. Where a list of
timesteps is spread otherwise, that is not where the next one lies. Here each step ends where the next begins.

    spacing   timesteps for N steps of 1000                                      last step ends at
    "even"    N from 0 to 999, both among them, rounded (PixCell's scripts)      the clean latents
    "strided" 0, c, 2 c, ... with the c that makes them exactly N                the clean latents
    "ldm"     1, 1 + c, 1 + 2 c, ... below 1001 with c = 1000 // N (PathLDM's)   alpha_bar[0], nearly clean

In "ldm" spacing there are more than N steps if N does not divide 1000 (31 for 30), as in the reference; and
for some N the noisiest would be timestep 1000, which does not exist: the reference fails there, this one
refuses before anything is computed. With PathLDM's settings and a divisor, diffusers' DDIM goes the same way.

Source: Song et al. 2020, "Denoising Diffusion Implicit Models" (https://arxiv.org/abs/2010.02502), eq. 12 and
16.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float, Int
from torch import Tensor

from pixcell.diffusion.noise_schedules import NoiseSchedule, spread_timesteps, strided_timesteps
from pixcell.errors import ModelError

__all__ = ["RespacedDDIMScheduler"]

_PREDICTIONS = ("epsilon", "v_prediction")
_SPACINGS = ("even", "strided", "ldm")


class RespacedDDIMScheduler(SchedulerMixin, ConfigMixin):
    """DDIM on its own list of timesteps, with or without fresh noise, and backwards.

    Args:
        num_train_timesteps: Of the schedule that the model was trained with.
        beta_start: Of it.
        beta_end: Of it.
        beta_schedule: "linear" or "scaled_linear".
        prediction_type: What the model predicts: "epsilon" or "v_prediction".
        spacing: "even", "strided" or "ldm"; see the top of the module.
        eta: How much of a step's variance is fresh noise, unless :meth:`step` is told: 0 is deterministic,
            1 as much as ancestral sampling.

    Raises:
        ModelError: If spacing or prediction type are none of these.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        spacing: str = "even",
        eta: float = 0.0,
    ) -> None:
        if spacing not in _SPACINGS:
            raise ModelError(f"spacing {spacing!r} is not known; choose one of {', '.join(_SPACINGS)}.")
        self._follow(num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type)

    def _follow(
        self,
        num_train_timesteps: int,
        beta_start: float,
        beta_end: float,
        beta_schedule: str,
        prediction_type: str,
    ) -> None:
        if prediction_type not in _PREDICTIONS:
            raise ModelError(f"this solver takes {' or '.join(_PREDICTIONS)}, not {prediction_type!r}.")
        schedule = NoiseSchedule(num_train_timesteps, beta_start, beta_end, beta_schedule)  # type: ignore[arg-type]
        self._betas, self._alpha_bar = schedule.betas, schedule.alpha_bar
        self.alphas_cumprod = schedule.alpha_bar.float()
        self.num_inference_steps: int | None = None
        self._kept: list[int] = list(schedule.timesteps)
        self.timesteps: Int[Tensor, " steps"] = torch.tensor(self._kept[::-1])

    def timesteps_for(self, num_inference_steps: int) -> list[int]:
        """Return the timesteps of a way, rising.

        Raises:
            ModelError: If the schedule does not have them; names numbers of steps that are possible.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ModelError(f"{num_inference_steps} sampling steps are not possible; choose 1 to {total}.")
        if self.config.spacing == "even":
            return spread_timesteps(total, [num_inference_steps])
        if self.config.spacing == "strided":
            try:
                return strided_timesteps(total, num_inference_steps)
            except ValueError as error:
                raise ModelError(f"{error}; a divisor of {total} always fits.") from error
        kept = _ldm_timesteps(num_inference_steps, total)
        if kept[-1] >= total:
            fits = [n for n in range(1, total + 1) if total % n == 0 and _ldm_timesteps(n, total)[-1] < total]
            near = sorted(sorted(fits, key=lambda n: abs(n - num_inference_steps))[:2])
            raise ModelError(
                f"{num_inference_steps} steps, {total // num_inference_steps} timesteps long, would begin at "
                f"timestep {kept[-1]}; the schedule ends at {total - 1}. "
                f"Choose {' or '.join(map(str, near))} steps."
            )
        return kept

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Lay out the way.

        Args:
            num_inference_steps: Number of calls of the model; "ldm" spacing may take more.
            device: Where ``timesteps`` lie.

        Raises:
            ModelError: As :meth:`timesteps_for`.
        """
        self._kept = self.timesteps_for(num_inference_steps)
        self.num_inference_steps = len(self._kept)
        self.timesteps = torch.tensor(self._kept[::-1], device=device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """Return the latents as they are: the model takes them so."""
        return sample

    def step(
        self,
        model_output: Float[Tensor, "batch channels height width"],
        timestep: Tensor | int,
        sample: Float[Tensor, "batch channels height width"],
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Float[Tensor, "batch channels height width"] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go one step towards clean latents.

        Args:
            model_output: What the model predicts at ``timestep``.
            timestep: One of ``timesteps``.
            sample: Latents at this timestep.
            eta: Instead of the configured one.
            generator: Of the fresh noise.
            variance_noise: The fresh noise itself, instead of drawing it.
            return_dict: Return an object with ``prev_sample`` and ``pred_original_sample`` instead of both.
        """
        eta = self.config.eta if eta is None else eta
        place = self._place_of(timestep)
        here = float(self._alpha_bar[self._kept[place]])
        there = float(self._alpha_bar[self._kept[place - 1]]) if place else self._last
        clean, noise = self._parts(model_output.float(), sample.float(), here)
        std = eta * self._variance(self._kept[place], here, there) ** 0.5
        result = there**0.5 * clean + (1 - there - std**2) ** 0.5 * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    tuple(sample.shape), generator=generator, device=sample.device, dtype=torch.float32
                )
            result = result + std * variance_noise.float()
        return self._output(result.to(sample.dtype), clean.to(sample.dtype), return_dict)

    def reverse_step(
        self,
        model_output: Float[Tensor, "batch channels height width"],
        timestep: Tensor | int,
        sample: Float[Tensor, "batch channels height width"],
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Go one step towards noise, deterministically: what :meth:`step` with ``eta`` 0 would undo.

        From the noisiest timestep it leads to noise alone.

        Args:
            model_output: What the model predicts at ``timestep``.
            timestep: One of ``timesteps``; the way back takes them in rising order.
            sample: Latents at this timestep.
            return_dict: Return an object with ``prev_sample`` (the noisier latents) and
                ``pred_original_sample`` instead of both.
        """
        place = self._place_of(timestep)
        here = float(self._alpha_bar[self._kept[place]])
        is_noisiest = place == len(self._kept) - 1
        there = 0.0 if is_noisiest else float(self._alpha_bar[self._kept[place + 1]])
        clean, noise = self._parts(model_output.float(), sample.float(), here)
        result = there**0.5 * clean + (1 - there) ** 0.5 * noise
        return self._output(result.to(sample.dtype), clean.to(sample.dtype), return_dict)

    def add_noise(
        self,
        original_samples: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
        timesteps: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return noisy latents at timesteps."""
        share = self._alpha_bar.to(timesteps.device)[timesteps][:, None, None, None]
        signal, rest = share.sqrt().to(original_samples), (1 - share).sqrt().to(original_samples)
        return signal * original_samples + rest * noise

    @property
    def _last(self) -> float:
        return float(self._alpha_bar[0]) if self.config.spacing == "ldm" else 1.0

    def _place_of(self, timestep: Tensor | int) -> int:
        try:
            return self._kept.index(int(timestep))
        except ValueError:
            raise ValueError(f"timestep {int(timestep)} is not on the way; call set_timesteps") from None

    def _variance(self, timestep: int, here: float, there: float) -> float:
        """The fresh noise of a step from ``timestep`` at ``eta`` 1 (eq. 16)."""
        return (1 - there) / (1 - here) * (1 - here / there)

    def _parts(self, model_output: Tensor, sample: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a prediction means."""
        signal, rest = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.config.prediction_type == "v_prediction":
            return signal * sample - rest * model_output, signal * model_output + rest * sample
        return (sample - rest * model_output) / signal, model_output

    def _output(self, sample: Tensor, clean: Tensor, return_dict: bool) -> Any:
        if return_dict:
            return DDIMSchedulerOutput(prev_sample=sample, pred_original_sample=clean)
        return sample, clean

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _ldm_timesteps(num_inference_steps: int, total: int) -> list[int]:
    return [1 + timestep for timestep in range(0, total, total // num_inference_steps)]
