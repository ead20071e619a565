"""The blocks of the denoiser, and what of them need not be computed at every token and every step.

A block is PixArt's: attention over image tokens, attention over condition tokens, MLP; the timestep modulates
the first and the last. Two things follow from its formulas alone, whatever the weights:

**One condition token.** Softmax over a single score is 1, so every image token receives the same vector,
``to_out(to_v(condition))``. It depends on neither the image tokens nor the timestep; queries, keys and scores
are never computed. Their weights cannot influence the output, so their gradient is exactly zero: they get
gradients of zeros, as from the full computation (where a kernel may leave rounding noise), and optimisers,
weight decay and data-parallel training go on as before.

**Any number of tokens.** Keys and values depend on the condition alone: :meth:`PixCellBlock.prepare` makes
them once for a sampling.

Source: Chen et al. 2023, "PixArt-alpha" (https://arxiv.org/abs/2310.00426), section 2.3.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_sincos_pos_embed_from_grid
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "BlockCondition",
    "ConditionPositions",
    "ConditionProjection",
    "ImageAttention",
    "PixCellBlock",
    "PreparedCondition",
    "TimeModulation",
    "condition_positions",
    "modulated",
]

_FEW_TOKENS = 128


class BlockCondition(NamedTuple):
    """A condition as the cross-attention of one block sees it, made by :meth:`PixCellBlock.prepare`."""

    value: Tensor
    """Of one token, what every image token receives: (batch, 1, width). Of more: (batch, heads, tokens, head
    width)."""
    key: Tensor | None = None
    """Like the values; None for one token."""


class TimeModulation(NamedTuple):
    """What timesteps do to the model; made by ``PixCellTransformer2DModel.modulation``."""

    blocks: Tensor
    """Shifts, scales and gates that all blocks share, (rows, 6 widths)."""
    output: Tensor
    """What the last layer is modulated by, (rows, width)."""

    def row(self, number: int) -> "TimeModulation":
        """Return one timestep's, for all samples."""
        return TimeModulation(*(part[number : number + 1] for part in self))


@dataclass(frozen=True)
class PreparedCondition:
    """A condition as the blocks see it, for as many forward passes as wanted.

    Made by ``PixCellTransformer2DModel.prepare``; it holds good for these weights only.
    """

    blocks: tuple[BlockCondition, ...]
    """One for each block."""
    batch_size: int
    """Number of samples."""

    @property
    def num_bytes(self) -> int:
        """Memory of its tensors."""
        tensors = [tensor for block in self.blocks for tensor in block if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class PixCellBlock(BasicTransformerBlock):
    """One block of the denoiser: diffusers' own, tensor for tensor, without its repetitions.

    It is made with ``norm_type="ada_norm_single"`` and a ``cross_attention_dim``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn1.set_processor(ImageAttention())

    def forward(
        self,
        hidden_states: Float[Tensor, "batch image_tokens width"],
        encoder_hidden_states: Tensor | BlockCondition,
        modulation: Float[Tensor, "rows six_widths"],
        residual: Tensor | None = None,
    ) -> Float[Tensor, "batch image_tokens width"]:
        """Let image tokens look at each other, then at the condition.

        Args:
            hidden_states: Image tokens.
            encoder_hidden_states: The projected condition, (batch, tokens, width), or what :meth:`prepare`
                made of it.
            modulation: Shift, scale and gate of attention, then of the MLP; one row for all, or one each.
            residual: Added to the output, as control branches do. Inside the block, because caches that skip
                blocks would otherwise count it twice.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (
            self.scale_shift_table + modulation.unflatten(1, (6, -1))
        ).chunk(6, dim=1)
        attended = self.attn1(modulated(self.norm1, hidden_states, shift_a, scale_a))
        hidden_states = torch.addcmul(hidden_states, gate_a, attended)
        hidden_states = hidden_states + self._cross_attention(hidden_states, encoder_hidden_states)
        forwarded = self.ff(modulated(self.norm2, hidden_states, shift_f, scale_f))
        hidden_states = torch.addcmul(hidden_states, gate_f, forwarded)
        return hidden_states if residual is None else hidden_states + residual.to(hidden_states.dtype)

    def prepare(self, condition: Float[Tensor, "batch tokens width"]) -> BlockCondition:
        """Return all that this block's cross-attention needs of a projected condition."""
        attention = self.attn2
        if condition.shape[1] == 1 and not _draws(attention.to_out):
            constant = _output(attention, attention.to_v(condition))
            return BlockCondition(
                _Uninfluenced.apply(constant, *attention.to_q.parameters(), *attention.to_k.parameters())
            )
        key, value = (
            projected.unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for projected in (attention.to_k(condition), attention.to_v(condition))
        )
        return BlockCondition(value, key)

    def _cross_attention(self, hidden_states: Tensor, condition: Tensor | BlockCondition) -> Tensor:
        value, key = condition if isinstance(condition, BlockCondition) else self.prepare(condition)
        if key is None:
            return value
        attention = self.attn2
        query = attention.to_q(hidden_states).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return _output(attention, attended.transpose(1, 2).flatten(2))


class ImageAttention:
    """Lets image tokens look at each other: diffusers' processor, for attention of this one kind.

    On a processor, fused attention of few tokens is two to three times as fast in float32 as in bfloat16 when
    gradients are wanted (and as fast from some hundred tokens on): there it is computed in float32.
    """

    def __call__(
        self,
        attention: Any,
        hidden_states: Float[Tensor, "batch tokens width"],
        encoder_hidden_states: None = None,
        attention_mask: None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Return what the tokens receive from each other. The last two are what diffusers passes along."""
        query, key, value = (
            project(hidden_states).unflatten(2, (attention.heads, -1)).transpose(1, 2)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        if _is_faster_in_float32(query):
            with torch.autocast("cpu", enabled=False):
                attended = functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
            attended = attended.to(query.dtype)
        else:
            attended = functional.scaled_dot_product_attention(query, key, value)
        return _output(attention, attended.transpose(1, 2).flatten(2))


def _is_faster_in_float32(query: Tensor) -> bool:
    few = query.shape[2] <= _FEW_TOKENS
    return few and query.requires_grad and query.dtype is torch.bfloat16 and query.device.type == "cpu"


TransformerBlockRegistry.register(
    # What diffusers' caches (first-block and others) ask of a block: its output is the hidden states alone.
    PixCellBlock,
    TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)


class ConditionProjection(PixArtAlphaTextProjection):
    """Embeddings to model width, one by one; keeps the tokens that stand for "no condition" beside it.

    Args:
        in_features: Width of an embedding.
        hidden_size: Width of the model.
        num_tokens: Number of condition tokens.
        learned: Whether the "no condition" tokens are trained, or a constant random vector as published.
    """

    def __init__(self, in_features: int, hidden_size: int, num_tokens: int, learned: bool) -> None:
        super().__init__(in_features=in_features, hidden_size=hidden_size)
        unconditional = torch.randn(num_tokens, in_features) / math.sqrt(in_features)
        if learned:
            self.uncond_embedding = nn.Parameter(unconditional)
        else:
            self.register_buffer("uncond_embedding", unconditional)

    def tokens(self) -> Float[Tensor, "tokens dim"]:
        """Return the "no condition" tokens, also while weights are kept elsewhere (sequential offload)."""
        hook = getattr(self, "_hf_hook", None)
        if self.uncond_embedding.is_meta and hook is not None:
            kept: Tensor = hook.weights_map["uncond_embedding"]
            return kept
        return self.uncond_embedding


class ConditionPositions(nn.Module):
    """The table added to condition tokens. Part of the weights: published ones bring their own."""

    def __init__(self, table: Float[Tensor, "1 tokens dim"]) -> None:
        super().__init__()
        self.y_pos_embed: Tensor
        self.register_buffer("y_pos_embed", table)

    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Return the tokens with their positions, in the tokens' own precision."""
        return tokens + self.y_pos_embed.to(tokens.dtype)


def condition_positions(
    dim: int, num_tokens: int, latent_grid: int, interpolation_scale: float
) -> Float[Tensor, "1 tokens {dim}"]:
    """Return the position table of condition tokens: sines and cosines of the middles of their fields.

    The coordinates are those of the latent positions, ``latent_grid / interpolation_scale`` long: for the
    published 512 model the fields are centred at 8 and 24, for 1024 at 4, 12, 20 and 28. (The reference
    writes the offset as ``latent_grid // tokens``, the centre where the interpolation is half the grid side,
    as in its stages; and its diffusers class divides by 2 whatever the interpolation is, which misplaces the
    tokens of a 512 model.)

    Args:
        dim: Width of an embedding.
        num_tokens: A square number; row-major.
        latent_grid: Image tokens along a side of the picture.
        interpolation_scale: As of the latent positions.
    """
    side = math.isqrt(num_tokens)
    step = latent_grid / side / interpolation_scale
    centres = torch.arange(side, dtype=torch.float32, device="cpu") * step + step / 2
    # the first half of the width encodes the column, the second the row
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"))
    return get_2d_sincos_pos_embed_from_grid(dim, grid).float()[None]


def modulated(
    norm: nn.LayerNorm,
    hidden_states: Float[Tensor, "batch tokens width"],
    shift: Float[Tensor, "rows 1 width"],
    scale: Float[Tensor, "rows 1 width"],
) -> Float[Tensor, "batch tokens width"]:
    """Return ``norm(hidden_states) * (1 + scale) + shift``: adaptive layer norm.

    With one row for all, this is a plain layer norm with weights, which runs in one pass over memory.
    """
    if len(shift) == 1 and norm.weight is None and scale.dtype == hidden_states.dtype:
        shape = norm.normalized_shape
        return functional.layer_norm(hidden_states, shape, 1 + scale[0, 0], shift[0, 0], norm.eps)
    return norm(hidden_states) * (1 + scale) + shift


def _output(attention: Any, attended: Tensor) -> Tensor:
    projection, dropout = attention.to_out
    return dropout(projection(attended))


def _draws(module: nn.Module) -> bool:
    """Whether a module, or an adapter on it, drops values at random now: then image tokens differ."""
    return module.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())


class _Uninfluenced(torch.autograd.Function):
    """Return the first input; give the others, which have no influence on it, gradients of zeros.

    Without a gradient at all, data-parallel training would wait for one.
    """

    @staticmethod
    def forward(output: Tensor, *parameters: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.kinds = [(parameter.shape, parameter.dtype, parameter.device) for parameter in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradient, *(
            torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.kinds
        )
