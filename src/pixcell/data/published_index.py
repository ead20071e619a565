"""The index of the published PixCell layout: which tiles there are, and in which order.

    ROOT/patches/metadata/patch_names_all.hdf5

One dataset of byte strings per source, ``<source>_1024``; its values are names below ``patches/``,
``<source>/<cohort>/single_1024/<slide>/<x>_<y>.jpeg``. A name is followed only if it stays there.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from pixcell.errors import OutputError, StoreError
from pixcell.files import write_whole

__all__ = [
    "TILE_SIZE",
    "PublishedSlide",
    "exported_order",
    "name_parts",
    "read_index",
    "slides_in",
    "write_index",
]

TILE_SIZE = 1024
_INDEX = Path("patches", "metadata", "patch_names_all.hdf5")
_NAME = re.compile(r"(-?\d+)_(-?\d+)\.jpeg")


@dataclass(frozen=True)
class PublishedSlide:
    """The tiles of one slide of the published index."""

    slide_id: str
    source: str
    cohort: str
    names: tuple[str, ...]
    """Below ``patches/``, in the order of the index."""
    positions: tuple[int, ...]
    """Where each name stands in the index of its source."""


def read_index(root: Path) -> dict[str, list[str]]:
    """Return the names of all tiles below ``patches/``, by source.

    Raises:
        StoreError: If there is no index, it is not as published, or a name points outside ``root``.
    """
    path = root / _INDEX
    if not path.is_file():
        raise StoreError(
            f"{root} is not in the published layout: {path} does not exist. Give the folder above patches/."
        )
    try:
        with h5py.File(path, "r") as file:
            content = {key: file[key][()].tolist() for key in file if key.endswith(f"_{TILE_SIZE}")}
            others = [key for key in file if key not in content]
    except (OSError, AttributeError, TypeError) as error:
        raise StoreError(f"{path} cannot be read as a published index: {error}.") from error
    if not content:
        raise StoreError(
            f"{path} has no dataset named <source>_{TILE_SIZE}; it has: {', '.join(others) or 'none'}."
        )
    index: dict[str, list[str]] = {}
    for key, values in content.items():
        names = [_text(value, path, key) for value in values]
        for name in names:
            name_parts(name)
        if len(set(names)) != len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise StoreError(f"{path}: {twice!r} stands more than once in {key!r}. Remove the repetition.")
        index[key.removesuffix(f"_{TILE_SIZE}")] = names
    return index


def _text(value: Any, path: Path, key: str) -> str:
    try:
        return value.decode("utf-8")
    except (AttributeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: dataset {key!r} holds {value!r}, not names as UTF-8 bytes.") from error


def name_parts(name: str) -> tuple[str, str, str, int, int]:
    """Split a name of the index into source, cohort, slide, x and y.

    Raises:
        StoreError: If it is not of the published form, or leaves the folder it is relative to.
    """
    path = PurePosixPath(name)
    parts = path.parts
    if path.is_absolute() or ".." in parts or "\\" in name or not name.isprintable() or str(path) != name:
        raise StoreError(
            f"{name!r} in the index is not a plain path below patches/, so it is not followed. "
            "Correct the index."
        )
    match = _NAME.fullmatch(path.name)
    if len(parts) < 4 or parts[-3] != f"single_{TILE_SIZE}" or match is None:
        raise StoreError(
            f"{name!r} in the index is not of the form "
            f"<source>/<cohort>/single_{TILE_SIZE}/<slide>/<x>_<y>.jpeg. Correct the index."
        )
    return parts[0], "/".join(parts[1:-3]), parts[-2], int(match[1]), int(match[2])


def slides_in(index: Mapping[str, Sequence[str]]) -> list[PublishedSlide]:
    """Group the tiles of an index by slide.

    A slide keeps its folder's name; where two folders share one, source and cohort go in front of both.
    """
    groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for key, names in index.items():
        for position, name in enumerate(names):
            source, cohort, slide, _, _ = name_parts(name)
            groups[key, source, cohort, slide].append(position)
    folders: dict[str, int] = defaultdict(int)
    for _, _, _, slide in groups:
        folders[slide] += 1
    slides = []
    for (key, source, cohort, slide), positions in groups.items():
        unique = [
            part for part in (key, *(() if source == key else (source,)), *cohort.split("/"), slide) if part
        ]
        slides.append(
            PublishedSlide(
                slide_id=slide if folders[slide] == 1 else "__".join(unique),
                source=key,
                cohort=cohort,
                names=tuple(index[key][position] for position in positions),
                positions=tuple(positions),
            )
        )
    return slides


def exported_order(entries: Iterable[tuple[str, str, int | None]]) -> dict[str, list[str]]:
    """Arrange exported tiles as an index: in their old positions first, then as they come."""
    by_source: dict[str, list[tuple[bool, int, str]]] = defaultdict(list)
    for source, name, position in entries:
        by_source[source].append((position is None, position or 0, name))
    return {
        source: [name for _, _, name in sorted(tiles, key=lambda tile: tile[:2])]
        for source, tiles in sorted(by_source.items())
    }


def write_index(root: Path, index: Mapping[str, Sequence[str]]) -> None:
    """Write the index, last: it says that everything it names is there.

    Raises:
        OutputError: If another index is there, or it cannot be written.
    """
    for source, names in index.items():
        if len(set(names)) != len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise StoreError(f"two tiles of source {source!r} would have the name {twice!r}.")
    path = root / _INDEX
    if path.exists():
        if read_index(root) != {source: list(names) for source, names in index.items()}:
            raise OutputError(f"{path} exists and names other tiles. Choose an empty folder.")
        return
    with write_whole(path) as temporary, h5py.File(temporary, "w") as file:
        for source, names in index.items():
            encoded = np.array([name.encode() for name in names])
            file.create_dataset(f"{source}_{TILE_SIZE}", data=encoded, track_times=False)
