"""A training recipe, and how it becomes an objective.

A recipe is complete: reading it tells the whole run. Sizes that follow from others are not in it: the side of
the latents, their channels, the number and width of embeddings follow from ``data``, and are checked against
the model that a stage starts from.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from pixcell.config import Config
from pixcell.console import console
from pixcell.data.datasets import FieldDataset
from pixcell.data.published_layout import PUBLISHED_CODEC
from pixcell.data.published_tiles import PublishedConfig
from pixcell.data.shard_cache import CacheConfig
from pixcell.data.sources import open_source
from pixcell.errors import RecipeError
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.codec import LatentCodec
from pixcell.training.autoencoding import Autoencoding, AutoencodingConfig
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.denoising import Denoising, DenoisingConfig
from pixcell.training.mixing import FieldPlan, MixConfig
from pixcell.training.objectives import Objective, spread_over
from pixcell.training.optimizers import AdamWConfig, OptimizerConfig
from pixcell.training.stages import TransformerConfig, make_transformer, weights_folder
from pixcell.training.trainer_config import TrainerConfig

__all__ = ["DataConfig", "TrainRecipe", "build_objective", "fields_of"]


class DataConfig(Config):
    """Which fields are trained on."""

    store: str | list[str]
    """Where tiles are, or several such places made alike: a store, a pack or its address
    (s3://bucket/brca), a folder in the published layout."""
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
    mix: MixConfig | None = None
    """Groups of fields that are drawn by weight, such as {by: organ, weights: {lung: 2, breast: 1}}. None:
    every field once an epoch."""
    shuffle_blocks: int | None = Field(None, gt=0)
    """Shuffle so many blocks at a time instead of all fields, so that a block is read once an epoch. A block
    is a shard, a published tile, or a slide of a store. None: 16 shards or 256 published tiles."""
    cache: CacheConfig = CacheConfig()
    """Where shards from elsewhere are kept meanwhile."""
    published: PublishedConfig = PublishedConfig()
    """What a folder in the published layout does not say of itself."""

    @field_validator("store", mode="before")
    @classmethod
    def _is_written_in_one_way(cls, store: Any) -> Any:
        """``a/b/`` and ``./a/b`` are one folder; addresses stay as they are."""
        if isinstance(store, list):
            return [cls._is_written_in_one_way(one) for one in store]
        return str(Path(store)) if isinstance(store, str | Path) and "://" not in str(store) else store

    @model_validator(mode="after")
    def _no_store_twice(self) -> Self:
        places = {one.rstrip("/") if "://" in one else str(Path(one).resolve()) for one in self.stores}
        if len(places) < len(self.stores):
            raise ValueError("data.store names one store twice; fields held out of one would be trained on")
        return self

    @property
    def stores(self) -> list[str]:
        """The stores, also where there is one."""
        return self.store if isinstance(self.store, list) else [self.store]

    def plan(self, skip_unreadable: bool) -> FieldPlan:
        """Return which fields come when."""
        return FieldPlan(self.mix, self.stores, self.shuffle_blocks, skip_unreadable)


class AutoencoderConfig(Config):
    """Architecture of a :class:`TissueAutoencoder`."""

    name: Literal["autoencoder"]
    latent_channels: int = Field(4, gt=0)
    channels: tuple[int, int] = (64, 128)
    num_blocks: int = Field(3, gt=0)


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


def build_objective(recipe: TrainRecipe, checkpoint: Checkpoint | None = None) -> Objective:
    """Open the data, make or load the model, and join them.

    Args:
        recipe: The whole run.
        checkpoint: The run's own last one, if it goes on: then the model that its stage began from is not
            read, and need not be there any more.

    Raises:
        RecipeError: If sizes do not fit, or too few fields remain to hold some out.
        StoreError: If a store, a column or the wanted tiles are missing, or were made differently.
        ModelError: If the model to start from is of another encoder, autoencoder or architecture.
    """
    data, model = recipe.data, recipe.model
    plan = data.plan(skip_unreadable=recipe.trainer.on_bad_tile == "drop")
    open_fields = fields_of(recipe)
    # Models draw their first weights from torch's own chance; the caller's is left as it was.
    with torch.random.fork_rng():
        torch.manual_seed(recipe.trainer.seed)
        if isinstance(model, AutoencoderConfig) and isinstance(recipe.objective, AutoencodingConfig):
            fields = open_fields(images=True)
            autoencoder = TissueAutoencoder(model.latent_channels, model.channels, model.num_blocks)
            return Autoencoding(autoencoder, fields, recipe.objective, _held_out(fields, data), plan)
        assert isinstance(model, TransformerConfig)
        assert isinstance(recipe.objective, DenoisingConfig)
        fields = open_fields(latents=data.latents, embeddings=data.embeddings)
        alignment = recipe.objective.alignment
        aligned_to = open_fields(embeddings=alignment.column) if alignment else None
        codec = LatentCodec.from_pretrained(weights_folder(recipe.objective.codec))
        transformer, growth = make_transformer(
            model, recipe.objective.learn_variance, recipe.objective.target, fields, checkpoint
        )
        held_out = _held_out(fields, data)
        return Denoising(
            transformer,
            fields,
            open_fields(images=True),
            codec,
            recipe.objective,
            held_out,
            aligned_to,
            growth,
            plan,
        )


def fields_of(recipe: TrainRecipe) -> Callable[..., FieldDataset]:
    """Open a recipe's sources; return what makes a dataset of its fields from the columns that one asks for.

    Raises:
        StoreError: If a source is missing or damaged.
    """
    data = recipe.data
    codec = PUBLISHED_CODEC
    if data.published.codec is not None:
        codec = LatentCodec.from_pretrained(weights_folder(data.published.codec)).made_by()
    stores = [
        open_source(one, cache=data.cache, published=data.published, codec=codec) for one in data.stores
    ]
    group_by = data.plan(skip_unreadable=False).group_by
    return functools.partial(FieldDataset, stores, size=data.size, where=data.where, group_by=group_by)


def _held_out(fields: FieldDataset, data: DataConfig) -> list[int]:
    held_out = spread_over(data.held_out, len(fields))
    if not held_out:
        raise RecipeError(
            f"{len(fields)} field(s) of {data.size} px are too few: one is held out for previews, "
            "one is trained on. Tile more slides, or train on smaller fields."
        )
    if len(held_out) < data.held_out:
        console.print(
            f"{len(held_out)} fields are held out instead of {data.held_out}: at most half of {len(fields)}.",
            markup=False,
        )
    return held_out
