"""Solvers by name, each for what a model predicts and the schedule it was trained with.

    name                  what it is                                                      noise on the way
    dpm-solver++          diffusers' second-order multistep, as the published pipelines   none
    dpm-solver++-script   the same formula in PixCell's first scripts' conventions        none
    sde-dpm-solver++      dpm-solver++ with fresh noise each step                         all the way
    unipc                 predictor and corrector of higher order                         none
    sa-solver             stochastic Adams, predictor and corrector of order 2            timesteps 200 to 800
    ddim                  diffusers' DDIM on timesteps 999, 949, ...                      none
    ddim-script           DDIM on N timesteps of 0 to 999, both among them                none
    ddim-ldm              DDIM on timesteps 1, 1 + c, ... as PathLDM's                    none
    ddpm                  ancestral on N timesteps of 0 to 999, variance of the schedule  all the way
    ddpm-learned          the same with the variance that the model predicts              all the way
    euler                 straight steps along the flow                                   none

Noise and velocity go with all but ``euler``; the flow with ``euler``, ``unipc`` and diffusers' two
``dpm-solver++``.
"""

import inspect
import json
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from pixcell.diffusion.noise_schedules import PATHLDM_SCHEDULE, NoiseSchedule, Target
from pixcell.diffusion.respaced import RespacedDDIMScheduler
from pixcell.diffusion.script_solver import ScriptDPMSolverScheduler
from pixcell.errors import ModelError

__all__ = [
    "SCHEDULERS",
    "check_steps",
    "lay_out",
    "make_scheduler",
    "pathldm_scheduler",
    "scheduler_settings",
    "takes_variance",
    "target_of",
]

_MULTISTEP = {
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
}

SCHEDULERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    # The published pipelines' one: second order, first at both ends, the last step to the clean latents.
    "dpm-solver++": (DPMSolverMultistepScheduler, {**_MULTISTEP, "algorithm_type": "dpmsolver++"}),
    "dpm-solver++-script": (ScriptDPMSolverScheduler, {}),
    # The same with fresh noise each step, which mends earlier errors: for models trained briefly. Their
    # first steps overshoot; deterministic solvers keep such an error as a patch of glaring colour.
    "sde-dpm-solver++": (DPMSolverMultistepScheduler, {**_MULTISTEP, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {"final_sigmas_type": "zero", "timestep_spacing": "linspace"}),
    # As the reference runs it: predictor and corrector of order 2, stochastic between 200 and 800 (the
    # class's own default, which as a function cannot be written into a file).
    "sa-solver": (
        SASolverScheduler,
        {"predictor_order": 2, "corrector_order": 2, "timestep_spacing": "linspace"},
    ),
    # "trailing" begins at pure noise, and its steps are as long as diffusers' DDIM takes them to be.
    # Clipping is for pixels in [-1, 1]; latents reach further.
    "ddim": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    "ddim-script": (RespacedDDIMScheduler, {"spacing": "even"}),
    "ddim-ldm": (RespacedDDIMScheduler, {"spacing": "ldm"}),
    "ddpm": (DDPMScheduler, {"clip_sample": False, "timestep_spacing": "linspace"}),
    "ddpm-learned": (
        DDPMScheduler,
        {"clip_sample": False, "timestep_spacing": "linspace", "variance_type": "learned_range"},
    ),
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
}
"""Class and settings of each solver; the noise schedule comes from :func:`make_scheduler`."""

_MULTISTEP_SOLVERS = (DPMSolverMultistepScheduler, SASolverScheduler, UniPCMultistepScheduler)

_PREDICTION_TYPES: dict[Target, str] = {
    "noise": "epsilon",
    "velocity": "v_prediction",
    "flow": "flow_prediction",
}
_FOR_FLOW = ("dpm-solver++", "euler", "sde-dpm-solver++", "unipc")


def make_scheduler(
    name: str = "dpm-solver++", target: Target = "noise", schedule: NoiseSchedule | None = None
) -> SchedulerMixin:
    """Return a fresh scheduler for a model that predicts ``target``.

    Args:
        name: One of :data:`SCHEDULERS`.
        target: What the model predicts.
        schedule: What it was trained with. None: PixCell's, 1000 betas linear from 1e-4 to 2e-2. The flow has
            none: its line is its schedule.

    Raises:
        ModelError: If there is none of that name, or it does not go with the target.
    """
    if name not in SCHEDULERS:
        raise ModelError(f"no scheduler {name!r}. Choose one of {', '.join(sorted(SCHEDULERS))}.")
    fitting = _FOR_FLOW if target == "flow" else tuple(sorted(set(SCHEDULERS) - {"euler"}))
    if name not in fitting:
        raise ModelError(
            f"scheduler {name!r} cannot follow a model that predicts the {target}. "
            f"Choose one of {', '.join(fitting)}."
        )
    kind, settings = SCHEDULERS[name]
    if kind is FlowMatchEulerDiscreteScheduler:
        return kind(**settings)
    schedule = NoiseSchedule() if schedule is None else schedule
    trained = {
        "num_train_timesteps": schedule.num_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
    }
    flow = {"use_flow_sigmas": True} if target == "flow" else {}
    return kind(**trained, **settings, **flow, prediction_type=_PREDICTION_TYPES[target])


def pathldm_scheduler() -> DDIMScheduler:
    """Return diffusers' DDIM with the settings of PathLDM: timesteps 1, 21, ... 981 for 50 steps.

    Exact for numbers of steps that divide 1000. For others it takes as many as asked for, where the reference
    takes more; ``make_scheduler("ddim-ldm", schedule=PATHLDM_SCHEDULE)`` goes its way.

    Source: Yellapragada et al. 2023, "PathLDM" (https://arxiv.org/abs/2309.00748).
    """
    return DDIMScheduler(
        num_train_timesteps=PATHLDM_SCHEDULE.num_timesteps,
        beta_start=PATHLDM_SCHEDULE.beta_start,
        beta_end=PATHLDM_SCHEDULE.beta_end,
        beta_schedule=PATHLDM_SCHEDULE.beta_schedule,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def target_of(scheduler: SchedulerMixin) -> Target:
    """Return what a scheduler takes the model's output to be.

    Raises:
        ModelError: If it is something that models here do not predict.
    """
    taken = scheduler.config.get("prediction_type")
    if taken is None:  # schedulers of flow matching know nothing else and do not say it
        taken = "flow_prediction" if "FlowMatch" in type(scheduler).__name__ else "epsilon"
    for target, prediction_type in _PREDICTION_TYPES.items():
        if taken == prediction_type:
            return target
    raise ModelError(
        f"the scheduler takes the model's output for {taken!r}; "
        f"models here predict {' or '.join(_PREDICTION_TYPES)}."
    )


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler needs the variance that a model predicts behind its target.

    Then the denoiser must give twice the channels of the latents: ``denoiser_of(..., with_variance=True)``.
    """
    # Other solvers of diffusers know the setting, and with it drop the variance instead of using it.
    is_ancestral = isinstance(scheduler, DDPMScheduler)
    return is_ancestral and scheduler.config.get("variance_type") == "learned_range"


def scheduler_settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return where a scheduler differs from its class's defaults, as JSON values.

    The class alone does not say what it does: some hold deterministic and stochastic solvers.
    """
    given = inspect.signature(type(scheduler)).parameters
    config = {key: value for key, value in scheduler.config.items() if key in given}
    settings = {key: value for key, value in config.items() if value != given[key].default}
    return dict(json.loads(json.dumps(settings, default=str)))


def lay_out(
    scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str | None = None
) -> None:
    """Set the timesteps of a sampling; any earlier one is forgotten.

    As ``scheduler.set_timesteps``, but flow matching by Euler's rule takes steps of equal length, from noise
    alone to clean latents. Left to itself it spends the last one on a thousandth of the way.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        scheduler.set_timesteps(sigmas=sigmas, device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)


def check_steps(num_inference_steps: int, scheduler: SchedulerMixin) -> None:
    """Refuse a number of steps that the scheduler cannot take, or would take from half-way.

    Some ways of spreading timesteps leave the noisiest ones out: DDIM with "leading" spacing takes 600 steps
    from timestep 599 of 1000. What starts there is noise, and would be taken for a half-finished picture.
    And as many steps as timesteps may leave one step without length, which multistep solvers divide by.

    Raises:
        ModelError: Names what is possible.
    """
    most = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= most:
        raise ModelError(
            f"{num_inference_steps} sampling steps are not possible; choose 1 to {most} (20 is usual)."
        )
    if _repeats(scheduler, num_inference_steps):
        raise ModelError(
            f"{type(scheduler).__name__} would visit a timestep twice in {num_inference_steps} steps, and "
            "divide by the way between. Choose fewer steps (20 is usual), or another scheduler."
        )
    if _begins_with_noise(scheduler, num_inference_steps):
        return
    near: list[int] = []
    for distance in range(1, most):
        around = (num_inference_steps - distance, num_inference_steps + distance)
        near = [steps for steps in around if 1 <= steps <= most and _begins_with_noise(scheduler, steps)]
        if near:
            break
    raise ModelError(
        f"{type(scheduler).__name__} would begin {num_inference_steps} steps at timestep "
        f"{_first_timestep(scheduler, num_inference_steps)} of {most}. "
        f"Choose {' or '.join(map(str, near))} steps, or another scheduler."
    )


def _first_timestep(scheduler: SchedulerMixin, num_inference_steps: int) -> int:
    # Another one of its kind: laying out a way resets a scheduler, and this one may be in use.
    trial = type(scheduler).from_config(scheduler.config)
    lay_out(trial, num_inference_steps)
    return int(trial.timesteps[0])


def _repeats(scheduler: SchedulerMixin, num_inference_steps: int) -> bool:
    """Whether a multistep solver would take a step of no length."""
    if not isinstance(scheduler, _MULTISTEP_SOLVERS):
        return False
    trial = type(scheduler).from_config(scheduler.config)
    lay_out(trial, num_inference_steps)
    return bool((trial.sigmas.diff() == 0).any())


def _begins_with_noise(scheduler: SchedulerMixin, num_inference_steps: int) -> bool:
    """Near the end of the schedule, or within two steps of it where steps are long; and not behind it."""
    total = scheduler.config.num_train_timesteps
    least = max(min(0.9 * total, total - 2 * total / num_inference_steps), 0.5 * total)
    highest = total if target_of(scheduler) == "flow" else total - 1
    return bool(least <= _first_timestep(scheduler, num_inference_steps) <= highest)
