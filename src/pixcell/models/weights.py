"""Weight files: found on disk or asked for by name, read without running code, fitted name by name.

Three promises hold for every model of the package. Nothing is downloaded unless the caller says so. A
weight file is data: safetensors, or a pickle of plain tensors read with ``weights_only=True``. A file fits
when names and shapes agree in both directions; what is missing or left over is an error, not a warning.
"""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pixcell.errors import MissingWeights, ModelError, WrongWeights

__all__ = [
    "Precision",
    "choose_device",
    "dtype_of",
    "fetch",
    "fit_weights",
    "read_weights",
    "weights_sha256",
]

Precision = Literal["fp32", "bf16", "fp16"]
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
    if not path.is_file():
        raise MissingWeights(f"there is no weight file {path}.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # mmap would keep the file open and, for a file on a slow disk, read it in small pieces.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise WrongWeights(
            f"{path} cannot be read as weights ({' '.join(str(error).split())[:200]}). "
            "Give a .safetensors file, or a .bin/.pth that holds a plain dictionary of tensors."
        ) from error
    # Training frameworks wrap the dictionary once.
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WrongWeights(f"{path} does not hold a dictionary of named tensors.")
    return {str(name): value for name, value in state.items()}


def fit_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``module`` if every name and every shape agrees, both ways.

    Raises:
        WrongWeights: Names the first missing, unexpected and misshapen tensors, and how many there are.
    """
    own = module.state_dict()
    problems = [
        *_listed("missing", [name for name in own if name not in state]),
        *_listed("unexpected", [name for name in state if name not in own]),
        *_listed(
            "of another shape",
            [
                f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
                for name in own
                if name in state and state[name].shape != own[name].shape
            ],
        ),
    ]
    if problems:
        raise WrongWeights(f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}.")
    module.load_state_dict(dict(state))


def _listed(what: str, names: Sequence[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{len(names)} tensors {what} ({', '.join(names[:3])}{more})"] if names else []


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
