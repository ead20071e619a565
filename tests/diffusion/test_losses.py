"""The loss is the published one, term for term, and is computed in float32."""

import pytest
import torch

from golden_vectors import load
from original_models import original_model
from pixcell.diffusion.losses import FlowSchedule, NoiseSchedule, denoising_loss
from pixcell.diffusion.noise_schedules import PATHLDM_SCHEDULE
from pixcell.models.pathldm import ClassEmbedder, unet_from_ldm
from pixcell.models.pathldm_layout import from_ldm, ldm_names
from pixcell.models.published_layouts import diffusers_from_original

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SCHEDULE = NoiseSchedule()


@pytest.fixture(scope="module")
def reference():
    return original_model("iddpm_loss")[:2]


def test_tables_are_the_reference_tables():
    tensors, _ = load("iddpm_loss")
    for name, table in {
        "betas": SCHEDULE.betas,
        "alphas_cumprod": SCHEDULE.alpha_bar,
        "posterior_variance": SCHEDULE.posterior_variance,
        "posterior_log_variance_clipped": SCHEDULE.posterior_log_variance,
        "posterior_mean_coef1": SCHEDULE.posterior_mean_of_clean,
        "posterior_mean_coef2": SCHEDULE.posterior_mean_of_noisy,
    }.items():
        torch.testing.assert_close(table, tensors[f"out.table.{name}"], rtol=1e-12, atol=1e-15)


def test_terms_and_gradients_are_the_reference_ones(reference):
    model, tensors = reference
    latents, noise, timesteps = tensors["in.x0"], tensors["in.noise"], tensors["in.t"]
    assert 0 in timesteps.tolist(), "the likelihood term is part of the case"
    noisy = SCHEDULE.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy, tensors["out.x_t"], **CLOSE)
    prediction = model(noisy, timesteps, tensors["in.y"].squeeze(1)).sample
    terms = denoising_loss(prediction, latents, noise, timesteps, SCHEDULE)
    torch.testing.assert_close(terms.mse, tensors["out.mse"], **CLOSE)
    torch.testing.assert_close(terms.bound, tensors["out.vb"], **CLOSE)
    torch.testing.assert_close(terms.loss, tensors["out.loss"], **CLOSE)

    model.zero_grad()
    terms.loss.mean().backward()
    parameters = dict(model.named_parameters())
    golden = {name[9:]: value for name, value in tensors.items() if name.startswith("out.grad.")}
    assert golden
    for name, gradient in diffusers_from_original(golden).items():
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-4, atol=1e-4)


def test_the_variant_that_counts_errors_of_clean_latents_at_clean_steps_is_the_reference_one(reference):
    model, tensors = reference
    latents, noise, timesteps = tensors["in.x0"], tensors["in.noise"], tensors["in.t"]
    assert (timesteps < 250).any()
    assert (timesteps >= 250).any()
    noisy = SCHEDULE.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        prediction = model(noisy, timesteps, tensors["in.y"].squeeze(1)).sample
    terms = denoising_loss(prediction, latents, noise, timesteps, SCHEDULE, clean_below=250)
    torch.testing.assert_close(terms.mse, tensors["out.mse_snr_variant"], **CLOSE)


class TestPathLDM:
    @pytest.fixture(scope="class")
    def case(self):
        tensors, about = load("pathldm-unet-tiny")
        unet = unet_from_ldm(**about["config"])
        state = {name[5:]: value.float() for name, value in tensors.items() if name.startswith("unet.")}
        unet.load_state_dict(from_ldm(unet, state), strict=True)
        return unet.train(), load("pathldm-loss-tiny")[0]

    def terms(self, unet, tensors, context):
        noisy = PATHLDM_SCHEDULE.add_noise(tensors["in.x0"], tensors["in.noise"], tensors["in.t"])
        prediction = unet(noisy, tensors["in.t"], context).sample
        loss = denoising_loss(
            prediction, tensors["in.x0"], tensors["in.noise"], tensors["in.t"], PATHLDM_SCHEDULE
        )
        return noisy, prediction, loss

    def test_loss_and_gradients_are_the_reference_ones(self, case):
        unet, tensors = case
        unet.zero_grad()
        noisy, prediction, terms = self.terms(unet, tensors, tensors["in.context"])
        torch.testing.assert_close(noisy, tensors["out.x_noisy"], **CLOSE)
        torch.testing.assert_close(prediction, tensors["out.pred"], rtol=0, atol=1e-4)
        torch.testing.assert_close(terms.loss, tensors["out.loss_per_sample"], rtol=1e-4, atol=0)
        torch.testing.assert_close(terms.loss.mean()[None], tensors["out.loss"], rtol=1e-4, atol=0)
        logged = (PATHLDM_SCHEDULE.bound_weights[tensors["in.t"]] * terms.mse).mean()
        torch.testing.assert_close(logged.float()[None], tensors["out.loss_vlb"], rtol=1e-4, atol=0)
        terms.loss.mean().backward()
        parameters = dict(unet.named_parameters())
        golden = {name[5:]: value.float() for name, value in tensors.items() if name.startswith("grad.")}
        golden.pop("class_embedding")
        for name, gradient in from_ldm(unet, golden).items():
            close = 1e-3 * gradient.abs().max().item()  # stored in half precision where they are large
            torch.testing.assert_close(parameters[name].grad, gradient, rtol=0, atol=close)

    def test_norms_of_all_gradients_are_the_reference_ones(self, case):
        unet, tensors = case
        unet.zero_grad()
        self.terms(unet, tensors, tensors["in.context"])[2].loss.mean().backward()
        norms = load("pathldm-loss-tiny")[1]["grad_norms"]
        names = ldm_names(unet)
        gradients = {names[name]: value.grad for name, value in unet.named_parameters()}
        assert set(norms) == set(gradients)
        for name, norm in norms.items():
            # gradients that are zero but for rounding come out different each time
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name

    def test_classes_instead_of_text_have_the_reference_loss_and_gradient(self, case):
        unet, tensors = case
        embedder = ClassEmbedder(*tensors["class_embedding"].shape)
        embedder.embedding.weight.data.copy_(tensors["class_embedding"])
        context = embedder(tensors["labels"])
        torch.testing.assert_close(context, tensors["class_context"], rtol=0, atol=0)
        loss = self.terms(unet, tensors, context)[2].loss.mean()
        torch.testing.assert_close(loss[None], tensors["out.loss_class"], rtol=1e-4, atol=0)
        loss.backward()
        expected = tensors["grad.class_embedding"]
        close = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(embedder.embedding.weight.grad, expected, rtol=0, atol=close)


def batch(timesteps=(0, 1, 500, 999), channels=3):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(timesteps), channels, 4, 4, generator=generator)
    return latents, noise, torch.tensor(timesteps)


def test_a_perfect_prediction_costs_nothing_but_the_likelihood_of_the_data():
    latents, noise, timesteps = batch()
    logits = torch.full_like(noise, -1.0)  # the smallest variance, which is the posterior's
    terms = denoising_loss(torch.cat([noise, logits], 1), latents, noise, timesteps, SCHEDULE)
    assert not terms.mse.any()
    torch.testing.assert_close(terms.bound[1:], torch.zeros(3), rtol=0, atol=1e-5)
    assert terms.bound[0] > 0


def test_the_bound_does_not_train_the_noise():
    latents, noise, timesteps = batch()
    prediction = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    denoising_loss(prediction, latents, noise, timesteps, SCHEDULE).bound.sum().backward()
    assert not prediction.grad[:, :3].any()
    assert prediction.grad[:, 3:].any()


def test_without_variance_channels_the_loss_is_the_squared_error():
    latents, noise, timesteps = batch()
    terms = denoising_loss(torch.zeros_like(noise), latents, noise, timesteps, SCHEDULE)
    assert terms.bound is None
    torch.testing.assert_close(terms.loss, noise.square().mean((1, 2, 3)))


def test_loss_is_float32_under_autocast_and_for_half_precision_output():
    latents, noise, timesteps = batch()
    prediction = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = denoising_loss(prediction.float(), latents, noise, timesteps, SCHEDULE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = denoising_loss(prediction, latents, noise, timesteps, SCHEDULE)
    assert inside.loss.dtype == torch.float32
    assert torch.equal(inside.loss, exact.loss)


def test_min_snr_tames_clean_steps_and_leaves_noisy_ones():
    latents, noise, timesteps = batch(timesteps=(1, 999))
    plain = denoising_loss(torch.zeros_like(noise), latents, noise, timesteps, SCHEDULE)
    weighted = denoising_loss(torch.zeros_like(noise), latents, noise, timesteps, SCHEDULE, min_snr_gamma=5.0)
    snr = SCHEDULE.snr[1].item()
    assert snr > 5
    torch.testing.assert_close(weighted.loss, plain.loss * torch.tensor([5 / snr, 1.0]))
    assert torch.equal(weighted.mse, plain.mse)


def test_other_numbers_of_channels_are_refused():
    latents, noise, timesteps = batch()
    with pytest.raises(ValueError, match="5 output channels"):
        denoising_loss(torch.zeros(4, 5, 4, 4), latents, noise, timesteps, SCHEDULE)


def test_latents_noise_and_velocity_say_the_same_thing():
    """Any two of noisy latents, noise and velocity give the third."""
    latents, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    timesteps = torch.tensor([0, 1, 500, 999])
    noisy = SCHEDULE.add_noise(latents, noise, timesteps)
    velocity = SCHEDULE.velocity(latents, noise, timesteps)
    torch.testing.assert_close(SCHEDULE.noise_in(noisy, velocity, timesteps), noise)


def test_a_perfect_velocity_has_no_error_and_the_bound_of_perfect_noise():
    latents, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    timesteps = torch.tensor([1, 20, 500, 999])
    logits = torch.zeros_like(latents)
    velocity = SCHEDULE.velocity(latents, noise, timesteps)
    ours = denoising_loss(
        torch.cat([velocity, logits], 1), latents, noise, timesteps, SCHEDULE, target="velocity"
    )
    by_noise = denoising_loss(torch.cat([noise, logits], 1), latents, noise, timesteps, SCHEDULE)
    assert ours.mse.max() < 1e-10
    torch.testing.assert_close(ours.bound, by_noise.bound, rtol=1e-3, atol=1e-4)


def test_min_snr_weighs_the_same_error_in_clean_latents_alike_for_both_targets():
    """min(snr, gamma) times the squared error of the clean latents, whatever is predicted."""
    latents, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    timesteps = torch.tensor([1, 100, 500, 900])
    alpha_bar = SCHEDULE.alpha_bar[timesteps].float()[:, None, None, None]
    off = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    as_noise = noise - off * (alpha_bar / (1 - alpha_bar)).sqrt()
    as_velocity = SCHEDULE.velocity(latents, noise, timesteps) - off / (1 - alpha_bar).sqrt()
    by_noise = denoising_loss(as_noise, latents, noise, timesteps, SCHEDULE, 5.0)
    by_velocity = denoising_loss(as_velocity, latents, noise, timesteps, SCHEDULE, 5.0, target="velocity")
    torch.testing.assert_close(by_noise.loss, by_velocity.loss, rtol=1e-4, atol=1e-6)


class TestFlow:
    def test_a_perfect_flow_has_no_error(self):
        latents, noise, _ = batch()
        timesteps = torch.tensor([1, 2, 500, 1000])
        terms = denoising_loss(noise - latents, latents, noise, timesteps, FlowSchedule(), target="flow")
        assert not terms.loss.any()
        assert terms.bound is None

    def test_min_snr_weighs_the_same_error_in_clean_latents_as_for_other_targets(self):
        """min(snr, gamma) times the squared error of the clean latents, whatever is predicted."""
        latents, noise, _ = batch()
        timesteps, schedule = torch.tensor([100, 300, 500, 900]), FlowSchedule()
        off = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        sigma = schedule.sigma_at(timesteps)[:, None, None, None]
        terms = denoising_loss(
            noise - latents - off / sigma, latents, noise, timesteps, schedule, 5.0, target="flow"
        )
        expected = schedule.snr_at(timesteps).clamp(max=5.0) * off.square().mean((1, 2, 3))
        torch.testing.assert_close(terms.loss, expected, rtol=1e-4, atol=1e-6)

    def test_it_has_a_schedule_of_its_own_and_no_variance(self):
        latents, noise, _ = batch()
        timesteps = torch.tensor([1, 2, 3, 4])
        for schedule, target in ((SCHEDULE, "flow"), (FlowSchedule(), "noise"), (FlowSchedule(), "velocity")):
            with pytest.raises(
                ValueError, match=f"target '{target}' does not go with a {type(schedule).__name__}"
            ):
                denoising_loss(noise, latents, noise, timesteps, schedule, target=target)
        twice = torch.cat([noise, noise], 1)
        with pytest.raises(ValueError, match="no variance to learn"):
            denoising_loss(twice, latents, noise, timesteps, FlowSchedule(), target="flow")


class TestCleanBelow:
    @pytest.mark.parametrize("target", ["noise", "velocity"])
    def test_below_it_the_error_is_that_of_the_clean_latents(self, target):
        latents, noise, timesteps = batch(timesteps=(1, 100, 249, 250))
        off = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        alpha_bar = SCHEDULE.alpha_bar[timesteps].float()[:, None, None, None]
        predictions = {
            "noise": noise - off * (alpha_bar / (1 - alpha_bar)).sqrt(),
            "velocity": SCHEDULE.velocity(latents, noise, timesteps) - off / (1 - alpha_bar).sqrt(),
        }
        given = (predictions[target], latents, noise, timesteps, SCHEDULE)
        terms = denoising_loss(*given, target=target, clean_below=250)
        plain = denoising_loss(*given, target=target)
        errors = off.square().mean((1, 2, 3))
        torch.testing.assert_close(terms.mse[:3], errors[:3], rtol=1e-3, atol=0)
        assert torch.equal(terms.mse[3], plain.mse[3])
        assert torch.equal(terms.loss, terms.mse)

    def test_the_bound_stays(self):
        latents, noise, timesteps = batch()
        prediction = torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(1))
        terms = denoising_loss(prediction, latents, noise, timesteps, SCHEDULE, clean_below=250)
        plain = denoising_loss(prediction, latents, noise, timesteps, SCHEDULE)
        assert torch.equal(terms.bound, plain.bound)

    def test_two_weightings_at_once_are_refused(self):
        latents, noise, timesteps = batch()
        with pytest.raises(ValueError, match="two ways of weighing errors"):
            denoising_loss(noise, latents, noise, timesteps, SCHEDULE, 5.0, clean_below=250)
