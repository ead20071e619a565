"""Prompts are worded as published; where the published code fails or contradicts itself, both are shown."""

import json
import math

import pytest
import torch

from golden_vectors import FOLDER
from pixcell.errors import ModelError
from pixcell.models.prompts import (
    LEVELS,
    UNCONDITIONAL_CLASS,
    class_label,
    class_name,
    fused_prompt,
    level_of,
    rows_to_drop,
)

PUBLISHED = json.loads((FOLDER / "pathldm-prompts.json").read_text())


@pytest.mark.parametrize(
    "case", PUBLISHED["cases"], ids=lambda case: f"{case['num_levels']}-{case['prompt']}"
)
def test_prompts_are_the_published_ones(case):
    prompt = fused_prompt(case["summary"], case["p_tumor"], case["p_til"], case["num_levels"])
    if case["reference_error"] is None:
        assert prompt == case["prompt"]
        return
    # The published rule runs past the last level at 1.0 and fails; ours stays on the last.
    last, highest = case["num_levels"], LEVELS[case["num_levels"]][-1]
    assert last in (math.floor(case["p_tumor"] * last), math.floor(case["p_til"] * last))
    assert f"{highest} {'tumor' if case['p_tumor'] == 1 else 'til'}; " in prompt


@pytest.mark.parametrize("case", PUBLISHED["class_labels"])
def test_reference_labels_are_the_published_ones(case):
    """Also where a class was to be dropped with certainty: the published code never does."""
    label = class_label(case["p_tumor"], case["p_til"], reference=True)
    assert (label, class_name(label)) == (case["label"], case["text"])


def test_one_boundary_for_words_and_classes():
    """Ours: 0.5 is high in both. The published classes count it as low."""
    assert fused_prompt("s", 0.5, 0.5) == "high tumor; high til; s"
    assert class_label(0.5, 0.5) == 3
    assert class_label(0.5, 0.5, reference=True) == 0
    for p in (0.0, 0.3, 0.49999, 0.50001, 0.9, 1.0):
        assert class_label(p, 1 - p) == class_label(p, 1 - p, reference=True)


@pytest.mark.parametrize("num_levels", LEVELS)
def test_levels_part_the_probabilities_evenly(num_levels):
    levels = [level_of(step / 1000, num_levels) for step in range(1001)]
    assert levels == sorted(levels)
    assert set(levels) == set(range(num_levels))


@pytest.mark.parametrize("probability", [-0.01, 1.01, float("nan")])
def test_what_is_no_probability_is_refused(probability):
    for use in (
        lambda: fused_prompt("s", p_til=probability),
        lambda: class_label(probability, 0.5),
        lambda: rows_to_drop([0.5], probability),
    ):
        with pytest.raises(ModelError, match=r"\[0, 1\]"):
            use()


def test_levels_without_words_are_refused():
    with pytest.raises(ModelError, match="2, 3, 4"):
        fused_prompt("s", num_levels=5)


def test_a_class_that_does_not_exist_is_refused():
    with pytest.raises(ModelError, match="no class 5"):
        class_name(5)


@pytest.mark.parametrize("case", PUBLISHED["text_dropout_reference_behaviour"])
def test_reference_dropping_spares_many_lymphocytes(case):
    dropped = bool(rows_to_drop([case["p_til"]], 1.0, reference=True)[0])
    assert dropped is (case["reference_prompt_with_dropout_probability_1"] == "")
    assert bool(rows_to_drop([case["p_til"]], 1.0)[0])  # ours drops every prompt alike


def test_prompts_are_dropped_as_often_as_asked():
    p_til = [0.9, None] * 5000
    share = rows_to_drop(p_til, 0.1, generator=torch.Generator().manual_seed(0)).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.01)  # three standard deviations of 10000 draws
    assert not rows_to_drop(p_til, 0.0).any()


def test_the_draw_comes_from_the_generator():
    first, again = (rows_to_drop([None] * 99, 0.5, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert torch.equal(first, again)


def test_an_unknown_probability_means_no_class():
    assert class_label(None, 0.9) == class_label(0.9, None) == UNCONDITIONAL_CLASS
