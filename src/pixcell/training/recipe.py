"""A training recipe, and how it becomes an objective.

A recipe is complete: reading it tells the whole run. Sizes that follow from others are not in it: the side of
the latents, their channels, the number and width of embeddings follow from ``data``, and are checked against
the model that a stage starts from.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from pixcell.config import Config
from pixcell.console import console
from pixcell.data.datasets import FieldDataset
from pixcell.data.store import TileStore
from pixcell.diffusion.pipelines import load_transformer
from pixcell.errors import ModelError, RecipeError
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.codec import LatentCodec
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.models.weights import fit_weights
from pixcell.training.autoencoding import Autoencoding, AutoencodingConfig
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.denoising import Denoising, DenoisingConfig
from pixcell.training.objectives import Objective, spread_over
from pixcell.training.optimizers import AdamWConfig, OptimizerConfig
from pixcell.training.run_state import WeightsChoice, weights_of
from pixcell.training.trainer_config import TrainerConfig

__all__ = ["DataConfig", "TrainRecipe", "build_objective"]


class DataConfig(Config):
    """Which fields are trained on."""

    store: Path | list[Path]
    """A tile store, or several made alike."""
    size: int = Field(gt=0)
    """Side of a field, in pixels."""
    latents: str | None = None
    """Column of latents. Not needed to train an autoencoder."""
    embeddings: str | None = None
    """Column of embeddings. Not needed to train an autoencoder."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Attributes of tiles to take, such as {split: [train]}; all must hold."""
    held_out: int = Field(8, gt=0)
    """Fields, evenly spread, that are kept out of training and shown in previews."""

    @model_validator(mode="after")
    def _no_store_twice(self) -> Self:
        if len({path.resolve() for path in self.stores}) < len(self.stores):
            raise ValueError("data.store names one store twice; fields held out of one would be trained on")
        return self

    @property
    def stores(self) -> list[Path]:
        """The stores, also where there is one."""
        return self.store if isinstance(self.store, list) else [self.store]


class AutoencoderConfig(Config):
    """Architecture of a :class:`TissueAutoencoder`."""

    name: Literal["autoencoder"]
    latent_channels: int = Field(4, gt=0)
    channels: tuple[int, int] = (64, 128)
    num_blocks: int = Field(3, gt=0)


class TransformerConfig(Config):
    """Architecture of a :class:`PixCellTransformer2DModel`, and what it starts from."""

    name: Literal["transformer"]
    init: Path | None = None
    """Run, checkpoint or pipeline to start from, grown to the new size. None: from scratch."""
    init_weights: WeightsChoice = "trained"
    """Of a run or checkpoint: the weights themselves (``trained``), as the published stages do, their average
    (``averaged``), or that of another decay the run kept (``averaged-0.999``)."""
    num_layers: int = Field(28, gt=0)
    num_attention_heads: int = Field(16, gt=0)
    attention_head_dim: int = Field(72, gt=0)
    patch_size: int = Field(2, gt=0)
    interpolation_scale: float | None = Field(None, gt=0)
    """Of positions. None: the published rule, field size / 512 px, kept when a model grows."""


class TrainRecipe(Config):
    """A whole training run."""

    name: str = Field(min_length=1)
    """Also of the run's folder, unless another one is given."""
    data: DataConfig
    model: Annotated[AutoencoderConfig | TransformerConfig, Field(discriminator="name")]
    objective: Annotated[AutoencodingConfig | DenoisingConfig, Field(discriminator="name")]
    optimizer: OptimizerConfig = AdamWConfig()
    trainer: TrainerConfig

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if name in (".", "..") or re.search(r"[/\\\x00-\x1f]", name):
            raise ValueError(f"{name!r} cannot name a run's folder; leave out slashes and control characters")
        return name

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        wanted = "autoencoder" if self.objective.name == "autoencoding" else "transformer"
        if self.model.name != wanted:
            raise ValueError(
                f"objective {self.objective.name!r} trains a model named {wanted!r}, not {self.model.name!r}"
            )
        if self.objective.name == "denoising" and not (self.data.latents and self.data.embeddings):
            raise ValueError(
                "denoising needs data.latents and data.embeddings: columns that `pixcell encode` makes"
            )
        return self


def build_objective(recipe: TrainRecipe) -> Objective:
    """Open the data, make or load the model, and join them.

    Raises:
        RecipeError: If sizes do not fit, or too few fields remain to hold some out.
        StoreError: If a store, a column or the wanted tiles are missing, or were made differently.
        ModelError: If the model to start from is of another encoder, autoencoder or architecture.
    """
    data, model = recipe.data, recipe.model
    stores = [TileStore.open(path) for path in data.stores]
    # Models draw their first weights from torch's own chance; the caller's is left as it was.
    with torch.random.fork_rng():
        torch.manual_seed(recipe.trainer.seed)
        if isinstance(model, AutoencoderConfig) and isinstance(recipe.objective, AutoencodingConfig):
            fields = FieldDataset(stores, size=data.size, images=True, where=data.where)
            autoencoder = TissueAutoencoder(model.latent_channels, model.channels, model.num_blocks)
            return Autoencoding(autoencoder, fields, recipe.objective, _held_out(fields, data))
        assert isinstance(model, TransformerConfig)
        assert isinstance(recipe.objective, DenoisingConfig)
        fields = FieldDataset(
            stores, size=data.size, latents=data.latents, embeddings=data.embeddings, where=data.where
        )
        pictures = FieldDataset(stores, size=data.size, images=True, where=data.where)
        codec = LatentCodec.from_pretrained(_weights_folder(recipe.objective.codec))
        transformer = _transformer(model, recipe.objective, fields)
        return Denoising(transformer, fields, pictures, codec, recipe.objective, _held_out(fields, data))


def _held_out(fields: FieldDataset, data: DataConfig) -> list[int]:
    held_out = spread_over(data.held_out, len(fields))
    if not held_out:
        raise RecipeError(
            f"{len(fields)} field(s) of {data.size} px are too few: one is held out for previews, "
            "one is trained on. Tile more slides, or train on smaller fields."
        )
    return held_out


def _weights_folder(place: str) -> str | Path:
    """The pipeline folder of a run or checkpoint; anything else as it is."""
    path = Path(place)
    if (path / "recipe.yaml").is_file() or (path / "checkpoint.json").is_file():
        return Checkpoint.find(path).pipeline
    return place


def _transformer(
    model: TransformerConfig, objective: DenoisingConfig, fields: FieldDataset
) -> PixCellTransformer2DModel:
    """Make a model for these fields, or grow the one that the stage starts from."""
    item = fields[0]
    channels, side, _ = item["posterior_mean"].shape
    num_tokens, width = math.prod(item["embedding_grid"].shape[:2]), item["embedding_grid"].shape[2]
    if side % model.patch_size:
        raise RecipeError(
            f"data.size {fields.size} gives latents of {side} x {side}, which are no whole number of latent "
            f"patches of {model.patch_size}. Choose another data.size or model.patch_size."
        )
    architecture = {
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "attention_head_dim": model.attention_head_dim,
        "patch_size": model.patch_size,
        "in_channels": channels,
        "out_channels": channels * (2 if objective.learn_variance else 1),
        "caption_channels": width,
    }
    if model.init is None:
        return PixCellTransformer2DModel(
            **architecture,
            cross_attention_dim=None,
            sample_size=side,
            caption_num_tokens=num_tokens,
            interpolation_scale=model.interpolation_scale,
        )
    source, facts = _initial(model.init, model.init_weights)
    _must_agree(facts, fields, model.init)
    before = facts.get("target", "noise")
    if before != objective.target:
        raise ModelError(
            f"model.init {model.init} predicts the {before}, and objective.target is {objective.target!r}. "
            f"Set objective.target={before}, or train from scratch."
        )
    differing = [
        f"{name} {source.config[name]} instead of {value}"
        for name, value in architecture.items()
        if source.config[name] != value
    ]
    if differing:
        raise ModelError(
            f"model.init {model.init} is another architecture: {', '.join(differing)}. "
            "Give the recipe the values of the model that it starts from."
        )
    grown, report = source.grown_to(side, num_tokens, model.interpolation_scale)
    console.print(f"from {model.init}: {report}", markup=False)
    return grown


def _initial(place: Path, weights: str) -> tuple[PixCellTransformer2DModel, Mapping[str, Any]]:
    """Load the transformer of a run, checkpoint or pipeline folder, and the facts beside it."""
    folder, checkpoint = place, None
    if not (place / "transformer").is_dir():
        checkpoint = Checkpoint.find(place)
        checkpoint.verify("pipeline")
        folder = checkpoint.pipeline
    elif weights not in ("trained", "averaged"):
        raise ModelError(
            f"model.init {place} is a pipeline, which holds one set of weights; {weights!r} can be taken "
            "from a run or checkpoint. Give that, or leave out model.init_weights."
        )
    if not (folder / "transformer" / "config.json").is_file():
        raise ModelError(
            f"model.init {place} holds no transformer: give a run that trained one, or a pipeline folder."
        )
    transformer = load_transformer(folder / "transformer")
    if checkpoint is not None and weights != "averaged":
        names = transformer.state_dict()
        fit_weights(transformer, weights_of(checkpoint, weights, names), str(checkpoint.state))
    facts = folder / "pixcell.json"
    return transformer, json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}


def _must_agree(facts: Mapping[str, Any], fields: FieldDataset, place: Path) -> None:
    """Refuse a stage whose latents or embeddings are not those that the model was trained on."""
    for kind, part in (("latents", "codec"), ("embeddings", "encoder")):
        before, now = facts.get(part), fields.made_by[kind][part]
        if before and before["sha256"] != now["sha256"]:
            raise ModelError(
                f"model.init {place} was trained on {kind} by {before['name']!r} ({before['sha256'][:12]}); "
                f"the store holds those by {now['name']!r} ({now['sha256'][:12]}). "
                "Encode the store with the first, or train from scratch."
            )
