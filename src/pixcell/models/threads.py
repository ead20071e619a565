"""Many small computations on a CPU, one processor thread each, instead of each on all threads in turn.

Threads that share one small operation mostly wait for each other: on two cores with something else running,
32 descriptions by ``stain-texture`` took 12 s on two threads and 0.5 s on one.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["side_by_side"]

Item = TypeVar("Item")


def side_by_side(
    function: Callable[[Item], Tensor], items: Iterable[Item], device: torch.device
) -> list[Tensor]:
    """Call a function without gradients on each item; on a CPU, one processor thread each, side by side.

    A matrix product that is split over threads is summed in another order. With one thread a call, results do
    not depend on the number of threads, and several items still keep all of them busy. While this runs, torch
    uses one thread an operation in the whole process.
    """

    def call(item: Item) -> Tensor:
        with torch.no_grad():  # a setting of each thread
            return function(item)

    if device.type != "cpu":
        return [call(item) for item in items]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            return [call(item) for item in items]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(call, items))
    finally:
        torch.set_num_threads(threads)
