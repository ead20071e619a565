"""Run one function over many slides: in turn, in processes, or on a Ray cluster.

A slide that fails is a result like any other: the rest goes on. A worker that is killed (out of memory, a
crash inside a slide library) takes only the slide it was working on with it.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pixcell.errors import MissingExtra, PixCellError

__all__ = ["Done", "Failed", "default_workers", "map_slides"]

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Done(Generic[Item, Value]):
    """An item and what the function returned for it."""

    item: Item
    value: Value


@dataclass(frozen=True)
class Failed(Generic[Item]):
    """An item and why it has no result."""

    item: Item
    error: Exception

    @property
    def reason(self) -> str:
        """One line for a table. Errors of the package speak for themselves; others carry their type."""
        text = " ".join(str(self.error).split())
        return text if isinstance(self.error, PixCellError) else f"{type(self.error).__name__}: {text}"


def default_workers() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_slides(
    function: Callable[[Item], Value],
    items: Sequence[Item],
    workers: int = 1,
    engine: Literal["processes", "ray"] = "processes",
) -> Iterator[Done[Item, Value] | Failed[Item]]:
    """Yield a result per item as each is ready, in no fixed order.

    Args:
        function: Called with one item. For more than one worker it must be importable, and both its argument
            and its result must pickle.
        items: What to work on.
        workers: Number of processes; 1 runs in this process. Ray decides for itself.
        engine: ``"ray"`` uses the cluster that ``RAY_ADDRESS`` names, or starts one on this machine.
    """
    if engine == "ray":
        yield from _map_ray(function, items)
    elif workers <= 1 or len(items) <= 1:
        for item in items:
            yield _attempt(function, item)
    else:
        yield from _map_processes(function, items, workers)


def _attempt(function: Callable[[Item], Value], item: Item) -> Done[Item, Value] | Failed[Item]:
    try:
        return Done(item, function(item))
    except Exception as error:  # noqa: BLE001 - any failure of one slide is a result, not the end of the run
        return Failed(item, error)


def _map_processes(
    function: Callable[[Item], Value], items: Sequence[Item], workers: int
) -> Iterator[Done[Item, Value] | Failed[Item]]:
    # "spawn": slide libraries and torch keep threads and handles that do not survive a fork.
    context = multiprocessing.get_context("spawn")
    left = deque(items)
    while left:
        suspects: list[Item] = []
        with ProcessPoolExecutor(min(workers, len(left)), mp_context=context) as pool:
            running: dict[Future[Any], Item] = {}
            broken = False
            try:
                while running or (left and not broken):
                    # One more than there are workers keeps them busy. A dead worker breaks the whole pool:
                    # the fewer it had been given, the fewer are under suspicion.
                    while left and not broken and len(running) <= workers:
                        try:
                            future = pool.submit(_attempt, function, left[0])
                        except BrokenProcessPool:
                            broken = True
                        else:
                            running[future] = left.popleft()
                    ready, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in ready:
                        item = running.pop(future)
                        try:
                            yield future.result()
                        except BrokenProcessPool:
                            broken = True
                            suspects.append(item)
                        except Exception as error:  # noqa: BLE001 - a result that does not pickle, say
                            yield Failed(item, error)
            finally:
                # A caller that stops early (full disk, Ctrl-C) waits for the slides in flight, not for all.
                for future in running:
                    future.cancel()
        # Each suspect gets one try in a process of its own, which tells the culprit from its neighbours.
        # Then a new pool takes the rest.
        for item in suspects:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    yield pool.submit(_attempt, function, item).result()
                except BrokenProcessPool:
                    yield Failed(
                        item, RuntimeError("its process was killed (out of memory, or a crash in a library)")
                    )


def _map_ray(
    function: Callable[[Item], Value], items: Sequence[Item]
) -> Iterator[Done[Item, Value] | Failed[Item]]:
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray", "working on a cluster") from error
    own_cluster = not ray.is_initialized()
    if own_cluster:
        ray.init(log_to_driver=False)
    try:
        attempt = ray.remote(max_retries=1)(_attempt)
        waiting = {attempt.remote(function, item): item for item in items}
        while waiting:
            ready, _ = ray.wait(list(waiting))
            for reference in ready:
                item = waiting.pop(reference)
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield Failed(item, RuntimeError(" ".join(str(error).split())))
    finally:
        if own_cluster:
            ray.shutdown()
