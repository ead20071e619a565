"""A store of drawn fields for benchmarks of training: the sizes of ``mini``, nothing to download.

Tiles of 512 px with latents of 4 channels and embeddings 128 wide for each of their 16 fields of 128 px.
Latents are smooth random patterns, and an embedding tells the means of its field's latents: something to be
learned, so that loss curves have a slope. Pictures are blank; only previews look at them.
"""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixcell.config import load_recipe
from pixcell.data.store import TileStore
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.codec import LatentCodec
from pixcell.training.recipe import TrainRecipe

TILE, FIELD, CHANNELS, WIDTH = 512, 128, 4, 128
TILES_PER_SLIDE = 64


@dataclass(frozen=True)
class DrawnTile:
    slide_id: str
    x: int
    y: int = 0
    size: int = TILE
    mpp: float = 0.25
    tissue: float = 1.0
    pen: float = 0.0
    sharpness: float = 1.0
    name: str = ""
    attributes: dict = field(default_factory=lambda: {"split": "train"})


def draw_store(folder: Path, num_tiles: int) -> None:
    """Write ``folder/store`` and the autoencoder ``folder/codec`` that its latents are said to be made by."""
    torch.manual_seed(0)
    TissueAutoencoder(CHANNELS, (8, 8), 1).save_pretrained(folder / "codec" / "vae")
    codec = LatentCodec.from_pretrained(folder / "codec")
    store = TileStore.create(folder / "store", {"tile_size": TILE, "mpp": 0.25})
    blank = io.BytesIO()
    Image.new("RGB", (TILE, TILE), "white").save(blank, "JPEG")
    random = np.random.default_rng(0)
    makers = {
        "latents-mini-codec": {"kind": "latents", "codec": codec.made_by()},
        "embeddings-stain-texture": {
            "kind": "embeddings",
            "encoder": {"name": "stain-texture", "sha256": "0" * 64},
        },
    }
    for number in range(-(-num_tiles // TILES_PER_SLIDE)):
        slide_id, count = f"slide-{number:03d}", min(TILES_PER_SLIDE, num_tiles - number * TILES_PER_SLIDE)
        store.write_images(
            slide_id, [(DrawnTile(slide_id, TILE * x), blank.getvalue()) for x in range(count)], {}
        )
        for column, records in zip(makers, _fields(random, count), strict=True):
            store.write_column(
                column,
                slide_id,
                [records],
                shape=records.shape[1:],
                dtype=records.dtype,
                made_by={"field_size": FIELD, "source": "images", **makers[column]},
                num_tiles=count,
            )


def _fields(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Posteriors (count, 4, 4, 2 * channels, 16, 16) and embeddings (count, 4, 4, width), float16."""
    side, grid = FIELD // 8, TILE // FIELD
    coarse = random.standard_normal((count, grid, grid, CHANNELS, side // 4, side // 4), np.float32)
    mean = np.kron(coarse, np.ones((4, 4), np.float32))
    std = np.full_like(mean, 0.1)
    means = coarse.mean((4, 5))
    embeddings = np.concatenate([means] * (WIDTH // CHANNELS), axis=3)
    return np.concatenate([mean, std], axis=3).astype(np.float16), embeddings.astype(np.float16)


def recipe_for(folder: Path, name: str, size: int, overrides: list[str]) -> TrainRecipe:
    """Return a recipe of the package on the drawn store, from scratch."""
    given = [
        f"data.store={folder / 'store'}",
        f"objective.codec={folder / 'codec'}",
        f"data.size={size}",
        "model.init=null",
    ]
    return load_recipe(TrainRecipe, name, [*given, *overrides])
