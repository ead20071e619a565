"""Every error a user can cause, in one tree.

A message says three things: what was given, which rule it breaks, and what to do next.
Mistakes of a programmer stay ``ValueError`` and ``TypeError``.

    PixCellError
    ├── RecipeError             a recipe or an override is wrong
    ├── MetadataError           the CSV beside slides or images is wrong
    ├── MissingExtra            an optional dependency is not installed
    ├── OutputError             the result cannot be written (read-only, full, exists)
    ├── SlideError              one slide or image
    │   ├── UnreadableSlide     not a slide, truncated, corrupt
    │   ├── UnknownResolution   no microns per pixel
    │   └── NoTissue            nothing worth a tile
    ├── StoreError              a tile store
    │   ├── StoreMismatch       made with other settings than asked for
    │   ├── MissingColumn       something was not encoded yet
    │   └── CorruptShard        bytes are not what was written
    │       └── UnreadableTile  one tile that cannot be read
    ├── ModelError              weights, architectures, encoders
    │   ├── MissingWeights      not on disk, gated, or not asked for by name
    │   └── WrongWeights        names or shapes do not fit
    ├── RunError                training runs and checkpoints
    ├── EvaluationError         sets of pictures that cannot be compared
    └── SomeFailed              a batch ended; the good items are done, these are not
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "CorruptShard",
    "EvaluationError",
    "MetadataError",
    "MissingColumn",
    "MissingExtra",
    "MissingWeights",
    "ModelError",
    "NoTissue",
    "OutputError",
    "PixCellError",
    "RecipeError",
    "RunError",
    "SlideError",
    "SomeFailed",
    "StoreError",
    "StoreMismatch",
    "UnknownResolution",
    "UnreadableSlide",
    "UnreadableTile",
    "WrongWeights",
    "listed",
]


class PixCellError(Exception):
    """Base of everything a user can cause. The command line prints it as one line and exits with 2."""

    exit_code = 2


class RecipeError(PixCellError):
    """A recipe, or an override of one of its values, is not valid."""


class MetadataError(PixCellError):
    """The table beside slides or images (CSV) is not what it must be; names the line."""


class MissingExtra(PixCellError):
    """An optional dependency is needed for what was asked, and is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        """Name the module that is missing, the extra that brings it, and what it is needed for."""
        super().__init__(
            f"{purpose} needs the Python package {module!r}, which is not installed. "
            f"Install it with: pip install 'pixcell[{extra}]'"
        )


class OutputError(PixCellError):
    """A result cannot be written: the place is read-only, full, or taken."""


class SlideError(PixCellError):
    """Something is wrong with one slide or image."""


class UnreadableSlide(SlideError):
    """The file is not a slide, or its pixels cannot be decoded."""

    def __init__(self, path: Path, reason: str) -> None:
        """Name the file and what the reader said."""
        super().__init__(f"{path.name} cannot be read as a slide or image: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        """Errors travel between processes; the default pickling keeps only the message."""
        return type(self), (self.path, self.reason)


class UnknownResolution(SlideError):
    """The file carries no pixel size, so a resolution in microns has no meaning."""

    def __init__(self, path: Path) -> None:
        """Name the file."""
        super().__init__(
            f"{path.name} does not state its resolution (microns per pixel). "
            "Pass it with --source-mpp, or in the mpp column of --metadata, if the scanner is known: "
            "about 0.25 for a 40x scan, 0.5 for 20x."
        )
        self.path = path

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Errors travel between processes; the default pickling keeps only the message."""
        return type(self), (self.path,)


class NoTissue(SlideError):
    """A slide gave no tile: no tissue was found, or every candidate was dropped."""


class StoreError(PixCellError):
    """Something is wrong with a tile store."""


class StoreMismatch(StoreError):
    """A store, column or shard was made with other settings than the ones asked for."""


class MissingColumn(StoreError):
    """A store does not hold the column that is needed."""


class CorruptShard(StoreError):
    """A shard's bytes are not the ones that were written."""


class UnreadableTile(CorruptShard):
    """One tile cannot be read; the others of its slide may well be."""

    def __init__(self, slide_id: str, tile: int, x: int, y: int, reason: str) -> None:
        """Name the slide, the tile's row in it and its place in level-0 pixels, and why."""
        super().__init__(f"tile {tile} of slide {slide_id!r}, at x={x}, y={y}, cannot be read: {reason}")
        self.slide_id, self.tile, self.x, self.y, self.reason = slide_id, tile, x, y, reason

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Errors travel between processes; the default pickling keeps only the message."""
        return type(self), (self.slide_id, self.tile, self.x, self.y, self.reason)


class ModelError(PixCellError):
    """Something is wrong with a model, an encoder or an autoencoder."""


class MissingWeights(ModelError):
    """Weights are not on disk and were not asked for by name, or are gated."""


class WrongWeights(ModelError):
    """Names or shapes in a weight file are not those of the model."""


class RunError(PixCellError):
    """Something is wrong with a training run or one of its checkpoints."""


class EvaluationError(PixCellError):
    """Two sets of pictures cannot be compared as asked."""


class SomeFailed(PixCellError):
    """A batch came to its end; what could be done is done, and these items failed.

    Exit code 1: unlike a usage error, the output is there and worth keeping.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        failures: Sequence[tuple[str, str]],
        table: Path | None = None,
        result: object | None = None,
    ) -> None:
        """List the items that failed with their reasons, where the table of them is, and what was done."""
        listed = "; ".join(f"{name}: {reason}" for name, reason in failures[:3])
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        where = f" All are listed in {table}." if table else ""
        super().__init__(
            f"{len(failures)} of the {what} failed ({listed}{more}). The others are done.{where}"
        )
        self.what, self.failures, self.table, self.result = what, list(failures), table, result

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Errors travel between processes; the default pickling keeps only the message."""
        return type(self), (self.what, self.failures, self.table, self.result)


def listed(values: Sequence[object], most: int = 5) -> str:
    """Return values as a message names them: the first few, and dots if there are more."""
    return ", ".join(str(value) for value in values[:most]) + (", ..." if len(values) > most else "")
