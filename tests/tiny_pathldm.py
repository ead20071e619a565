"""Tiny real parts of PathLDM, for tests of the rooms that use them."""

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel

from pixcell.models.pathldm import first_stage_from_ldm, unet_from_ldm
from tiny_models import awake

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789;,."
WIDTH = 16
"""Of a token state."""


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """Return CLIP's tokenizer with the smallest vocabulary: one token per letter."""
    from transformers import CLIPTokenizer

    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], pad_token=pad_token
    )


def tiny_text_tower(**changes: Any) -> Any:
    """Return a text tower for :func:`tiny_tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    settings = {
        "vocab_size": 2 * len(LETTERS) + 2,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": 2 * len(LETTERS),
        "eos_token_id": 2 * len(LETTERS) + 1,
    }
    return awake(CLIPTextModel(CLIPTextConfig(**(settings | changes))))


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """Return a U-Net of 8 x 8 latents with 3 channels."""
    torch.manual_seed(1)
    settings = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 1,
        "context_dim": WIDTH,
    }
    return awake(unet_from_ldm(**(settings | changes)))


def tiny_first_stage(n_embed: int | None = 32, **changes: Any) -> VQModel | AutoencoderKL:
    """Return an autoencoder of factor 4, with a codebook unless ``n_embed`` is None."""
    torch.manual_seed(2)
    settings = {
        "double_z": n_embed is None,
        "z_channels": 3,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return awake(first_stage_from_ldm(embed_dim=3, n_embed=n_embed, ddconfig=settings | changes))
