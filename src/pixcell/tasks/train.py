"""Train a model by a recipe, in a run folder that can be killed and gone on with at any time.

runs/<name>/
├── recipe.yaml          as resolved, with every default
├── environment.json     every start: versions, processes, from where to where, how it ended
├── growth.json          what was carried, rebuilt and dropped, if the model grew from another stage's
├── mixture.json         groups of fields, their shares and passes, if data.mix is given
├── dropped.jsonl        samples that could not be read and were left out, if there were any
├── metrics.jsonl        figures, one line per logged step; tensorboard/ shows the same
├── previews/            held-out tissue above what the model makes of its embeddings
├── checkpoints/         step-…/pipeline to use, step-…/state to go on
└── report.html          all of it on one page; `pixcell report` writes it anew
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from pixcell.config import load_recipe, save_recipe
from pixcell.console import console, facts, is_main_process, table
from pixcell.errors import OutputError, PixCellError, RecipeError, RunError
from pixcell.files import write_json, writing_to
from pixcell.tasks.run_starts import noting_start
from pixcell.tasks.training_report import report_training
from pixcell.training.checkpoints import Checkpoint, exclusively
from pixcell.training.determinism import BatchPlan
from pixcell.training.differences import differences
from pixcell.training.flops import training_flops
from pixcell.training.loading import load_batches
from pixcell.training.metrics import check_wandb
from pixcell.training.objectives import Grown, Objective, order_of
from pixcell.training.order import MixedOrder
from pixcell.training.recipe import TrainRecipe, build_objective
from pixcell.training.trainer import Trainer

__all__ = ["TrainResult", "train"]

_STOPPED = 75

# What may differ between the starts of one run: none of it moves a weight, beyond the rounding of sums that
# are added up in another order.
_FREE = {
    "name",
    "data.cache",
    "trainer.micro_batch_size",
    "trainer.gradient_checkpointing",
    "trainer.compile",
    "trainer.device",
    "trainer.max_hours",
    "trainer.spike",
    "trainer.keep_last",
    "trainer.keep_every",
    "trainer.checkpoint_every",
    "trainer.log_every",
    "trainer.tensorboard",
    "trainer.mfu",
    "trainer.report",
    "trainer.wandb",
    "trainer.on_bad_tile",  # a run that met one can go on without it
    "trainer.workers",
    "objective.scheduler",
    "objective.preview_steps",
    "objective.preview_guidance",
    "objective.preview_guidance_also",
}


@dataclass(frozen=True)
class TrainResult:
    """How a run stands after a call."""

    run: Path
    step: int
    num_steps: int
    checkpoint: Path
    preview: Path
    loss: float | None
    """Mean over the last logged steps; None if there was nothing left to do."""
    seconds: float
    """Spent on training in all, over every start."""
    samples_per_s: float | None
    stopped_by: str | None
    """The signal that ended it early, or ``trainer.max_hours``, if one did."""
    num_dropped: int = 0
    """Samples that the run went without so far, each counted as often as it came: ``trainer.on_bad_tile``."""

    @property
    def is_complete(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.num_steps

    @property
    def exit_code(self) -> int:
        """Of the command: 0 when complete; 75 (EX_TEMPFAIL: try again) when it stopped early and saved.

        Only the main process says 75. Launchers end the others as soon as one process ends with an error, and
        the main one may still have files to finish when they are done.
        """
        return 0 if self.is_complete or not is_main_process() else _STOPPED

    def _dropped(self) -> str:
        return f"{self.num_dropped} times a sample could not be read; see {self.run / 'dropped.jsonl'}"

    def __rich__(self) -> Table:
        """Lay the result out for a terminal."""
        end = (
            "complete" if self.is_complete else f"stopped by {self.stopped_by}; run the same command to go on"
        )
        return facts(
            f"Run {self.run}",
            {
                "steps": f"{self.step} of {self.num_steps}, {end}",
                "loss": "-" if self.loss is None else f"{self.loss:.4f}",
                "images/s": "-" if self.samples_per_s is None else f"{self.samples_per_s:.1f}",
                "time": f"{self.seconds / 60:.1f} min",
                **({"dropped": self._dropped()} if self.num_dropped else {}),
                "checkpoint": self.checkpoint,
                "preview": self.preview,
                **({"report": report} if (report := self.run / "report.html").is_file() else {}),
            },
        )


def train(recipe: TrainRecipe, run: Path | None = None, resume: bool = True) -> TrainResult:
    """Train to the recipe's last step; go on where an earlier call was stopped or killed.

    Args:
        recipe: The whole run.
        run: Its folder. None: ``runs/<recipe name>``.
        resume: Go on from the last checkpoint. False: the folder must hold none.

    Raises:
        RecipeError: If parts of the recipe do not fit each other or the data.
        StoreError: If a store or column is missing or does not fit.
        MissingExtra: If Weights & Biases is wanted and not installed.
        RunError: If the folder is of another recipe, in use, or its checkpoint is damaged; or the loss is
            no finite number.
        OutputError: If the folder cannot be written. The last checkpoint stays usable.
    """
    run, started = run or Path("runs") / recipe.name, time.monotonic()
    for name, what in (
        ("store.json", "a tile store"),
        ("pack.json", "a pack"),
        ("model_index.json", "a model"),
    ):
        if (run / name).is_file():
            raise OutputError(f"{run} is {what}; a run needs a folder of its own: choose another with --run.")
    if recipe.trainer.wandb is not None:
        check_wandb()
    with exclusively(run) if is_main_process() else contextlib.nullcontext():
        _must_be_same_recipe(run, recipe)
        last = Checkpoint.last(run)
        if not resume and last is not None:
            raise OutputError(
                f"{run} holds a run at step {last.step}: resume it, or choose another folder with --run."
            )
        objective = build_objective(recipe, last)
        flops = None
        if recipe.trainer.mfu and is_main_process():
            flops = _flops_per_sample(objective, recipe.trainer.seed)
        trainer = Trainer(objective, recipe.optimizer, recipe.trainer, run, recipe.name, flops)
        if is_main_process():
            save_recipe(recipe, run / "recipe.yaml")
            if isinstance(trainer.order, MixedOrder):
                _report_mixture(trainer.order, trainer.num_steps * recipe.trainer.batch_size, run)
            if isinstance(objective, Grown) and objective.growth is not None:
                write_json(run / "growth.json", objective.growth)
        with writing_to(run), _noted(run, trainer, last.step if last else 0) as end:
            outcome = trainer.fit(resume, started)
            end |= {"step": outcome.step, "ended_by": outcome.stopped_by or "its last step"}
    return TrainResult(
        run=run,
        step=outcome.step,
        num_steps=outcome.num_steps,
        checkpoint=outcome.checkpoint.path,
        preview=run / "previews" / f"{outcome.checkpoint.path.name}.png",
        loss=outcome.loss,
        seconds=outcome.seconds,
        samples_per_s=outcome.samples_per_s,
        stopped_by=outcome.stopped_by,
        num_dropped=outcome.num_dropped,
    )


def _must_be_same_recipe(run: Path, recipe: TrainRecipe) -> None:
    """Refuse to go on by another recipe; a run is one recipe from its first step to its last."""
    path = run / "recipe.yaml"
    if not path.is_file() or Checkpoint.last(run) is None:
        return
    try:
        before = load_recipe(TrainRecipe, path).model_dump(mode="json")
    except RecipeError as error:
        if not _is_mapping(path):
            raise RunError(
                f"{path} is damaged: {error} Put the recipe of the run back, or delete the file to have it "
                "written anew from the recipe that you give, which must be the same."
            ) from error
        raise RunError(
            f"{run} was begun by another version of pixcell, whose recipe this one does not understand: "
            f"{error} Go on with that version, or choose another folder with --run."
        ) from error
    lengths = {"trainer.steps", "trainer.epochs"}  # a cosine has its end in every rate
    free = _FREE | (lengths if recipe.optimizer.schedule == "constant" else set())
    if found := differences(before, recipe.model_dump(mode="json"), free):
        raise RunError(
            f"{run} was begun by another recipe: {'; '.join(found)}. "
            f"Choose another folder with --run, or go on by its own recipe: pixcell train {path}"
        )


def _is_mapping(path: Path) -> bool:
    """Say whether a file holds something that may be a recipe."""
    try:
        return isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _report_mixture(order: MixedOrder, num_draws: int, run: Path) -> None:
    """Show what becomes of each group in the whole run, and keep it."""
    shares = order.shares(num_draws)
    rows = [(one.group, one.samples, f"{one.share:.2%}", f"{one.passes:.2f}") for one in shares]
    console.print(table(f"Mixture of {run.name}", ("group", "fields", "share", "passes of the run"), rows))
    write_json(run / "mixture.json", [asdict(one) for one in shares])


@contextlib.contextmanager
def _noted(run: Path, trainer: Trainer, from_step: int) -> Iterator[dict[str, Any]]:
    """Note the start and its end, and write the report, also of a start that an error ends."""
    if not is_main_process():
        yield {}
        return
    facts = {"engine": str(trainer.engine), "from_step": from_step, "steps": trainer.num_steps}
    try:
        with noting_start(run / "environment.json", facts) as end:
            try:
                yield end
            finally:
                end.setdefault("step", trainer.step)
    except BaseException:
        # A full disk has no room for it, damaged records no page; the error on its way tells more.
        with contextlib.suppress(PixCellError):
            _report(run, trainer)
        raise
    _report(run, trainer)


def _report(run: Path, trainer: Trainer) -> None:
    if trainer.config.report:
        report_training(run)


def _flops_per_sample(objective: Objective, seed: int) -> float | None:
    """FLOPs of a training step by sample, counted on the first one; None where they cannot be counted."""
    samples = objective.samples
    order = order_of(samples, seed)
    plan = BatchPlan(order, batch_size=1, micro_batch_size=1, first_step=0, last_step=1)
    # Only its shapes count: a tile that cannot be read is the training's to find.
    batch = next(load_batches(samples, plan, seed=seed, on_bad_tile="drop"))
    return training_flops(objective, {**batch.samples, "step": 0})
