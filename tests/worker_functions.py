"""Functions that worker processes import by name."""

import os
import signal

from pixcell.errors import NoTissue


def work(item: int) -> int:
    if item == 2:
        raise NoTissue("slide 2 holds no tissue")
    if item == 3:
        raise ZeroDivisionError("bug")
    if item == 4 and os.environ.get("PYTEST_MAIN") != str(os.getpid()):
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item
