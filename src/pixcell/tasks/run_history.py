"""What a run folder tells of itself, read without the package's models: also of a run in progress or killed.

Recipes of other versions are read as they are: a history is no run that goes on.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import yaml

from pixcell.errors import EvaluationError, RunError
from pixcell.evaluation.report import Report
from pixcell.tasks.facts import flattened, size_of
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.metrics import read_metrics

__all__ = ["KeptCheckpoint", "RunHistory", "Start"]

_STEP = re.compile(r"step-(\d+)")
_HELD_OUT = "held_out/"


@dataclass(frozen=True)
class Start:
    """One call that trained: from where to where, and how it ended."""

    facts: Mapping[str, Any]
    """An entry of ``environment.json``."""

    @property
    def from_step(self) -> int | None:
        """Steps taken before; None in runs of versions that did not note it."""
        return self.facts.get("from_step")

    @property
    def end(self) -> str | None:
        """How it ended; None: it has not, or was killed."""
        return self.facts.get("ended_by")

    @property
    def versions(self) -> dict[str, Any]:
        """What it ran on."""
        own = {"started", "engine", "from_step", "steps", "ended", "step", "ended_by", "error"}
        return {key: value for key, value in self.facts.items() if key not in own}


@dataclass(frozen=True)
class KeptCheckpoint:
    """A checkpoint that was written, and whether it is still there."""

    step: int
    figures: Mapping[str, float]
    """Held-out figures, by their names."""
    size: int | None
    """Bytes on disk, each file counted once though checkpoints share some; None: it was pruned."""
    problem: str | None = None
    """Why it cannot be used."""


@dataclass(frozen=True)
class RunHistory:
    """A run folder, read.

    Attributes:
        run: The folder.
        recipe: Its recipe, as in the file.
        recipe_text: The same as text.
        starts: Every call that trained, in order.
        lines: Log lines, in order of their steps; those of checkpoints are left out.
        checkpoints: Every one that was written, in order of their steps.
        previews: By step.
        data: Facts about what it was trained on, as the last checkpoint has them.
        growth: What became of the tensors of the model that it started from.
        mixture: Groups of samples and their shares.
        dropped: Samples that could not be read.
        evaluations: Reports about pictures of its checkpoints, by feature space and step.
        problems: Files that could not be read, and why.
        last_word: When its figures were last written, UTC; None: there are none.
    """

    run: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    starts: Sequence[Start]
    lines: Sequence[Mapping[str, Any]]
    checkpoints: Sequence[KeptCheckpoint]
    previews: Mapping[int, Path]
    data: Mapping[str, Any]
    growth: Mapping[str, Any] | None
    mixture: Sequence[Mapping[str, Any]]
    dropped: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Mapping[int, Report]]
    problems: Sequence[str]
    last_word: datetime | None

    @classmethod
    def read(cls, run: Path) -> Self:
        """Read a run folder.

        Raises:
            RunError: If it is none.
        """
        place = run / "recipe.yaml"
        if not place.is_file():
            raise RunError(
                f"{run} is not a run: it holds no recipe.yaml. Give a folder that `pixcell train` wrote "
                "(runs/<name>)."
            )
        text = place.read_text(encoding="utf-8", errors="replace")
        recipe = _recipe(text, place)
        problems: list[str] = []
        metrics = run / "metrics.jsonl"
        lines = read_metrics(metrics) if metrics.is_file() else []
        checkpoints = _checkpoints(run, lines)
        problems += [each.problem for each in checkpoints if each.problem]
        starts = _json(run / "environment.json", problems) or []
        progress = [
            found
            for each in checkpoints
            if each.size is not None and not each.problem
            for found in [_json(_folder(run, each.step) / "state" / "progress.json", problems)]
            if found is not None
        ]
        dropped = run / "dropped.jsonl"
        return cls(
            run=run,
            recipe=recipe,
            recipe_text=text,
            starts=[
                Start(each)
                for each in (starts if isinstance(starts, list) else [starts])
                if isinstance(each, dict)
            ],
            lines=[line for line in lines if "loss" in line],
            checkpoints=checkpoints,
            previews=_previews(run),
            data=progress[-1].get("data", {}) if progress else {},
            growth=_json(run / "growth.json", problems),
            mixture=_json(run / "mixture.json", problems) or [],
            dropped=read_metrics(dropped) if dropped.is_file() else [],
            evaluations=_evaluations(run, problems),
            problems=problems,
            last_word=datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if lines else None,
        )

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's values by their whole keys."""
        return flattened(self.recipe)

    @property
    def step(self) -> int:
        """The last step that anything was written about."""
        logged = [int(line["step"]) for line in self.lines]
        return max([0, *logged, *(each.step for each in self.checkpoints)])

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run. A recipe in epochs leaves them to be noted at the start."""
        noted = [start.facts["steps"] for start in self.starts if "steps" in start.facts]
        return noted[-1] if noted else self.settings.get("trainer.steps")

    @property
    def is_complete(self) -> bool:
        """Whether the last step has its checkpoint."""
        return bool(self.checkpoints) and self.checkpoints[-1].step == self.num_steps

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a figure, without lines that lack it or had no finite number."""
        found = [
            (int(line["step"]), float(line[name]))
            for line in self.lines
            if isinstance(line.get(name), int | float)
        ]
        return [step for step, _ in found], [value for _, value in found]

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of all figures of log lines that begin so."""
        return sorted({name for line in self.lines for name in line if name.startswith(prefix)})

    @property
    def held_out(self) -> dict[str, tuple[list[int], list[float]]]:
        """Figures of samples that were held out: steps and values by name."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for each in self.checkpoints:
            for name, value in each.figures.items():
                steps, values = found.setdefault(name, ([], []))
                steps.append(each.step)
                values.append(value)
        return found


def _recipe(text: str, place: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RunError(f"{place} is damaged ({error}). Put the recipe of the run back.") from error
    if not isinstance(recipe, dict):
        raise RunError(f"{place} is no recipe. Put the recipe of the run back.")
    return recipe


def _json(path: Path, problems: list[str]) -> Any:
    """The content of a file that may be missing; one that cannot be read is told about."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{path.name} cannot be read ({error}); it is left out here.")
        return None


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _checkpoints(run: Path, lines: Sequence[Mapping[str, Any]]) -> list[KeptCheckpoint]:
    """Those on disk, and those pruned that the metrics remember."""
    figures: dict[int, dict[str, float]] = {}
    for line in lines:
        held_out = {
            key.removeprefix(_HELD_OUT): value for key, value in line.items() if key.startswith(_HELD_OUT)
        }
        if held_out:
            figures[int(line["step"])] = {key: value for key, value in held_out.items() if value is not None}
    places = {
        int(found[1]): path
        for path in (run / "checkpoints").glob("step-*")
        if (found := _STEP.fullmatch(path.name))
    }
    kept = []
    for step in sorted({*figures, *places}):
        size = problem = None
        if step in places:
            size = size_of(places[step])
            try:
                Checkpoint.open(places[step])
            except RunError as error:
                problem = str(error)
        kept.append(KeptCheckpoint(step, figures.get(step, {}), size, problem))
    return kept


def _previews(run: Path) -> dict[int, Path]:
    found = {}
    for path in sorted((run / "previews").glob("step-*.png")):
        if step := _STEP.fullmatch(path.stem):
            found[int(step[1])] = path
    return found


def _evaluations(run: Path, problems: list[str]) -> dict[str, dict[int, Report]]:
    """Reports in ``evaluations/``. Their pictures say of which step they are, else the file's name does."""
    found: dict[str, dict[int, Report]] = {}
    for path in sorted((run / "evaluations").rglob("*.json")):
        try:
            report = Report.load(path)
        except EvaluationError:
            continue  # a folder of samples has a JSON of its own
        step = report.generator.get("step")
        named = _STEP.search(path.stem)
        if not isinstance(step, int):
            step = int(named[1]) if named else None
        if step is None:
            problems.append(f"{path.name} does not say of which step its pictures are; it is left out here.")
            continue
        found.setdefault(str(report.extractor["name"]), {})[step] = report
    return found
