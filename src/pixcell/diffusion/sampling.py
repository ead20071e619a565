"""From noise to latents: one loop for every scheduler, model and size.

The same seed gives the same picture, whatever the batch size. Three things together make that true:

- noise is drawn per sample, from its seed and index (:func:`noise_for`, :func:`generator_for`), on the CPU;
- the network runs on batches of one fixed size (:func:`in_fixed_batches`): matrix kernels are chosen by shape
  and differ in the last bits, and twenty steps carry such a bit into the 8-bit picture;
- scheduler steps are elementwise.

It holds to the last bit on one machine with the same libraries, for any number of threads. Another processor,
GPU model or library version rounds differently, and pictures then differ a little.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.schedulers import (
    SCHEDULERS,
    check_steps,
    lay_out,
    make_scheduler,
    scheduler_settings,
    takes_variance,
    target_of,
)
from pixcell.errors import ModelError
from pixcell.models.threads import side_by_side

__all__ = [
    "SCHEDULERS",
    "check_eta",
    "check_steps",
    "denoiser_of",
    "generator_for",
    "in_fixed_batches",
    "make_scheduler",
    "noise_for",
    "sample_latents",
    "scheduler_settings",
    "takes_variance",
    "target_of",
]

OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


def generator_for(seed: int, index: int) -> torch.Generator:
    """Return the random numbers of one sample: they depend on the seed and on its index only.

    Args:
        seed: Of the whole set, 0 or larger.
        index: Of the sample in it, 0 or larger.
    """
    # Mixed, so that sample 1 of seed 0 is not sample 0 of seed 1.
    mixed = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(mixed))


def noise_for(seed: int, index: int, shape: Sequence[int]) -> Float[Tensor, "..."]:
    """Return the standard normal noise that a sample starts from, float32, on the CPU.

    It is the first thing that :func:`generator_for` gives.

    Examples:
        >>> bool((noise_for(1, 5, (4, 8, 8)) == noise_for(1, 5, (4, 8, 8))).all())
        True
    """
    return torch.randn(tuple(shape), generator=generator_for(seed, index))


def in_fixed_batches(denoiser: Denoiser, size: int) -> Denoiser:
    """Return a denoiser that calls ``denoiser`` on exactly ``size`` samples, however many it is given.

    What is missing in the last call is filled with copies of its last sample. So all calls have one shape and
    run the same kernels. Calls run as :func:`~pixcell.models.threads.side_by_side` does.
    """

    def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        total = latents.shape[0]

        def part(start: int) -> Tensor:
            # Copied, so that alignment in memory is the same too: some kernels care.
            rows = torch.arange(start, start + size, device=latents.device).clamp(max=total - 1)
            time = timestep if timestep.numel() == 1 else timestep[rows.to(timestep.device)]
            return denoiser(latents[rows], time, conditioning.select(rows))[: total - start]

        return torch.cat(side_by_side(part, range(0, total, size), latents.device))

    return denoise


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    scheduler: SchedulerMixin,
    noise: Float[Tensor, "batch channels height width"],
    conditioning: Conditioning,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: OnStep | None = None,
    eta: float | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Run a scheduler from noise to latents, in float32.

    Args:
        denoiser: Predicts noise; may be guided, windowed, batched.
        scheduler: Any of diffusers; its state is reset.
        noise: Standard normal, on the device to compute on.
        conditioning: Of the samples.
        num_inference_steps: Number of calls of the denoiser.
        generator: For schedulers that draw noise as they go; one per sample makes samples independent.
        on_step: Called after each step with its number, timestep and latents; may return other latents.
        eta: For DDIM: how much of a step's variance is fresh noise, 0 to 1. None: as the scheduler is set.

    Raises:
        ModelError: Before any compute, if the number of steps is not possible, the scheduler knows no eta, or
            embeddings hold NaN. After the first call, if the scheduler needs the learned variance and the
            denoiser gives none.
    """
    check_steps(num_inference_steps, scheduler)
    conditioning.check_finite()
    conditioning = conditioning.to(noise.device)
    lay_out(scheduler, num_inference_steps, noise.device)
    extra = _step_arguments(scheduler, generator, eta)
    # Schedulers of flow matching have neither: they begin with the noise, and feed the model, as it is.
    latents = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
    scales_input = hasattr(scheduler, "scale_model_input")
    for number, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep) if scales_input else latents
        prediction = denoiser(scaled, timestep, conditioning)
        if takes_variance(scheduler) and prediction.shape[1] != 2 * latents.shape[1]:
            raise ModelError(
                f"the scheduler needs the variance that the model learned; the denoiser gives "
                f"{prediction.shape[1]} channels for {latents.shape[1]}. Take a model with learned variance "
                "and denoiser_of(model, with_variance=True), or the scheduler 'ddpm'."
            )
        latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
        if on_step is not None:
            replaced = on_step(number, timestep, latents)
            latents = latents if replaced is None else replaced
    return latents


def check_eta(scheduler: SchedulerMixin, eta: float | None) -> None:
    """Refuse an eta that the scheduler does not know, or that is no share. None is always possible.

    Raises:
        ModelError: Says which it takes.
    """
    if eta is None:
        return
    if "eta" not in inspect.signature(scheduler.step).parameters:
        raise ModelError(
            f"eta is for DDIM; {type(scheduler).__name__} has none. Leave it out, or choose 'ddim'."
        )
    if not 0 <= eta <= 1:
        raise ModelError(f"eta is {eta}; 0 adds no fresh noise, 1 as much as ancestral sampling.")


def _step_arguments(
    scheduler: SchedulerMixin, generator: torch.Generator | list[torch.Generator] | None, eta: float | None
) -> dict[str, Any]:
    check_eta(scheduler, eta)
    known = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {"generator": generator} if "generator" in known else {}
    return arguments if eta is None else {**arguments, "eta": eta}
