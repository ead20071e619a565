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
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.losses import Target
from pixcell.errors import ModelError
from pixcell.models.threads import side_by_side
from pixcell.models.transformer import PixCellTransformer2DModel

__all__ = [
    "SCHEDULERS",
    "check_steps",
    "denoiser_of",
    "generator_for",
    "in_fixed_batches",
    "make_scheduler",
    "noise_for",
    "sample_latents",
    "scheduler_settings",
    "target_of",
]

_TRAINED = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}

SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    # The published pipelines' one: second order, first at both ends, the last step to the clean latents.
    "dpm-solver++": (
        DPMSolverMultistepScheduler,
        {
            **_TRAINED,
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
            "final_sigmas_type": "zero",
            "timestep_spacing": "linspace",
        },
    ),
    # The same with fresh noise each step, which mends earlier errors: for models trained briefly. Their
    # first steps overshoot; deterministic solvers keep such an error as a patch of glaring colour.
    "sde-dpm-solver++": (
        DPMSolverMultistepScheduler,
        {
            **_TRAINED,
            "algorithm_type": "sde-dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
            "final_sigmas_type": "zero",
            "timestep_spacing": "linspace",
        },
    ),
    "unipc": (
        UniPCMultistepScheduler,
        {**_TRAINED, "final_sigmas_type": "zero", "timestep_spacing": "linspace"},
    ),
    # "trailing" begins at pure noise, and its steps are as long as these two schedulers take them to be.
    # Clipping is for pixels in [-1, 1]; latents reach further.
    "ddim": (DDIMScheduler, {**_TRAINED, "clip_sample": False, "timestep_spacing": "trailing"}),
    "ddpm": (DDPMScheduler, {**_TRAINED, "clip_sample": False, "timestep_spacing": "trailing"}),
}
"""Schedulers by name, for the noise schedule that models here are trained with."""

_PREDICTION_TYPES: dict[Target, str] = {"noise": "epsilon", "velocity": "v_prediction"}

OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


def make_scheduler(name: str = "dpm-solver++", target: Target = "noise") -> SchedulerMixin:
    """Return a fresh scheduler for a model that predicts ``target``.

    Raises:
        ModelError: If there is none of that name.
    """
    if name not in SCHEDULERS:
        raise ModelError(f"no scheduler {name!r}. Choose one of {', '.join(sorted(SCHEDULERS))}.")
    kind, settings = SCHEDULERS[name]
    return kind(**settings, prediction_type=_PREDICTION_TYPES[target])


def target_of(scheduler: SchedulerMixin) -> Target:
    """Return what a scheduler takes the model's output to be.

    Raises:
        ModelError: If it is something that models here do not predict.
    """
    for target, prediction_type in _PREDICTION_TYPES.items():
        if scheduler.config.get("prediction_type", "epsilon") == prediction_type:
            return target
    raise ModelError(
        f"the scheduler takes the model's output for {scheduler.config['prediction_type']!r}; "
        f"models here predict {' or '.join(_PREDICTION_TYPES)}."
    )


def scheduler_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return where a scheduler differs from its class's defaults, as JSON values.

    The class alone does not say what it does: some hold deterministic and stochastic solvers.
    """
    given = inspect.signature(type(scheduler)).parameters
    config = {key: value for key, value in scheduler.config.items() if key in given}
    settings = {key: value for key, value in config.items() if value != given[key].default}
    return dict(json.loads(json.dumps(settings, default=str)))


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


def denoiser_of(transformer: PixCellTransformer2DModel) -> Denoiser:
    """Return a transformer as a denoiser: conditions become tokens, variance channels are left out."""

    def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        dtype, device = transformer.dtype, latents.device
        tokens = conditioning.to(device).tokens(transformer.unconditional_embedding, latents.shape[0])
        output = transformer(latents.to(dtype), timestep, tokens.to(dtype), return_dict=False)[0]
        return output[:, : latents.shape[1]].to(latents.dtype)

    return denoise


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
            return denoiser(latents[rows], timestep, conditioning.select(rows))[: total - start]

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

    Raises:
        ModelError: If the number of steps is not possible, or embeddings hold NaN: before any compute.
    """
    check_steps(num_inference_steps, scheduler)
    conditioning.check_finite()
    conditioning = conditioning.to(noise.device)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    latents = noise.float() * scheduler.init_noise_sigma
    for number, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = denoiser(scaled, timestep, conditioning)
        latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
        if on_step is not None:
            replaced = on_step(number, timestep, latents)
            latents = latents if replaced is None else replaced
    return latents


def check_steps(num_inference_steps: int, scheduler: SchedulerMixin) -> None:
    """Refuse a number of steps that the scheduler cannot take.

    Raises:
        ModelError: Names the range.
    """
    most = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= most:
        raise ModelError(
            f"{num_inference_steps} sampling steps are not possible; choose 1 to {most} (20 is usual)."
        )
