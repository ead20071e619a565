"""Pipelines: a denoiser, an autoencoder and a scheduler, as a diffusers user expects them.

    pipeline = PixCellPipeline.from_pretrained("runs/nano/checkpoints/step-00002000/pipeline")
    pictures = pipeline(embeddings, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images

A saved pipeline has a file more than diffusers': ``pixcell.json``, with what the numbers mean.

    encoder      what made the embeddings it was trained on: name, sha256, dim
    field_size   side of the field that has one embedding, in pixels
    mpp          microns per pixel of its pictures
    codec        what made the latents: name, sha256, latent_channels

It is checked against the weights when a pipeline is built. Published pipelines have none.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.guidance import guided
from pixcell.diffusion.losses import Target
from pixcell.diffusion.sampling import (
    check_steps,
    denoiser_of,
    in_fixed_batches,
    sample_latents,
    target_of,
)
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.files import write_json
from pixcell.models.codec import LatentCodec, to_uint8
from pixcell.models.threads import side_by_side
from pixcell.models.transformer import PixCellTransformer2DModel

__all__ = ["FACTS_FILE", "PixCellPipeline", "load_transformer"]

FACTS_FILE = "pixcell.json"
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class PixCellPipeline(DiffusionPipeline):
    """Generate tissue from embeddings, or without.

    Args:
        transformer: Predicts noise, or what the facts call the target.
        vae: A diffusers autoencoder of RGB pictures, or a ``TissueAutoencoder``.
        scheduler: Any of diffusers for what the transformer predicts.
        facts: What the numbers mean; see the top of the module.

    Raises:
        ModelError: If the facts contradict the weights.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: PixCellTransformer2DModel,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.facts: dict[str, Any] = dict(facts or {})
        # Published pipelines have no facts; there, what their own scheduler says holds for later ones.
        self._target: Target = self.facts.get("target", target_of(scheduler))
        self._codec: LatentCodec | None = None
        self._check_facts()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        transformer: PixCellTransformer2DModel | None = None,
        vae: nn.Module | None = None,
        scheduler: SchedulerMixin | None = None,
    ) -> "PixCellPipeline":
        """Load a pipeline folder. Weights are read as data; no code of the folder is run.

        Args:
            pretrained_model_name_or_path: A folder with ``model_index.json``.
            torch_dtype: Number format of the transformer. The autoencoder stays in float32: it runs once a
                picture, and some of them overflow in half precision.
            transformer: Used instead of the folder's.
            vae: Used instead of the folder's; needed where its weights are kept elsewhere.
            scheduler: Used instead of the folder's.

        Raises:
            MissingWeights: If a part is not there.
            WrongWeights: If names or shapes of tensors do not fit.
            ModelError: If the folder is no pipeline of this class, or its facts contradict its weights.
        """
        folder = Path(pretrained_model_name_or_path)
        _check_index(folder)
        facts = _read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {}
        pipeline = cls(
            transformer=load_transformer(folder / "transformer", torch_dtype)
            if transformer is None
            else transformer,
            vae=LatentCodec.from_pretrained(folder / "vae").vae if vae is None else vae,
            scheduler=_load_scheduler(folder / "scheduler") if scheduler is None else scheduler,
            facts=facts,
        )
        pipeline.register_to_config(_name_or_path=str(folder))
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the diffusers layout, and ``pixcell.json``; see :meth:`DiffusionPipeline.save_pretrained`."""
        super().save_pretrained(str(save_directory), **kwargs)
        if self.facts:
            write_json(Path(save_directory) / FACTS_FILE, self.facts)

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder with its scale and shift."""
        if self._codec is None or self._codec.vae is not self.vae:
            device, dtype = self.vae.device, self.vae.dtype
            name = self.facts.get("codec", {}).get("name", type(self.vae).__name__)
            self._codec = LatentCodec(self.vae, name, device=device, dtype=dtype)
        return self._codec

    @property
    def sample_size(self) -> int:
        """Side of the pictures the model was trained on, in pixels."""
        return self.transformer.config.sample_size * self.codec.downsampling

    def get_unconditional_embedding(self, batch_size: int = 1) -> Float[Tensor, "batch tokens dim"]:
        """Return the tokens that stand for "no condition"."""
        return self.transformer.unconditional_embedding.expand(batch_size, -1, -1)

    @torch.no_grad()
    def __call__(
        self,
        embeddings: Tensor | Conditioning | None = None,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float | Tensor = 2.0,
        num_images_per_embedding: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]
        | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        fixed_batch: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        Args:
            embeddings: (batch, rows, columns, dim) or, row by row, (batch, tokens, dim). None: no condition.
            num_inference_steps: Calls of the denoiser.
            guidance_scale: 1 is no guidance; one for all, or a tensor with one per picture.
            num_images_per_embedding: Pictures per condition, side by side in the result; without embeddings
                the number of pictures.
            height: In pixels. None: as trained.
            width: In pixels. None: as trained.
            generator: One for the batch, or one per picture, which then depends on its own alone.
            latents: Standard normal noise to start from, instead of drawing it.
            output_type: "pil", "np" (batch, height, width, 3) in [0, 1], "pt" (batch, 3, height, width) in
                [0, 1], or "latent".
            return_dict: Return an object with ``images`` instead of a tuple of one.
            callback_on_step_end: Called with the pipeline, step number, timestep and ``{"latents": ...}``;
                may return a dictionary with other latents.
            callback_on_step_end_tensor_inputs: Which tensors the callback gets; there are ``latents``.
            fixed_batch: Run the network on exactly so many pictures at a time, so that a picture does not
                depend on the size of its batch; see :func:`~pixcell.diffusion.sampling.in_fixed_batches`.
                None: on all at once.

        Raises:
            ModelError: If embeddings, sizes or steps do not fit the model; before any compute.
        """
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r} is none of {', '.join(_OUTPUT_TYPES)}")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"a callback can get {self._callback_tensor_inputs}, not {sorted(unknown)}")
        check_steps(num_inference_steps, self.scheduler)
        self._check_target()
        if num_images_per_embedding < 1:
            raise ModelError(f"{num_images_per_embedding} pictures cannot be made; ask for at least 1.")
        conditioning = _conditioning_of(embeddings).repeat(num_images_per_embedding)
        batch_size = conditioning.batch_size or num_images_per_embedding
        # Fails here if grid and model do not fit, and not after the first noise is drawn.
        conditioning.to(self.transformer.device).tokens(self.transformer.unconditional_embedding, batch_size)
        conditioning.check_finite()

        noise = self._noise(batch_size, height, width, generator, latents)
        denoiser = denoiser_of(self.transformer)
        if fixed_batch is None:
            denoiser = guided(denoiser, guidance_scale)
        elif isinstance(guidance_scale, Tensor):  # one scale per picture must meet all pictures
            denoiser = guided(in_fixed_batches(denoiser, fixed_batch), guidance_scale)
        else:
            denoiser = in_fixed_batches(guided(denoiser, guidance_scale), fixed_batch)
        with self.progress_bar(total=num_inference_steps) as bar:

            def on_step(number: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                changed = callback_on_step_end(self, number, timestep, tensors) or {}
                return changed.get("latents")

            result = sample_latents(
                denoiser, self.scheduler, noise, conditioning, num_inference_steps, generator, on_step
            )
        images = self._finished(result, output_type, fixed_batch)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        factor, patch = self.codec.downsampling, self.transformer.config.patch_size
        height, width = height or self.sample_size, width or self.sample_size
        if height % (factor * patch) or width % (factor * patch) or height < 1 or width < 1:
            raise ModelError(f"{height} x {width} pixels: both sides must be multiples of {factor * patch}.")
        shape = (batch_size, self.transformer.config.in_channels, height // factor, width // factor)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ModelError(
                    f"the latents given are {tuple(latents.shape)}; these pictures need {shape}."
                )
            return latents.to(self._execution_device, torch.float32)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    def _finished(self, latents: Tensor, output_type: str, fixed_batch: int | None) -> Any:
        if output_type == "latent":
            return latents
        # The decoder's kernels depend on the batch as the denoiser's do. One at a time is a fixed size too.
        if fixed_batch is None:
            images = self.codec.decode(latents)
        else:
            decode = self.codec.decode
            parts = side_by_side(lambda part: decode(part.clone()), latents.split(1), latents.device)
            images = torch.cat(parts)
        if not torch.isfinite(images).all():
            raise ModelError(
                "the sampler left the range of numbers: a picture is not finite, and would come out black. "
                "Lower the guidance, take more steps or another scheduler, or compute in fp32; and check the "
                "weights."
            )
        if output_type == "pt":
            return images
        if output_type == "np":
            return images.permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(pixels) for pixels in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]

    def _check_target(self) -> None:
        """A scheduler that takes velocity for noise makes pictures all the same, and wrong ones."""
        given = target_of(self.scheduler)
        if given != self._target:
            raise ModelError(
                f"the model predicts the {self._target}, and its {type(self.scheduler).__name__} takes that "
                f"for the {given}. Make the scheduler with make_scheduler(name, {self._target!r})."
            )

    def _check_facts(self) -> None:
        config, facts = self.transformer.config, self.facts
        wrong = []
        dim = facts.get("encoder", {}).get("dim")
        if dim is not None and dim != config.caption_channels:
            wrong.append(
                f"its encoder makes embeddings {dim} wide, its transformer takes {config.caption_channels}"
            )
        channels = facts.get("codec", {}).get("latent_channels")
        if channels is not None and channels != config.in_channels:
            wrong.append(f"its codec makes {channels} channels, its transformer takes {config.in_channels}")
        field_size = facts.get("field_size")
        if field_size is not None and field_size * self.transformer.grid_size != self.sample_size:
            side = self.transformer.grid_size
            wrong.append(
                f"{side} x {side} fields of {field_size} px are not a picture of {self.sample_size} px"
            )
        mpp = facts.get("mpp")
        if mpp is not None and not mpp > 0:
            wrong.append(f"mpp is {mpp}")
        if wrong:
            raise ModelError(
                f"the facts of the pipeline ({FACTS_FILE}) contradict its weights: {'; '.join(wrong)}. "
                "Files of two models were mixed; copy the folder again as a whole."
            )


def _conditioning_of(embeddings: Tensor | Conditioning | None) -> Conditioning:
    if isinstance(embeddings, Conditioning):
        return embeddings
    if embeddings is None:
        return Conditioning()
    if embeddings.ndim == 3:
        return Conditioning.from_tokens(embeddings)
    if embeddings.ndim != 4:
        raise ModelError(
            f"embeddings of shape {tuple(embeddings.shape)} were given; "
            "expected (batch, rows, columns, dim) or (batch, tokens, dim)."
        )
    return Conditioning(embeddings)


def _check_index(folder: Path) -> None:
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise MissingWeights(
            f"{folder} is not a pipeline: it holds no model_index.json. "
            "Give the folder pipeline/ of a checkpoint, or any folder that save_pretrained wrote."
        )
    index = _read_json(index_file)
    missing = {"transformer", "vae", "scheduler"} - set(index)
    if index.get("_class_name") != "PixCellPipeline" or missing:
        raise ModelError(
            f"{index_file} describes a {index.get('_class_name')}"
            + (f" without {', '.join(sorted(missing))}" if missing else "")
            + ", not a PixCellPipeline."
        )


def load_transformer(folder: Path, dtype: torch.dtype = torch.float32) -> PixCellTransformer2DModel:
    """Load a transformer folder, in evaluation mode; every tensor must be there, and no other.

    Raises:
        MissingWeights: If configuration or weights are not there.
        WrongWeights: If names or shapes do not fit.
        ModelError: If it is another class of model.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise MissingWeights(
            f"{folder} lacks config.json or safetensors weights; copy the pipeline again as a whole."
        )
    config = _read_json(folder / "config.json")
    if config.get("_class_name") != "PixCellTransformer2DModel":
        raise ModelError(f"{folder} holds a {config.get('_class_name')}, not a PixCellTransformer2DModel.")
    try:
        transformer, report = PixCellTransformer2DModel.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WrongWeights(
            f"the transformer in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    # diffusers fills what is missing with random numbers, and only warns.
    wrong = {what: list(names) for what, names in report.items() if names and what != "error_msgs"}
    if wrong:
        listed = "; ".join(
            f"{len(names)} {what.replace('_', ' ')} ({', '.join(map(str, names[:3]))})"
            for what, names in wrong.items()
        )
        raise WrongWeights(f"the weights in {folder} do not fit their configuration: {listed}.")
    return transformer.eval()


def _load_scheduler(folder: Path) -> SchedulerMixin:
    if not (folder / "scheduler_config.json").is_file():
        raise MissingWeights(f"{folder} lacks scheduler_config.json; copy the pipeline again as a whole.")
    name = str(_read_json(folder / "scheduler_config.json").get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise ModelError(
            f"{folder} names the scheduler {name!r}, which diffusers {diffusers.__version__} does not have."
        )
    return kind.from_pretrained(str(folder), local_files_only=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy the folder again as a whole.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return content
