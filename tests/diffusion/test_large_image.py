"""The published large-image samplers, step for step, and where ours differ from them."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.nn import functional

from golden_vectors import load, weights
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.guidance import guided
from pixcell.diffusion.large_image import GRAIKOS, PIXCELL, LargeImageScheduler, one_late
from pixcell.diffusion.respaced import RespacedDDIMScheduler
from pixcell.diffusion.sampling import sample_latents
from pixcell.diffusion.windows import between_fields, window_boxes, windowed
from pixcell.errors import ModelError
from pixcell.geometry import Box
from pixcell.models.codec import LatentCodec, to_uint8
from pixcell.models.published_configs import config_from_original
from pixcell.models.published_layouts import diffusers_from_original
from pixcell.models.transformer import PixCellTransformer2DModel

# As the reference states for trajectories; values reach a few hundred.
TRAJECTORY = {"rtol": 1e-3, "atol": 1e-3}


class PointwiseDecoder(nn.Module):
    """Stands in for a published autoencoder: what the vectors' decoders compute, as a VAE of diffusers."""

    def __init__(self, decode, channels, downsampling, **config):
        super().__init__()
        self._decode, self.channels, self.downsampling = decode, channels, downsampling
        self.config = type("Config", (), config)()
        self.weight = nn.Parameter(torch.zeros(()))

    def encode(self, images):
        height, width = (side // self.downsampling for side in images.shape[-2:])
        return {"latent": images.new_zeros(len(images), self.channels, height, width)}

    def decode(self, latents, return_dict=True):
        return type("Decoded", (), {"sample": self._decode(latents)})()


def truncated(images):
    """8-bit pictures as the reference makes them: (batch, height, width, 3), cut off instead of rounded."""
    return (images * 255).to(torch.uint8).permute(0, 2, 3, 1)


def assert_within_a_level(ours, theirs):
    torch.testing.assert_close(ours.int(), theirs.int(), rtol=0, atol=1)


# ── PixCell: 4096 pixels ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pixcell_case():
    tensors, case = load("large_image")
    model = PixCellTransformer2DModel(**config_from_original(**case["config"])).eval()
    model.load_state_dict(diffusers_from_original(weights(tensors)), strict=True)
    return model, tensors, case


@pytest.mark.parametrize("stride", [4, 8])
def test_the_published_4096_loop_is_guided_windows_under_a_scheduler(pixcell_case, stride):
    """Every latent of the trajectory, at half overlap and at none."""
    model, tensors, case = pixcell_case
    # Written (w + 1) c - w u there.
    denoiser = guided(denoiser_of(model), 1 + case["settings"]["guidance"])
    denoiser = windowed(denoiser, size=8, stride=stride, weight="uniform", latents_per_field=2)
    trajectory = []
    sample_latents(
        denoiser,
        LargeImageScheduler(**PIXCELL),
        tensors["in.x_init"],
        Conditioning(tensors["in.uni_grid"][None]),
        case["settings"]["nsteps"],
        on_step=lambda _n, _t, latents: trajectory.append(latents.clone()),
    )
    torch.testing.assert_close(
        torch.stack(trajectory), tensors[f"out.x_after_step_stride{stride}"], **TRAJECTORY
    )


@pytest.mark.parametrize("stride", [4, 8])
def test_published_pictures_are_windows_blended_by_gaussians(stride):
    tensors, case = load("large_image")

    def decode(raw):
        return functional.interpolate((raw[:, :3] / 200).tanh(), scale_factor=8, mode="nearest")

    settings = case["settings"]
    config = {"scaling_factor": settings["vae_scale"], "shift_factor": settings["vae_shift"]}
    codec = LatentCodec(PointwiseDecoder(decode, 16, 8, **config), "stand-in")
    latents = tensors[f"out.x_after_step_stride{stride}"][-1]
    images = codec.decode(latents, window=8, overlap=8 - stride, weight="gaussian")
    theirs = tensors[f"out.decoded_uint8_stride{stride}"]
    assert_within_a_level(truncated(images), theirs)
    # Ours are rounded, which is half a level brighter on average; theirs are cut off.
    ours = to_uint8(images).permute(0, 2, 3, 1)
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert (ours.float() - theirs.float()).mean() == pytest.approx(0.5, abs=0.1)


def test_the_published_loop_stops_short_of_the_clean_latents_and_ours_does_not():
    clean = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def left_over(scheduler):
        def perfect(latents, timestep, conditioning):
            share = scheduler.alphas_cumprod[int(timestep)]
            return (latents - share.sqrt() * clean) / (1 - share).sqrt()

        return (sample_latents(perfect, scheduler, noise, Conditioning(), 10) - clean).std()

    assert left_over(LargeImageScheduler(**PIXCELL)) == pytest.approx(0.01, rel=0.1)
    assert left_over(LargeImageScheduler(**PIXCELL | {"ends_clean": True})) < 1e-4


def test_where_steps_divide_the_training_steps_the_times_are_diffusers_trailing_ones():
    """And the sampler is plain DDIM; only windows make it one of large images."""
    plain = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def local(latents, timestep, conditioning):
        return latents.tanh() + timestep / 5000

    ours, theirs = (
        sample_latents(local, scheduler, noise, Conditioning(), 20)
        for scheduler in (LargeImageScheduler(**PIXCELL), plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ── Graikos et al. 2024, on PathLDM ──────────────────────────────────────────────────────────────────


def test_conditions_between_embeddings_are_the_published_ones():
    tensors, case = load("pathldm-largeimage-tiny")
    side, window = case["embedding_grid"], case["window"]
    conditioning = Conditioning(tensors["in.embeddings"].unflatten(0, (side, side))[None])
    interpolated = torch.cat(
        [
            between_fields(conditioning, Box(x, y, window, window), window).embedding_grid.flatten(0, 2)
            for y, x in tensors["grid.positions"].tolist()
        ]
    )
    torch.testing.assert_close(interpolated, tensors["grid.interpolated"], rtol=1e-4, atol=1e-5)
    context = projected(interpolated[:, None], tensors)
    torch.testing.assert_close(context, tensors["grid.context"], rtol=1e-4, atol=1e-5)


def test_the_windows_are_the_published_ones_in_their_order():
    tensors, case = load("pathldm-largeimage-tiny")
    boxes = window_boxes(32, 32, case["window"], case["window_stride"])
    assert [[box.y, box.x] for box in boxes] == tensors["grid.positions"].tolist()


@torch.no_grad()
def test_the_published_pathldm_panorama():
    """Interpolated conditions, guidance, fresh noise each step, and the decoded picture."""
    tensors, case = load("pathldm-largeimage-tiny")
    side, window, stride = case["embedding_grid"], case["window"], case["window_stride"]

    def network(latents, timestep, conditioning):
        grid, dropped = conditioning.embedding_grid, conditioning.dropped
        context = projected(grid.flatten(1, 2), tensors)
        if dropped is not None:
            context = torch.where(dropped[:, None, None], tensors["grid.uncond_context"], context)
        noise = math.cos(int(timestep) / 1000) * (0.8 * latents).tanh()
        return noise + 0.3 * context.mean((1, 2))[:, None, None, None] * latents.roll(1, -1)

    denoiser = windowed(
        guided(one_late(network), 1 + case["guidance_w"]),
        size=window,
        stride=stride,
        weight="uniform",
        conditions=between_fields,
        latents_per_field=window,
        windows_per_call=40,
    )
    conditioning = Conditioning(tensors["in.embeddings"].unflatten(0, (side, side))[None])
    scheduler = LargeImageScheduler(**GRAIKOS)
    scheduler.set_timesteps(1000 // case["timestep_stride"])
    # Noise is put in the place of the clean latents, and more noise is added to it.
    latents = scheduler.add_noise(tensors["pan.start_a"], tensors["pan.start_b"], scheduler.timesteps[:1])
    fresh = [*tensors["pan.step_noise"], None]  # the last step adds none
    for timestep, noise in zip(scheduler.timesteps, fresh, strict=True):
        prediction = denoiser(latents, timestep, conditioning)
        latents = scheduler.step(prediction, timestep, latents, variance_noise=noise).prev_sample
    torch.testing.assert_close(latents, tensors["pan.out"], **TRAJECTORY)

    def decode(raw):
        pixels = functional.interpolate(raw, scale_factor=case["decoder_factor"], mode="nearest")
        return (pixels + 0.1 * pixels.roll(1, -2)).tanh()

    codec = LatentCodec(PointwiseDecoder(decode, 3, case["decoder_factor"]), "stand-in")
    images = codec.decode(tensors["pan.out"], window=window, overlap=window - stride, weight="gaussian")
    assert_within_a_level(truncated(images), tensors["decode.image_uint8"])


def projected(embeddings, tensors):
    """The condition network of the case: unit length, then a linear layer."""
    unit = functional.normalize(embeddings, dim=-1)
    return functional.linear(unit, tensors["cond.weight"], tensors["cond.bias"])


# ── the scheduler ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("settings", [PIXCELL, GRAIKOS], ids=["pixcell", "graikos"])
def test_fresh_noise_depends_on_the_sample_alone(settings):
    def local(latents, timestep, conditioning):
        return 0.9 * latents.tanh()

    noise = torch.randn(3, 4, 6, 10, generator=torch.Generator().manual_seed(0))

    def sampled(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return sample_latents(
            local, LargeImageScheduler(**settings), noise[rows], Conditioning(), 7, generators
        )

    together = sampled([0, 1, 2])
    assert all(torch.equal(sampled([row])[0], together[row]) for row in range(3))


def test_steps_that_do_not_divide_take_the_published_number_of_steps():
    """1000 // 6 = 166 fits seven times: the published loop makes seven steps where six were asked for."""
    scheduler = LargeImageScheduler(**PIXCELL)
    scheduler.set_timesteps(6)
    assert scheduler.timesteps.tolist() == [999, 833, 667, 501, 335, 169, 3]


def test_it_is_saved_and_loaded_like_any_scheduler(tmp_path):
    LargeImageScheduler(**GRAIKOS).save_pretrained(tmp_path)
    again = LargeImageScheduler.from_pretrained(tmp_path)
    assert {key: again.config[key] for key in GRAIKOS} == GRAIKOS


def test_bad_settings_are_refused():
    with pytest.raises(ModelError, match="not 'sample'"):
        LargeImageScheduler(prediction_type="sample")
    for steps in (0, 1001):
        with pytest.raises(ModelError, match=f"{steps} sampling steps are not possible; choose 1 to 1000"):
            LargeImageScheduler().set_timesteps(steps)


def test_fresh_noise_of_long_steps_is_less_than_ddims():
    """The published variance is that of a step of one timestep: equal to DDIM's there, and only there."""
    ours = LargeImageScheduler(**GRAIKOS)
    ddim = RespacedDDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", eta=1.0, spacing="strided"
    )
    latents, nothing = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def added(scheduler, steps, place):
        """What a step adds to latents and a prediction of zero: the fresh noise alone."""
        scheduler.set_timesteps(steps)
        timestep = scheduler.timesteps[place]
        return scheduler.step(nothing, timestep, latents, variance_noise=noise).prev_sample.std()

    assert added(ours, 1000, 500) == pytest.approx(float(added(ddim, 1000, 500)), rel=1e-4)
    assert added(ours, 50, 25) < 0.5 * added(ddim, 50, 25)
