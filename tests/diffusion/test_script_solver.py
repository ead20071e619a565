"""The first scripts' DPM-Solver++ goes the published way, and converges as its order says."""

import math

import pytest
import torch

from original_models import original_model
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.guidance import guided
from pixcell.diffusion.noise_schedules import NoiseSchedule
from pixcell.diffusion.sampling import make_scheduler, sample_latents, scheduler_settings
from pixcell.diffusion.script_solver import ScriptDPMSolverScheduler
from pixcell.errors import ModelError


@pytest.fixture(scope="module")
def case():
    return original_model("dpms_sampling")


@pytest.mark.parametrize(("steps", "scale"), [(20, 2.0), (6, 2.0), (5, 1.0)])
def test_every_latent_of_the_way_is_the_published_one(case, steps, scale):
    model, tensors, _ = case
    scheduler, name = make_scheduler("dpm-solver++-script"), f"{steps}_cfg{scale:g}"
    way = [tensors["in.z"]]
    sample_latents(
        guided(denoiser_of(model), scale),
        scheduler,
        tensors["in.z"],
        Conditioning.from_tokens(tensors["in.y"].squeeze(1)),
        steps,
        on_step=lambda _n, _t, latents: way.append(latents.clone()),
    )
    # a random model drives latents to several hundred
    torch.testing.assert_close(torch.stack(way), tensors[f"out.trajectory_{name}"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["20_cfg2", "6_cfg2", "5_cfg1"])
def test_times_and_noise_levels_are_the_published_ones(case, name):
    tensors, scheduler = case[1], ScriptDPMSolverScheduler()
    scheduler.set_timesteps(int(name.split("_")[0]))
    model_times = tensors[f"out.model_times_{name}"]
    torch.testing.assert_close(scheduler.timesteps, model_times[:-1], rtol=1e-6, atol=1e-4)
    clock = scheduler.timesteps / 1000 + 0.001
    torch.testing.assert_close(clock, tensors[f"out.times_{name}"][:-1], rtol=1e-6, atol=1e-6)
    for ours, theirs in ("alphas", "alpha"), ("sigmas", "sigma"), ("lambdas", "lambda"):
        # the published sigma comes from 1 - alpha^2 in float32, which at the clean end has four digits
        torch.testing.assert_close(
            getattr(scheduler, ours), tensors[f"out.{theirs}_{name}"], rtol=1e-4, atol=1e-6
        )


def test_times_are_fractional_and_end_at_a_thousandth():
    scheduler = ScriptDPMSolverScheduler()
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[:3].tolist() == pytest.approx([999, 949.05, 899.1])
    assert scheduler.timesteps[-1].item() == pytest.approx(49.95)
    assert scheduler.sigmas[-1].item() == pytest.approx(0.01)  # at t = 0.001: beta of the first step is 1e-4


def gaussian(prediction_type, std=0.5):
    """What a perfect model predicts of normal latents with this standard deviation."""
    schedule = NoiseSchedule()

    def denoise(latents, timestep, conditioning):
        clock = (timestep.double() + 1) / 1000
        log_alpha = 0.5 * schedule.alpha_bar.log()
        place = (clock * 1000 - 1).clamp(0, 998).floor().long()
        part = clock * 1000 - 1 - place
        alpha = torch.lerp(log_alpha[place], log_alpha[place + 1], part).exp()
        sigma = (1 - alpha**2).sqrt()
        variance = (alpha * std) ** 2 + sigma**2
        noise = sigma / variance * latents.double()
        clean = alpha * std**2 / variance * latents.double()
        return (noise if prediction_type == "epsilon" else alpha * noise - sigma * clean).float()

    return denoise


def error_with(steps, prediction_type="epsilon", **settings):
    """Of latents that should be scaled from a standard deviation of 1 to 0.5."""
    scheduler = ScriptDPMSolverScheduler(prediction_type=prediction_type, **settings)
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).double().float()
    result = sample_latents(gaussian(prediction_type), scheduler, noise, Conditioning(), steps)
    alpha, sigma = math.sqrt(0.9999), 0.01
    first = NoiseSchedule().alpha_bar[-1]
    start = math.sqrt(first * 0.25 + 1 - first)
    expected = noise * math.sqrt((alpha * 0.5) ** 2 + sigma**2) / start
    return (result - expected).abs().max().item() / expected.abs().max().item()


def test_twice_the_steps_are_less_than_half_the_error():
    """Where a perfect model has a known solution. Of the first order it is half; the first and the last step
    are of that order and keep the rest from a quarter."""
    coarse, fine = error_with(160), error_with(320)
    assert fine < 0.0005
    assert coarse / fine > 2.5
    assert error_with(160, solver_order=1) / error_with(320, solver_order=1) == pytest.approx(2, abs=0.1)
    assert error_with(320, solver_order=1) > 20 * fine


def test_a_velocity_means_the_same_as_its_noise():
    assert error_with(20, "v_prediction") == pytest.approx(error_with(20), rel=1e-3)


def test_noise_is_added_between_timesteps_too():
    scheduler = ScriptDPMSolverScheduler()
    clean, noise = torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1)
    shares = scheduler.add_noise(clean, noise, torch.tensor([0.0, 499.5, 999.0])).flatten() ** 2
    alpha_bar = NoiseSchedule().alpha_bar
    middle = (alpha_bar[499] * alpha_bar[500]).sqrt()
    torch.testing.assert_close(
        shares.double(), torch.stack([alpha_bar[0], middle, alpha_bar[999]]), rtol=1e-5, atol=0
    )


def test_a_sampling_can_be_done_again_and_begun_later():
    scheduler = ScriptDPMSolverScheduler()
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def sampled():
        return sample_latents(gaussian("epsilon"), scheduler, noise, Conditioning(), 5)

    assert torch.equal(sampled(), sampled())
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)
    later = scheduler.step(torch.zeros(1, 1, 4, 4), scheduler.timesteps[3], noise).prev_sample
    assert scheduler.step_index == 4
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.step(torch.zeros(1, 1, 4, 4), scheduler.timesteps[3], noise)[0], later)


def test_what_the_solver_does_not_know_is_refused():
    with pytest.raises(ModelError, match="takes 'epsilon' or 'v_prediction', not 'sample'"):
        ScriptDPMSolverScheduler(prediction_type="sample")
    with pytest.raises(ModelError, match="of order 1 or 2, not 3"):
        ScriptDPMSolverScheduler(solver_order=3)
    with pytest.raises(ModelError, match="1001 sampling steps are not possible"):
        ScriptDPMSolverScheduler().set_timesteps(1001)


def test_it_is_saved_and_loaded_like_any_scheduler(tmp_path):
    scheduler = make_scheduler("dpm-solver++-script", "velocity")
    scheduler.save_pretrained(tmp_path)
    again = ScriptDPMSolverScheduler.from_pretrained(tmp_path)
    assert scheduler_settings(again) == scheduler_settings(scheduler)
    assert again.config.prediction_type == "v_prediction"
