"""Train in processes that are killed at chosen moments.

Reads trials, a line of JSON each: ``[what, run, moment, which]``. ``what`` is ``line`` (``tiny_objective``),
or a recipe file; it is trained in the folder ``run`` in a process of its own. Moments:

    none      it is left alone
    watch     it is left alone, and what it does to files is written to ``<run>.changes.json``
    step      SIGKILL in the middle of the ``which``-th step from the start of this process
    change    SIGKILL before it changes a file or folder of its run for the ``which``-th time: opens one for
              writing, syncs, renames, links, deletes
    random    SIGKILL at random times, started again each time until it is through; ``which`` is the seed

Answers each with a line of JSON: how it ended, and the step of the last checkpoint, after verifying it.

Everything is imported once, then each trial is a fork: a hundred of them take seconds.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from pixcell.config import load_recipe
from pixcell.tasks.train import train
from pixcell.training import averages
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.recipe import TrainRecipe
from tiny_objective import fit

_CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"}


def die():
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(count):
    update, calls = averages.AveragedWeights.update, 0

    def wrapped(*arguments):
        nonlocal calls
        calls += 1
        if calls == count:
            die()
        update(*arguments)

    averages.AveragedWeights.update = wrapped


def watch_changes(run, count, changes):
    """Note each change below a run before it happens; die at the ``count``-th.

    Python tells its audit hooks of every change it is about to make. A file is synced through a descriptor of
    its own, so that moment is among them: it is opened once more.
    """

    def hook(event, arguments):
        if event not in _CHANGES or (event == "open" and arguments[1] in ("r", "rb")):
            return
        path = arguments[0]
        if event == "os.rename" and str(run) not in str(path):
            path = arguments[1]
        # Deleting a tree goes by descriptors and bare names; only the run is ever deleted from.
        below = str(run) in str(path) or event in ("os.remove", "os.rmdir")
        if not below:
            return
        changes.append([event, str(path)])
        if len(changes) == count:
            die()

    sys.addaudithook(hook)


def train_once(what, run, moment, which):
    changes = []
    if moment == "step":
        kill_at_step(which)
    elif moment in ("change", "watch"):
        watch_changes(run, which if moment == "change" else None, changes)
    if what == "line":
        fit(run, steps=6, checkpoint_every=2, keep_last=1, ema_decays=(0.9, 0.2))
    else:
        train(load_recipe(TrainRecipe, what), run)
    if moment == "watch":
        run.with_suffix(".changes.json").write_text(json.dumps(list(changes)))


def started(what, run, moment, which):
    """Fork a process that trains; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        train_once(what, run, moment, which)
        status = 0
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)


def ended(child, after_s=None):
    """Wait for a process, or kill it when its time is over; return its status as ``subprocess`` has it."""
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)  # one that has ended stays until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def random_kills(what, run, seed):
    """Kill at random moments of what a whole run takes; return how often it took."""
    chance = random.Random(seed)
    begun = time.monotonic()
    status = ended(started(what, run.with_name(f"{run.name}-timed"), "none", None))
    whole_s = time.monotonic() - begun
    kills = 0
    while status == 0 and kills < 12:
        status = ended(started(what, run, "none", None), chance.uniform(0.1, 0.9) * whole_s)
        if status == 0:
            return status, kills
        assert status == -signal.SIGKILL, status
        kills, status = kills + 1, 0
    return ended(started(what, run, "none", None)), kills


def outcome_of(what, run, moment, which):
    kills = None
    if moment == "random":
        status, kills = random_kills(what, run, which)
    else:
        status = ended(started(what, run, moment, which))
    last = Checkpoint.last(run)
    if last is not None:
        last.verify()
    return {"status": status, "last": last.step if last else None, "kills": kills}


if __name__ == "__main__":
    for line in sys.stdin:
        what, run, moment, which = json.loads(line)
        print(json.dumps(outcome_of(what, Path(run), moment, which)), flush=True)
