"""Train by a recipe in a process that kills itself at a chosen moment: RECIPE RUN MOMENT COUNT.

MOMENT is ``step`` (in the middle of the COUNT-th step from the start of this process), ``sync`` (at the
COUNT-th file that checkpoints sync, so while one is written), or ``none``.
"""

import os
import signal
import sys
from pathlib import Path

from pixcell.config import load_recipe
from pixcell.tasks.train import train
from pixcell.training import averages, checkpoints
from pixcell.training.recipe import TrainRecipe


def dying(function, count):
    """The function, which at its ``count``-th call ends this process as a power cut would."""
    calls = 0

    def wrapped(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    return wrapped


if __name__ == "__main__":
    recipe, run, moment, count = sys.argv[1:]
    if moment == "step":
        averages.AveragedWeights.update = dying(averages.AveragedWeights.update, int(count))
    elif moment == "sync":
        checkpoints._sync = dying(checkpoints._sync, int(count))
    train(load_recipe(TrainRecipe, recipe), Path(run))
