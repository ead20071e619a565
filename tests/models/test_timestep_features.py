"""Sinusoidal features of a time: cosines first, the same bits everywhere."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from golden_vectors import load
from pixcell.models.time_features import TimeFeatures
from tiny_models import tiny_transformer


def test_the_transformer_sees_the_recorded_features():
    """Width 256, and times that are no whole numbers. The angles are equal; cosines may round otherwise."""
    tensors, _ = load("timestep_features")
    features = tiny_transformer().adaln_single.emb.time_proj(tensors["in.t"])
    torch.testing.assert_close(features, tensors["out.features_256"], rtol=0, atol=2e-7)


def test_frequencies_are_exact_to_a_millionth():
    """Their exponents are float32, as in the released code. At time 1 a sine is nearly its frequency."""
    exact = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    features = TimeFeatures()(torch.ones(1)).double()[0]
    torch.testing.assert_close(features[128:], exact.sin(), rtol=1e-6, atol=0)
    torch.testing.assert_close(features[:128], exact.cos(), rtol=0, atol=4e-7)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.float64])
def test_they_are_those_of_diffusers_up_to_rounding(kind):
    """An angle near 999 is a multiple of 6.1e-5 in float32: a last bit of its frequency moves it so far."""
    times = torch.tensor([0, 3, 250, 999]).to(kind)
    library = get_timestep_embedding(times, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(TimeFeatures()(times), library, rtol=0, atol=6.2e-5)


def test_they_stay_in_float32_in_a_model_of_half_precision():
    features = TimeFeatures().to(torch.bfloat16)(torch.tensor([949.05]))
    assert torch.equal(features, TimeFeatures()(torch.tensor([949.05])))
    assert features.dtype == torch.float32
