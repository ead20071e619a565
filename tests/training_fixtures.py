"""Fixtures for training: a tiny store, tiny recipes, and a small disk."""

import io
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell.config import parse_recipe
from pixcell.data.store import TileStore
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.codec import LatentCodec
from pixcell.training.recipe import TrainRecipe

FIELD, TILE = 32, 64
_SHORT = {"tensorboard": False, "report": False, "mfu": False}


@dataclass(frozen=True)
class _Tile:
    slide_id: str
    x: int
    y: int
    size: int = TILE
    mpp: float = 0.5
    tissue: float = 1.0
    pen: float = 0.0
    sharpness: float = 1.0
    name: str = ""
    attributes: dict = field(default_factory=dict)


def _jpeg(rng: np.random.Generator) -> bytes:
    """A coarse random pattern: something that can be reconstructed, and differs from tile to tile."""
    coarse = Image.fromarray(rng.integers(80, 255, (8, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((TILE, TILE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_store(path: Path, codec: LatentCodec, seed: int = 0) -> TileStore:
    rng = np.random.default_rng(seed)
    store = TileStore.create(path, {"tile_size": TILE, "mpp": 0.5})
    for slide_id, split in (("a", "train"), ("b", "test")):
        tiles = [(_Tile(slide_id, x, 0, attributes={"split": split}), _jpeg(rng)) for x in range(6)]
        store.write_images(slide_id, tiles, {"source": f"{slide_id}.svs"})
        images = np.stack([store.images(slide_id).image(tile) for tile in range(6)]).transpose(0, 3, 1, 2)
        fields = images.reshape(6, 3, 2, FIELD, 2, FIELD).transpose(
            0, 2, 4, 1, 3, 5
        )  # tile row column rgb y x
        mean, std = codec.encode(torch.from_numpy(fields.reshape(-1, 3, FIELD, FIELD).copy()))
        posterior = torch.cat([mean, std], 1).half().numpy().reshape(6, 2, 2, -1, FIELD // 8, FIELD // 8)
        means = np.concatenate([fields.mean((4, 5)), fields.std((3, 4, 5))[..., None]], axis=-1)
        colour = means.astype(np.float16) / 128 - 1
        for column, kind, maker, values in (
            ("latents-tiny", "latents", {"codec": codec.made_by()}, posterior),
            ("embeddings-colour", "embeddings", {"encoder": {"name": "colour", "sha256": "c" * 64}}, colour),
        ):
            store.write_column(
                column,
                slide_id,
                iter([values]),
                shape=values.shape[1:],
                dtype=values.dtype,
                made_by={"kind": kind, "field_size": FIELD, "source": "images", **maker},
                num_tiles=6,
            )
    return store


@pytest.fixture(scope="session")
def codec_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TissueAutoencoder(2, (4, 8), 1, scaling_factor=1.5, shift_factor=0.1).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory, codec_folder) -> TileStore:
    """Two slides of six 64-px tiles, with latents and embeddings of 32-px fields."""
    return make_store(tmp_path_factory.mktemp("stores") / "tiny", LatentCodec.from_pretrained(codec_folder))


@pytest.fixture
def single_tile_store(tmp_path) -> TileStore:
    """A store with one 64-px tile, not encoded."""
    store = TileStore.create(tmp_path / "single", {"tile_size": TILE, "mpp": 0.5})
    store.write_images("a", [(_Tile("a", 0, 0), _jpeg(np.random.default_rng(0)))], {})
    return store


@pytest.fixture
def codec_recipe(store):
    """An autoencoder recipe; overrides as on the command line."""
    content = {
        "name": "tiny-codec",
        "data": {"store": str(store.path), "size": TILE, "held_out": 2},
        "model": {"name": "autoencoder", "latent_channels": 2, "channels": [4, 8], "num_blocks": 1},
        "objective": {"name": "autoencoding", "crop_size": FIELD},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "clip_norm": 1.0},
        "trainer": {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, **_SHORT},
    }
    return lambda *overrides: parse_recipe(TrainRecipe, content, overrides)


@pytest.fixture(scope="session")
def recipe(store, codec_folder):
    """A denoising recipe; overrides as on the command line."""
    content = {
        "name": "tiny",
        "data": {
            "store": str(store.path),
            "size": FIELD,
            "latents": "latents-tiny",
            "embeddings": "embeddings-colour",
            "held_out": 2,
        },
        "model": {"name": "transformer", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
        "objective": {"name": "denoising", "codec": str(codec_folder), "preview_steps": 2},
        "optimizer": {"lr": 1e-3, "clip_norm": 1.0},
        "trainer": {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, **_SHORT},
    }
    return lambda *overrides: parse_recipe(TrainRecipe, content, overrides)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of the given size; only the superuser may, so elsewhere the test skips."""
    mounted = []

    def mount(size: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    if sys.platform != "linux":
        pytest.skip("small disks are mounted on Linux only")
    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
