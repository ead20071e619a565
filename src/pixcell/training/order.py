"""Which sample stands at a place of an endless training: every order is a function of (seed, place).

- ``SampleOrder``: each epoch a new permutation of all samples.
- ``BlockOrder``: the same, but blocks of samples that are read together come together.
- ``MixedOrder``: several groups of samples, each with its exact share.

None of them keeps a list of samples, so an order costs no memory and no time to begin in the middle: place
1,000,000 is computed as fast as place 0, in any process.
"""

import hashlib
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from pixcell.training.determinism import Order, rng_for

__all__ = ["BlockOrder", "Group", "GroupShare", "MixedOrder", "Ranges", "SampleOrder", "quotas_of"]

_ROUNDS = 6
_LONGEST_PERIOD = 10_000
_OF_A_TURN = 1  # (seed, step, position) is the key of a sample's own chance; a turn's must be another


class SampleOrder:
    """Each epoch a new permutation of all samples, computed one number at a time.

    A shuffled list of PixCell's 492 million fields would take 4 GB in every process.

    Examples:
        >>> order = SampleOrder(5, seed=0)
        >>> sorted(order[place] for place in range(5)), sorted(order[place] for place in range(5, 10))
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.num_samples, self.seed = num_samples, seed
        self._keys: tuple[int, list[int]] = (-1, [])

    @property
    def facts(self) -> Mapping[str, Any]:
        """Nothing besides the number of samples."""
        return {}

    def __getitem__(self, place: int) -> int:
        """Return the sample at a place of the endless sequence of epochs."""
        epoch, number = divmod(place, self.num_samples)
        if self._keys[0] != epoch:
            self._keys = (epoch, _keys_of(self.seed, epoch))
        return _permuted(number, self.num_samples, self._keys[1])


class BlockOrder:
    """Each epoch a new permutation of blocks; some of them at a time are shuffled sample by sample.

    For data that are read in large pieces: a shard is fetched once an epoch, while it and the few others of
    its turn last, instead of once for every sample. Memory grows with the number of blocks, not of samples.

    A block is a range of samples; together they may leave numbers out (samples of other groups).

    Args:
        starts: First sample of each block.
        sizes: Samples of each block; none is empty.
        seed: Of the order.
        at_once: Blocks that are shuffled together. As many as all: the samples of an epoch are well mixed.

    Examples:
        >>> order = BlockOrder([0, 10, 20], [2, 2, 2], seed=0, at_once=1)
        >>> epoch = [order[place] for place in range(6)]
        >>> [len({sample // 10 for sample in epoch[turn : turn + 2]}) for turn in (0, 2, 4)], sorted(epoch)
        ([1, 1, 1], [0, 1, 10, 11, 20, 21])
    """

    def __init__(
        self,
        starts: np.ndarray | Sequence[int],
        sizes: np.ndarray | Sequence[int],
        seed: int,
        at_once: int,
    ) -> None:
        self._starts, self._sizes = np.asarray(starts, np.int64), np.asarray(sizes, np.int64)
        if len(self._starts) != len(self._sizes) or not len(self._sizes) or self._sizes.min() < 1:
            raise ValueError("a block order needs blocks of at least one sample, each with its start")
        if at_once < 1:
            raise ValueError(f"at least one block is read at a time, not {at_once}")
        self.num_samples, self.seed, self.at_once = int(self._sizes.sum()), seed, at_once
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    @property
    def facts(self) -> Mapping[str, Any]:
        """How many blocks there are, and how many are shuffled together."""
        return {"blocks": len(self._sizes), "shuffle_blocks": self.at_once}

    def __getitem__(self, place: int) -> int:
        """Return the sample at a place of the endless sequence of epochs."""
        number, number_in_epoch = divmod(place, self.num_samples)
        epoch = self._epoch(number)
        turn = int(np.searchsorted(epoch.turns, number_in_epoch, side="right")) - 1
        first, end = int(epoch.turns[turn]), int(epoch.turns[turn + 1])
        keys = epoch.keys.get(turn)
        if keys is None:
            keys = epoch.keys[turn] = _keys_of(self.seed, number, turn, _OF_A_TURN)
        shuffled = first + _permuted(number_in_epoch - first, end - first, keys)
        block = int(np.searchsorted(epoch.ends, shuffled, side="right"))
        begin = int(epoch.ends[block]) - int(epoch.sizes[block])
        return int(epoch.starts[block]) + shuffled - begin

    def _epoch(self, number: int) -> "_Epoch":
        """The blocks in the order of an epoch. Two are kept: batches lie across the border of two epochs."""
        epoch = self._epochs.get(number)
        if epoch is None:
            blocks = rng_for(self.seed, number).permutation(len(self._sizes))
            sizes = self._sizes[blocks]
            ends = np.cumsum(sizes)
            turns = np.append(np.concatenate([[0], ends[:-1]])[:: self.at_once], self.num_samples)
            epoch = self._epochs[number] = _Epoch(self._starts[blocks], sizes, ends, turns, {})
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return epoch


@dataclass
class _Epoch:
    """The blocks of one epoch as they come, and where each turn begins."""

    starts: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray
    turns: np.ndarray
    keys: dict[int, list[int]]


@dataclass(frozen=True)
class Group:
    """Samples that are drawn with a weight of their own."""

    name: str
    samples: "Ranges"
    weight: float


@dataclass(frozen=True)
class GroupShare:
    """What a mixture makes of a group over a whole run."""

    group: str
    samples: int
    share: float
    """Of all that is drawn, 0 to 1."""
    draws: int
    """Samples drawn in the whole run, each counted as often as it comes."""
    passes: float
    """How often each sample of the group comes, on average."""


class MixedOrder:
    """Groups of samples with exact shares: so many of each in every period, in random order.

    A period is the shortest stretch that holds whole numbers of each group: three places for weights 2 and
    1. Each group goes through its own samples epoch by epoch, whatever its share: a small group with a large
    weight comes more often, and no sample of it comes twice before all have come once.

    Args:
        groups: At least one, with different names.
        seed: Of the order.
        orders: The order of each group, as sample numbers of the whole. None: :class:`SampleOrder` within
            its samples. See :func:`seed_of` for their seeds.

    Examples:
        >>> groups = [Group("lung", Ranges([range(0, 4)]), 2), Group("breast", Ranges([range(4, 6)]), 1)]
        >>> order = MixedOrder(groups, seed=0)
        >>> drawn = [order[place] for place in range(6)]
        >>> sorted(drawn[:3])[2] in (4, 5), sorted(drawn)
        (True, [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, groups: Sequence[Group], seed: int, orders: Sequence[Order] | None = None) -> None:
        if not groups or len({group.name for group in groups}) < len(groups):
            raise ValueError("a mixture needs groups, and each its own name")
        self.groups, self.seed = list(groups), seed
        self.num_samples = sum(len(group.samples) for group in groups)
        self.quotas = quotas_of([group.weight for group in groups])
        self.period = sum(self.quotas)
        self._ends = np.cumsum(self.quotas).tolist()
        self._orders = list(orders or (_Within(one.samples, seed_of(seed, one.name)) for one in groups))
        self._keys: OrderedDict[int, list[int]] = OrderedDict()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Each group's number of samples and its share of a period."""
        return {
            "mixture": {
                group.name: {"samples": len(group.samples), "share": f"{quota}/{self.period}"}
                for group, quota in zip(self.groups, self.quotas, strict=True)
            },
            **({"orders": inner} if any(inner := [dict(one.facts) for one in self._orders]) else {}),
        }

    def __getitem__(self, place: int) -> int:
        """Return the sample at a place of the endless sequence."""
        period, number = divmod(place, self.period)
        keys = self._keys.get(period)
        if keys is None:
            keys = self._keys[period] = _keys_of(self.seed, period)
            while len(self._keys) > 4:
                self._keys.popitem(last=False)
        slot = _permuted(number, self.period, keys)
        group = bisect_right(self._ends, slot)
        quota = self.quotas[group]
        return self._orders[group][period * quota + slot - (self._ends[group] - quota)]

    def shares(self, num_draws: int) -> list[GroupShare]:
        """Say what becomes of each group in a run of so many samples."""
        result = []
        for group, quota in zip(self.groups, self.quotas, strict=True):
            draws = round(num_draws * quota / self.period)
            count = len(group.samples)
            result.append(GroupShare(group.name, count, quota / self.period, draws, draws / count))
        return result


class Ranges:
    """Numbers in several ranges, numbered anew from 0.

    Examples:
        >>> numbers = Ranges([range(3, 5), range(8, 10)])
        >>> len(numbers), [numbers[place] for place in range(4)]
        (4, [3, 4, 8, 9])
    """

    def __init__(self, ranges: Iterable[range]) -> None:
        self.ranges = [one for one in ranges if len(one)]
        self._ends = np.cumsum([len(one) for one in self.ranges]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: int) -> int:
        which = bisect_right(self._ends, place)
        one = self.ranges[which]
        return one.start + place - (self._ends[which] - len(one))


class _Within:
    """A :class:`SampleOrder` of some of all samples."""

    def __init__(self, samples: Ranges, seed: int) -> None:
        self._samples, self._order = samples, SampleOrder(len(samples), seed)
        self.num_samples = len(samples)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    def __getitem__(self, place: int) -> int:
        return self._samples[self._order[place]]


def seed_of(seed: int, group: str) -> int:
    """Return the seed of a group's own order: it does not depend on which other groups there are."""
    digest = hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def quotas_of(weights: Sequence[float]) -> list[int]:
    """Return whole numbers in the proportion of weights: how many of each group a period has.

    Exact where the numbers stay small (weights as 2 and 1, or 0.35 and 0.65); else to one in ten thousand,
    and at least one each.

    Examples:
        >>> quotas_of([2, 1]), quotas_of([0.5, 0.25, 0.25]), quotas_of([10, 20])
        ([2, 1], [2, 1, 1], [1, 2])
        >>> sum(quotas_of([3.14159265, 1]))
        10000
    """
    if not weights or not all(weight > 0 for weight in weights):
        raise ValueError(f"weights are positive numbers, not {list(weights)}")
    exact = [Fraction(repr(weight)) if isinstance(weight, float) else Fraction(weight) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= _LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    # The largest remainders are rounded up, so that the whole is the whole.
    quotas = [max(1, int(share * _LONGEST_PERIOD)) for share in shares]
    rests = sorted(range(len(shares)), key=lambda one: quotas[one] - shares[one] * _LONGEST_PERIOD)
    for place in range(max(0, _LONGEST_PERIOD - sum(quotas))):
        quotas[rests[place % len(rests)]] += 1
    return quotas


def _keys_of(*key: int) -> list[int]:
    return [int(one) for one in rng_for(*key).integers(0, 2**63, _ROUNDS)]


def _permuted(number: int, count: int, keys: Sequence[int]) -> int:
    """Return where a permutation of the numbers below ``count`` puts one of them.

    A Feistel network is a permutation of the numbers below a power of four; walking on while a number is too
    large makes it one of ``count`` numbers.

    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains" (cycle walking).
    """
    half_bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = number >> half_bits, number & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        number = left << half_bits | right
        if number < count:
            return number


def _mixed(number: int) -> int:
    """Scatter 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    number &= 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ number >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return number ^ number >> 31
