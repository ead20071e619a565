"""Position tables are the published ones at any size: latents, and condition tokens in their coordinates."""

import pytest
import torch
from diffusers.models.embeddings import PatchEmbed

from golden_vectors import load
from pixcell.models.transformer import condition_positions

# Both builders of the reference work in float64 and round once, as ours do.
CLOSE = {"rtol": 0, "atol": 2e-6}


@pytest.mark.parametrize("builder", ["original", "diffusers"])
def test_whole_tables_of_condition_tokens(builder):
    tensors, _ = load("position_tables")
    for dim, side, scale, latent_grid in ((24, 4, 2, 32), (48, 2, 1, 8)):
        expected = tensors[f"out.small_{builder}_{dim}_grid{side}_interp{scale}_base{latent_grid}_phase2"]
        table = condition_positions(dim, side * side, latent_grid, scale)
        torch.testing.assert_close(table[0], expected, **CLOSE)


@pytest.mark.parametrize("builder", ["original", "diffusers"])
def test_whole_tables_of_latents(builder):
    tensors, _ = load("position_tables")
    for dim, side, scale, name in ((24, 8, 2, "2"), (32, 4, 0.5, "0p5")):
        expected = tensors[f"out.small_{builder}_{dim}_grid{side}_interp{name}_base{side}_phase0"]
        patches = PatchEmbed(
            height=2 * side,
            width=2 * side,
            patch_size=2,
            in_channels=4,
            embed_dim=dim,
            interpolation_scale=scale,
        )
        torch.testing.assert_close(patches.pos_embed[0], expected, **CLOSE)


def test_at_1024_pixels_the_diffusers_class_of_the_reference_is_right():
    """Its interpolation is always 2, which is what 1024 pixels need."""
    tensors, _ = load("position_tables")
    table = condition_positions(1536, 16, latent_grid=64, interpolation_scale=2)
    torch.testing.assert_close(table[0], tensors["out.y_1024_diffusers"], **CLOSE)
