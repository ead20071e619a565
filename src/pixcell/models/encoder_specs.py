"""What encoders there are, and everything that decides the numbers they return.

Licence, gating and revision are those that the model's page, or public code that pins it, state; where a
note says so, the licence was read on pages of others only. ``revision=None`` says that no commit could be
confirmed. Licences bind models trained on the embeddings too, where they say so (UNI2-h does): read them
before you publish.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table

from pixcell.console import table
from pixcell.models.stain_texture import StainTexture

__all__ = ["ENCODERS", "EncoderSpec", "encoder_specs", "encoder_table"]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Pooling = Literal["model", "class_token", "class_and_mean", "mean"]


@dataclass(frozen=True)
class EncoderSpec:
    """All that decides what an encoder returns for a field."""

    name: str
    """What columns and recipes call it."""
    library: Literal["timm", "transformers", "builtin"]
    """Who builds the module."""
    architecture: str
    """Name in timm; class of transformers is read from the weights' ``config.json``."""
    dim: int
    """Length of an embedding."""
    licence: str
    """Of the weights, as their model page states it."""
    repository: str = ""
    """On the Hugging Face hub; empty: there is none, weights are local."""
    revision: str | None = None
    """Commit of the repository. None: not pinned, ``main`` at the time of download; what was loaded is still
    identified by the hash of its weights."""
    gated: bool = False
    """Whether the hub asks to accept terms and log in."""
    commercial_use: bool = True
    """Whether the licence allows it."""
    input_size: int = 224
    """Side of the square that the module sees, in pixels."""
    resize: int | None = 224
    """The field's shorter side becomes this, then the centre of ``input_size`` is cut. None: as it is."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling, antialiased."""
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    pooling: Pooling = "model"
    """How tokens become one vector; ``model``: the module returns one."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the architecture: numbers, booleans, or for ``mlp_layer`` and ``act_layer`` a name."""
    weight_files: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    """Names under which the weights are looked for, in order."""
    num_prefix_tokens: int = 1
    """Tokens before the first of the image: the class token and registers. Mean pooling leaves them out."""
    drop: tuple[str, ...] = ()
    """Tensors whose name begins so are no part of the encoder: a classifier, say."""
    prefix: str = ""
    """Only tensors whose name begins so belong to the encoder; the prefix is taken off."""
    note: str = ""
    """What a reader of the table should know."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The part of the spec that turns a field into the module's input."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key in ("input_size", "resize", "interpolation", "mean", "std", "pooling")
        }


_SPECS = (
    EncoderSpec(
        name="stain-texture",
        library="builtin",
        architecture="StainTexture-1",
        dim=StainTexture.dim,
        licence="Apache-2.0",
        resize=None,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        note="No weights; any field size from 64 px.",
    ),
    EncoderSpec(
        name="uni2-h",
        library="timm",
        architecture="vit_giant_patch14_224",
        dim=1536,
        licence="CC BY-NC-ND 4.0",
        repository="MahmoodLab/UNI2-h",
        gated=True,
        commercial_use=False,
        interpolation="bilinear",
        arguments={
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "num_classes": 0,
            "no_embed_class": True,
            "mlp_layer": "SwiGLUPacked",
            "act_layer": "SiLU",
            "reg_tokens": 8,
            "dynamic_img_size": True,
        },
        revision="d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
        weight_files=("pytorch_model.bin", "model.safetensors"),
        note="What PixCell was trained with.",
    ),
    EncoderSpec(
        name="h-optimus-0",
        library="timm",
        architecture="vit_giant_patch14_reg4_dinov2",
        dim=1536,
        licence="Apache-2.0",
        repository="bioptimus/H-optimus-0",
        mean=(0.707223, 0.578729, 0.703617),
        std=(0.211883, 0.230117, 0.177517),
        arguments={"img_size": 224, "init_values": 1e-5, "num_classes": 0, "dynamic_img_size": False},
        note="1.1 billion parameters. Licence as others state it; whether a login is needed: not verified.",
    ),
    EncoderSpec(
        name="midnight",
        library="transformers",
        architecture="Dinov2Model",
        dim=3072,
        licence="MIT",
        repository="kaiko-ai/midnight",
        revision="adc6b15679c981cce6f9b018bbad09d16eeeda9f",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        pooling="class_and_mean",
        note="1.1 billion parameters; trained on 12 thousand public slides. Licence as others state it.",
    ),
    EncoderSpec(
        name="keep",
        library="timm",
        architecture="vit_large_patch16_224",
        dim=1024,
        licence="MIT",
        repository="Astaxanthin/KEEP",
        revision="1776acd9d33abecc142378d293d10c9b5a13662c",
        arguments={
            "img_size": 224,
            "patch_size": 16,
            "init_values": 1e-5,
            "num_classes": 0,
            "dynamic_img_size": True,
        },
        prefix="visual.",
        note="The image side of a vision-language model, before its projection to text.",
    ),
    EncoderSpec(
        name="dinov2-base",
        library="transformers",
        architecture="Dinov2Model",
        dim=768,
        licence="Apache-2.0",
        repository="facebook/dinov2-base",
        revision="f9e44c814b77203eaa57a6bdbbd535f21ede1415",
        pooling="class_token",
        note="Trained on photographs. The whole field is seen: resized to 224, not to 256 and cut.",
    ),
    EncoderSpec(
        name="phikon-v2",
        library="transformers",
        architecture="Dinov2Model",
        dim=1024,
        licence="Owkin non-commercial licence",
        repository="owkin/phikon-v2",
        revision="419e8285b80eac3b60beca0d9b91942d48ad7b8e",
        commercial_use=False,
        interpolation="bilinear",
        pooling="class_token",
        note="Not gated, but for non-commercial use only.",
    ),
)

ENCODERS: dict[str, EncoderSpec] = {spec.name: spec for spec in _SPECS}
"""The encoders that can be asked for by name."""


def encoder_specs() -> list[EncoderSpec]:
    """Return the rows of the table, the weight-free one first."""
    return list(_SPECS)


def encoder_table() -> Table:
    """Return the rows as a table for people."""
    return table(
        "Encoders",
        ("name", "width", "licence", "gated", "from"),
        [
            (
                spec.name,
                spec.dim,
                spec.licence,
                "yes" if spec.gated else "no",
                f"{spec.repository}@{(spec.revision or 'main')[:8]}" if spec.repository else spec.library,
            )
            for spec in _SPECS
        ],
    )
