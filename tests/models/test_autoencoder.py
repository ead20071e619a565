"""The small autoencoder stands in for diffusers' own, and every latent of it is local."""

import pytest
import torch
from diffusers import AutoencoderKL

from pixcell.models.autoencoder import TissueAutoencoder


@pytest.fixture(scope="module")
def model():
    """Tiny, with every weight at work: some begin at zero."""
    torch.manual_seed(0)
    result = TissueAutoencoder(latent_channels=4, channels=(8, 16), num_blocks=1)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return result.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 192, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_eight_pixels_a_side_become_one_latent(model, images):
    posterior = model.encode(images).latent_dist
    assert posterior.mean.shape == posterior.std.shape == (2, 4, 24, 32)
    assert model.decode(posterior.mean).sample.shape == images.shape


@pytest.mark.parametrize("channels", [3, 4, 16])
def test_latent_channels_are_a_choice(channels):
    tiny = TissueAutoencoder(latent_channels=channels, channels=(8, 8), num_blocks=1)
    assert tiny.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean.shape == (1, channels, 2, 2)
    assert tiny(torch.zeros(1, 3, 16, 16)).sample.shape == (1, 3, 16, 16)


def test_its_methods_answer_as_those_of_diffusers(model, images):
    """Code written for AutoencoderKL runs on either."""
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
    )
    for vae in (model, theirs):
        posterior = vae.encode(images).latent_dist
        assert torch.equal(posterior.mode(), posterior.mean)
        draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert posterior.kl().shape == (2,)
        torch.testing.assert_close(vae.decode(draws[0], return_dict=False)[0], vae.decode(draws[0]).sample)
        torch.testing.assert_close(vae(images).sample, vae.decode(posterior.mean).sample)
        assert {"latent_channels", "scaling_factor", "shift_factor"} <= set(vae.config)


def test_latents_of_a_cut_are_the_cut_of_the_latents(model, images):
    """Away from the border of the cut; so fields may be cut from stored latents of a tile."""
    margin = model.reach
    whole = model.encode(images).latent_dist.mean[..., 4:20, 8:28]
    cut = model.encode(images[..., 32:160, 64:224]).latent_dist.mean
    inside = (..., slice(margin, -margin), slice(margin, -margin))
    torch.testing.assert_close(
        cut[inside], whole[inside], rtol=1e-4, atol=1e-5
    )  # other kernels for other sizes
    assert not torch.allclose(cut, whole, atol=1e-3), (
        "the border of a cut must show, or this test sees nothing"
    )


def test_nothing_reaches_further_than_it_says(model, images):
    """Change one latent, or the pixels of one: what lies beyond ``reach`` stays as it is, to the last bit."""
    latents = model.encode(images).latent_dist.mean
    changed_latents = latents.clone()
    changed_latents[..., 12, 16] += 5
    difference = model.decode(changed_latents).sample - model.decode(latents).sample
    beyond = torch.ones(192, 256, dtype=torch.bool)
    reach = 8 * model.reach
    beyond[max(0, 96 - reach) : 104 + reach, max(0, 128 - reach) : 136 + reach] = False
    assert beyond.any()
    assert not difference[..., beyond].any()
    assert difference[..., ~beyond].any()

    changed = images.clone()
    changed[..., 96:104, 128:136] *= -1
    difference = model.encode(changed).latent_dist.mean - latents
    beyond = torch.ones(24, 32, dtype=torch.bool)
    beyond[12 - model.reach : 13 + model.reach, 16 - model.reach : 17 + model.reach] = False
    assert not difference[..., beyond].any()
    assert difference[..., ~beyond].any()


def test_the_default_is_small_and_begins_narrow():
    model = TissueAutoencoder()
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 3.5e6
    std = model.encode(torch.zeros(1, 3, 32, 32)).latent_dist.std
    assert 0.05 < std.mean() < 0.3


def test_every_weight_learns():
    """No gradient is zero after the first step; at the start the last layers of blocks are."""
    torch.manual_seed(0)
    model = TissueAutoencoder(latent_channels=4, channels=(8, 16), num_blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    for _ in range(3):
        optimizer.zero_grad()
        posterior = model.encode(images).latent_dist
        (model.decode(posterior.sample()).sample - images).square().mean().backward()
        optimizer.step()
    silent = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not silent


def test_a_saved_model_is_the_same_model(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".json"] == [".safetensors"]
    loaded = TissueAutoencoder.from_pretrained(tmp_path)
    assert list(loaded.config.channels) == [8, 16]
    assert torch.equal(loaded(images).sample, model(images).sample)


def test_a_side_that_is_no_multiple_of_eight_is_refused(model):
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(torch.zeros(1, 3, 64, 60))
