"""Names of published PixCell weights in the two layouts they come in.

There are two layouts of the denoiser. The *original* one is that of the training code: projections of one
attention are stacked in one matrix, and position tables are stored. The *diffusers* one is that of our class.
Both hold the same numbers; a layout is a dictionary.

Source: the parameter lists of the published models, which tests compare in both directions.
"""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pixcell.errors import WrongWeights

__all__ = ["diffusers_from_original", "original_from_diffusers"]

# Modules of the original layout, and those of ours whose weights and biases it stacks in this order.
_MODULES = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_BLOCK_MODULES = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_TENSORS = {
    "y_embedder.y_embedding": "caption_projection.uncond_embedding",
    "y_pos_embed": "y_pos_embed.y_pos_embed",
    "final_layer.scale_shift_table": "scale_shift_table",
}
_POSITIONS = "pos_embed"
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_IN_OUR_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def diffusers_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the original layout, and take stacked projections apart (as views).

    The table of latent positions is dropped: it is computed. Where four or more condition tokens have no
    position table, a table of zeros says the same. Names that the layout does not have are kept, so that a
    check of names finds them.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == _POSITIONS:
            continue
        ours = _ours(name)
        pieces = (tensor,) if len(ours) == 1 else tensor.tensor_split(len(ours))
        converted |= dict(zip(ours, pieces, strict=True))
    null, table = converted.get(_TENSORS["y_embedder.y_embedding"]), _TENSORS["y_pos_embed"]
    if null is not None and null.shape[0] > 1 and table not in converted:
        converted[table] = torch.zeros_like(null)[None]
    return converted


def original_from_diffusers(
    state: Mapping[str, Tensor], positions: Float[Tensor, "1 tokens width"]
) -> dict[str, Tensor]:
    """Return our tensors in the original layout: for the original code.

    Args:
        state: Of a :class:`~pixcell.models.transformer.PixCellTransformer2DModel`.
        positions: Its table of latent positions, which the original layout stores
            (``transformer.pos_embed.pos_embed``).

    Raises:
        WrongWeights: If tensors are missing or unknown.
    """
    blocks = sorted({int(match[1]) for match in map(_IN_OUR_BLOCK.match, state) if match})
    originals = [f"{module}.{end}" for module in _MODULES for end in ("weight", "bias")]
    for block in blocks:
        originals += [
            f"blocks.{block}.{module}.{end}" for module in _BLOCK_MODULES for end in ("weight", "bias")
        ]
        originals.append(f"blocks.{block}.scale_shift_table")
    originals += [name for name, ours in _TENSORS.items() if ours in state or name != "y_pos_embed"]
    used = {ours for name in originals for ours in _ours(name)}
    wrong = sorted(used ^ set(state))
    if wrong:
        raise WrongWeights(
            f"{len(wrong)} tensors are not those of a PixCell denoiser ({', '.join(wrong[:3])}); "
            "only a denoiser without adapters has an original layout."
        )
    return {_POSITIONS: positions} | {
        name: torch.cat([state[ours] for ours in _ours(name)]) for name in originals
    }


def _ours(name: str) -> tuple[str, ...]:
    """Return our names of a tensor of the original layout; a foreign name as it is."""
    if name in _TENSORS:
        return (_TENSORS[name],)
    before, inner = "", name
    modules: Mapping[str, tuple[str, ...]] = _MODULES
    if match := _IN_BLOCK.fullmatch(name):
        before, modules, inner = f"transformer_blocks.{match[1]}.", _BLOCK_MODULES, match[2]
        if inner == "scale_shift_table":
            return (before + inner,)
    module, _, end = inner.rpartition(".")
    if module not in modules or end not in ("weight", "bias"):
        return (name,)
    return tuple(f"{before}{ours}.{end}" for ours in modules[module])
