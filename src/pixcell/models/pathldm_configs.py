"""Configurations of latent diffusion ("ldm"): those of PathLDM, and what the shapes of a file say of its own.

The keys are those of ldm's configuration files. A released checkpoint comes without one, but nearly all of it
is in the names and shapes of its tensors; what is not (number of heads, size of the pictures) is an argument.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pixcell.errors import ModelError, WrongWeights

__all__ = [
    "PATHLDM_FIRST_STAGES",
    "PATHLDM_UNET",
    "first_stage_config_of",
    "text_config_of",
    "unet_config_of",
]

PATHLDM_UNET: dict[str, Any] = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 192,
    "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 3, 5],
    "num_heads": 1,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 512,
}
"""The U-Net of all released PathLDM models, and of the ImageNet model they started from."""


_CLIP_HEAD_WIDTH = 64


def _stage(
    channels: int, multipliers: Sequence[int], codes: int | None, attended: Sequence[int]
) -> dict[str, Any]:
    return {
        "embed_dim": channels,
        **({} if codes is None else {"n_embed": codes}),
        "ddconfig": {
            "double_z": codes is None,
            "z_channels": channels,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": list(multipliers),
            "num_res_blocks": 2,
            "attn_resolutions": list(attended),
            "dropout": 0.0,
        },
    }


PATHLDM_FIRST_STAGES: dict[str, dict[str, Any]] = {
    "vq-f4": _stage(3, (1, 2, 4), 8192, ()),
    "vq-f8": _stage(4, (1, 2, 2, 4), 16384, (32,)),
    "kl-f4": _stage(3, (1, 2, 4), None, ()),
    "kl-f8": _stage(4, (1, 2, 4, 4), None, ()),
}
"""First stages by name. All released models use vq-f4."""


# ── read off the shapes of a file ────────────────────────────────────────────────────────────────────


def unet_config_of(
    state: Mapping[str, Tensor], *, num_heads: int = 1, image_size: int = 64
) -> dict[str, Any]:
    """Return the ldm configuration of a U-Net whose weights have these names and shapes.

    Args:
        state: Named as in ldm, without prefix.
        num_heads: No shape tells it; PathLDM and the ImageNet model it started from have 1.
        image_size: No shape tells it; 64 latents are 256 px in PathLDM.

    Raises:
        WrongWeights: If these are no weights of such a network.
    """
    try:
        width = state["input_blocks.0.0.weight"].shape[0]
        levels = _levels(state)
        transformer = "middle_block.1.transformer_blocks"
        return {
            "image_size": image_size,
            "in_channels": state["input_blocks.0.0.weight"].shape[1],
            "out_channels": state["out.2.weight"].shape[0],
            "model_channels": width,
            "attention_resolutions": [2**level for level, (_, _, attended) in enumerate(levels) if attended],
            "num_res_blocks": levels[0][1],
            "channel_mult": [channels // width for channels, _, _ in levels],
            "num_heads": num_heads,
            "use_spatial_transformer": True,
            "transformer_depth": _count(state, rf"{re.escape(transformer)}\.(\d+)\."),
            "context_dim": state[f"{transformer}.0.attn2.to_k.weight"].shape[1],
        }
    except (KeyError, IndexError) as error:
        raise WrongWeights(
            f"these are no weights of an ldm U-Net with cross-attention: no {error}."
        ) from error


def _levels(state: Mapping[str, Tensor]) -> list[tuple[int, int, bool]]:
    """Return width, number of residual blocks, and whether there is attention, of each level."""
    levels: list[tuple[int, int, bool]] = []
    blocks: list[tuple[int, bool]] = []
    for number in range(1, _count(state, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{number}.0.op.weight" in state:  # a level ends
            levels.append((blocks[0][0], len(blocks), blocks[0][1]))
            blocks = []
        else:
            channels = state[f"input_blocks.{number}.0.out_layers.3.weight"].shape[0]
            blocks.append((channels, f"input_blocks.{number}.1.proj_in.weight" in state))
    return [*levels, (blocks[0][0], len(blocks), blocks[0][1])]


def first_stage_config_of(state: Mapping[str, Tensor], *, resolution: int = 256) -> dict[str, Any]:
    """Return the ldm configuration of an autoencoder whose weights have these names and shapes.

    Args:
        state: Named as in ldm, without prefix.
        resolution: Side of the pictures it was trained on. No shape tells it, and it changes no result.

    Raises:
        WrongWeights: If these are no weights of such a network.
    """
    try:
        width = state["encoder.conv_in.weight"].shape[0]
        levels = range(_count(state, r"encoder\.down\.(\d+)\."))
        z_channels = state["decoder.conv_in.weight"].shape[1]
        codebook = state.get("quantize.embedding.weight")
        return {
            "embed_dim": state["post_quant_conv.weight"].shape[1],
            **({} if codebook is None else {"n_embed": codebook.shape[0]}),
            "ddconfig": {
                "double_z": state["encoder.conv_out.weight"].shape[0] == 2 * z_channels,
                "z_channels": z_channels,
                "resolution": resolution,
                "in_channels": state["encoder.conv_in.weight"].shape[1],
                "out_ch": state["decoder.conv_out.weight"].shape[0],
                "ch": width,
                "ch_mult": [
                    state[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] // width for level in levels
                ],
                "num_res_blocks": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
                "attn_resolutions": [
                    resolution // 2**level
                    for level in levels
                    if f"encoder.down.{level}.attn.0.q.weight" in state
                ],
                "dropout": 0.0,
            },
        }
    except (KeyError, IndexError) as error:
        raise WrongWeights(f"these are no weights of an ldm autoencoder: no {error}.") from error


def text_config_of(state: Mapping[str, Tensor], *, num_heads: int | None = None) -> dict[str, Any]:
    """Return the configuration of a CLIP text tower whose weights have these names and shapes.

    Args:
        state: Named as in ldm, without the prefix ``cond_stage_model.transformer.``.
        num_heads: No shape tells it; None: heads 64 wide, as CLIP's.

    Raises:
        ModelError: If heads are not 64 wide and their number is not given.
        WrongWeights: If these are no weights of such a tower.
    """
    try:
        vocab_size, width = state["text_model.embeddings.token_embedding.weight"].shape
        if width % (num_heads or _CLIP_HEAD_WIDTH):
            raise ModelError(
                f"the text tower is {width} wide, no whole number of "
                + (f"{num_heads} heads" if num_heads else f"heads {_CLIP_HEAD_WIDTH} wide as CLIP's")
                + "; no shape tells how many it has. Give --set config={text_num_attention_heads: ...}."
            )
        return {
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": _count(state, r"text_model\.encoder\.layers\.(\d+)\."),
            "num_attention_heads": num_heads or width // _CLIP_HEAD_WIDTH,
            "max_position_embeddings": state["text_model.embeddings.position_embedding.weight"].shape[0],
            # Begin and end are the last two words of CLIP's vocabulary.
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
        }
    except KeyError as error:
        raise WrongWeights(f"these are no weights of a CLIP text tower: no {error}.") from error


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many different numbers names have in this place."""
    matches = (re.match(pattern, name) for name in state)
    return len({match[1] for match in matches if match})
