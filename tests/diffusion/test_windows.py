"""A canvas sampled in windows must look as if there were no windows."""

import pytest
import torch

from golden_vectors import load
from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.guidance import guided
from pixcell.diffusion.sampling import make_scheduler, noise_for, sample_latents
from pixcell.diffusion.windows import arc_between, between_fields, fields_under, window_boxes, windowed
from pixcell.errors import ModelError
from pixcell.geometry import Box

TIMESTEP = torch.tensor(700)
WEIGHTS = ("uniform", "hann", "gaussian")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def forbidden(*_):
    pytest.fail("computed")


# ── the blend ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("stride", [4, 8, 12, 16])
@pytest.mark.parametrize("canvas", [(32, 32), (16, 40), (29, 19)])
def test_a_local_denoiser_is_unchanged_by_windows(weight, stride, canvas):
    """A denoiser that looks at one place at a time gives the same answer on any canvas."""

    def local(latents, timestep, conditioning):
        return 0.3 * latents.tanh() + timestep

    latents = normal(2, 3, *canvas)
    in_windows = windowed(local, size=16, stride=stride, weight=weight)(latents, TIMESTEP, Conditioning())
    torch.testing.assert_close(in_windows, local(latents, TIMESTEP, None))


@pytest.mark.parametrize("weight", WEIGHTS)
@torch.no_grad()
def test_one_window_of_full_size_is_no_window(transformer, weight):
    """To the last bit, guided, step after step."""
    denoiser = guided(denoiser_of(transformer), 2.5)
    conditioning = Conditioning(normal(2, 2, 2, 12))

    def sampled(denoiser):
        return sample_latents(denoiser, make_scheduler(), normal(2, 4, 16, 16, seed=1), conditioning, 4)

    in_windows = windowed(denoiser, size=16, stride=16, weight=weight, latents_per_field=8)
    assert torch.equal(sampled(in_windows), sampled(denoiser))


def test_places_of_one_window_are_that_windows_and_shared_ones_the_weighted_mean():
    """Two windows, each of which predicts its own number everywhere."""
    numbers = iter((1.0, 5.0))

    def numbered(latents, timestep, conditioning):
        return torch.full_like(latents, next(numbers))

    ramp = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(4, 4)
    prediction = windowed(numbered, size=4, stride=2, weight=ramp)(
        normal(1, 1, 4, 6), TIMESTEP, Conditioning()
    )
    # Shared places weigh 3 : 1 and 4 : 2.
    row = torch.tensor([1.0, 1.0, (3 * 1 + 1 * 5) / 4, (4 * 1 + 2 * 5) / 6, 5.0, 5.0])
    torch.testing.assert_close(prediction[0, 0], row.expand(4, 6))


@torch.no_grad()
def test_blending_predictions_is_blending_clean_latents(transformer):
    """The published loop averages what windows take for clean, and computes the noise from the mean."""
    denoiser, scheduler = denoiser_of(transformer), make_scheduler()
    latents, conditioning = normal(1, 4, 16, 24), Conditioning(normal(1, 2, 3, 12))
    alpha_bar = scheduler.alphas_cumprod[TIMESTEP]

    def clean_from(latents, noise):
        return (latents - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()

    total, count = torch.zeros_like(latents), torch.zeros_like(latents)
    for box in window_boxes(16, 24, 16, 8):
        area = (..., slice(box.y, box.bottom), slice(box.x, box.right))
        noise = denoiser(latents[area], TIMESTEP, conditioning.window(box, 8))
        total[area] += clean_from(latents[area], noise)
        count[area] += 1
    in_windows = windowed(denoiser, 16, 8, weight="uniform", latents_per_field=8)
    ours = clean_from(latents, in_windows(latents, TIMESTEP, conditioning))
    torch.testing.assert_close(ours, total / count, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("windows_per_call", [1, 2, 5, 100])
@torch.no_grad()
def test_windows_may_be_batched(transformer, windows_per_call):
    """Two samples of six windows, conditions and timesteps of their own; last bits may differ by batch."""
    latents, conditioning = normal(2, 4, 24, 32), Conditioning(normal(2, 3, 4, 12))
    conditioning = conditioning.drop(torch.tensor([False, True]))
    timesteps = torch.tensor([900, 20])
    calls = []

    def counting(latents, timestep, conditioning):
        calls.append(len(latents))
        return denoiser_of(transformer)(latents, timestep, conditioning)

    options = {"size": 16, "stride": 8, "latents_per_field": 8}
    together = windowed(counting, **options, windows_per_call=windows_per_call)(
        latents, timesteps, conditioning
    )
    assert sum(calls) == 2 * 6
    assert max(calls) == 2 * min(windows_per_call, 6)
    for row in range(2):
        alone = windowed(denoiser_of(transformer), **options)(
            latents[row : row + 1], timesteps[row], conditioning.select([row])
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_guidance_inside_and_around_windows_is_the_same(transformer):
    denoiser = denoiser_of(transformer)
    latents, conditioning = normal(2, 4, 16, 24), Conditioning(normal(2, 2, 3, 12))
    options = {"size": 16, "stride": 8, "latents_per_field": 8}
    inside = windowed(guided(denoiser, 3.0), **options)(latents, TIMESTEP, conditioning)
    around = guided(windowed(denoiser, **options), torch.full((2,), 3.0))(latents, TIMESTEP, conditioning)
    torch.testing.assert_close(inside, around, rtol=1e-4, atol=1e-4)


def test_a_windowed_denoiser_is_a_denoiser_that_every_scheduler_takes():
    def local(latents, timestep, conditioning):
        return 0.9 * latents.tanh()

    denoiser = windowed(local, 8, 4)
    assert isinstance(denoiser, Denoiser)
    noise = noise_for(0, 0, (1, 4, 12, 20))
    for name in ("dpm-solver++", "ddim", "unipc"):
        whole = sample_latents(local, make_scheduler(name), noise, Conditioning(), 5)
        in_windows = sample_latents(denoiser, make_scheduler(name), noise, Conditioning(), 5)
        torch.testing.assert_close(in_windows, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_learned_variance_is_blended_like_the_prediction(transformer):
    denoiser = denoiser_of(transformer, with_variance=True)
    latents, conditioning = normal(1, 4, 16, 24), Conditioning(normal(1, 2, 3, 12))
    whole = windowed(denoiser, 16, 8, latents_per_field=8)(latents, TIMESTEP, conditioning)
    plain = windowed(denoiser_of(transformer), 16, 8, latents_per_field=8)(latents, TIMESTEP, conditioning)
    assert whole.shape == (1, 8, 16, 24)
    torch.testing.assert_close(whole[:, :4], plain)


def test_half_precision_latents_are_blended_in_float32_and_returned_as_they_came():
    def local(latents, timestep, conditioning):
        return latents * 1.01

    latents = normal(1, 1, 12, 12).to(torch.bfloat16)
    prediction = windowed(local, 8, 1)(latents, TIMESTEP, Conditioning())
    assert prediction.dtype == torch.bfloat16
    # One rounding at the end, not one per window: half a unit in the last place.
    exact = (latents * 1.01).float()
    torch.testing.assert_close(prediction.float(), exact, rtol=2**-8, atol=0)


# ── conditions ───────────────────────────────────────────────────────────────────────────────────────


def test_a_window_has_the_published_embeddings():
    tensors, _ = load("large_image")
    window = fields_under(Conditioning(tensors["in.uni_grid"][None]), Box(x=8, y=4, width=8, height=8), 2)
    assert torch.equal(window.embedding_grid[0], tensors["out.conditioning_at_4_8"])


def test_text_holds_for_every_window_and_control_is_cut():
    seen = []

    def denoiser(latents, timestep, conditioning):
        assert torch.equal(conditioning.control_latents, latents)
        assert conditioning.text_states.shape == (2, 5, 6)
        seen.append(len(latents))
        return latents

    latents = normal(1, 4, 16, 24)
    for conditions in (fields_under, between_fields):
        conditioning = Conditioning(text_states=normal(1, 5, 6), control_latents=latents)
        windowed(denoiser, 16, 8, conditions=conditions, windows_per_call=2)(latents, TIMESTEP, conditioning)
    assert seen == [2, 2]


def test_arcs_between_embeddings_are_the_published_ones():
    tensors, _ = load("pathldm-largeimage-tiny")
    shares = tensors["slerp.t"][:, None]
    start = tensors["slerp.v0"].expand(len(shares), -1)
    for end, expected in (("slerp.v1", "slerp.out"), ("slerp.near", "slerp.near_out")):
        arc = arc_between(start, tensors[end].expand_as(start), shares)
        torch.testing.assert_close(arc, tensors[expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [1, 2])
def test_on_borders_of_fields_interpolation_takes_the_embeddings_as_they_are(fields):
    conditioning = Conditioning(normal(2, 3, 4, 6)).drop(torch.tensor([True, False]))
    for box in window_boxes(24, 32, 8 * fields, 8):
        interpolated, exact = between_fields(conditioning, box, 8), fields_under(conditioning, box, 8)
        torch.testing.assert_close(interpolated.embedding_grid, exact.embedding_grid, rtol=1e-6, atol=1e-6)
        assert torch.equal(interpolated.dropped, exact.dropped)


def test_between_equal_embeddings_there_is_only_that_embedding():
    conditioning = Conditioning(normal(1, 1, 1, 6).expand(1, 3, 3, 6))
    window = between_fields(conditioning, Box(x=3, y=5, width=16, height=16), 8)
    torch.testing.assert_close(window.embedding_grid, conditioning.embedding_grid[:, :2, :2])


def test_halfway_between_two_embeddings_of_one_length_the_length_is_kept():
    """A straight mean would be shorter: 0.71 of it here."""
    grid = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 1, 2, 2)
    middle = between_fields(Conditioning(grid), Box(x=4, y=0, width=8, height=8), 8).embedding_grid
    torch.testing.assert_close(middle.flatten(), torch.full((2,), 0.5**0.5))


def test_opposite_embeddings_have_no_arc_and_meet_in_the_middle():
    grid = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).reshape(1, 1, 2, 2)
    middle = between_fields(Conditioning(grid), Box(x=4, y=0, width=8, height=8), 8).embedding_grid
    torch.testing.assert_close(middle.flatten(), torch.zeros(2))


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_strides_that_leave_gaps_are_refused(stride):
    with pytest.raises(ModelError, match=f"windows of 8 latents every {stride} do not cover"):
        windowed(forbidden, 8, stride)


def test_impossible_settings_are_refused():
    with pytest.raises(ModelError, match="0 windows per call"):
        windowed(forbidden, 8, 4, windows_per_call=0)
    with pytest.raises(ValueError, match="8 x 8 positive numbers"):
        windowed(forbidden, 8, 4, weight=torch.zeros(8, 8))


@pytest.mark.parametrize(
    ("canvas", "conditioning", "message"),
    [
        ((16, 8), Conditioning(), r"16 x 8 latents is smaller than a window of 16 x 16"),
        ((32, 32), Conditioning(torch.zeros(1, 4, 4, 3)), r"grid of 4 x 4 embeddings covers 16 x 16 latents"),
        ((24, 24), Conditioning(torch.zeros(1, 6, 6, 3)), r"at \(6, 0\) does not fall on the embedding grid"),
        (
            (32, 32),
            Conditioning(control_latents=torch.zeros(1, 4, 16, 32)),
            r"control covers 16 x 32 latents, the canvas has 32 x 32",
        ),
    ],
)
def test_canvases_that_do_not_fit_are_refused_before_anything_is_computed(canvas, conditioning, message):
    denoiser = windowed(forbidden, size=16, stride=6, latents_per_field=4)
    with pytest.raises(ModelError, match=message):
        denoiser(torch.zeros(1, 4, *canvas), TIMESTEP, conditioning)


def test_windows_of_no_whole_number_of_fields_are_refused():
    conditioning = Conditioning(torch.zeros(1, 4, 4, 3))
    denoiser = windowed(forbidden, size=12, stride=6, conditions=between_fields, latents_per_field=8)
    with pytest.raises(ModelError, match="12 x 12 latents is no whole number of fields of 8 x 8"):
        denoiser(torch.zeros(1, 4, 32, 32), TIMESTEP, conditioning)


def test_one_timestep_in_a_list_holds_for_all_windows_and_samples(transformer):
    latents = torch.randn(2, 4, 16, 32, generator=torch.Generator().manual_seed(0))
    whole = windowed(denoiser_of(transformer), 16, 16, windows_per_call=2)
    one, listed = (whole(latents, time, Conditioning()) for time in (torch.tensor(7), torch.tensor([7])))
    assert torch.equal(one, listed)
