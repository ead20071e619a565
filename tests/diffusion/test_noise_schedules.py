"""What each timestep holds; what a shorter process keeps."""

import pytest
import torch

from golden_vectors import load
from pixcell.diffusion.noise_schedules import (
    PATHLDM_SCHEDULE,
    FlowSchedule,
    NoiseSchedule,
    schedule_for,
    spread_timesteps,
    strided_timesteps,
)


def test_tables_of_pathldm_are_the_reference_tables():
    tensors, _ = load("pathldm-loss-tiny")
    exact = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(PATHLDM_SCHEDULE.betas, tensors["sched.betas_f64"], **exact)
    torch.testing.assert_close(PATHLDM_SCHEDULE.alpha_bar, tensors["sched.alphas_cumprod_f64"], **exact)
    for name, table in {
        "posterior_variance": PATHLDM_SCHEDULE.posterior_variance,
        "lvlb_weights": PATHLDM_SCHEDULE.bound_weights,
    }.items():  # computed in float32 there
        torch.testing.assert_close(table.float(), tensors[f"sched.{name}"], rtol=1e-5, atol=0)


def test_square_roots_of_scaled_linear_betas_are_linear():
    roots = NoiseSchedule(50, 0.01, 0.25, "scaled_linear").betas.sqrt()
    torch.testing.assert_close(roots, torch.linspace(0.1, 0.5, 50, dtype=torch.float64))


@pytest.mark.parametrize("counts", [[10], [20], [50], [250], [10, 15, 20]])
def test_kept_timesteps_are_the_reference_ones(counts):
    tensors, _ = load("iddpm_steps")
    name = "_".join(map(str, counts))
    assert spread_timesteps(1000, counts) == tensors[f"out.steps_{name}"].tolist()


def test_timesteps_at_a_stride_are_the_reference_ones():
    assert strided_timesteps(1000, 50) == load("iddpm_steps")[0]["out.steps_ddim50"].tolist()


def test_timesteps_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="a section of 333 timesteps cannot keep 334"):
        spread_timesteps(1000, [334, 333, 334])
    for count in (0, 600, 1001):
        with pytest.raises(ValueError, match=f"no whole stride makes {count} of 1000"):
            strided_timesteps(1000, count)


def test_a_shorter_process_has_the_reference_betas():
    tensors, _ = load("iddpm_steps")
    shorter = NoiseSchedule().respaced(tensors["out.timestep_map"].tolist())
    torch.testing.assert_close(shorter.betas, tensors["out.respaced_betas"], rtol=1e-12, atol=1e-15)
    assert shorter.timesteps == range(10)


def test_a_shorter_process_holds_the_noise_of_the_timesteps_it_keeps():
    whole, kept = PATHLDM_SCHEDULE, [3, 99, 500, 999]
    torch.testing.assert_close(whole.respaced(kept).alpha_bar, whole.alpha_bar[kept])
    torch.testing.assert_close(whole.respaced(range(1000)).betas, whole.betas)


class TestFlow:
    def test_the_line_ends_in_noise_and_begins_in_latents(self):
        latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        schedule = FlowSchedule()
        ends = schedule.add_noise(latents, noise, torch.tensor([1000, 1000]))
        assert torch.equal(ends, noise)
        near = schedule.add_noise(latents, noise, torch.tensor([1, 1]))
        torch.testing.assert_close(near, latents, rtol=0, atol=0.01)

    def test_along_the_velocity_latents_and_noise_are_found_from_anywhere(self):
        latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        schedule, timesteps = FlowSchedule(), torch.tensor([10, 400, 1000])
        noisy = schedule.add_noise(latents, noise, timesteps)
        sigma = schedule.sigma_at(timesteps)[:, None, None, None]
        velocity = schedule.velocity(latents, noise)
        torch.testing.assert_close(noisy - sigma * velocity, latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(noisy + (1 - sigma) * velocity, noise, rtol=1e-5, atol=1e-5)

    def test_every_timestep_that_is_trained_holds_noise(self):
        timesteps = torch.tensor(list(FlowSchedule().timesteps))
        assert len(timesteps) == 1000
        assert FlowSchedule().sigma_at(timesteps).min() > 0
        assert FlowSchedule().sigma_at(timesteps).max() == 1
        snr = FlowSchedule().snr_at(timesteps)
        assert snr.isfinite().all()
        assert (snr.diff() < 0).all()


def test_each_target_has_its_schedule():
    assert schedule_for("noise") == schedule_for("velocity") == NoiseSchedule()
    assert schedule_for("flow") == FlowSchedule()
