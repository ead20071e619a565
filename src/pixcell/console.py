"""What a person sees while a command runs: messages, progress, tables.

Quiet on all but the first process of a distributed run. Messages go to standard error, so that standard
output holds nothing but results and can be piped.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

__all__ = [
    "Advance",
    "console",
    "duration_text",
    "facts",
    "is_main_process",
    "progress",
    "results",
    "set_up_logging",
    "table",
]


def is_main_process() -> bool:
    """Tell whether this is the process that talks; launchers number processes in ``RANK``."""
    return os.environ.get("RANK", "0") == "0"


console = Console(stderr=True, quiet=not is_main_process(), highlight=False)
results = Console(quiet=not is_main_process(), highlight=False)


@runtime_checkable
class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, amount: float = 1, *, note: str | None = None, total: float | None = None) -> None:
        """Advance by ``amount``; optionally show a note (a few lines), or set a total now known."""


class _NotedProgress(Progress):
    """Bars, and below each what there is to say of it: beside it, a narrow terminal would cut it off."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            for line in task.fields["note"].splitlines():
                yield Text(line, style="dim", overflow="ellipsis", no_wrap=True)


class _RateColumn(ProgressColumn):
    """Pieces per second since the start."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(f"{rate:.1f}/s" if rate else "", style="progress.data.speed")


@contextlib.contextmanager
def progress(label: str, total: float | None = None, done: float = 0) -> Iterator[Advance]:
    """Show a bar with count, rate and time left; yields the function that advances it.

    Where nobody watches (a log file, a cluster job), a line is written at most every thirty seconds instead.

    Args:
        label: Stands before the bar.
        total: Pieces in all. None: not known.
        done: Pieces that an earlier start has done.
    """
    if not console.is_terminal:
        with _logged_progress(label, total, done) as advance:
            yield advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _NotedProgress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(label, total=total, completed=int(done), note="")

        def advance(amount: float = 1, *, note: str | None = None, total: float | None = None) -> None:
            if total is not None:
                bar.update(task, total=total)
            if note is not None:
                bar.update(task, note=note)
            bar.advance(task, amount)

        yield advance


@contextlib.contextmanager
def _logged_progress(label: str, total: float | None, before: float) -> Iterator[Advance]:
    import time

    started = last = time.monotonic()
    done, end = before, total

    def line(note: str | None) -> str:
        elapsed = time.monotonic() - started
        rate = (done - before) / elapsed if elapsed > 0 else 0.0
        left = f", {duration_text((end - done) / rate)} left" if end and rate and done < end else ""
        of = f"/{end:g}" if end else ""
        return f"{label}: {done:g}{of}, {rate:.1f}/s{left}" + (
            f" ({', '.join(note.splitlines())})" if note else ""
        )

    def advance(amount: float = 1, *, note: str | None = None, total: float | None = None) -> None:
        nonlocal done, last, end
        done += amount
        end = total if total is not None else end
        if time.monotonic() - last >= 30:
            last = time.monotonic()
            console.print(line(note), markup=False)

    yield advance
    console.print(line(None), markup=False)


def duration_text(seconds: float) -> str:
    """Return a time as people say it.

    Examples:
        >>> [duration_text(seconds) for seconds in (8.2, 90, 4000, 200_000)]
        ['8 s', '1 min 30 s', '1 h 6 min', '2 d 7 h']
    """
    if not math.isfinite(seconds):
        return "unknown time"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    place = next((place for place, (_, size) in enumerate(units) if seconds >= size), 3)
    (name, size), rest = units[place], units[place + 1 : place + 2]
    text = f"{int(seconds // size)} {name}"
    for finer, finer_size in rest:
        if part := int(seconds % size // finer_size):
            text += f" {part} {finer}"
    return text


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Build a table; numbers stand to the right."""
    result = Table(title=title, title_justify="left", header_style="bold")
    rows = [list(row) for row in rows]
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        result.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
    return result


def facts(title: str, entries: Mapping[str, object]) -> Table:
    """Build a two-column table of names and values."""
    result = Table(title=title, title_justify="left", show_header=False)
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in entries.items():
        result.add_row(name, Text(str(value)))
    return result


def set_up_logging(verbose: bool = False) -> None:
    """Route the package's log messages to the console: warnings and above, or all with ``verbose``."""
    logger = logging.getLogger("pixcell")
    logger.handlers[:] = [RichHandler(console=console, show_path=False, show_time=False, markup=False)]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
