"""What a person sees while a command runs: messages, progress, tables.

Quiet on all but the first process of a distributed run. Messages go to standard error, so that standard
output holds nothing but results and can be piped.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from rich.console import Console
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

__all__ = ["Advance", "console", "facts", "is_main_process", "progress", "results", "set_up_logging", "table"]


def is_main_process() -> bool:
    """Tell whether this is the process that talks; launchers number processes in ``RANK``."""
    return os.environ.get("RANK", "0") == "0"


console = Console(stderr=True, quiet=not is_main_process(), highlight=False)
results = Console(quiet=not is_main_process(), highlight=False)


@runtime_checkable
class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, amount: float = 1, *, note: str | None = None, total: float | None = None) -> None:
        """Advance by ``amount``; optionally show a note, or set a total that was not known before."""


class _RateColumn(ProgressColumn):
    """Pieces per second since the start."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text(f"{rate:.1f}/s" if rate else "", style="progress.data.speed")


@contextlib.contextmanager
def progress(label: str, total: float | None = None) -> Iterator[Advance]:
    """Show a bar with count, rate and time left; yields the function that advances it.

    Where nobody watches (a log file, a cluster job), a line is written at most every thirty seconds instead.
    """
    if not console.is_terminal:
        with _logged_progress(label, total) as advance:
            yield advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(label, total=total, note="")

        def advance(amount: float = 1, *, note: str | None = None, total: float | None = None) -> None:
            if total is not None:
                bar.update(task, total=total)
            if note is not None:
                bar.update(task, note=note)
            bar.advance(task, amount)

        yield advance


@contextlib.contextmanager
def _logged_progress(label: str, total: float | None) -> Iterator[Advance]:
    import time

    started = last = time.monotonic()
    done, end = 0.0, total

    def line(note: str | None) -> str:
        elapsed = time.monotonic() - started
        rate = done / elapsed if elapsed > 0 else 0.0
        left = f", {(end - done) / rate:.0f} s left" if end and rate and done < end else ""
        of = f"/{end:g}" if end else ""
        return f"{label}: {done:g}{of}, {rate:.1f}/s{left}" + (f" ({note})" if note else "")

    def advance(amount: float = 1, *, note: str | None = None, total: float | None = None) -> None:
        nonlocal done, last, end
        done += amount
        end = total if total is not None else end
        if time.monotonic() - last >= 30:
            last = time.monotonic()
            console.print(line(note), markup=False)

    yield advance
    console.print(line(None), markup=False)


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
