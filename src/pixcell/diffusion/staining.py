"""Virtual staining: from an H&E picture to tissue of the same kind in another stain.

    picture        H&E, as large as the model's pictures (1024 px, 4 x 4 fields, in the published models)
    embeddings     of its fields, by the encoder that the model was trained with
    translation    of the embeddings to the other stain, field by field (``models.translator``)
    tissue         drawn from noise and the translated embeddings, by a denoiser with the adapters of that
                   stain (``models.adapters``)

    pipeline = VirtualStainingPipeline.from_pretrained("her2", encoder=load_encoder("uni2-h", weights=file))
    her2 = pipeline(he_picture, generator=torch.Generator().manual_seed(0)).images[0]

An embedding says what kind of tissue a field holds and how strongly it is stained, not where each cell lies.
So the result is of the same kind as the input, field for field, and its cells are *not* those of the input.

A saved pipeline has the denoiser as it was before, the adapter beside it, and the translator:

    transformer/   vae/   scheduler/   as in every pipeline
    translator/    config.json and safetensors
    lora/          pytorch_lora_weights.safetensors, as ``models.adapters.save_lora`` writes it
    pixcell.json   what the numbers mean; ``stain`` says which stain comes out

Source: Yellapragada et al. 2025, "PixCell" (https://arxiv.org/abs/2506.05127), on virtual staining.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput, SchedulerMixin
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.guidance import check_guidance
from pixcell.diffusion.loading import (
    find_pipeline,
    load_controlnet,
    load_scheduler,
    load_transformer,
    load_vae,
    read_index,
    read_json,
)
from pixcell.diffusion.model_facts import check_encoder
from pixcell.diffusion.pipeline_parts import check_noise, check_output, check_saving
from pixcell.diffusion.pipelines import FACTS_FILE, PixCellPipeline
from pixcell.diffusion.schedulers import check_steps
from pixcell.errors import ModelError
from pixcell.models.adapters import load_lora, save_lora, saved_without_adapters
from pixcell.models.codec import LatentCodec
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.encoders import Encoder
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.models.translator import EmbeddingTranslator, load_translator

__all__ = ["LORA_FILE", "StainingSource", "VirtualStainingPipeline"]

LORA_FILE = "lora/pytorch_lora_weights.safetensors"
"""Where a saved pipeline keeps its adapter."""

StainingSource = Image.Image | Sequence[Image.Image] | np.ndarray | Tensor | Conditioning
"""H&E pictures (PIL, or 8-bit arrays and tensors), or embeddings of such (floating point)."""

_PARTS = ("transformer", "vae", "scheduler", "translator")
_USUAL_GUIDANCE = 1.2
_COLOUR = {"RGB", "RGBA", "P"}


class VirtualStainingPipeline(PixCellPipeline):
    """Make tissue in another stain after an H&E picture.

    Args:
        transformer: The denoiser, with the adapters of the stain, or with these merged.
        vae: A diffusers autoencoder of RGB pictures, or a ``TissueAutoencoder``.
        scheduler: Any of diffusers for what the transformer predicts.
        translator: From embeddings of H&E to those of the stain.
        facts: What the numbers mean; ``stain`` names the stain that comes out.
        controlnet: As in :class:`PixCellPipeline`.
        encoder: For pictures; embeddings need none. It is not saved, and stays on its own device.

    Raises:
        ModelError: If facts, translator, encoder and denoiser do not belong together.
    """

    model_cpu_offload_seq = "translator->transformer->vae"

    def __init__(
        self,
        transformer: PixCellTransformer2DModel,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        translator: EmbeddingTranslator,
        facts: Mapping[str, Any] | None = None,
        controlnet: PixCellControlNetModel | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__(transformer, vae, scheduler, facts, controlnet)
        self.register_modules(translator=translator)
        self.encoder = encoder
        width, into = translator.config.in_channels, translator.config.out_channels
        own = transformer.config.caption_channels
        if width != own or into != own:
            raise ModelError(
                f"the translator turns embeddings {width} wide into {into}, the denoiser takes {own}. "
                "Give the translator that belongs to this denoiser."
            )
        self._check_own_encoder()

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
        translator: EmbeddingTranslator | str | Path | None = None,
        encoder: Encoder | None = None,
        download: bool = False,
    ) -> "VirtualStainingPipeline":
        """Load a folder that :meth:`save_pretrained` wrote. No code of the folder is run.

        Args:
            pretrained_model_name_or_path: A folder with ``model_index.json``, or ``owner/name`` on the hub.
            torch_dtype: Number format of transformer and control branch. Autoencoder and translator stay in
                float32: the translator is small, and its errors add up over a hundred steps.
            transformer: Used instead of the folder's, with the adapters that it has.
            vae: Used instead of the folder's; a module, a folder or a name.
            scheduler: Used instead of the folder's.
            controlnet: Used instead of the folder's, or where it has none: a module, or the folder of one.
            translator: Used instead of the folder's; a module, a folder or a published file.
            encoder: For pictures; the one that the model was trained with.
            download: Whether what is not on this machine may be downloaded.

        Raises:
            MissingWeights: If a part is not there.
            WrongWeights: If names or shapes of tensors do not fit, or the adapter is of another denoiser.
            ModelError: If the folder is no pipeline of this class, or its facts contradict its weights.
        """
        folder = find_pipeline(pretrained_model_name_or_path, download)
        index = read_index(folder, (cls.__name__,), _PARTS)
        if transformer is None:
            transformer = load_transformer(folder / "transformer", torch_dtype)
            if (folder / LORA_FILE).is_file():
                load_lora(transformer, folder / LORA_FILE)
        if isinstance(vae, str | Path):
            autoencoder: nn.Module = LatentCodec.from_pretrained(vae, download=download).vae
        else:
            autoencoder = load_vae(folder / "vae") if vae is None else vae
        if controlnet is None and index.get("controlnet", [None])[0] is not None:
            controlnet = folder / "controlnet"
        if isinstance(controlnet, str | Path):
            controlnet = load_controlnet(Path(controlnet), torch_dtype)
        if not isinstance(translator, EmbeddingTranslator):
            translator = load_translator(folder / "translator" if translator is None else translator)
        return cls(
            transformer,
            autoencoder,
            load_scheduler(folder / "scheduler") if scheduler is None else scheduler,
            translator,
            facts=read_json(folder / FACTS_FILE) if (folder / FACTS_FILE).is_file() else {},
            controlnet=controlnet,
            encoder=encoder,
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the folder described at the top of the module.

        Scales set with ``set_adapters`` and adapters switched off are settings of a session, and not saved.

        Raises:
            ModelError: If the denoiser has several adapters: a stain has one.
        """
        check_saving(kwargs)
        names = list(getattr(self.transformer, "peft_config", {}))
        if len(names) > 1:
            raise ModelError(
                f"the denoiser has {len(names)} adapters ({', '.join(names)}), and a stain has one. "
                "Take the others out with transformer.delete_adapters(...)."
            )
        lora_file = Path(save_directory) / LORA_FILE
        lora_file.unlink(missing_ok=True)  # of an earlier saving: it would be added to other weights
        if names:  # before the rest: what is uploaded with it is what is there by then
            save_lora(self.transformer, lora_file, name=names[0])
        with saved_without_adapters(self.transformer):
            super().save_pretrained(save_directory, **kwargs)

    @property
    def usual_guidance_scale(self) -> float:
        """What suits the model: the scale saved with it; else that of the published staining, 1.2."""
        return float(self.facts.get("guidance_scale", _USUAL_GUIDANCE))

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # the first argument has another name: it may be pictures
        self,
        source: StainingSource | None = None,
        *,
        num_translation_steps: int = 100,
        keep_norm: bool = False,
        num_inference_steps: int = 20,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        encoder: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Stain pictures.

        Args:
            source: H&E pictures, or their embeddings: (batch, rows, columns, dim) or, row by row, (batch,
                tokens, dim). See :meth:`translated`.
            num_translation_steps: Calls of the translator.
            keep_norm: See :meth:`EmbeddingTranslator.translate`.
            num_inference_steps: Calls of the denoiser.
            guidance_scale: 1 is no guidance; one for all, or a tensor with one per picture. None: what suits
                the model, :attr:`usual_guidance_scale`.
            encoder: What made the embeddings (``Encoder.made_by()``), where embeddings are given.
            options: All else as in :meth:`PixCellPipeline.__call__`: ``generator``, ``latents``,
                ``num_images_per_embedding``, ``output_type``, ``callback_on_step_end``, ... (embeddings in
                ``negative_embeddings`` are taken to be of the stain already).

        Raises:
            ModelError: If pictures, embeddings or steps do not fit the model, before any compute.
        """
        # Known to be wrong before anything is encoded and translated, which takes its time.
        check_steps(num_inference_steps, self.scheduler)
        self._check_target()
        check_output(
            options.get("output_type", "pil"), options.get("callback_on_step_end_tensor_inputs", ("latents",))
        )
        if guidance_scale is not None:
            is_one = isinstance(guidance_scale, int | float)
            check_guidance(
                guidance_scale if is_one else torch.as_tensor(guidance_scale),  # type: ignore[arg-type]
                options.get("guidance_interval"),
            )
        size = self._size(options.get("height"), options.get("width"))
        if source is not None:
            number = _number_of(source) * options.get("num_images_per_embedding", 1)
            check_noise(self._latent_shape(number, *size), options.get("generator"), options.get("latents"))
        conditioning = self.translated(
            source, num_translation_steps=num_translation_steps, keep_norm=keep_norm, encoder=encoder
        )
        return super().__call__(
            conditioning,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            **options,
        )

    @torch.no_grad()
    def translated(
        self,
        source: StainingSource | None,
        *,
        num_translation_steps: int = 100,
        keep_norm: bool = False,
        encoder: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """Return what the denoiser is conditioned on: embeddings in the other stain.

        Args:
            source: Pictures: PIL; uint8 arrays (height, width, 3) or a batch of them; uint8 tensors (3,
                height, width) or a batch. Tensors of floating point are taken for embeddings.
            num_translation_steps: Calls of the translator.
            keep_norm: See :meth:`EmbeddingTranslator.translate`.
            encoder: What made the embeddings, where embeddings are given.

        Raises:
            ModelError: If size or type are not the model's, there is no encoder for pictures, or embeddings
                are of another encoder, another width or hold NaN. Before any compute.
        """
        if num_translation_steps < 1:
            raise ModelError(
                f"{num_translation_steps} steps of translation are not possible; choose 1 or more (100)."
            )
        if (
            source is None
            or isinstance(source, Conditioning)
            or (isinstance(source, Tensor) and source.is_floating_point())
        ):
            conditioning = self._conditioning(source, encoder)
        else:
            grid = self.embeddings_of(source)
            made_by = None if self.encoder is None else self.encoder.made_by()
            conditioning = self._conditioning(grid, made_by)
        if conditioning.embedding_grid is None:
            raise ModelError("there are no embeddings to translate. Give H&E pictures, or their embeddings.")
        grid = conditioning.embedding_grid.to(self._execution_device)
        moved = self.translator.translate(grid, num_translation_steps, keep_norm=keep_norm)
        return replace(conditioning.to(self._execution_device), embedding_grid=moved)

    @torch.no_grad()
    def embeddings_of(self, pictures: StainingSource) -> Float[Tensor, "batch rows columns dim"]:
        """Return the embeddings of H&E pictures, one per field, before translation.

        Raises:
            ModelError: If the pictures are not of the model's size, or there is no encoder.
        """
        images = self._pictures_of(pictures)
        if self.encoder is None:
            raise ModelError(
                "pictures were given, and the pipeline has no encoder to see them with. Set "
                "pipeline.encoder = load_encoder(name, weights=...), the one the model was trained with "
                "(uni2-h for published models), or give embeddings."
            )
        self._check_own_encoder()
        return self.encoder.grid(images, self.sample_size // self.transformer.grid_size)

    def _pictures_of(self, source: StainingSource) -> UInt8[Tensor, "batch 3 height width"]:
        images, size = _batch_of(source), self.sample_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size) or not len(images):
            mpp = self.facts.get("mpp")
            at = f" at {mpp:g} microns per pixel" if mpp else ""
            raise ModelError(
                f"pictures of shape {tuple(images.shape)} (batch, channels, height, width) were given; the "
                f"model stains colour pictures of {size} x {size} pixels{at}. Cut them to that size, and "
                "resample them if their resolution is another."
            )
        return images

    def _check_own_encoder(self) -> None:
        if self.encoder is None:
            return
        check_encoder(self.facts.get("encoder", {}), self.encoder.made_by())
        width = self.translator.config.in_channels
        if self.encoder.dim != width:
            raise ModelError(
                f"encoder {self.encoder.name} makes embeddings {self.encoder.dim} wide, the model takes "
                f"{width}. Use the encoder that the model was trained with."
            )


def _number_of(source: StainingSource) -> int:
    """How many samples a source holds."""
    if isinstance(source, Conditioning):
        return source.batch_size or 1
    is_batch = isinstance(source, Tensor) and source.is_floating_point()
    return len(source) if is_batch else len(_batch_of(source))  # type: ignore[arg-type]


def _batch_of(source: StainingSource) -> Tensor:
    """Return pictures of any kind as (batch, channels, height, width), uint8."""
    if isinstance(source, Tensor | np.ndarray):
        is_uint8 = source.dtype in (torch.uint8, np.uint8)
        if not is_uint8 or source.ndim not in (3, 4):
            raise ModelError(
                f"an array of {source.dtype} and shape {tuple(source.shape)} was given. Pictures are uint8, "
                "in batches or one; arrays (height, width, 3), tensors (3, height, width). Embeddings are "
                "tensors of floating point."
            )
        if isinstance(source, np.ndarray):
            source = torch.from_numpy(np.ascontiguousarray(source)).movedim(-1, -3)
        return source[None] if source.ndim == 3 else source
    if isinstance(source, Conditioning):
        raise ModelError("a Conditioning holds no pictures. Give pictures of H&E.")
    pictures = [source] if isinstance(source, Image.Image) else list(source)
    if not pictures:
        raise ModelError("no picture was given.")
    if odd := sorted({picture.mode for picture in pictures} - _COLOUR):
        raise ModelError(f"a picture in mode {odd[0]!r} was given; H&E is in colour (RGB).")
    if len({picture.size for picture in pictures}) > 1:
        raise ModelError("the pictures of a batch must all be equally large.")
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).movedim(-1, 1)
