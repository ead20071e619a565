"""pixcell: generative digital histopathology.

Public names are loaded when first used, so that ``import pixcell`` is instant and loads no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Box": "pixcell.geometry",
    "Config": "pixcell.config",
    "load_recipe": "pixcell.config",
    "PixCellError": "pixcell.errors",
    "Slide": "pixcell.data.slides",
    "TilingConfig": "pixcell.data.tiling",
    "TissueConfig": "pixcell.data.tissue",
    "TileStore": "pixcell.data.store",
    "EncoderSpec": "pixcell.models.encoders",
    "LatentCodec": "pixcell.models.codec",
    "PixCellTransformer2DModel": "pixcell.models.transformer",
    "Conditioning": "pixcell.diffusion.conditioning",
    "PixCellControlNetModel": "pixcell.models.controlnet",
    "EmbeddingTranslator": "pixcell.models.translator",
    "load_published": "pixcell.models.published",
    "PixCellPipeline": "pixcell.diffusion.pipelines",
    "VirtualStainingPipeline": "pixcell.diffusion.staining",
    "TextPipeline": "pixcell.diffusion.text_pipeline",
    "EmbeddingPrior": "pixcell.diffusion.priors",
    "Checkpoint": "pixcell.training.checkpoints",
    "Report": "pixcell.evaluation.report",
    "tile_slides": "pixcell.tasks.tile",
    "encode_store": "pixcell.tasks.encode",
    "train": "pixcell.tasks.train",
    "fit_prior": "pixcell.tasks.prior",
    "sample": "pixcell.tasks.sample",
    "evaluate": "pixcell.tasks.evaluate",
    "convert": "pixcell.tasks.convert",
    "inspect": "pixcell.tasks.inspect",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pixcell' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
