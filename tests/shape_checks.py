"""What checks the shapes and types in signatures while the tests run (see ``addopts`` in pyproject.toml).

``beartype``, but for two things: an int passes where a float is asked for, as everywhere in Python; and a
method that speaks of ``Self`` is left unchecked: beartype knows that word in decorated classes only, and
jaxtyping decorates functions.
"""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_checking: Callable[[Any], Any] = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Any) -> Any:
    """Return the function with its arguments and result checked at each call."""
    try:
        return _checking(function)
    except BeartypeDecorHintPep673Exception:
        return function
