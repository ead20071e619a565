"""A run killed at any moment goes on to the same weights, bit for bit, as one that was left alone."""

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


def outcomes(what, folder, trials):
    """Run trials, as ``dies.py`` says; return how each ended."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(tests / "training" / "dies.py"), str(what), str(folder), json.dumps(trials)],
        env={**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(trials), done.stdout[-4000:] + done.stderr[-4000:]
    return found


def changes_in(folder, run):
    return json.loads((folder / f"{run}.changes.json").read_text())


def test_killed_before_any_change_that_a_checkpoint_makes(tmp_path):
    """Around the second of three checkpoints, with the first one deleted after it: every moment there is."""
    outcomes("line", tmp_path, [["whole", "watch", None]])
    changes = changes_in(tmp_path, "whole")
    paths = [path for _, path in changes]
    first = next(number for number, path in enumerate(paths, 1) if "step-00000004" in path)
    end = next(number for number, path in enumerate(paths, 1) if "step-00000006" in path)
    window = range(first, end)
    kinds = {kind for kind, path in changes[first - 1 : end - 1]}
    assert kinds >= {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}, kinds
    assert len(window) > 30
    trials = [
        trial
        for number in window
        for trial in ([f"at-{number}", "change", number], [f"at-{number}", "none", None])
    ]
    found = outcomes("line", tmp_path, trials)
    expected = weights(tmp_path / "whole")
    for number, killed, resumed in zip(window, found[::2], found[1::2], strict=True):
        what = changes[number - 1]
        assert killed["status"] == KILLED, what
        assert killed["last"] in (2, 4), what
        assert (resumed["status"], resumed["last"]) == (0, 6), what
        assert same(weights(tmp_path / f"at-{number}"), expected), what
        kept = [path.name for path in (tmp_path / f"at-{number}" / "checkpoints").iterdir()]
        assert kept == ["step-00000006"], what
    lasts = [killed["last"] for killed in found[::2]]
    assert lasts == sorted(lasts)
    assert set(lasts) == {2, 4}


def test_killed_at_random_times_over_and_over(tmp_path):
    found = outcomes(
        "line",
        tmp_path,
        [["whole", "none", None], *([f"killed-{seed}", "random", seed] for seed in range(5))],
    )
    assert [one["status"] for one in found] == [0] * 6
    assert sum(one["kills"] for one in found[1:]) >= 3
    for seed in range(5):
        assert same(weights(tmp_path / f"killed-{seed}"), weights(tmp_path / "whole"))


def test_a_recipe_that_was_killed_goes_on_to_the_same_weights(tmp_path, recipe):
    """The whole verb: in the middle of a step, and at moments spread over all that it does to its folder."""
    save_recipe(recipe("trainer.keep_last=9", "trainer.ema_decays=[0.99, 0.2]"), tmp_path / "recipe.yaml")
    outcomes(tmp_path / "recipe.yaml", tmp_path, [["whole", "watch", None]])
    count = len(changes_in(tmp_path, "whole"))
    moments = [["step", 1], ["step", 4], *(["change", 1 + count * place // 6] for place in range(6))]
    trials = [
        trial
        for number, (moment, which) in enumerate(moments)
        for trial in ([f"run-{number}", moment, which], [f"run-{number}", "none", None])
    ]
    found = outcomes(tmp_path / "recipe.yaml", tmp_path, trials)
    assert [one["status"] for one in found] == [KILLED, 0] * len(moments)
    for number in range(len(moments)):
        for step in (2, 4, 6):
            expected = weights(tmp_path / "whole", step)
            assert same(weights(tmp_path / f"run-{number}", step), expected), moments[number]
        assert not list((tmp_path / f"run-{number}" / "checkpoints").glob(".unfinished-*"))
