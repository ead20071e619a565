"""A prototype is a real field, the one with the smallest sum of squared distances to those it stands for."""

import pytest
import torch

from pixcell.diffusion.directions import coefficients_of
from pixcell.diffusion.prototypes import Prototypes, find_prototypes
from pixcell.errors import MissingWeights, ModelError, OutputError, WrongWeights

FACTS = {"encoder": {"name": "small", "sha256": "0" * 64}, "field_size": 64, "mpp": 0.5}


def embeddings(number=60):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 1, 2, 5, generator=generator).half()


def find(values, **settings):
    def batches():
        return values.split(7)

    keys = [f"slide/{row}_0/0_0" for row in range(len(values))]
    return find_prototypes(coefficients_of(batches), batches, keys, FACTS, **settings)


@pytest.fixture(scope="module")
def prototypes():
    return find(embeddings(), labels=["even", "odd"] * 30, per_label=3)


def test_one_prototype_is_the_medoid():
    values = embeddings()
    found = find(values)
    flat = values.double().flatten(1)
    expected = int(torch.cdist(flat, flat).square().sum(1).argmin())
    assert found.keys == (f"slide/{expected}_0/0_0",)
    assert (found.labels, found.counts) == ((None,), (60,))
    torch.testing.assert_close(found.grids[0], values[expected].float(), rtol=0, atol=0)


def test_each_label_is_stood_for_by_its_own(prototypes):
    values = embeddings()
    assert prototypes.labels == ("even",) * 3 + ("odd",) * 3
    for grid, key, label in zip(prototypes.grids, prototypes.keys, prototypes.labels, strict=True):
        row = int(key.split("/")[1].split("_")[0])
        assert label == ("even", "odd")[row % 2]
        torch.testing.assert_close(grid, values[row].float(), rtol=0, atol=0)
    assert sum(prototypes.counts[:3]) == sum(prototypes.counts[3:]) == 30
    assert len(set(prototypes.keys)) == 6


def test_separate_clouds_get_one_each():
    centers = torch.eye(3)[:, None, None, :] * 10
    values = centers.repeat_interleave(20, 0) + 0.1 * torch.randn(
        60, 1, 1, 3, generator=torch.Generator().manual_seed(0)
    )
    found = find(values, per_label=3)
    assert sorted(found.counts) == [20, 20, 20]
    assert sorted(int(grid.argmax()) for grid in found.grids) == [0, 1, 2]


def test_no_more_prototypes_than_different_fields():
    values = embeddings(4).repeat(5, 1, 1, 1)
    assert len(find(values, per_label=9).keys) == 4


def test_the_nearest_is_found_first(prototypes):
    for place, grid in enumerate(prototypes.grids):
        (found,) = prototypes.nearest(grid)
        assert (found.place, found.distance) == (place, 0.0)
        assert found.key == prototypes.keys[place]
    ranked = prototypes.nearest(torch.zeros(1, 2, 5), most=9)
    assert len(ranked) == 6
    distances = [neighbour.distance for neighbour in ranked]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(float(prototypes.grids.flatten(1).norm(dim=1).min()))


def test_a_label_narrows_the_search(prototypes):
    ranked = prototypes.nearest(torch.zeros(1, 2, 5), label="odd", most=9)
    assert {neighbour.label for neighbour in ranked} == {"odd"}
    conditioning = prototypes.conditioning("odd")
    torch.testing.assert_close(conditioning.embedding_grid, prototypes.grids[3:])
    assert conditioning.encoder["dim"] == 5
    assert prototypes.conditioning().batch_size == 6


def test_what_is_saved_is_what_is_loaded(prototypes, tmp_path):
    prototypes.save(tmp_path)
    again = Prototypes.load(tmp_path)
    assert (again.keys, again.labels, again.counts) == (prototypes.keys, prototypes.labels, prototypes.counts)
    assert again.facts == prototypes.facts
    torch.testing.assert_close(again.grids, prototypes.grids, rtol=0, atol=0)
    with pytest.raises(OutputError, match="already"):
        prototypes.save(tmp_path)
    with pytest.raises(MissingWeights, match="pixcell prior STORE FOLDER --prototypes"):
        Prototypes.load(tmp_path / "nowhere")
    description = tmp_path / "prototypes.json"
    description.write_text(description.read_text().replace('"stands_for"', '"stood_for"'))
    with pytest.raises(WrongWeights, match="no whole prototypes"):
        Prototypes.load(tmp_path)


def test_what_makes_no_sense_is_refused(prototypes):
    with pytest.raises(ModelError, match=r"no prototype of 'blue'\. Labels: even, odd"):
        prototypes.conditioning("blue")
    with pytest.raises(ModelError, match=r"grid of \(1, 2, 4\) was given; the prototypes are of \(1, 2, 5\)"):
        prototypes.nearest(torch.zeros(1, 2, 4))
    with pytest.raises(ModelError, match="NaN"):
        prototypes.nearest(torch.full((1, 2, 5), float("nan")))
    with pytest.raises(ModelError, match="0 prototypes per label"):
        find(embeddings(), per_label=0)
