"""The parts of a pipeline folder, read as data.

``model_index.json`` names a class for each part. Published folders name classes in Python files of their own;
here a name only says which class of *ours* the weights belong to, and no file of the folder is ever run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin

from pixcell.diffusion.sampling import SCHEDULERS
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.codec import LatentCodec
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.models.weights import fetch

__all__ = [
    "find_pipeline",
    "load_controlnet",
    "load_model",
    "load_scheduler",
    "load_transformer",
    "load_vae",
    "read_index",
    "read_json",
]

# Names of one class in published configurations.
_TRANSFORMERS = ("PixCellTransformer2DModel", "PixCellTransformer2DModelControlNet")
_CONTROLNETS = ("PixCellControlNetModel", "PixCellControlNet")

Model = TypeVar("Model", bound=ModelMixin)


def find_pipeline(name_or_path: str | Path, download: bool) -> Path:
    """Return the local folder of a pipeline.

    Args:
        name_or_path: A folder, or ``owner/name`` on the Hugging Face hub.
        download: Whether what is not on this machine may be downloaded.

    Raises:
        MissingWeights: If it is neither, or not on this machine and may not be downloaded.
    """
    folder = Path(name_or_path)
    if folder.exists() or str(name_or_path).count("/") != 1:
        return folder
    return fetch(
        str(name_or_path),
        ("*.json", "*/*.json", "*/*.safetensors"),
        download=download,
        advice="Or give the folder of a pipeline.",
    )


def read_index(folder: Path, classes: tuple[str, ...], parts: tuple[str, ...]) -> dict[str, Any]:
    """Return ``model_index.json`` of a pipeline.

    Args:
        folder: Of the pipeline.
        classes: What the class may be called.
        parts: What it must have.

    Raises:
        MissingWeights: If there is none.
        ModelError: If it is one of another class, or lacks a part.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise MissingWeights(
            f"{folder} is not a pipeline: it holds no model_index.json. "
            "Give the folder pipeline/ of a checkpoint, or any folder that save_pretrained wrote."
        )
    index = read_json(index_file)
    missing = set(parts) - set(index)
    if index.get("_class_name") not in classes or missing:
        raise ModelError(
            f"{index_file} describes a {index.get('_class_name')}"
            + (f" without {', '.join(sorted(missing))}" if missing else "")
            + f", not a {classes[0]}."
        )
    return index


def load_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> PixCellTransformer2DModel:
    """Load a transformer folder, in evaluation mode; every tensor must be there, and no other.

    Raises:
        MissingWeights: If configuration or weights are not there.
        WrongWeights: If names or shapes do not fit.
        ModelError: If it is another class of model.
    """
    return load_model(PixCellTransformer2DModel, folder, dtype, _TRANSFORMERS)


def load_controlnet(folder: Path, dtype: torch.dtype = torch.float32) -> PixCellControlNetModel:
    """Load a folder of a control branch, in evaluation mode; every tensor must be there, and no other.

    Raises:
        MissingWeights: If configuration or weights are not there.
        WrongWeights: If names or shapes do not fit.
        ModelError: If it is another class of model.
    """
    return load_model(PixCellControlNetModel, folder, dtype, _CONTROLNETS)


def load_vae(folder: Path) -> torch.nn.Module:
    """Load the autoencoder of a pipeline folder.

    Raises:
        MissingWeights: If the folder has none, as that of the published PixCell-256.
        WrongWeights: If names or shapes do not fit.
        ModelError: If it is no autoencoder of pictures.
    """
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        raise MissingWeights(
            f"{folder} holds the configuration of an autoencoder and no weights (safetensors). Published "
            "models leave them at their source: give vae='sd3.5' (stabilityai/stable-diffusion-3.5-large, "
            "gated), or a folder that holds them."
        )
    vae: torch.nn.Module = LatentCodec.from_pretrained(folder).vae
    return vae


def load_scheduler(folder: Path) -> SchedulerMixin:
    """Load a scheduler folder: one of ours, or any of diffusers.

    Raises:
        MissingWeights: If there is none.
        ModelError: If neither has one of its name.
    """
    if not (folder / "scheduler_config.json").is_file():
        raise MissingWeights(f"{folder} lacks scheduler_config.json; copy the pipeline again as a whole.")
    name = str(read_json(folder / "scheduler_config.json").get("_class_name"))
    own = {kind.__name__: kind for kind, _ in SCHEDULERS.values()}
    kind: Any = own.get(name, getattr(diffusers, name, None))
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ModelError(
            f"{folder} names the scheduler {name!r}, which diffusers {diffusers.__version__} does not have."
        )
    return kind.from_pretrained(str(folder), local_files_only=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ModelError: If it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy the folder again as a whole.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return content


def load_model(kind: type[Model], folder: Path, dtype: torch.dtype, names: tuple[str, ...]) -> Model:
    """Load a model folder, in evaluation mode; every tensor must be there, and no other.

    Args:
        kind: The class of the model.
        folder: With ``config.json`` and safetensors.
        dtype: Number format of the weights.
        names: What the configuration may call the class.

    Raises:
        MissingWeights: If configuration or weights are not there.
        WrongWeights: If names or shapes do not fit.
        ModelError: If it is another class of model.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise MissingWeights(
            f"{folder} lacks config.json or safetensors weights; copy the pipeline again as a whole."
        )
    config = read_json(folder / "config.json")
    if config.get("_class_name") not in names:
        raise ModelError(f"{folder} holds a {config.get('_class_name')}, not a {kind.__name__}.")
    report: Mapping[str, Any]
    try:
        model, report = kind.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WrongWeights(
            f"the weights in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    # diffusers fills what is missing with random numbers, and only warns.
    wrong = {what: list(found) for what, found in report.items() if found and what != "error_msgs"}
    if wrong:
        listed = "; ".join(
            f"{len(found)} {what.replace('_', ' ')} ({', '.join(map(str, found[:3]))})"
            for what, found in wrong.items()
        )
        raise WrongWeights(f"the weights in {folder} do not fit their configuration: {listed}.")
    return model.eval()
