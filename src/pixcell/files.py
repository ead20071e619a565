"""Files appear whole or not at all.

``write_whole`` writes beside the target, syncs, and renames: after a crash there is the old file, or the
new one, never half of either. "The file exists" may therefore be read as "this piece is done".
``write_whole_folder`` does the same for a folder.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixcell.errors import OutputError

__all__ = [
    "remove_leftovers",
    "sha256_of",
    "write_json",
    "write_text",
    "write_whole",
    "write_whole_folder",
    "writing_to",
]

_TEMPORARY = ".tmp-"
_LEFTOVER = re.compile(r"\.tmp-[0-9a-f]{12}$")


@contextlib.contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Turn a failure to write under ``place`` into an :class:`OutputError` that says what to do."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
            errno.EROFS: "the file system is read-only; choose another output folder",
            errno.EACCES: "no permission to write there; choose another output folder",
            errno.EPERM: "no permission to write there; choose another output folder",
            errno.ENOTDIR: "a part of the path is a file, not a folder; choose another output folder",
            errno.EEXIST: "a file stands where a folder is needed; choose another output folder",
            errno.EFBIG: "the file system does not take files of this size; choose another output folder",
        }
        if error.errno not in reasons or not _concerns(error, place):
            raise
        raise OutputError(f"cannot write {place}: {reasons[error.errno]}.") from error


def _concerns(error: OSError, place: Path) -> bool:
    """Tell whether an error is about ``place``, what lies in or beside it under its name, or is above it."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    named, target = str(Path(error.filename).resolve()), str(Path(place).resolve())
    return named.startswith(target) or target.startswith(named.rstrip(os.sep) + os.sep)


@contextlib.contextmanager
def write_whole(path: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path``; sync and rename it when the block ends without an error.

    Args:
        path: Where the file appears.
        keep_existing: The first writer wins: if ``path`` exists by then, it stays and the new file goes.

    Raises:
        OutputError: If the place is read-only, full or not a folder.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with write_whole(folder / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> (folder / "a.txt").read_text(), len(list(folder.iterdir()))
        ('whole', 1)
    """
    temporary = path.parent / f"{path.name}{_TEMPORARY}{uuid.uuid4().hex[:12]}"
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            if not (keep_existing and _published_or_taken(temporary, path)):
                temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path``; sync and rename it when the block ends without an error.

    A process that is killed in between leaves the folder beside, which the next one that writes ``path``
    removes: a lock tells whether its owner still lives.

    Args:
        path: Where the folder appears. It must not exist.

    Raises:
        OutputError: If ``path`` exists, or the place is read-only, full or not a folder.
    """
    taken = f"{path} is there already; choose another place, or move it away."
    if path.exists() or path.is_symlink():
        raise OutputError(taken)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_folders(path)
        temporary = path.parent / f"{path.name}{_TEMPORARY}{uuid.uuid4().hex[:12]}"
        temporary.mkdir()
        lock = _locked(temporary)
        try:
            try:
                yield temporary
            except Exception as error:
                # Writers of weights raise errors of their own when the disk is full.
                if "No space left" in str(error) and not isinstance(error, OSError | OutputError):
                    raise OSError(errno.ENOSPC, "No space left on device") from error
                raise
            for file in sorted(temporary.rglob("*")):
                _sync(file)
            _sync(temporary)
            if path.exists():
                raise OutputError(taken)
            temporary.rename(path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _remove_dead_folders(path: Path) -> None:
    """Delete what killed processes left half-written for ``path``."""
    for place in path.parent.glob(f"{glob.escape(path.name)}{_TEMPORARY}*"):
        if _LEFTOVER.search(place.name) and place.is_dir():
            lock = _locked(place)
            if lock is not None:  # nobody holds it: its owner is dead
                shutil.rmtree(place, ignore_errors=True)
                os.close(lock)


def _locked(folder: Path) -> int | None:
    """Lock a folder until its descriptor is closed, at the latest with the process; None: not possible.

    Where there are no locks (Windows, some network file systems), nothing is taken for dead.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    if path.is_dir():
        _sync_folder(path)
        return
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, whole or not at all. NaN is refused: JSON has no such number."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path, older_than_s: float = 24 * 3600) -> int:
    """Delete what killed processes left half-written in ``folder`` (not below); return how many.

    Only files older than a day, so that a process still writing on another machine is not disturbed. What
    may not be deleted here (another user's) stays.
    """
    import time

    removed = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        # A file of another process may get its name, and so be gone, at any moment.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if _LEFTOVER.search(path.name) and time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()
                removed += 1
    return removed


def _published_or_taken(temporary: Path, path: Path) -> bool:
    """Give the file its name unless the name is taken, in one step; False where there are no hard links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return path.exists()
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Not every system lets a folder be opened; there, the rename itself must do."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
