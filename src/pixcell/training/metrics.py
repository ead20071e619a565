"""The figures of a run: one JSON line per logged step, and the same for TensorBoard and Weights & Biases.

``metrics.jsonl`` only grows, but for one case: a run that goes on from step N drops the lines after N, which
the steps to come will write again. So a step has one line, however often the run was killed. TensorBoard is
told the same. What was sent to Weights & Biases cannot be taken back: steps that are taken again are there
twice, at the same place.
"""

import importlib.util
import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import yaml
from pydantic import Field

from pixcell.config import Config
from pixcell.errors import MissingExtra, RunError
from pixcell.files import write_json, write_text, writing_to

__all__ = ["MetricsLog", "WandbConfig", "check_wandb", "read_metrics"]


class WandbConfig(Config):
    """Where Weights & Biases shows the run: figures and recipe. Log in first: ``wandb login``."""

    project: str = Field(min_length=1)
    entity: str | None = None
    """User or team. None: the default one of who is logged in."""
    group: str | None = None
    tags: tuple[str, ...] = ()
    previews: bool = False
    """Send the previews, too. They show held-out real tissue: only where that may leave the house."""
    mode: Literal["online", "offline"] = "online"
    """``offline`` writes to runs/<name>/wandb and sends nothing; ``wandb sync`` sends it later."""


class MetricsLog:
    """Writes the figures of a run.

    Args:
        run: The run folder.
        from_step: Steps taken so far; later lines are dropped.
        tensorboard: Whether to write event files too.
        wandb: Whether and how to show the run at Weights & Biases.

    Raises:
        MissingExtra: If Weights & Biases is wanted and not installed.
        RunError: If Weights & Biases cannot be started.
    """

    def __init__(
        self, run: Path, from_step: int, tensorboard: bool = True, wandb: WandbConfig | None = None
    ) -> None:
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= from_step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        with writing_to(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        self._boards: list[_Board] = []
        if tensorboard:
            self._boards.append(_TensorBoard(run, from_step))
        if wandb is not None:
            self._boards.append(_Wandb(run, wandb))

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add a line. Numbers that are not finite become None: JSON has no such numbers.

        Raises:
            OutputError: If the disk is full.
        """
        line = {name: _json_number(value) for name, value in figures.items()}
        with writing_to(self.path):
            self._file.write(json.dumps({"step": step, **line}) + "\n")
            self._file.flush()
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        for board in self._boards:
            board.write(step, numbers)

    def write_picture(self, step: int, name: str, picture: Any) -> None:
        """Show a (height, width, 3) uint8 picture on the boards."""
        for board in self._boards:
            board.write_picture(step, name, picture)

    def close(self, failed: bool = False) -> None:
        """Finish the files; ``failed`` tells boards that the run ended by an error."""
        with writing_to(self.path):  # on a full disk, what could not be written before is tried once more
            self._file.close()
        for board in self._boards:
            board.close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``.

    Lines that are none are left out, and no other is: one cut short by a crash, or what a disk made of some.
    """
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def check_wandb() -> None:
    """Find out before the work that Weights & Biases is not installed.

    Raises:
        MissingExtra: Names the install command.
    """
    if importlib.util.find_spec("wandb") is None:
        raise MissingExtra("wandb", "wandb", "trainer.wandb")


class _Board(Protocol):
    """Where people look at figures."""

    def write(self, step: int, figures: Mapping[str, float]) -> None: ...

    def write_picture(self, step: int, name: str, picture: Any) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, run: Path, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)

    def write_picture(self, step: int, name: str, picture: Any) -> None:
        self._events.add_image(name, picture, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        del failed
        self._events.close()


class _Wandb:
    """One run at Weights & Biases for all starts of a run folder: ``wandb.json`` keeps its id."""

    def __init__(self, run: Path, config: WandbConfig) -> None:
        check_wandb()
        import wandb

        place, recipe = run / "wandb.json", run / "recipe.yaml"
        where = {"project": config.project, "entity": config.entity}
        try:
            known = dict(json.loads(place.read_text(encoding="utf-8"))) if place.is_file() else {}
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{place} is damaged ({error}): it held the id of this run at Weights & Biases. Put it back, "
                "or delete it to go on there as a new one."
            ) from error
        if {key: known.get(key) for key in where} != where:
            known = {"id": uuid.uuid4().hex[:8], **where}
            write_json(place, known)
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                id=known["id"],
                resume="allow",
                name=run.name,
                group=config.group,
                tags=config.tags,
                mode=config.mode,
                dir=str(run),
                config=yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else None,
                # What the run prints belongs to its terminal, and the code to whoever wrote it.
                settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
            )
        except (wandb.Error, OSError) as error:
            raise RunError(
                f"Weights & Biases cannot be started ({error}). Log in with 'wandb login', write to disk "
                "only with --set trainer.wandb.mode=offline, or leave it out with --set trainer.wandb=null."
            ) from error
        self._with_previews = config.previews
        # Not its own counter, which refuses to go back to the step of a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def write_picture(self, step: int, name: str, picture: Any) -> None:
        import wandb

        if self._with_previews:
            self._run.log({"step": step, name: wandb.Image(picture)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
