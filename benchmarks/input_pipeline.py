"""What the input pipeline delivers against what the model takes, at the sizes of ``mini``.

    python benchmarks/input_pipeline.py                     drawn fields, 128 and 256 px
    python benchmarks/input_pipeline.py --recipe mini-128   the store of that recipe

The pipeline is the one of ``pixcell train``: order of samples, records read from the store, a fresh draw from
each posterior, noise, timestep, dropout, collation; with 0, 1 and 2 loader processes. The model takes whole
training steps of ``mini`` (12 million weights, bf16); their time is that of forward, backward and optimiser,
without the wait for data. Model and pipelines take turns, round by round.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from drawn_fields import draw_store, recipe_for

from pixcell.config import load_recipe
from pixcell.training.determinism import BatchPlan
from pixcell.training.loading import load_batches
from pixcell.training.objectives import Objective
from pixcell.training.order import SampleOrder
from pixcell.training.probe import Rehearsal
from pixcell.training.recipe import TrainRecipe, build_objective


def delivered(objective: Objective, recipe: TrainRecipe, workers: int, seconds: float, first: int) -> float:
    """Return samples per second, without the start of the loader processes."""
    config = recipe.trainer
    plan = BatchPlan(
        SampleOrder(len(objective.samples), config.seed),
        batch_size=config.batch_size,
        micro_batch_size=config.batch_size,
        first_step=first,
        last_step=first + 10**6,
    )
    batches = load_batches(objective.samples, plan, seed=config.seed, workers=workers)
    for _ in range(4 * max(1, workers)):  # what was read ahead while the processes started
        next(batches)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        count += len(next(batches).samples["key"])
    rate = count / (time.perf_counter() - started)
    batches.close()
    return rate


def taken(rehearsal: Rehearsal, steps: int) -> float:
    """Return samples per second that the model takes, the loader left out of account."""
    times = [rehearsal.take_step() for _ in range(steps)]
    return rehearsal.config.batch_size / statistics.median(one.computing + one.moving for one in times)


@contextlib.contextmanager
def recipes_of(options: argparse.Namespace) -> Iterator[list[TrainRecipe]]:
    if options.recipe:
        yield [
            load_recipe(TrainRecipe, options.recipe, [f"data.size={size}", "model.init=null", *options.set])
            for size in options.sizes
        ]
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_store(Path(folder), options.tiles)
        yield [recipe_for(Path(folder), "mini-128", size, options.set) for size in options.sizes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[128, 256], help="Sides of fields, in pixels."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="Of the model, per round.")
    parser.add_argument("--seconds", type=float, default=3.0, help="Of each pipeline, per round.")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tiles", type=int, default=512, help="Drawn ones, of 512 px.")
    parser.add_argument("--recipe", help="A recipe whose store is there, instead of drawn fields.")
    parser.add_argument("--set", action="append", default=[], help="Override one value of the recipe.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| fields | model takes, images/s | loader processes | pipeline delivers | ratio |")
    print("|---|---|---|---|---|")
    with recipes_of(options) as recipes:
        for recipe in recipes:
            objective = build_objective(recipe)
            rehearsal = Rehearsal(objective, recipe.optimizer, recipe.trainer)
            taken(rehearsal, 1)
            rates: dict[int, list[float]] = {workers: [] for workers in options.workers}
            model: list[float] = []
            for number in range(options.rounds):
                model.append(taken(rehearsal, options.steps))
                for workers, found in rates.items():
                    found.append(delivered(objective, recipe, workers, options.seconds, 1000 * number))
            for workers, found in rates.items():
                ratios = [rate / used for rate, used in zip(found, model, strict=True)]
                print(
                    f"| {recipe.data.size} px | {statistics.median(model):.1f} | {workers} "
                    f"| {statistics.median(found):.0f} | {statistics.median(ratios):.0f} "
                    f"({min(ratios):.0f} to {max(ratios):.0f}) |"
                )


if __name__ == "__main__":
    main()
