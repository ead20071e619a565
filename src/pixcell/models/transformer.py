"""The denoiser: a PixArt transformer whose condition is a grid of embeddings instead of text.

Latents are cut into 2 x 2 patches, one token each. Every block attends over the image tokens, then over the
condition tokens (one per 256-pixel field of the picture), then runs an MLP; the timestep enters as one shared
modulation (adaLN-single). The output holds the predicted noise and, in a second half of the channels, how the
variance of a step lies between its two bounds.

Layers are diffusers' own. Configuration keys and parameter names are those of the published weights, so
these load as they are; ``caption_projection`` and ``uncond_embedding`` are their words, not ours.

**Positions.** Latent coordinates run from 0 to ``sample_size / patch_size / interpolation_scale``: 0 to 32 in
all published stages, so that a 256, 512 and 1024 model speak of the same square. The condition tokens sit in
the middle of their field, in the same coordinates.

**No condition.** Samples without a condition (``dropped``, or all where none is given) get the
``unconditional_embedding`` instead, *before* positions are added, in training and in sampling alike. The
reference adds positions in sampling only: its dropped condition and its null condition are two different
inputs. Its samples come from the order used here; ``unconditional_positions=False`` is its training.

**Once per sampling.** What a condition comes to in each block, and what timesteps come to, depend on no
latents: :meth:`PixCellTransformer2DModel.prepare` and :meth:`PixCellTransformer2DModel.modulation` compute
them, and the forward pass takes their results in place of the condition and the timestep.

Source: Chen et al. 2023, "PixArt-alpha" (https://arxiv.org/abs/2310.00426), sections 2.2 and 2.3;
Yellapragada et al. 2025, "PixCell" (https://arxiv.org/abs/2506.05127).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormSingle
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pixcell.errors import ModelError
from pixcell.models.blocks import (
    BlockCondition,
    ConditionPositions,
    ConditionProjection,
    PixCellBlock,
    PreparedCondition,
    TimeModulation,
    condition_positions,
    modulated,
)
from pixcell.models.configurations import StrictModel, check_architecture
from pixcell.models.growth import GrowthReport, grow
from pixcell.models.time_features import TimeFeatures

__all__ = [
    "GrowthReport",
    "PixCellTransformer2DModel",
    "PreparedCondition",
    "TimeModulation",
    "condition_positions",
]


class PixCellTransformer2DModel(StrictModel, PeftAdapterMixin, CacheMixin):
    """Predict noise (and variance) of latents from a timestep and the tokens of an embedding grid.

    Args:
        num_attention_heads: Heads of both attentions; width is heads times ``attention_head_dim``.
        attention_head_dim: Width of a head.
        in_channels: Channels of the latents.
        out_channels: Twice ``in_channels`` with learned variance (noise first), else ``in_channels``.
        num_layers: Number of blocks.
        dropout: In attention outputs and MLP. Published: 0.
        norm_num_groups: Kept for published configurations; no layer uses it.
        cross_attention_dim: Width of the projected condition; equals the model width.
        attention_bias: Biases of query, key and value.
        sample_size: Side of the latents trained on (32 for 256 pixels). Others run, on stretched positions.
        patch_size: Side of a latent patch.
        activation_fn: Of the MLP.
        num_embeds_ada_norm: Number of training timesteps; kept for published configurations.
        upcast_attention: Kept for published configurations; the attention kernels add up scores in float32.
        norm_type: Only ``"ada_norm_single"``.
        norm_elementwise_affine: Affine block norms. Published: off.
        norm_eps: Of the block norms.
        interpolation_scale: Grid steps per unit of the position coordinate; None: the published rule for
            512 pixels as 1, so ``sample_size / 64``.
        use_additional_conditions: Only False; size conditions belong to PixArt's text models.
        caption_channels: Width of an embedding.
        attention_type: Only ``"default"``.
        caption_num_tokens: Number of condition tokens, a square number: 1, 4 or 16 in the published stages.
        learn_unconditional_embedding: Train the "no condition" tokens. Published: a constant random vector.
        unconditional_positions: Add positions to the "no condition" tokens of dropped samples too.

    Raises:
        ModelError: If the values cannot make a model.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("PixCellBlock", "PatchEmbed")
    _repeated_blocks = ("PixCellBlock",)
    _skip_layerwise_casting_patterns = ("pos_embed", "norm", "adaln_single")

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 16,
        out_channels: int | None = 32,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | int | None = None,
        use_additional_conditions: bool | None = False,
        caption_channels: int = 1536,
        attention_type: str | None = "default",
        caption_num_tokens: int = 1,
        learn_unconditional_embedding: bool = False,
        unconditional_positions: bool = True,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        if cross_attention_dim is None:
            cross_attention_dim = width
            self.register_to_config(cross_attention_dim=width)
        if interpolation_scale is None:
            interpolation_scale = sample_size / 64
            self.register_to_config(interpolation_scale=interpolation_scale)
        check_architecture(
            width, cross_attention_dim, sample_size, patch_size, norm_type, attention_type, caption_num_tokens
        )
        if not 0 < interpolation_scale < math.inf:
            raise ModelError(f"interpolation_scale {interpolation_scale} must be a positive number.")
        if caption_num_tokens > 1 and caption_channels % 4:
            raise ModelError(
                f"embeddings {caption_channels} wide cannot have positions, which {caption_num_tokens} "
                "condition tokens need: sines and cosines of rows and columns take a multiple of 4."
            )
        if use_additional_conditions:
            raise ModelError("use_additional_conditions is for PixArt's text models; set it to false.")

        self.inner_dim = width
        self.out_channels = in_channels if out_channels is None else out_channels
        self.gradient_checkpointing = False

        self.pos_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=width,
            interpolation_scale=interpolation_scale,
        )
        self.transformer_blocks = nn.ModuleList(
            PixCellBlock(
                width,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                cross_attention_dim=cross_attention_dim,
                activation_fn=activation_fn,
                num_embeds_ada_norm=num_embeds_ada_norm,
                attention_bias=attention_bias,
                upcast_attention=upcast_attention,
                norm_type=norm_type,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
                attention_type=attention_type,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size * patch_size * self.out_channels)
        self.adaln_single = AdaLayerNormSingle(width, use_additional_conditions=False)
        self.adaln_single.emb.time_proj = TimeFeatures()
        self.caption_projection = ConditionProjection(
            caption_channels, width, caption_num_tokens, learn_unconditional_embedding
        )
        self.y_pos_embed = None
        if caption_num_tokens > 1:
            table = condition_positions(
                caption_channels, caption_num_tokens, sample_size // patch_size, interpolation_scale
            )
            self.y_pos_embed = ConditionPositions(table)
        self._initialise()

    @property
    def unconditional_embedding(self) -> Float[Tensor, "tokens dim"]:
        """The tokens that stand for "no condition"."""
        return self.caption_projection.tokens()

    @property
    def learns_variance(self) -> bool:
        """Whether the second half of the output channels is the learned variance."""
        return self.out_channels == 2 * self.config.in_channels

    @property
    def grid_size(self) -> int:
        """Rows (and columns) of the embedding grid: the square root of the number of condition tokens."""
        return math.isqrt(self.config.caption_num_tokens)

    def prepare(
        self,
        encoder_hidden_states: Float[Tensor, "batch tokens dim"],
        dropped: Bool[Tensor, " _"] | None = None,
    ) -> PreparedCondition:
        """Compute what the blocks need of a condition, which is the same at every timestep.

        Args:
            encoder_hidden_states: Embeddings as the encoder gave them, a row per sample.
            dropped: Samples to be treated as having no condition. None: none of them.

        Raises:
            ModelError: If a size is not the model's, before anything is computed.
        """
        self._check_condition(encoder_hidden_states, dropped)
        condition = self._projected(encoder_hidden_states, dropped)
        blocks: Any = self.transformer_blocks
        return PreparedCondition(tuple(block.prepare(condition) for block in blocks), len(condition))

    def modulation(self, timesteps: Tensor | float) -> TimeModulation:
        """Compute what timesteps do to the model, all in one call.

        Args:
            timesteps: 0 to 999, fractions allowed. Their sinusoids are computed in float32, whatever the
                precision of the model.
        """
        if not isinstance(timesteps, Tensor):
            timesteps = torch.as_tensor(timesteps, device=self.device)
        timesteps = timesteps.reshape(-1)
        return TimeModulation(
            *self.adaln_single(timesteps, batch_size=len(timesteps), hidden_dtype=self._dtype)
        )

    def forward(
        self,
        hidden_states: Float[Tensor, "..."],
        timestep: Tensor | float | TimeModulation,
        encoder_hidden_states: Tensor | PreparedCondition | None = None,
        block_controlnet_hidden_states: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        dropped: Tensor | None = None,
        tokens_after: int | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor, ...]:
        """Predict what was added to clean latents.

        Args:
            hidden_states: Noisy latents, (batch, channels, height, width).
            timestep: 0 to 999, fractions allowed; one for all, or one per sample. Or what :meth:`modulation`
                made of it.
            encoder_hidden_states: Embeddings as the encoder gave them, (batch, tokens, dim), or what
                :meth:`prepare` made of them. None: no condition.
            block_controlnet_hidden_states: What is added to the output of each block, (batch, image tokens,
                width). May be shorter than the number of blocks; the last blocks then get nothing.
            return_dict: Return an object with ``sample`` instead of a tuple of one.
            dropped: Booleans, (batch,): samples to be treated as having no condition. None: none.
            tokens_after: Also return the image tokens behind so many blocks, (batch, image tokens, width),
                for losses on what the model has in mind. Only as a tuple (``return_dict=False``).

        Returns:
            ``sample``, (batch, out_channels, height, width): noise, then variance logits if learned.

        Raises:
            ModelError: If a size is not the model's, before anything is computed.
        """
        residuals = list(block_controlnet_hidden_states or ())
        conditions, modulation = self._conditions(
            hidden_states, timestep, encoder_hidden_states, dropped, residuals
        )
        height, width = hidden_states.shape[2:]
        tokens = self.pos_embed(hidden_states.to(self._dtype))
        extra: tuple[Tensor, ...] = ()
        for index, (block, condition) in enumerate(zip(self.transformer_blocks, conditions, strict=True)):
            residual = residuals[index] if index < len(residuals) else None
            tokens = self._run(block, tokens, condition, modulation, residual)
            if index + 1 == tokens_after:
                extra = (tokens,)

        shift, scale = (self.scale_shift_table + modulation.output[:, None]).chunk(2, dim=1)
        tokens = self.proj_out(modulated(self.norm_out, tokens, shift, scale))
        sample = self._unpatchify(tokens, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample, *extra)

    def grown_to(
        self,
        sample_size: int,
        caption_num_tokens: int,
        interpolation_scale: float | None = None,
        redraw_unconditional: bool = False,
    ) -> "tuple[PixCellTransformer2DModel, GrowthReport]":
        """Return a model for another size that starts from these weights: the way from 256 to 512 to 1024.

        Every weight is carried. Position tables are computed for the new size. The "no condition" tokens are
        spread over the new grid: each new token takes the vector of the field that lies over it, so that
        "no condition" keeps its meaning (the reference draws new random ones).

        Args:
            sample_size: Side of the new latents.
            caption_num_tokens: Number of new condition tokens.
            interpolation_scale: None keeps the coordinate range of this model, as the published stages do.
            redraw_unconditional: Draw the "no condition" tokens anew, as the reference does.

        Raises:
            ModelError: If one grid is no whole multiple of the other.
        """
        return grow(self, sample_size, caption_num_tokens, interpolation_scale, redraw_unconditional)

    def _unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        side = self.config.patch_size
        # (batch, rows, columns, row in patch, column in patch, channel): channels run fastest
        patches = tokens.unflatten(1, (height // side, width // side)).unflatten(3, (side, side, -1))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)

    def _conditions(
        self,
        latents: Tensor,
        timestep: Tensor | float | TimeModulation,
        condition: Tensor | PreparedCondition | None,
        dropped: Tensor | None,
        residuals: Sequence[Tensor] = (),
    ) -> tuple[Sequence[Tensor | BlockCondition], TimeModulation]:
        """Check what a forward pass is given; return the condition of each block and the modulation."""
        self._check_latents(latents, timestep, condition, residuals)
        if isinstance(condition, PreparedCondition):
            if dropped is not None:
                raise ModelError("a prepared condition knows its dropped samples: give them to prepare().")
            conditions: Sequence[Tensor | BlockCondition] = condition.blocks
            if len(conditions) != len(self.transformer_blocks):
                raise ModelError("the condition was prepared by another model; let this one prepare it.")
        else:
            if condition is None:
                condition = self.unconditional_embedding.expand(len(latents), -1, -1)
                dropped = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
            self._check_condition(condition, dropped)
            conditions = [self._projected(condition, dropped)] * len(self.transformer_blocks)
        if not isinstance(timestep, TimeModulation):
            timestep = self.modulation(torch.as_tensor(timestep, device=latents.device))
        return conditions, timestep

    def _run(
        self,
        block: nn.Module,
        tokens: Tensor,
        condition: Tensor | BlockCondition,
        modulation: TimeModulation,
        residual: Tensor | None = None,
    ) -> Tensor:
        run: Callable[..., Tensor] = block
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            run = functools.partial(self._gradient_checkpointing_func, block)
        return run(tokens, condition, modulation.blocks, residual)

    @property
    def _dtype(self) -> torch.dtype:
        """What latents and conditions are computed in; adapters may be of another."""
        dtype: torch.dtype = self.pos_embed.proj.weight.dtype
        return dtype

    def _projected(self, tokens: Tensor, dropped: Tensor | None) -> Tensor:
        """Condition tokens with their positions, in model width."""
        tokens, null = tokens.to(self._dtype), self.unconditional_embedding.to(self._dtype)
        without = None if dropped is None else dropped.to(tokens.device)[:, None, None]
        if without is not None and self.config.unconditional_positions:
            tokens = torch.where(without, null, tokens)
        if self.y_pos_embed is not None:
            tokens = self.y_pos_embed(tokens)
        if without is not None and not self.config.unconditional_positions:
            tokens = torch.where(without, null, tokens)
        projected: Tensor = self.caption_projection(tokens)
        return projected

    def _check_latents(
        self,
        latents: Tensor,
        timestep: Tensor | float | TimeModulation,
        condition: Tensor | PreparedCondition | None,
        residuals: Sequence[Tensor],
    ) -> None:
        config = self.config
        if latents.ndim != 4:
            raise ModelError(
                f"latents of shape {tuple(latents.shape)} were given, not (batch, channels, height, width)."
            )
        batch_size, channels, height, width = latents.shape
        if channels != config.in_channels:
            raise ModelError(
                f"the latents have {channels} channels, the model takes {config.in_channels}. "
                "Use the autoencoder that the model was trained with."
            )
        if height % config.patch_size or width % config.patch_size or not height or not width:
            near = [max(round(side / config.patch_size), 1) * config.patch_size for side in (height, width)]
            raise ModelError(
                f"latents of {height} x {width} are not a whole number of {config.patch_size} x "
                f"{config.patch_size} patches. Choose a picture size that is a multiple of "
                f"{8 * config.patch_size} pixels; the nearest latents are {near[0]} x {near[1]}."
            )
        times = timestep.output[:, 0] if isinstance(timestep, TimeModulation) else torch.as_tensor(timestep)
        if times.numel() not in (1, batch_size):
            raise ModelError(
                f"{times.numel()} timesteps were given for {batch_size} latents; one for all or one each."
            )
        rows = condition.batch_size if isinstance(condition, PreparedCondition) else batch_size
        if isinstance(condition, Tensor):
            rows = condition.shape[0]
        if rows != batch_size:
            raise ModelError(f"{batch_size} latents were given with {rows} conditions.")
        if len(residuals) > config.num_layers:
            raise ModelError(f"{len(residuals)} control residuals were given for {config.num_layers} blocks.")
        places = (height // config.patch_size) * (width // config.patch_size)
        for number, residual in enumerate(residuals):
            if residual.shape not in {(rows, places, self.inner_dim) for rows in (1, batch_size)}:
                raise ModelError(
                    f"control residual {number} is {tuple(residual.shape)}; latents of {height} x {width} "
                    f"take ({batch_size}, {places}, {self.inner_dim}). Make it with a branch of this model, "
                    "from the same latents."
                )

    def _check_condition(self, condition: Tensor, dropped: Tensor | None) -> None:
        config = self.config
        if condition.ndim != 3:
            raise ModelError(
                f"a condition of shape {tuple(condition.shape)} was given; it is (batch, tokens, dim)."
            )
        if condition.shape[2] != config.caption_channels:
            raise ModelError(
                f"the embeddings are {condition.shape[2]} wide, the model takes {config.caption_channels}. "
                "Use the encoder that the model was trained with."
            )
        if condition.shape[1] != config.caption_num_tokens:
            raise ModelError(
                f"{condition.shape[1]} condition tokens were given, the model takes "
                f"{config.caption_num_tokens} (a {self.grid_size} x {self.grid_size} grid of embeddings)."
            )
        if dropped is not None and (dropped.shape, dropped.dtype) != (condition.shape[:1], torch.bool):
            raise ModelError(
                f"dropped marks {dropped.numel()} samples of {len(condition)}; give one boolean each."
            )

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise for training from scratch, as PixArt and DiT do.

        At the start every block leaves the condition out (zero cross-attention output) and the model
        predicts zero (zero last layer); training opens both.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        time = self.adaln_single.emb.timestep_embedder
        caption = self.caption_projection
        for layer in (
            time.linear_1,
            time.linear_2,
            self.adaln_single.linear,
            caption.linear_1,
            caption.linear_2,
        ):
            nn.init.normal_(layer.weight, std=0.02)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.get_parameter("attn2.to_out.0.weight"))
        nn.init.zeros_(self.proj_out.weight)
