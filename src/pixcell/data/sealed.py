"""Sealed files: the last line of a file is the SHA-256 of everything before it.

NumPy and HDF5 both stop reading where their own content ends, so a sealed ``.npy`` or ``.h5`` opens with
any program. The seal and the content travel in one file and are renamed into place together; no crash and no
second writer can pair the bytes of one with the checksum of another.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pixcell.errors import CorruptShard

__all__ = ["SEAL_BYTES", "OpenFile", "OpenFiles", "broken_seal", "seal", "sealed_digest"]

_PREFIX = b"\nsha256:"
SEAL_BYTES = len(_PREFIX) + 64 + 1
_BLOCK = 1 << 20

Opened = TypeVar("Opened")


def seal(path: Path) -> str:
    """Append the checksum to a finished file and return it, in hex."""
    with path.open("rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0, os.SEEK_END)
        file.write(_PREFIX + digest.encode() + b"\n")
    return digest


def sealed_digest(path: Path) -> str:
    """Return the checksum that a sealed file states. Cheap: the content is not read.

    Raises:
        CorruptShard: If the file does not end in a seal; it was cut short, or written by something else.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SEAL_BYTES))
        line = file.read()
    if len(line) != SEAL_BYTES or not line.startswith(_PREFIX):
        raise CorruptShard(
            f"{path} does not end in its checksum: it was cut short or changed ({size} bytes). "
            "Delete it and run the command that made it again."
        )
    return line[len(_PREFIX) : -1].decode("ascii", errors="replace")


def broken_seal(path: Path) -> str | None:
    """Read the whole file; return what is wrong with it, or None."""
    try:
        stated = sealed_digest(path)
    except CorruptShard as error:
        return str(error)
    digest = hashlib.sha256()
    left = path.stat().st_size - SEAL_BYTES
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
    if digest.hexdigest() != stated:
        return f"{path} was changed after it was written: its checksum is not the stated one."
    return None


class OpenFile:
    """A file descriptor that closes when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.size = os.fstat(self._descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``. No shared position, so threads and forks are safe.

        Raises:
            CorruptShard: If the file ends before the buffer is full.
        """
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise CorruptShard(
                    f"{self.path} ends {len(buffer) - done} bytes too early. "
                    "Delete it and run the command that made it again."
                )
            done += count

    def read(self, count: int, offset: int) -> bytes:
        """Return ``count`` bytes at ``offset``; see :meth:`read_into`."""
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def __del__(self) -> None:
        descriptor = self.__dict__.pop("_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


class OpenFiles(Generic[Opened]):
    """The most recently used files stay open, at most ``limit`` of them.

    Pickles as an empty set of open files, so what holds it can travel to a worker process. A file that falls
    out while another thread still reads from it closes when that thread is done.
    """

    def __init__(self, open_one: Callable[[str], Opened], limit: int) -> None:
        """Take the function that opens a file by its key."""
        self.limit = limit
        self._open_one = open_one
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._opened)

    def __getitem__(self, key: str) -> Opened:
        with self._lock:
            opened = self._opened.get(key)
            if opened is None:
                opened = self._opened[key] = self._open_one(key)
                while len(self._opened) > self.limit:
                    self._opened.popitem(last=False)
            else:
                self._opened.move_to_end(key)
            return opened

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._open_one, self.limit)
