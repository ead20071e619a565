"""Published weights: recognised by the names of their tensors, and loaded into our classes.

    published = open_published("pixcell_256.ckpt")
    published.kind                                  # "pixcell-original"
    published.notes                                 # what was derived or chosen, for people
    transformer = published.load()["transformer"]   # a PixCellTransformer2DModel, every tensor accounted for

Whatever the file calls itself, the names of its tensors say what it is:

    pixcell            denoiser in the diffusers layout
    pixcell-original   denoiser in the layout of the training code (.ckpt, .pth; trained or averaged weights)
    controlnet         control branch
    lora               a whole denoiser with adapters in it
    lora-adapter       adapters alone; they need the denoiser they belong to (``base``)
    translator         embeddings of one stain to those of another
    uni2-h             the encoder UNI2-h, as timm builds it
    autoencoder        of diffusers, as that of Stable Diffusion 3.5
    unet               of diffusers
    text-encoder       a text tower of transformers
    pathldm            checkpoint in the ldm layout: U-Net, autoencoder, text tower; or one of them alone
    pipeline           a folder with several of these

A folder's configuration is used where there is one, and read off the shapes where there is none. Published
folders name classes in Python files of their own; they are never run, our classes take the same weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.published_openers import (
    OPENERS,
    UNBUILDABLE,
    Options,
    Part,
    Parts,
    load_model,
    read_json,
)
from pixcell.models.published_sources import PublishedSource, find_source
from pixcell.models.weight_files import PICKLE_SUFFIXES, Which, open_weights

__all__ = ["KINDS", "Published", "load_model", "load_published", "open_published", "recognise"]


@dataclass(frozen=True)
class Published:
    """Weights that were found and recognised. Of their values nothing has been read yet."""

    kind: str
    """One of :data:`KINDS`."""
    what: str
    """The same in words."""
    place: Path
    """File or folder on this machine."""
    origin: PublishedSource | None
    """Which published weights these are, if they were asked for by name."""
    parts: Mapping[str, Part]
    """What it holds: ``transformer``, ``controlnet``, ``vae``, ``unet``, ..., each with what loads it."""
    notes: tuple[str, ...] = ()
    """What was derived from shapes or chosen, for people."""

    def load(self, dtype: torch.dtype | None = torch.float32) -> dict[str, nn.Module]:
        """Load every part, in evaluation mode; every tensor must be there, and no other.

        Args:
            dtype: Number format of the weights; None: as they are stored.

        Raises:
            WrongWeights: Names the tensors that are missing, unexpected, of another shape or not finite.
        """
        return {name: load(dtype).eval() for name, load in self.parts.items()}


def load_published(
    source: str | Path, *, dtype: torch.dtype | None = torch.float32, **options: Any
) -> dict[str, nn.Module]:
    """Load published weights: :func:`open_published`, then :meth:`Published.load`.

    Args:
        source: As of :func:`open_published`.
        dtype: Number format of the weights; None: as they are stored.
        options: All else that :func:`open_published` takes.
    """
    return open_published(source, **options).load(dtype)


def open_published(
    source: str | Path,
    *,
    kind: str | None = None,
    which: Which = "auto",
    num_attention_heads: int | None = None,
    config: Mapping[str, Any] | None = None,
    base: nn.Module | None = None,
    skip_objects: bool = False,
    download: bool = False,
) -> Published:
    """Find published weights and say what they are.

    Args:
        source: A file or folder, a name or a place on the hub; see
            :func:`~pixcell.models.published_sources.find_source`.
        kind: One of :data:`KINDS`, where names should not decide.
        which: Of a training checkpoint: averaged weights, those trained, or averaged ones if there are any.
        num_attention_heads: Where there is no configuration; shapes do not tell it. None: as published.
        config: Entries of the configuration that replace what was found or derived. Of adapters
            ``lora_alpha``, where their file does not tell it and it is not their rank.
        base: The denoiser that adapters belong to; they are added to it.
        skip_objects: Of a pickle, leave out what is no tensor instead of refusing the file.
        download: Whether what is not on this machine may be downloaded.

    Raises:
        MissingWeights: If there is nothing at the source, or a part of it is missing.
        WrongWeights: If the file is damaged, would have to run code, or holds none of the known models.
        ModelError: If the kind or the configuration is not one that we know.
    """
    if kind is not None and kind not in KINDS:
        raise ModelError(f"there are no weights of kind {kind!r}. Choose one of {', '.join(KINDS)}.")
    place, origin = find_source(source, download=download)
    options = Options(which, skip_objects, num_attention_heads, dict(config or {}), base)
    if kind == "pipeline" or (kind is None and (place / "model_index.json").is_file()):
        if options.config:
            raise ModelError(
                f"{place} is a pipeline, whose parts have configurations of their own. Open the folder of "
                "one part to replace entries, or edit its config.json."
            )
        parts, notes = _pipeline(place, options)
        return Published("pipeline", KINDS["pipeline"], place, origin, parts, tuple(notes))
    stored = open_weights(place, which=which, skip_objects=skip_objects)
    kind = kind or recognise(stored.shapes, str(place))
    try:
        parts, notes = OPENERS[kind](stored, place, options)
    except UNBUILDABLE as error:
        raise WrongWeights(
            f"{place} has tensors with the names of: {KINDS[kind]}; and with shapes that no such model has "
            f"({' '.join(str(error).split())[:200]}). The file is damaged, or is another model's."
        ) from error
    return Published(kind, KINDS[kind], place, origin, parts, (*stored.notes, *notes))


def recognise(names: Mapping[str, Any] | set[str], source: str = "the weights") -> str:
    """Return which of :data:`KINDS` weights with these names are.

    Raises:
        WrongWeights: If they are none of them.
    """
    for kind, is_kind in _MARKS.items():
        if is_kind(set(names)):
            return kind
    shown = ", ".join(list(names)[:4])
    raise WrongWeights(
        f"{source} holds {len(names)} tensors of no model that pixcell knows ({shown}, ...). "
        f"It knows {', '.join(KINDS)}; if it is one of them, say which with --as."
    )


# ── what weights are, by the names of their tensors ──────────────────────────────────────────────────

KINDS = {
    "lora-adapter": "adapters (LoRA) of a PixCell denoiser",
    "lora": "PixCell denoiser with adapters (LoRA) in it",
    "controlnet": "control branch of a PixCell denoiser",
    "pixcell": "PixCell denoiser, diffusers layout",
    "pixcell-original": "PixCell denoiser, original layout",
    "translator": "embedding translator (flow between stains)",
    "uni2-h": "encoder UNI2-h, timm layout",
    "autoencoder": "autoencoder, diffusers layout",
    "unet": "U-Net, diffusers layout",
    "text-encoder": "text tower of CLIP, transformers layout",
    "pathldm": "PathLDM checkpoint, ldm layout",
    "pipeline": "pipeline of several models, diffusers layout",
}
"""What can be loaded, by the name that ``--as`` takes."""

_LDM = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")

# The first that holds decides, so the most particular stand first.
_MARKS: dict[str, Callable[[set[str]], bool]] = {
    "lora-adapter": lambda names: bool(names) and all(".lora_" in name for name in names),
    "lora": lambda names: any(".lora_A." in name for name in names),
    "controlnet": lambda names: {"controlnet_blocks.0.weight", "cond_pos_embed.proj.weight"} <= names,
    "pixcell": lambda names: {"caption_projection.uncond_embedding", "pos_embed.proj.weight"} <= names,
    "pixcell-original": lambda names: {"x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight"} <= names,
    "translator": lambda names: {"input_proj.weight", "res_blocks.0.in_layers.0.weight"} <= names,
    "uni2-h": lambda names: {"reg_token", "blocks.0.ls1.gamma", "blocks.0.mlp.fc1.weight"} <= names,
    "unet": lambda names: {"conv_in.weight", "time_embedding.linear_1.weight"} <= names,
    "text-encoder": lambda names: (
        any(name.endswith("embeddings.token_embedding.weight") for name in names)
        and not any(name.startswith(_LDM) for name in names)
    ),
    "pathldm": lambda names: (
        any(name.startswith(_LDM) for name in names)
        or bool({"input_blocks.0.0.weight", "encoder.down.0.block.0.norm1.weight"} & names)
    ),
    "autoencoder": lambda names: (
        {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= names
        or {"colour_in.weight", "colour_out.weight"} <= names
    ),
}


def _pipeline(folder: Path, options: Options) -> Parts:
    """Open the parts of a folder that have weights."""
    index = read_json(folder / "model_index.json")
    parts: dict[str, Part] = {}
    notes: list[str] = []
    for name, entry in index.items():
        place = folder / name
        is_part = isinstance(entry, list) and not name.startswith("_") and entry[-1] is not None
        if not is_part or (place / "scheduler_config.json").is_file() or name == "tokenizer":
            continue
        if not place.is_dir():
            raise MissingWeights(f"{folder} names {name}, and {place} is not there; copy it as a whole.")
        if not any(path.suffix in (".safetensors", *PICKLE_SUFFIXES) for path in place.iterdir()):
            notes.append(f"{name}/ has a configuration and no weights")
            continue
        opened = open_published(place, which=options.which)
        parts[name] = next(iter(opened.parts.values()))
        notes += [f"{name}: {note}" for note in opened.notes]
    return parts, notes
