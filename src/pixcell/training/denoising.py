"""Train the denoiser on cached latents: predict the noise, and learn the variance.

A sample is a field's posterior as stored. Each time it is seen, a fresh draw is made from it, normalised, and
mixed with noise at a uniformly drawn timestep; with probability ``drop_conditioning`` its embeddings are
replaced by the model's "no condition" tokens, which is what guidance later subtracts. Latents are never flipped
or turned: their embeddings were computed from the picture as it stands.

Source: facts of the reference in Yellapragada et al. 2025, "PixCell" (https://arxiv.org/abs/2506.05127); the
loss itself is in :mod:`pixcell.diffusion.losses`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pixcell.config import Config
from pixcell.data.datasets import FieldDataset
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.losses import NoiseSchedule, denoising_loss
from pixcell.errors import StoreMismatch
from pixcell.models.codec import LatentCodec, to_uint8
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.training.checkpoints import link_or_copy
from pixcell.training.determinism import Without
from pixcell.training.objectives import Preview, picture_rows

__all__ = ["Denoising", "DenoisingConfig", "NoisyFields"]


class DenoisingConfig(Config):
    """What the denoiser learns, and how it is looked at."""

    name: Literal["denoising"] = "denoising"
    codec: str
    """The autoencoder that made the latents: a run, a folder, or a name."""
    drop_conditioning: float = Field(0.1, ge=0, lt=1)
    """Share of samples that are trained without their condition."""
    learn_variance: bool = True
    """Predict where the variance of a step lies between its bounds, in a second half of the channels."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Weigh the squared error by min(SNR, gamma) / SNR (5 in the paper). None: plain mean, as published."""
    preview_steps: int = Field(20, gt=0)
    preview_guidance: float = Field(2.0, ge=0)


class NoisyFields:
    """Fields of cached latents, each with the noise, timestep and fate of its condition."""

    def __init__(
        self,
        fields: FieldDataset,
        shift: Tensor,
        scale: Tensor,
        config: DenoisingConfig,
        num_timesteps: int,
        held_out: Sequence[int],
    ) -> None:
        self.fields, self.config, self.num_timesteps = fields, config, num_timesteps
        self._shift, self._scale = shift.cpu().reshape(-1, 1, 1), scale.cpu().reshape(-1, 1, 1)
        self._kept, self._count = Without(held_out), len(fields) - len(held_out)

    def __len__(self) -> int:
        return self._count

    def draw(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> list[dict[str, Any]]:
        """Return normalised latents drawn from their posteriors, noise, timesteps, embeddings, and what to drop."""
        items = self.fields.__getitems__([self._kept[index] for index in indices])
        return [self._drawn(item, rng) for item, rng in zip(items, rngs, strict=True)]

    def _drawn(self, item: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        mean = item["posterior_mean"].float()
        chance = torch.from_numpy(rng.standard_normal((2, *mean.shape), dtype=np.float32))
        raw = mean + item["posterior_std"].float() * chance[0]
        return {
            "latents": (raw - self._shift) * self._scale,
            "noise": chance[1],
            "timestep": int(rng.integers(self.num_timesteps)),
            "dropped": bool(rng.random() < self.config.drop_conditioning),
            "embedding_grid": item["embedding_grid"].float(),
            "key": item["key"],
        }


class Denoising:
    """The objective of :class:`PixCellTransformer2DModel`.

    Args:
        model: To be trained.
        fields: With latents and embeddings.
        pictures: The same fields, with images: for previews.
        codec: What made the latents; frozen, saved with each checkpoint.
        config: What is learned.
        held_out: Indices kept out of training, shown in previews.
    """

    def __init__(
        self,
        model: PixCellTransformer2DModel,
        fields: FieldDataset,
        pictures: FieldDataset,
        codec: LatentCodec,
        config: DenoisingConfig,
        held_out: Sequence[int],
    ) -> None:
        made_by = fields.made_by["latents"]
        if made_by["codec"]["sha256"] != codec.sha256:
            raise StoreMismatch(
                f"objective.codec {config.codec!r} ({codec.sha256[:12]}) did not make these latents; "
                f"{made_by['codec']['name']!r} ({made_by['codec']['sha256'][:12]}) did. Name that one, or encode again."
            )
        self.trainable, self.codec, self.config = model, codec, config
        self.schedule = NoiseSchedule()
        self.samples = NoisyFields(
            fields, codec.shift, codec.scale, config, self.schedule.num_timesteps, held_out
        )
        items = fields.__getitems__(list(held_out))
        self._embeddings = torch.stack([item["embedding_grid"].float() for item in items])
        self._pictures = [item["image"].permute(1, 2, 0).numpy() for item in pictures.__getitems__(list(held_out))]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Number and size of fields, their resolution, and what made latents and embeddings."""
        fields = self.samples.fields
        return {"fields": len(fields), "size": fields.size, "mpp": fields.mpp, "made_by": fields.made_by}

    def move_to(self, device: torch.device) -> None:
        """Bring the autoencoder along."""
        self.codec.vae.to(device)

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return ``loss``, and its parts ``mse`` and ``bound``."""
        conditioning = Conditioning(batch["embedding_grid"]).drop(batch["dropped"])
        noisy = self.schedule.add_noise(batch["latents"], batch["noise"], batch["timestep"])
        tokens = conditioning.tokens(self.trainable.unconditional_embedding, len(noisy))
        prediction = self.trainable(noisy, batch["timestep"], tokens, return_dict=False)[0]
        terms = denoising_loss(
            prediction,
            batch["latents"],
            batch["noise"],
            batch["timestep"],
            self.schedule,
            self.config.min_snr_gamma,
        )
        parts = {"loss": terms.loss.mean(), "mse": terms.mse.mean()}
        return parts if terms.bound is None else {**parts, "bound": terms.bound.mean()}
