"""A tiny real pipeline."""

import pytest

from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import make_scheduler
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.transformer import PixCellTransformer2DModel
from tiny_models import tiny_transformer, tiny_vae


@pytest.fixture
def transformer() -> PixCellTransformer2DModel:
    return tiny_transformer()


@pytest.fixture
def vae() -> TissueAutoencoder:
    return tiny_vae()


@pytest.fixture
def pipeline(transformer, vae) -> PixCellPipeline:
    facts = {
        "encoder": {"name": "small", "dim": 12, "sha256": "0" * 64},
        "field_size": 64,
        "mpp": 0.5,
        "codec": {"name": "tiny", "latent_channels": 4, "sha256": "1" * 64},
    }
    pipeline = PixCellPipeline(transformer, vae, make_scheduler(), facts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
