"""A small autoencoder for tissue: 8 pixels a side become one latent, and every latent is local.

The image is folded into 4 x 4 pixel cells first (space to depth), so all convolutions run at a quarter or
an eighth of its size: on a CPU it trains several times faster than the usual pyramid that begins at full
resolution. Nothing looks at the whole image: there is no attention, and the norm is per position (RMS over
channels), not per group over the image. A latent thus depends on the pixels within ``reach`` of it and on
nothing else. Latents cut from a tile are the latents of the cut (away from its border), and a picture
decoded in windows has no seams.

A straight path around the network carries the mean colour of each 8 x 8 cell: the first three latent channels
begin as that colour, and the picture as its smooth interpolation. The network adds the rest. Without it the
norm before the last layers hides brightness and hue at first, and four minutes of training end grey-violet.

The methods are those of diffusers' ``AutoencoderKL``, so one takes the place of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from jaxtyping import Float
from torch import Tensor, nn

from pixcell.models.configurations import StrictModel

__all__ = ["PosteriorOutput", "TissueAutoencoder"]

_FOLD = 4
_COLOUR_GAIN = 2.0  # colours in [-1, 1] have a spread of about 0.4: brought to that of the other latents


@dataclass
class PosteriorOutput(BaseOutput):
    """What ``encode`` returns.

    Args:
        latent_dist: Normal distribution of the latents: ``mean``, ``std``, ``sample(generator)``, ``mode()``,
            ``kl()``; each (batch, latent_channels, height / 8, width / 8).
    """

    latent_dist: DiagonalGaussianDistribution


class TissueAutoencoder(StrictModel):
    """Images in [-1, 1] to the posterior of their latents, and latents back to images.

    Args:
        latent_channels: Channels of a latent. 16 reconstructs best; 4 is easiest to generate from.
        channels: Width at a quarter and at an eighth of the image's size.
        num_blocks: Residual blocks at each of the two sizes, in the encoder and again in the decoder.
        scaling_factor: Diffusion sees ``(latents - shift_factor) * scaling_factor``; measured after training.
        shift_factor: See there. None: nothing is subtracted.
        latents_mean: Per channel, instead of ``shift_factor``; as in diffusers' newer autoencoders.
        latents_std: Per channel; then diffusion sees ``(latents - mean) / std * scaling_factor``.
    """

    downsampling = 2 * _FOLD
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        channels: Sequence[int] = (64, 128),
        num_blocks: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        fine, coarse = channels
        to_moments, to_pixels = _convolution(coarse, 2 * latent_channels), _convolution(fine, 3 * _FOLD**2)
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(_FOLD),
            _convolution(3 * _FOLD**2, fine),
            *(_ResidualBlock(fine) for _ in range(num_blocks)),
            nn.PixelUnshuffle(2),
            _convolution(4 * fine, coarse),
            *(_ResidualBlock(coarse) for _ in range(num_blocks)),
            _PositionNorm(coarse),
            to_moments,
        )
        self.decoder = nn.Sequential(
            _convolution(latent_channels, coarse),
            *(_ResidualBlock(coarse) for _ in range(num_blocks)),
            _convolution(coarse, 4 * fine),
            nn.PixelShuffle(2),
            *(_ResidualBlock(fine) for _ in range(num_blocks)),
            _PositionNorm(fine),
            to_pixels,
            nn.PixelShuffle(_FOLD),
        )
        self.colour_in = nn.Conv2d(3, latent_channels, 1)
        self.colour_out = nn.Conv2d(latent_channels, 3, 1)
        with torch.no_grad():
            # Begin with a narrow posterior (std 0.14): a wide one drowns the first steps.
            to_moments.bias[latent_channels:] = -4.0  # type: ignore[index]
            to_pixels.weight.zero_()
            for straight, gain in ((self.colour_in, _COLOUR_GAIN), (self.colour_out, 1 / _COLOUR_GAIN)):
                straight.weight.copy_(gain * torch.eye(*straight.weight.shape[:2])[..., None, None])
                nn.init.zeros_(straight.bias)  # type: ignore[arg-type]

    @property
    def reach(self) -> int:
        """How far, in latents, one latent or pixel is from the farthest thing that it depends on."""
        # Two 3 x 3 convolutions a block, one to enter and one to leave a size.
        convolutions_fine = convolutions_coarse = 2 * self.config.num_blocks + 2
        return convolutions_coarse + -(-convolutions_fine // 2)

    def encode(
        self, x: Float[Tensor, "batch 3 height width"], return_dict: bool = True
    ) -> PosteriorOutput | tuple[DiagonalGaussianDistribution]:
        """Return the posterior of an image's latents.

        Args:
            x: Images in [-1, 1]; height and width are multiples of 8.
            return_dict: Whether to return a :class:`PosteriorOutput` or a tuple, as everywhere in diffusers.

        Raises:
            ValueError: If a side is not a multiple of 8.
        """
        if x.shape[-1] % self.downsampling or x.shape[-2] % self.downsampling:
            raise ValueError(
                f"an image of {x.shape[-2]} x {x.shape[-1]} px cannot be encoded: "
                f"both sides must be multiples of {self.downsampling}"
            )
        parameters = self.encoder(x)
        mean, log_variance = parameters.chunk(2, dim=1)
        mean = mean + self.colour_in(F.avg_pool2d(x, self.downsampling))
        posterior = DiagonalGaussianDistribution(torch.cat([mean, log_variance], dim=1))
        return PosteriorOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self,
        z: Float[Tensor, "batch channels height width"],
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Return the images of latents, in about [-1, 1] (not clamped), 8 times as wide and high.

        ``generator`` is there because diffusers' decoders take one; decoding draws nothing.
        """
        colour = F.interpolate(self.colour_out(z), scale_factor=self.downsampling, mode="bilinear")
        sample = self.decoder(z) + colour
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Float[Tensor, "batch 3 height width"],
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: the reconstruction of the posterior's mean, or of a draw from it."""
        posterior = self.encode(sample, return_dict=False)[0]
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)


class _PositionNorm(nn.Module):
    """Divide each position by its own root mean square over channels (RMSNorm): local, and batch-free."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + 1e-6)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype).view(1, -1, 1, 1)


class _ResidualBlock(nn.Module):
    """``x + conv(silu(conv(norm(x))))``; the second convolution begins at zero, the block as identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _PositionNorm(channels)
        self.conv1 = _convolution(channels, channels)
        self.conv2 = _convolution(channels, channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


def _convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
