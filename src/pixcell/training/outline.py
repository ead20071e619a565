"""What a recipe trains, known before a weight is made: the module, a micro-batch through it, and the data.

Sizes come from the store. Where it is not on this machine (a plan is often made elsewhere), they follow from
the names of the autoencoder and the encoder, if these are published ones, and it is said so.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from pixcell.data.datasets import FieldDataset
from pixcell.errors import RecipeError, StoreError
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.codec import PUBLISHED_CODECS
from pixcell.models.encoder_specs import ENCODERS
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.training.alignment import Alignment
from pixcell.training.autoencoding import AutoencodingConfig
from pixcell.training.denoising import DenoisingConfig
from pixcell.training.memory import bytes_of
from pixcell.training.objectives import spread_over
from pixcell.training.recipe import AutoencoderConfig, TrainRecipe, fields_of
from pixcell.training.stages import TransformerConfig, architecture_of, weights_folder

__all__ = ["Outline", "outline_of"]

_DOWNSAMPLING = 8
_PUBLISHED_FIELD = 256
_PUBLISHED_CHANNELS = {"sd3.5": 16, "sd3": 16, "sdxl": 4, "sd1": 4}


@dataclass(frozen=True)
class Outline:
    """A recipe's module and data, without weights."""

    make_model: Callable[[], nn.Module]
    """Makes what is trained, on the device that is the default at the time."""
    loss: Callable[[nn.Module, int], Tensor]
    """Makes a batch of so many samples and sends it through the model; returns a scalar. The arithmetic and
    the memory are those of the objective, but for a few operations on latents."""
    num_samples: int | None
    """Fields that are trained on; None: not known."""
    assumed: str | None
    """Where sizes were taken from names, what was assumed; None: they were read from the store."""
    codec_bytes: int
    """Of the frozen autoencoder that stands beside a denoiser and in each ``pipeline/``."""


def outline_of(recipe: TrainRecipe) -> Outline:
    """Find out what a recipe trains.

    Raises:
        RecipeError: If sizes do not fit, or follow neither from a store nor from names.
        StoreError: If there is a store, and something is wrong with it.
    """
    objective, model = recipe.objective, recipe.model
    if isinstance(objective, AutoencodingConfig):
        assert isinstance(model, AutoencoderConfig)
        return _autoencoder(recipe, model, objective)
    assert isinstance(model, TransformerConfig)
    return _denoiser(recipe, model, objective)


def _autoencoder(recipe: TrainRecipe, model: AutoencoderConfig, objective: AutoencodingConfig) -> Outline:
    def make() -> nn.Module:
        return TissueAutoencoder(model.latent_channels, model.channels, model.num_blocks)

    def loss(autoencoder: nn.Module, count: int) -> Tensor:
        images = torch.empty(count, 3, objective.crop_size, objective.crop_size)
        posterior = autoencoder.encode(images, return_dict=False)[0]  # type: ignore[operator]
        drawn = posterior.mean + posterior.std * torch.empty_like(posterior.mean)
        restored = autoencoder.decode(drawn, return_dict=False)[0].float()  # type: ignore[operator]
        coarse: Tensor | float = 0.0
        if objective.scale_consistency:
            half = autoencoder.decode(functional.avg_pool2d(drawn, 2), return_dict=False)[0]  # type: ignore[operator]
            coarse = (half.float() - functional.avg_pool2d(images, 2)).abs().mean()
        edges = sum((restored.diff(dim=side) - images.diff(dim=side)).abs().mean() for side in (2, 3))
        return (restored - images).abs().mean() + edges + coarse + posterior.logvar.float().exp().mean()

    fields = _fields(recipe, images=True)
    unknown = f"{_stores(recipe)} is not on this machine: the number of samples is not known"
    return Outline(make, loss, _num_samples(recipe, fields), None if fields else unknown, codec_bytes=0)


@dataclass(frozen=True)
class _Sizes:
    """Of a sample."""

    channels: int
    side: int
    num_tokens: int
    embedding_dim: int
    fine: tuple[int, int] | None
    """Number and width of the embeddings that are aligned with."""


def _denoiser(recipe: TrainRecipe, model: TransformerConfig, objective: DenoisingConfig) -> Outline:
    fields = _fields(recipe, latents=recipe.data.latents, embeddings=recipe.data.embeddings)
    sizes = _stored_sizes(fields, recipe, objective) if fields else _sizes_by_name(recipe, objective)
    if sizes.side % model.patch_size:
        raise RecipeError(
            f"data.size {recipe.data.size} gives latents of {sizes.side} x {sizes.side}, which are no whole "
            f"number of latent patches of {model.patch_size}. Choose another data.size or model.patch_size."
        )
    architecture = architecture_of(model, objective.learn_variance, sizes.channels, sizes.embedding_dim)

    def make() -> nn.Module:
        denoiser = PixCellTransformer2DModel(
            **architecture,
            cross_attention_dim=None,
            sample_size=sizes.side,
            caption_num_tokens=sizes.num_tokens,
            interpolation_scale=model.interpolation_scale,
        )
        if objective.alignment is None or sizes.fine is None:
            return denoiser
        num_tokens = (sizes.side // model.patch_size) ** 2
        config, layers = objective.alignment, model.num_layers
        beside = Alignment(config, denoiser.inner_dim, layers, num_tokens, *sizes.fine)
        return nn.ModuleDict({"transformer": denoiser, "alignment": beside})

    def loss(trainable: nn.Module, count: int) -> Tensor:
        denoiser = trainable["transformer"] if isinstance(trainable, nn.ModuleDict) else trainable
        layer = objective.alignment.layer if objective.alignment and sizes.fine else None
        prediction, *behind = denoiser(
            torch.empty(count, sizes.channels, sizes.side, sizes.side),
            torch.empty(count),
            torch.empty(count, sizes.num_tokens, sizes.embedding_dim),
            return_dict=False,
            dropped=torch.empty(count, dtype=torch.bool),
            tokens_after=layer,
        )
        result: Tensor = prediction.float().square().mean()
        if isinstance(trainable, nn.ModuleDict) and sizes.fine:
            rows = math.isqrt(sizes.fine[0])
            fine = torch.empty(count, rows, rows, sizes.fine[1])
            result = result + trainable["alignment"](behind[0], fine).mean()
        return result

    where = f"{_stores(recipe)} is not on this machine: sizes follow from the names"
    names = f"{recipe.data.latents} and {recipe.data.embeddings}, and the number of samples is not known"
    return Outline(
        make,
        loss,
        _num_samples(recipe, fields),
        None if fields else f"{where} {names}",
        _codec_bytes(objective.codec, sizes.channels),
    )


def _stores(recipe: TrainRecipe) -> str:
    return " and ".join(str(place) for place in recipe.data.stores)


def _fields(recipe: TrainRecipe, **columns: Any) -> FieldDataset | None:
    """The fields of a recipe; None if none of its stores is on this machine."""
    places = [str(place) for place in recipe.data.stores]
    if not any("://" in place or Path(place).exists() for place in places):
        return None
    return fields_of(recipe)(**columns)


def _num_samples(recipe: TrainRecipe, fields: FieldDataset | None) -> int | None:
    return None if fields is None else len(fields) - len(spread_over(recipe.data.held_out, len(fields)))


def _stored_sizes(fields: FieldDataset, recipe: TrainRecipe, objective: DenoisingConfig) -> _Sizes:
    item = fields[0]
    channels, side, _ = item["posterior_mean"].shape
    rows, columns, dim = item["embedding_grid"].shape
    fine = None
    if objective.alignment is not None:
        grid = fields_of(recipe)(embeddings=objective.alignment.column)[0]["embedding_grid"]
        fine = (grid.shape[0] * grid.shape[1], grid.shape[2])
    return _Sizes(channels, side, rows * columns, dim, fine)


def _sizes_by_name(recipe: TrainRecipe, objective: DenoisingConfig) -> _Sizes:
    """Sizes of a published autoencoder and a known encoder."""
    data = recipe.data
    encoder = ENCODERS.get((data.embeddings or "").removeprefix("embeddings-"))
    channels = _PUBLISHED_CHANNELS.get(objective.codec) or _channels_in(objective.codec)
    if encoder is None or channels is None or data.size % _PUBLISHED_FIELD or objective.alignment is not None:
        raise StoreError(
            f"{_stores(recipe)} is not on this machine, and sizes do not follow from names alone: that takes "
            f"a published autoencoder ({', '.join(_PUBLISHED_CHANNELS)}) or one on this machine as "
            f"objective.codec, a column embeddings-NAME of a known encoder, fields of a multiple of "
            f"{_PUBLISHED_FIELD} px, and no alignment. Give data.store=STORE with --set."
        )
    num_tokens = (data.size // _PUBLISHED_FIELD) ** 2
    return _Sizes(channels, data.size // _DOWNSAMPLING, num_tokens, encoder.dim, fine=None)


def _config_of_codec(place: str) -> Path | None:
    """The configuration of an autoencoder on this machine."""
    folder = Path(weights_folder(place))
    return next(
        (path for path in (folder / "vae/config.json", folder / "config.json") if path.is_file()), None
    )


def _channels_in(place: str) -> int | None:
    config = _config_of_codec(place)
    return None if config is None else json.loads(config.read_text(encoding="utf-8")).get("latent_channels")


def _codec_bytes(place: str, channels: int) -> int:
    """Memory of a frozen autoencoder in float32."""
    config = _config_of_codec(place)
    if config is not None:
        return sum(path.stat().st_size for path in config.parent.glob("*.safetensors"))
    if place not in PUBLISHED_CODECS:
        return 0
    widths = (128, 256, 512, 512)  # the published ones are alike but for their latents
    with torch.device("meta"):
        codec = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=channels,
            use_quant_conv=channels == 4,
            use_post_quant_conv=channels == 4,
        )
    return bytes_of(codec.parameters())
