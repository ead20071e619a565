"""Samples that could not be read and were left out of their batch: which, when and why.

``dropped.jsonl`` has one line for each time it happened. As the metrics, a run that goes on from step N takes
the lines after N back, since the steps to come meet the same samples again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from pixcell.errors import UnreadableTile
from pixcell.files import write_text, writing_to
from pixcell.training.metrics import read_metrics

__all__ = ["Dropped", "DroppedLog", "read_dropped"]

_NAME = "dropped.jsonl"


@dataclass(frozen=True)
class Dropped:
    """One sample, left out of one step."""

    step: int
    """Number of the step, from 1, as in the metrics."""
    position: int
    """Its place in the batch of the step."""
    slide_id: str
    tile: int
    """Row of the tile in its slide."""
    x: int
    """Left edge of the tile, in level-0 pixels."""
    y: int
    reason: str

    @classmethod
    def of(cls, error: UnreadableTile, step: int, position: int) -> Self:
        """Return the line for a tile that the step with ``step`` steps before it met."""
        return cls(step + 1, position, error.slide_id, error.tile, error.x, error.y, error.reason)

    def __str__(self) -> str:
        return f"tile {self.tile} of slide {self.slide_id!r}, at x={self.x}, y={self.y}: {self.reason}"


class DroppedLog:
    """Keeps the list of a run. There is no file while nothing was dropped.

    Args:
        run: The run folder.
        from_step: Steps taken so far; later lines are taken back.
    """

    def __init__(self, run: Path, from_step: int) -> None:
        self.path = run / _NAME
        before = read_dropped(run)
        kept = [one for one in before if one.step <= from_step]
        self.count = len(kept)
        """Samples dropped so far, over every start of the run."""
        if self.path.exists() and len(kept) < _num_lines(self.path):
            write_text(self.path, "".join(_line(one) for one in kept))

    def write(self, dropped: Sequence[Dropped]) -> None:
        """Add the samples that a step went without.

        Raises:
            OutputError: If the disk is full.
        """
        if not dropped:
            return
        with writing_to(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(_line(one) for one in sorted(dropped, key=lambda one: one.position))
        self.count += len(dropped)


def read_dropped(run: Path) -> list[Dropped]:
    """Return what a run went without, in order of steps. A last line cut short by a crash is left out."""
    path = run / _NAME
    return [Dropped(**line) for line in read_metrics(path)] if path.is_file() else []


def _line(one: Dropped) -> str:
    return json.dumps(asdict(one), ensure_ascii=False) + "\n"


def _num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
