"""Chance as a function of (seed, step, position), not of process state.

``position`` is the place of a sample in the total batch of a step. Whatever is random about a sample (its
crop, flip, dropout, time and noise) is drawn from ``rng_for(seed, step, position)``, and which sample stands
there from ``SampleOrder``. So a run that was killed goes on bit for bit, and the same samples come in the
same order on any number of processes, with any number of loader workers.
"""

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

__all__ = ["BatchPlan", "SampleOrder", "Ticket", "Without", "rng_for"]

Ticket = tuple[int, int, int]
"""Index of a sample, and the step and position it is needed for."""

_ROUNDS = 6


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


class SampleOrder:
    """Each epoch a new permutation of all samples, computed one number at a time.

    A shuffled list of PixCell's 492 million fields would take 4 GB in every process. A Feistel network is a
    permutation of the numbers below a power of four; walking on while a number is too large makes it one of
    ``num_samples`` numbers.

    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains" (cycle walking).

    Examples:
        >>> order = SampleOrder(5, seed=0)
        >>> sorted(order[place] for place in range(5)), sorted(order[place] for place in range(5, 10))
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.num_samples, self.seed = num_samples, seed
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
        self._keys: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, place: int) -> int:
        """Return the sample at a place of the endless sequence of epochs."""
        epoch, number = divmod(place, self.num_samples)
        keys = self._keys_of(epoch)
        number = self._permute(number, keys)
        while number >= self.num_samples:
            number = self._permute(number, keys)
        return number

    def _keys_of(self, epoch: int) -> list[int]:
        if self._keys[0] != epoch:
            self._keys = (epoch, [int(key) for key in rng_for(self.seed, epoch).integers(0, 2**63, _ROUNDS)])
        return self._keys[1]

    def _permute(self, number: int, keys: Sequence[int]) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = number >> self._half_bits, number & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << self._half_bits | right


class BatchPlan(Sampler[list[Ticket]]):
    """The micro-batches of one process, from a step on, to the last step.

    Micro-batch ``m`` of process ``rank`` takes the positions ``(m * world + rank) * micro`` onwards: together
    the processes read each position of a step once.
    """

    def __init__(
        self,
        order: SampleOrder,
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
    """

    def __init__(self, left_out: Iterable[int]) -> None:
        # Below the j-th left-out number stand (number - j) kept ones: passing that many means passing it.
        self._passed_at = [number - place for place, number in enumerate(sorted(left_out))]

    def __getitem__(self, index: int) -> int:
        return index + bisect_right(self._passed_at, index)


def _mixed(number: int) -> int:
    """Scatter 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    number &= 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return number ^ number >> 31
