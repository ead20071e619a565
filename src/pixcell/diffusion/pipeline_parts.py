"""What every pipeline does alike: the noise to begin with, reports on the way, pictures at the end."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from pixcell.errors import ModelError
from pixcell.files import write_json, writing_to
from pixcell.models.codec import to_uint8
from pixcell.models.threads import side_by_side

__all__ = [
    "FACTS_FILE",
    "OUTPUT_TYPES",
    "OnStepEnd",
    "TissuePipeline",
    "as_output",
    "bring",
    "check_noise",
    "check_output",
    "check_saving",
    "noise_like",
    "reporting",
]

FACTS_FILE = "pixcell.json"
"""What the numbers of a saved pipeline mean."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

OnStepEnd = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]
"""Gets the pipeline, step number, timestep and ``{"latents": ...}``; may return other latents likewise."""


class TissuePipeline(DiffusionPipeline):
    """What pipelines of pixcell do alike: share their parts, save with :data:`FACTS_FILE`, and move.

    A subclass has ``facts``, and a ``vae`` among its modules.
    """

    facts: dict[str, Any]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **changes: Any) -> Self:
        """Return a pipeline of the same parts, some of them changed; no weight is copied.

        Args:
            pipeline: One of ours, for example to give it a control branch.
            changes: Arguments of the constructor.
        """
        made: Self = _parts_of(cls, pipeline, changes)
        return made

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the diffusers layout, and ``pixcell.json``; see :meth:`DiffusionPipeline.save_pretrained`."""
        check_saving(kwargs)
        _write_facts(Path(save_directory), self.facts)
        super().save_pretrained(str(save_directory), **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device and number format; see :meth:`DiffusionPipeline.to`.

        An autoencoder whose activations need more range than float16 has computes in float32 all the same.
        """
        super().to(*args, **kwargs)
        if self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False):
            self.vae.to(torch.float32)
        return self


def _parts_of(kind: Callable[..., Any], pipeline: Any, changes: Mapping[str, Any]) -> Any:
    """Return a pipeline of another's parts, its facts and its encoder, as far as the class takes them."""
    parts = {
        **pipeline.components,
        "facts": getattr(pipeline, "facts", None),
        "encoder": getattr(pipeline, "encoder", None),
    }
    known = inspect.signature(kind).parameters
    return kind(**{**{name: part for name, part in parts.items() if name in known}, **changes})


def check_output(output_type: str, callback_inputs: Sequence[str]) -> None:
    """Refuse an output type, or tensors for a callback, that there are not.

    Raises:
        ValueError: Names those that there are.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {output_type!r} is none of {', '.join(OUTPUT_TYPES)}")
    unknown = set(callback_inputs) - {"latents"}
    if unknown:
        raise ValueError(f"a callback can get latents, not {', '.join(sorted(unknown))}")


def check_saving(options: Mapping[str, Any]) -> None:
    """Refuse ways of saving that pixcell would not read back.

    Raises:
        ModelError: Names the way out.
    """
    if options.get("variant") is not None:
        raise ModelError(
            f"variant {options['variant']!r}: a pipeline folder holds one number format here. Convert the "
            "pipeline (pipeline.to(torch.float16)) and save it to a folder of its own."
        )
    if not options.get("safe_serialization", True):
        raise ModelError("pickled weights are not written: leave safe_serialization out (safetensors).")


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write :data:`FACTS_FILE`, or take away that of a model that was saved there before.

    To be called before the parts are saved: what is uploaded with them is what is there by then.
    """
    if facts:
        write_json(folder / FACTS_FILE, facts)
    else:
        with writing_to(folder):
            (folder / FACTS_FILE).unlink(missing_ok=True)


def noise_like(
    shape: tuple[int, int, int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
    device: torch.device,
) -> Float[Tensor, "batch channels height width"]:
    """Return the noise to begin with, float32: that given, or a fresh draw.

    Args:
        shape: What the pictures need.
        generator: One for the batch, or one per sample.
        latents: Standard normal noise to start from, instead of drawing it.
        device: Where to compute.

    Raises:
        ModelError: If the latents given, or the generators, are not as many as the samples.
    """
    check_noise(shape, generator, latents)
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    return latents.to(device, torch.float32)


def check_noise(
    shape: tuple[int, int, int, int],
    generator: torch.Generator | list[torch.Generator] | None,
    latents: Tensor | None,
) -> None:
    """Refuse what :func:`noise_like` cannot make noise of, without drawing any.

    Raises:
        ModelError: If the latents given, or the generators, are not as many as the samples.
    """
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ModelError(
            f"{len(generator)} generators were given for {shape[0]} pictures; give one, or one each."
        )
    if latents is not None and tuple(latents.shape) != shape:
        raise ModelError(f"the latents given are {tuple(latents.shape)}; these pictures need {shape}.")


def reporting(
    pipeline: Any, bar: Any, callback: OnStepEnd | None, callback_inputs: Sequence[str]
) -> Callable[[int, Tensor, Tensor], Tensor | None]:
    """Return what is called after each step: it moves the progress bar and asks the user's callback."""

    def on_step(number: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
        bar.update()
        if callback is None:
            return None
        tensors = {"latents": latents} if "latents" in callback_inputs else {}
        changed = callback(pipeline, number, timestep, tensors) or {}
        return changed.get("latents")

    return on_step


def as_output(
    pipeline: Any,
    latents: Float[Tensor, "batch channels height width"],
    output_type: str,
    *,
    one_by_one: bool,
) -> Any:
    """Decode, and hand out in the form asked for.

    Args:
        pipeline: Its ``codec`` decodes.
        latents: Clean ones, normalised.
        output_type: One of :data:`OUTPUT_TYPES`.
        one_by_one: Decode each by itself, so that a picture does not depend on its batch.

    Raises:
        ModelError: If a picture is not finite.
    """
    if output_type == "latent":
        return latents
    decode = pipeline.codec.decode
    # The decoder's kernels depend on the batch as the denoiser's do. One at a time is a fixed size too.
    if one_by_one:
        images = torch.cat(side_by_side(lambda part: decode(part.clone()), latents.split(1), latents.device))
    else:
        images = decode(latents)
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


def bring(module: nn.Module) -> None:
    """Move a module to where it computes, if it is kept elsewhere until it is called (CPU offload).

    Only calls of ``forward`` bring it by themselves; encoding and decoding are other methods.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
