"""Tiny real models for tests of the rooms that sample."""

import torch
from diffusers import AutoencoderKL
from torch import nn

from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.transformer import PixCellTransformer2DModel


def awake(model: nn.Module) -> nn.Module:
    """Open what starts at zero, so that every input matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_transformer(**changes: object) -> PixCellTransformer2DModel:
    """Return a denoiser of 128-pixel pictures with 2 x 2 fields, embeddings 12 wide."""
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 32,
        "sample_size": 16,
        "caption_channels": 12,
        "caption_num_tokens": 4,
    }
    return awake(PixCellTransformer2DModel(**(settings | changes)))


def tiny_controlnet(**changes: object) -> PixCellControlNetModel:
    """Return a control branch of one block for :func:`tiny_transformer`."""
    transformer = tiny_transformer()
    torch.manual_seed(2)
    return awake(PixCellControlNetModel.from_transformer(transformer, **changes))


def tiny_vae() -> TissueAutoencoder:
    """Return an autoencoder with 4 latent channels."""
    torch.manual_seed(1)
    return TissueAutoencoder(
        latent_channels=4, channels=(8, 16), num_blocks=1, scaling_factor=0.7, shift_factor=0.1
    )


def tiny_kl_vae(**changes: object) -> AutoencoderKL:
    """Return an autoencoder of the published family: 4 latent channels, pictures halved three times."""
    torch.manual_seed(3)
    settings = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**(settings | changes)).eval()
