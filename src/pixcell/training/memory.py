"""What a training keeps in the memory of a device, known before anything is allocated.

Weights, gradients, moments and averages are counted: the optimiser takes a step on tensors that have shapes
and no content, and what it keeps afterwards is what it will keep (moments of eight bits follow from a rule).
Activations are estimated: a micro-batch goes forward and backward on such tensors, and the largest sum of
those alive at one moment counts. What kernels use inside themselves, and what an allocator loses between
blocks, is not seen.

    with hollow():
        model = PixCellTransformer2DModel()
        activation_bytes(model, lambda: model(torch.empty(8, 16, 32, 32), 500.0).sample.mean())
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pixcell.training.optimizers import AdamW8bitConfig, OptimizerConfig, make_optimizer

__all__ = ["StateBytes", "activation_bytes", "bytes_of", "hollow", "state_bytes"]


@dataclass(frozen=True)
class StateBytes:
    """What stays in memory from step to step, in bytes, if nothing is spread over processes."""

    weights: int
    """Parameters and buffers."""
    gradients: int
    moments: int
    """Whatever the optimiser keeps."""
    averages: int


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """Make tensors without content for the length of a block: they have shapes, and take no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the memory of tensors, each counted once."""
    different = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in different.values())


def state_bytes(model: nn.Module, optimizer: OptimizerConfig, num_averages: int = 1) -> StateBytes:
    """Count what a training keeps from step to step.

    Args:
        model: On the ``meta`` device.
        optimizer: How its weights move.
        num_averages: Running averages of the weights, each in float32.
    """
    if any(not weight.is_meta for weight in model.parameters()):
        raise ValueError("give a model on the meta device: its weights would be moved")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return StateBytes(
        weights=bytes_of([*model.parameters(), *model.buffers()]),
        gradients=bytes_of(trained),
        moments=_moments(model, trained, optimizer),
        averages=num_averages * 4 * sum(weight.numel() for weight in trained),
    )


def _moments(model: nn.Module, trained: Sequence[nn.Parameter], config: OptimizerConfig) -> int:
    """What an optimiser keeps after a step on tensors without content."""
    if isinstance(config, AdamW8bitConfig):  # its kernels want content
        in_blocks = [-(-weight.numel() // 256) for weight in trained if weight.numel() >= 4096]
        whole = sum(weight.numel() for weight in trained if weight.numel() >= 4096)
        small = sum(weight.numel() for weight in trained if weight.numel() < 4096)
        tables = 2 * 256 * 4  # what eight bits stand for, once for all weights
        return 2 * (whole + 4 * sum(in_blocks) + 4 * small) + tables
    optimizer = make_optimizer(model, config)
    for weight in trained:
        weight.grad = torch.empty_like(weight)
    optimizer.step()
    for weight in trained:
        weight.grad = None
    return bytes_of(value for value in tree_leaves(optimizer.state_dict()["state"]) if _is_kept(value))


def activation_bytes(
    model: nn.Module, loss: Callable[[], Tensor], autocast: torch.dtype | None = None
) -> int:
    """Estimate what forward and backward keep beside weights and gradients at the worst moment.

    Inputs that ``loss`` makes are counted with it.

    Args:
        model: Made inside :func:`hollow`, where this is called, too.
        loss: Makes inputs, calls the model and returns a scalar.
        autocast: Number format of products inside the model; None: float32.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:  # as in all micro-batches but the first: gradients are there already
        weight.grad = torch.empty_like(weight)
    given = [*model.parameters(), *model.buffers(), *(weight.grad for weight in trained)]
    alive = _Alive(tensor for tensor in given if tensor is not None)
    device = next(model.parameters()).device.type
    with alive:
        with torch.autocast(device, autocast, enabled=autocast is not None):
            result = loss()
        result.backward()
    for weight in trained:
        weight.grad = None
    return alive.most


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, until nothing refers to them any more."""

    def __init__(self, not_counted: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()
        for tensor in not_counted:
            self._known[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        # The reference is kept as the value: without it the callback would be forgotten.
        self._known[storage] = weakref.ref(storage, lambda _: self._forget(size))
        self.now += size
        self.most = max(self.most, self.now)

    def _forget(self, size: int) -> None:
        self.now -= size


def _is_kept(value: Any) -> bool:
    # Steps and the like are single numbers: some optimisers keep them as tensors, others do not.
    return isinstance(value, Tensor) and value.ndim > 0
