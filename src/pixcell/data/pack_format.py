"""The layout of a pack: a store's tiles as WebDataset shards, with an index.

    PACK/pack.json           tiling, what made the columns, size and checksum of every file; written last
    PACK/index.parquet       one row per tile in the order of the shards, and where in its shard each begins
    PACK/shards/000000.tar   plain tar; the members of a tile stand beside each other under one key:
        000000-00012.latents-sd3.5.npy
        000000-00012.embeddings-uni2-h.npy
        000000-00012.jpg
        000000-00012.json

Any program that reads tar or WebDataset reads a shard. Members of fixed size stand in front, and a header is
one block: where the fields of a tile lie follows from where the tile begins. So a field is one contiguous
read inside the shard, as in a store.
"""

import hashlib
import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from pixcell.data.columns import npy_header
from pixcell.errors import StoreError

__all__ = [
    "INDEX_FILE",
    "MANIFEST_FILE",
    "OWN_COLUMNS",
    "FileFacts",
    "Manifest",
    "PackedColumn",
    "SampleLayout",
    "is_pack",
    "member_header",
    "padding_of",
    "shard_name",
]

MANIFEST_FILE, INDEX_FILE = "pack.json", "index.parquet"
OWN_COLUMNS = ("__tile__", "__offset__", "__image_bytes__")
"""Columns of a pack's index beside those of a store's: row in the slide as the store counts it, first byte in
the shard, length of the JPEG."""

_FORMAT, _VERSION = "pixcell-pack", 1
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class FileFacts:
    """One file of a pack, as it must be."""

    name: str
    """Below the folder of the pack."""
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class PackedColumn:
    """A column of fixed-size records, as the store has it."""

    made_by: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: np.dtype

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"made_by": dict(self.made_by), "shape": list(self.shape), "dtype": self.dtype.name}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what :meth:`as_json` gave."""
        shape = tuple(int(side) for side in content["shape"])
        return cls(dict(content["made_by"]), shape, np.dtype(content["dtype"]))


@dataclass(frozen=True)
class Manifest:
    """What ``pack.json`` says."""

    tiling: Mapping[str, Any]
    columns: Mapping[str, PackedColumn]
    """In the order in which their members stand."""
    has_images: bool
    num_tiles: int
    tiles_per_shard: int
    """Of every shard but the last, which may have fewer."""
    index: FileFacts
    shards: tuple[FileFacts, ...]
    request: Mapping[str, Any]
    """What was asked for when it was packed; a pack is gone on with for the same request only."""

    def to_bytes(self) -> bytes:
        """Return the content of ``pack.json``."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "tiling": dict(self.tiling),
            "columns": {name: column.as_json() for name, column in self.columns.items()},
            "images": self.has_images,
            "num_tiles": self.num_tiles,
            "tiles_per_shard": self.tiles_per_shard,
            "request": dict(self.request),
            "index": asdict(self.index),
            "shards": [asdict(shard) for shard in self.shards],
        }
        return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> Self:
        """Read ``pack.json``.

        Args:
            data: Its content.
            place: Where it is, for messages.

        Raises:
            StoreError: If it is no such description, or a newer version of the package wrote it.
        """
        try:
            content = json.loads(data)
            kind, version = content["format"], int(content["version"])
            if kind != _FORMAT or version > _VERSION:
                raise StoreError(
                    f"{place} has format {kind!r} version {version}; this pixcell reads {_FORMAT!r} up to "
                    f"version {_VERSION}. Update pixcell."
                )
            manifest = cls(
                tiling=dict(content["tiling"]),
                columns={name: PackedColumn.from_json(one) for name, one in content["columns"].items()},
                has_images=bool(content["images"]),
                num_tiles=int(content["num_tiles"]),
                tiles_per_shard=int(content["tiles_per_shard"]),
                index=FileFacts(**content["index"]),
                shards=tuple(FileFacts(**shard) for shard in content["shards"]),
                request=dict(content["request"]),
            )
            # Names become paths of a cache; none may lead elsewhere.
            names = [shard_name(number) for number in range(len(manifest.shards))]
            if [shard.name for shard in manifest.shards] != names or manifest.index.name != INDEX_FILE:
                raise ValueError("its files are not called as those of a pack")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{place} cannot be understood ({error}). Copy it again from where the pack was made, or "
                "pack the store again."
            ) from error

    @property
    def identity(self) -> str:
        """Hash of the whole description; packs of other content have another one."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def is_pack(folder: Path) -> bool:
    """Tell whether a folder holds a finished pack."""
    return (folder / MANIFEST_FILE).is_file()


def shard_name(number: int) -> str:
    """Return the name of a shard below the folder of its pack."""
    return f"shards/{number:06d}.tar"


class SampleLayout:
    """Where the members of a tile lie, counted in bytes from where the tile begins.

    Attributes:
        record_starts: First byte of each column's record, behind the headers of tar and ``.npy``.
        image_start: First byte of the JPEG.
    """

    def __init__(self, columns: Mapping[str, PackedColumn]) -> None:
        """Lay out one tile; the columns stand in the given order."""
        self.columns = dict(columns)
        self.record_starts: dict[str, int] = {}
        position = 0
        for name, column in self.columns.items():
            header = len(npy_header(column.shape, column.dtype))
            self.record_starts[name] = position + _BLOCK + header
            size = header + int(np.prod(column.shape)) * column.dtype.itemsize
            position += _BLOCK + size + padding_of(size)
        self.image_start = position + _BLOCK


def member_header(name: str, size: int) -> bytes:
    """Return the tar header of a member: one block, without clock times or owners.

    Raises:
        StoreError: If the name is longer than such a header holds.
    """
    if len(name.encode()) > tarfile.LENGTH_NAME:
        raise StoreError(
            f"a member of a shard would be called {name!r}: {len(name.encode())} bytes, and tar headers hold "
            f"{tarfile.LENGTH_NAME}. Encode into a column with a shorter name."
        )
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def padding_of(size: int) -> int:
    """Return how many bytes follow a member of that size, to the end of its last block.

    Examples:
        >>> padding_of(512), padding_of(513)
        (0, 511)
    """
    return -size % _BLOCK
