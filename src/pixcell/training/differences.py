"""In which values two recipes, or two descriptions of data, differ: what a refusal to go on has to say."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pixcell.errors import listed

__all__ = ["differences"]

_SHORT = 4
"""Lists of up to so many entries are shown whole."""


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = (), prefix: str = ""
) -> list[str]:
    """Say in which values two nested mappings of JSON values differ, each by its dotted name.

    Of two sections with another ``name`` only that is said: what they hold cannot be compared.

    Args:
        before: What was.
        now: What is.
        free: Dotted names of values that may differ.
        prefix: Before every name.

    Examples:
        >>> differences({"lr": 0.1, "data": {"size": 256}}, {"lr": 0.2, "data": {"size": 256}})
        ['lr was 0.1 and is 0.2']
    """
    names = sorted({*before, *now})
    if before.get("name") != now.get("name") and f"{prefix}name" not in free:
        names = ["name"]
    found = []
    for name in names:
        key = f"{prefix}{name}"
        old, new = before.get(name), now.get(name)
        if key in free or (old == new and (name in before) == (name in now)):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, free, f"{key}.")
        elif name not in now:
            found.append(f"{key} was {_shown(old)} and is not given")
        elif name not in before:
            found.append(f"{key} was not given and is {_shown(new)}")
        elif isinstance(old, list) and isinstance(new, list) and max(len(old), len(new)) > _SHORT:
            found.append(f"{key} {_list_difference(old, new)}")
        else:
            found.append(f"{key} was {old!r} and is {new!r}")
    return found


def _list_difference(old: Sequence[Any], new: Sequence[Any]) -> str:
    gone = [value for value in old if value not in new]
    more = [value for value in new if value not in old]
    said = [f"lacks {listed(gone)}"] * bool(gone) + [f"has {listed(more)} more"] * bool(more)
    return " and ".join(said) or "has its entries in another order, or another number of times"


def _shown(value: Any) -> str:
    """A value; of a section whose values have no counterpart, its name if it has one."""
    if isinstance(value, Mapping) and "name" in value:
        return repr(value["name"])
    return repr(value)
