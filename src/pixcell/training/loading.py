"""Micro-batches as the trainer takes them, read ahead by loader processes.

Errors of a loader process arrive as themselves, a process that dies is told from a mistake in the data, and a
tile that cannot be read either ends the run, with its name, or is left out of its batch.

**Left out, not replaced.** A batch keeps its shape: the row of a tile that cannot be read holds a copy of a
row that can, and ``MicroBatch.readable`` is false there. The trainer gives such a row no part in the loss,
the gradient or any figure. The gradient is that of the sum over the readable samples divided by the whole
``batch_size``: the share of a dropped sample is missing, it is not spread over the others. That needs nothing
but the row itself, so it is exactly the same in one batch or many micro-batches, on one process or many.
"""

import contextlib
import re
import signal
import traceback
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pixcell.errors import PixCellError, RunError, UnreadableTile
from pixcell.training.determinism import BatchPlan, Ticket, rng_for
from pixcell.training.dropped import Dropped
from pixcell.training.objectives import Samples

__all__ = ["MicroBatch", "OnBadTile", "dead_loaders_are_errors", "load_batches"]

OnBadTile = Literal["fail", "drop"]
"""A tile that cannot be read ends the run, or is left out of its batch."""

_TRIED = 64
"""Samples tried to find one that can be read, where a micro-batch has none."""
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@dataclass(frozen=True)
class MicroBatch:
    """Collated samples, and which of them count."""

    samples: Mapping[str, Any]
    """As the objective takes them."""
    readable: Bool[Tensor, " batch"] | None = None
    """Rows that count. None: all of them."""
    dropped: Sequence[Dropped] = ()
    """Why the others do not."""

    @property
    def keys(self) -> list[str]:
        """Names of the samples that count."""
        keys = list(self.samples["key"])
        return keys if self.readable is None else [keys[row] for row in self.readable.nonzero().flatten()]


def load_batches(
    samples: Samples,
    plan: BatchPlan,
    *,
    seed: int,
    workers: int = 0,
    pin_memory: bool = False,
    on_bad_tile: OnBadTile = "fail",
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a plan. None of the options changes what is in them.

    Args:
        samples: Where they are drawn from.
        plan: Which samples, in which order.
        seed: Of the chance of each sample.
        workers: Loader processes; 0 reads when the batch is asked for.
        pin_memory: Whether batches are put where a GPU copies from fastest.
        on_bad_tile: What to do about an :class:`UnreadableTile`.

    Raises:
        UnreadableTile: If a tile cannot be read and is not to be dropped.
        PixCellError: Whatever else the samples raise, as they raise it.
    """
    loader = DataLoader(
        _Drawn(samples, seed, on_bad_tile),
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_stop_signals if workers else None,
        # DataLoader draws a seed for its workers; from here, not from the process's own chance.
        generator=torch.Generator().manual_seed(seed),
    )
    iterator = iter(loader)
    _end_at_exit(getattr(iterator, "_workers", ()))
    for content in iterator:
        if isinstance(content, _Failure):
            raise content.error
        dropped = content.pop(_DROPPED, ())
        bad = {row for row, _ in dropped}
        readable = torch.tensor([row not in bad for row in range(len(content["key"]))]) if bad else None
        yield MicroBatch(content, readable, [one for _, one in dropped])


@contextlib.contextmanager
def dead_loaders_are_errors(workers: int) -> Iterator[None]:
    """Say what to do when a loader process dies, wherever the training is at that moment.

    Raises:
        RunError: If one was killed or ended by itself.
    """
    try:
        yield
    except RuntimeError as error:
        # torch has no type of its own for this. An error inside of a loader begins with "Caught".
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        said = " ".join(str(error).split()).rstrip(".")
        # Frames keep the loader, and while it is there every process that ends raises the same error again,
        # wherever the program is then.
        traceback.clear_frames(error.__traceback__)
        raise RunError(
            f"a loader process died: {said}. Most often the machine ran out of memory, or of shared memory "
            f"(/dev/shm). Lower trainer.workers (now {workers}; 0 needs no such processes) and run the same "
            "command again: it goes on from the last checkpoint."
        ) from error


_processes: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


def _end_at_exit(workers: Iterable[BaseProcess]) -> None:
    """See to it that loader processes end with the program.

    They ignore SIGTERM, by which Python ends its children before it waits for them. While an error keeps
    the loader, nothing else tells them to end, and the program would wait for ever.
    """
    if workers and not _processes:
        Finalize(None, _kill_loaders, exitpriority=100)
    _processes.update(workers)


def _kill_loaders() -> None:
    for process in list(_processes):
        if process.is_alive():
            process.kill()


_DROPPED = "rows that could not be read"  # beside the keys of an objective, which are identifiers


@dataclass(frozen=True)
class _Failure:
    """An error of the package on its way out of a loader process; torch would turn it into a traceback."""

    error: PixCellError


class _Drawn(Dataset[dict[str, Any]]):
    """Samples by ticket: which one, and the chance of its step and position."""

    def __init__(self, samples: Samples, seed: int, on_bad_tile: OnBadTile) -> None:
        self.samples, self.seed, self.on_bad_tile = samples, seed, on_bad_tile

    def __getitems__(self, tickets: Sequence[Ticket]) -> "list[dict[str, Any]] | _Readable | _Failure":
        """Read a micro-batch; the torch loader calls this when it is there."""
        try:
            try:
                return self._draw(tickets)
            except UnreadableTile:
                if self.on_bad_tile == "fail":
                    raise
                return self._draw_readable(tickets)
        except PixCellError as error:
            return _Failure(_with_way_out(error))

    def _draw(self, tickets: Sequence[Ticket]) -> list[dict[str, Any]]:
        rngs = [rng_for(self.seed, step, position) for _, step, position in tickets]
        return self.samples.draw([index for index, _, _ in tickets], rngs)

    def _draw_readable(self, tickets: Sequence[Ticket]) -> "_Readable":
        """Read one by one, so that a bad tile takes no other with it. Their chance is that of the batch."""
        rows: list[dict[str, Any] | None] = []
        dropped = []
        for row, ticket in enumerate(tickets):
            try:
                rows += self._draw([ticket])
            except UnreadableTile as error:
                _, step, position = ticket
                dropped.append((row, Dropped.of(error, step, position)))
                rows.append(None)
        filling = next((row for row in rows if row is not None), None) or self._any(tickets[0])
        return _Readable([row or filling for row in rows], dropped)

    def _any(self, near: Ticket) -> dict[str, Any]:
        """A sample that can be read, to give a micro-batch without one its shapes."""
        index, step, position = near
        for away in range(1, _TRIED + 1):
            with contextlib.suppress(UnreadableTile):
                return self._draw([((index + away) % len(self.samples), step, position)])[0]
        raise RunError(
            f"none of {_TRIED} samples in a row can be read, from number {index} on. "
            "Is the disk or the network gone? See what can be read: pixcell inspect STORE --verify."
        )

    def __getitem__(self, ticket: Ticket) -> dict[str, Any]:
        return self._draw([ticket])[0]


@dataclass(frozen=True)
class _Readable:
    """A micro-batch of which some rows do not count."""

    rows: list[dict[str, Any]]
    dropped: list[tuple[int, Dropped]]


def _collate(drawn: "list[dict[str, Any]] | _Readable | _Failure") -> Any:
    if isinstance(drawn, _Failure):
        return drawn
    if isinstance(drawn, _Readable):
        return {**default_collate([dict(row) for row in drawn.rows]), _DROPPED: drawn.dropped}
    return default_collate(drawn)


def _with_way_out(error: PixCellError) -> PixCellError:
    """Tell whoever trains what else there is to do about a bad tile."""
    if not isinstance(error, UnreadableTile):
        return error
    reason = (
        f"{error.reason} To train without such tiles: --on-bad-tile drop. "
        "To see what else is damaged: pixcell inspect STORE --verify."
    )
    return UnreadableTile(error.slide_id, error.tile, error.x, error.y, reason)


def _ignore_stop_signals(_: int) -> None:
    """In a loader process: the trainer decides when to stop.

    A terminal sends Ctrl-C, and a cluster its signals, to every process of a job. A loader that obeyed would
    leave the step in progress without its samples. Loaders end with the trainer, however it ends.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
