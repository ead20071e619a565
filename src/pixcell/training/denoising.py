"""Train the denoiser on cached latents: predict the noise (or velocity, or flow), and learn the variance.

A sample is a field's posterior as stored. Each time it is seen, a fresh draw is made from it, normalised, and
mixed with noise at a drawn timestep; with probability ``drop_conditioning`` its embeddings are
replaced by the model's "no condition" tokens, which is what guidance later subtracts. Latents are never
flipped or turned: their embeddings were computed from the picture as it stands.

Source: facts of the reference in Yellapragada et al. 2025, "PixCell" (https://arxiv.org/abs/2506.05127); the
loss itself is in :mod:`pixcell.diffusion.losses`.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pixcell.config import Config
from pixcell.data.datasets import FieldDataset
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.losses import LossTerms, denoising_loss
from pixcell.diffusion.noise_schedules import Target, schedule_for
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import generator_for, make_scheduler
from pixcell.errors import ModelError, StoreMismatch
from pixcell.models.codec import LatentCodec
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.provenance import environment
from pixcell.training.alignment import Alignment, AlignmentConfig
from pixcell.training.checkpoints import link_or_copy
from pixcell.training.determinism import rng_for
from pixcell.training.mixing import FieldPlan, FieldSamples, fields_to_show
from pixcell.training.objectives import Losses, Preview

__all__ = ["Denoising", "DenoisingConfig", "LogitNormalTimes", "NoisyFields", "UniformTimes"]

_HELD_OUT_TIMES = 8
_TENSORS = ("latents", "noise", "embedding_grid")


class UniformTimes(Config):
    """Every timestep as often, as published."""

    name: Literal["uniform"] = "uniform"

    def draw(self, timesteps: range, rng: np.random.Generator) -> int:
        """Return one of the timesteps."""
        return timesteps[int(rng.integers(len(timesteps)))]


class LogitNormalTimes(Config):
    """Timesteps of the flow, most often in the middle, where it is hardest to predict.

    The logarithm of noise over signal is drawn from a normal distribution.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers" (https://arxiv.org/abs/2403.03206),
    section 3.1, which finds mean 0 and deviation 1 among the best.
    """

    name: Literal["logit-normal"]
    mean: float = 0.0
    """Above 0: more often noisy."""
    std: float = Field(1.0, gt=0)

    def draw(self, timesteps: range, rng: np.random.Generator) -> int:
        """Return one of the timesteps."""
        share = 0.5 + 0.5 * math.tanh(0.5 * rng.normal(self.mean, self.std))  # the logistic function
        return timesteps[min(int(share * len(timesteps)), len(timesteps) - 1)]


class DenoisingConfig(Config):
    """What the denoiser learns, and how it is looked at."""

    name: Literal["denoising"] = "denoising"
    codec: str
    """The autoencoder that made the latents: a run, a folder, or a name."""
    drop_conditioning: float = Field(0.1, ge=0, lt=1)
    """Share of samples that are trained without their condition."""
    learn_variance: bool = True
    """Predict where the variance of a step lies between its bounds, in a second half of the channels."""
    target: Target = "noise"
    """What is predicted: the noise, as published; the velocity, which suits short trainings; or the flow on a
    straight line from latents to noise, which has no variance to learn."""
    times: Annotated[UniformTimes | LogitNormalTimes, Field(discriminator="name")] = UniformTimes()
    """How often each timestep is trained: ``uniform``, or for the flow ``logit-normal``."""
    alignment: AlignmentConfig | None = None
    """Also hold what the model has in mind against stored embeddings of finer fields. None: as published."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Weigh errors as min(SNR, gamma) times those of the clean latents (5 in the paper). None: plain mean, as
    published."""
    clean_below: int | None = Field(None, gt=0)
    """At timesteps below this one count the error of the clean latents: an option of the reference (250)."""
    scheduler: str = "dpm-solver++"
    """Saved with the model, and used for previews; see ``diffusion.sampling.SCHEDULERS``. Moves no weight."""
    preview_steps: int = Field(20, gt=0)
    preview_guidance: float = Field(2.0, ge=0)
    """Of the previews; saved with the model as what `pixcell sample` takes if told nothing else."""
    preview_guidance_also: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """More guidance scales to look at, each in a row of the preview."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.target == "flow" and self.learn_variance:
            raise ValueError("target flow has no variance to learn; set learn_variance to false")
        if self.clean_below is not None and self.min_snr_gamma is not None:
            raise ValueError(
                "min_snr_gamma and clean_below are two ways of weighing errors; give one of them"
            )
        if self.times.name != "uniform" and self.target != "flow":
            raise ValueError(
                f"times {self.times.name!r} are those of a flow; set target to flow, or times to uniform"
            )
        if self.scheduler == "ddpm-learned" and not self.learn_variance:
            raise ValueError("scheduler ddpm-learned needs learn_variance; ddpm does without")
        try:
            make_scheduler(self.scheduler, self.target)
        except ModelError as error:
            raise ValueError(str(error)) from error
        return self


class NoisyFields(FieldSamples):
    """Fields of cached latents, each with the noise, timestep and fate of its condition.

    Args:
        fields: With latents and embeddings.
        shift: Of the normalisation.
        scale: Of the normalisation.
        config: How chances are drawn.
        timesteps: To draw from.
        held_out: Indices that are left out.
        aligned_to: The same fields with the embeddings that the model's own mind is held against.
        plan: Which fields come when.
    """

    def __init__(
        self,
        fields: FieldDataset,
        shift: Tensor,
        scale: Tensor,
        config: DenoisingConfig,
        timesteps: range,
        held_out: Sequence[int],
        aligned_to: FieldDataset | None = None,
        plan: FieldPlan | None = None,
    ) -> None:
        super().__init__(fields, held_out, plan)
        self.config, self.timesteps = config, timesteps
        self.aligned_to = aligned_to
        self._shift, self._scale = shift.cpu().reshape(-1, 1, 1), scale.cpu().reshape(-1, 1, 1)

    def draw(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> list[dict[str, Any]]:
        """Return normalised draws from the posteriors, noise, timesteps, embeddings, and what to drop."""
        places = [self._kept[index] for index in indices]
        items = self.fields.__getitems__(places)
        drawn = [self.noisy(item, rng) for item, rng in zip(items, rngs, strict=True)]
        if self.aligned_to is not None:
            for sample, fine in zip(drawn, self.aligned_to.__getitems__(places), strict=True):
                sample["fine_embedding_grid"] = fine["embedding_grid"].float()
        return drawn

    def noisy(self, item: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Draw from one field's posterior, and what befalls it."""
        mean = item["posterior_mean"].float()
        chance = torch.from_numpy(rng.standard_normal((2, *mean.shape), dtype=np.float32))
        raw = mean + item["posterior_std"].float() * chance[0]
        return {
            "latents": (raw - self._shift) * self._scale,
            "noise": chance[1],
            "timestep": self.config.times.draw(self.timesteps, rng),
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
        aligned_to: The same fields, with embeddings of ``config.alignment.column``.
        growth: What became of each tensor when the model grew from another stage's; JSON values.
        plan: Which fields come when.
    """

    def __init__(
        self,
        model: PixCellTransformer2DModel,
        fields: FieldDataset,
        pictures: FieldDataset,
        codec: LatentCodec,
        config: DenoisingConfig,
        held_out: Sequence[int],
        aligned_to: FieldDataset | None = None,
        growth: Mapping[str, Any] | None = None,
        plan: FieldPlan | None = None,
    ) -> None:
        made_by = fields.made_by["latents"]
        if made_by["codec"]["sha256"] != codec.sha256:
            maker = made_by["codec"]
            raise StoreMismatch(
                f"objective.codec {config.codec!r} ({codec.sha256[:12]}) did not make these latents; "
                f"{maker['name']!r} ({maker['sha256'][:12]}) did. Name that one, or encode again."
            )
        self.trainable: nn.Module = model
        self.transformer, self.codec, self.config, self.growth = model, codec, config, growth
        self.alignment: Alignment | None = None
        if config.alignment is not None and aligned_to is not None:
            self.alignment = _alignment_for(model, config.alignment, aligned_to)
            self.trainable = nn.ModuleDict({"transformer": model, "alignment": self.alignment})
        self.schedule = schedule_for(config.target)
        self.samples = NoisyFields(
            fields, codec.shift, codec.scale, config, self.schedule.timesteps, held_out, aligned_to, plan
        )
        self._held_out = fields_to_show(held_out, plan, fields, pictures)
        self._pictures = [
            item["image"].permute(1, 2, 0).numpy() for item in pictures.__getitems__(self._held_out)
        ]
        self._pipeline = PixCellPipeline(
            model, codec.vae, make_scheduler(config.scheduler, config.target), self._pipeline_facts()
        )
        self._pipeline.set_progress_bar_config(disable=True)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Number and size of fields, their resolution, and what made latents and embeddings."""
        fields, made_by = self.samples.fields, dict(self.samples.fields.made_by)
        if self.samples.aligned_to is not None:
            made_by["alignment"] = self.samples.aligned_to.made_by["embeddings"]
        return {"fields": len(fields), "size": fields.size, "mpp": fields.mpp, "made_by": made_by}

    def move_to(self, device: torch.device) -> None:
        """Bring the autoencoder along."""
        self.codec.vae.to(device)

    def loss(self, batch: Mapping[str, Any]) -> Losses:
        """Return each sample's loss, and its parts ``mse``, ``bound`` and ``alignment``."""
        alignment = self.alignment
        if alignment is None:
            terms, _ = self._compare(batch)
            return self._losses(batch, terms, terms.loss)
        if not alignment.config.acts_at(batch.get("step", 0)):
            terms, _ = self._compare(batch)
            return self._losses(batch, terms, terms.loss + alignment.at_rest())
        terms, tokens = self._compare(batch, alignment.config.layer)
        apart = alignment(tokens, batch["fine_embedding_grid"])
        return self._losses(batch, terms, terms.loss + alignment.config.weight * apart, alignment=apart)

    def _compare(
        self, batch: Mapping[str, Any], tokens_after: int | None = None
    ) -> tuple[LossTerms, Tensor | None]:
        """Let the model predict; return how far it was off, and its image tokens behind a block."""
        conditioning = Conditioning(batch["embedding_grid"]).drop(batch["dropped"])
        noisy = self.schedule.add_noise(batch["latents"], batch["noise"], batch["timestep"])
        tokens = conditioning.tokens(self.transformer.unconditional_embedding, len(noisy))
        prediction, *behind = self.transformer(
            noisy,
            batch["timestep"],
            tokens,
            return_dict=False,
            dropped=conditioning.dropped,
            tokens_after=tokens_after,
        )
        terms = denoising_loss(
            prediction,
            batch["latents"],
            batch["noise"],
            batch["timestep"],
            self.schedule,
            self.config.min_snr_gamma,
            self.config.target,
            self.config.clean_below,
        )
        return terms, behind[0] if behind else None

    def _losses(
        self, batch: Mapping[str, Any], terms: LossTerms, per_sample: Tensor, **parts: Tensor
    ) -> Losses:
        bound = {} if terms.bound is None else {"bound": terms.bound}
        times = batch["timestep"].float() / self.schedule.num_timesteps
        return Losses(per_sample, {"mse": terms.mse, **bound, **parts}, times)

    @torch.no_grad()
    def preview(self) -> Preview:
        """Show held-out fields above pictures generated from their embeddings, with the held-out error.

        Same fields and same noise at every checkpoint: what changes from preview to preview is the model.
        """
        items = self.samples.fields.__getitems__(self._held_out)
        embeddings = torch.stack([item["embedding_grid"].float() for item in items])
        rows = {"real, held out": self._pictures}
        for guidance_scale in (self.config.preview_guidance, *self.config.preview_guidance_also):
            images = self._pipeline(
                Conditioning(embeddings),
                num_inference_steps=self.config.preview_steps,
                guidance_scale=guidance_scale,
                generator=[generator_for(0, index) for index in range(len(items))],
                output_type="pil",
                return_dict=False,
            )[0]
            generated = f"generated from their embeddings, guidance {guidance_scale:g}"
            rows[generated] = [np.asarray(image) for image in images]
        names = [item["key"] for item in items]
        return Preview.of_rows(rows, {"mse": self._held_out_error(items)}, names)

    def _held_out_error(self, items: Sequence[Mapping[str, Any]]) -> float:
        """Squared error of the noise, over evenly spread timesteps and fixed noise: comparable over a run."""
        device, total = self.transformer.device, 0.0
        places = range(_HELD_OUT_TIMES)
        for place in places:
            drawn = [self.samples.noisy(item, rng_for(place, index)) for index, item in enumerate(items)]
            batch = {name: torch.stack([one[name] for one in drawn]).to(device) for name in _TENSORS}
            batch["dropped"] = torch.zeros(len(items), dtype=torch.bool, device=device)
            step = self.schedule.num_timesteps * (2 * place + 1) // (2 * len(places))
            batch["timestep"] = torch.full((len(items),), step, device=device)
            total += float(self._compare(batch)[0].mse.mean()) / len(places)
        return total

    def export(self, folder: Path, previous: Path | None) -> None:
        """Write a whole :class:`PixCellPipeline`; its autoencoder shares its bytes with the last export."""
        self._pipeline.save_pretrained(folder)
        if previous is not None and (previous / "vae").is_dir():
            shutil.rmtree(folder / "vae")
            link_or_copy(previous / "vae", folder / "vae")

    def _pipeline_facts(self) -> dict[str, Any]:
        fields = self.samples.fields
        embeddings = fields.made_by["embeddings"]
        return {
            "encoder": {**embeddings["encoder"], "dim": self.transformer.config.caption_channels},
            "field_size": embeddings["field_size"],
            "mpp": fields.mpp,
            "target": self.config.target,
            "guidance_scale": self.config.preview_guidance,
            "codec": self.codec.made_by(),
            "environment": environment(),
        }


def _alignment_for(
    model: PixCellTransformer2DModel, config: AlignmentConfig, aligned_to: FieldDataset
) -> Alignment:
    rows, columns, dim = aligned_to[0]["embedding_grid"].shape
    num_tokens = (model.config.sample_size // model.config.patch_size) ** 2
    return Alignment(config, model.inner_dim, model.config.num_layers, num_tokens, rows * columns, dim)
