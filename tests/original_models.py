"""Denoisers of the golden cases that hold the original layout."""

from typing import Any

from torch import Tensor

from golden_vectors import load, weights
from pixcell.models.published_configs import config_from_original
from pixcell.models.published_layouts import diffusers_from_original
from pixcell.models.transformer import PixCellTransformer2DModel


def original_model(name: str) -> tuple[PixCellTransformer2DModel, dict[str, Tensor], dict[str, Any]]:
    """Return our class with the weights of a case, its tensors and its description."""
    tensors, case = load(name)
    model = PixCellTransformer2DModel(**config_from_original(**case["config"])).eval()
    model.load_state_dict(diffusers_from_original(weights(tensors)), strict=True)
    return model, tensors, case
