"""Checkpoints: whole, verified on load, and as few as the rule says.

    runs/<name>/checkpoints/step-00002000/
    ├── checkpoint.json     step, facts, and the SHA-256 of every other file
    ├── pipeline/           to use: averaged (EMA) weights in the diffusers layout
    └── state/              to go on: weights, averages, optimiser, and where the run stands

A checkpoint is written beside its place, synced file by file, and renamed. So a folder named ``step-…`` is
complete; a process killed while writing leaves only a temporary folder, which the next start removes.

The rule: the last few are kept, to go on from; and every so many steps one for good, to look back at.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pixcell.errors import OutputError, RunError
from pixcell.files import remove_leftovers, sha256_of, write_json, writing_to

__all__ = ["Checkpoint", "exclusively", "link_or_copy", "prune", "remove_unfinished", "write_checkpoint"]

_FACTS = "checkpoint.json"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """A step of a run.

    Args:
        path: The folder ``step-…``.
        facts: What ``checkpoint.json`` says.
    """

    path: Path
    facts: Mapping[str, Any]

    @classmethod
    def find(cls, place: Path) -> Self:
        """Return a checkpoint folder's checkpoint, or the last one of a run folder.

        Raises:
            RunError: If there is none.
        """
        if (place / _FACTS).is_file():
            return cls.open(place)
        last = cls.last(place)
        if last is None:
            what = "holds no checkpoint yet" if (place / "recipe.yaml").is_file() else "is not a run"
            raise RunError(
                f"{place} {what}. Give a run folder (runs/<name>) with a folder step-… in checkpoints/, "
                "or such a folder; `pixcell train` makes them."
            )
        return last

    @classmethod
    def last(cls, run: Path) -> Self | None:
        """Return the checkpoint with the largest step of a run, or None."""
        places = _complete(run)
        return cls.open(places[-1]) if places else None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read what a checkpoint says about itself. Its files are not read; see :meth:`verify`.

        Raises:
            RunError: If ``checkpoint.json`` is missing or damaged.
        """
        try:
            facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
            int(facts["step"]), dict(facts["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path / _FACTS} cannot be read ({error}). {_way_out(path)}") from error
        return cls(path, facts)

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self.facts["step"])

    @property
    def pipeline(self) -> Path:
        """The folder to sample from."""
        return self.path / "pipeline"

    @property
    def state(self) -> Path:
        """The folder to resume from."""
        return self.path / "state"

    def verify(self, part: str = "") -> None:
        """Compare every file with its checksum.

        Args:
            part: ``"pipeline"`` or ``"state"``: only the files of that folder.

        Raises:
            RunError: Names the first file that is missing or changed.
        """
        for name, digest in self.facts["files"].items():
            if not name.startswith(f"{part}/" if part else ""):
                continue
            file = self.path / name
            if not file.is_file():
                raise RunError(f"{file} is missing. {_way_out(self.path)}")
            if sha256_of(file) != digest:
                way_out = _way_out(self.path)
                if file.stat().st_nlink > 1:
                    way_out = (
                        "Other checkpoints share this file, for it belongs to a frozen part: put back the "
                        f"original, in place (SHA-256 {digest})."
                    )
                raise RunError(f"{file} is not what was written: its checksum differs. {way_out}")


def write_checkpoint(
    run: Path, step: int, write: Callable[[Path], None], facts: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Write a checkpoint, whole or not at all.

    Args:
        run: The run folder.
        step: Optimiser steps taken.
        write: Called with an empty folder, which it fills.
        facts: JSON values kept in ``checkpoint.json`` beside step and checksums.

    Raises:
        OutputError: If the disk is full or read-only. Earlier checkpoints are untouched.
    """
    place = run / "checkpoints" / f"step-{step:08d}"
    unfinished = place.with_name(f"{_UNFINISHED}{place.name}-{uuid.uuid4().hex[:8]}")
    with _full_disk_is_an_output_error(place), writing_to(place):
        try:
            unfinished.mkdir(parents=True)
            write(unfinished)
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            digests = {}
            for file in files:
                _sync(file)
                digests[file.relative_to(unfinished).as_posix()] = sha256_of(file)
            content = {"step": step, **(facts or {}), "files": digests}
            write_json(unfinished / _FACTS, content)
            for folder in (*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
                _sync(folder)
            for folder in (run, place.parent):  # made by the first checkpoint
                _sync(folder)
            if place.exists():  # written by hand, or by a run that was set back: the new one counts
                _discard(place)
            unfinished.rename(place)
            _sync(place.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Checkpoint(place, content)


def prune(run: Path, keep_last: int, keep_every: int | None = None) -> list[Path]:
    """Delete the checkpoints that the rule does not keep; return those deleted.

    Args:
        run: The run folder.
        keep_last: How many of the last are kept.
        keep_every: Checkpoints at multiples of so many steps are kept for good. None: of none.
    """
    old = _complete(run)[:-keep_last]
    places = [place for place in old if keep_every is None or _step_of(place) % keep_every]
    for place in places:
        _discard(place)
    return places


def remove_unfinished(run: Path) -> None:
    """Remove what a killed process left. Only for the process that holds the run (:func:`exclusively`)."""
    for place in (run / "checkpoints").glob(f"{_UNFINISHED}*"):
        shutil.rmtree(place, ignore_errors=True)
    for folder in (run, run / "previews"):
        remove_leftovers(folder, older_than_s=0)


@contextlib.contextmanager
def exclusively(run: Path) -> Iterator[None]:
    """Hold a run: two processes that write one run would mix their steps.

    The system drops the lock with the process, however it ends.

    Raises:
        RunError: If another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; the run is taken on trust
        yield
        return
    with writing_to(run):
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / ".lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(
                f"another process is training in {run}. "
                "Wait for it, stop it, or choose another folder with --run."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network file systems have no locks
                raise
        yield
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)


_locks: set[int] = set()
"""Descriptors of the runs that this process holds."""


def _let_go_of_locks() -> None:
    """In a forked process: loaders outlive a trainer that is killed by seconds, and must not hold its run."""
    while _locks:
        os.close(_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_of_locks)


def link_or_copy(source: Path, target: Path) -> None:
    """Copy a folder; share the bytes of its files by hard links where the file system can.

    Frozen parts (the autoencoder) are the same in every checkpoint, and files here never change in place.
    """
    shutil.copytree(source, target, copy_function=_link_or_copy_file)


def _link_or_copy_file(source: str, target: str) -> None:
    try:
        os.link(Path(source).resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            raise
        shutil.copyfile(source, target)


def _complete(run: Path) -> list[Path]:
    """The finished checkpoints of a run, in order of their steps."""
    found = (path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=_step_of)


def _step_of(place: Path) -> int:
    return int(place.name.removeprefix("step-"))


def _discard(place: Path) -> None:
    """Rename first, so that no half-deleted folder bears the name of a complete checkpoint."""
    unwanted = place.with_name(f"{_UNFINISHED}{place.name}-{uuid.uuid4().hex[:8]}")
    place.rename(unwanted)
    shutil.rmtree(unwanted)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _full_disk_is_an_output_error(place: Path) -> Iterator[None]:
    """The writers of torch and safetensors raise their own errors when the disk is full."""
    try:
        yield
    except (OSError, OutputError):
        raise
    except Exception as error:
        free = shutil.disk_usage(place.parent).free if place.parent.is_dir() else 0
        if "No space left" in str(error) or "PytorchStreamWriter" in str(error) or free < 1 << 20:
            raise OutputError(
                f"cannot write {place}: the disk is full; free some space and run the same command again."
            ) from error
        raise


def _way_out(path: Path) -> str:
    if not _NAME.fullmatch(path.name):
        return "Copy it again from its run."
    before = [place for place in _complete(path.parent.parent) if _step_of(place) < _step_of(path)]
    if before:
        return f"Delete {path} to go on from the checkpoint before it, {before[-1].name}."
    return f"Delete {path} to begin the run anew; there is no checkpoint before it."
