"""Representation alignment (REPA): what a denoiser has in mind of tissue, held against stored embeddings.

To denoise well, the middle of a denoiser must learn what it is looking at; an encoder that was trained on
tissue knows that already. So the image tokens behind one block are compared with embeddings of fine fields:

    alignment = mean over fine fields of (1 - cos(projector(mean of the tokens in the field), embedding))
    loss      = denoising loss + weight * alignment

The embeddings are a column like any other, encoded at a smaller field than the condition's:

    pixcell encode STORE --encoder uni2-h --field-size 64        # 4 x 4 of them under a field of 256 px

The projector is trained with the denoiser and kept in ``state/``; a model in use has none, so ``pipeline/``
is that of a run without alignment. It belongs to training alone and can end early (``until_step``).

Source: Yu et al. 2024, "Representation Alignment for Generation" (https://arxiv.org/abs/2410.06940), section
3: weight 0.5, the eighth of 28 blocks, three layers with SiLU between; one embedding per token there, of a
field per stored embedding here. Ending it early: Wang et al. 2025, "REPA Works Until It Doesn't"
(https://arxiv.org/abs/2505.16792).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from pixcell.config import Config
from pixcell.errors import RecipeError

__all__ = ["Alignment", "AlignmentConfig"]


class AlignmentConfig(Config):
    """What is compared with what, and how much it counts."""

    column: str
    """Column of embeddings. Of finer fields than the condition's, to say more than the condition does."""
    layer: int = Field(8, gt=0)
    """Block behind which image tokens are taken; the first is 1."""
    weight: float = Field(0.5, gt=0)
    """Of the alignment in the loss."""
    width: int | None = Field(None, gt=0)
    """Of the projector's two hidden layers. None: that of the denoiser."""
    until_step: int | None = Field(None, gt=0)
    """Steps after which it ends. None: it stays to the last."""

    def acts_at(self, step: int) -> bool:
        """Return whether it counts at a step; 0 is the first."""
        return self.until_step is None or step < self.until_step


class Alignment(nn.Module):
    """The projector, and the comparison.

    Args:
        config: What is compared with what.
        model_width: Of an image token.
        model_layers: Number of blocks of the denoiser.
        num_tokens: Image tokens of a field, a square number.
        num_embeddings: Embeddings of a field, a square number.
        dim: Of an embedding.

    Raises:
        RecipeError: If the denoiser has no such block, or tokens do not fall into the fields of embeddings.
    """

    def __init__(
        self,
        config: AlignmentConfig,
        model_width: int,
        model_layers: int,
        num_tokens: int,
        num_embeddings: int,
        dim: int,
    ) -> None:
        super().__init__()
        self.config = config
        if config.layer > model_layers:
            raise RecipeError(
                f"objective.alignment.layer {config.layer} is none of the {model_layers} blocks of the "
                "model: choose one of the first half or so."
            )
        tokens, fields = math.isqrt(num_tokens), math.isqrt(num_embeddings)
        if tokens % fields:
            raise RecipeError(
                f"objective.alignment.column {config.column!r} has {fields} x {fields} embeddings under a "
                f"field, among which {tokens} x {tokens} image tokens cannot be shared out evenly. Encode "
                "with a --field-size that is a multiple of a token's side in pixels, and divides the field."
            )
        width = config.width or model_width
        self.projector = nn.Sequential(
            nn.Linear(model_width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, dim),
        )

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        embedding_grid: Float[Tensor, "batch rows columns dim"],
    ) -> Float[Tensor, " batch"]:
        """Return one minus the mean cosine of each sample: 0 when all point the same way. Float32.

        Args:
            tokens: Image tokens behind the block, row-major.
            embedding_grid: Stored embeddings of the same field.
        """
        rows, columns = embedding_grid.shape[1:3]
        side = math.isqrt(tokens.shape[1])
        in_fields = tokens.unflatten(1, (rows, side // rows, columns, side // columns)).mean((2, 4))
        projected = self.projector(in_fields)
        with torch.autocast(tokens.device.type, enabled=False):
            return 1 - F.cosine_similarity(projected.float(), embedding_grid.float(), dim=-1).mean((1, 2))

    def at_rest(self) -> Tensor:
        """Return 0 in a way that gives every weight a gradient of zero.

        Data-parallel training waits for a gradient of each weight; after ``until_step`` this is theirs.
        """
        return torch.stack([0 * weight.sum() for weight in self.parameters()]).sum()
