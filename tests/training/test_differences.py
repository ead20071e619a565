"""What differs between two recipes is said by name, and no more than that."""

import pytest

from pixcell.training.differences import differences


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, ["a.b.c was 1 and is 2"]),
        ({"a": [0.9999]}, {"a": [0.9999, 0.999]}, ["a was [0.9999] and is [0.9999, 0.999]"]),
        ({"a": {"b": 1}}, {"a": {}}, ["a.b was 1 and is not given"]),
        ({"a": {}}, {"a": {"b": None}}, ["a.b was not given and is None"]),
        ({"a": None}, {"a": {"b": 1}}, ["a was None and is {'b': 1}"]),
        ({"a": {"b": 1}}, {"a": None}, ["a was {'b': 1} and is None"]),
        ({"a": list("vwxyz")}, {"a": list("wxyzv")}, ["a has its entries in another order"]),
        ({"a": list("vwxyz")}, {"a": list("wxyz!")}, ["a lacks v and has ! more"]),
        ({"a": list("vwxyz")}, {"a": list("vwxyzz")}, ["another number of times"]),
    ],
)
def test_each_difference_is_one_sentence(before, now, said):
    found = differences(before, now)
    assert len(found) == len(said)
    for sentence, part in zip(found, said, strict=True):
        assert part in sentence


def test_of_another_kind_only_the_name_is_said():
    before = {"optimizer": {"name": "adamw", "beta1": 0.9, "lr": 1.0}}
    now = {"optimizer": {"name": "came", "betas": [0.9, 0.999, 0.9999], "lr": 2.0}}
    assert differences(before, now) == ["optimizer.name was 'adamw' and is 'came'"]


def test_free_values_may_differ_also_inside_and_the_name():
    before = {"name": "a", "trainer": {"keep_last": 1, "seed": 0}}
    now = {"name": "b", "trainer": {"keep_last": 2, "seed": 1}}
    assert differences(before, now, {"name", "trainer.keep_last"}) == ["trainer.seed was 0 and is 1"]
