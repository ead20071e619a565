"""Configurations of published weights, read off names and shapes where a file comes without one.

What shapes do not tell follows the rules of the published models:

    heads            72 wide (64 in UNI2-h)
    interpolation    read off the stored position table; without one, latents / 64
    latents          side from the stored position table; without one, 32 for each field of the condition
    scale of latents that of Stable Diffusion 3 and 3.5 for 16 channels; of others it must be given

Every function also returns what it assumed, for people.

Source: the parameter lists of the published models, which tests compare in both directions.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pixcell.errors import ModelError, WrongWeights
from pixcell.models.published_layouts import diffusers_from_original

__all__ = [
    "PUBLISHED_HEAD_WIDTH",
    "config_from_original",
    "config_of_autoencoder",
    "config_of_controlnet",
    "config_of_original",
    "config_of_transformer",
    "uni_arguments",
]

PUBLISHED_HEAD_WIDTH = 72
_UNI_HEAD_WIDTH = 64
_LATENTS_PER_FIELD = 32
_UNIT_LATENTS = 64  # the published stage with interpolation 1
_POSITIONS = "pos_embed"
_BLOCK = re.compile(r"(?:transformer_)?blocks\.(\d+)\.(.+)")


def config_from_original(
    *,
    input_size: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    patch_size: int = 2,
    in_channels: int = 4,
    mlp_ratio: float = 4.0,
    pred_sigma: bool = True,
    caption_channels: int = 1536,
    pe_interpolation: float = 1.0,
    model_max_length: int = 1,
    use_cond_pos_embed: bool = False,
    qk_norm: bool = False,
    class_dropout_prob: float = 0.1,
) -> dict[str, Any]:
    """Translate a configuration of the original class to ours.

    Args:
        input_size: Side of the latents.
        hidden_size: Width.
        depth: Number of blocks.
        num_heads: Heads of both attentions.
        patch_size: Side of a latent patch.
        in_channels: Channels of the latents.
        mlp_ratio: Only 4.
        pred_sigma: Whether the variance is learned.
        caption_channels: Width of an embedding.
        pe_interpolation: Of the positions.
        model_max_length: Number of condition tokens.
        use_cond_pos_embed: Whether the condition has positions. Without, weights bring a table of zeros.
        qk_norm: Only False.
        class_dropout_prob: Of training; no part of the architecture.

    Raises:
        ModelError: If our class does not have what is asked for.
    """
    del class_dropout_prob
    if mlp_ratio != 4 or qk_norm:
        raise ModelError(
            f"mlp_ratio {mlp_ratio} with qk_norm {qk_norm} is no published PixCell model; "
            "they have 4 and no norm of queries and keys."
        )
    if hidden_size % num_heads:
        raise ModelError(f"a width of {hidden_size} is no whole number of {num_heads} heads.")
    if use_cond_pos_embed and model_max_length == 1:
        raise ModelError("a single condition token has no position; set use_cond_pos_embed to false.")
    return {
        "num_attention_heads": num_heads,
        "attention_head_dim": hidden_size // num_heads,
        "in_channels": in_channels,
        "out_channels": in_channels * 2 if pred_sigma else in_channels,
        "num_layers": depth,
        "cross_attention_dim": hidden_size,
        "sample_size": input_size,
        "patch_size": patch_size,
        "interpolation_scale": pe_interpolation,
        "caption_channels": caption_channels,
        "caption_num_tokens": model_max_length,
    }


def config_of_original(
    state: Mapping[str, Tensor], num_attention_heads: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of weights in the original layout, and what was assumed.

    Args:
        state: Tensors by name; on the meta device, positions cannot be read and the rules hold.
        num_attention_heads: Which no shape tells; None: heads 72 wide.

    Raises:
        ModelError: If heads are not 72 wide and their number is not given.
        WrongWeights: If these are no such weights.
    """
    config, assumed = config_of_transformer(diffusers_from_original(state), num_attention_heads)
    if _POSITIONS not in state:
        return config, assumed
    table = state[_POSITIONS]
    side = math.isqrt(table.shape[-2])
    config["sample_size"] = side * config["patch_size"]
    config["interpolation_scale"] = (
        config["sample_size"] / _UNIT_LATENTS if table.is_meta or side == 1 else _interpolation(table, side)
    )
    return config, [text for text in assumed if not text.startswith("latents")]


def _interpolation(table: Tensor, side: int) -> float:
    """Read the interpolation off a position table.

    The first half of the width encodes the column: sines, then cosines, of the coordinate times falling
    frequencies. At the lowest one the whole range is a small angle.
    """
    width = table.shape[-1]
    quarter = width // 4
    last = table.reshape(-1, width)[side - 1].double()  # last column of the first row
    angle = torch.atan2(last[quarter - 1], last[2 * quarter - 1]).item()
    frequency = 10000 ** (-(quarter - 1) / quarter)
    if not angle > 0:
        raise WrongWeights(f"{_POSITIONS} holds no sines and cosines of positions; the file is damaged.")
    interpolation = (side - 1) * frequency / angle
    # A table in half precision tells it to three digits; published values are powers of two.
    power = 2.0 ** round(math.log2(interpolation))
    return power if abs(interpolation / power - 1) < 5e-3 else float(f"{interpolation:.5g}")


def config_of_transformer(
    state: Mapping[str, Tensor], num_attention_heads: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of a denoiser whose weights have these names and shapes, and what was assumed.

    Args:
        state: Named as in our class; also those of its control branch.
        num_attention_heads: Which no shape tells; None: heads 72 wide.

    Raises:
        ModelError: If heads are not 72 wide and their number is not given.
        WrongWeights: If these are no such weights.
    """
    try:
        width, in_channels, patch_size, _ = state["pos_embed.proj.weight"].shape
        tokens, caption_channels = state["caption_projection.uncond_embedding"].shape
        outputs = state["proj_out.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise WrongWeights(f"these are no weights of a PixCell denoiser: {error}.") from error
    heads, assumed = _heads(width, num_attention_heads)
    side = _LATENTS_PER_FIELD * math.isqrt(tokens)
    assumed.append(f"latents of {side} x {side}, {_LATENTS_PER_FIELD} for each of the {tokens} fields")
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": outputs // patch_size**2,
        "num_layers": _count(state, _BLOCK),
        "cross_attention_dim": width,
        "sample_size": side,
        "patch_size": patch_size,
        "interpolation_scale": side / _UNIT_LATENTS,
        "caption_channels": caption_channels,
        "caption_num_tokens": tokens,
    }, assumed


def config_of_controlnet(
    state: Mapping[str, Tensor], num_attention_heads: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of a control branch; arguments and errors as of :func:`config_of_transformer`.

    The denoiser that it controls is taken to have one block more, as the published one.
    """
    config, assumed = config_of_transformer(state, num_attention_heads)
    blocks = config["num_layers"]
    assumed.append(f"a denoiser of {blocks + 1} blocks, one more than the branch")
    return {**config, "num_layers": blocks + 1, "n_controlnet_blocks": blocks}, assumed


def config_of_autoencoder(
    state: Mapping[str, Tensor], given: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration of an ``AutoencoderKL`` whose weights have these names and shapes.

    How latents are scaled is in no tensor. Without convolutions around the latents and with 16 channels it is
    that of Stable Diffusion 3 and 3.5; of others it must be given.

    Args:
        state: Named as in diffusers.
        given: Entries that are known, above all ``scaling_factor`` and ``shift_factor``.

    Raises:
        ModelError: If the scale is not known.
        WrongWeights: If these are no such weights, or have attention inside levels or a codebook.
    """
    given = given or {}
    widths = [
        state[name].shape[0]
        for level in range(_count(state, re.compile(r"encoder\.down_blocks\.(\d+)\.(.+)")))
        if (name := f"encoder.down_blocks.{level}.resnets.0.conv1.weight") in state
    ]
    foreign = [name for name in state if ".attentions." in name and "mid_block" not in name]
    if not widths or foreign or "decoder.conv_in.weight" not in state or "quantize.embedding.weight" in state:
        raise WrongWeights("these are no weights of a plain AutoencoderKL; put its config.json beside them.")
    channels = state["decoder.conv_in.weight"].shape[1]
    scale: dict[str, Any] = {
        "scaling_factor": given.get("scaling_factor"),
        "shift_factor": given.get("shift_factor"),
    }
    assumed = []
    if scale["scaling_factor"] is None:
        if channels != 16 or "quant_conv.weight" in state:
            raise ModelError(
                f"an autoencoder with {channels} channels was given without its configuration, and no tensor "
                "tells how its latents are scaled. Put its config.json beside the file, or give "
                "--set config={scaling_factor: ...}."
            )
        scale = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
        assumed = ["latents scaled as in Stable Diffusion 3 and 3.5 (1.5305, shifted by 0.0609)"]
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": _count(state, re.compile(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.(.+)")),
        "latent_channels": channels,
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": any("mid_block.attentions" in name for name in state),
        "force_upcast": True,
        "sample_size": 1024,
        **scale,
    }, assumed


def uni_arguments(
    state: Mapping[str, Tensor], published: Mapping[str, Any], num_heads: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments of timm for weights of UNI2-h, or of a smaller network of its kind.

    Args:
        state: Named as in timm.
        published: Arguments of UNI2-h, which hold for all that is no size.
        num_heads: Which no shape tells; None: heads 64 wide.

    Raises:
        ModelError: If heads are not 64 wide and their number is not given.
        WrongWeights: If these are no such weights.
    """
    try:
        width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1])
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        sizes = {
            "img_size": side * patch_size,
            "patch_size": patch_size,
            "depth": _count(state, _BLOCK),
            "embed_dim": width,
            "reg_tokens": state["reg_token"].shape[1],
        }
    except (KeyError, ValueError) as error:
        raise WrongWeights(f"these are no weights of UNI2-h: {error}.") from error
    if width == published["embed_dim"] and num_heads is None:
        num_heads = published["num_heads"]
    if num_heads is None and width % _UNI_HEAD_WIDTH:
        raise ModelError(
            f"the weights are {width} wide, and no shape tells the number of attention heads. UNI2-h has "
            f"heads {_UNI_HEAD_WIDTH} wide; for others give it with --heads."
        )
    heads = num_heads or width // _UNI_HEAD_WIDTH
    # timm multiplies and cuts off; half a unit more than exact is the number that comes out
    ratio = (
        published["mlp_ratio"] if int(width * published["mlp_ratio"]) == hidden else (hidden + 0.5) / width
    )
    return {**published, **sizes, "num_heads": heads, "mlp_ratio": ratio}, []


def _heads(width: int, given: int | None) -> tuple[int, list[str]]:
    if given is not None:
        if given < 1 or width % given:
            raise ModelError(f"a width of {width} is no whole number of {given} heads.")
        return given, []
    if width % PUBLISHED_HEAD_WIDTH:
        raise ModelError(
            f"the weights are {width} wide, and no shape tells the number of attention heads. Published "
            f"models have heads {PUBLISHED_HEAD_WIDTH} wide; for others give it with --heads."
        )
    return width // PUBLISHED_HEAD_WIDTH, [
        f"{width // PUBLISHED_HEAD_WIDTH} attention heads, {PUBLISHED_HEAD_WIDTH} wide"
    ]


def _count(state: Mapping[str, Tensor], pattern: re.Pattern[str]) -> int:
    """Return how many different numbers names have in this place."""
    return len({match[1] for match in map(pattern.fullmatch, state) if match})
