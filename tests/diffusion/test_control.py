"""A mask becomes latents as any picture does, and acts on the rows that have one."""

import numpy as np
import pytest
import torch
from PIL import Image

from golden_vectors import load
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.control import as_control, control_by, control_latents_of, control_pictures
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.guidance import guided
from pixcell.diffusion.sampling import in_fixed_batches, make_scheduler, sample_latents
from pixcell.errors import ModelError
from pixcell.models.codec import LatentCodec
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.transformer import PixCellTransformer2DModel
from tiny_models import tiny_controlnet, tiny_transformer, tiny_vae

SIZE = (128, 128)


def mask(seed=0):
    """Blobs of white on black, boolean."""
    coarse = np.random.default_rng(seed).random((8, 8)) > 0.6
    return coarse.repeat(16, axis=0).repeat(16, axis=1)


@pytest.fixture(scope="module")
def codec():
    return LatentCodec(tiny_vae(), "tiny")


@pytest.fixture(scope="module")
def models():
    return tiny_transformer(), tiny_controlnet()


def rows(number=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        torch.randn(number, 2, 2, 12, generator=generator),
        control_latents=torch.randn(number, 4, 16, 16, generator=generator),
    )


def latents(number=3, seed=1):
    return torch.randn(number, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


class TestPictures:
    def test_all_forms_of_one_mask_are_the_same_picture(self):
        white = mask()
        bytes_ = (white * 255).astype(np.uint8)
        colour = np.repeat(bytes_[..., None], 3, axis=2)
        forms = [
            Image.fromarray(white),
            Image.fromarray(bytes_),
            Image.fromarray(colour),
            [Image.fromarray(bytes_)],
            white,
            bytes_,
            bytes_[..., None],
            colour,
            colour[None],
            bytes_[None],
            torch.from_numpy(white),
            torch.from_numpy(bytes_)[None],
            torch.from_numpy(colour).permute(2, 0, 1)[None],
        ]
        expected = torch.from_numpy(colour).permute(2, 0, 1)[None]
        for form in forms:
            assert torch.equal(control_pictures(form, *SIZE), expected), type(form)
        for form in (white.astype(np.float64), torch.from_numpy(white).float()[None, None]):
            pictures = control_pictures(form, *SIZE)
            assert pictures.dtype == torch.float32
            assert torch.equal(pictures * 255, expected.float())

    def test_batches_keep_their_order(self):
        several = np.stack([mask(seed) for seed in range(3)])
        pictures = control_pictures(several, *SIZE)
        assert pictures.shape == (3, 3, *SIZE)
        for index in range(3):
            assert torch.equal(pictures[index, 0] > 0, torch.from_numpy(several[index]))

    @pytest.mark.parametrize(
        ("control", "message"),
        [
            (mask().astype(np.uint8), "brightest pixel of the control image is 1 of 255"),
            (mask().astype(np.int64), r"control image of torch\.int64 was given"),
            (mask().astype(np.float32) * 2, "reaches from 0 to 2"),
            (mask().astype(np.float32) * 2 - 1, "reaches from -1 to 1"),
            (np.full((128, 128), np.nan, np.float32), "reaches from nan to nan"),
            (mask()[:64], "is 64 x 128 pixels, the picture to be made 128 x 128"),
            (torch.zeros(1, 4, 128, 128), r"shape \(1, 4, 128, 128\)"),
            (torch.zeros(1, 1, 1, 128, 128), "Expected PIL pictures"),
            (Image.fromarray(mask().astype(np.int32)), "mode 'I'"),
            ([], "no control image was given"),
            ([Image.new("L", (8, 8)), Image.new("L", (8, 9))], "must all be equally large"),
        ],
    )
    def test_what_is_no_control_image_is_refused(self, control, message):
        with pytest.raises(ModelError, match=message):
            control_pictures(control, *SIZE)

    def test_an_empty_mask_is_a_mask(self):
        """Tissue without cells is a legitimate wish."""
        assert not control_pictures(np.zeros(SIZE, bool), *SIZE).any()


class TestLatents:
    def test_a_mask_is_encoded_to_its_normalised_posterior_mean(self, codec):
        white = mask()
        colour = torch.from_numpy(white).float().expand(1, 3, -1, -1)
        with torch.no_grad():
            mean = codec.vae.encode(colour * 2 - 1).latent_dist.mean
        expected = (mean - 0.1) * 0.7  # of tiny_vae
        torch.testing.assert_close(control_latents_of(codec, white, *SIZE), expected)

    def test_a_mask_does_not_depend_on_others_in_its_batch(self, codec):
        several = np.stack([mask(seed) for seed in range(3)])
        together = control_latents_of(codec, several, *SIZE)
        assert torch.equal(together[1:2], control_latents_of(codec, several[1], *SIZE))

    def test_latents_are_taken_as_they_are(self, codec):
        given = latents()
        assert as_control(codec, given, *SIZE) is given
        assert torch.equal(control_latents_of(codec, given, *SIZE), given)

    def test_a_codec_in_half_precision_takes_masks_too(self):
        """The published pipeline forces float32 on the mask and breaks in half precision."""
        exact = control_latents_of(LatentCodec(tiny_vae(), "tiny"), mask(), *SIZE)
        half = control_latents_of(LatentCodec(tiny_vae(), "tiny", dtype=torch.bfloat16), mask(), *SIZE)
        assert half.dtype == torch.float32
        assert (half - exact).abs().mean() < 0.05 * exact.abs().mean()


class TestControlledDenoiser:
    @torch.no_grad()
    def test_a_scale_of_nothing_is_no_control(self, models):
        transformer, branch = models
        denoiser, plain = denoiser_of(transformer, control_by(branch)), denoiser_of(transformer)
        with_control, timestep = rows(), torch.tensor(500)
        expected = plain(latents(), timestep, Conditioning(with_control.embedding_grid))
        nothing = with_control.drop_control(torch.ones(3, dtype=torch.bool))
        assert torch.equal(denoiser(latents(), timestep, nothing), expected)
        assert not torch.allclose(denoiser(latents(), timestep, with_control), expected)

    @torch.no_grad()
    def test_the_branch_sees_controlled_rows_only(self, models):
        transformer, branch = models
        seen = []
        hook = branch.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
        denoiser = denoiser_of(transformer, control_by(branch))
        conditioning = rows().drop(torch.tensor([False, True, False]))
        mixed = denoiser(latents(), torch.tensor(500), conditioning)
        hook.remove()
        assert [len(given) for given in seen] == [2]
        assert torch.equal(seen[0], latents()[[0, 2]])
        plain = denoiser_of(transformer)(latents(), torch.tensor(500), conditioning)
        torch.testing.assert_close(mixed[1], plain[1], rtol=1e-5, atol=1e-6)
        whole = denoiser(latents(), torch.tensor(500), rows())
        torch.testing.assert_close(mixed[::2], whole[::2], rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_dropped_rows_are_the_null_condition_without_control(self, models):
        transformer, branch = models
        denoiser = denoiser_of(transformer, control_by(branch))
        dropped = denoiser(latents(), torch.tensor(500), rows().dropped_everywhere())
        null = denoiser_of(transformer)(latents(), torch.tensor(500), Conditioning())
        torch.testing.assert_close(dropped, null)

    @torch.no_grad()
    def test_a_timestep_for_each_sample_reaches_its_row(self, models):
        transformer, branch = models
        denoiser = denoiser_of(transformer, control_by(branch))
        conditioning = rows().drop(torch.tensor([True, False, False]))
        times = torch.tensor([10, 400, 900])
        together = denoiser(latents(), times, conditioning)
        alone = denoiser(latents()[2:], times[2:], conditioning.select([2]))
        torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_control_without_embeddings_acts_too(self, models):
        transformer, branch = models
        denoiser = denoiser_of(transformer, control_by(branch))
        alone = Conditioning(control_latents=rows().control_latents)
        null = transformer.unconditional_embedding.unflatten(0, (2, 2)).expand(3, -1, -1, -1)
        with_null = Conditioning(null, control_latents=alone.control_latents)
        made = denoiser(latents(), torch.tensor(500), alone)
        torch.testing.assert_close(
            made, denoiser(latents(), torch.tensor(500), with_null), rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(made, denoiser(latents(), torch.tensor(500), Conditioning()))

    @torch.no_grad()
    def test_guidance_of_one_is_the_conditional_branch_with_control(self, models):
        transformer, branch = models
        denoiser = denoiser_of(transformer, control_by(branch))
        one = guided(denoiser, 1.0)(latents(), torch.tensor(500), rows())
        assert torch.equal(one, denoiser(latents(), torch.tensor(500), rows()))

    @torch.no_grad()
    def test_guidance_moves_away_from_no_condition_and_no_control(self, models):
        transformer, branch = models
        denoiser = denoiser_of(transformer, control_by(branch))
        moved = guided(denoiser, 2.5)(latents(), torch.tensor(500), rows())
        conditional = denoiser(latents(), torch.tensor(500), rows())
        null = denoiser(latents(), torch.tensor(500), Conditioning())
        torch.testing.assert_close(moved, null + 2.5 * (conditional - null), rtol=1e-3, atol=1e-4)

    @torch.no_grad()
    def test_fixed_batches_change_nothing(self, models):
        transformer, branch = models
        denoiser = guided(denoiser_of(transformer, control_by(branch)), 2.0)
        together = in_fixed_batches(denoiser, 2)(latents(), torch.tensor(500), rows())
        alone = in_fixed_batches(denoiser, 2)(latents()[1:2], torch.tensor(500), rows().select([1]))
        assert torch.equal(together[1:2], alone)

    @torch.no_grad()
    def test_half_precision_is_close(self, models):
        exact = denoiser_of(models[0], control_by(models[1]))(latents(), torch.tensor(500), rows())
        half = denoiser_of(
            tiny_transformer().to(torch.bfloat16), control_by(tiny_controlnet().to(torch.bfloat16))
        )(latents(), torch.tensor(500), rows())
        assert half.dtype == torch.float32
        assert (half - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_guided_sampling_with_a_mask_walks_the_published_way():
    tensors, case = load("controlnet_sampling")
    models = []
    for name, kind in (("transformer", PixCellTransformer2DModel), ("controlnet", PixCellControlNetModel)):
        prefix = f"w.{name}."
        state = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
        model = kind(**case["config"][name]).eval()
        model.load_state_dict(state, strict=True)
        models.append(model)
    conditioning = Conditioning(
        tensors["in.uni_embeds"].unflatten(1, (1, 1)), control_latents=tensors["in.conditioning"]
    )
    scheduler, trajectory = make_scheduler(), []
    sample_latents(
        guided(denoiser_of(models[0], control_by(models[1])), float(tensors["in.guidance"])),
        scheduler,
        tensors["in.noise"],
        conditioning,
        case["settings"]["steps"],
        on_step=lambda _n, _t, latents: trajectory.append(latents.clone()),
    )
    assert torch.equal(scheduler.timesteps, tensors["out.timesteps"])
    # a trajectory of a random model reaches a few hundred: tests/golden states rtol 1e-3
    torch.testing.assert_close(torch.stack(trajectory), tensors["out.trajectory"], rtol=1e-3, atol=1e-3)
