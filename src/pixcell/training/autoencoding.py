"""Train a small autoencoder on the pixels of a store: what diffusion models then see instead of pixels.

    loss = |picture - reconstruction| + edges * |their differences| + kl * KL(posterior, N(0, 1))

The reconstruction is that of a draw from the posterior. The KL term widens the posterior until the decoder
only just copes, which makes latents smooth and tolerant of small errors: those of a generator. Four channels
that reconstruct a little softly can be learned by a small generator in minutes, sixteen sharp ones cannot.

Each latent channel is normalised by its measured mean and standard deviation, written at every export, so
that diffusion sees zero mean and unit variance whatever the KL term led to.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from pixcell.config import Config
from pixcell.data.datasets import FieldDataset
from pixcell.errors import RecipeError
from pixcell.files import write_json
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.codec import to_uint8
from pixcell.models.weights import weights_sha256
from pixcell.provenance import environment
from pixcell.training.mixing import FieldPlan, FieldSamples, fields_to_show
from pixcell.training.objectives import Losses, Preview, spread_over

__all__ = ["Autoencoding", "AutoencodingConfig", "ImageCrops"]

_MEASURED = 256
"""Fields from which the scale of the latents is measured."""


class AutoencodingConfig(Config):
    """How a reconstruction is judged."""

    name: Literal["autoencoding"] = "autoencoding"
    crop_size: int = Field(128, gt=0, multiple_of=8)
    """Side of the random crop that is trained on, in pixels. The autoencoder is local: small crops do."""
    edges: float = Field(1.0, ge=0)
    """Weight of the error in differences of neighbouring pixels, which a plain mean error leaves soft."""
    kl: float = Field(1e-3, ge=0)
    """Weight of the divergence of the posterior from N(0, 1), in nats per latent value."""
    scale_consistency: float = Field(0.0, ge=0)
    """Weight of the error of pictures decoded from latents at half their resolution, against the pictures at
    half theirs (EQ-VAE, Kouzelis et al. 2025, https://arxiv.org/abs/2502.09509). It makes latents smooth: a
    little worse to reconstruct from, much easier to generate."""

    @model_validator(mode="after")
    def _latents_can_be_halved(self) -> Self:
        if self.scale_consistency and self.crop_size % 16:
            raise ValueError(
                f"scale_consistency halves latents: crop_size must be a multiple of 16, not {self.crop_size}"
            )
        return self


class ImageCrops(FieldSamples):
    """Random crops of fields, flipped and turned by quarters. Tissue has no up and no left."""

    def __init__(
        self,
        fields: FieldDataset,
        crop_size: int,
        latent_channels: int,
        held_out: Sequence[int],
        plan: FieldPlan | None = None,
    ) -> None:
        if crop_size > fields.size:
            raise RecipeError(
                f"objective.crop_size {crop_size} is larger than data.size {fields.size}: choose less."
            )
        super().__init__(fields, held_out, plan)
        self.crop_size, self.latent_channels = crop_size, latent_channels

    def draw(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> list[dict[str, Any]]:
        """Return uint8 crops, and the noise of the draws from their posteriors."""
        items = self.fields.__getitems__([self._kept[index] for index in indices])
        side = self.crop_size // TissueAutoencoder.downsampling
        return [
            {
                "image": self._crop(item["image"], rng),
                "noise": torch.from_numpy(
                    rng.standard_normal((self.latent_channels, side, side), dtype=np.float32)
                ),
                "key": item["key"],
            }
            for item, rng in zip(items, rngs, strict=True)
        ]

    def _crop(self, image: UInt8[Tensor, "3 height width"], rng: np.random.Generator) -> Tensor:
        top, left = rng.integers(0, self.fields.size - self.crop_size + 1, 2)
        crop = image[:, top : top + self.crop_size, left : left + self.crop_size]
        crop = crop.rot90(int(rng.integers(4)), (1, 2))
        return (crop.flip(2) if rng.random() < 0.5 else crop).contiguous()


class Autoencoding:
    """The objective of :class:`TissueAutoencoder`.

    Args:
        model: To be trained.
        fields: With images.
        config: How a reconstruction is judged.
        held_out: Indices of fields kept out of training, for previews and the figures that go with them.
        plan: Which fields come when.
    """

    def __init__(
        self,
        model: TissueAutoencoder,
        fields: FieldDataset,
        config: AutoencodingConfig,
        held_out: Sequence[int],
        plan: FieldPlan | None = None,
    ) -> None:
        self.trainable, self.config = model, config
        self.samples = ImageCrops(fields, config.crop_size, model.config.latent_channels, held_out, plan)
        items = fields.__getitems__(fields_to_show(held_out, plan, fields))
        self._held_out = torch.stack([item["image"] for item in items])
        self._held_out_names = [item["key"] for item in items]
        self._measured_on = fields_to_show(spread_over(_MEASURED, len(fields)) or [0], plan, fields)
        self._device = torch.device("cpu")

    @property
    def facts(self) -> Mapping[str, Any]:
        """Number and size of fields, and their resolution."""
        fields = self.samples.fields
        return {"fields": len(fields), "size": fields.size, "mpp": fields.mpp}

    def move_to(self, device: torch.device) -> None:
        """Nothing is frozen here; held-out pictures follow at each preview."""
        self._device = device

    def loss(self, batch: Mapping[str, Any]) -> Losses:
        """Return each picture's loss, and its parts: ``pixels``, ``edges``, ``kl``, ``coarse`` if asked."""
        images = _signed(batch["image"])
        posterior = self._encode(images)
        latents = posterior.mean + posterior.std * batch["noise"]
        reconstruction = self._decode(latents)
        pixels = _error(reconstruction, images)
        across, down = (_error(reconstruction.diff(dim=side), images.diff(dim=side)) for side in (3, 2))
        edges = (across + down) / 2
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)
        loss = pixels + self.config.edges * edges + self.config.kl * kl
        parts = {"pixels": pixels, "edges": edges, "kl": kl}
        if self.config.scale_consistency:
            parts["coarse"] = _error(self._decode(F.avg_pool2d(latents, 2)), F.avg_pool2d(images, 2))
            loss = loss + self.config.scale_consistency * parts["coarse"]
        return Losses(loss, parts)

    def _encode(self, images: Tensor) -> DiagonalGaussianDistribution:
        return self.trainable.encode(images, return_dict=False)[0]

    def _decode(self, latents: Tensor) -> Tensor:
        return self.trainable.decode(latents, return_dict=False)[0].float()

    @torch.no_grad()
    def preview(self) -> Preview:
        """Show held-out fields above their reconstructions, with the peak signal-to-noise ratio (dB)."""
        images = _signed(self._held_out.to(self._device))
        restored = self._decode(self._encode(images).mean).clamp(-1, 1)
        psnr = 10 * torch.log10(4 / (restored - images).square().flatten(1).mean(1)).mean()
        pictures = to_uint8(restored / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
        originals = self._held_out.permute(0, 2, 3, 1).numpy()
        rows = {"real, held out": list(originals), f"reconstructed, {psnr:.1f} dB": list(pictures)}
        return Preview.of_rows(rows, {"psnr_db": float(psnr)}, self._held_out_names)

    @torch.no_grad()
    def export(self, folder: Path, previous: Path | None) -> None:
        """Write ``vae/`` with its measured scale, and ``pixcell.json``."""
        mean, std = self._measured_scale()
        self.trainable.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
        self.trainable.save_pretrained(folder / "vae")
        facts = {"kind": "autoencoder", "sha256": weights_sha256(self.trainable), **self.facts}
        write_json(folder / "pixcell.json", {**facts, "environment": environment()})

    def _measured_scale(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation, per channel, of draws from the posteriors of fields of the store."""
        totals = []
        for start in range(0, len(self._measured_on), 8):
            items = self.samples.fields.__getitems__(self._measured_on[start : start + 8])
            images = torch.stack([item["image"] for item in items])
            posterior = self._encode(_signed(images.to(self._device)))
            mean, std = posterior.mean.double(), posterior.std.double()
            # The variance of a mixture: of the means, plus the mean of the variances.
            moments = torch.stack([torch.ones_like(mean), mean, mean.square() + std.square()])
            totals.append(moments.sum(dim=(1, 3, 4)))
        count, first, second = torch.stack(totals).sum(0)
        mean_of_all = first / count
        return mean_of_all.tolist(), (second / count - mean_of_all.square()).sqrt().tolist()


def _signed(images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """8-bit pictures to [-1, 1]."""
    return images.float() / 127.5 - 1


def _error(
    values: Float[Tensor, "batch 3 height width"], truth: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Mean absolute difference of each sample."""
    return (values - truth).abs().flatten(1).mean(1)
