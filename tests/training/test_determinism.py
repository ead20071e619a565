"""Chance depends on seed, step and position, and on nothing else."""

from collections import Counter

import numpy as np
import pytest

from pixcell.training.determinism import BatchPlan, Without, rng_for
from pixcell.training.order import SampleOrder


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_every_epoch_has_every_sample_once(count):
    order = SampleOrder(count, seed=3)
    for epoch in range(3):
        assert sorted(order[epoch * count + place] for place in range(count)) == list(range(count))


def test_epochs_and_seeds_have_different_orders():
    first, other = SampleOrder(100, seed=0), SampleOrder(100, seed=1)
    epochs = [tuple(first[epoch * 100 + place] for place in range(100)) for epoch in range(3)]
    assert len({*epochs, tuple(other[place] for place in range(100))}) == 4


def test_the_order_is_well_mixed():
    """Neighbours in the order are as far apart as in a random permutation, where the mean is a third."""
    order = [SampleOrder(4096, seed=5)[place] for place in range(4096)]
    assert np.abs(np.diff(order)).mean() / 4096 == pytest.approx(1 / 3, abs=0.02)
    # and each eighth of the epoch draws evenly from each eighth of the samples
    counts = Counter((place // 512, sample // 512) for place, sample in enumerate(order))
    assert min(counts.values()) > 30
    assert max(counts.values()) < 100


def test_the_published_number_of_fields_needs_no_list():
    order = SampleOrder(492_078_096, seed=0)
    drawn = {order[place] for place in range(2000)}
    assert len(drawn) == 2000
    assert 0.4 < np.mean(list(drawn)) / 492_078_096 < 0.6


def test_keys_do_not_share_their_chance():
    drawn = {
        float(rng_for(seed, step, place).random())
        for seed in range(3)
        for step in range(3)
        for place in range(3)
    }
    assert len(drawn) == 27


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 2), (2, 4), (4, 1)])
def test_processes_together_read_each_position_once_whatever_their_number(world, micro):
    """The union over processes and micro-batches of a step is that of one process with one batch."""
    order = SampleOrder(20, seed=0)
    whole = list(BatchPlan(order, batch_size=8, micro_batch_size=8, first_step=2, last_step=4))
    parts = [
        BatchPlan(
            order, batch_size=8, micro_batch_size=micro, first_step=2, last_step=4, rank=rank, world=world
        )
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        tickets = [
            ticket
            for plan in parts
            for micro_batch in list(plan)[step * plan.num_micro_batches : (step + 1) * plan.num_micro_batches]
            for ticket in micro_batch
        ]
        assert sorted(tickets, key=lambda ticket: ticket[2]) == batch


def test_a_plan_begun_later_is_the_rest_of_the_whole():
    order = SampleOrder(20, seed=0)
    whole = list(BatchPlan(order, batch_size=4, micro_batch_size=2, first_step=0, last_step=6))
    rest = list(BatchPlan(order, batch_size=4, micro_batch_size=2, first_step=4, last_step=6))
    assert rest == whole[8:]


def test_left_out_samples_never_come():
    kept = Without([0, 3, 4, 9])
    assert [kept[index] for index in range(6)] == [1, 2, 5, 6, 7, 8]
