"""How much arithmetic a training step is, and how much of it a device could do in a second.

Arithmetic is counted, not estimated: the loss and its gradients run once on tensors without content, and
every matrix product, convolution and attention among them adds its FLOPs. A multiplication with its addition
is two. What is computed twice to save memory (gradient checkpointing, the scores that fused attention
computes again on the way back) counts once, and what is not computed does not count: with one condition
token, cross-attention needs no scores.

    model FLOP use = FLOPs of a sample * samples a second / (peak of a device * number of devices)

Source: Chowdhery et al. 2022, "PaLM", appendix B (https://arxiv.org/abs/2204.02311).
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from pixcell.training.objectives import Objective

__all__ = [
    "PUBLISHED_PEAKS",
    "Peak",
    "count_flops",
    "flop_use",
    "matmul_precision",
    "peak_of",
    "published_peak",
    "training_flops",
]

MatmulPrecision = Literal["highest", "high", "medium"]
Precision = Literal["fp32", "bf16", "fp16"]

PUBLISHED_PEAKS: tuple[tuple[str, Mapping[str, float]], ...] = (
    ("B200", {"fp16": 2250, "bf16": 2250, "tf32": 1125, "fp32": 75}),
    ("H100 PCIe", {"fp16": 756, "bf16": 756, "tf32": 378, "fp32": 51}),
    ("H100 NVL", {"fp16": 835, "bf16": 835, "tf32": 417, "fp32": 60}),
    ("GH200|H200|H100", {"fp16": 989, "bf16": 989, "tf32": 494, "fp32": 67}),
    ("A100", {"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5}),
    ("L40S", {"fp16": 362, "bf16": 362, "tf32": 183, "fp32": 91.6}),
    ("L40", {"fp16": 181, "bf16": 181, "tf32": 90.5, "fp32": 90.5}),
    ("L4", {"fp16": 121, "bf16": 121, "tf32": 60, "fp32": 30.3}),
    ("A10", {"fp16": 125, "bf16": 125, "tf32": 62.5, "fp32": 31.2}),
    ("RTX 6000 Ada", {"fp16": 364, "bf16": 364, "tf32": 182, "fp32": 91.1}),
    ("RTX A6000", {"fp16": 154.8, "bf16": 154.8, "tf32": 77.4, "fp32": 38.7}),
    ("RTX 4090", {"fp16": 165.2, "bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    ("RTX 3090", {"fp16": 71, "bf16": 71, "tf32": 35.6, "fp32": 35.6}),
    ("V100-SXM2|V100-SXM3", {"fp16": 125, "fp32": 15.7}),
    ("V100-PCIE", {"fp16": 112, "fp32": 14}),
    ("T4", {"fp16": 65, "fp32": 8.1}),
    ("MI300X", {"fp16": 1307, "bf16": 1307, "tf32": 653.7, "fp32": 163.4}),
)
"""TFLOP/s by name of the device, as its maker states them: dense products, sums in float32. The first name
that is found as a word counts."""

_SIZE = {"cpu": 1536, "cuda": 8192}
_TRIES = 5


@dataclass(frozen=True)
class Peak:
    """The fastest that a device multiplies matrices."""

    flops_per_s: float
    device: str
    """Name of the device."""
    precision: str
    """Number format of the factors: fp32, tf32, bf16, fp16."""
    is_measured: bool
    """Whether the number is a product timed here. False: what the maker states."""

    def __str__(self) -> str:
        source = "a matrix product timed here" if self.is_measured else "as published"
        return f"{self.flops_per_s / 1e12:.3g} TFLOP/s in {self.precision} on {self.device} ({source})"


def training_flops(objective: Objective, batch: Mapping[str, Any]) -> int | None:
    """Count the FLOPs of the loss of a batch and of the gradients of all weights that are trained.

    ``objective.loss`` is called twice: as it is, without gradients, so that tables which are made at first
    use get their content; then on tensors that have shapes and no content. No weight or gradient is touched.
    Call it before the model is wrapped or spread over processes.

    Args:
        objective: What is trained.
        batch: As the loader gives it, where the model is. One sample will do: FLOPs grow with their number.

    Returns:
        FLOPs of the whole batch; None if the loss looks at values, which tensors without content lack.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    without_content = FakeTensorMode(allow_non_fake_inputs=True)
    hollow_batch = tree_map_only(Tensor, without_content.from_tensor, dict(batch))
    with torch.no_grad():
        objective.loss(batch)
    try:
        with without_content:
            return count_flops(objective.trainable, lambda: objective.loss(hollow_batch).per_sample.mean())
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None


def count_flops(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Count the FLOPs of a loss and of its gradients.

    Called with :func:`pixcell.training.memory.hollow` around it, it costs neither time nor memory.

    Args:
        model: Whose weights want gradients.
        loss: Calls the model and returns a scalar.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # Attention as plain products: a fused kernel's backward counts the scores that it computes again.
    with (
        _computing_once(model),
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        torch.autograd.grad(loss(), weights, allow_unused=True)
    return int(counter.get_total_flops())


def flop_use(flops_per_sample: float, samples_per_s: float, peak: Peak, num_devices: int = 1) -> float:
    """Return the share of what the devices could do that went into the model (MFU), 0 to 1.

    Examples:
        >>> flop_use(2e9, 100, Peak(1e12, "some device", "bf16", is_measured=False))
        0.2
    """
    return flops_per_sample * samples_per_s / (peak.flops_per_s * num_devices)


def peak_of(device: torch.device, precision: Precision, rounding: MatmulPrecision = "highest") -> Peak:
    """Return the peak of a device in the number format that a training multiplies in.

    A processor, and a GPU that is not in :data:`PUBLISHED_PEAKS`, is measured: the best of a few products of
    square matrices, less than a second.

    Args:
        device: Where the training runs.
        precision: ``trainer.precision``.
        rounding: ``trainer.matmul_precision``, which decides for fp32.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        products: str = "tf32" if precision == "fp32" and rounding != "highest" else precision
        published = published_peak(name, products)
        if published is not None:
            return Peak(published, name, products, is_measured=False)
        return Peak(_measured(device, precision, rounding), name, products, is_measured=True)
    name = f"{torch.get_num_threads()} thread(s) of the processor" if device.type == "cpu" else device.type
    products = f"fp32 ({rounding})" if precision == "fp32" else precision
    return Peak(_measured(device, precision, rounding), name, products, is_measured=True)


def published_peak(name: str, products: str) -> float | None:
    """Return what the maker of a device states, in FLOP/s; None if it is not in :data:`PUBLISHED_PEAKS`.

    Args:
        name: As the driver gives it; the model's name is found in it.
        products: fp32, tf32, bf16 or fp16.

    Examples:
        >>> published_peak("NVIDIA A100-SXM4-80GB", "bf16")
        312000000000000.0
        >>> published_peak("Tesla T4", "bf16")  # which it does not have
    """
    for pattern, peaks in PUBLISHED_PEAKS:
        # As a word: there is an A10, an A10G and an A100-SXM4-80GB.
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", name):
            return peaks[products] * 1e12 if products in peaks else None
    return None


@contextlib.contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """Let float32 products be rounded, for the length of a block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _measured(device: torch.device, precision: Precision, rounding: MatmulPrecision) -> float:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = _SIZE.get(device.type, 2048)
    factor = torch.full((size, size), 0.5, device=device, dtype=dtype)
    with matmul_precision(rounding):
        return 2 * size**3 / min(_seconds(factor) for _ in range(_TRIES))


def _seconds(factor: Tensor) -> float:
    _wait_for(factor.device)
    started = time.perf_counter()
    torch.mm(factor, factor)
    _wait_for(factor.device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was told; a processor always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextlib.contextmanager
def _computing_once(model: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off for the length of a block."""
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in switched:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]
