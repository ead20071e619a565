"""The figures of a run: one JSON line per logged step, and the same for TensorBoard.

``metrics.jsonl`` only grows, but for one case: a run that goes on from step N drops the lines after N, which
the steps to come will write again. So a step has one line, however often the run was killed.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pixcell.files import write_text, writing_to

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Writes the figures of a run.

    Args:
        run: The run folder.
        from_step: Steps taken so far; later lines are dropped.
        tensorboard: Whether to write event files too.
    """

    def __init__(self, run: Path, from_step: int, tensorboard: bool = True) -> None:
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= from_step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        with writing_to(self.path):
            self._file = self.path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run / "tensorboard"), purge_step=from_step + 1)

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add a line. Numbers that are not finite become None: JSON has no such numbers.

        Raises:
            OutputError: If the disk is full.
        """
        line = {name: _json_number(value) for name, value in figures.items()}
        with writing_to(self.path):
            self._file.write(json.dumps({"step": step, **line}) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)

    def write_picture(self, step: int, name: str, picture: Any) -> None:
        """Show a (height, width, 3) uint8 picture in TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``. A last line cut short by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        lines.append(line)
    return lines


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
