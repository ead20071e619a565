"""Latents that stay latents when they are halved."""

import pytest
import torch
import torch.nn.functional as F

from pixcell.errors import RecipeError
from pixcell.training.determinism import rng_for
from pixcell.training.recipe import build_objective


def test_halved_latents_are_held_against_halved_pictures(codec_recipe):
    plain, smooth = (
        build_objective(codec_recipe(f"objective.scale_consistency={weight}")) for weight in (0.0, 0.5)
    )
    drawn = plain.samples.draw([0, 1, 2], [rng_for(0, 0, position) for position in range(3)])
    batch = {name: torch.stack([one[name] for one in drawn]) for name in ("image", "noise")}
    before, after = plain.loss(batch), smooth.loss(batch)
    assert set(after.parts) == {*before.parts, "coarse"}
    torch.testing.assert_close(after.per_sample, before.per_sample + 0.5 * after.parts["coarse"])
    model, images = smooth.trainable, batch["image"].float() / 127.5 - 1
    posterior = model.encode(images, return_dict=False)[0]
    halved = F.avg_pool2d(posterior.mean + posterior.std * batch["noise"], 2)
    error = model.decode(halved, return_dict=False)[0] - F.avg_pool2d(images, 2)
    torch.testing.assert_close(after.parts["coarse"], error.abs().flatten(1).mean(1))


def test_crops_whose_latents_cannot_be_halved_are_refused(codec_recipe):
    with pytest.raises(RecipeError, match="multiple of 16, not 24"):
        codec_recipe("objective.scale_consistency=1", "objective.crop_size=24")
