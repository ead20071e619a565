"""The autoencoding objective, on a tiny store."""

import pytest
import torch

from pixcell.errors import RecipeError
from pixcell.models.codec import LatentCodec
from pixcell.training.determinism import rng_for
from pixcell.training.objectives import Objective, Samples, spread_over
from pixcell.training.recipe import build_objective


def test_it_keeps_the_protocol(codec_recipe):
    objective = build_objective(codec_recipe())
    assert isinstance(objective, Objective)
    assert isinstance(objective.samples, Samples)


def test_a_crop_is_a_flipped_or_turned_part_of_its_field(codec_recipe):
    samples = build_objective(codec_recipe("objective.crop_size=64")).samples
    original = samples.fields[samples._kept[0]]["image"]
    turned = [original.rot90(quarter, (1, 2)) for quarter in range(4)]
    possible = {image.numpy().tobytes() for image in (*turned, *(image.flip(2) for image in turned))}
    drawn = {
        one["image"].numpy().tobytes()
        for one in samples.draw([0] * 64, [rng_for(0, 0, place) for place in range(64)])
    }
    assert drawn == possible


def test_crops_reach_every_border(codec_recipe):
    samples = build_objective(codec_recipe("objective.crop_size=56")).samples  # 9 places along a side of 64
    drawn = samples.draw([0] * 200, [rng_for(0, 0, place) for place in range(200)])
    image = samples.fields[samples._kept[0]]["image"]
    corners = [image[:, y : y + 56, x : x + 56] for y in (0, 8) for x in (0, 8)]
    shown = [one["image"] for one in drawn]
    for corner in corners:
        turned = [corner.rot90(quarter, (1, 2)) for quarter in range(4)]
        turned += [one.flip(2) for one in turned]
        assert any(torch.equal(one, crop) for one in turned for crop in shown)


def test_exported_latents_have_zero_mean_and_unit_variance(codec_recipe, tmp_path):
    objective = build_objective(codec_recipe())
    objective.export(tmp_path, None)
    codec = LatentCodec.from_pretrained(tmp_path)
    fields = objective.samples.fields
    mean, std = codec.encode(torch.stack([fields[index]["image"] for index in objective._measured_on]))
    latents = codec.normalise(mean + std * torch.randn(std.shape, generator=torch.Generator().manual_seed(0)))
    # The scale is exact for infinitely many draws; 384 values a channel leave about 1/sqrt(384) of chance.
    assert latents.mean((0, 2, 3)).abs().max() < 0.2
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.2)


def test_a_perfect_reconstruction_leaves_only_the_divergence(codec_recipe, monkeypatch):
    objective = build_objective(codec_recipe("objective.kl=0.5"))
    batch = torch.utils.data.default_collate(objective.samples.draw([0], [rng_for(0)]))
    images = batch["image"].float() / 127.5 - 1
    monkeypatch.setattr(objective.trainable, "decode", lambda latents, return_dict: (images,))
    losses = objective.loss(batch)
    parts = losses.parts
    assert parts["pixels"] == parts["edges"] == 0
    torch.testing.assert_close(losses.per_sample, 0.5 * parts["kl"])
    assert parts["kl"] > 0


def test_a_crop_larger_than_the_field_is_refused(codec_recipe):
    with pytest.raises(RecipeError, match=r"crop_size 128 is larger than data\.size 64"):
        build_objective(codec_recipe("objective.crop_size=128"))


def test_one_field_is_too_few_to_hold_one_out(codec_recipe, single_tile_store):
    with pytest.raises(RecipeError, match=r"1 field\(s\) of 64 px are too few"):
        build_objective(codec_recipe(f"data.store={single_tile_store.path}"))


def test_held_out_numbers_are_spread_and_never_all():
    assert spread_over(8, 3) == [1]
    assert spread_over(4, 100) == [12, 37, 62, 87]
