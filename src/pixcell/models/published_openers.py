"""One way to open each kind of published weights: its configuration, and what loads its parts.

An opener looks at names and shapes only. What it returns for a part builds the model empty and fills it
tensor by tensor, so that loading takes little more memory than the model occupies.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel, VQModel
from torch import Tensor, nn

from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.adapters import LoraWeights, load_lora, read_lora
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.configurations import config_in, read_json
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.encoders import ENCODERS, timm_module
from pixcell.models.pathldm import (
    ClassEmbedder,
    first_stage_config_of,
    first_stage_from_ldm,
    text_config_of,
    unet_config_of,
    unet_from_ldm,
)
from pixcell.models.pathldm_layout import from_ldm, split_ldm_checkpoint
from pixcell.models.published_configs import (
    config_of_autoencoder,
    config_of_controlnet,
    config_of_original,
    config_of_transformer,
    uni_arguments,
)
from pixcell.models.published_layouts import diffusers_from_original
from pixcell.models.text import load_text_tower
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.models.translator import EmbeddingTranslator, load_translator
from pixcell.models.weight_files import StoredWeights, Which, open_weights, weight_files_in
from pixcell.models.weights import empty_parameters, load_stored

__all__ = ["OPENERS", "UNBUILDABLE", "Options", "Part", "Parts", "load_model", "read_json"]

Part = Callable[[torch.dtype | None], nn.Module]
"""Loads a model in a number format; None: as it is stored."""
Parts = tuple[dict[str, Part], list[str]]

# What weight files of a model folder are called; another file may lie beside the config.json of anything.
_ALPHA = "lora_alpha"
_USUAL_FILES = ("diffusion_pytorch_model", "model.", "pytorch_model.")


UNBUILDABLE = (
    *(TypeError, ValueError, LookupError, ArithmeticError),
    *(AttributeError, AssertionError, NameError, RuntimeError),
)
"""What constructors of other libraries raise where a configuration or a shape is of the wrong kind."""


@dataclass(frozen=True)
class Options:
    """What names and shapes of a file do not tell."""

    which: Which = "auto"
    skip_objects: bool = False
    num_attention_heads: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    base: nn.Module | None = None


def load_model(
    kind: type[ModelMixin], folder: Path, dtype: torch.dtype | None = torch.float32, **changes: Any
) -> Any:
    """Load a model folder of the diffusers layout into a class, in evaluation mode.

    The class that the folder names does not matter; names and shapes of its tensors do, in both directions.
    Takes little more memory than the model occupies.

    Args:
        kind: The class.
        folder: With ``config.json`` and weights: one file or shards.
        dtype: Number format of the weights; None: as they are stored.
        changes: Entries of the configuration to replace.

    Raises:
        MissingWeights: If configuration or weights are not there.
        WrongWeights: If names or shapes do not fit.
        ModelError: If the configuration is none of this class.
    """
    if not (folder / "config.json").is_file():
        raise MissingWeights(f"{folder} holds no config.json; copy the folder again as a whole.")
    config = {**config_in(folder, kind), **changes}
    return _loaded(lambda: kind(**config), open_weights(folder), dtype).eval()


# ── one opener per kind ──────────────────────────────────────────────────────────────────────────────


def _denoiser(stored: StoredWeights, place: Path, options: Options) -> Parts:
    return _transformer_like(PixCellTransformer2DModel, "transformer", config_of_transformer)(
        stored, place, options
    )


def _transformer_like(
    kind: type[PixCellTransformer2DModel], name: str, derive: Callable[..., tuple[dict[str, Any], list[str]]]
) -> Callable[[StoredWeights, Path, Options], Parts]:
    def open_(stored: StoredWeights, place: Path, options: Options) -> Parts:
        found = _config_beside(place, kind)
        config, notes = (
            (found, []) if found is not None else derive(stored.mapped(), options.num_attention_heads)
        )
        config = config | options.config
        return {name: lambda dtype: _loaded(lambda: kind(**config), stored, dtype)}, notes

    return open_


def _original(stored: StoredWeights, place: Path, options: Options) -> Parts:
    del place
    config, notes = config_of_original(stored.mapped(), options.num_attention_heads)
    config = config | options.config
    ours = stored.converted(diffusers_from_original)
    if "y_pos_embed" not in stored.shapes and config["caption_num_tokens"] > 1:
        notes.append("no positions on the condition: a table of zeros")

    def load(dtype: torch.dtype | None) -> nn.Module:
        model = _loaded(lambda: PixCellTransformer2DModel(**config), ours, dtype)
        _check_positions(model, stored)
        return model

    return {"transformer": load}, notes


def _check_positions(model: PixCellTransformer2DModel, stored: StoredWeights) -> None:
    """Compare the stored table of latent positions, which is not loaded, with the one computed instead."""
    if "pos_embed" not in stored.shapes:
        return
    table, own = stored.mapped()["pos_embed"].float(), model.pos_embed.pos_embed
    difference = (table - own).abs().max().item() if table.shape == own.shape else float("inf")
    if not difference < 2e-3:  # a table in half precision is off by up to 5e-4
        raise WrongWeights(
            f"the position table of {stored.source} is not that of a model with {dict(model.config)} "
            f"(largest difference {difference:.2g}). Give its interpolation_scale and sample_size as config."
        )


def _with_adapters(stored: StoredWeights, place: Path, options: Options) -> Parts:
    """Open a whole denoiser with adapters in it: the denoiser, then the adapters on top."""
    plain = stored.converted(
        lambda state: {
            name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name
        }
    )
    others = {key: value for key, value in options.config.items() if key != _ALPHA}
    parts, notes = _denoiser(plain, place, replace(options, config=others))

    def load(dtype: torch.dtype | None) -> nn.Module:
        model: Any = parts["transformer"](dtype)
        # The rest of the file is the denoiser that was just loaded: there is nothing to compare.
        load_lora(model, replace(_adapters_in(stored, place, options), base=None))
        return model

    return {"transformer": load}, notes


def _adapters(stored: StoredWeights, place: Path, options: Options) -> Parts:
    _check_settings("adapters", options, _ALPHA)
    base = options.base
    if not isinstance(base, PixCellTransformer2DModel):
        raise MissingWeights(
            f"{place} holds adapters alone. They belong to a denoiser, most likely PixCell-1024: give it as "
            "--base (a folder or file of its weights)."
        )

    def load(dtype: torch.dtype | None) -> nn.Module:
        load_lora(base, _adapters_in(stored, place, options))
        return base if dtype is None else base.to(dtype)

    return {"transformer": load}, []


def _adapters_in(stored: StoredWeights, place: Path, options: Options) -> LoraWeights:
    alpha = options.config.get(_ALPHA)
    files = weight_files_in(place) if place.is_dir() else (place,)
    if len(files) == 1 and files[0].suffix == ".safetensors":
        # Beside the tensors it may say how much they count, and to which denoiser they belong.
        return read_lora(files[0], alpha=alpha)
    return read_lora(
        {name: value for name, value in stored.mapped().items() if ".lora_" in name}, alpha=alpha
    )


def _check_settings(what: str, options: Options, *known: str) -> None:
    """Refuse entries of a configuration that would change nothing."""
    if unknown := [key for key in options.config if key not in known]:
        raise ModelError(
            f"{', '.join(unknown)} cannot be set for {what}; "
            + (f"what can is {', '.join(known)}." if known else "names and shapes tell all of it.")
        )


def _translator(stored: StoredWeights, place: Path, options: Options) -> Parts:
    _check_settings("a translator", options)
    config = _config_beside(place, EmbeddingTranslator)
    if config is not None:
        return {"translator": lambda dtype: _loaded(lambda: EmbeddingTranslator(**config), stored, dtype)}, []
    return {
        "translator": lambda dtype: load_translator(
            dict(stored.tensors()), dtype=dtype or stored.floating_dtypes[0]
        )
    }, []


def _uni(stored: StoredWeights, place: Path, options: Options) -> Parts:
    del place
    arguments, notes = uni_arguments(
        stored.mapped(), ENCODERS["uni2-h"].arguments, options.num_attention_heads
    )
    spec = replace(ENCODERS["uni2-h"], arguments=arguments | options.config)
    return {"encoder": lambda dtype: timm_module(spec, stored, dtype)}, notes


def _autoencoder(stored: StoredWeights, place: Path, options: Options) -> Parts:
    named = read_json(place / "config.json").get("_class_name") if (place / "config.json").is_file() else None
    kinds: dict[Any, Any] = {"VQModel": VQModel, "TissueAutoencoder": TissueAutoencoder}
    kind = kinds.get(named, AutoencoderKL)
    found = _config_beside(place, kind)
    config, notes = (
        (found, []) if found is not None else config_of_autoencoder(stored.mapped(), options.config)
    )
    config = config | options.config
    return {"vae": lambda dtype: _loaded(lambda: kind(**config), stored, dtype)}, notes


def _unet(stored: StoredWeights, place: Path, options: Options) -> Parts:
    config = _config_beside(place, UNet2DConditionModel)
    if config is None:
        raise MissingWeights(
            f"{place} holds a U-Net without its configuration, which no shape tells whole. "
            "Give the folder with its config.json."
        )
    config = config | options.config
    return {"unet": lambda dtype: _loaded(lambda: UNet2DConditionModel(**config), stored, dtype)}, []


def _text_encoder(stored: StoredWeights, place: Path, options: Options) -> Parts:
    _check_settings("a text tower", options)
    folder = place if place.is_dir() else place.parent
    return {
        "text_encoder": lambda dtype: load_text_tower(folder, dtype=dtype or stored.floating_dtypes[0])
    }, []


def _pathldm(stored: StoredWeights, place: Path, options: Options) -> Parts:
    """Open a checkpoint of everything that a training held; each part is read alone."""
    source = str(place)
    text_heads = "text_num_attention_heads"
    _check_settings("a PathLDM checkpoint", options, "sample_size", "scaling_factor", text_heads)
    whole = split_ldm_checkpoint(stored.mapped(), source=source)
    ema = options.which == "ema" or (options.which == "auto" and whole.has_ema)
    notes = [] if not whole.ignored else [f"{len(whole.ignored)} tensors of the training left out"]
    if whole.has_ema:
        notes.append(
            "the U-Net's running averages; its last weights with --weights raw"
            if ema
            else "the U-Net's last weights"
        )
    heads = options.num_attention_heads or 1
    parts: dict[str, Part] = {}

    def part(name: str, build: Callable[[], nn.Module], of: Callable[[Any], Mapping[str, Tensor]]) -> None:
        def load(dtype: torch.dtype | None) -> nn.Module:
            with empty_parameters():
                module = build()
            state = stored.converted(
                lambda state: from_ldm(module, of(split_ldm_checkpoint(state, ema=ema, source=source)))
            )
            load_stored(module, state, dtype)
            return module

        parts[name] = load

    if whole.unet:
        side = options.config.get("sample_size", 64)
        unet_config = unet_config_of(whole.unet, num_heads=heads, image_size=side)
        notes.append(f"U-Net: {heads} attention head(s) everywhere, latents of {side} x {side}")
        part("unet", lambda: unet_from_ldm(**unet_config), lambda split: split.unet)
    if whole.first_stage:
        stage_config = first_stage_config_of(whole.first_stage)
        scale = options.config.get("scaling_factor", whole.scale_factor)
        notes.append(f"latents scaled by {1.0 if scale is None else scale}")
        part(
            "vae",
            lambda: first_stage_from_ldm(**stage_config, scaling_factor=1.0 if scale is None else scale),
            lambda split: split.first_stage,
        )
    if whole.text_encoder:
        text_config = text_config_of(whole.text_encoder, num_heads=options.config.get(text_heads))
        notes.append(f"text tower: {text_config['num_attention_heads']} attention heads")
        part("text_encoder", lambda: _text_tower(text_config), lambda split: split.text_encoder)
    if whole.class_embedding is not None:
        rows, width = whole.class_embedding.shape
        parts["class_embedder"] = lambda dtype: _loaded(
            lambda: ClassEmbedder(rows, width),
            stored.converted(
                lambda state: {"embedding.weight": split_ldm_checkpoint(state).class_embedding}  # type: ignore[dict-item]
            ),
            dtype,
        )
    return parts, notes


def _text_tower(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


OPENERS: dict[str, Callable[[StoredWeights, Path, Options], Parts]] = {
    "lora-adapter": _adapters,
    "lora": _with_adapters,
    "controlnet": _transformer_like(PixCellControlNetModel, "controlnet", config_of_controlnet),
    "pixcell": _denoiser,
    "pixcell-original": _original,
    "translator": _translator,
    "uni2-h": _uni,
    "autoencoder": _autoencoder,
    "unet": _unet,
    "text-encoder": _text_encoder,
    "pathldm": _pathldm,
}


def _loaded(build: Callable[[], Any], stored: StoredWeights, dtype: torch.dtype | None) -> Any:
    try:
        with empty_parameters():
            model = build()
    except UNBUILDABLE as error:
        raise ModelError(
            f"no model can be built with the configuration of {stored.source} "
            f"({' '.join(str(error).split())[:200]}). Copy its config.json again, or correct what was given."
        ) from error
    load_stored(model, stored, dtype)
    return model


# ── configurations ───────────────────────────────────────────────────────────────────────────────────


def _config_beside(place: Path, kind: type[ModelMixin]) -> dict[str, Any] | None:
    """Return the configuration of a folder, or of the folder whose weight file was given."""
    if not (place.is_dir() or place.name.startswith(_USUAL_FILES)):
        return None
    folder = place if place.is_dir() else place.parent
    return config_in(folder, kind) if (folder / "config.json").is_file() else None
