"""Encoders: from a field of tissue to one vector, each with the preprocessing it was trained with.

What can be named:

    a row of the table             see ``models.encoder_specs``; ``stain-texture`` needs no weights
    timm/<model name>              any model of timm, with its own preprocessing
    transformers/<owner>/<name>    any vision model of transformers on the hub
    a folder                       config.json and weights, as timm or transformers saves them

or pass an :class:`EncoderSpec` of your own. A field may have any size: it is resampled to what the encoder
takes. So "one embedding per 256 px field" means 256 px of tissue seen through a 224 px input.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.v2.functional as tvf
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.codec import to_unit
from pixcell.models.encoder_specs import ENCODERS, EncoderSpec, encoder_specs, encoder_table
from pixcell.models.stain_texture import StainTexture
from pixcell.models.weight_files import StoredWeights, open_weights
from pixcell.models.weights import empty_parameters, fetch, load_stored, weights_sha256

__all__ = [
    "ENCODERS",
    "Encoder",
    "EncoderSpec",
    "encoder_specs",
    "encoder_table",
    "load_encoder",
    "timm_module",
]


class Encoder:
    """A module with its preprocessing.

    Args:
        spec: What it is.
        module: Preprocessed pictures (batch, 3, input_size, input_size) to vectors, or to tokens that
            ``spec.pooling`` reduces.
        device: Where it runs.
        dtype: Number format to compute in; embeddings are float32 whatever it is.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        module: nn.Module,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.spec = spec
        self.sha256 = weights_sha256(module)
        self.module = module.eval().requires_grad_(False)
        self.to(device, dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Encoder":
        """Move to a device, and with ``dtype`` to another number format."""
        self.device = torch.device(device)
        # The formula of stain-texture takes differences of near-equal numbers: float32, whatever is asked.
        if dtype is not None:
            self.dtype = torch.float32 if self.spec.library == "builtin" else dtype
        self.module.to(device=self.device, dtype=self.dtype)
        return self

    @property
    def name(self) -> str:
        """What columns and recipes call it."""
        return self.spec.name

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.spec.dim

    @torch.no_grad()
    def __call__(
        self, images: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Return one embedding per field, float32, on the device.

        Args:
            images: Fields, uint8 or float in [0, 1], of any size.

        Raises:
            ModelError: If the module returns another number of values than the spec says.
        """
        tokens = self.module(self.preprocess(images).to(self.dtype))
        embeddings = _pool(tokens, self.spec).float()
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ModelError(
                f"encoder {self.name} returned {tuple(embeddings.shape)}, but its spec says "
                f"{self.dim} values a field. Correct dim or pooling ({self.spec.pooling})."
            )
        return embeddings

    def preprocess(
        self, images: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 h w"]:
        """Resample, cut the centre, scale to [0, 1], normalise: what the module sees, float32.

        8-bit pictures are resampled in 8 bits, as PIL does and as the encoders were trained: where they are,
        since on the CPU this equals PIL bit for bit and elsewhere it does not.
        """
        spec = self.spec
        if spec.resize is not None:
            if min(images.shape[-2:]) != spec.resize:
                images = tvf.resize(
                    images,
                    [spec.resize],
                    interpolation=tvf.InterpolationMode(spec.interpolation),
                    antialias=True,
                )
            if tuple(images.shape[-2:]) != (spec.input_size, spec.input_size):
                images = tvf.center_crop(images, [spec.input_size, spec.input_size])
        # Bicubic resampling of floats overshoots; 8 bits clip by themselves.
        unit = to_unit(images.to(self.device)).clamp(0, 1)
        mean, std = (torch.tensor(v, device=unit.device).view(3, 1, 1) for v in (spec.mean, spec.std))
        return (unit - mean) / std

    def grid(
        self,
        tiles: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"],
        field_size: int = 256,
        batch_size: int | None = None,
    ) -> Float[Tensor, "batch rows columns dim"]:
        """Return the embedding of every field of tiles: row 0 at the top, column 0 at the left.

        Args:
            tiles: uint8 or float in [0, 1]; sides are multiples of ``field_size``.
            field_size: Side of a field, in pixels of the tile.
            batch_size: Fields at a time; None: all.

        Raises:
            ValueError: If the tile is not a whole number of fields.
        """
        height, width = tiles.shape[-2:]
        if height % field_size or width % field_size:
            raise ValueError(
                f"a tile of {height} x {width} px is not a whole number of {field_size} px fields"
            )
        rows, columns = height // field_size, width // field_size
        fields = (
            tiles.reshape(len(tiles), 3, rows, field_size, columns, field_size)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(-1, 3, field_size, field_size)
        )
        parts = [self(part) for part in fields.split(batch_size or len(fields))]
        return torch.cat(parts).reshape(len(tiles), rows, columns, self.dim)

    def made_by(self) -> dict[str, Any]:
        """Return what a store column keeps about this encoder; equal for equal numbers."""
        return {
            "name": self.name,
            "architecture": f"{self.spec.library}:{self.spec.architecture}",
            "sha256": self.sha256,
            "dim": self.dim,
            "preprocessing": self.spec.preprocessing,
            "licence": self.spec.licence,
        }


def _pool(tokens: Tensor, spec: EncoderSpec) -> Tensor:
    """Reduce (batch, tokens, dim) to one vector a field."""
    if spec.pooling == "model":
        return tokens
    patches = tokens[:, spec.num_prefix_tokens :]
    if spec.pooling == "mean":
        return patches.mean(dim=1)
    if spec.pooling == "class_token":
        return tokens[:, 0]
    return torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)


def load_encoder(
    encoder: str | Path | EncoderSpec,
    *,
    weights: Path | None = None,
    download: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """Load an encoder.

    Args:
        encoder: A name (see the top of this module), a folder, or a spec.
        weights: Weights on this machine instead of those of the hub: a file, or the folder that holds it.
        download: Whether weights that are not on this machine may be downloaded.
        device: Where it runs.
        dtype: Number format to compute in.

    Raises:
        MissingWeights: If there are no weights here and none may be, or can be, downloaded.
        WrongWeights: If names or shapes differ from the architecture's.
        ModelError: If there is no such encoder.
    """
    if isinstance(encoder, EncoderSpec):
        spec = encoder
    elif str(encoder) in ENCODERS:
        spec = ENCODERS[str(encoder)]
    else:
        spec, weights = _spec_of(str(encoder), weights, download)
    if spec.library == "builtin":
        if weights is not None:
            raise ModelError(f"{spec.name} is a formula and has no weights; leave --encoder-weights out.")
        return Encoder(spec, StainTexture(), device=device, dtype=dtype)
    if spec.library == "timm":
        module = timm_module(spec, open_weights(_weight_file(spec, weights, download), which="raw"))
    else:
        module = _transformers_module(spec, _weight_folder(spec, weights, download))
    return Encoder(spec, module, device=device, dtype=dtype)


def _spec_of(name: str, weights: Path | None, download: bool) -> tuple[EncoderSpec, Path | None]:
    """Build the spec of an encoder that is no row; also return where its weights are, if known now."""
    if Path(name).is_dir():
        return _folder_spec(Path(name), Path(name).resolve().name), weights or Path(name)
    if name.startswith("timm/"):
        return _timm_spec(name), weights
    if name.startswith("transformers/") and name.count("/") == 2:
        repository = name.removeprefix("transformers/")
        folder = weights or fetch(
            repository,
            ("config.json", "preprocessor_config.json", *_WEIGHT_PATTERNS),
            download=download,
            advice=_advice(),
        )
        spec = _folder_spec(folder, repository.replace("/", "-"))
        return replace(spec, repository=repository), folder
    raise ModelError(
        f"there is no encoder {name!r}. Known: {', '.join(ENCODERS)}. Any timm model is timm/<model name>, "
        "any vision model of transformers transformers/<owner>/<name>; a folder with config.json works too."
    )


_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model.bin")


def _advice() -> str:
    open_ones = [spec.name for spec in encoder_specs() if not spec.gated and spec.commercial_use]
    return (
        "If you have the weights, pass them with --encoder-weights. Open encoders: "
        f"{', '.join(open_ones)} (the first needs no weights)."
    )


# ── timm ─────────────────────────────────────────────────────────────────────────────────────────────


def timm_module(
    spec: EncoderSpec, stored: StoredWeights, dtype: torch.dtype | None = torch.float32
) -> nn.Module:
    """Build the network of a spec by timm, and give it the stored weights.

    Args:
        spec: Names architecture and arguments, and which tensors belong to the encoder.
        stored: Opened weights.
        dtype: Their number format; None: as stored.

    Raises:
        WrongWeights: If names or shapes differ from the architecture's.
        ModelError: If timm cannot build it.
    """
    own = stored.converted(
        lambda state: {
            name.removeprefix(spec.prefix): value
            for name, value in state.items()
            if name.startswith(spec.prefix) and not name.startswith(spec.drop)
        }
    )
    if not own.shapes:
        raise WrongWeights(
            f"{stored.source} holds no tensor whose name begins with {spec.prefix!r}; {spec.name} needs them."
        )
    with empty_parameters():
        module = _build_timm(spec.architecture, spec.arguments)
    load_stored(module, own, dtype)
    return module


def _build_timm(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    import timm

    layers = {"mlp_layer": timm.layers, "act_layer": torch.nn}
    resolved = {
        key: getattr(layers[key], value) if key in layers and isinstance(value, str) else value
        for key, value in arguments.items()
    }
    try:
        return timm.create_model(architecture, pretrained=False, **resolved)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"timm cannot build {architecture!r} with {dict(arguments)}: {' '.join(str(error).split())[:200]}"
        ) from error


def _weight_file(spec: EncoderSpec, weights: Path | None, download: bool) -> Path:
    if weights is not None and not weights.is_dir():
        return weights
    if weights is None and not spec.repository:
        raise MissingWeights(
            f"{spec.name} has no weights on the hub, and random ones describe nothing. {_advice()}"
        )
    folder = weights or fetch(
        spec.repository, spec.weight_files, revision=spec.revision, download=download, advice=_advice()
    )
    for name in spec.weight_files:
        if (folder / name).is_file():
            return folder / name
    raise MissingWeights(f"{folder} holds none of {', '.join(spec.weight_files)}.")


def _timm_spec(name: str) -> EncoderSpec:
    """Build the spec of a timm model from timm's own description of it."""
    import timm

    architecture = name.removeprefix("timm/")
    config = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    if config is None:
        near = timm.list_models(f"*{architecture.split('.')[0].split('_')[0]}*")[:3]
        hint = f" Did you mean one of {', '.join(near)}?" if near else ""
        raise ModelError(f"timm has no model {architecture!r}.{hint}")
    return _spec_from_timm(name.replace("/", "-"), architecture, config.to_dict(), {})


def _spec_from_timm(
    name: str, architecture: str, config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> EncoderSpec:
    import timm

    arguments = {**arguments, "num_classes": 0}
    data = timm.data.resolve_data_config(pretrained_cfg=dict(config))
    size = data["input_size"][-1]
    with torch.device("meta"):  # shapes only, nothing is allocated
        dim = int(_build_timm(architecture, arguments).num_features)  # type: ignore[arg-type]
    classifier = config.get("classifier") or ()
    return EncoderSpec(
        name=name,
        library="timm",
        architecture=architecture,
        dim=dim,
        licence=str(config.get("license") or "not verified: see its model page"),
        repository=str(config.get("hf_hub_id") or ""),
        input_size=size,
        # timm resizes to size / crop_pct and cuts the centre; a field has no border to spare.
        resize=size,
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        arguments=arguments,
        drop=tuple(f"{part}." for part in ([classifier] if isinstance(classifier, str) else classifier)),
    )


# ── transformers, and folders ────────────────────────────────────────────────────────────────────────


class _Tokens(nn.Module):
    """A model of transformers as a function from pixels to a tensor."""

    def __init__(self, model: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.model, self._pooled = model, pooled

    def forward(self, pixels: Tensor) -> Tensor:
        output = self.model(pixel_values=pixels)
        return output.pooler_output.flatten(1) if self._pooled else output.last_hidden_state


def _weight_folder(spec: EncoderSpec, weights: Path | None, download: bool) -> Path:
    folder = weights or fetch(
        spec.repository,
        ("config.json", *_WEIGHT_PATTERNS),
        revision=spec.revision,
        download=download,
        advice=_advice(),
    )
    folder = folder if folder.is_dir() else folder.parent
    if not (folder / "config.json").is_file():
        raise MissingWeights(
            f"{folder} holds no config.json. {spec.name} is a model of transformers: "
            "pass the folder with its config.json and weights."
        )
    return folder


def _transformers_module(spec: EncoderSpec, folder: Path) -> nn.Module:
    from transformers import AutoModel

    try:
        # Code from the hub is never run; pickles are read as tensors only (torch's weights_only).
        model, report = AutoModel.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WrongWeights(
            f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}"
        ) from error
    pooled = spec.pooling == "model"
    # An absent pooler is filled with random numbers; harmless only where it is not used.
    missing = [name for name in report["missing_keys"] if pooled or not name.startswith("pooler.")]
    wrong = [*missing, *report["mismatched_keys"]]
    if wrong:
        raise WrongWeights(
            f"{folder} does not fit {type(model).__name__}: {len(wrong)} tensors, {wrong[:3]}."
        )
    return _Tokens(model, pooled)


def _folder_spec(folder: Path, name: str) -> EncoderSpec:
    """Read what kind of model a folder holds: timm's own saving, or transformers'."""
    config = _read_json(folder / "config.json")
    if "architecture" in config and "pretrained_cfg" in config:
        return _spec_from_timm(
            name, config["architecture"], config["pretrained_cfg"], config.get("model_args") or {}
        )
    steps = _read_json(folder / "preprocessor_config.json")
    try:
        crop = steps.get("crop_size") or steps["size"]
        size = crop if isinstance(crop, int) else crop.get("height") or crop["shortest_edge"]
        mean, std = tuple(steps["image_mean"]), tuple(steps["image_std"])
        # Convolutional networks have hidden_sizes and pool by themselves; transformers have a class token.
        convolutional = "hidden_sizes" in config
        dim = config["hidden_sizes"][-1] if convolutional else config["hidden_size"]
        architecture = config["architectures"][0]
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder} does not describe a plain vision model of transformers (missing: {error}). "
            "Pass an EncoderSpec."
        ) from error
    return EncoderSpec(
        name=name,
        library="transformers",
        architecture=architecture,
        dim=dim,
        licence="not verified: see its model page",
        input_size=size,
        resize=size,
        interpolation="bilinear" if steps.get("resample") == 2 else "bicubic",  # PIL's number of bilinear
        mean=mean,
        std=std,
        pooling="model" if convolutional else "class_token",
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingWeights(
            f"{path.parent} has no {path.name}. An encoder's folder is one saved by timm or transformers."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no settings.")
    return content
