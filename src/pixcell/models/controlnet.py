"""The control branch: a copy of the denoiser that reads a picture and tells the denoiser where things go.

The picture (a mask of cells, in the published model) comes as latents, is cut into patches like the noisy
latents, and is added to their tokens. These run through the first blocks of a copy of the denoiser. After
each block a linear head makes a residual, which the denoiser adds after its block of the same number. The
heads start at zero, so an untrained branch changes nothing.

Parameter names and configuration keys are those of the published weights. Their ``proj_out`` and
``scale_shift_table`` belong to the copied denoiser and take no part here.

**Positions.** The published branch adds the table of positions to the control patches too, so that its tokens
carry every position twice: even at the start of training they are not what the copied blocks were trained on.
Published weights were trained that way and need it (``control_positions=True``, the default, which their
configuration does not mention). A branch made here by :meth:`PixCellControlNetModel.from_transformer` has the
positions once.

Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models"
(https://arxiv.org/abs/2302.05543), figure 3; Yellapragada et al. 2025, "PixCell"
(https://arxiv.org/abs/2506.05127).
"""

from dataclasses import dataclass

from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import PatchEmbed
from diffusers.utils import BaseOutput
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pixcell.errors import ModelError
from pixcell.models.transformer import PixCellTransformer2DModel, PreparedCondition, TimeModulation

__all__ = ["ControlOutput", "PixCellControlNetModel"]


@dataclass
class ControlOutput(BaseOutput):
    """What a control branch returns."""

    block_controlnet_hidden_states: tuple[Tensor, ...]
    """What is added to the output of each block of the denoiser, (batch, image tokens, width)."""


class PixCellControlNetModel(PixCellTransformer2DModel):
    """Make residuals for the blocks of a :class:`PixCellTransformer2DModel` from control latents.

    Configuration keys that are not listed are those of the denoiser.

    Args:
        n_controlnet_blocks: Blocks copied, from the first on; 27 of 28 in the published branch.
        control_positions: Add positions to the control patches too, as the published weights need.

    Raises:
        ModelError: If the values cannot make a model.
    """

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
        n_controlnet_blocks: int = 27,
        control_positions: bool = True,
    ) -> None:
        if not 1 <= n_controlnet_blocks <= num_layers:
            raise ModelError(
                f"n_controlnet_blocks is {n_controlnet_blocks}; a denoiser of {num_layers} blocks takes "
                f"1 to {num_layers} residuals."
            )
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=n_controlnet_blocks,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            interpolation_scale=interpolation_scale,
            use_additional_conditions=use_additional_conditions,
            caption_channels=caption_channels,
            attention_type=attention_type,
            caption_num_tokens=caption_num_tokens,
            learn_unconditional_embedding=learn_unconditional_embedding,
            unconditional_positions=unconditional_positions,
        )
        # The constructor above registered the number of blocks that it was given.
        self.register_to_config(num_layers=num_layers)
        self.cond_pos_embed = PatchEmbed(
            height=sample_size,
            width=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            embed_dim=self.inner_dim,
            interpolation_scale=self.config.interpolation_scale,
            pos_embed_type="sincos" if control_positions else None,
        )
        self.controlnet_blocks = nn.ModuleList(
            nn.Linear(self.inner_dim, self.inner_dim) for _ in range(n_controlnet_blocks)
        )
        for module in (self.cond_pos_embed, self.controlnet_blocks):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def from_transformer(
        cls,
        transformer: PixCellTransformer2DModel,
        n_controlnet_blocks: int | None = None,
        *,
        control_positions: bool = False,
    ) -> "PixCellControlNetModel":
        """Return an untrained branch for a denoiser: its first blocks copied, what is new zero.

        Args:
            transformer: The denoiser to control. It is not changed and shares no tensor with the branch.
            n_controlnet_blocks: Blocks to copy. None: all but the last, as published; at least one.
            control_positions: True makes the branch as the published one is; see the top of the module.

        Raises:
            ModelError: If the denoiser has fewer blocks, or carries adapters that are not merged.
        """
        if n_controlnet_blocks is None:
            n_controlnet_blocks = max(transformer.config.num_layers - 1, 1)
        branch = cls.from_config(
            transformer.config, n_controlnet_blocks=n_controlnet_blocks, control_positions=control_positions
        )
        own, given = branch.state_dict(), transformer.state_dict()
        copied = [name for name in own if not name.startswith(("cond_pos_embed.", "controlnet_blocks."))]
        if missing := [name for name in copied if name not in given]:
            raise ModelError(
                f"the denoiser lacks {len(missing)} of the tensors to copy ({', '.join(missing[:3])}). "
                "Merge its adapters (LoRA) into the weights first."
            )
        branch.load_state_dict({**own, **{name: given[name] for name in copied}}, strict=True)
        # diffusers' own ``to`` warns at every cast, even where no module asks to stay in float32.
        nn.Module.to(branch, dtype=transformer.dtype, device=transformer.device)
        return branch.train(transformer.training)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Float[Tensor, "batch channels height width"],
        timestep: Tensor | float | TimeModulation,
        encoder_hidden_states: Tensor | PreparedCondition | None,
        controlnet_cond: Float[Tensor, "_ _ _ _"],
        conditioning_scale: float | Float[Tensor, "..."] = 1.0,
        return_dict: bool = True,
        dropped: Bool[Tensor, " batch"] | None = None,
    ) -> ControlOutput | tuple[tuple[Tensor, ...]]:
        """Return what the denoiser adds to the outputs of its blocks.

        Args:
            hidden_states: Noisy latents, the same that the denoiser gets.
            timestep: 0 to 999, fractions allowed; one for all, or one per sample. Or what :meth:`modulation`
                of this branch made of it.
            encoder_hidden_states: Embeddings as the encoder gave them, (batch, tokens, dim), or what
                :meth:`prepare` of this branch made of them. None: no condition.
            controlnet_cond: Normalised latents of the control image, of the size of ``hidden_states``.
            conditioning_scale: Factor on the residuals; one for all, or one per sample.
            return_dict: Return a :class:`ControlOutput` instead of a tuple of one.
            dropped: Samples to be treated as having no condition besides the control. None: none of them.

        Raises:
            ModelError: If a size is not the model's, before anything is computed.
        """
        conditions, modulation = self._conditions(hidden_states, timestep, encoder_hidden_states, dropped)
        if controlnet_cond.shape != hidden_states.shape:
            raise ModelError(
                f"the control latents are {tuple(controlnet_cond.shape)}, the latents "
                f"{tuple(hidden_states.shape)}; both must be equal. Make the control image as large as the "
                "picture, and encode it with the same autoencoder."
            )
        dtype = self._dtype
        if isinstance(conditioning_scale, Tensor):
            if conditioning_scale.shape not in ((), (1,), hidden_states.shape[:1]):
                raise ModelError(
                    f"conditioning_scale is {tuple(conditioning_scale.shape)} for {len(hidden_states)} "
                    "latents; give one number for all, or one for each."
                )
            conditioning_scale = conditioning_scale.to(hidden_states.device, dtype).reshape(-1, 1, 1)
        tokens = self.pos_embed(hidden_states.to(dtype)) + self.cond_pos_embed(controlnet_cond.to(dtype))
        residuals = []
        for block, head, condition in zip(
            self.transformer_blocks, self.controlnet_blocks, conditions, strict=True
        ):
            tokens = self._run(block, tokens, condition, modulation)
            residuals.append(head(tokens) * conditioning_scale)
        return ControlOutput(tuple(residuals)) if return_dict else (tuple(residuals),)
