"""Leading directions of many grids, whichever way they are found and however they are read."""

import pytest
import torch

from pixcell.diffusion import directions
from pixcell.diffusion.directions import coefficients_of
from pixcell.errors import ModelError


def grids(number=400, rows=2, columns=3, dim=5, seed=0):
    """Correlated, of decaying variance, not centred."""
    generator = torch.Generator().manual_seed(seed)
    size = rows * columns * dim
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    spread = 0.8 ** torch.arange(size)
    flat = torch.randn(number, size, generator=generator) * spread @ turn + torch.randn(
        size, generator=generator
    )
    return flat.reshape(number, rows, columns, dim)


def in_batches(values, size):
    return lambda: values.split(size)


def covariance(values):
    return torch.cov(values.flatten(1).double().T, correction=0)


def test_all_directions_together_are_the_covariance():
    values = grids()
    found = coefficients_of(in_batches(values, 64))
    assert found.shape == (2, 3, 5)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(30).double())
    torch.testing.assert_close(found.basis.T * found.spread @ found.basis, covariance(values))
    torch.testing.assert_close(found.mean, values.double().flatten(1).mean(0))
    torch.testing.assert_close(found.variance, covariance(values).diagonal())
    assert found.explained == pytest.approx(1)


def test_coefficients_lead_back_to_the_grids():
    values = grids()
    found = coefficients_of(in_batches(values, 64))
    torch.testing.assert_close(found.mean + found.values @ found.basis, values.double().flatten(1))


def test_it_does_not_matter_how_they_are_read():
    values = grids()
    one, other = (coefficients_of(in_batches(values, size)) for size in (400, 7))
    torch.testing.assert_close(one.values, other.values)
    torch.testing.assert_close(one.basis, other.basis)


@pytest.mark.parametrize("rank", [1, 6, 20])
def test_where_the_covariance_is_too_large_passes_find_the_same_directions(monkeypatch, rank):
    values = grids()
    exact = coefficients_of(in_batches(values, 64), rank)
    monkeypatch.setattr(directions, "_EXACT_SIZE", 8)
    found = coefficients_of(in_batches(values, 64), rank, seed=3)
    torch.testing.assert_close(found.basis, exact.basis, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.values, exact.values, rtol=0, atol=1e-4)
    assert found.explained == pytest.approx(exact.explained, rel=1e-6)


def test_no_more_directions_than_there_can_be():
    assert len(coefficients_of(in_batches(grids(9), 4)).basis) == 8
    with pytest.raises(
        ModelError, match="rank 9 is not possible with 9 embeddings of 30 numbers: choose 1 to 8"
    ):
        coefficients_of(in_batches(grids(9), 4), 9)


def test_what_cannot_be_looked_at_is_refused():
    values = grids(9)
    values[3, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        coefficients_of(in_batches(values, 4))
    with pytest.raises(ModelError, match=r"1 embedding\(s\) are too few"):
        coefficients_of(in_batches(grids(1), 4))
    with pytest.raises(ModelError, match="all embeddings are equal"):
        coefficients_of(in_batches(torch.ones(5, 1, 1, 3), 2))
