"""Files of a pack that is elsewhere (HTTP, S3, Google Cloud Storage, ...), kept on disk meanwhile.

A file is fetched whole, in pieces that are asked for again when they fail, compared with its checksum, and
then named: what is there is complete. Any number of processes share one cache: each file is fetched once, by
whoever locks it first. When room is needed the file that was opened longest ago goes; whoever still reads it
keeps it until it is closed.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ByteSize, Field

from pixcell.config import Config
from pixcell.data.pack_format import FileFacts
from pixcell.errors import CorruptShard, MissingExtra, StoreError
from pixcell.files import writing_to

__all__ = ["CacheConfig", "RemoteFolder", "ShardCache"]

logger = logging.getLogger(__name__)

_PIECE = 16 << 20
_PAUSE_S = 0.5  # before the second attempt; doubled before each further one
_LONGEST_PAUSE_S = 30.0


class CacheConfig(Config):
    """Where files of packs that are elsewhere are kept meanwhile."""

    folder: Path | None = None
    """None: ``pixcell/shards`` in the user's cache folder (``XDG_CACHE_HOME``). A fast local disk is best."""
    size: ByteSize = Field(ByteSize(50_000_000_000), gt=0)
    """Bytes that it may take on disk, such as 200GB; over all packs."""
    attempts: int = Field(5, gt=0)
    """How often a request is made before it counts as failed."""

    @property
    def place(self) -> Path:
        """The folder, also where none is given."""
        if self.folder is not None:
            return self.folder
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixcell" / "shards"


class RemoteFolder:
    """A folder that fsspec can read, by its URL. Opened in each process anew, also after a fork."""

    def __init__(self, url: str, attempts: int = 5) -> None:
        """Note the address; nothing is asked for yet."""
        self.url, self.attempts = url.rstrip("/"), attempts
        self._opened: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.url, self.attempts)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return a file's bytes, or those from ``start`` to ``end``.

        A server that does not know ranges answers with the whole file, and that is returned.

        Raises:
            StoreError: If there is no such file, access is denied, or it failed as often as is allowed.
            MissingExtra: If the package for this kind of address is not installed.
        """
        files, root = self._files()
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S))
            try:
                data: bytes = files.cat_file(f"{root}/{name}", start=start, end=end)
            except FileNotFoundError:
                raise StoreError(
                    f"there is no {self.url}/{name}. Correct the address, or copy the whole pack there."
                ) from None
            except Exception as error:  # each kind of storage has errors of its own
                if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
                    raise StoreError(
                        f"{self.url}/{name} may not be read ({_reason(error)}). Give fsspec the credentials "
                        "of this storage (environment variables, or its configuration file)."
                    ) from error
                reason = _reason(error)
            else:
                if start is None or end is None or len(data) >= end - start:
                    return data
                reason = f"{len(data)} bytes came instead of {end - start}"
            logger.info("%s/%s, attempt %d of %d: %s", self.url, name, attempt + 1, self.attempts, reason)
        raise StoreError(
            f"{self.url}/{name} could not be fetched: {self.attempts} attempts failed, the last with: "
            f"{reason}. Look at the connection and the server, then run the same command again; what was "
            "fetched is kept."
        )

    def _files(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                import fsspec
            except ImportError as error:
                raise MissingExtra("fsspec", "shards", f"reading {self.url}") from error
            try:
                files, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True)
            except ImportError as error:
                raise StoreError(
                    f"{self.url} cannot be read yet: {_reason(error)}. For http(s) install it with "
                    "pip install 'pixcell[shards]', for s3:// with pip install s3fs, for gs:// with "
                    "pip install gcsfs."
                ) from error
            except ValueError as error:
                raise StoreError(
                    f"{self.url} is no address that fsspec can read: {_reason(error)}."
                ) from error
            self._opened = (os.getpid(), files, str(root).rstrip("/"))
        return self._opened[1:]


class ShardCache:
    """Local copies of the files of one remote pack, in a folder of bounded size."""

    def __init__(self, remote: RemoteFolder, identity: str, config: CacheConfig) -> None:
        """Keep files of a pack of this identity; packs of other content are kept apart."""
        self.remote, self.config = remote, config
        self.root = config.place
        self.folder = self.root / identity[:16]

    def path_of(self, facts: FileFacts) -> Path:
        """Return where a file is on disk, after fetching it if it is not there.

        It may be removed again at any time to make room; open it at once.

        Raises:
            StoreError: If it cannot be fetched, or is larger than the whole cache.
            CorruptShard: If what comes is not what was packed.
            OutputError: If the cache cannot be written.
        """
        path = self.folder / facts.name
        with writing_to(self.root):
            if _is_complete(path, facts):
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(_lock_of(path)) as mine:
                assert mine
                if not _is_complete(path, facts):
                    self._fetch(facts, path)
        return path

    def must_hold(self, num_bytes: int, what: str) -> None:
        """Check that so many bytes fit at once.

        Raises:
            StoreError: Says which size would do.
        """
        if num_bytes > self.config.size:
            raise StoreError(
                f"the cache of {_gb(self.config.size)} in {self.root} cannot hold {what} at once "
                f"({_gb(num_bytes)}): each would be fetched many times. Allow more with data.cache.size."
            )

    def _fetch(self, facts: FileFacts, path: Path) -> None:
        self.must_hold(facts.num_bytes, f"{self.remote.url}/{facts.name}")
        part = _part_of(path)
        part.unlink(missing_ok=True)  # of a process that died; the lock is ours now
        try:
            self._reserve(part, facts.num_bytes)
            # A second time: a transfer may go wrong once without a word; a damaged source stays damaged.
            if not any(self._download(facts, part) == facts.sha256 for _ in range(2)):
                raise CorruptShard(
                    f"{self.remote.url}/{facts.name} is not the file that was packed: its checksum was wrong "
                    "twice. Copy it again from where the pack was made; `pixcell pack` repairs a pack there."
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _download(self, facts: FileFacts, part: Path) -> str:
        """Write a file's bytes piece by piece; return their checksum."""
        digest, position = hashlib.sha256(), 0
        with part.open("rb+") as file:
            while position < facts.num_bytes:
                end = min(position + _PIECE, facts.num_bytes)
                data = self.remote.read(facts.name, position, end)
                if (
                    len(data) != end - position
                ):  # a server without ranges: this is the file from its beginning
                    data = data[position : facts.num_bytes]
                file.write(data)
                digest.update(data)
                position += len(data)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()

    def _reserve(self, part: Path, num_bytes: int) -> None:
        """Make room and take it: the unfinished file has its final size from the start."""
        while True:
            with _locked(self.root / ".room.lock"):
                if self._make_room(num_bytes):
                    with part.open("wb") as file:
                        file.truncate(num_bytes)
                    return
            time.sleep(0.2)  # others are being fetched; each may be removed once it is complete

    def _make_room(self, num_bytes: int) -> bool:
        complete: list[tuple[float, int, Path]] = []
        taken = 0
        for path in self.root.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process finishes files meanwhile
                facts = path.stat()
                if path.is_dir() or path.suffix == ".lock":
                    continue
                if path.suffix == ".part" and _is_abandoned(path):
                    path.unlink()
                    continue
                taken += facts.st_size
                if path.suffix != ".part":
                    complete.append((facts.st_mtime, facts.st_size, path))
        for _, size, path in sorted(complete):
            if taken + num_bytes <= self.config.size:
                break
            path.unlink(missing_ok=True)
            taken -= size
        return taken + num_bytes <= self.config.size


def _is_complete(path: Path, facts: FileFacts) -> bool:
    """Tell whether a file is there, and note that it was needed now."""
    try:
        if path.stat().st_size != facts.num_bytes:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _is_abandoned(part: Path) -> bool:
    """Tell whether nobody fetches this unfinished file any more: locks end with their process."""
    with _locked(_lock_of(part.with_suffix("")), wait=False) as mine:
        return mine


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file's lock; yields whether it could be had.

    Where there are no locks (Windows), two processes may fetch the same file, each whole.
    """
    try:
        import fcntl
    except ImportError:
        yield wait
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks
            yield wait
        else:
            try:
                yield True
            finally:
                # Said, not left to closing: a process that was forked meanwhile holds the descriptor, too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
