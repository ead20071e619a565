"""The command line: one short command per task, and no logic of its own.

A command parses, calls one public function, and shows the result. What a user can cause is one red line and
exit code 2 (1 when a batch ended and some of its items failed); a bug shows its traceback. Commands stand in
``data``, ``models`` and ``others``, in the order in which help lists them.
"""

import io
import logging
import os
import sys
from typing import Annotated

import typer
from typer import Option

from pixcell.cli import data, models, others
from pixcell.cli.shared import app
from pixcell.console import console, is_main_process, results, set_up_logging
from pixcell.errors import PixCellError, SomeFailed

__all__ = ["app", "data", "main", "models", "others"]

_INTERRUPTED = 130


def main() -> None:
    """Run the command line; turn users' errors into one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # a slide's name must not end a command on a terminal of ASCII
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except PixCellError as error:
        if isinstance(error, SomeFailed) and error.result is not None:
            results.print(error.result)
        _print_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # permissions, names that are too long, a disk that died: never a bug of ours
        logging.getLogger(__name__).debug("the place in the program", exc_info=True)
        place = f"{error.filename}: " if error.filename else ""
        _print_error(
            f"{place}{error.strerror or error}. Correct the path, its permissions or the disk, and run the "
            "same command again. (-v before the command shows where it happened.)"
        )
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # typer has turned Ctrl-C into it already
            console.print("Stopped. Nothing that was finished is lost; run the same command again to go on.")
        raise


def _print_error(message: str) -> None:
    if not is_main_process():  # the console is quiet here, but the error may be this process's own
        print(f"Error in process {os.environ['RANK']}: {message}", file=sys.stderr)
        return
    console.print("[bold red]Error:[/]", style="red", end=" ")
    console.print(message, style="red", markup=False, soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        from pixcell import __version__

        print(f"pixcell {__version__}")
        raise typer.Exit


@app.callback()
def _before(
    verbose: Annotated[bool, Option("--verbose", "-v", help="Say more while working.")] = False,
    version: Annotated[
        bool,
        Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    set_up_logging(verbose)
