"""Solvers by name fit what a model predicts, and refuse what they cannot do."""

import json
import re

import pytest
import torch

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.noise_schedules import PATHLDM_SCHEDULE
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import sample_latents
from pixcell.diffusion.schedulers import (
    SCHEDULERS,
    check_steps,
    lay_out,
    make_scheduler,
    pathldm_scheduler,
    scheduler_settings,
    takes_variance,
    target_of,
)
from pixcell.errors import ModelError

NEED_TWO = {"ddpm", "ddpm-learned", "ddim-script", "ddim-ldm"}
FOR_FLOW = ("dpm-solver++", "euler", "sde-dpm-solver++", "unipc")


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("target", ["noise", "velocity", "flow"])
def test_a_scheduler_is_made_for_a_target_or_names_those_that_are(name, target):
    fits = name in FOR_FLOW if target == "flow" else name != "euler"
    if fits:
        assert target_of(make_scheduler(name, target)) == target
    else:
        message = re.escape(f"{name!r} cannot follow a model that predicts the {target}")
        with pytest.raises(ModelError, match=message):
            make_scheduler(name, target)


def test_unknown_schedulers_are_refused_by_name():
    with pytest.raises(
        ModelError, match=r"no scheduler 'euler-x'\. Choose one of ddim, ddim-ldm, ddim-script"
    ):
        make_scheduler("euler-x")


def test_a_scheduler_follows_the_schedule_that_a_model_was_trained_with():
    for name in set(SCHEDULERS) - {"euler"}:
        tables = make_scheduler(name, schedule=PATHLDM_SCHEDULE).alphas_cumprod
        torch.testing.assert_close(tables, PATHLDM_SCHEDULE.alpha_bar.float(), rtol=1e-4, atol=0)


def test_what_models_here_do_not_predict_is_refused():
    scheduler = make_scheduler("ddim")
    scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ModelError, match="takes the model's output for 'sample'"):
        target_of(scheduler)


def test_only_ancestral_sampling_takes_the_learned_variance():
    assert {name for name in SCHEDULERS if name != "euler" and takes_variance(make_scheduler(name))} == {
        "ddpm-learned"
    }


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_settings_are_what_makes_a_scheduler_again(name):
    scheduler = make_scheduler(name, "flow" if name == "euler" else "noise")
    settings = scheduler_settings(scheduler)
    again = type(scheduler)(**json.loads(json.dumps(settings)))
    assert scheduler_settings(again) == settings


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_a_saved_pipeline_has_its_scheduler_again(name, transformer, vae, tmp_path):
    target = "flow" if name == "euler" else "noise"
    pipeline = PixCellPipeline(transformer, vae, make_scheduler(name, target), {"target": target})
    pipeline.save_pretrained(tmp_path)
    again = PixCellPipeline.from_pretrained(tmp_path).scheduler
    assert type(again) is type(pipeline.scheduler)
    assert scheduler_settings(again) == scheduler_settings(pipeline.scheduler)


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, n) for name in sorted(SCHEDULERS) for n in (1, 2, 4) if n > 1 or name not in NEED_TWO],
)
def test_a_pipeline_samples_with_each(name, steps, transformer, vae):
    target = "flow" if name == "euler" else "noise"
    pipeline = PixCellPipeline(transformer, vae, make_scheduler(name, target), {"target": target})
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(0)),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert made.shape == (1, 4, 16, 16)
    assert made.isfinite().all()


class TestSteps:
    @pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - NEED_TWO))
    @pytest.mark.parametrize("steps", [1, 2, 3, 20, 37, 999])
    def test_any_number_is_possible_where_timesteps_are_spread_to_the_end(self, name, steps):
        check_steps(steps, make_scheduler(name, "flow" if name == "euler" else "noise"))

    @pytest.mark.parametrize("name", ["dpm-solver++", "sde-dpm-solver++", "unipc", "sa-solver"])
    def test_a_step_without_length_is_refused(self, name):
        """It would divide by zero, and the picture be NaN after a thousand steps."""
        with pytest.raises(ModelError, match="would visit a timestep twice in 1000 steps"):
            check_steps(1000, make_scheduler(name))

    @pytest.mark.parametrize("name", ["ddpm", "ddpm-learned", "ddim-script"])
    def test_a_single_step_from_a_nearly_clean_timestep_is_refused(self, name):
        """Spread over both ends, a single timestep is the clean end."""
        with pytest.raises(ModelError, match=r"begin 1 steps at timestep 0 of 1000\. Choose 2 steps"):
            check_steps(1, make_scheduler(name))
        check_steps(2, make_scheduler(name))

    @pytest.mark.parametrize("steps", [2, 5, 8, 10, 30, 36, 50, 75, 250, 500])
    def test_numbers_that_pathldm_can_take(self, steps):
        check_steps(steps, pathldm_scheduler())

    @pytest.mark.parametrize(
        ("steps", "first", "near"),
        [(1000, 1000, "999"), (600, 600, "500"), (1, 1, "2"), (300, 898, "301")],
    )
    def test_numbers_that_would_begin_half_way_or_behind_the_end(self, steps, first, near):
        with pytest.raises(ModelError, match=rf"begin {steps} steps at timestep {first} of 1000\. .*{near}"):
            check_steps(steps, pathldm_scheduler())

    def test_checking_leaves_a_scheduler_in_use_alone(self):
        scheduler = make_scheduler()
        scheduler.set_timesteps(5)
        check_steps(50, scheduler)
        assert len(scheduler.timesteps) == 5


class TestFlow:
    def test_euler_takes_equal_steps_down_to_the_data(self):
        scheduler = make_scheduler("euler", "flow")
        lay_out(scheduler, 4)
        assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
        assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]

    @pytest.mark.parametrize("steps", [1, 3, 20])
    def test_a_straight_flow_needs_no_more_than_one_step(self, steps):
        """Where every sample moves on a line of its own, Euler's rule is exact."""
        clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        result = sample_latents(
            lambda *_: noise - clean, make_scheduler("euler", "flow"), noise, Conditioning(), steps
        )
        torch.testing.assert_close(result, clean, rtol=1e-5, atol=1e-5)
