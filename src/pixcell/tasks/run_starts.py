"""Every start of a run, and how it ended: ``environment.json`` in its folder.

A start without an end was killed, or goes on.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pixcell.errors import OutputError, PixCellError, RunError
from pixcell.files import write_json
from pixcell.provenance import environment, now

__all__ = ["noting_start"]


@contextlib.contextmanager
def noting_start(path: Path, facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Add a start with the versions it runs on: one run may go on on other machines. Then note its end.

    Args:
        path: The file.
        facts: About this start; JSON values.

    Yields:
        What is noted at the end, to be filled: ``step`` and ``ended_by``. An error fills ``error`` by itself.

    Raises:
        RunError: If the file is damaged.
        OutputError: If it cannot be written.
    """
    before = _starts(path)
    start = {"started": now(), **facts, **environment()}
    write_json(path, [*before, start])
    end: dict[str, Any] = {}
    try:
        yield end
    except BaseException as error:
        said = str(error) if isinstance(error, PixCellError) else f"{type(error).__name__}: {error}"
        # On a full disk this cannot be noted either; the error that is on its way tells more.
        with contextlib.suppress(OutputError):
            failed = {"ended": now(), "ended_by": "an error", **end, "error": said}
            write_json(path, [*before, {**start, **failed}])
        raise
    write_json(path, [*before, {**start, "ended": now(), **end}])


def _starts(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path} is damaged ({error}): it lists the starts of the run. Put it back, or delete it to go "
            "on without the list."
        ) from error
    return starts if isinstance(starts, list) else [starts]
