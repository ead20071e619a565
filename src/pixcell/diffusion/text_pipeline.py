"""Pictures from text: a U-Net that attends to the token states of a prompt, as in PathLDM.

    pipeline = TextPipeline.from_pretrained("pathldm-plip")
    pictures = pipeline("high tumor; low til; invasive ductal carcinoma, grade 2").images

A pipeline folder is in diffusers' layout (unet, vae, text_encoder, tokenizer, scheduler). Beside it,
``pixcell.json`` says what the numbers mean:

    text              how many places a prompt has: policy, length, too_long, as ``TextEncoder`` takes them
    mpp               microns per pixel of its pictures
    guidance_scale    what suits the model

The variant without text has a ``class_embedder`` instead of text encoder and tokenizer.

"No condition" is the empty prompt (or the last class), encoded like any other: a U-Net without a mask attends
to its padding too.

Source: Yellapragada et al. 2023, "PathLDM: Text conditioned Latent Diffusion Model for Histopathology"
(https://arxiv.org/abs/2309.00748): 50 DDIM steps, guidance 1.5.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from pixcell.diffusion.conditioning import Conditioning, Denoiser
from pixcell.diffusion.guidance import check_guidance, guided
from pixcell.diffusion.loading import (
    find_pipeline,
    load_model,
    load_scheduler,
    load_vae,
    read_index,
    read_json,
)
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
from pixcell.diffusion.sampling import (
    check_eta,
    check_steps,
    in_fixed_batches,
    lay_out,
    sample_latents,
    target_of,
)
from pixcell.errors import ModelError
from pixcell.models.codec import LatentCodec
from pixcell.models.pathldm import ClassEmbedder
from pixcell.models.text import TextEncoder

__all__ = ["TextPipeline", "text_denoiser_of"]

_PARTS = ("unet", "vae", "scheduler")


class TextPipeline(TissuePipeline):
    """Generate tissue from prompts, from text states, or from classes.

    Args:
        unet: Predicts what the scheduler takes.
        vae: A ``VQModel``, or any autoencoder of RGB pictures.
        scheduler: For PathLDM :func:`~pixcell.diffusion.schedulers.pathldm_scheduler`, or any of diffusers.
        text_encoder: A ``CLIPTextModel``. None: prompts are not taken, text states are.
        tokenizer: Its tokenizer.
        class_embedder: Turns classes into tokens, in the variant without text.
        facts: What the numbers mean; see the top of the module.

    Raises:
        ModelError: If parts do not fit each other, or the facts do not fit the parts.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "class_embedder"]  # noqa: RUF012 (diffusers' own)

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        class_embedder: ClassEmbedder | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet,
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            class_embedder=class_embedder,
        )
        self.facts: dict[str, Any] = dict(facts or {})
        self._target = target_of(scheduler)
        self._codec: LatentCodec | None = None
        self._check_parts()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        scheduler: SchedulerMixin | None = None,
        download: bool = False,
    ) -> "TextPipeline":
        """Load a pipeline folder. Weights are read as data; no code of the folder is run.

        Args:
            pretrained_model_name_or_path: A folder with ``model_index.json``, or ``owner/name`` on the hub.
            torch_dtype: Number format of the U-Net and the text encoder. The autoencoder stays in float32: it
                runs once a picture.
            scheduler: Used instead of the folder's.
            download: Whether what is not on this machine may be downloaded.

        Raises:
            MissingWeights: If a part is not there.
            WrongWeights: If names or shapes of tensors do not fit.
            ModelError: If the folder is no pipeline of this class, or its facts contradict its parts.
        """
        folder = find_pipeline(pretrained_model_name_or_path, download)
        index = read_index(folder, (cls.__name__,), _PARTS)
        has = {name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
        facts = read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {}
        text = None
        if "text_encoder" in has:
            text = TextEncoder.from_pretrained(folder, **_text_settings(facts), dtype=torch_dtype)
        return cls(
            unet=load_model(UNet2DConditionModel, folder / "unet", torch_dtype, ("UNet2DConditionModel",)),
            vae=load_vae(folder / "vae"),
            scheduler=load_scheduler(folder / "scheduler") if scheduler is None else scheduler,
            text_encoder=None if text is None else text.tower,
            tokenizer=None if text is None else text.tokenizer,
            class_embedder=load_model(
                ClassEmbedder, folder / "class_embedder", torch_dtype, ("ClassEmbedder",)
            )
            if "class_embedder" in has
            else None,
            facts=facts,
        )

    @property
    def codec(self) -> LatentCodec:
        """The autoencoder with its scale and shift, on the device where it computes."""
        bring(self.vae)
        return self._codec_where_it_is

    @property
    def _codec_where_it_is(self) -> LatentCodec:
        """For its sizes, which need no device."""
        if self._codec is None or self._codec.vae is not self.vae:
            name = self.facts.get("codec", {}).get("name", type(self.vae).__name__)
            self._codec = LatentCodec(self.vae, name, device=self.vae.device, dtype=self.vae.dtype)
        return self._codec

    @property
    def text(self) -> TextEncoder:
        """The text encoder with its tokenizer and its policy.

        Raises:
            ModelError: If the pipeline has none.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ModelError(
                "this pipeline has no text encoder with its tokenizer. Give text_states, or build it with "
                "both."
            )
        bring(self.text_encoder)
        name = self.facts.get("text", {}).get("name", "text")
        return TextEncoder(self.text_encoder, self.tokenizer, **_text_settings(self.facts), name=name)

    @property
    def sample_size(self) -> int:
        """Side of the pictures the model was trained on, in pixels."""
        return int(self.unet.config.sample_size) * self._codec_where_it_is.downsampling

    @property
    def usual_guidance_scale(self) -> float:
        """What suits the model: the scale saved with it; else that of the published example, 1.5."""
        return float(self.facts.get("guidance_scale", 1.5))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        text_states: Float[Tensor, "batch tokens dim"] | None = None,
        negative_text_states: Float[Tensor, "rows tokens dim"] | None = None,
        class_labels: int | Sequence[int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | Tensor | None = None,
        guidance_interval: tuple[float, float] | None = None,
        eta: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        fixed_batch: int | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        What they show is said once: as prompt, as text states, or as class. Without any of them, nothing is.

        Args:
            prompt: One text, or one per sample. See :mod:`pixcell.models.prompts` for how PathLDM words them.
            negative_prompt: What guidance moves away from, instead of the empty text; one for all, or one
                each.
            text_states: States of prompts, encoded before. Guidance then needs ``negative_text_states``, or a
                text encoder for the empty prompt.
            negative_text_states: What guidance moves away from, encoded before; one for all or one each.
            class_labels: Classes (:func:`pixcell.models.prompts.class_label`), where the model has them.
            num_inference_steps: Calls of the denoiser.
            guidance_scale: 1 is no guidance; one for all, or a tensor with one per picture. None:
                :attr:`usual_guidance_scale`.
            guidance_interval: Timesteps, lowest and highest, at which to guide. None: at all.
            eta: For DDIM: how much of a step's variance is fresh noise, 0 to 1. None: as the scheduler is
                set.
            num_images_per_prompt: Pictures per prompt, side by side in the result.
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
            fixed_batch: Run the network on exactly so many samples at a time, so that a picture does not
                depend on the size of its batch; see :func:`~pixcell.diffusion.sampling.in_fixed_batches`.
                None: on all at once.

        Raises:
            ModelError: If prompts, sizes, scales or steps do not fit the model; before the U-Net computes.
        """
        check_output(output_type, callback_on_step_end_tensor_inputs)
        check_steps(num_inference_steps, self.scheduler)
        self._check_target()
        scale = self.usual_guidance_scale if guidance_scale is None else guidance_scale
        check_guidance(scale, guidance_interval)
        if num_images_per_prompt < 1:
            raise ModelError(f"{num_images_per_prompt} pictures cannot be made; ask for at least 1.")
        if sum(given is not None for given in (prompt, text_states, class_labels)) > 1:
            raise ModelError("prompt, text_states and class_labels say the same thing; give one of them.")
        batch_size = _number_of(prompt, text_states, class_labels) * num_images_per_prompt
        if isinstance(scale, Tensor) and scale.numel() not in (1, batch_size):
            raise ModelError(
                f"{scale.numel()} guidance scales were given for {batch_size} pictures: one, or one each."
            )
        check_eta(self.scheduler, eta)
        shape = (batch_size, *self._latent_shape(height, width))
        noise = noise_like(shape, generator, latents, self._execution_device)

        conditions = self._states(prompt, text_states, class_labels)
        said = (prompt, text_states, class_labels, negative_prompt, negative_text_states)
        negative = None
        if any(given is not None for given in said) and not (isinstance(scale, int | float) and scale == 1):
            negative = self._negative(conditions, negative_prompt, negative_text_states)
        conditioning = Conditioning(text_states=conditions).repeat(num_images_per_prompt)
        conditioning.check_finite()

        denoiser = text_denoiser_of(self.unet)
        if fixed_batch is not None:
            denoiser = in_fixed_batches(denoiser, fixed_batch)
        if negative is not None:
            if negative.shape[0] > 1:
                negative = negative.repeat_interleave(num_images_per_prompt, 0)
            away = Conditioning(text_states=negative)
            away.check_finite()
            denoiser = guided(denoiser, scale, guidance_interval, away.to(self._execution_device))
        lay_out(self.scheduler, num_inference_steps)
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            result = sample_latents(
                denoiser,
                self.scheduler,
                noise,
                conditioning,
                num_inference_steps,
                generator,
                reporting(self, bar, callback_on_step_end, callback_on_step_end_tensor_inputs),
                eta,
            )
        images = as_output(self, result, output_type, one_by_one=fixed_batch is not None)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _states(
        self,
        prompt: str | Sequence[str] | None,
        text_states: Tensor | None,
        class_labels: int | Sequence[int] | None,
    ) -> Tensor:
        """Say what the pictures show, in states that the U-Net attends to."""
        if text_states is not None:
            return self._checked(text_states)
        if class_labels is not None:
            return self._classes([class_labels] if isinstance(class_labels, int) else list(class_labels))
        if prompt is not None:
            return self._checked(self.text(prompt).states)
        return self._nothing()

    def _nothing(self) -> Tensor:
        """The states of no condition, for one sample."""
        if self.class_embedder is not None and self.text_encoder is None:
            return self._classes([self.class_embedder.unconditional_label])
        return self._checked(self.text("").states)

    def _negative(
        self,
        conditions: Tensor,
        negative_prompt: str | Sequence[str] | None,
        negative_text_states: Tensor | None,
    ) -> Tensor:
        """What guidance moves away from."""
        if negative_prompt is not None and negative_text_states is not None:
            raise ModelError("negative_prompt and negative_text_states say the same thing; give one of them.")
        if negative_text_states is not None:
            negative = self._checked(negative_text_states)
        elif negative_prompt is not None:
            negative = self._checked(self.text(negative_prompt).states)
        else:
            negative = self._nothing()
        if negative.shape[0] not in (1, conditions.shape[0]):
            raise ModelError(
                f"{negative.shape[0]} negative prompts were given for {conditions.shape[0]}; "
                "give one, or as many."
            )
        if negative.shape[1] != conditions.shape[1]:
            raise ModelError(
                f"prompts have {conditions.shape[1]} places, negative ones {negative.shape[1]}. "
                "Encode both with the same policy."
            )
        return negative

    def _classes(self, labels: list[int]) -> Tensor:
        if self.class_embedder is None:
            raise ModelError("this pipeline takes prompts, not classes: it has no class_embedder.")
        states: Tensor = self.class_embedder(torch.tensor(labels, device=self._execution_device))
        return self._checked(states)

    def _checked(self, states: Tensor) -> Tensor:
        width = self.unet.config.cross_attention_dim
        if states.ndim != 3 or states.shape[2] != width:
            raise ModelError(
                f"text states of shape {tuple(states.shape)} were given; "
                f"the U-Net takes (batch, places, {width})."
            )
        return states

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        factor = self._codec_where_it_is.downsampling
        step = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        height = self.sample_size if height is None else height
        width = self.sample_size if width is None else width
        if height < 1 or width < 1 or height % step or width % step:
            raise ModelError(f"{height} x {width} pixels: both sides must be multiples of {step}.")
        return int(self.unet.config.in_channels), height // factor, width // factor

    def _check_target(self) -> None:
        """A scheduler that takes velocity for noise makes pictures all the same, and wrong ones."""
        given = target_of(self.scheduler)
        if given != self._target:
            raise ModelError(
                f"the model predicts the {self._target}, and its {type(self.scheduler).__name__} takes that "
                f"for the {given}."
            )

    def _check_parts(self) -> None:
        config = self.unet.config
        channels = self._codec_where_it_is.latent_channels
        if not channels == config.in_channels == config.out_channels:
            raise ModelError(
                f"the autoencoder makes {channels} channels, the U-Net turns "
                f"{config.in_channels} into {config.out_channels}. Give parts of one model."
            )
        if (self.text_encoder is None) != (self.tokenizer is None):
            raise ModelError("a text encoder and its tokenizer come together; give both or neither.")
        widths = {}
        if self.text_encoder is not None:
            widths["text encoder"] = self.text_encoder.config.hidden_size
            self.text  # noqa: B018 (refuses settings that contradict the text encoder)
        if self.class_embedder is not None:
            widths["class embedder"] = self.class_embedder.config.embed_dim
        for part, width in widths.items():
            if width != config.cross_attention_dim:
                raise ModelError(
                    f"the {part} makes states {width} wide, the U-Net takes {config.cross_attention_dim}. "
                    "Give parts of one model."
                )


def _number_of(*said: str | int | Sequence[str] | Sequence[int] | Tensor | None) -> int:
    """How many samples a prompt, text states or classes ask for; one if nothing is said."""
    return next((1 if isinstance(each, str | int) else len(each) for each in said if each is not None), 1)


def _text_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    settings = facts.get("text", {})
    return {name: settings[name] for name in ("policy", "length", "too_long") if name in settings}


def text_denoiser_of(unet: UNet2DConditionModel) -> Denoiser:
    """Return a U-Net as a denoiser whose condition is text states.

    Every sample has text: where a condition is to be dropped, that of the empty prompt stands in its place.
    """

    def denoise(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.text_states is None or conditioning.dropped is not None:
            raise ModelError(
                "a U-Net attends to text in every sample. Give the states of the empty prompt where there is "
                "to be no condition: guided(..., negative=...)."
            )
        dtype = unet.dtype
        states = conditioning.text_states.to(latents.device, dtype)
        output = unet(latents.to(dtype), timestep, states, return_dict=False)[0]
        return output.to(latents.dtype)

    return denoise
