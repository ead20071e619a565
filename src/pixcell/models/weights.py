"""Weight files: found on disk or asked for by name, read without running code, fitted name by name.

Three promises hold for every model of the package. Nothing is downloaded unless the caller says so. A
weight file is data: safetensors, or a pickle of plain tensors read with ``weights_only=True``. A file fits
when names and shapes agree in both directions; what is missing or left over is an error, not a warning.

A large model is built empty and filled tensor by tensor, so that loading it takes little more memory than it
occupies:

    with empty_parameters():
        model = PixCellTransformer2DModel(**config)
    load_stored(model, open_weights(folder))
"""

import contextlib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pixcell.errors import MissingWeights, ModelError, WrongWeights, listed
from pixcell.models.weight_files import StoredWeights, open_weights

__all__ = [
    "Precision",
    "choose_device",
    "dtype_of",
    "empty_parameters",
    "fetch",
    "fit_weights",
    "load_stored",
    "read_weights",
    "weights_sha256",
]

Precision = Literal["fp32", "bf16", "fp16"]
_LISTED = 12
_FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(precision: str) -> torch.dtype:
    """Return the number format that weights and activations are computed in.

    Raises:
        ModelError: If the name is none of fp32, bf16, fp16.
    """
    if precision not in _DTYPES:
        raise ModelError(f"precision {precision!r} is not known; choose one of {', '.join(_DTYPES)}.")
    return _DTYPES[precision]


def choose_device(device: str = "auto") -> torch.device:
    """Return a device that works: the one asked for, or for ``"auto"`` the first accelerator, else the CPU.

    Raises:
        ModelError: If the device does not exist on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch says "not compiled with CUDA" by an assertion
        raise ModelError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}). "
            "Choose cpu, cuda, cuda:1, mps, or auto."
        ) from error
    return chosen


def weights_sha256(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of what the weights say, whichever file and float format they were stored in.

    Names in sorted order, each with its shape and values; floating point values count as float32. A model
    saved again, as another file or in shards, keeps its hash; a changed bit changes it.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().cpu().contiguous()
        values = values.float() if values.is_floating_point() else values
        digest.update(f"{name}{tuple(values.shape)}{values.dtype}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dictionary from one file: ``.safetensors``, or a pickle that holds tensors only.

    Raises:
        MissingWeights: If there is no such file.
        WrongWeights: If the file is damaged, holds no tensors, or would have to run code to be read.
    """
    return dict(open_weights(path, which="raw").tensors())


def fit_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``module`` if every name and every shape agrees, both ways.

    Raises:
        WrongWeights: Names the missing, unexpected and misshapen tensors, and how many there are.
    """
    _check_fit(module, {name: tuple(value.shape) for name, value in state.items()}, source)
    module.load_state_dict(dict(state))


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Build modules inside whose parameters take no memory; :func:`load_stored` gives them their values.

    Buffers are computed as always: position tables are not in the weights.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def load_stored(module: nn.Module, stored: StoredWeights, dtype: torch.dtype | None = torch.float32) -> None:
    """Give a module the tensors of a file if every name and every shape agrees, both ways.

    Names and shapes are compared before a value is read. The module takes the tensors over, so that there is
    one copy of them; its own, if it was not built empty, are let go.

    Args:
        module: Built with :func:`empty_parameters`, or not.
        stored: From :func:`~pixcell.models.weight_files.open_weights`.
        dtype: Format of floating point tensors; None: as stored.

    Raises:
        WrongWeights: Names the missing, unexpected and misshapen tensors, or those that hold no numbers.
    """
    _check_fit(module, stored.shapes, stored.source)
    _check_formats(module, stored)
    state = {}
    for name, tensor in stored.tensors(dtype):
        if not _is_finite(tensor):
            raise WrongWeights(
                f"{stored.source}: {name} holds NaN or infinity"
                + (
                    f" as {dtype}. Load it in its own format, or in bf16 or fp32, which reach further."
                    if dtype not in (None, stored.dtypes[name])
                    else ". The file is damaged, or its training failed; get it again from its source."
                )
            )
        state[name] = tensor
    module.load_state_dict(state, assign=True)


def _check_formats(module: nn.Module, stored: StoredWeights) -> None:
    """Refuse what no model computes in, such as integers and the 8-bit formats of quantised weights."""
    wrong = [
        f"{name} ({str(stored.dtypes[name]).removeprefix('torch.')})"
        for name, own in module.state_dict().items()
        if own.is_floating_point() and stored.dtypes[name] not in _FORMATS
    ]
    if wrong:
        raise WrongWeights(
            f"{stored.source}: {len(wrong)} tensors are in a number format that cannot be computed in "
            f"({listed(wrong, 3)}). Quantised weights are not loaded; get them in fp32, bf16 or fp16."
        )


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds numbers only, without another of its size (``isfinite`` makes two)."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(value.item()) for value in tensor.aminmax())


def _check_fit(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    problems = [
        *_listed("missing", [name for name in own if name not in shapes]),
        *_listed("unexpected", [name for name in shapes if name not in own]),
        *_listed(
            "of another shape",
            [
                f"{name} {shapes[name]} instead of {own[name]}"
                for name in own
                if name in shapes and shapes[name] != own[name]
            ],
        ),
    ]
    if problems:
        raise WrongWeights(f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}.")


def _listed(what: str, names: Sequence[str]) -> list[str]:
    """Name all tensors; those that differ only in the number of their block together."""
    if not names:
        return []
    block = re.compile(r"(?<=\.)\d+(?=\.)")
    alike = Counter(block.sub("*", name) for name in names)
    single = {block.sub("*", name): name for name in names}
    texts = [
        f"{pattern}, {count} times" if count > 1 else single[pattern] for pattern, count in alike.items()
    ]
    more = f"; and {len(texts) - _LISTED} more kinds" if len(texts) > _LISTED else ""
    return [f"{len(names)} tensors {what} ({'; '.join(texts[:_LISTED])}{more})"]


def fetch(
    repository: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    download: bool = False,
    advice: str = "",
) -> Path:
    """Return the local folder of a model hub repository: from the cache, or downloaded if allowed.

    Args:
        repository: ``owner/name`` on the Hugging Face hub.
        patterns: Which files are needed, as glob patterns.
        revision: Commit, tag or branch; None is the branch ``main`` as it is now.
        download: Whether the network may be used.
        advice: What to do instead, appended to the error.

    Raises:
        MissingWeights: If the files are not in the cache and may not be, or cannot be, downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    def snapshot(local: bool) -> Path:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), local_files_only=local
            )
        )

    try:
        folder = snapshot(local=not download)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        how = (
            "and the hub cannot be reached"
            if download
            else "and downloading was not asked for (add --download)"
        )
        raise MissingWeights(f"{repository} is not on this machine, {how}. {advice}".rstrip()) from error
    except GatedRepoError as error:
        raise MissingWeights(
            f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, log in with "
            f"`hf auth login`, and run the command again. {advice}".rstrip()
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise MissingWeights(
            f"{repository} could not be downloaded ({' '.join(str(error).split())[:200]}). {advice}".rstrip()
        ) from error
    if not any(path.is_file() for pattern in patterns for path in folder.glob(pattern)):
        raise MissingWeights(f"{repository} in {folder} has none of {', '.join(patterns)}. {advice}".rstrip())
    return folder
