"""One bad slide does not stop the others."""

import os
from pathlib import Path

import pytest

from pixcell.errors import SomeFailed, UnreadableSlide
from pixcell.parallel import Done, Failed, map_slides
from worker_functions import work


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_are_results(workers):
    results = list(map_slides(work, [1, 2, 3, 5], workers))
    assert {result.item: result.value for result in results if isinstance(result, Done)} == {1: 1, 5: 25}
    reasons = {result.item: result.reason for result in results if isinstance(result, Failed)}
    assert reasons == {2: "slide 2 holds no tissue", 3: "ZeroDivisionError: bug"}


def test_a_killed_worker_takes_only_its_own_slide_with_it(monkeypatch):
    monkeypatch.setenv("PYTEST_MAIN", str(os.getpid()))
    results = list(map_slides(work, [1, 4, 5, 6, 7], 2))
    assert sorted(result.value for result in results if isinstance(result, Done)) == [1, 25, 36, 49]
    (failed,) = [result for result in results if isinstance(result, Failed)]
    assert failed.item == 4
    assert "killed" in failed.reason


def test_ray_gives_what_processes_give(monkeypatch):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where its workers find this function
    results = list(map_slides(work, [1, 2, 5], engine="ray"))
    assert {result.item: result.value for result in results if isinstance(result, Done)} == {1: 1, 5: 25}
    assert [result.reason for result in results if isinstance(result, Failed)] == ["slide 2 holds no tissue"]


def test_errors_survive_the_way_between_processes(tmp_path):
    import pickle

    for error in (
        UnreadableSlide(tmp_path / "a.svs", "truncated"),
        SomeFailed("slides", [("a", "b"), ("c", "d")], tmp_path / "t.csv"),
    ):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
