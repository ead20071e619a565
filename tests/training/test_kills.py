"""A run killed at any moment goes on to the same weights, bit for bit, as one that was left alone."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pixcell.config import save_recipe
from tiny_objective import same, weights

KILLED = -signal.SIGKILL

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forks of one process")


@pytest.fixture(scope="module")
def trial():
    """Run one trial, as ``dies.py`` says; return how it ended."""
    tests = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, str(tests / "training" / "dies.py")],
        env={**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run_one(what, run, moment="none", which=None):
            server.stdin.write(json.dumps([str(what), str(run), moment, which]) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield run_one
        server.stdin.close()


def changes_of(run):
    return json.loads(run.with_suffix(".changes.json").read_text())


def test_killed_before_any_change_that_a_checkpoint_makes(tmp_path, trial):
    """Around the second of three checkpoints, with the first one deleted after it.

    Before each renaming, and before every second of the other changes (all of them passed, too: 49 moments).
    """
    whole = tmp_path / "whole"
    trial("line", whole, "watch")
    changes = list(enumerate(changes_of(whole), 1))
    first = next(number for number, (_, path) in changes if "step-00000004" in path)
    end = next(number for number, (_, path) in changes if "step-00000006" in path)
    window = changes[first - 1 : end - 1]
    assert {kind for _, (kind, _) in window} >= {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
    assert len(window) > 30
    expected, lasts = weights(whole), []
    for number, change in window:
        if number % 2 and change[0] != "os.rename":
            continue
        run = tmp_path / f"at-{number}"
        killed = trial("line", run, "change", number)
        assert killed["status"] == KILLED, change
        lasts.append(killed["last"])
        resumed = trial("line", run)
        assert (resumed["status"], resumed["last"]) == (0, 6), change
        assert same(weights(run), expected), change
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"], change
        assert not list(run.rglob("*.tmp-*")), change
    assert lasts == sorted(lasts)
    assert set(lasts) == {2, 4}


def test_killed_at_random_times_over_and_over(tmp_path, trial):
    trial("line", tmp_path / "whole")
    kills, seeds = 0, itertools.count()
    while kills < 2:  # a process may be done before its time has come
        seed = next(seeds)
        assert seed < 20, "no process was killed"
        outcome = trial("line", tmp_path / f"killed-{seed}", "random", seed)
        assert (outcome["status"], outcome["last"]) == (0, 6)
        assert same(weights(tmp_path / f"killed-{seed}"), weights(tmp_path / "whole"))
        kills += outcome["kills"]


def test_a_recipe_that_was_killed_goes_on_to_the_same_weights(tmp_path, trial, recipe):
    """The whole verb: in the middle of a step, and at moments spread over all that it does to its folder."""
    file, whole = tmp_path / "recipe.yaml", tmp_path / "whole"
    save_recipe(recipe("trainer.keep_last=9", "trainer.ema_decays=[0.99, 0.2]"), file)
    trial(file, whole, "watch")
    count = len(changes_of(whole))
    for moment, which in (("step", 4), *(("change", 1 + count * place // 4) for place in range(1, 4))):
        run = tmp_path / f"{moment}-{which}"
        assert trial(file, run, moment, which)["status"] == KILLED
        assert trial(file, run)["status"] == 0
        for step in (2, 4, 6):
            assert same(weights(run, step), weights(whole, step)), (moment, which)
        assert not list((run / "checkpoints").glob(".unfinished-*"))
