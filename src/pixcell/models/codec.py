"""Pictures to latents and back: an autoencoder with its scale and shift, in one place.

Three tensors must not be confused, and only this module converts between them:

    posterior   what the autoencoder returned: mean and std of the raw latents. This is what stores hold.
    raw         a draw from the posterior, or its mean.
    latents     what diffusion models see: ``latents = (raw - shift) * scale``, and back
                ``raw = latents / scale + shift``.

Sources: scale and shift are those of the autoencoder's own configuration (``scaling_factor``,
``shift_factor``; 1.5305 and 0.0609 for Stable Diffusion 3.5). Without a shift it is 0. Where the
configuration has ``latents_mean`` and ``latents_std`` per channel, the mean is the shift and
``scaling_factor / latents_std`` the scale, as in diffusers' pipelines. Pictures are in [0, 1] here.

With a codebook (``VQModel``) raw latents are those before it: continuous, without spread. Decoding looks up
the nearest rows first.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import VQModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models import autoencoders
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.geometry import window_starts
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.blending import window_weight
from pixcell.models.codebook import nearest_rows
from pixcell.models.weights import fetch, weights_sha256

__all__ = ["PUBLISHED_CODECS", "LatentCodec", "PublishedCodec", "to_uint8", "to_unit"]

# Windows of a large decode, in latents: 1024 px, of which by default a band of 384 px is shared.
_WINDOW = 128


@dataclass(frozen=True)
class PublishedCodec:
    """An autoencoder that can be asked for by name."""

    repository: str
    """On the Hugging Face hub."""
    subfolder: str
    """Where in the repository; empty: at its root."""
    licence: str
    """As commonly stated; not looked up on the model's page."""
    gated: bool
    """Whether the hub asks to accept terms and log in."""


PUBLISHED_CODECS = {
    "sd3.5": PublishedCodec(
        "stabilityai/stable-diffusion-3.5-large", "vae", "Stability AI Community License", gated=True
    ),
    "sd3": PublishedCodec(
        "stabilityai/stable-diffusion-3-medium-diffusers", "vae", "Stability AI Community License", gated=True
    ),
    "sdxl": PublishedCodec("stabilityai/sdxl-vae", "", "MIT", gated=False),
    "sd1": PublishedCodec("stabilityai/sd-vae-ft-mse", "", "MIT", gated=False),
}
"""Autoencoders by name. Not pinned: weights are those of ``main`` when they are downloaded; what was loaded
is identified by ``LatentCodec.sha256``."""


class LatentCodec:
    """An autoencoder with its scale and shift.

    Args:
        vae: A diffusers autoencoder of pictures with 3 channels, or a :class:`TissueAutoencoder`.
        name: What columns and reports call it.
        dtype: Number format to compute in; results are float32 whatever it is.
        device: Where it runs.

    Raises:
        ModelError: If the autoencoder is not one of 2-D RGB pictures, or cannot compute in ``dtype``.
    """

    def __init__(
        self,
        vae: nn.Module,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype is torch.float16 and getattr(vae.config, "force_upcast", False):
            raise ModelError(
                f"autoencoder {name!r} asks for more range than fp16 has (force_upcast in its config); "
                "values would overflow to black pictures. Use bf16 or fp32."
            )
        self.name = name
        # Before any cast, so that the hash does not depend on the precision of this run.
        self.sha256 = weights_sha256(vae)
        # Likewise: among thousands of rows the nearest one is not that of rounded rows.
        self._codebook = vae.quantize.embedding.weight.detach().float() if isinstance(vae, VQModel) else None
        # diffusers' own ``to`` warns at every cast, even where no module asks to stay in float32.
        self.vae: Any = nn.Module.to(vae, device=device, dtype=dtype).eval().requires_grad_(False)
        self.latent_channels, self.downsampling = _geometry(self)
        self.shift, self.scale = _shift_and_scale(vae.config, self.latent_channels)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        name: str | None = None,
        download: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "LatentCodec":
        """Load an autoencoder from a folder, or by name.

        Args:
            name_or_path: A folder with ``config.json`` and safetensors, or with such a folder ``vae/`` in it;
                one of :data:`PUBLISHED_CODECS`; or ``owner/name`` on the Hugging Face hub.
            name: What columns and reports call it; by default the folder's or the published name.
            download: Whether weights that are not on this machine may be downloaded.
            device: Where it runs.
            dtype: Number format to compute in.

        Raises:
            MissingWeights: If it is not on disk and may not be downloaded, or is gated.
            WrongWeights: If the weights do not fit the configuration.
            ModelError: If the configuration names no autoencoder of pictures.
        """
        folder, found_name = _find(str(name_or_path), download)
        return cls(_load(folder), name or found_name, device=device, dtype=dtype)

    @property
    def device(self) -> torch.device:
        """Where it computes: where its weights are, or are brought for it (sequential offload)."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.vae.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        brought = next((place for place in places if place is not None), None)
        return next(self.vae.parameters()).device if brought is None else torch.device(brought)

    def to(self, device: torch.device | str) -> "LatentCodec":
        """Move to a device."""
        self.vae.to(device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Number format it computes in."""
        return next(self.vae.parameters()).dtype

    @torch.no_grad()
    def encode(
        self, images: UInt8[Tensor, "batch 3 height width"] | Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch channels h w"]]:
        """Return mean and standard deviation of the raw latents, float32.

        Args:
            images: uint8, or float in [0, 1]; both sides multiples of ``downsampling``.

        Raises:
            ValueError: If a side is not such a multiple.
        """
        if images.shape[-1] % self.downsampling or images.shape[-2] % self.downsampling:
            raise ValueError(
                f"{images.shape[-2]} x {images.shape[-1]} px cannot be encoded by {self.name}: "
                f"both sides must be multiples of {self.downsampling}"
            )
        return self._encode(to_unit(images))

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.vae.encode((images * 2 - 1).to(self.device, self.dtype))
        if "latent_dist" in output:
            return output.latent_dist.mean.float(), output.latent_dist.std.float()
        # Autoencoders without a posterior (DC-AE, TAESD) return the latents themselves.
        mean = output["latents" if "latents" in output else "latent"].float()
        return mean, torch.zeros_like(mean)

    def normalise(self, raw: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        """Return ``(raw - shift) * scale``: about unit variance, what diffusion models see."""
        return (raw - self.shift.to(raw)) * self.scale.to(raw)

    def denormalise(
        self, latents: Float[Tensor, "batch channels h w"]
    ) -> Float[Tensor, "batch channels h w"]:
        """Return ``latents / scale + shift``: what the autoencoder decodes."""
        return latents / self.scale.to(latents) + self.shift.to(latents)

    @torch.no_grad()
    def decode(
        self,
        latents: Float[Tensor, "batch channels h w"],
        *,
        window: int = _WINDOW,
        overlap: int | None = None,
        weight: Literal["bands", "gaussian"] = "bands",
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return the pictures of normalised latents, float32 in [0, 1], clamped.

        Latents wider or higher than ``window`` are decoded in windows, which bounds the memory of the
        decoder's inner layers. With "bands", of the ``overlap`` between two windows the outer third on either
        side is not used (there a decoder sees the window's border), and the middle third is blended from one
        to the other. For a decoder whose reach is at most that third the result is that of decoding at once.
        "gaussian" is how published large images are decoded, there with windows of 128 that overlap by 64:
        every window counts, its border too, by :func:`~pixcell.models.blending.gaussian_weight`.

        Args:
            latents: Normalised latents.
            window: Side of a window, in latents.
            overlap: What neighbouring windows share, in latents; by default 3/8 of ``window``.
            weight: How windows are blended.
        """
        overlap = 3 * window // 8 if overlap is None else overlap
        if not 0 <= overlap < window:
            raise ValueError(f"overlap {overlap} must be at least 0 and less than window {window}")
        raw = self.denormalise(latents.float())
        height, width = raw.shape[-2:]
        if max(height, width) <= window:
            return self._decode(raw).clamp(0, 1)
        rows = [_Span(start, window, height, overlap) for start in _starts(height, window, overlap)]
        columns = [_Span(start, window, width, overlap) for start in _starts(width, window, overlap)]
        f = self.downsampling
        pixels = torch.zeros(len(raw), 3, height * f, width * f, device=self.device)
        weights = torch.zeros(height * f, width * f, device=self.device)
        for row in rows:
            for column in columns:
                if weight == "bands":
                    share = torch.outer(row.weight(f), column.weight(f)).to(self.device)
                else:
                    share = window_weight(weight, row.size * f, column.size * f).to(self.device)
                area = (..., row.pixels(f), column.pixels(f))
                pixels[area] += self._decode(raw[..., row.latents, column.latents]) * share
                weights[area] += share
        return (pixels / weights).clamp(0, 1)

    def _decode(self, raw: Tensor) -> Tensor:
        raw = raw.to(self.device)
        if self._codebook is None:
            sample = self.vae.decode(raw.to(self.dtype), return_dict=True).sample
        else:
            # Not by the model: its own way works in float32 only, and holds all distances at once.
            rows, _ = nearest_rows(raw, self._codebook.to(raw.device))
            sample = self.vae.decode(rows.to(self.dtype), force_not_quantize=True).sample
        return sample.float() / 2 + 0.5

    def made_by(self) -> dict[str, Any]:
        """Return what a store column keeps about this codec; equal for equal weights, whatever the file."""
        return {
            "name": self.name,
            "class": type(self.vae).__name__,
            "sha256": self.sha256,
            "latent_channels": self.latent_channels,
            "downsampling": self.downsampling,
            "scale": self.scale.flatten().tolist() if self.scale.numel() > 1 else self.scale.item(),
            "shift": self.shift.flatten().tolist() if self.shift.numel() > 1 else self.shift.item(),
        }


def to_unit(images: Tensor) -> Tensor:
    """Return float32 pictures in [0, 1]: uint8 divided by 255, anything else as it is."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def to_uint8(images: Float[Tensor, "... 3 height width"]) -> UInt8[Tensor, "... 3 height width"]:
    """Return 8-bit pictures of ones in [0, 1], rounded to the nearest level.

    Rounded, not cut off: truncation darkens every picture by half a level on average.
    """
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _starts(extent: int, window: int, overlap: int) -> list[int]:
    return window_starts(extent, window, window - overlap) if extent > window else [0]


@dataclass(frozen=True)
class _Span:
    """One side of a window: where it is along a canvas of ``extent``, in latents, and how it is weighted."""

    start: int
    window: int
    extent: int
    overlap: int

    @property
    def size(self) -> int:
        return min(self.window, self.extent)

    @property
    def latents(self) -> slice:
        return slice(self.start, self.start + self.size)

    def pixels(self, factor: int) -> slice:
        return slice(self.start * factor, (self.start + self.size) * factor)

    def weight(self, factor: int) -> Tensor:
        """Return a weight per pixel: 0 on the discarded outer part, rising, 1 inside."""
        discarded = self.overlap // 3 * factor
        rising = max(self.overlap * factor - 2 * discarded, 1)
        length = self.size * factor
        position = torch.arange(length, dtype=torch.float32) + 0.5
        weight = torch.ones(length)
        if self.overlap and self.start > 0:
            weight = weight * _smooth((position - discarded) / rising)
        if self.overlap and self.start + self.size < self.extent:
            weight = weight * _smooth((length - position - discarded) / rising)
        return weight


def _smooth(fraction: Tensor) -> Tensor:
    """Rise from 0 to 1 as half a cosine; two such flanks that face each other add up to 1."""
    return 0.5 - 0.5 * torch.cos(math.pi * fraction.clamp(0, 1))


def _shift_and_scale(config: Any, channels: int) -> tuple[Tensor, Tensor]:
    factor = getattr(config, "scaling_factor", None)
    scale = torch.tensor(1.0 if factor is None else float(factor))
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if (mean is None) != (std is None):
        raise ModelError("the autoencoder's configuration has one of latents_mean and latents_std, not both.")
    if mean is None or std is None:
        return torch.tensor(float(getattr(config, "shift_factor", None) or 0.0)), scale
    if len(mean) != channels or len(std) != channels:
        raise ModelError(
            f"the autoencoder has {channels} latent channels, but its configuration states "
            f"{len(mean)} means and {len(std)} standard deviations."
        )
    return torch.tensor(mean).view(1, -1, 1, 1).float(), scale / torch.tensor(std).view(1, -1, 1, 1).float()


def _geometry(codec: LatentCodec) -> tuple[int, int]:
    """Measure channels and downsampling on a blank picture: configurations of the classes differ too much."""
    side = 64
    try:
        with torch.no_grad():
            mean, _ = codec._encode(torch.zeros(1, 3, side, side))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{codec.name} ({type(codec.vae).__name__}) does not encode a picture of 3 channels: "
            f"{' '.join(str(error).split())[:200]}. Give an autoencoder of 2-D RGB pictures."
        ) from error
    if mean.ndim != 4 or side % mean.shape[-1]:
        raise ModelError(
            f"{codec.name} turns a {side} px picture into {tuple(mean.shape)}: "
            "its latents are not a grid of whole pixel squares."
        )
    return mean.shape[1], side // mean.shape[-1]


def _find(name: str, download: bool) -> tuple[Path, str]:
    """Return the folder that holds ``config.json``, and what the codec is called."""
    published = PUBLISHED_CODECS.get(name)
    if published is None and Path(name).is_dir():
        for folder in (Path(name), Path(name) / "vae"):
            if (folder / "config.json").is_file():
                return folder, Path(name).resolve().name
        raise MissingWeights(
            f"{name} is no autoencoder folder: neither config.json nor vae/config.json is in it."
        )
    known = ", ".join(PUBLISHED_CODECS)
    if published is None and name.count("/") != 1:
        raise MissingWeights(
            f"{name!r} is neither a folder nor a known autoencoder ({known}). "
            "Give a folder with config.json and safetensors, a name, or owner/name on the hub."
        )
    repository = published.repository if published else name
    advice = "Or pass a folder that holds the autoencoder" + (
        ", or use the open one of `sdxl`." if published and published.gated else "."
    )
    subfolder = published.subfolder if published else None
    prefixes = ("", "vae/") if subfolder is None else (f"{subfolder}/" if subfolder else "",)
    patterns = [f"{prefix}{file}" for prefix in prefixes for file in ("config.json", "*.safetensors*")]
    root = fetch(repository, patterns, download=download, advice=advice)
    for prefix in reversed(prefixes):
        if (root / prefix / "config.json").is_file():
            return root / prefix, name if published else repository.split("/")[1]
    raise MissingWeights(
        f"{repository} holds no autoencoder: no {' or '.join(p + 'config.json' for p in prefixes)}."
    )


def _load(folder: Path) -> nn.Module:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / 'config.json'} is not the configuration of a diffusers model: no _class_name."
        ) from error
    model = TissueAutoencoder if kind == "TissueAutoencoder" else getattr(autoencoders, str(kind), None)
    if model is None:
        raise ModelError(f"{folder} holds a {kind}, which is no autoencoder that diffusers or pixcell knows.")
    if not any(folder.glob("*.safetensors")):
        raise MissingWeights(f"{folder} holds no safetensors file (pickled weights are not read).")
    try:
        vae, report = model.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise WrongWeights(
            f"the autoencoder in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    # diffusers fills gaps with random numbers and only warns.
    wrong = {what: names for what, names in report.items() if names and what != "error_msgs"}
    if wrong:
        listed = "; ".join(
            f"{len(names)} {what.replace('_', ' ')} ({', '.join(map(str, list(names)[:3]))})"
            for what, names in wrong.items()
        )
        raise WrongWeights(f"the weights in {folder} do not fit {kind}: {listed}.")
    # Where it was found is no property of the model, and would be saved with it.
    vae._internal_dict = FrozenDict({k: v for k, v in vae.config.items() if k != "_name_or_path"})
    return vae
