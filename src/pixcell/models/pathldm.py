"""The models of PathLDM, built of diffusers' classes from the configurations of latent diffusion ("ldm").

    unet         UNet2DConditionModel, 401 million parameters: predicts the noise in 3 x 64 x 64 latents
    first stage  VQModel ("vq-f4", "vq-f8") or AutoencoderKL ("kl-f4", "kl-f8"): 256 px pictures to latents
    condition    CLIPTextModel (see ``models.text``), or :class:`ClassEmbedder` in the variant without text

Configurations are those of ldm, key by key; see ``models.pathldm_configs``.

Two traps. The argument ``attention_head_dim`` of ``UNet2DConditionModel`` is the number of heads, not their
width: PathLDM has one head everywhere. And a VQ model diffuses on what its encoder returns *before* the
codebook; only decoding looks up the nearest rows.

Source: Yellapragada et al. 2023, "PathLDM: Text conditioned Latent Diffusion Model for Histopathology"
(https://arxiv.org/abs/2309.00748); Rombach et al. 2022 (https://arxiv.org/abs/2112.10752).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from pixcell.errors import ModelError
from pixcell.models.configurations import StrictModel
from pixcell.models.pathldm_configs import (
    PATHLDM_FIRST_STAGES,
    PATHLDM_UNET,
    first_stage_config_of,
    text_config_of,
    unet_config_of,
)

__all__ = [
    "PATHLDM_FIRST_STAGES",
    "PATHLDM_UNET",
    "ClassEmbedder",
    "first_stage_config_of",
    "first_stage_from_ldm",
    "text_config_of",
    "unet_config_of",
    "unet_from_ldm",
]

# ── building ─────────────────────────────────────────────────────────────────────────────────────────

# What an ldm configuration may also say, as long as it says this: the one value built here.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "use_spatial_transformer": (True,),
    "dims": (2,),
    "conv_resample": (True,),
    "num_classes": (None,),
    "use_scale_shift_norm": (False,),
    "resblock_updown": (False,),
    "num_heads_upsample": (-1,),
    "n_embed": (None,),
    "use_linear_in_transformer": (False,),
    # Number formats and memory; they change no result.
    "use_fp16": (True, False),
    "use_checkpoint": (True, False),
    "use_new_attention_order": (True, False),
    "legacy": (True, False),
}
_STAGE_FIXED: dict[str, tuple[Any, ...]] = {
    "dropout": (0.0,),
    "resamp_with_conv": (True,),
    "give_pre_end": (False,),
    "tanh_out": (False,),
    "use_linear_attn": (False,),
    "attn_type": ("vanilla",),
}

_STAGE_TRAINING = {
    "lossconfig",
    "monitor",
    "ckpt_path",
    "ignore_keys",
    "image_key",
    "colorize_nlabels",
    "batch_resize_range",
    "scheduler_config",
    "lr_g_factor",
    "use_ema",
}


def unet_from_ldm(
    *,
    image_size: int,
    in_channels: int,
    out_channels: int,
    model_channels: int,
    attention_resolutions: Sequence[int],
    num_res_blocks: int,
    channel_mult: Sequence[int],
    context_dim: int,
    num_heads: int = -1,
    num_head_channels: int = -1,
    transformer_depth: int = 1,
    dropout: float = 0.0,
    **fixed: Any,
) -> UNet2DConditionModel:
    """Build the U-Net of an ldm configuration, initialised as for training from scratch.

    Args:
        image_size: Side of the latents it is trained on; it takes any multiple of ``2 ** (levels - 1)``.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction.
        model_channels: Width of the first level; a multiple of 32.
        attention_resolutions: Downsampling factors (1, 2, 4, ...), not sizes, that have attention.
        num_res_blocks: Residual blocks a level; one more on the way up.
        channel_mult: Width of each level, in units of ``model_channels``.
        context_dim: Width of a token of the condition.
        num_heads: Heads of every attention; -1: given by ``num_head_channels``.
        num_head_channels: Width of a head; -1: given by ``num_heads``.
        transformer_depth: Transformer blocks of each attention.
        dropout: In residual blocks.
        fixed: Further keys of ldm, accepted at the values that this network has.

    Raises:
        ModelError: If the configuration describes another kind of network.
    """
    _check_fixed("U-Net", fixed, _UNET_FIXED)
    widths = [model_channels * factor for factor in channel_mult]
    if (num_heads == -1) == (num_head_channels == -1):
        raise ModelError("give one of num_heads and num_head_channels; the other is -1.")
    heads = [num_heads if num_head_channels == -1 else width // num_head_channels for width in widths]
    if any(width % 32 for width in widths) or any(
        count < 1 or width % count for width, count in zip(widths, heads, strict=True)
    ):
        raise ModelError(
            f"levels {widths} wide with {heads} heads cannot be built: every width must be a multiple of 32 "
            "(groups of a normalisation) and of its number of heads."
        )
    attended = [2**level in attention_resolutions for level in range(len(widths))]
    unet = UNet2DConditionModel(
        sample_size=image_size,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=tuple(widths),
        layers_per_block=num_res_blocks,
        cross_attention_dim=context_dim,
        attention_head_dim=heads[0] if len(set(heads)) == 1 else tuple(heads),
        transformer_layers_per_block=transformer_depth,
        down_block_types=tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attended),
        up_block_types=tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attended)),
        dropout=dropout,
        norm_eps=1e-5,
        norm_num_groups=32,
        flip_sin_to_cos=True,
        freq_shift=0,
        act_fn="silu",
    )
    _start_at_zero(unet)
    return unet


def _start_at_zero(unet: UNet2DConditionModel) -> None:
    """Silence every branch at first, so that an untrained network is the identity of its skip connections."""
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, ResnetBlock2D):
                _zero(module.conv2)
            elif isinstance(module, Transformer2DModel):
                _zero(module.proj_out)
        _zero(unet.conv_out)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


def first_stage_from_ldm(
    *,
    embed_dim: int,
    ddconfig: Mapping[str, Any],
    n_embed: int | None = None,
    scaling_factor: float = 1.0,
    **fixed: Any,
) -> VQModel | AutoencoderKL:
    """Build the autoencoder of an ldm configuration.

    Args:
        embed_dim: Channels of the latents.
        ddconfig: Encoder and decoder: ch, ch_mult, num_res_blocks, z_channels, resolution, attn_resolutions,
            in_channels, out_ch, double_z.
        n_embed: Rows of the codebook; None: no codebook, but mean and variance (KL).
        scaling_factor: What raw latents are multiplied by. PathLDM uses 1.0. No KL variant of it was
            published; there the usual choice is 1 / std of the first training batch.
        fixed: Further keys of ldm: those of the training (``lossconfig``, ``monitor``, ...), which describe
            no layer, and others at the values that this network has.

    Raises:
        ModelError: If the configuration describes another kind of network.
    """
    of_layers = {key: value for key, value in fixed.items() if key not in _STAGE_TRAINING}
    _check_fixed("autoencoder", of_layers, {"remap": (None,), "sane_index_shape": (False,)})
    is_vq = n_embed is not None
    known = {"ch", "ch_mult", "num_res_blocks", "z_channels", "resolution", "attn_resolutions"}
    known |= {"in_channels", "out_ch", "double_z"}
    if missing := known - set(ddconfig) - {"double_z"}:
        raise ModelError(f"the configuration of the autoencoder lacks {', '.join(sorted(missing))}.")
    others = {key: value for key, value in ddconfig.items() if key not in known}
    _check_fixed("autoencoder", others, _STAGE_FIXED)
    if bool(ddconfig.get("double_z", not is_vq)) is is_vq:
        raise ModelError(
            f"double_z is {ddconfig['double_z']} and n_embed {n_embed}: an encoder returns mean and variance "
            "(double_z, no codebook), or one tensor for a codebook (n_embed)."
        )
    widths = [int(ddconfig["ch"]) * factor for factor in ddconfig["ch_mult"]]
    if any(width % 32 for width in widths):
        raise ModelError(
            f"levels {widths} wide cannot be built: every width (ch times ch_mult) must be a multiple of 32, "
            "the groups of a normalisation."
        )
    attended = [
        ddconfig["resolution"] // 2**level in ddconfig["attn_resolutions"] for level in range(len(widths))
    ]
    latent_channels = int(ddconfig["z_channels"])
    if not is_vq and embed_dim != latent_channels:
        raise ModelError(
            f"embed_dim {embed_dim} differs from z_channels {latent_channels}: diffusers' AutoencoderKL has "
            "no layer between the two."
        )
    settings: dict[str, Any] = {
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if yes else "DownEncoderBlock2D" for yes in attended
        ),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if yes else "UpDecoderBlock2D" for yes in reversed(attended)
        ),
        "block_out_channels": tuple(widths),
        "layers_per_block": ddconfig["num_res_blocks"],
        "latent_channels": latent_channels,
        "sample_size": ddconfig["resolution"],
        "norm_num_groups": 32,
        "scaling_factor": scaling_factor,
    }
    if is_vq:
        return VQModel(**settings, num_vq_embeddings=n_embed, vq_embed_dim=embed_dim)
    return AutoencoderKL(**settings)


def _check_fixed(what: str, given: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    wrong = [
        f"{key}={value!r}" + (f" (not {fixed[key][0]!r})" if key in fixed else " (not known)")
        for key, value in given.items()
        if key not in fixed or value not in fixed[key]
    ]
    if wrong:
        raise ModelError(f"the {what} of this configuration is not one built here: {', '.join(wrong)}.")


class ClassEmbedder(StrictModel):
    """One token per class: the condition of PathLDM without text.

    Classes are ``2 * tumour + TIL`` (see :func:`pixcell.models.prompts.class_label`); the last is "no class".

    Args:
        n_classes: Rows, "no class" included.
        embed_dim: Width of a token; the U-Net's ``context_dim``.
    """

    @register_to_config
    def __init__(self, n_classes: int = 5, embed_dim: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    @property
    def unconditional_label(self) -> int:
        """The class that stands for "no class"."""
        return int(self.config.n_classes) - 1

    def forward(self, labels: Int[Tensor, " batch"]) -> Float[Tensor, "batch 1 dim"]:
        """Return the token of each sample.

        Raises:
            ModelError: If there is no such class.
        """
        classes = int(self.config.n_classes)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ModelError(f"the classes {labels.tolist()} were given; the model knows 0 to {classes - 1}.")
        return self.embedding(labels)[:, None]
