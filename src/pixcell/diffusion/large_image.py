"""The published samplers of large images, step for step.

They are a DDIM loop over windows. What is theirs, and not diffusers', is which times it visits:

    timesteps     T - 1, T - 1 - d, T - 1 - 2d, ... with d = T // steps

:data:`PIXCELL` and :data:`GRAIKOS` hold what differs between the two. The windows, their equal weights and
their conditions are those of :func:`~pixcell.diffusion.windows.windowed`; decoding in windows is
:meth:`LatentCodec.decode <pixcell.models.codec.LatentCodec.decode>` with ``weight="gaussian"``.

Any scheduler of :mod:`pixcell.diffusion.schedulers` runs on the same windows, and ends at clean latents:
these settings are here so that published results can be repeated.
"""

from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.respaced import RespacedDDIMScheduler
from pixcell.errors import ModelError

__all__ = ["GRAIKOS", "PIXCELL", "LargeImageScheduler", "one_late"]

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


class LargeImageScheduler(RespacedDDIMScheduler):
    """DDIM on the timesteps of the published large-image samplers.

    Args:
        num_train_timesteps: Of the schedule that the model was trained with.
        beta_start: Of it.
        beta_end: Of it.
        beta_schedule: "linear" or "scaled_linear".
        prediction_type: What the model predicts: "epsilon" or "v_prediction".
        eta: How much fresh noise a step gets; 0 is deterministic. At 1 its variance is
            ``beta_t (1 - alpha_bar_s) / (1 - alpha_bar_t)`` for a step from t to s: less than that of DDIM,
            whose ``1 - alpha_bar_t / alpha_bar_s`` knows how long the step is.
        ends_clean: Let the last step arrive at the clean latents, instead of at the noise of timestep 0.

    Raises:
        ModelError: If a value is none of these.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        eta: float = 0.0,
        ends_clean: bool = False,
    ) -> None:
        self._follow(num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type)

    def timesteps_for(self, num_inference_steps: int) -> list[int]:
        """Return the timesteps of a way, rising.

        There are more than ``num_inference_steps`` where these do not divide the training steps, as in the
        published code: 7 for 6.

        Raises:
            ModelError: If there are no such steps.
        """
        total = int(self.config.num_train_timesteps)
        if not 1 <= num_inference_steps <= total:
            raise ModelError(f"{num_inference_steps} sampling steps are not possible; choose 1 to {total}.")
        return list(range(total - 1, -1, -(total // num_inference_steps)))[::-1]

    @property
    def _last(self) -> float:
        return 1.0 if self.config.ends_clean else float(self._alpha_bar[0])

    def _variance(self, timestep: int, here: float, there: float) -> float:
        return float(self._betas[timestep]) * (1 - there) / (1 - here)


def one_late(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser that is told the next noisier timestep, as Graikos et al. tell theirs: 1 to 1000."""

    def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(latents, timestep + 1, conditioning)

    return denoise
