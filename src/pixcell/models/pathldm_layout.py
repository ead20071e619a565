"""Names of latent-diffusion ("ldm") checkpoints, and what the same tensors are called in diffusers.

Such a checkpoint is one dictionary of everything a training held. Prefixes say what belongs to what:

    model.diffusion_model.             the U-Net
    first_stage_model.                 the autoencoder
    cond_stage_model.transformer.      a text tower, or
    cond_stage_model.embedding.weight  a table of classes
    model_ema.                         running averages of the U-Net, if the training kept them
    betas, alphas_cumprod, ...         tables of the noise schedule, which are computed anew
    loss., inception.                  discriminators and metrics of the training, which nobody needs later

A file may also hold the U-Net or the autoencoder alone, with or without its prefix.

The tensors are those of diffusers' and transformers' classes under other names; only an attention of the
autoencoder keeps as 1 x 1 convolutions what diffusers has as linear layers. So a file is loaded by renaming,
and every name and shape is checked in both directions.

Source: the parameter names of CompVis latent-diffusion, as of its published checkpoints
(https://arxiv.org/abs/2112.10752), and of diffusers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from jaxtyping import Float
from torch import Tensor, nn

from pixcell.errors import WrongWeights

__all__ = ["LdmCheckpoint", "from_ldm", "ldm_names", "split_ldm_checkpoint", "to_ldm"]

# ── the parts of a checkpoint ────────────────────────────────────────────────────────────────────────

_UNET, _FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
_TEXT, _CLASSES = "cond_stage_model.transformer.", "cond_stage_model.embedding.weight"
_EMA = "model_ema."
_SCHEDULE = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}
_OF_THE_TRAINING = ("inception.", "loss.", f"{_FIRST_STAGE}loss.", _EMA)
_BARE_UNET = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|out)\.")
_BARE_FIRST_STAGE = re.compile(r"(encoder|decoder|quantize|quant_conv|post_quant_conv|loss)\.")


@dataclass(frozen=True)
class LdmCheckpoint:
    """A checkpoint in its parts, under their ldm names without the prefix. Empty: there is no such part."""

    unet: dict[str, Tensor] = field(default_factory=dict)
    first_stage: dict[str, Tensor] = field(default_factory=dict)
    text_encoder: dict[str, Tensor] = field(default_factory=dict)
    class_embedding: Float[Tensor, "classes dim"] | None = None
    """One row per class; the last one stands for "no class"."""
    betas: Float[Tensor, " timesteps"] | None = None
    """Noise schedule of the training, where the file states it."""
    scale_factor: float | None = None
    """What latents were multiplied by, where the file states it (trainings with ``scale_by_std``)."""
    has_ema: bool = False
    """Whether the file holds running averages of the U-Net."""
    ignored: tuple[str, ...] = ()
    """Names that belong to the training and were left out."""


def split_ldm_checkpoint(
    state: Mapping[str, Tensor], *, ema: bool = False, source: str = "the checkpoint"
) -> LdmCheckpoint:
    """Sort the tensors of a checkpoint by the part they belong to.

    Args:
        state: As read from the file: whole, or the U-Net or the autoencoder alone.
        ema: Take the running averages of the U-Net instead of its last weights.
        source: What messages call the file.

    Raises:
        WrongWeights: If a name belongs to no part, the averages asked for are not there, or nothing is.
    """
    named = _with_prefixes(state)
    parts: dict[str, dict[str, Tensor]] = {_UNET: {}, _FIRST_STAGE: {}, _TEXT: {}}
    ignored, unknown = [], []
    for name, value in named.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if name.startswith(_OF_THE_TRAINING) or name in ("logvar", "scale_factor"):
            ignored.append(name)
        elif name.endswith("text_model.embeddings.position_ids"):
            ignored.append(name)  # 0, 1, 2, ...: files of old versions of transformers store it
        elif prefix is not None:
            parts[prefix][name.removeprefix(prefix)] = value
        elif name != _CLASSES and name not in _SCHEDULE:
            unknown.append(name)
    if unknown:
        raise WrongWeights(
            f"{source} is no checkpoint of latent diffusion, or not only: {len(unknown)} tensors belong to "
            f"none of its parts ({', '.join(unknown[:3])}). Give a file that holds a whole model, or the "
            "U-Net or the autoencoder alone."
        )
    if not any(parts.values()) and _CLASSES not in named:
        raise WrongWeights(f"{source} holds neither a U-Net nor an autoencoder nor a condition encoder.")
    has_ema = any(name.startswith(f"{_EMA}diffusion_model") for name in named)
    scale = named.get("scale_factor")
    return LdmCheckpoint(
        unet=_averages(named, parts[_UNET], source) if ema else parts[_UNET],
        first_stage=parts[_FIRST_STAGE],
        text_encoder=parts[_TEXT],
        class_embedding=named.get(_CLASSES),
        betas=named.get("betas"),
        scale_factor=None if scale is None else float(scale),
        has_ema=has_ema,
        ignored=tuple(ignored),
    )


def _with_prefixes(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give a part that was saved alone the prefix it has in a whole checkpoint."""
    if "input_blocks.0.0.weight" in state:
        return {_UNET + name if _BARE_UNET.match(name) else name: value for name, value in state.items()}
    if "encoder.conv_in.weight" in state and "quant_conv.weight" in state:
        return {
            _FIRST_STAGE + name if _BARE_FIRST_STAGE.match(name) else name: value
            for name, value in state.items()
        }
    return state


def _averages(named: Mapping[str, Tensor], unet: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the running averages, which are stored under names without dots."""
    names = {name: f"{_EMA}diffusion_model{name.replace('.', '')}" for name in unet}
    missing = [name for name in names.values() if name not in named]
    if missing or not names:
        raise WrongWeights(
            f"{source} does not hold running averages of the whole U-Net "
            f"({len(missing)} of {len(names)} are missing). Load its last weights instead."
        )
    return {name: named[average] for name, average in names.items()}


# ── names ────────────────────────────────────────────────────────────────────────────────────────────

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_STAGE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


def ldm_names(module: nn.Module) -> dict[str, str]:
    """Return, for every tensor of a module, its name in ldm checkpoints (without the prefix of the part).

    Args:
        module: A ``UNet2DConditionModel``, ``VQModel``, ``AutoencoderKL`` or ``CLIPTextModel``.

    Raises:
        TypeError: If it is none of these.
    """
    own = list(module.state_dict())
    if isinstance(module, UNet2DConditionModel):
        blocks = module.config.layers_per_block + 1
        attended = {name.split(".")[1] for name in own if re.match(r"up_blocks\.\d+\.attentions", name)}
        return {name: _unet_name(name, blocks, attended) for name in own}
    if isinstance(module, VQModel | AutoencoderKL):
        levels = len(module.config.block_out_channels)
        return {name: _first_stage_name(name, levels) for name in own}
    if type(module).__name__ == "CLIPTextModel":
        # transformers 4 has this prefix too, transformers 5 does without.
        return {name: "text_model." + name.removeprefix("text_model.") for name in own}
    raise TypeError(f"a {type(module).__name__} is no part of a latent-diffusion checkpoint")


def from_ldm(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a part to those of ``module``, and give them its shapes where only these differ.

    Nothing is dropped: what the module does not have keeps its name, so that ``fit_weights`` can list it.

    Args:
        module: As for :func:`ldm_names`; may be on the meta device.
        state: The part, as :func:`split_ldm_checkpoint` returns it.
    """
    own = module.state_dict()
    names = {ldm: name for name, ldm in ldm_names(module).items()}
    renamed = {}
    for ldm, value in state.items():
        name = names.get(ldm, ldm)
        is_pointwise = name in own and value.ndim == 4 and value.shape == (*own[name].shape, 1, 1)
        renamed[name] = value[:, :, 0, 0] if is_pointwise else value
    return renamed


def to_ldm(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module under their ldm names and in their ldm shapes, without the prefix."""
    names = ldm_names(module)
    pointwise = re.compile(r".*\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight")
    return {
        names[name]: value[:, :, None, None] if pointwise.fullmatch(names[name]) else value
        for name, value in module.state_dict().items()
    }


def _unet_name(name: str, blocks: int, attended: set[str]) -> str:
    """Name a tensor of the U-Net.

    ldm numbers blocks through all levels: ``blocks`` a level; on the way down, 0 is the input convolution.
    """
    if match := _BLOCK.fullmatch(name):
        side, level, kind, index, rest = match.groups()
        number = int(level) * blocks + int(index)
        if kind == "downsamplers":
            return f"input_blocks.{(int(level) + 1) * blocks}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            # Behind the residual block and, where there is one, the attention of the level's last block.
            return f"output_blocks.{(int(level) + 1) * blocks - 1}.{2 if level in attended else 1}.{rest}"
        place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
        return f"{place}.0.{_replaced(rest, _UNET_RESNET)}" if kind == "resnets" else f"{place}.1.{rest}"
    if match := _MIDDLE.fullmatch(name):
        which, rest = match.groups()
        rest = _replaced(rest, _UNET_RESNET) if which.startswith("resnets") else rest
        return f"middle_block.{_UNET_MIDDLE[which]}.{rest}"
    return _replaced(name, _UNET_ENDS)


def _first_stage_name(name: str, levels: int) -> str:
    """Name a tensor of an autoencoder. ldm counts levels from the picture down, in the decoder too."""
    side, _, inner = name.partition(".")
    if side not in ("encoder", "decoder"):
        return name  # the codebook and the convolutions around it
    if match := _BLOCK.fullmatch(inner):
        direction, level, kind, index, rest = match.groups()
        place = f"{side}.{direction}.{level if direction == 'down' else levels - 1 - int(level)}"
        if kind in ("downsamplers", "upsamplers"):
            return f"{place}.{kind.removesuffix('rs')}.{rest}"
        if kind == "attentions":
            return f"{place}.attn.{index}.{_replaced(rest, _STAGE_ATTENTION)}"
        return f"{place}.block.{index}.{_replaced(rest, {'conv_shortcut': 'nin_shortcut'})}"
    if match := _MIDDLE.fullmatch(inner):
        which, rest = match.groups()
        if which.startswith("attentions"):
            return f"{side}.mid.attn_1.{_replaced(rest, _STAGE_ATTENTION)}"
        number = int(which.removeprefix("resnets.")) + 1
        return f"{side}.mid.block_{number}.{_replaced(rest, {'conv_shortcut': 'nin_shortcut'})}"
    return f"{side}.{_replaced(inner, {'conv_norm_out': 'norm_out'})}"


def _replaced(name: str, starts: Mapping[str, str]) -> str:
    """Replace the beginning of a name, whole words only."""
    for start, other in starts.items():
        if name.startswith(f"{start}."):
            return other + name[len(start) :]
    return name
