"""DPM-Solver++ as PixCell's first sampling scripts ran it: in continuous time, down to t = 0.001.

The published pipelines use diffusers' DPM-Solver++ (``dpm-solver++``). The scripts that made the paper's
pictures used the same second-order formula with other conventions, and their pictures differ a little:

    here                                          diffusers, as published
    N + 1 times evenly spread over 1 .. 0.001     N timesteps of 999 .. 0, rounded, then sigma 0
    fractional model times 999, 949.05, 899.1     integers 999, 949, 899
    ends at t = 0.001: noise of std 0.01 is left  ends at the clean prediction

Both begin and end with a step of first order. ``alpha`` at a time between two timesteps is interpolated,
piecewise linear in log alpha.

Source: Lu et al. 2022, "DPM-Solver++" (https://arxiv.org/abs/2211.01095), algorithm 2 (2M).
"""

import math

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.noise_schedules import NoiseSchedule
from pixcell.errors import ModelError

__all__ = ["ScriptDPMSolverScheduler"]


class ScriptDPMSolverScheduler(SchedulerMixin, ConfigMixin):
    """Second-order multistep DPM-Solver++ on evenly spread, fractional times.

    After :meth:`set_timesteps` with N steps, ``timesteps`` holds the N times that the model is asked at, and
    ``alphas``, ``sigmas`` and ``lambdas`` (log alpha - log sigma) the N + 1 points of the way, float32.

    Args:
        num_train_timesteps: Of the schedule that the model was trained with.
        beta_start: Of it.
        beta_end: Of it.
        beta_schedule: "linear" or "scaled_linear".
        prediction_type: What the model predicts: "epsilon" or "v_prediction".
        solver_order: 2, as published, or 1.

    Raises:
        ModelError: If the solver does not know the prediction type or the order.
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
        solver_order: int = 2,
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(f"this solver takes 'epsilon' or 'v_prediction', not {prediction_type!r}.")
        if solver_order not in (1, 2):
            raise ModelError(f"this solver is of order 1 or 2, not {solver_order}.")
        schedule = NoiseSchedule(num_train_timesteps, beta_start, beta_end, beta_schedule)  # type: ignore[arg-type]
        self.alphas_cumprod = schedule.alpha_bar.float()
        # Timestep index i stands for the time (i + 1) / num_train_timesteps; 0 itself holds no knot.
        self._knots = np.arange(1, num_train_timesteps + 1) / num_train_timesteps
        self._log_alpha = (0.5 * schedule.alpha_bar.log()).numpy()
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self.set_timesteps(num_train_timesteps - 1)

    @property
    def step_index(self) -> int | None:
        """Which step comes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Which step is the first, where that was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later step, as pipelines that start from a picture do."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Spread the times of the way, and forget any earlier sampling.

        Args:
            num_inference_steps: Number of calls of the model.
            device: Where ``timesteps`` lie.

        Raises:
            ModelError: If there are none, or more than the schedule has.
        """
        total = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ModelError(f"{num_inference_steps} sampling steps are not possible; choose 1 to {total}.")
        self.num_inference_steps = num_inference_steps
        times = np.linspace(1, 1 / total, num_inference_steps + 1)
        log_alpha = np.interp(times, self._knots, self._log_alpha)
        sigma = np.sqrt(-np.expm1(2 * log_alpha))  # 1 - alpha^2, without cancellation near the clean end
        self._alpha, self._sigma = np.exp(log_alpha), sigma
        self._lambda = log_alpha - np.log(sigma)
        self.alphas, self.sigmas, self.lambdas = (
            torch.from_numpy(values).float() for values in (self._alpha, self._sigma, self._lambda)
        )
        model_times = (times[:-1] - 1 / total) * total
        self.timesteps = torch.from_numpy(model_times).to(device=device, dtype=torch.float32)
        self._step_index: int | None = None
        self._begin_index = None
        self._before: Tensor | None = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return the latents as they are: the model takes them so."""
        return sample

    def step(
        self,
        model_output: Float[Tensor, "batch channels height width"],
        timestep: Tensor | float,
        sample: Float[Tensor, "batch channels height width"],
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Go one step towards clean latents.

        Args:
            model_output: What the model predicts at ``timestep``.
            timestep: One of ``timesteps``; steps are taken in their order.
            sample: Latents at this timestep.
            return_dict: Return an object with ``prev_sample`` instead of a tuple of one.
        """
        if self._step_index is None:
            self._step_index = self._index_of(timestep) if self._begin_index is None else self._begin_index
        here = self._step_index
        clean = self._clean(model_output.float(), sample.float(), here)
        alpha, sigma, lambda_ = self._alpha, self._sigma, self._lambda
        h = lambda_[here + 1] - lambda_[here]
        direction = clean
        is_last = here == len(self.timesteps) - 1
        if self.config.solver_order == 2 and self._before is not None and not is_last:
            ratio = (lambda_[here] - lambda_[here - 1]) / h
            direction = clean + (clean - self._before) / (2 * float(ratio))
        kept, added = sigma[here + 1] / sigma[here], -alpha[here + 1] * math.expm1(-h)
        result = (float(kept) * sample.float() + float(added) * direction).to(sample.dtype)
        self._before = clean
        self._step_index += 1
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def add_noise(
        self,
        original_samples: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch channels height width"],
        timesteps: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Return noisy latents at model times, which may be fractional."""
        total = self.config.num_train_timesteps
        times = (timesteps.detach().double().cpu().numpy() + 1) / total
        log_alpha = np.interp(times, self._knots, self._log_alpha)
        alpha, sigma = (
            torch.from_numpy(values).to(original_samples)[:, None, None, None]
            for values in (np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha)))
        )
        return alpha * original_samples + sigma * noise

    def _index_of(self, timestep: Tensor | float) -> int:
        distances = (self.timesteps - torch.as_tensor(timestep, device=self.timesteps.device)).abs()
        return int(distances.argmin())

    def _clean(self, model_output: Tensor, sample: Tensor, here: int) -> Tensor:
        alpha, sigma = float(self._alpha[here]), float(self._sigma[here])
        if self.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * model_output
        return (sample - sigma * model_output) / alpha

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
