"""The CSV beside slides or images: resolution, and any labels one likes.

One row per slide (column ``slide``) or ready-made image (column ``image``). ``mpp`` is the resolution where
the file does not state it; every other column is an attribute of all its tiles (``organ``, ``stain``,
``label``, ``split``, ...). Empty cells are left out.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixcell.data.index import INDEX_COLUMNS
from pixcell.errors import MetadataError

__all__ = ["Row", "match_rows", "read_metadata"]

# Fields of a tile and columns of the index: an attribute of that name would hide them.
_TAKEN = {*INDEX_COLUMNS, "size"}


@dataclass(frozen=True)
class Row:
    """One row: what it is about, and what it says."""

    line: int
    name: str
    """The slide or image it speaks of, as written."""
    mpp: float | None = None
    attributes: Mapping[str, str] | None = None


def read_metadata(path: Path, key: str) -> list[Row]:
    """Read and check a table.

    Args:
        path: CSV with a header, comma-separated, UTF-8 (a byte order mark is fine).
        key: The column that names the slide or image.

    Raises:
        MetadataError: Names the file, the line, the rule and the way out.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            _check_columns(path, columns, key)
            reader.fieldnames = columns
            return [_row(path, reader.line_num, content, key) for content in reader]
    except OSError as error:
        raise MetadataError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise MetadataError(
            f"{path} is not UTF-8 text ({error.reason}). Save the table as UTF-8 CSV."
        ) from error
    except csv.Error as error:
        raise MetadataError(f"{path} is not a valid CSV: {error}.") from error


def _check_columns(path: Path, columns: Sequence[str], key: str) -> None:
    if not columns:
        raise MetadataError(f"{path} is empty; it needs a header with at least the column {key!r}.")
    if key not in columns:
        other = ";" if ";" in columns[0] else "\\t" if "\t" in columns[0] else ""
        hint = f" It seems to be separated by {other!r}; use commas." if other else ""
        raise MetadataError(f"{path} has no column {key!r}; its columns are: {', '.join(columns)}.{hint}")
    for name in columns:
        if not name or columns.count(name) > 1:
            raise MetadataError(f"{path}: the column name {name!r} is empty or stands twice.")
        if name in _TAKEN:
            raise MetadataError(
                f"{path}: a column cannot be called {name!r}, the store has one of that name. Rename it."
            )


def _row(path: Path, line: int, content: dict[str, str | None], key: str) -> Row:
    if None in content or None in content.values():
        raise MetadataError(f"{path}, line {line}: the number of cells is not that of the header.")
    cells = {name: (cell or "").strip() for name, cell in content.items()}
    name = cells.pop(key)
    if not name:
        raise MetadataError(f"{path}, line {line}: the column {key!r} is empty.")
    text = cells.pop("mpp", "")
    return Row(line, name, _mpp(path, line, text), {column: cell for column, cell in cells.items() if cell})


def _mpp(path: Path, line: int, text: str) -> float | None:
    if not text:
        return None
    try:
        mpp = float(text)
    except ValueError:
        mpp = math.nan
    if not (math.isfinite(mpp) and mpp > 0):
        raise MetadataError(
            f"{path}, line {line}: mpp is {text!r}, but must be a positive number of microns per pixel, "
            "as 0.25 for a 40x scan."
        )
    return mpp


def match_rows(
    path: Path, rows: Sequence[Row], files: Sequence[Path], root: Path, strict: bool
) -> dict[Path, Row]:
    """Find the row of each file. Files without a row are left out.

    A row names a file by its path relative to ``root``, its file name, or its name without ending.

    Args:
        path: The table, for messages.
        rows: What it says.
        files: Slides or images.
        root: The folder they were found in.
        strict: Whether a row that fits no file is an error.

    Raises:
        MetadataError: If a row fits no file or several, or two rows fit one file.
    """
    called: dict[str, set[Path]] = defaultdict(set)
    for file in files:
        for name in (file.relative_to(root).as_posix(), file.name, file.stem):
            called[name].add(file)
    found: dict[Path, Row] = {}
    for row in rows:
        # The full relative path is never ambiguous, even where another folder repeats it as a bare name.
        exact = root / row.name
        fitting = {exact} if exact in called.get(row.name, ()) else called.get(row.name, set())
        if not fitting and strict:
            example = files[0].relative_to(root).as_posix() if files else "-"
            raise MetadataError(
                f"{path}, line {row.line}: there is no {row.name!r} under {root} "
                f"(names are as {example!r}). Correct the name or remove the row."
            )
        if len(fitting) > 1:
            places = ", ".join(sorted(file.relative_to(root).as_posix() for file in fitting))
            raise MetadataError(
                f"{path}, line {row.line}: {row.name!r} fits {len(fitting)} files ({places}). "
                "Write the path relative to the folder."
            )
        for file in fitting:
            if file in found:
                raise MetadataError(
                    f"{path}: lines {found[file].line} and {row.line} are both about {file.name}. "
                    "Keep one of them."
                )
            found[file] = row
    return found
