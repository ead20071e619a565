"""Which sample comes when: a function of (seed, place), in exact shares, without lists."""

from collections import Counter, OrderedDict
from itertools import pairwise

import numpy as np
import pytest

from pixcell.training.determinism import BatchPlan, Order
from pixcell.training.order import BlockOrder, Group, MixedOrder, Ranges, SampleOrder, quotas_of

SIZES = np.random.default_rng(0).integers(1, 40, 30)
STARTS = np.cumsum(np.append(5, SIZES[:-1] + 2))  # blocks with gaps between them
OWNER = {
    int(start) + sample: block
    for block, (start, size) in enumerate(zip(STARTS, SIZES, strict=True))
    for sample in range(size)
}
LUNG, BREAST = (
    Group("lung", Ranges([range(0, 50), range(80, 90)]), 2),
    Group("breast", Ranges([range(50, 80)]), 1),
)


def orders():
    yield SampleOrder(90, seed=1)
    yield BlockOrder(STARTS, SIZES, seed=1, at_once=4)
    yield MixedOrder([LUNG, BREAST], seed=1)


@pytest.mark.parametrize("number", range(3))
def test_any_place_is_known_without_the_ones_before(number):
    whole, later = list(orders())[number], list(orders())[number]
    assert isinstance(whole, Order)
    sequence = [whole[place] for place in range(400)]
    places = np.random.default_rng(0).permutation(400)
    assert all(later[int(place)] == sequence[place] for place in places)


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at_once", [1, 4, 29, 30, 100])
def test_every_epoch_of_blocks_has_every_sample_once(at_once):
    order = BlockOrder(STARTS, SIZES, seed=3, at_once=at_once)
    count = order.num_samples
    epochs = [tuple(order[epoch * count + place] for place in range(count)) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(OWNER) for epoch in epochs)
    assert len(set(epochs)) == 3


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_cache_of_one_turn_reads_each_block_once_an_epoch(at_once):
    """Batches lie across the borders of turns and epochs, so one turn more is kept."""
    order = BlockOrder(STARTS, SIZES, seed=0, at_once=at_once)
    reads, cache = Counter(), OrderedDict()
    for place in range(3 * order.num_samples):
        block = OWNER[order[place]]
        if block not in cache:
            reads[block] += 1
        cache[block] = cache.move_to_end(block) if block in cache else None
        while len(cache) > at_once:
            cache.popitem(last=False)
    assert set(reads.values()) <= {3, 2}  # 2: the last of one epoch was the first of the next


def test_with_all_blocks_at_once_samples_are_as_well_mixed_as_without():
    order = BlockOrder(range(0, 4096, 64), [64] * 64, seed=5, at_once=64)
    sequence = [order[place] for place in range(4096)]
    assert np.abs(np.diff(sequence)).mean() / 4096 == pytest.approx(1 / 3, abs=0.02)


def test_blocks_of_a_turn_are_shuffled_sample_by_sample():
    order = BlockOrder(range(0, 4096, 64), [64] * 64, seed=5, at_once=8)
    turn = [order[place] // 64 for place in range(8 * 64)]
    assert len(set(turn)) == 8
    # Of two neighbours one in eight is of the same block.
    assert np.mean([one == other for one, other in pairwise(turn)]) == pytest.approx(1 / 8, abs=0.05)


def test_thousands_of_shards_of_millions_of_samples_need_no_list_of_samples():
    order = BlockOrder(np.arange(60_000) * 8000, np.full(60_000, 8000), seed=0, at_once=16)
    assert order.num_samples == 480_000_000
    drawn = {order[place] for place in range(470_000_000, 470_002_000)}
    assert len(drawn) == 2000
    assert len({sample // 8000 for sample in drawn}) <= 32


def test_empty_blocks_are_a_programming_mistake():
    with pytest.raises(ValueError, match="at least one sample"):
        BlockOrder([0, 3], [3, 0], seed=0, at_once=1)


# ── mixtures ─────────────────────────────────────────────────────────────────────────────────────


def test_every_period_has_the_exact_shares():
    order = MixedOrder([LUNG, BREAST], seed=0)
    names = [sample // 50 == 0 or sample >= 80 for sample in (order[place] for place in range(300))]
    assert order.period == 3
    assert all(sum(names[start : start + 3]) == 2 for start in range(0, 300, 3))
    assert len({tuple(names[start : start + 3]) for start in range(0, 300, 3)}) == 3  # in any order


def test_a_group_passes_through_all_its_samples_before_one_comes_again():
    order = MixedOrder([LUNG, BREAST], seed=0)
    drawn = [order[place] for place in range(90)]
    breast = [sample for sample in drawn if 50 <= sample < 80]
    assert sorted(breast) == list(range(50, 80))  # 30 of 90, once each
    lung = [sample for sample in drawn if not 50 <= sample < 80]
    assert sorted(lung) == [*range(0, 50), *range(80, 90)]


def test_what_comes_of_a_group_does_not_depend_on_the_others():
    alone = MixedOrder([BREAST], seed=4)
    beside = MixedOrder([LUNG, BREAST], seed=4)
    drawn = [sample for sample in (beside[place] for place in range(300)) if 50 <= sample < 80]
    assert drawn == [alone[place] for place in range(100)]


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (2, 3), (4, 1)])
def test_a_mixture_is_the_same_on_any_number_of_processes(world, micro):
    def steps(rank, world, micro):
        order = MixedOrder([LUNG, BREAST], seed=0)
        return BatchPlan(
            order, batch_size=12, micro_batch_size=micro, first_step=3, last_step=6, rank=rank, world=world
        )

    whole = [ticket for batch in steps(0, 1, 12) for ticket in batch]
    parts = [ticket for rank in range(world) for batch in steps(rank, world, micro) for ticket in batch]
    assert sorted(parts, key=lambda ticket: ticket[1:]) == whole


def test_groups_may_have_orders_of_blocks():
    inner = [
        BlockOrder([0, 25, 80], [25, 25, 10], seed=1, at_once=1),
        BlockOrder([50, 65], [15, 15], seed=2, at_once=1),
    ]
    order = MixedOrder([LUNG, BREAST], 0, inner)
    drawn = [order[place] for place in range(90)]
    assert sorted(drawn) == list(range(90))
    assert len({sample // 15 for sample in drawn[:30] if 50 <= sample < 80} & {3, 4}) <= 2
    assert order.facts["orders"][1] == {"blocks": 2, "shuffle_blocks": 1}


def test_shares_of_a_run_say_how_often_a_sample_comes():
    lung, breast = MixedOrder([LUNG, BREAST], seed=0).shares(900)
    assert (lung.samples, lung.draws, lung.passes) == (60, 600, 10)
    assert (breast.samples, breast.draws, breast.passes) == (30, 300, 10)
    assert lung.share + breast.share == pytest.approx(1)


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [([1], [1]), ([2, 1], [2, 1]), ([0.35, 0.65], [7, 13]), ([30, 10, 20], [3, 1, 2]), ([0.1] * 3, [1] * 3)],
)
def test_quotas_are_the_smallest_whole_numbers_in_proportion(weights, quotas):
    assert quotas_of(weights) == quotas


def test_odd_weights_are_met_to_one_in_ten_thousand():
    weights = [2**0.5, 3.0**0.5, 1e-9]
    quotas = quotas_of(weights)
    assert min(quotas) == 1
    for weight, quota in zip(weights, quotas, strict=True):
        assert quota / sum(quotas) == pytest.approx(weight / sum(weights), abs=1.5e-4)


def test_weights_that_are_not_positive_are_a_programming_mistake():
    with pytest.raises(ValueError, match="positive"):
        quotas_of([1, 0])
