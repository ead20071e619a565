"""The loss is the published one, term for term, and is computed in float32."""

import pytest
import torch

from golden_vectors import load, weights
from pixcell.diffusion.losses import NoiseSchedule, denoising_loss
from pixcell.models.transformer import PixCellTransformer2DModel

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SCHEDULE = NoiseSchedule()

# Names of the reference's first layout, as far as the golden gradients need them.
RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc": "caption_projection.linear_",
    "y_embedder.y_embedding": "caption_projection.uncond_embedding",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
    "blocks.": "transformer_blocks.",
    ".attn.proj": ".attn1.to_out.0",
    ".cross_attn.proj": ".attn2.to_out.0",
    ".cross_attn.q_linear": ".attn2.to_q",
    ".mlp.fc1": ".ff.net.0.proj",
    ".mlp.fc2": ".ff.net.2",
}


def renamed(name):
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def in_our_layout(state):
    result = {}
    for name, value in state.items():
        name = renamed(name)
        if name == "pos_embed":
            continue
        joined = {".attn.qkv.": (".attn1.to_", "qkv"), ".cross_attn.kv_linear.": (".attn2.to_", "kv")}
        for old, (new, letters) in joined.items():
            if old in name:
                parts = value.chunk(len(letters))
                result |= {
                    name.replace(old, f"{new}{x}."): part for x, part in zip(letters, parts, strict=True)
                }
                break
        else:
            result[name] = value
    return result


@pytest.fixture(scope="module")
def reference():
    tensors, case = load("iddpm_loss")
    config = case["config"]
    model = PixCellTransformer2DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        in_channels=config["in_channels"],
        out_channels=2 * config["in_channels"],
        num_layers=config["depth"],
        cross_attention_dim=config["hidden_size"],
        sample_size=config["input_size"],
        interpolation_scale=config["pe_interpolation"],
        caption_channels=config["caption_channels"],
        caption_num_tokens=config["model_max_length"],
    )
    model.load_state_dict(in_our_layout(weights(tensors)), strict=True)
    return model, tensors


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
    golden = [name for name in tensors if name.startswith("out.grad.")]
    assert golden
    for name in golden:
        gradient = parameters[renamed(name.removeprefix("out.grad."))].grad
        torch.testing.assert_close(gradient, tensors[name], rtol=1e-4, atol=1e-4)


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
