"""Each step ends where the next begins, and PathLDM's and PixCell's scripts are met step by step."""

import functools
import json

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from golden_vectors import FOLDER, load
from original_models import original_model
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.guidance import guided
from pixcell.diffusion.noise_schedules import PATHLDM_SCHEDULE, NoiseSchedule
from pixcell.diffusion.respaced import RespacedDDIMScheduler
from pixcell.diffusion.sampling import make_scheduler, sample_latents, scheduler_settings
from pixcell.diffusion.schedulers import pathldm_scheduler
from pixcell.diffusion.text_pipeline import text_denoiser_of
from pixcell.errors import ModelError
from pixcell.models.pathldm import unet_from_ldm
from pixcell.models.pathldm_layout import from_ldm

CLOSE = {"rtol": 1e-4, "atol": 5e-5}  # single steps
CLEAN = {"rtol": 1e-4, "atol": 1e-3}  # at timestep 999 clean latents are what float32 rounds, times 157


class TestPixCell:
    """Ten timesteps of a thousand, each sample of the case at another."""

    @pytest.fixture(scope="class")
    def case(self):
        model, tensors, _ = original_model("iddpm_steps")
        kept = tensors["out.timestep_map"]
        with torch.no_grad():
            output = model(tensors["in.x"], kept[tensors["in.t"]], tensors["in.y"].squeeze(1)).sample
        return model, tensors, output

    def rows(self, case):
        """Latents, timestep, output, and where to find what is expected, sample by sample."""
        _, tensors, output = case
        for row, place in enumerate(tensors["in.t"].tolist()):
            one = slice(row, row + 1)
            yield one, int(tensors["out.timestep_map"][place]), tensors["in.x"][one], output[one]

    def test_mean_and_variance_of_a_step_are_the_reference_ones(self, case):
        _, tensors, output = case
        shorter = NoiseSchedule().respaced(tensors["out.timestep_map"].tolist())
        x, places = tensors["in.x"], tensors["in.t"]

        def at(table):
            return table.float()[places][:, None, None, None]

        alpha_bar = shorter.alpha_bar
        clean = at(alpha_bar.rsqrt()) * x - at((1 / alpha_bar - 1).sqrt()) * output[:, :4]
        mean = at(shorter.posterior_mean_of_clean) * clean + at(shorter.posterior_mean_of_noisy) * x
        share = (output[:, 4:] + 1) / 2
        log_variance = share * at(shorter.betas.log()) + (1 - share) * at(shorter.posterior_log_variance)
        torch.testing.assert_close(clean, tensors["out.pred_xstart"], **CLEAN)
        torch.testing.assert_close(mean, tensors["out.mean"], **CLOSE)
        torch.testing.assert_close(log_variance, tensors["out.log_variance"], **CLOSE)
        torch.testing.assert_close(log_variance.exp(), tensors["out.variance"], **CLOSE)

    def test_an_ancestral_step_with_the_learned_variance_is_the_reference_one(self, case, monkeypatch):
        """diffusers' DDPM draws its noise itself."""
        tensors = case[1]
        for one, timestep, x, output in self.rows(case):
            noise = tensors["in.step_noise"][one]
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, noise=noise, **__: noise)
            scheduler = make_scheduler("ddpm-learned")
            scheduler.set_timesteps(10)
            after = scheduler.step(output, timestep, x).prev_sample
            torch.testing.assert_close(after, tensors["out.ancestral"][one], **CLOSE)

    @pytest.mark.parametrize("eta", [0, 1])
    def test_a_deterministic_and_a_stochastic_step_are_the_reference_ones(self, case, eta):
        tensors, scheduler = case[1], make_scheduler("ddim-script")
        scheduler.set_timesteps(10)
        for one, timestep, x, output in self.rows(case):
            noise = tensors["in.step_noise"][one]
            after = scheduler.step(output[:, :4], timestep, x, eta=float(eta), variance_noise=noise)
            torch.testing.assert_close(after.prev_sample, tensors[f"out.ddim_eta{eta}"][one], **CLOSE)
            torch.testing.assert_close(after.pred_original_sample, tensors["out.pred_xstart"][one], **CLEAN)

    def test_a_step_back_is_the_reference_one(self, case):
        tensors, scheduler = case[1], make_scheduler("ddim-script")
        scheduler.set_timesteps(10)
        for one, timestep, x, output in self.rows(case):
            after = scheduler.reverse_step(output[:, :4], timestep, x).prev_sample
            torch.testing.assert_close(after, tensors["out.ddim_reverse"][one], **CLOSE)

    def test_the_whole_way_is_the_reference_one(self, case):
        model, tensors, _ = case
        result = sample_latents(
            denoiser_of(model),
            make_scheduler("ddim-script"),
            tensors["in.x"],
            Conditioning.from_tokens(tensors["in.y"].squeeze(1)),
            10,
        )
        torch.testing.assert_close(result, tensors["out.ddim_loop"], rtol=1e-3, atol=1e-3)


class TestPathLDM:
    @pytest.fixture(scope="class")
    def unet(self):
        tensors, case = load("pathldm-unet-tiny")
        unet = unet_from_ldm(**case["config"])
        state = {name[5:]: value.float() for name, value in tensors.items() if name.startswith("unet.")}
        unet.load_state_dict(from_ldm(unet, state), strict=True)
        return unet.eval()

    def way(self, unet, scheduler, name, **settings):
        tensors, case = load("pathldm-ddim-tiny")
        run = case["runs"][name]
        latents, clean, scales = [], [], run["guidance_scale"]
        step = scheduler.step

        @functools.wraps(step)
        def watched(*args, **kwargs):
            output = step(*args, **kwargs)
            clean.append(output.pred_original_sample)
            return output

        scheduler.step = watched
        conditioning = Conditioning(text_states=tensors["in.cond"])
        without = Conditioning(text_states=tensors["in.uncond"])
        sample_latents(
            guided(text_denoiser_of(unet), scales, negative=without),
            scheduler,
            tensors["in.x_T"],
            conditioning,
            run["requested_steps"],
            on_step=lambda _n, _t, step: latents.append(step.clone()),
            **settings,
        )
        expected = tensors[f"{name}.x_steps"]
        # the tolerance of the case: 1e-5 of the standard deviation, times the steps
        close = {"rtol": 0, "atol": 1e-5 * expected.std().item() * len(expected)}
        torch.testing.assert_close(torch.stack(latents), expected, **close)
        torch.testing.assert_close(latents[-1], tensors[f"{name}.out"], **close)
        ends = torch.stack([clean[0], clean[-1]])
        # divided by the signal that is left at the noisiest step, about 0.07
        close["atol"] *= 15
        torch.testing.assert_close(ends, tensors[f"{name}.pred_x0_first_last"], **close)
        assert scheduler.timesteps.tolist() == tensors[f"{name}.timesteps"].flip(0).tolist()

    @pytest.mark.parametrize("scheduler", ["diffusers", "ours"])
    def test_a_guided_way_is_the_reference_one(self, unet, scheduler):
        schedulers = {
            "diffusers": pathldm_scheduler(),
            "ours": make_scheduler("ddim-ldm", schedule=PATHLDM_SCHEDULE),
        }
        self.way(unet, schedulers[scheduler], "eta0_s10")

    @pytest.mark.parametrize("module", ["scheduling_ddim", "respaced"])
    def test_a_way_with_fresh_noise_is_the_reference_one(self, unet, module, monkeypatch):
        from diffusers.schedulers import scheduling_ddim

        from pixcell.diffusion import respaced

        noise = iter(load("pathldm-ddim-tiny")[0]["eta1_s8.noise"])
        scheduler = pathldm_scheduler()
        if module == "respaced":
            scheduler = make_scheduler("ddim-ldm", schedule=PATHLDM_SCHEDULE)
        where = {"scheduling_ddim": scheduling_ddim, "respaced": respaced}[module]
        monkeypatch.setattr(where, "randn_tensor", lambda *_, **__: next(noise))
        self.way(unet, scheduler, "eta1_s8", eta=1.0)

    def test_a_number_of_steps_that_does_not_divide_gives_more_as_in_the_reference(self, unet):
        """31 for 30. diffusers' takes 30, and begins at timestep 958."""
        self.way(unet, make_scheduler("ddim-ldm", schedule=PATHLDM_SCHEDULE), "eta0_s30odd")
        plain = pathldm_scheduler()
        plain.set_timesteps(30)
        assert len(plain.timesteps) == 30
        assert plain.timesteps[0] == 958

    def test_noise_levels_are_the_reference_ones(self):
        tensors, case = load("pathldm-ddim-tiny")
        for name, run in case["runs"].items():
            scheduler = make_scheduler("ddim-ldm", schedule=PATHLDM_SCHEDULE)
            scheduler.set_timesteps(run["requested_steps"])
            kept = scheduler.timesteps.flip(0)
            alphas = scheduler.alphas_cumprod[kept]
            torch.testing.assert_close(alphas, tensors[f"{name}.alphas"], rtol=1e-6, atol=0)
            before = torch.cat([scheduler.alphas_cumprod[:1], alphas[:-1]]).double()
            torch.testing.assert_close(before, tensors[f"{name}.alphas_prev"], rtol=1e-6, atol=0)
            here = alphas.double()
            sigmas = run["eta"] * ((1 - before) / (1 - here) * (1 - here / before)).sqrt()
            torch.testing.assert_close(sigmas, tensors[f"{name}.sigmas"], rtol=1e-4, atol=1e-7)

    def test_times_are_the_reference_ones_or_refused_where_it_fails(self):
        table = json.loads((FOLDER / "pathldm-prompts.json").read_text())["ddim_timesteps_reference"]
        scheduler = make_scheduler("ddim-ldm", schedule=PATHLDM_SCHEDULE)
        assert {entry["valid"] for entry in table.values()} == {True, False}
        for steps, entry in table.items():
            if not entry["valid"]:
                with pytest.raises(
                    ModelError, match="would begin at timestep 1000; the schedule ends at 999"
                ):
                    scheduler.set_timesteps(int(steps))
                continue
            kept = scheduler.timesteps_for(int(steps))
            assert (len(kept), kept[0], kept[-1]) == (entry["n"], entry["first"], entry["last"])
            assert entry["second"] is None or kept[1] == entry["second"]


def test_the_way_back_undoes_the_way():
    """A model that answers alike at both ends of a step."""
    scheduler = RespacedDDIMScheduler()
    scheduler.set_timesteps(50)
    latents, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for timestep, before in zip(scheduler.timesteps[1:], scheduler.timesteps[:-1], strict=True):
        noisier = scheduler.reverse_step(noise, timestep, latents).prev_sample
        again = scheduler.step(noise, before, noisier).prev_sample
        torch.testing.assert_close(again, latents, rtol=1e-4, atol=1e-4)


def test_a_velocity_means_the_same_as_its_noise():
    schedule, timestep = NoiseSchedule(), torch.tensor([500])
    latents, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    noisy, velocity = (
        schedule.add_noise(latents, noise, timestep),
        schedule.velocity(latents, noise, timestep),
    )
    after = []
    for kind, output in (("epsilon", noise), ("v_prediction", velocity)):
        scheduler = RespacedDDIMScheduler(prediction_type=kind, spacing="strided")
        scheduler.set_timesteps(10)
        after.append(scheduler.step(output, 500, noisy).prev_sample)
    torch.testing.assert_close(*after)


def test_fresh_noise_comes_from_each_samples_generator():
    scheduler = RespacedDDIMScheduler(eta=1.0)
    scheduler.set_timesteps(10)
    noisy = torch.ones(2, 3, 4, 4)

    def stepped(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return scheduler.step(noisy[rows], 888, noisy[rows], generator=generators).prev_sample

    assert torch.equal(stepped([0, 1])[1:], stepped([1]))
    assert not torch.equal(stepped([0]), stepped([1]))


def test_noise_is_added_as_the_schedule_says():
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 700])
    expected = NoiseSchedule().add_noise(clean, noise, timesteps)
    torch.testing.assert_close(RespacedDDIMScheduler().add_noise(clean, noise, timesteps), expected)


def test_what_the_solver_does_not_know_is_refused():
    with pytest.raises(ModelError, match="spacing 'odd' is not known; choose one of even, strided, ldm"):
        RespacedDDIMScheduler(spacing="odd")
    with pytest.raises(ModelError, match="takes epsilon or v_prediction, not 'sample'"):
        RespacedDDIMScheduler(prediction_type="sample")
    with pytest.raises(ModelError, match="0 sampling steps are not possible"):
        RespacedDDIMScheduler().set_timesteps(0)
    with pytest.raises(ModelError, match="no whole stride makes 600 of 1000 timesteps; a divisor of 1000"):
        RespacedDDIMScheduler(spacing="strided").set_timesteps(600)
    scheduler = RespacedDDIMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep 5 is not on the way"):
        scheduler.step(torch.zeros(1, 1, 2, 2), 5, torch.zeros(1, 1, 2, 2))


def test_it_is_saved_and_loaded_like_any_scheduler(tmp_path):
    scheduler = make_scheduler("ddim-ldm", schedule=PATHLDM_SCHEDULE)
    scheduler.save_pretrained(tmp_path)
    again = RespacedDDIMScheduler.from_pretrained(tmp_path)
    assert scheduler_settings(again) == scheduler_settings(scheduler)
    assert again.config.spacing == "ldm"
