"""The parts of a pipeline folder, read as data.

``model_index.json`` names a class for each part. Published folders name classes in Python files of their own;
here a name only says which class of *ours* the weights belong to, and no file of the folder is ever run.
"""

from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin

from pixcell.diffusion.large_image import LargeImageScheduler
from pixcell.diffusion.schedulers import SCHEDULERS
from pixcell.errors import MissingWeights, ModelError
from pixcell.models import published_openers
from pixcell.models.codec import LatentCodec
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.published_openers import read_json
from pixcell.models.published_sources import find_source
from pixcell.models.transformer import PixCellTransformer2DModel

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
        name_or_path: A folder; the name of a published model; or ``owner/name`` on the Hugging Face hub.
        download: Whether what is not on this machine may be downloaded.

    Raises:
        MissingWeights: If it is none of these, or not on this machine and may not be downloaded.
    """
    return find_source(name_or_path, download=download)[0]


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
    own = {kind.__name__: kind for kind in (*(kind for kind, _ in SCHEDULERS.values()), LargeImageScheduler)}
    kind: Any = own.get(name, getattr(diffusers, name, None))
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ModelError(
            f"{folder} names the scheduler {name!r}, which diffusers {diffusers.__version__} does not have."
        )
    return kind.from_pretrained(str(folder), local_files_only=True)


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
    named = read_json(folder / "config.json").get("_class_name")
    if named not in names:
        raise ModelError(f"{folder} holds a {named}, not a {kind.__name__}.")
    model: Model = published_openers.load_model(kind, folder, dtype)
    return model
