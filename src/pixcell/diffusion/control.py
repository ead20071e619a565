"""Control: a picture that says where things go, for example a mask of cells.

    picture      as large as the tissue to be made; white (255) where there is something, black elsewhere
    latents      of that picture: the mean of the autoencoder's posterior, normalised as any latents
    residuals    what a control branch makes of them, added to the blocks of the denoiser

Control belongs to the condition: rows without one get no residuals, and guidance moves away from a prediction
without control.

Source: Yellapragada et al. 2025, "PixCell" (https://arxiv.org/abs/2506.05127), on mask-guided generation.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.memory import SamplingMemory
from pixcell.errors import ModelError
from pixcell.models.codec import LatentCodec
from pixcell.models.controlnet import PixCellControlNetModel

__all__ = ["Control", "ControlImage", "as_control", "control_by", "control_latents_of", "control_pictures"]

_EIGHT_BIT = {"1", "L", "LA", "P", "RGB", "RGBA"}

ControlImage = Image.Image | np.ndarray | Tensor | Sequence[Image.Image]
"""A control image, or a batch of them; see :func:`control_pictures`."""


Control = Callable[[Tensor, Tensor, Conditioning], Sequence[Tensor] | None]
"""``(latents, timestep, conditioning)`` to what is added to each block, or None where no row has control."""


def control_by(
    controlnet: PixCellControlNetModel, timesteps: Tensor | None = None, fixed_batch: int | None = None
) -> Control:
    """Return a control branch as what :func:`~pixcell.diffusion.denoisers.denoiser_of` takes.

    The branch runs on the rows that have a control: in a batch for guidance, on the conditional half.

    Args:
        controlnet: The branch.
        timesteps: All that will be asked for, where they are known.
        fixed_batch: Run the branch on exactly so many rows at a time. How many of a batch have a control is a
            matter of other rows too, and kernels are chosen by it. None: on all at once.
    """
    memory = SamplingMemory(controlnet, timesteps)

    def residuals_of(latents: Tensor, timestep: Tensor, part: Conditioning) -> tuple[Tensor, ...]:
        null = controlnet.unconditional_embedding.to(latents.device)
        time, condition, dropped = memory.recall(
            timestep,
            part.tokens(null, len(latents)).to(controlnet.dtype),
            None
            if part.embedding_grid is not None
            else torch.ones(len(latents), dtype=torch.bool, device=latents.device),
        )
        (residuals,) = controlnet(
            latents.to(controlnet.dtype),
            time,
            condition,
            part.control_latents,
            1.0 if part.control_scale is None else part.control_scale,
            return_dict=False,
            dropped=dropped,
        )
        return tuple(residuals)

    def control(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Sequence[Tensor] | None:
        rows = conditioning.controlled
        if rows is None or not rows.any():
            return None
        chosen = rows.nonzero().flatten().to(latents.device)
        conditioning = conditioning.to(latents.device)
        size = len(chosen) if fixed_batch is None else fixed_batch
        parts = []
        for start in range(0, len(chosen), size):
            # What is missing in the last call is filled with copies of its last row.
            places = torch.arange(start, start + size, device=latents.device).clamp(max=len(chosen) - 1)
            taken = chosen[places]
            time = timestep[taken] if timestep.ndim and len(timestep) == len(latents) else timestep
            residuals = residuals_of(latents[taken], time, conditioning.select(taken))
            parts.append([residual[: len(chosen) - start] for residual in residuals])
        joined = tuple(torch.cat(of_block) for of_block in zip(*parts, strict=True))
        if len(chosen) == len(latents):
            return joined
        return tuple(_scattered(residual, chosen, len(latents)) for residual in joined)

    return control


def as_control(
    codec: LatentCodec, control: ControlImage, height: int, width: int
) -> Float[Tensor, "batch _ _ _"] | UInt8[Tensor, "batch 3 _ _"]:
    """Check a control image and return a batch of pictures; latents are returned as they are.

    Args:
        codec: The autoencoder that the model was trained with.
        control: Pictures as :func:`control_pictures` takes them, or their normalised latents.
        height: Of the tissue to be made, in pixels.
        width: Of the tissue to be made, in pixels.

    Raises:
        ModelError: If size, values or number of channels are not those of a control image.
    """
    if _is_encoded(control, codec, height, width):
        assert isinstance(control, Tensor)
        return control
    return control_pictures(control, height, width)


def control_latents_of(
    codec: LatentCodec, control: ControlImage, height: int, width: int
) -> Float[Tensor, "batch channels h w"]:
    """Return what a control branch gets: the normalised posterior mean of the pictures, float32.

    Pictures are encoded one at a time, so that one does not depend on others in its batch, and in the
    autoencoder's own number format, whatever that of the denoiser is. Arguments and errors are those of
    :func:`as_control`.
    """
    batch = as_control(codec, control, height, width)
    if _is_encoded(batch, codec, height, width):
        return batch.float()
    # Contiguous: kernels depend on the layout in memory, which differs with the form that was given.
    pictures = (picture.contiguous() for picture in batch.split(1))
    return torch.cat([codec.normalise(codec.encode(picture)[0]) for picture in pictures])


def _is_encoded(control: ControlImage, codec: LatentCodec, height: int, width: int) -> bool:
    """Whether ``control`` has the shape of latents and not of pictures."""
    latent_size = (codec.latent_channels, height // codec.downsampling, width // codec.downsampling)
    return isinstance(control, Tensor) and control.ndim == 4 and tuple(control.shape[1:]) == latent_size


def control_pictures(
    control: ControlImage, height: int, width: int
) -> UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]:
    """Return control images as a batch: uint8 as it is, boolean masks black and white, float in [0, 1].

    Nothing is resized: how a mask is to be resampled depends on what it is a mask of.

    Args:
        control: PIL pictures; arrays (height, width), (height, width, channels), or a batch of either;
            tensors (height, width), (channels, height, width), or a batch of the latter. 1 or 3 channels;
            boolean, uint8 with 0 for black and 255 for white, or float in [0, 1].
        height: Expected, in pixels.
        width: Expected, in pixels.

    Raises:
        ModelError: If size, values or number of channels are not those of a control image.
    """
    if isinstance(control, Tensor):
        pictures = control[None, None] if control.ndim == 2 else control
        pictures = pictures[None] if pictures.ndim == 3 else pictures
    else:
        pictures = _channels_first(control if isinstance(control, np.ndarray) else _array_of(control))
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise ModelError(
            f"a batch of control images of shape {tuple(pictures.shape)} was given. Expected PIL pictures, "
            "arrays (height, width) or (height, width, 3), or tensors (1 or 3 channels, height, width)."
        )
    if tuple(pictures.shape[2:]) != (height, width):
        raise ModelError(
            f"the control image is {pictures.shape[2]} x {pictures.shape[3]} pixels, the picture to be made "
            f"{height} x {width}. Crop or resample it to that size (masks: nearest neighbour)."
        )
    return _with_full_range(pictures).expand(-1, 3, -1, -1)


def _array_of(control: Image.Image | Sequence[Image.Image]) -> np.ndarray:
    pictures = [control] if isinstance(control, Image.Image) else list(control)
    if not pictures:
        raise ModelError("no control image was given; leave control out to make pictures without one.")
    if deep := sorted({picture.mode for picture in pictures} - _EIGHT_BIT):
        raise ModelError(
            f"a control image in mode {deep[0]!r} was given, whose values are no brightness. For a mask of "
            "labels give the boolean array labels > 0."
        )
    if len({picture.size for picture in pictures}) > 1:
        raise ModelError("the control images of a batch must all be equally large.")
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def _channels_first(array: np.ndarray) -> Tensor:
    """Return (batch, channels, height, width) of any of the array layouts."""
    has_channels = array.ndim >= 3 and array.shape[-1] in (1, 3)
    if not has_channels:
        array = array[..., None]
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (tensor.unsqueeze(0) if tensor.ndim == 3 else tensor).movedim(-1, 1)


def _with_full_range(pictures: Tensor) -> Tensor:
    """Return black and white as the autoencoder takes them, and refuse values that can only be a mistake."""
    if pictures.dtype == torch.bool:
        return pictures.to(torch.uint8) * 255
    if pictures.dtype != torch.uint8 and not pictures.is_floating_point():
        raise ModelError(
            f"a control image of {pictures.dtype} was given. Give a boolean mask (labels > 0), uint8 with 0 "
            "and 255, or float in [0, 1]."
        )
    least, most = pictures.min().item(), pictures.max().item()
    if pictures.dtype == torch.uint8:
        # A mask of labels, or of 0 and 1, would be all but black to the autoencoder.
        if 0 < most < 128:
            raise ModelError(
                f"the brightest pixel of the control image is {most} of 255. A mask is 0 and 255: give a "
                "boolean array (labels > 0), or multiply by 255. If it is meant to be dark, give float in "
                "[0, 1]."
            )
        return pictures
    if not (least >= 0 and most <= 1):  # so also where a value is NaN
        raise ModelError(
            f"a control image of float values reaches from {least:g} to {most:g}. Expected 0 (black) to 1."
        )
    return pictures.float()


def _scattered(part: Tensor, rows: Tensor, batch_size: int) -> Tensor:
    whole = part.new_zeros(batch_size, *part.shape[1:])
    whole[rows] = part
    return whole
