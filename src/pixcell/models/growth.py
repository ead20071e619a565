"""From one size to the next: a denoiser of 512 pixels that starts from the weights of one of 256."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor

from pixcell.errors import ModelError

__all__ = ["GrowthReport", "grow"]

Model = TypeVar("Model", bound=ModelMixin)


@dataclass(frozen=True)
class GrowthReport:
    """What became of each tensor when a model grew."""

    carried: tuple[str, ...]
    """Copied bit for bit."""
    rebuilt: Mapping[str, str] = field(default_factory=dict)
    """Made anew for the new size, and how."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """In the old model only, and why."""

    def __str__(self) -> str:
        """One line for a log."""
        parts = [f"{len(self.carried)} tensors carried"]
        parts += [f"rebuilt {name}: {how}" for name, how in self.rebuilt.items()]
        parts += [f"dropped {name}: {why}" for name, why in self.dropped.items()]
        return "; ".join(parts)


def grow(
    model: Model,
    sample_size: int,
    caption_num_tokens: int,
    interpolation_scale: float | None = None,
    redraw_unconditional: bool = False,
) -> tuple[Model, GrowthReport]:
    """Return a denoiser for another size, as :meth:`PixCellTransformer2DModel.grown_to` says.

    Raises:
        ModelError: If one embedding grid is no whole multiple of the other, or the denoiser carries adapters
            that are not merged.
    """
    if adapters := list(getattr(model, "peft_config", {})):
        raise ModelError(
            f"the denoiser carries adapters ({', '.join(adapters)}), whose layers have other names. Merge "
            "them into the weights first (merge_lora), or take them out (unload_lora)."
        )
    config = model.config
    if interpolation_scale is None:
        interpolation_scale = config.interpolation_scale * sample_size / config.sample_size
    grown = type(model).from_config(
        config,
        sample_size=sample_size,
        caption_num_tokens=caption_num_tokens,
        interpolation_scale=interpolation_scale,
    )
    grown = grown.to(dtype=model.dtype, device=model.device).train(model.training)
    old, new = model.state_dict(), grown.state_dict()
    table, null = "y_pos_embed.y_pos_embed", "caption_projection.uncond_embedding"
    is_spread = caption_num_tokens != config.caption_num_tokens and not redraw_unconditional
    remade = {table, null} if is_spread or redraw_unconditional else {table}
    carried = tuple(name for name in old if name in new and name not in remade)
    state = {**new, **{name: old[name] for name in carried}}
    rebuilt = {"pos_embed.pos_embed": f"positions of {sample_size} x {sample_size} latents"}
    if table in new:
        rebuilt[table] = f"positions of {caption_num_tokens} condition tokens"
    if is_spread:
        state[null] = _spread(old[null], caption_num_tokens)
        rebuilt[null] = f"{config.caption_num_tokens} tokens spread over {caption_num_tokens}"
    elif redraw_unconditional:
        rebuilt[null] = f"{caption_num_tokens} tokens drawn anew"
    dropped = {name: "a single condition token has no position" for name in old if name not in new}
    grown.load_state_dict(state, strict=True)
    return grown, GrowthReport(carried, rebuilt, dropped)


def _spread(tokens: Float[Tensor, "old dim"], num_tokens: int) -> Float[Tensor, "new dim"]:
    """Stretch a square grid of tokens to another, each new one taking the old one under its middle."""
    old, new = math.isqrt(tokens.shape[0]), math.isqrt(num_tokens)
    if max(old, new) % min(old, new):
        raise ModelError(
            f"a {old} x {old} embedding grid cannot become {new} x {new}: "
            "one must be a multiple of the other."
        )
    places = (torch.arange(new, device=tokens.device) * 2 + 1) * old // (2 * new)
    return tokens.unflatten(0, (old, old))[places][:, places].flatten(0, 1)
