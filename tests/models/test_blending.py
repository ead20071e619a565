"""Weights of windows: positive, symmetric, and the published ones."""

import pytest
import torch

from golden_vectors import load
from pixcell.models.blending import gaussian_weight, window_weight


@pytest.mark.parametrize("kind", ["uniform", "hann", "gaussian"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 12), (1, 1)])
def test_weights_are_positive_and_the_same_from_every_side(kind, height, width):
    weight = window_weight(kind, height, width)
    assert weight.shape == (height, width)
    assert weight.dtype == torch.float32
    assert (weight > 0).all()
    torch.testing.assert_close(weight, weight.flip(0, 1))
    torch.testing.assert_close(window_weight(kind, width, height).T, weight)


@pytest.mark.parametrize("kind", ["hann", "gaussian"])
def test_the_middle_weighs_most(kind):
    weight = window_weight(kind, 9, 9)
    assert weight.argmax() == 4 * 9 + 4
    assert weight[0, 0] == weight.min()


def test_hann_windows_at_half_their_length_add_up_to_one():
    weight = window_weight("hann", 1, 16)[0]
    torch.testing.assert_close(weight[:8] + weight[8:], torch.ones(8))


def test_gaussian_weights_are_the_published_ones():
    tensors, _ = load("large_image")
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(
        window_weight("gaussian", 64, 64), tensors["out.gaussian_64_sigma0p8"], **close
    )
    torch.testing.assert_close(gaussian_weight(17, 17, sigma=1.0), tensors["out.gaussian_17_sigma1"], **close)
    torch.testing.assert_close(
        gaussian_weight(16, 16, sigma=0.5, mean=0.25), tensors["out.gaussian_16_mu0p25_sigma0p5"], **close
    )
    tensors, _ = load("pathldm-largeimage-tiny")
    torch.testing.assert_close(window_weight("gaussian", 32, 32), tensors["decode.kernel"], **close)


def test_unknown_weights_are_refused_by_name():
    with pytest.raises((ValueError, TypeError), match=r"triangle|violates"):
        window_weight("triangle", 4, 4)
