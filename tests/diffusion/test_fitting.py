"""A fitted prior has the mean and the variances of what it was fitted to, whatever was asked for."""

import pytest
import torch

from pixcell.diffusion.directions import coefficients_of
from pixcell.diffusion.fitting import clusters, fit_mixture, oas_intensity, rows_by_label
from pixcell.errors import ModelError

FACTS = {"encoder": {"name": "tiny", "sha256": "e" * 64}, "field_size": 64, "mpp": 0.5}


def grids(number=300, dim=6, seed=0):
    """Correlated grids of 1 x 2 fields."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randn(2 * dim, 2 * dim, generator=generator)
    return (torch.randn(number, 2 * dim, generator=generator) @ turn + 3).reshape(number, 1, 2, dim)


def blobs(number=200, dim=6):
    """Two clouds: wide and narrow, of three to one."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3 * number, 1, 1, dim, generator=generator) + 6
    narrow = 0.3 * torch.randn(number, 1, 1, dim, generator=generator) - 6
    return torch.cat([wide, narrow])


def fit(values, rank=None, **settings):
    return fit_mixture(coefficients_of(lambda: values.split(64), rank), FACTS, **settings)


def covariance_of(prior):
    """Of the mixture, in closed form."""
    mean, basis = mean_of(prior) - prior.mean.double(), prior.basis.double()
    total = torch.diag(prior.residual_std.double().square()) - mean[:, None] * mean
    for weight, center, factor in zip(prior.weights, prior.centers, prior.factors, strict=True):
        center, factor = center.double() @ basis, basis.T @ factor.double()
        total = total + float(weight) * (factor @ factor.T + center[:, None] * center)
    return total


def mean_of(prior):
    return prior.mean.double() + (prior.weights @ prior.centers).double() @ prior.basis.double()


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol * float(expected.abs().max()))


def test_a_gaussian_is_the_mean_and_covariance_of_the_embeddings():
    values = grids()
    prior = fit(values, shrinkage=0.0)
    flat = values.double().flatten(1)
    close(mean_of(prior), flat.mean(0))
    close(covariance_of(prior), torch.cov(flat.T, correction=0))
    assert prior.labels == (None,)
    assert prior.grid_shape == (1, 2, 6)


@pytest.mark.parametrize("rank", [None, 2, 11])
@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("by_label", [False, True])
def test_every_dimension_keeps_its_mean_and_variance(rank, shrinkage, components, by_label):
    """A low rank, shrinkage, several components: what is taken in one place is given back in another."""
    values = grids()
    labels = ["even" if row % 3 else "odd" for row in range(len(values))] if by_label else None
    prior = fit(values, rank, shrinkage=shrinkage, components=components, labels=labels)
    flat = values.double().flatten(1)
    close(mean_of(prior), flat.mean(0), atol=1e-3)
    # Components shrunk towards that of all keep their total variance, not each dimension's share of it.
    rel = 1e-3 if components == 1 and not by_label else 0.05
    torch.testing.assert_close(covariance_of(prior).diagonal(), flat.var(0, correction=0), rtol=rel, atol=0)


def test_full_shrinkage_leaves_independent_dimensions():
    prior = fit(grids(), shrinkage=1.0)
    covariance = covariance_of(prior)
    close(covariance, torch.diag(covariance.diagonal()))
    assert float(prior.factors.abs().max()) < 1e-12


def test_a_low_rank_keeps_the_leading_covariance():
    values = grids()
    prior = fit(values, 3, shrinkage=0.0)
    exact = torch.cov(values.double().flatten(1).T, correction=0)
    within = covariance_of(prior) - torch.diag(prior.residual_std.double().square())
    directions = prior.basis.double()
    close(directions @ within @ directions.T, directions @ exact @ directions.T)


def test_a_mixture_finds_the_clouds():
    prior = fit(blobs(), components=2)
    order = prior.weights.argsort(descending=True)
    torch.testing.assert_close(prior.weights[order], torch.tensor([0.75, 0.25]), rtol=0, atol=1e-3)
    centers = prior.mean + prior.centers[order] @ prior.basis
    torch.testing.assert_close(centers, torch.tensor([6.0, -6.0])[:, None].expand(2, 6), rtol=0, atol=0.2)
    spreads = (prior.basis.T @ prior.factors[order]).square().sum((1, 2)).div(6).sqrt()
    torch.testing.assert_close(spreads, torch.tensor([1.0, 0.3]), rtol=0.1, atol=0)


def test_a_mixture_describes_the_clouds_better_than_a_gaussian():
    """By the log density of the embeddings themselves."""

    def log_density(prior, values):
        size = values.flatten(1).shape[1]
        parts = []
        for weight, center, factor in zip(prior.weights, prior.centers, prior.factors, strict=True):
            spread = prior.basis.T @ factor
            covariance = spread @ spread.T + torch.diag(prior.residual_std.square()) + 1e-6 * torch.eye(size)
            cloud = torch.distributions.MultivariateNormal(prior.mean + center @ prior.basis, covariance)
            parts.append(weight.log() + cloud.log_prob(values.flatten(1)))
        return float(torch.logsumexp(torch.stack(parts), 0).mean())

    values = blobs()
    single, double = (log_density(fit(values, components=count), values) for count in (1, 2))
    assert double > single + 1


def test_labels_have_components_and_means_of_their_own():
    values = blobs()
    labels = ["wide"] * 600 + ["narrow"] * 200
    prior = fit(values, labels=labels, components=2)
    assert prior.names == ["narrow", "wide"]
    assert prior.facts["per_label"] == {"narrow": 200, "wide": 600}
    for name, members in (("wide", values[:600]), ("narrow", values[600:])):
        own = [place for place, label in enumerate(prior.labels) if label == name]
        share = prior.weights[own]
        assert float(share.sum()) == pytest.approx(len(members) / 800, abs=1e-5)
        mean = prior.mean + (share @ prior.centers[own]) / share.sum() @ prior.basis
        torch.testing.assert_close(mean, members.mean((0, 1, 2)), rtol=1e-3, atol=1e-3)


def test_a_label_of_few_embeddings_borrows_the_shape_of_all():
    """Four embeddings span three directions; shrinkage fills the others."""
    values = torch.cat([grids(300, 3), grids(4, 3, seed=1)])
    labels = ["many"] * 300 + ["few"] * 4
    few, many = (fit(values, labels=labels).factors[place] for place in (0, 1))
    assert float(torch.linalg.svdvals(few)[-1]) > 0.05 * float(torch.linalg.svdvals(many)[-1])
    bare = fit(values, labels=labels, shrinkage=0.0)
    assert bare.labels == ("few", "many")
    assert float(torch.linalg.svdvals(bare.factors[0])[3]) < 1e-3 * float(torch.linalg.svdvals(many)[-1])
    torch.testing.assert_close(many, bare.factors[1], rtol=0, atol=0.1 * float(many.abs().max()))


def test_the_same_seed_fits_the_same_prior():
    assert fit(blobs(), components=3, seed=4).sha256 == fit(blobs(), components=3, seed=4).sha256


class TestShrinkage:
    def test_many_samples_need_none(self):
        assert oas_intensity(40.0, 10, 1e9) < 1e-6

    def test_no_correlation_leaves_none(self):
        assert oas_intensity(10.0, 10, 50) == 1.0

    def test_it_brings_a_covariance_nearer_to_the_true_one(self):
        """For as many samples as dimensions, on average over draws."""
        generator = torch.Generator().manual_seed(0)
        size, spread = 30, torch.linspace(0.3, 1.7, 30)
        truth = torch.diag(spread / spread.mean())
        before = after = 0.0
        for _ in range(20):
            rows = torch.randn(30, size, generator=generator) * truth.diagonal().sqrt()
            sample = rows.T @ rows / len(rows)
            sample = sample / (sample.trace() / size)
            intensity = oas_intensity(float(sample.square().sum()), size, len(rows))
            shrunk = (1 - intensity) * sample + intensity * torch.eye(size)
            before += float((sample - truth).square().sum())
            after += float((shrunk - truth).square().sum())
        assert after < 0.3 * before


class TestClusters:
    def test_separate_clouds_are_found_whole(self):
        centers = 20 * torch.eye(4).double()
        rows = (
            centers.repeat_interleave(25, 0)
            + torch.randn(100, 4, generator=torch.Generator().manual_seed(0)).double()
        )
        belongs, found = clusters(rows, 4, seed=1)
        groups = belongs.reshape(4, 25)
        assert (groups == groups[:, :1]).all()
        assert len(set(groups[:, 0].tolist())) == 4
        torch.testing.assert_close(found[groups[:, 0]], rows.reshape(4, 25, 4).mean(1))

    def test_no_more_clusters_than_different_rows(self):
        with pytest.raises(ModelError, match="fewer than 3 different"):
            clusters(torch.tensor([[0.0], [1.0], [1.0]]).double(), 3, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": 0}, "0 components are no mixture"),
        ({"shrinkage": 1.5}, "shrinkage 1.5 must be 0"),
        ({"labels": ["a"]}, "300 embeddings were given with 1 labels"),
        ({"labels": ["a"] * 299 + ["b"]}, r"1 embedding\(s\) of label 'b' are too few for 1 component"),
        ({"components": 151}, r"300 embedding\(s\) are too few for 151"),
    ],
)
def test_what_cannot_be_fitted_is_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        fit(grids(), **settings)


def test_rows_of_each_label_stand_in_order():
    assert {name: rows.tolist() for name, rows in rows_by_label(4, ["b", "a", "b", "a"]).items()} == {
        "a": [1, 3],
        "b": [0, 2],
    }
