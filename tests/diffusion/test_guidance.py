"""Guidance has one meaning: unconditional + scale * (conditional - unconditional)."""

import pytest
import torch

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.guidance import guide, guided
from pixcell.diffusion.sampling import denoiser_of


class Counting:
    """A denoiser that tells how often and with how many samples it was called."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def __call__(self, latents, timestep, conditioning):
        self.calls.append(len(latents))
        return self.inner(latents, timestep, conditioning)


@pytest.fixture
def case(transformer):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(3, 4, 16, 16, generator=generator)
    conditioning = Conditioning(torch.randn(3, 2, 2, 12, generator=generator))
    return Counting(denoiser_of(transformer)), latents, torch.tensor(500), conditioning


@torch.no_grad()
def test_scale_one_is_the_conditional_prediction_and_costs_nothing(case):
    denoiser, latents, timestep, conditioning = case
    plain = denoiser(latents, timestep, conditioning)
    assert torch.equal(guided(denoiser, 1.0)(latents, timestep, conditioning), plain)
    assert denoiser.calls == [3, 3]


@torch.no_grad()
def test_scale_zero_ignores_the_condition(case):
    denoiser, latents, timestep, conditioning = case
    prediction = guided(denoiser, 0.0)(latents, timestep, conditioning)
    unconditional = denoiser(latents, timestep, Conditioning())
    torch.testing.assert_close(prediction, unconditional, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_predictions_come_from_one_call(case):
    denoiser, latents, timestep, conditioning = case
    prediction = guided(denoiser, 2.5)(latents, timestep, conditioning)
    assert denoiser.calls == [6]
    conditional = denoiser(latents, timestep, conditioning)
    unconditional = denoiser(latents, timestep, conditioning.dropped_everywhere())
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_without_a_condition_there_is_nothing_to_guide(case):
    denoiser, latents, timestep, _ = case
    guided(denoiser, 3.0)(latents, timestep, Conditioning())
    assert denoiser.calls == [3]


@torch.no_grad()
def test_each_sample_may_have_its_own_scale(case):
    denoiser, latents, timestep, conditioning = case
    each = guided(denoiser, torch.tensor([1.0, 2.0, 4.0]))(latents, timestep, conditioning)
    for row, scale in enumerate((1.0, 2.0, 4.0)):
        expected = guided(denoiser, scale)(latents, timestep, conditioning)[row]
        torch.testing.assert_close(each[row], expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_linear_in_the_scale():
    conditional, unconditional = torch.randn(2, 1, 3, 4, 4)
    middle = guide(conditional, unconditional, 2.0)
    ends = [guide(conditional, unconditional, scale) for scale in (1.0, 3.0)]
    torch.testing.assert_close(middle, (ends[0] + ends[1]) / 2)


def test_a_guided_denoiser_is_a_denoiser(case):
    assert isinstance(guided(case[0], 2.0), Denoiser)
