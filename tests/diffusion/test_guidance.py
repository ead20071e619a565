"""Guidance has one meaning: unconditional + scale * (conditional - unconditional)."""

import pytest
import torch

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.guidance import guide, guided, usual_guidance_scale
from pixcell.diffusion.sampling import denoiser_of
from pixcell.errors import ModelError


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


class TestInterval:
    @torch.no_grad()
    def test_outside_the_prediction_is_conditional_and_costs_one_call(self, case):
        denoiser, latents, _, conditioning = case
        limited = guided(denoiser, 3.0, interval=(200, 800))
        for timestep, inside in ((199.9, False), (200, True), (800, True), (801, False)):
            time = torch.tensor(timestep)
            denoiser.calls.clear()
            prediction = limited(latents, time, conditioning)
            assert denoiser.calls == [6 if inside else 3]
            expected = guided(denoiser, 3.0 if inside else 1.0)(latents, time, conditioning)
            assert torch.equal(prediction, expected)

    @torch.no_grad()
    def test_all_timesteps_is_no_interval(self, case):
        denoiser, latents, timestep, conditioning = case
        everywhere = guided(denoiser, 3.0, interval=(0, 1000))(latents, timestep, conditioning)
        assert torch.equal(everywhere, guided(denoiser, 3.0)(latents, timestep, conditioning))

    @torch.no_grad()
    def test_samples_at_different_timesteps_are_judged_one_by_one(self, case):
        denoiser, latents, _, conditioning = case
        times = torch.tensor([100.0, 500.0, 900.0])
        prediction = guided(denoiser, 3.0, interval=(200, 800))(latents, times, conditioning)
        assert denoiser.calls == [4]
        for row, scale in enumerate((1.0, 3.0, 1.0)):
            one = slice(row, row + 1)
            alone = guided(denoiser, scale)(latents[one], times[one], conditioning.select(one))
            torch.testing.assert_close(prediction[one], alone, rtol=1e-4, atol=1e-4)

    def test_an_empty_one_is_refused(self, case):
        with pytest.raises(ModelError, match=r"from a lower to a higher timestep.*not \(800, 200\)"):
            guided(case[0], 2.0, interval=(800, 200))


@torch.no_grad()
def test_samples_with_a_scale_of_one_are_predicted_once(case):
    denoiser, latents, timestep, conditioning = case
    scales = torch.tensor([1.0, 2.0, 1.0])
    prediction = guided(denoiser, scales)(latents, timestep, conditioning)
    assert denoiser.calls == [4]
    for row, scale in enumerate(scales.tolist()):
        one = slice(row, row + 1)
        alone = guided(denoiser, scale)(latents[one], timestep, conditioning.select(one))
        torch.testing.assert_close(prediction[one], alone, rtol=1e-4, atol=1e-4)


class TestNegative:
    @torch.no_grad()
    def test_it_takes_the_place_of_no_condition(self, case):
        denoiser, latents, timestep, conditioning = case
        away = Conditioning(torch.randn(3, 2, 2, 12, generator=torch.Generator().manual_seed(8)))
        prediction = guided(denoiser, 2.5, negative=away)(latents, timestep, conditioning)
        assert denoiser.calls == [6]
        towards, negative = (denoiser(latents, timestep, one) for one in (conditioning, away))
        torch.testing.assert_close(prediction, negative + 2.5 * (towards - negative), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_the_models_own_null_tokens_are_no_condition(self, case, transformer):
        denoiser, latents, timestep, conditioning = case
        null = Conditioning.from_tokens(transformer.unconditional_embedding[None])
        by_tokens = guided(denoiser, 2.5, negative=null)(latents, timestep, conditioning)
        plain = guided(denoiser, 2.5)(latents, timestep, conditioning)
        torch.testing.assert_close(by_tokens, plain, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_one_serves_all_samples(self, case):
        denoiser, latents, timestep, conditioning = case
        one = Conditioning(torch.randn(1, 2, 2, 12, generator=torch.Generator().manual_seed(8)))
        for_all = guided(denoiser, 2.5, negative=one)(latents, timestep, conditioning)
        each = guided(denoiser, 2.5, negative=one.repeat(3))(latents, timestep, conditioning)
        assert torch.equal(for_all, each)

    def test_it_needs_conditions_to_steer_towards(self, case):
        denoiser, latents, timestep, _ = case
        away = Conditioning(torch.zeros(1, 2, 2, 12))
        with pytest.raises(ModelError, match="no conditions to steer towards"):
            guided(denoiser, 2.0, negative=away)(latents, timestep, Conditioning())
        assert denoiser.calls == []


class TestWrongNumbers:
    def test_scales_and_negatives_are_one_or_one_each(self, case):
        denoiser, latents, timestep, conditioning = case
        with pytest.raises(ModelError, match="2 guidance scales were given for 3 samples"):
            guided(denoiser, torch.tensor([1.0, 2.0]))(latents, timestep, conditioning)
        away = Conditioning(torch.zeros(2, 2, 2, 12))
        with pytest.raises(ModelError, match="2 negative conditions were given for 3 samples"):
            guided(denoiser, 2.0, negative=away)(latents, timestep, conditioning)
        assert denoiser.calls == []

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")])])
    def test_scales_that_are_no_numbers_are_refused(self, case, scale):
        with pytest.raises(ModelError, match=r"guidance_scale is .*; give a number"):
            guided(case[0], scale)


def test_the_usual_scale_is_the_papers_best():
    """Arrays of 1, 2 x 2 and 4 x 4 fields: 256, 512 and 1024 pixels."""
    assert [usual_guidance_scale(side) for side in (1, 2, 4)] == [2.0, 2.0, 1.2]
