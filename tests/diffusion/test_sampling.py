"""One loop for all schedulers; noise that depends on seed and index; batches that change nothing."""

import pytest
import torch

from golden_vectors import load, weights
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.guidance import guided
from pixcell.diffusion.noise_schedules import NoiseSchedule
from pixcell.diffusion.sampling import (
    SCHEDULERS,
    denoiser_of,
    generator_for,
    in_fixed_batches,
    make_scheduler,
    noise_for,
    sample_latents,
    takes_variance,
)
from pixcell.errors import ModelError
from pixcell.models.transformer import PixCellTransformer2DModel
from tiny_models import awake


@pytest.mark.parametrize("steps", [20, 5])
def test_default_scheduler_walks_the_published_pipelines_way(steps):
    """Every latent of a guided trajectory, timesteps and sigmas included."""
    tensors, case = load("hf_pipeline_sampling")
    model = PixCellTransformer2DModel(**case["config"]).eval()
    model.load_state_dict(weights(tensors), strict=True)
    scheduler, trajectory = make_scheduler(), []
    sample_latents(
        guided(denoiser_of(model), case["settings"]["guidance"]),
        scheduler,
        tensors["in.noise"],
        Conditioning.from_tokens(tensors["in.uni_embeds"]),
        steps,
        on_step=lambda _n, _t, latents: trajectory.append(latents.clone()),
    )
    assert torch.equal(scheduler.timesteps, tensors[f"out.timesteps_{steps}"])
    torch.testing.assert_close(scheduler.sigmas, tensors[f"out.sigmas_{steps}"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.stack(trajectory), tensors[f"out.trajectory_{steps}"], rtol=1e-3, atol=1e-3
    )


def test_default_scheduler_has_the_published_settings():
    settings = load("hf_pipeline_sampling")[1]["settings"]["scheduler"]
    config = make_scheduler().config
    assert {key: config[key] for key in settings} == settings


def targets_of(name):
    """What a scheduler can follow."""
    for target in ("noise", "velocity", "flow"):
        try:
            yield target, make_scheduler(name, target)
        except ModelError:
            continue


PAIRS = [(name, target) for name in sorted(SCHEDULERS) for target, _ in targets_of(name)]
LEAVES_NOISE = {
    "dpm-solver++-script",
    "ddim-ldm",
    "sa-solver",
}  # a standard deviation of 0.01: beta of step 0


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_a_perfect_denoiser_gives_the_data(name, target):
    """Where the answer is known at every step, every scheduler arrives at the clean latents."""
    scheduler = make_scheduler(name, target)
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    log_alpha_bar = NoiseSchedule().alpha_bar.log()

    def perfect(latents, timestep, conditioning):
        if target == "flow":
            return (latents - clean) / (timestep.float() / 1000)
        below = timestep.double().floor().long()
        part = timestep.double() - below  # some solvers ask between two timesteps
        share = (
            torch.lerp(log_alpha_bar[below], log_alpha_bar[(below + 1).clamp(max=999)], part).exp().float()
        )
        noise = (latents - share.sqrt() * clean) / (1 - share).sqrt()
        answer = noise if target == "noise" else share.sqrt() * noise - (1 - share).sqrt() * clean
        return torch.cat([answer, torch.zeros_like(answer)], 1) if takes_variance(scheduler) else answer

    noise = torch.stack([noise_for(0, index, (4, 8, 8)) for index in range(2)])
    result = sample_latents(
        perfect, scheduler, noise, Conditioning(), 20, [generator_for(0, i) for i in (0, 1)]
    )
    torch.testing.assert_close(result, clean, rtol=0, atol=5e-2 if name in LEAVES_NOISE else 2e-2)


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_steps_are_elementwise(name, target):
    """Windows, batches and canvases rely on it: a sample alone takes the way it takes in company."""

    def local(latents, timestep, conditioning):
        answer = 0.9 * latents.tanh()
        return torch.cat([answer, answer], 1) if name == "ddpm-learned" else answer

    generators = [generator_for(5, index) for index in range(3)]
    noise = torch.stack([noise_for(5, index, (4, 6, 10)) for index in range(3)])
    together = sample_latents(local, make_scheduler(name, target), noise, Conditioning(), 7, generators)
    for index in range(3):
        alone = sample_latents(
            local,
            make_scheduler(name, target),
            noise[index : index + 1],
            Conditioning(),
            7,
            [generator_for(5, index)],
        )
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ModelError, match=f"{steps} sampling steps are not possible; choose 1 to 1000"):
        sample_latents(
            lambda *_: pytest.fail("computed"),
            make_scheduler(),
            torch.zeros(1, 4, 8, 8),
            Conditioning(),
            steps,
        )


def test_nan_embeddings_are_refused_before_anything_is_computed():
    conditioning = Conditioning(torch.full((1, 1, 1, 12), float("nan")))
    with pytest.raises(ModelError, match="NaN"):
        sample_latents(
            lambda *_: pytest.fail("computed"), make_scheduler(), torch.zeros(1, 4, 8, 8), conditioning, 5
        )


def test_noise_depends_on_seed_and_index_only():
    shape = (4, 16, 16)
    torch.manual_seed(99)
    first = noise_for(3, 7, shape)
    torch.randn(5)
    assert torch.equal(noise_for(3, 7, shape), first)
    others = [noise_for(seed, index, shape) for seed, index in ((3, 8), (4, 7), (7, 3), (2, 8), (0, 10))]
    assert not any(torch.equal(first, other) for other in others)
    # written down, so that a change of the rule does not pass unseen: seeds must keep their pictures
    assert first.flatten()[:3].tolist() == pytest.approx([0.568962, -1.92644, 0.743787], abs=1e-5)
    assert abs(torch.cat([o.flatten() for o in others]).mean()) < 0.1


def test_noise_is_standard_normal():
    values = torch.cat([noise_for(0, index, (4, 32, 32)).flatten() for index in range(16)])
    assert values.mean().abs() < 0.02
    assert values.std().item() == pytest.approx(1, abs=0.02)


def test_fixed_batches_call_the_model_on_one_shape_only():
    shapes = []

    def denoiser(latents, timestep, conditioning):
        shapes.append((tuple(latents.shape), tuple(conditioning.embedding_grid.shape)))
        return latents * conditioning.embedding_grid[:, :1, :1, :1]

    latents, grid = torch.randn(5, 4, 8, 8), torch.randn(5, 1, 1, 3)
    result = in_fixed_batches(denoiser, 2)(latents, torch.tensor(1), Conditioning(grid))
    assert set(shapes) == {((2, 4, 8, 8), (2, 1, 1, 3))}
    assert len(shapes) == 3
    assert torch.equal(result, latents * grid[:, :1, :1, :1])


@pytest.mark.parametrize("size", [1, 2])
def test_a_sample_depends_on_no_batch_and_no_number_of_threads_to_the_last_bit(size):
    """A model wide enough that matrix products are split over threads and that kernels differ by shape."""
    torch.manual_seed(0)
    model = awake(
        PixCellTransformer2DModel(
            num_attention_heads=16,
            num_layers=1,
            sample_size=16,
            caption_channels=12,
            interpolation_scale=0.25,
        )
    )
    denoiser = in_fixed_batches(guided(denoiser_of(model), 2.0), size)
    grid = torch.randn(4, 1, 1, 12, generator=torch.Generator().manual_seed(0))

    def sampled(batch_size):
        parts = []
        for start in range(0, 3, batch_size):
            rows = range(start, min(start + batch_size, 3))
            noise = torch.stack([noise_for(1, index, (16, 16, 16)) for index in rows])
            conditioning = Conditioning(grid[rows.start : rows.stop])
            parts.append(sample_latents(denoiser, make_scheduler(), noise, conditioning, 1))
        return torch.cat(parts)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        reference = sampled(3)
        assert all(torch.equal(sampled(batch_size), reference) for batch_size in (1, 2))
        torch.set_num_threads(2)
        assert all(torch.equal(sampled(batch_size), reference) for batch_size in (1, 3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_half_precision_models_are_fed_and_answer_in_float32(transformer):
    denoiser = denoiser_of(torch.nn.Module.to(transformer, torch.bfloat16))
    conditioning = Conditioning(torch.randn(2, 2, 2, 12))
    with torch.no_grad():
        assert denoiser(torch.randn(2, 4, 16, 16), torch.tensor(3), conditioning).dtype == torch.float32


def ignoring(latents, timestep, conditioning):
    return 0.5 * latents


class TestLearnedVariance:
    @pytest.fixture
    def case(self, transformer):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 4, 16, 16, generator=generator)
        return transformer, noise, Conditioning(torch.randn(2, 2, 2, 12, generator=generator))

    def sampled(self, denoiser, scheduler, noise, conditioning):
        generators = [generator_for(0, index) for index in range(2)]
        return sample_latents(denoiser, scheduler, noise, conditioning, 4, generators)

    def test_it_is_what_the_model_predicts(self, case):
        """With logits of -1 the variance is the schedule's own, which is the other ancestral solver."""
        transformer, noise, conditioning = case
        plain = denoiser_of(transformer)

        def smallest(latents, timestep, conditioning):
            predicted = plain(latents, timestep, conditioning)
            return torch.cat([predicted, torch.full_like(predicted, -1.0)], 1)

        fixed = self.sampled(plain, make_scheduler("ddpm"), noise, conditioning)
        learned = self.sampled(smallest, make_scheduler("ddpm-learned"), noise, conditioning)
        torch.testing.assert_close(learned, fixed, rtol=1e-4, atol=1e-4)
        full = denoiser_of(transformer, with_variance=True)
        predicted = self.sampled(full, make_scheduler("ddpm-learned"), noise, conditioning)
        assert not torch.allclose(predicted, fixed, atol=1e-2)

    def test_guidance_leaves_it_as_the_condition_has_it(self, case):
        transformer, noise, conditioning = case
        full, time = denoiser_of(transformer, with_variance=True), torch.tensor(500)
        with torch.no_grad():
            guided_twice = guided(full, 3.0)(noise, time, conditioning)
            conditional = full(noise, time, conditioning)
            by_itself = guided(denoiser_of(transformer), 3.0)(noise, time, conditioning)
        torch.testing.assert_close(guided_twice[:, 4:], conditional[:, 4:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(guided_twice[:, :4], by_itself, rtol=1e-4, atol=1e-5)

    def test_a_denoiser_without_it_is_refused(self, case):
        _, noise, conditioning = case
        with pytest.raises(ModelError, match=r"gives 4 channels for 4\. Take a model with learned variance"):
            self.sampled(ignoring, make_scheduler("ddpm-learned"), noise, conditioning)


class TestEta:
    def sampled(self, name, eta, seed=0):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(seed)
        return sample_latents(ignoring, make_scheduler(name), noise, Conditioning(), 5, generator, eta=eta)

    @pytest.mark.parametrize("name", ["ddim", "ddim-script", "ddim-ldm"])
    def test_it_is_the_share_of_fresh_noise(self, name):
        assert torch.equal(self.sampled(name, 0.0), self.sampled(name, None))
        assert torch.equal(self.sampled(name, 0.0, seed=1), self.sampled(name, 0.0, seed=2))
        assert not torch.equal(self.sampled(name, 1.0, seed=1), self.sampled(name, 1.0, seed=2))

    def test_solvers_that_do_not_know_it_say_so(self):
        with pytest.raises(ModelError, match="eta is for DDIM; DPMSolverMultistepScheduler has none"):
            self.sampled("dpm-solver++", 0.5)
        with pytest.raises(ModelError, match="eta is 2"):
            self.sampled("ddim", 2.0)


def test_a_timestep_per_sample_stays_with_its_sample_in_fixed_batches():
    def told(latents, timestep, conditioning):
        return latents * 0 + timestep[:, None, None, None]

    times = torch.tensor([3.0, 5.0, 7.0])
    made = in_fixed_batches(told, 2)(torch.zeros(3, 1, 1, 1), times, Conditioning())
    assert torch.equal(made.flatten(), times)
