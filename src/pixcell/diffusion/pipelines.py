"""Pipelines: a denoiser, an autoencoder and a scheduler, as a diffusers user expects them.

    pipeline = PixCellPipeline.from_pretrained("runs/nano/checkpoints/step-00002000/pipeline")
    pictures = pipeline(embeddings, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images

A saved pipeline has a file more than diffusers': ``pixcell.json``, with what the numbers mean (see
``diffusion.model_facts``). It is checked against the weights when a pipeline is built. Published pipelines
have none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ImagePipelineOutput, SchedulerMixin
from jaxtyping import Float
from torch import Tensor, nn

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.control import ControlImage, as_control, control_by, control_latents_of
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.guidance import check_guidance, guided, usual_guidance_scale
from pixcell.diffusion.loading import (
    find_pipeline,
    load_controlnet,
    load_scheduler,
    load_transformer,
    load_vae,
    read_index,
    read_json,
)
from pixcell.diffusion.model_facts import check_encoder, check_facts
from pixcell.diffusion.noise_schedules import Target
from pixcell.diffusion.pipeline_parts import (
    FACTS_FILE,
    OnStepEnd,
    TissuePipeline,
    as_output,
    bring,
    check_output,
    noise_like,
    reporting,
)
from pixcell.diffusion.sampling import in_fixed_batches, sample_latents
from pixcell.diffusion.schedulers import check_steps, lay_out, takes_variance, target_of
from pixcell.errors import ModelError
from pixcell.models.codec import LatentCodec
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.transformer import PixCellTransformer2DModel

__all__ = ["FACTS_FILE", "PixCellPipeline", "load_transformer"]

_CLASSES = ("PixCellPipeline", "PixCellControlNetPipeline")
_PARTS = ("transformer", "vae", "scheduler")


class PixCellPipeline(TissuePipeline):
    """Generate tissue from embeddings, or without.

    Args:
        transformer: Predicts noise, or what the facts call the target.
        vae: A diffusers autoencoder of RGB pictures, or a ``TissueAutoencoder``.
        scheduler: Any of diffusers for what the transformer predicts.
        facts: What the numbers mean; see ``diffusion.model_facts``.
        controlnet: Makes pictures follow a control image. None: no control image is taken.

    Raises:
        ModelError: If the facts contradict the weights, or control branch and transformer do not fit.
    """

    # The control branch takes turns with the transformer: once there, it stays until the end.
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["controlnet"]  # noqa: RUF012 (diffusers' own declaration)
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: PixCellTransformer2DModel,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        facts: Mapping[str, Any] | None = None,
        controlnet: PixCellControlNetModel | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, controlnet=controlnet)
        self.facts: dict[str, Any] = dict(facts or {})
        # Published pipelines have no facts; there, what their own scheduler says holds for later ones.
        self._target: Target = self.facts.get("target", target_of(scheduler))
        self._codec: LatentCodec | None = None
        check_facts(self.facts, transformer, self.sample_size)
        self._check_controlnet()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        transformer: PixCellTransformer2DModel | None = None,
        vae: nn.Module | str | Path | None = None,
        scheduler: SchedulerMixin | None = None,
        controlnet: PixCellControlNetModel | str | Path | None = None,
        download: bool = False,
    ) -> "PixCellPipeline":
        """Load a pipeline folder. Weights are read as data; no code of the folder is run.

        Args:
            pretrained_model_name_or_path: A folder with ``model_index.json``, or ``owner/name`` on the hub.
            torch_dtype: Number format of transformer and control branch. The autoencoder stays in float32: it
                runs once a picture, and some of them overflow in half precision.
            transformer: Used instead of the folder's.
            vae: Used instead of the folder's; needed where its weights are kept elsewhere. A module, or what
                :meth:`LatentCodec.from_pretrained` takes: a folder or a name.
            scheduler: Used instead of the folder's.
            controlnet: Used instead of the folder's, or where it has none: a module, or the folder of one.
            download: Whether what is not on this machine may be downloaded.

        Raises:
            MissingWeights: If a part is not there.
            WrongWeights: If names or shapes of tensors do not fit.
            ModelError: If the folder is no pipeline of this class, or its facts contradict its weights.
        """
        folder = find_pipeline(pretrained_model_name_or_path, download)
        index = read_index(folder, _CLASSES, _PARTS)
        facts = read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {}
        if isinstance(vae, str | Path):
            autoencoder: nn.Module = LatentCodec.from_pretrained(vae, download=download).vae
        else:
            autoencoder = load_vae(folder / "vae") if vae is None else vae
        if controlnet is None and index.get("controlnet", [None])[0] is not None:
            controlnet = folder / "controlnet"
        if isinstance(controlnet, str | Path):
            controlnet = load_controlnet(Path(controlnet), torch_dtype)
        if transformer is None:
            transformer = load_transformer(folder / "transformer", torch_dtype)
        if scheduler is None:
            scheduler = load_scheduler(folder / "scheduler")
        return cls(transformer, autoencoder, scheduler, facts, controlnet)

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder with its scale and shift, brought to where it computes."""
        bring(self.vae)
        if self._codec is None or self._codec.vae is not self.vae:
            device, dtype = self.vae.device, self.vae.dtype
            name = self.facts.get("codec", {}).get("name", type(self.vae).__name__)
            self._codec = LatentCodec(self.vae, name, device=device, dtype=dtype)
        return self._codec

    @property
    def _downsampling(self) -> int:
        """Pixels along the side of a latent, known without bringing the autoencoder."""
        same = self._codec is not None and self._codec.vae is self.vae
        return self._codec.downsampling if self._codec is not None and same else self.codec.downsampling

    @property
    def sample_size(self) -> int:
        """Side of the pictures the model was trained on, in pixels."""
        return int(self.transformer.config.sample_size * self._downsampling)

    @property
    def usual_guidance_scale(self) -> float:
        """What suits the model: the scale saved with it; else that of published models of its size."""
        return float(self.facts.get("guidance_scale", usual_guidance_scale(self.transformer.grid_size)))

    def get_unconditional_embedding(self, batch_size: int = 1) -> Float[Tensor, "batch tokens dim"]:
        """Return the tokens that stand for "no condition"."""
        return self.transformer.unconditional_embedding.expand(batch_size, -1, -1)

    @torch.no_grad()
    def __call__(
        self,
        embeddings: Tensor | Conditioning | None = None,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        negative_embeddings: Tensor | Conditioning | None = None,
        control: ControlImage | None = None,
        control_scale: float | Tensor = 1.0,
        encoder: Mapping[str, Any] | None = None,
        num_images_per_embedding: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        fixed_batch: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        Args:
            embeddings: (batch, rows, columns, dim) or, row by row, (batch, tokens, dim). None: no condition.
            num_inference_steps: Calls of the denoiser.
            guidance_scale: 1 is no guidance; one for all, or one per picture. None: what suits the model,
                :attr:`usual_guidance_scale`.
            guidance_interval: Timesteps, lowest and highest, at which to guide; at others the prediction is
                the conditional one. None: guide at all of them.
            negative_embeddings: What guidance moves away from, instead of "no condition"; one for all, or one
                per sample.
            control: Where things are to go: masks or other pictures as large as those to be made, or their
                latents; one for all, or one per sample. See
                :func:`~pixcell.diffusion.control.control_pictures`. Needs a ``controlnet``.
            control_scale: How closely to follow it; 0 is not at all. One for all, or a tensor with one per
                picture.
            encoder: What made the embeddings (``Encoder.made_by()``); compared with what the model knows of
                its own.
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
            ModelError: If embeddings, their encoder, control, sizes or steps do not fit the model; before any
                compute.
        """
        check_output(output_type, callback_on_step_end_tensor_inputs)
        check_steps(num_inference_steps, self.scheduler)
        self._check_target()
        if num_images_per_embedding < 1:
            raise ModelError(f"{num_images_per_embedding} pictures cannot be made; ask for at least 1.")
        if guidance_scale is None:
            guidance_scale = self.usual_guidance_scale
        if not isinstance(guidance_scale, int | float):
            guidance_scale = torch.as_tensor(guidance_scale, dtype=torch.float32)  # a list is one per picture
        check_guidance(guidance_scale, guidance_interval)
        height, width = self._size(height, width)
        conditioning = self._conditioning(embeddings, encoder)
        negative = None if negative_embeddings is None else self._conditioning(negative_embeddings, encoder)
        pictures = None if control is None else as_control(self.codec, control, height, width)
        num_conditions = conditioning.batch_size or (1 if pictures is None else len(pictures))
        batch_size = num_conditions * num_images_per_embedding
        shape = self._latent_shape(batch_size, height, width)
        self._check_control(conditioning, pictures, num_conditions, shape)
        _check_numbers(guidance_scale, batch_size, conditioning, negative)
        scale = _control_scales(control_scale, batch_size)
        noise = noise_like(shape, generator, latents, self._execution_device)

        lay_out(self.scheduler, num_inference_steps, noise.device)
        denoiser = denoiser_of(
            self.transformer,
            None
            if self.controlnet is None
            else control_by(self.controlnet, self.scheduler.timesteps, fixed_batch),
            with_variance=takes_variance(self.scheduler),
            timesteps=self.scheduler.timesteps,
        )
        if pictures is not None:
            encoded = control_latents_of(self.codec, pictures, height, width)
            conditioning = replace(conditioning, control_latents=encoded.expand(num_conditions, -1, -1, -1))
            conditioning.check_finite()
        conditioning = conditioning.repeat(num_images_per_embedding).to(noise.device)
        if scale is not None and conditioning.control_latents is not None:
            conditioning = replace(conditioning, control_scale=scale.to(noise.device))

        if negative is not None and negative.batch_size != 1:
            negative = negative.repeat(num_images_per_embedding)
        one_for_all = not isinstance(guidance_scale, Tensor) and (
            negative is None or negative.batch_size == 1
        )
        if fixed_batch is None:
            denoiser = guided(denoiser, guidance_scale, guidance_interval, negative)
        elif one_for_all:
            denoiser = guided(denoiser, guidance_scale, guidance_interval, negative)
            denoiser = in_fixed_batches(denoiser, fixed_batch)
        else:  # what differs from picture to picture must meet all pictures
            denoiser = in_fixed_batches(denoiser, fixed_batch)
            denoiser = guided(denoiser, guidance_scale, guidance_interval, negative)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            result = sample_latents(
                denoiser,
                self.scheduler,
                noise,
                conditioning,
                num_inference_steps,
                generator,
                reporting(self, bar, callback_on_step_end, callback_on_step_end_tensor_inputs),
            )
        images = as_output(self, result, output_type, one_by_one=fixed_batch is not None)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        step = self._downsampling * self.transformer.config.patch_size
        height = self.sample_size if height is None else height
        width = self.sample_size if width is None else width
        if height % step or width % step or height < 1 or width < 1:
            raise ModelError(f"{height} x {width} pixels: both sides must be multiples of {step}.")
        return height, width

    def _conditioning(self, embeddings: Any, encoder: Mapping[str, Any] | None) -> Conditioning:
        """Take embeddings in any of their forms, and refuse those that the model cannot mean."""
        conditioning = _conditioning_of(embeddings)
        if encoder is not None:
            conditioning = replace(conditioning, encoder=encoder)
        check_encoder(self.facts.get("encoder", {}), conditioning.encoder or {})
        if conditioning.text_states is not None:
            raise ModelError("text was given, and the model takes embeddings of tissue. See TextPipeline.")
        # Fails here if grid and model do not fit, and not after the first noise is drawn.
        if conditioning.batch_size == 0:
            raise ModelError("0 embeddings were given; leave them out to make pictures of no condition.")
        null = self.transformer.unconditional_embedding
        conditioning.to(null.device).tokens(null, conditioning.batch_size or 1)
        conditioning.check_finite()
        return conditioning

    def _check_control(
        self,
        conditioning: Conditioning,
        pictures: Tensor | None,
        num_conditions: int,
        shape: tuple[int, int, int, int],
    ) -> None:
        encoded = conditioning.control_latents
        if pictures is not None and encoded is not None:
            raise ValueError("control was given twice: as an argument and in the Conditioning")
        if (pictures is not None or encoded is not None) and self.controlnet is None:
            raise ModelError(
                "a control image was given, and the pipeline has no control branch. Load one with it: "
                "PixCellPipeline.from_pretrained(folder, controlnet=...)."
            )
        if pictures is not None and len(pictures) not in (1, num_conditions):
            raise ModelError(f"{len(pictures)} control images were given for {num_conditions} samples.")
        if encoded is not None and tuple(encoded.shape[1:]) != shape[1:]:
            raise ModelError(
                f"the control latents are {tuple(encoded.shape[1:])}; these pictures need {shape[1:]}."
            )

    def _latent_shape(self, batch_size: int, height: int, width: int) -> tuple[int, int, int, int]:
        factor = self._downsampling
        return batch_size, self.transformer.config.in_channels, height // factor, width // factor

    def _check_target(self) -> None:
        """A scheduler that takes velocity for noise makes pictures all the same, and wrong ones."""
        given = target_of(self.scheduler)
        if given != self._target:
            raise ModelError(
                f"the model predicts the {self._target}, and its {type(self.scheduler).__name__} takes that "
                f"for the {given}. Make the scheduler with make_scheduler(name, {self._target!r})."
            )

    def _check_controlnet(self) -> None:
        if self.controlnet is None:
            return
        own, branch = self.transformer.config, self.controlnet.config
        keys = ("in_channels", "patch_size", "caption_channels", "caption_num_tokens", "sample_size")
        wrong = [f"its {key} is {branch[key]} and not {own[key]}" for key in keys if branch[key] != own[key]]
        if self.controlnet.inner_dim != self.transformer.inner_dim:
            wrong.append(f"it is {self.controlnet.inner_dim} wide and not {self.transformer.inner_dim}")
        if branch.n_controlnet_blocks > own.num_layers:
            wrong.append(f"it has {branch.n_controlnet_blocks} blocks, more than {own.num_layers}")
        if wrong:
            raise ModelError(
                f"the control branch was made for another transformer: {'; '.join(wrong)}. "
                "Use the one that it was trained with."
            )


def _conditioning_of(embeddings: Any) -> Conditioning:
    if isinstance(embeddings, Conditioning):
        return embeddings
    if embeddings is None:
        return Conditioning()
    if not isinstance(embeddings, Tensor):
        raise ModelError(
            f"embeddings in a {type(embeddings).__name__} were given; give a tensor, such as "
            "torch.from_numpy(array) or torch.stack(list)."
        )
    if embeddings.ndim == 3:
        return Conditioning.from_tokens(embeddings)
    if embeddings.ndim != 4:
        raise ModelError(
            f"embeddings of shape {tuple(embeddings.shape)} were given; "
            "expected (batch, rows, columns, dim) or (batch, tokens, dim)."
        )
    return Conditioning(embeddings)


def _check_numbers(
    guidance_scale: float | Tensor, batch_size: int, conditioning: Conditioning, negative: Conditioning | None
) -> None:
    if isinstance(guidance_scale, Tensor) and guidance_scale.numel() not in (1, batch_size):
        raise ModelError(
            f"{guidance_scale.numel()} guidance scales were given for {batch_size} pictures; give one, or "
            "one each."
        )
    if negative is None:
        return
    if conditioning.embedding_grid is None or negative.embedding_grid is None:
        raise ModelError("negative embeddings are moved away from towards others: give both, or neither.")
    if negative.batch_size not in (1, conditioning.batch_size):
        raise ModelError(
            f"{negative.batch_size} negative embeddings were given for {conditioning.batch_size} samples; "
            "give one, or one each."
        )


def _control_scales(control_scale: float | Tensor, batch_size: int) -> Tensor | None:
    """Return one scale per picture, or None where it is 1 for all."""
    scale = torch.as_tensor(control_scale, dtype=torch.float32)
    if scale.ndim > 1 or (scale.ndim and len(scale) != batch_size):
        raise ModelError(
            f"control_scale of shape {tuple(scale.shape)} was given for {batch_size} pictures; give a "
            "number, or one per picture."
        )
    if not scale.isfinite().all():
        raise ModelError(f"control_scale is {control_scale}; 1 is usual, 0 is no control.")
    return None if scale.ndim == 0 and scale == 1 else scale.expand(batch_size)
