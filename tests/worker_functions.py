"""Functions that worker processes import by name."""

import os
import signal
from pathlib import Path

from pixcell.errors import NoTissue


def work(item: int) -> int:
    if item == 2:
        raise NoTissue("slide 2 holds no tissue")
    if item == 3:
        raise ZeroDivisionError("bug")
    if item == 4 and os.environ.get("PYTEST_MAIN") != str(os.getpid()):
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def leave_a_mark(place: Path) -> None:
    place.write_text("was here")
