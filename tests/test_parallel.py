"""One bad slide does not stop the others."""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from pixcell.errors import SomeFailed, UnreadableSlide
from pixcell.parallel import Done, Failed, map_slides
from worker_functions import leave_a_mark, work


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


def test_after_a_killed_worker_the_rest_is_shared_among_workers_again(monkeypatch):
    """Only what was handed out is tried alone; a long queue does not crawl on in one process."""
    monkeypatch.setenv("PYTEST_MAIN", str(os.getpid()))
    pools = []

    class Counted(ProcessPoolExecutor):
        def __init__(self, workers, **options):
            pools.append(workers)
            super().__init__(workers, **options)

    monkeypatch.setattr("pixcell.parallel.ProcessPoolExecutor", Counted)
    items = [4, *range(5, 17)]
    results = list(map_slides(work, items, 2))
    assert [result.item for result in results if isinstance(result, Failed)] == [4]
    assert sorted(result.item for result in results) == items
    assert pools.count(2) == 2
    assert 1 <= pools.count(1) <= 3


def test_a_caller_that_stops_early_does_not_wait_for_all(tmp_path):
    results = map_slides(leave_a_mark, [tmp_path / str(number) for number in range(40)], 2)
    next(results)
    results.close()
    assert len(list(tmp_path.iterdir())) < 10


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
