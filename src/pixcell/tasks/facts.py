"""Facts about a thing, in sections: shown as tables in a terminal, or given as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pixcell.console import facts, table

__all__ = ["Facts", "Section", "flattened", "size_of", "size_text"]

_ROWS_SHOWN = 30


@dataclass(frozen=True)
class Section:
    """Names and values (``entries``), or a table (``columns`` and ``rows``).

    A section that is not ``shown`` is in the JSON only.
    """

    title: str
    entries: Mapping[str, Any] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    shown: bool = True

    def as_json(self) -> Any:
        """Return the entries, or one mapping per row."""
        if self.columns:
            return [dict(zip(self.columns, map(_plain, row), strict=True)) for row in self.rows]
        return {key: _plain(value) for key, value in self.entries.items()}

    def as_table(self) -> Table:
        """Lay the section out; long tables are cut, and say so."""
        if not self.columns:
            return facts(self.title, {key: _text(value) for key, value in self.entries.items()})
        rows = [[_cell(cell) for cell in row] for row in self.rows]
        shown = table(self.title, self.columns, rows[:_ROWS_SHOWN])
        if len(rows) > _ROWS_SHOWN:
            shown.caption = f"and {len(rows) - _ROWS_SHOWN} more rows (all with --json)"
            shown.caption_justify = "left"
        return shown


@dataclass(frozen=True)
class Facts:
    """What ``pixcell inspect`` found out.

    Attributes:
        kind: What the thing is, in words.
        path: Where it is.
        sections: What is known about it.
        problems: What is wrong with it; empty if nothing was found.
        verified: Whether every byte was compared with its checksum; None where there are no checksums.
    """

    kind: str
    path: Path
    sections: Sequence[Section]
    problems: Sequence[str] = ()
    verified: bool | None = None

    def section(self, title: str) -> Any:
        """Return one section as JSON values."""
        return next(section for section in self.sections if section.title == title).as_json()

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "kind": self.kind,
            "path": str(self.path),
            **{section.title: section.as_json() for section in self.sections},
            "problems": list(self.problems),
            "verified": self.verified,
        }

    def __rich__(self) -> Group:
        """Show it in a terminal."""
        parts: list[Table | Text] = [Text(f"{self.path} is a {self.kind}.", style="bold")]
        parts += [section.as_table() for section in self.sections if section.shown and _has_content(section)]
        parts += [Text(f"Problem: {problem}", style="bold red") for problem in self.problems]
        if self.verified is not None:
            good = "Every checksum agrees." if not self.problems else "Verified: there are problems."
            parts.append(
                Text(good if self.verified else "Checksums were not compared; --verify reads everything.")
            )
        return Group(*parts)


def flattened(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names.

    Examples:
        >>> flattened({"a": {"b": 1, "c": [2, 3]}, "d": {}})
        {'a.b': 1, 'a.c': [2, 3]}
    """

    def parts() -> Iterator[tuple[str, Any]]:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from flattened(value, f"{prefix}{key}.").items()
            else:
                yield f"{prefix}{key}", value

    return dict(parts())


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder and below."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def size_text(num_bytes: int) -> str:
    """Write a number of bytes for people.

    Examples:
        >>> size_text(1536), size_text(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _has_content(section: Section) -> bool:
    return bool(section.rows if section.columns else section.entries)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _cell(value: Any) -> Any:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_text(each) for each in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
