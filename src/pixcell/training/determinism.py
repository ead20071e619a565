"""Chance as a function of (seed, step, position), not of process state.

``position`` is the place of a sample in the total batch of a step. Whatever is random about a sample (its
crop, flip, dropout, time and noise) is drawn from ``rng_for(seed, step, position)``, and which sample stands
there from an order (:mod:`pixcell.training.order`). So a run that was killed goes on bit for bit, and the
same samples come in the same order on any number of processes, with any number of loader workers.
"""

import hashlib
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import Sampler

__all__ = ["BatchPlan", "Order", "Ticket", "Without", "rng_for"]

Ticket = tuple[int, int, int]
"""Index of a sample, and the step and position it is needed for."""


def rng_for(*key: int) -> np.random.Generator:
    """Return the generator that belongs to a key of integers.

    Philox takes a 128-bit key, so no two keys share a stream (torch's CPU generator keeps 32 bits of a seed).

    Examples:
        >>> float(rng_for(0, 1, 2).random()) == float(rng_for(0, 1, 2).random())
        True
        >>> float(rng_for(0, 1, 2).random()) == float(rng_for(0, 2, 1).random())
        False
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


@runtime_checkable
class Order(Protocol):
    """Which sample stands at each place of an endless training; see :mod:`pixcell.training.order`."""

    @property
    def num_samples(self) -> int:
        """Samples that are ordered. So many places are an epoch."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What decides the order besides its seed and number of samples. JSON values."""

    def __getitem__(self, place: int) -> int:
        """Return the sample at a place; any place at once, from (seed, place) alone."""


class BatchPlan(Sampler[list[Ticket]]):
    """The micro-batches of one process, from a step on, to the last step.

    Micro-batch ``m`` of process ``rank`` takes the positions ``(m * world + rank) * micro`` onwards: together
    the processes read each position of a step once.
    """

    def __init__(
        self,
        order: Order,
        *,
        batch_size: int,
        micro_batch_size: int,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % (micro_batch_size * world):
            raise ValueError(f"{batch_size} is not a multiple of {micro_batch_size} x {world} processes")
        self.order, self.batch_size, self.micro_batch_size = order, batch_size, micro_batch_size
        self.first_step, self.last_step, self.rank, self.world = first_step, last_step, rank, world

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches a step, for this process."""
        return self.batch_size // (self.micro_batch_size * self.world)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.num_micro_batches

    def __iter__(self) -> Iterator[list[Ticket]]:
        for step in range(self.first_step, self.last_step):
            for micro in range(self.num_micro_batches):
                first = (micro * self.world + self.rank) * self.micro_batch_size
                yield [
                    (self.order[step * self.batch_size + position], step, position)
                    for position in range(first, first + self.micro_batch_size)
                ]


class Without:
    """The numbers 0, 1, 2, ... with some left out, numbered anew.

    Examples:
        >>> kept = Without([1, 2, 5])
        >>> [kept[index] for index in range(4)]
        [0, 3, 4, 6]
        >>> kept.before(4), kept.before(5), kept.before(6)
        (2, 3, 3)
    """

    def __init__(self, left_out: Iterable[int]) -> None:
        self._left_out = sorted(left_out)
        # Below the j-th left-out number stand (number - j) kept ones: passing that many means passing it.
        self._passed_at = [number - place for place, number in enumerate(self._left_out)]

    def __getitem__(self, index: int) -> int:
        return index + bisect_right(self._passed_at, index)

    def before(self, number: int) -> int:
        """Return how many kept numbers stand before one: its own place, if it is kept."""
        return number - bisect_left(self._left_out, number)
