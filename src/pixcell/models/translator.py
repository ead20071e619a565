"""From the embeddings of one stain to those of another: a rectified flow, token by token.

The network predicts how fast an embedding moves on the straight way from H&E (time 0) to the other stain
(time 1). One token is one field; tokens do not see each other, so any number of them may be given at once.

    x(t) = (1 - t) * source + t * target          velocity = target - source

    translator = load_translator("mist_her2_mlp.pth")
    her2 = translator.translate(he_embeddings, num_steps=100)

**Times.** A time is in 0 to 1; the network is given ``999 * time``, called ``timestep`` here as everywhere.

Configuration keys and parameter names are those of the published weights.

Sources: Liu et al. 2022, "Flow Straight and Fast" (https://arxiv.org/abs/2209.03003), eq. 1; the residual
blocks are those of Li et al. 2023, "Return of Unconditional Generation"
(https://arxiv.org/abs/2312.03701), section 3.2; Yellapragada et al. 2025, "PixCell"
(https://arxiv.org/abs/2506.05127), virtual staining.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float
from torch import Tensor, nn

from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.configurations import StrictModel
from pixcell.models.weights import fit_weights, read_weights

__all__ = ["EmbeddingTranslator", "flow_pair", "load_translator", "translation_loss"]

_TIMESTEPS = 999
"""What the network is given at time 1."""
_FIRST, _LAST = 0.001, 0.999
"""Times at which the first and the last step of a translation look at the velocity."""


class EmbeddingTranslator(StrictModel):
    """Predict the velocity of embeddings on their way from one stain to another.

    Args:
        in_channels: Width of an embedding.
        time_embed_dim: Width of the time vector.
        model_channels: Width of the network, and of the sines and cosines of the timestep.
        bottleneck_channels: Width inside a residual block.
        out_channels: Width of the velocity; equal to ``in_channels`` for translation.
        num_res_blocks: Number of residual blocks.
        dropout: Inside the blocks. Published: 0.
        use_context: Only False; a condition besides the embedding itself is not part of this network.

    Raises:
        ModelError: If the values cannot make a model.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1536,
        time_embed_dim: int = 1024,
        model_channels: int = 1024,
        bottleneck_channels: int = 1024,
        out_channels: int = 1536,
        num_res_blocks: int = 6,
        dropout: float = 0.0,
        use_context: bool = False,
    ) -> None:
        super().__init__()
        if use_context:
            raise ModelError("use_context is not part of published translators; set it to false.")
        widths = {
            "in_channels": in_channels,
            "time_embed_dim": time_embed_dim,
            "model_channels": model_channels,
            "bottleneck_channels": bottleneck_channels,
            "out_channels": out_channels,
        }
        if wrong := [f"{name} {value}" for name, value in widths.items() if value < 1]:
            raise ModelError(f"a network cannot be made with {', '.join(wrong)}: widths are 1 or more.")
        if model_channels < 2:
            raise ModelError(
                "model_channels must be at least 2: the time enters as pairs of sine and cosine."
            )
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, time_embed_dim),
            nn.SiLU(),
            nn.Linear(time_embed_dim, time_embed_dim),
        )
        self.input_proj = nn.Linear(in_channels, model_channels)
        self.res_blocks = nn.ModuleList(
            _ResidualBlock(model_channels, bottleneck_channels, time_embed_dim, dropout)
            for _ in range(num_res_blocks)
        )
        self.out = nn.Sequential(
            nn.LayerNorm(model_channels, eps=1e-6), nn.SiLU(), nn.Linear(model_channels, out_channels)
        )
        _zero(self.out[-1])

    def forward(
        self, embeddings: Float[Tensor, "*leading dim"], timestep: Tensor | float
    ) -> Float[Tensor, "*leading out"]:
        """Return the velocity.

        Args:
            embeddings: On their way, with any leading dimensions (none, tokens, batch and tokens, ...).
            timestep: 0 to 999, fractions allowed. One for all, or one for each entry of the first leading
                dimensions: (batch,) or (batch, tokens) for (batch, tokens, dim).

        Raises:
            ModelError: If the width is not the model's.
            ValueError: If timesteps and embeddings do not go together.
        """
        self._check_width(embeddings)
        timestep = torch.as_tensor(timestep, device=embeddings.device)
        leading = embeddings.shape[:-1]
        if timestep.ndim > len(leading) or any(
            own not in (1, size) for own, size in zip(timestep.shape, leading, strict=False)
        ):
            raise ValueError(
                f"timesteps {tuple(timestep.shape)} are not one for each of the first dimensions of "
                f"embeddings {tuple(embeddings.shape)}"
            )
        dtype = self.input_proj.weight.dtype
        # cosines first; frequencies 10000^(-k / bands); an odd width ends in a zero
        features = get_timestep_embedding(
            timestep.flatten(), self.config.model_channels, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        time = self.time_embed(features.to(dtype))
        # left-aligned: (batch, 1, width) meets (batch, tokens, width)
        ones = (1,) * (embeddings.ndim - 1 - timestep.ndim)
        time = time.reshape(*timestep.shape, *ones, -1)
        hidden = self.input_proj(embeddings.to(dtype))
        for block in self.res_blocks:
            hidden = block(hidden, time)
        return self.out(hidden)

    @torch.no_grad()
    def translate(
        self,
        embeddings: Float[Tensor, "*leading dim"],
        num_steps: int = 100,
        *,
        keep_norm: bool = False,
    ) -> Float[Tensor, "*leading dim"]:
        """Move embeddings to the other stain, by Euler steps of equal length.

        Step ``i`` of ``n`` adds ``velocity / n``, seen at a time between 0.001 and 0.999 inclusive, evenly
        spaced. The state is kept in float32.

        Args:
            embeddings: Of the first stain, as the encoder gave them; any leading dimensions.
            num_steps: Calls of the network; 100 is usual.
            keep_norm: Then scale the result so that the mean length of a sample's embeddings is what it was.
                Off: it is not known whether the published results were made so. A sample is an entry of the
                first dimension, with all that follows; a single embedding is its own.

        Returns:
            float32.

        Raises:
            ModelError: If the width is not the model's, the number of steps is not positive, embeddings hold
                NaN, or the network does not return what it takes. Before any compute.
        """
        self._check_width(embeddings)
        if self.config.out_channels != self.config.in_channels:
            raise ModelError(
                f"this network turns embeddings {self.config.in_channels} wide into "
                f"{self.config.out_channels}; a translation keeps the width."
            )
        if num_steps < 1:
            raise ModelError(f"{num_steps} steps of translation are not possible; choose 1 or more (100).")
        if not torch.isfinite(embeddings).all():
            raise ModelError("the embeddings to translate hold NaN or infinity. Encode the picture again.")
        state = embeddings.float()
        for time in torch.linspace(_FIRST, _LAST, num_steps).tolist():
            state = state + self(state, _TIMESTEPS * time).float() / num_steps
        return _with_norm_of(embeddings.float(), state) if keep_norm else state

    def _check_width(self, embeddings: Tensor) -> None:
        if embeddings.ndim < 1 or embeddings.shape[-1] != self.config.in_channels:
            raise ModelError(
                f"embeddings of shape {tuple(embeddings.shape)} were given; the translator takes "
                f"{self.config.in_channels} values each. Use the encoder that it was trained with."
            )


class _ResidualBlock(nn.Module):
    """A bottleneck that the time enters in its middle; begins as the identity."""

    def __init__(self, channels: int, bottleneck: int, time_dim: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.LayerNorm(channels), nn.SiLU(), nn.Linear(channels, bottleneck))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, bottleneck))
        self.out_layers = nn.Sequential(
            nn.LayerNorm(bottleneck), nn.SiLU(), nn.Dropout(dropout), nn.Linear(bottleneck, channels)
        )
        _zero(self.out_layers[-1])

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        return hidden + self.out_layers(self.in_layers(hidden) + self.emb_layers(time))


def load_translator(
    source: str | Path | Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> EmbeddingTranslator:
    """Load a translator, in evaluation mode; every tensor must be there, and no other.

    Args:
        source: A folder that ``save_pretrained`` wrote; a published file (safetensors, or a pickle of tensors
            only), whose sizes are read from its tensors; or a state dictionary.
        dtype: Number format of the weights.

    Raises:
        MissingWeights: If there is no such file, or the folder lacks one.
        WrongWeights: If names or shapes are not those of a translator, or values are no numbers.
        ModelError: If the folder is one of another class of model.
    """
    if isinstance(source, Mapping):
        what, state, config = "the state given", source, None
    else:
        path = Path(source)
        what, config = str(source), None
        if path.is_dir():
            config = _config_in(path)
            path = path / "diffusion_pytorch_model.safetensors"
        state = read_weights(path)
    translator = EmbeddingTranslator(**(_config_of(state, what) if config is None else config))
    fit_weights(translator, state, what)
    if broken := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise WrongWeights(
            f"{what}: {', '.join(broken[:3])} ({len(broken)} tensors) hold NaN or infinity. The file is "
            "damaged, or its training failed; get it again from its source."
        )
    # diffusers' own ``to`` warns at every cast, even where no module asks to stay in float32.
    nn.Module.to(translator, dtype=dtype)
    return translator.eval()


def _config_in(folder: Path) -> dict[str, object]:
    try:
        config = EmbeddingTranslator.load_config(str(folder), local_files_only=True)
    except OSError as error:
        raise MissingWeights(
            f"{folder} holds no configuration of a translator ({' '.join(str(error).split())[:200]}). "
            "Give a folder that save_pretrained wrote, or a published .pth file."
        ) from error
    if config.get("_class_name") != EmbeddingTranslator.__name__:
        raise ModelError(f"{folder} holds a {config.get('_class_name')}, not an EmbeddingTranslator.")
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _config_of(state: Mapping[str, Tensor], source: str) -> dict[str, int]:
    """Read the sizes of a network from its tensors."""
    sizes = {
        "in_channels": ("input_proj.weight", 1),
        "model_channels": ("input_proj.weight", 0),
        "time_embed_dim": ("time_embed.0.weight", 0),
        "bottleneck_channels": ("res_blocks.0.in_layers.2.weight", 0),
        "out_channels": ("out.2.weight", 0),
    }
    absent = [name for name, _ in sizes.values() if name not in state or state[name].ndim != 2]
    if absent:
        raise WrongWeights(
            f"{source} holds no translator: of its {len(state)} tensors none is the matrix {absent[0]}."
        )
    blocks = {name.split(".")[1] for name in state if name.startswith("res_blocks.")}
    return {key: state[name].shape[side] for key, (name, side) in sizes.items()} | {
        "num_res_blocks": len(blocks)
    }


def flow_pair(
    source: Float[Tensor, "*leading dim"],
    target: Float[Tensor, "*leading dim"],
    times: Float[Tensor, "..."],
) -> tuple[Float[Tensor, "*leading dim"], Float[Tensor, "*leading dim"]]:
    """Return where embeddings are at ``times``, and the velocity they have there.

    Args:
        source: Embeddings of the first stain.
        target: Embeddings of the same fields in the other stain.
        times: 0 to 1, one for each entry of the first leading dimensions.

    Source: Liu et al. 2022, eq. 1.
    """
    if source.shape != target.shape or times.shape != source.shape[: times.ndim] or times.ndim >= source.ndim:
        raise ValueError(
            f"source {tuple(source.shape)}, target {tuple(target.shape)} and times {tuple(times.shape)} "
            "do not go together: pairs have one shape, and times its first dimensions"
        )
    times = times.reshape(*times.shape, *(1,) * (source.ndim - times.ndim))
    return times * target + (1 - times) * source, target - source


def translation_loss(
    translator: nn.Module,
    source: Float[Tensor, "*leading dim"],
    target: Float[Tensor, "*leading dim"],
    times: Float[Tensor, "..."],
) -> Float[Tensor, " *leading"]:
    """Return the squared error of the velocity, the mean over a token; in float32 whatever the autocast.

    Training draws a time per token, uniform in 0 to 1, and takes the mean of all.

    Args:
        translator: An :class:`EmbeddingTranslator`.
        source: Embeddings of the first stain.
        target: Embeddings of the same fields in the other stain.
        times: As in :func:`flow_pair`.
    """
    between, velocity = flow_pair(source.float(), target.float(), times.float())
    prediction = translator(between, _TIMESTEPS * times.float())
    return (prediction.float() - velocity).square().mean(dim=-1)


def _with_norm_of(
    reference: Float[Tensor, "*leading dim"], embeddings: Float[Tensor, "*leading dim"]
) -> Float[Tensor, "*leading dim"]:
    """Scale each sample so that the mean length of its embeddings is that of ``reference``."""

    def mean_norm(tokens: Tensor) -> Tensor:
        norms = tokens.norm(dim=-1, keepdim=True)
        inner = tuple(range(1, norms.ndim - 1))
        return norms.mean(dim=inner, keepdim=True) if inner else norms

    return embeddings * (mean_norm(reference) / mean_norm(embeddings).clamp_min(1e-12))


def _zero(layer: nn.Module) -> None:
    """Make a linear layer return zero: at the start nothing moves."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
