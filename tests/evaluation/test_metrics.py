"""Distances agree with their closed forms and with the standard tools, and refuse what has no meaning."""

import numpy as np
import pytest
import torch

from pixcell.errors import EvaluationError
from pixcell.evaluation.metrics import (
    TooFewPictures,
    frechet_distance,
    frechet_standard_error,
    kernel_distance,
    paired_similarity,
    precision_recall,
    split_halves,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def gaussian(rng, count, mean, covariance):
    """Samples whose own mean and covariance are exactly those asked for."""
    noise = rng.standard_normal((count, len(mean)))
    noise -= noise.mean(0)
    noise = noise @ np.linalg.inv(np.linalg.cholesky(np.cov(noise, rowvar=False))).T
    return noise @ np.linalg.cholesky(covariance).T + mean


def features(rng, count, dim=16, shift=0.0):
    return (rng.standard_normal((count, dim)) + shift).astype(np.float32)


def test_frechet_distance_of_a_set_to_itself_is_zero(rng):
    real = features(rng, 200)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_a_shifted_set_is_the_squared_shift(rng):
    real = features(rng, 200, dim=8).astype(np.float64)
    shift = np.arange(8) / 4
    assert frechet_distance(real, real + shift) == pytest.approx((shift**2).sum(), rel=1e-10)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form(rng):
    variances_1, variances_2 = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.01])
    mean_1, mean_2 = np.array([0.0, 1.0, 2.0]), np.array([0.5, 1.0, 0.0])
    expected = ((mean_1 - mean_2) ** 2).sum() + ((np.sqrt(variances_1) - np.sqrt(variances_2)) ** 2).sum()
    one = gaussian(rng, 50, mean_1, np.diag(variances_1))
    other = gaussian(rng, 60, mean_2, np.diag(variances_2))
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_correlated_gaussians_in_a_plane_is_the_closed_form(rng):
    """tr (AB)^(1/2) of 2x2 matrices is (tr AB + 2 det(AB)^(1/2))^(1/2)."""
    one, other = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    product = one @ other
    trace_of_root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(one) + np.trace(other) - 2 * trace_of_root
    sets = (gaussian(rng, 40, np.zeros(2), one), gaussian(rng, 40, np.zeros(2), other))
    assert frechet_distance(*sets) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_stays_real_where_a_feature_never_changes(rng):
    one, other = features(rng, 100, dim=6), features(rng, 100, dim=6)
    one[:, 0] = other[:, 0] = 3.0
    one[:, 1] = one[:, 2]
    assert 0 < frechet_distance(one, other) < 10


def test_frechet_distance_agrees_with_torch_fidelity(rng):
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid", reason="the extra 'eval' is not installed")
    one, other = features(rng, 300).astype(np.float64), features(rng, 250, shift=0.3).astype(np.float64)
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (one, other)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    assert frechet_distance(one, other) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)


def test_frechet_distance_agrees_with_torchmetrics(rng):
    fid = pytest.importorskip("torchmetrics.image.fid", reason="the extra 'eval' is not installed")
    one, other = features(rng, 300).astype(np.float64), features(rng, 250, shift=0.3).astype(np.float64)
    moments = [torch.from_numpy(part) for each in (one, other) for part in (each.mean(0), np.cov(each.T))]
    assert frechet_distance(one, other) == pytest.approx(float(fid._compute_fid(*moments)), rel=1e-8)


def test_too_few_pictures_for_a_frechet_distance_say_how_many_it_takes(rng):
    with pytest.raises(TooFewPictures, match=r"at least 17 pictures.* there are 300 and 16\b.*unbiased"):
        frechet_distance(features(rng, 300), features(rng, 16))


def test_standard_error_is_about_the_scatter_of_repeated_measurements():
    draws = np.random.default_rng(0)
    sets = [(features(draws, 300, dim=4), features(draws, 300, dim=4, shift=0.5)) for _ in range(60)]
    scatter = np.std([frechet_distance(*pair) for pair in sets])
    errors = [frechet_standard_error(*pair, draws) for pair in sets[:20]]
    # The jackknife over ten groups is itself uncertain by about a quarter; the mean of twenty much less.
    assert np.mean(errors) == pytest.approx(scatter, rel=0.35)


def test_kernel_distance_is_unbiased(rng):
    """The estimate of equal distributions scatters around zero, also for few pictures."""
    values = [
        kernel_distance(features(rng, 12), features(rng, 12), rng, num_subsets=5).value for _ in range(300)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_kernel_distance_grows_with_the_shift(rng):
    distances = [
        kernel_distance(features(rng, 200), features(rng, 200, shift=shift), rng).value
        for shift in (0, 0.5, 1, 2)
    ]
    assert distances == sorted(distances)
    assert distances[1] > 0.1


def test_kernel_distance_agrees_with_torch_fidelity(rng):
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid", reason="the extra 'eval' is not installed")
    one, other = features(rng, 300).astype(np.float64), features(rng, 250, shift=0.3).astype(np.float64)
    theirs = metric_kid.kid_features_to_metric(
        torch.from_numpy(one), torch.from_numpy(other), kid_subset_size=100, kid_subsets=20, rng_seed=5,
        verbose=False,
    )  # fmt: skip
    # The same legacy generator draws the same subsets, so equality is to rounding.
    ours = kernel_distance(one, other, np.random.RandomState(5), subset_size=100, num_subsets=20)
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kernel_distance_of_one_picture_is_refused(rng):
    with pytest.raises(TooFewPictures, match="at least 2 pictures"):
        kernel_distance(features(rng, 1), features(rng, 9), rng)


def test_the_same_seed_gives_the_same_kernel_distance(rng):
    one, other = features(rng, 80), features(rng, 80, shift=0.2)
    first, second = (kernel_distance(one, other, np.random.default_rng(3)) for _ in range(2))
    assert first == second


def test_precision_and_recall_agree_with_torch_fidelity(rng):
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc", reason="the extra 'eval' is not installed")
    real, synthetic = features(rng, 300, dim=4), features(rng, 200, dim=4, shift=0.8)
    theirs = metric_prc.prc_features_to_metric(
        torch.from_numpy(synthetic).double(), torch.from_numpy(real).double(), prc_neighborhood=3,
        prc_batch_size=10000, save_cpu_ram=False, verbose=False,
    )  # fmt: skip
    ours = precision_recall(real, synthetic)
    assert 0 < ours.precision < 1
    assert ours.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours.recall == pytest.approx(theirs["recall"], abs=1e-6)


def test_a_collapsed_set_is_precise_and_recalls_little(rng):
    real = features(rng, 400, dim=4)
    collapsed = real[:1] + 0.01 * features(rng, 400, dim=4)
    found = precision_recall(real, collapsed)
    assert found.precision == 1
    assert found.recall < 0.02


def test_precision_of_as_many_pictures_as_neighbours_is_refused(rng):
    with pytest.raises(TooFewPictures, match="at least 4 pictures"):
        precision_recall(features(rng, 3), features(rng, 30))


def test_pairs_that_are_copies_are_perfectly_alike_and_found(rng):
    references = features(rng, 10)
    order = rng.permutation(10)
    pairs = paired_similarity(references[order] * 3, references, order)
    np.testing.assert_allclose(pairs.cosine, 1, atol=1e-6)
    assert pairs.nearest_share == 1
    assert abs(pairs.mismatched.mean()) < 0.2
    assert pairs.num_references == 10


def test_pairs_that_have_nothing_in_common_are_found_by_chance_only(rng):
    pairs = paired_similarity(features(rng, 2000), features(rng, 10), np.arange(2000) % 10)
    assert pairs.nearest_share == pytest.approx(0.1, abs=0.05)


def test_pairs_worked_off_in_pieces_give_the_same_figures(rng, monkeypatch):
    pairs = (features(rng, 50), features(rng, 10), np.arange(50) % 10)
    whole = paired_similarity(*pairs)
    monkeypatch.setattr("pixcell.evaluation.metrics._ROWS_AT_ONCE", 7)
    pieces = paired_similarity(*pairs)
    np.testing.assert_allclose(pieces.cosine, whole.cosine, atol=1e-12)
    np.testing.assert_allclose(pieces.mismatched, whole.mismatched, atol=1e-12)
    assert pieces.nearest_share == whole.nearest_share


def test_one_reference_has_nobody_to_be_mistaken_for(rng):
    pairs = paired_similarity(features(rng, 4), features(rng, 1), np.zeros(4, dtype=int))
    assert len(pairs.mismatched) == 0


@pytest.mark.parametrize("metric", [frechet_distance, precision_recall])
def test_features_that_are_not_numbers_are_refused(rng, metric):
    broken = features(rng, 50)
    broken[[3, 9], 2] = np.nan
    with pytest.raises(EvaluationError, match="2 of 50 feature vectors hold NaN or infinity"):
        metric(features(rng, 50), broken)


def test_halves_keep_slides_together_and_differ_by_one_of_them_at_most(rng):
    sizes = [50, 30, 20, 5, 5, 10]
    groups = [slide for slide, tiles in enumerate(sizes) for _ in range(tiles)]
    for _ in range(20):
        one, other = split_halves(groups, rng)
        assert sorted([*one, *other]) == list(range(120))
        assert not {groups[row] for row in one} & {groups[row] for row in other}
        assert abs(len(one) - len(other)) <= max(sizes)


def test_slides_of_unlike_sizes_are_not_halved_the_same_way_each_time(rng):
    """Else the scatter over splits, which stands beside every floor, would be that of one split."""
    groups = [slide for slide, tiles in enumerate([40, 35, 30, 25, 20, 15]) for _ in range(tiles)]
    halves = {frozenset(groups[row] for row in half) for _ in range(20) for half in split_halves(groups, rng)}
    assert len(halves) >= 8


def test_halves_differ_from_seed_to_seed():
    halves = {tuple(split_halves(range(20), np.random.default_rng(seed))[0]) for seed in range(5)}
    assert len(halves) == 5
