"""A report tells what its figures mean, and comes back from its file as it went in."""

import dataclasses
import json

import numpy as np
import pytest

from pixcell.errors import EvaluationError
from pixcell.evaluation.comparison import Measure, PairFigures, compare_sets, split_unit
from pixcell.evaluation.report import Report, SetFacts, figure_text


def side(path):
    return SetFacts(path, "folder", 24, 24, 24, {"96 x 96": 24}, [0.5], 0, 0, [])


def report_of(measures, pairs=None):
    return Report(
        real=side("real"),
        synthetic=side("synthetic"),
        generator={"model": "runs/nano", "steps": 20},
        extractor={"name": "stain-texture", "sha256": "0" * 64, "dim": 8, "resize": "none"},
        measures=measures,
        pairs=pairs or PairFigures(0, 0, None, reason="No pairs."),
        settings={"seed": 0},
        warnings=["Few pictures."],
        environment={"pixcell": "0"},
        created="2025-01-01T00:00:00+00:00",
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def compared(rng, shift, count=200, dim=8):
    real = rng.standard_normal((count, dim))
    return compare_sets(real, rng.standard_normal((count, dim)) + shift, range(count), seed=1, num_subsets=20)


def test_a_perfect_generator_scores_the_floor(rng):
    frechet, kernel, precision, recall = compared(rng, 0.0)
    assert frechet.matched == pytest.approx(frechet.floor, rel=0.35)
    assert abs(kernel.matched - kernel.floor) < 5 * kernel.floor_std
    assert precision.matched == pytest.approx(precision.floor, abs=0.15)
    assert recall.matched == pytest.approx(recall.floor, abs=0.15)
    assert frechet.matched_count == 100


def test_a_poor_generator_is_far_above_the_floor(rng):
    frechet, kernel, *_ = compared(rng, 1.0)
    assert frechet.matched > 5 * frechet.floor
    assert kernel.matched > kernel.floor + 10 * kernel.floor_std
    assert "times as far" in report_of([frechet, kernel]).summary


@pytest.mark.parametrize(
    ("count", "says"), [(8, "8 pictures are too few"), (400, "does not tell these synthetic pictures from")]
)
def test_few_pictures_are_no_sign_of_likeness(rng, count, says):
    _, kernel, *_ = compared(rng, 0.0)
    frechet = Measure("frechet", "Frechet distance", "lower", reason="Few.")
    report = report_of([frechet, kernel])
    report = dataclasses.replace(report, synthetic=dataclasses.replace(report.synthetic, num_fields=count))
    report = dataclasses.replace(report, real=dataclasses.replace(report.real, num_fields=400))
    assert says in report.summary


def test_the_same_seed_gives_the_same_figures():
    one, other = (compared(np.random.default_rng(5), 0.5) for _ in range(2))
    assert one == other


def test_too_few_pictures_give_a_reason_and_never_a_number(rng):
    frechet, kernel, precision, _ = compared(rng, 0.5, count=12, dim=16)
    assert frechet.value is None
    assert "at least 17 pictures" in frechet.reason
    assert kernel.value is not None
    assert kernel.floor is not None
    assert precision.value is not None
    text = report_of([frechet, kernel]).markdown()
    assert "| Frechet distance | – |" in text
    assert "at least 17 pictures" in text


def test_enough_pictures_for_a_value_but_not_for_its_floor_say_so(rng):
    frechet = compared(rng, 0.5, count=24, dim=16)[0]
    assert frechet.value is not None
    assert (frechet.floor, frechet.matched) == (None, None)
    assert "No floor" in frechet.reason


def test_halves_of_a_store_are_made_of_slides_where_there_are_enough():
    assert split_unit(["a", "b", "c", "d"], "store", is_cut=False) == "slide"
    assert split_unit(["a", "b"], "store", is_cut=False) == "field"
    assert split_unit(["a", "b", "c", "d"], "folder", is_cut=True) == "picture"
    assert split_unit(["a", "b"], "folder", is_cut=True) == "field"


def test_a_report_comes_back_from_json_as_it_was(rng, tmp_path):
    report = report_of(compared(rng, 0.5), PairFigures(9, 3, "like", None, 0.8, 0.1, 0.3, 0.7))
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.as_json(), allow_nan=False))
    assert Report.load(path) == report


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "no JSON object"),
        ('{"format": "other"}', "version"),
        ('{"format": "pixcell-report", "version": 1}', "damaged"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, content, reason):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(EvaluationError, match=reason):
        Report.load(tmp_path / "x.json")


def test_the_summary_names_the_pairs_and_their_chance(rng):
    pairs = PairFigures(8, 4, "like", None, 0.8, 0.1, 0.3, 0.75)
    assert "75% of the pictures are nearest to the reference" in report_of(compared(rng, 0), pairs).summary
    assert "chance: 25%" in report_of(compared(rng, 0), pairs).summary


@pytest.mark.parametrize(
    ("value", "uncertainty", "text"),
    [
        (None, None, "–"),
        (0.0, None, "0"),
        (12345.6, None, "12346"),
        (1.0, 0.0, "1 ± 0"),
        (0.5, 0.012, "0.500 ± 0.012"),
        (250.3, 31.0, "250 ± 31"),
        (-0.0012, 0.0034, "-0.0012 ± 0.0034"),
    ],
)
def test_figures_have_the_digits_that_their_uncertainty_leaves(value, uncertainty, text):
    assert figure_text(value, uncertainty) == text


def test_measures_are_found_by_name():
    report = report_of([Measure("kernel", "Kernel distance", "lower", value=1.0)])
    assert report.measure("kernel").value == 1.0
