"""Feature spaces: the networks that say what a picture is like, and pictures turned into features by them.

``inception`` is the standard network of the Frechet inception distance, by torch-fidelity, with the standard
weights; its figures compare with those of other programs. Any encoder of the package is a feature space, too.
A space that also conditions the generator flatters it: the generator was asked to look right just there.
``random-vgg16`` needs no weights and conditions nothing: a network that was never trained.
"""

import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pixcell.console import progress
from pixcell.errors import EvaluationError, MissingExtra, MissingWeights, WrongWeights
from pixcell.evaluation.pictures import Picture, PictureSet, fields_of, reading
from pixcell.files import sha256_of
from pixcell.models.encoders import Encoder, load_encoder
from pixcell.models.weights import choose_device, read_weights, weights_sha256

__all__ = [
    "EncoderSpace",
    "Extractor",
    "Features",
    "InceptionSpace",
    "RandomSpace",
    "extract",
    "load_extractor",
]

_INCEPTION_NAME = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_SHA256_START = "6726825d"
_INCEPTION_LAYER = "2048"


@runtime_checkable
class Extractor(Protocol):
    """Turns pictures into feature vectors."""

    name: str
    dim: int

    def __call__(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Return one vector per picture. Resizes by its own rule; results do not depend on the batch."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the space: name, weights' checksum, resize rule. JSON values."""


class InceptionSpace:
    """InceptionV3 of 2015, last pooling layer: the 2048 features of torch-fidelity and pytorch-fid.

    Source: Heusel et al. 2017 (https://arxiv.org/abs/1706.08500); network by torch-fidelity.
    """

    name = "inception"
    dim = 2048

    def __init__(self, weights: Path, device: torch.device) -> None:
        """Load the network from a weight file.

        Raises:
            MissingExtra: If torch-fidelity is not installed.
            MissingWeights: If there is no such file.
            WrongWeights: If the file does not hold this network.
        """
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingExtra("torch_fidelity", "eval", "the feature space 'inception'") from error
        # The network's own loader would run whatever code a pickle holds: it is given clean bytes instead.
        buffer = io.BytesIO()
        torch.save(read_weights(weights), buffer)
        buffer.seek(0)
        try:
            self._network = FeatureExtractorInceptionV3(self.name, [_INCEPTION_LAYER], buffer).to(device)
        except RuntimeError as error:
            raise WrongWeights(
                f"{weights} does not hold the Inception network of torch-fidelity ({_INCEPTION_NAME}): "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        self._device = device
        self._weights = weights
        self._sha256 = sha256_of(weights)

    def __call__(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Return (batch, 2048) float32 on the CPU."""
        with torch.inference_mode():
            return self._network(images.to(self._device))[0].float().cpu()

    def describe(self) -> dict[str, Any]:
        """Return name, checksum of the weight file, and whether it is the standard one."""
        return {
            "name": self.name,
            "dim": self.dim,
            "sha256": self._sha256,
            "weights": self._weights.name,
            "is_standard": self._sha256.startswith(_INCEPTION_SHA256_START),
            "resize": "bilinear to 299 x 299 as in TensorFlow 1, without antialiasing",
            "layer": "last pooling layer (2048)",
        }


class RandomSpace:
    """VGG16 with random weights, 64 features: texture and form as a network sees them that learned nothing.

    For pictures unlike those of ImageNet such features rank generators about as well as trained ones, and no
    generator is conditioned on them. Here the convolutions are followed by a mean over positions and a random
    projection, instead of two random layers of 4096, so that any size of picture goes in. All pictures are
    nearly alike to such a network; so each feature is shifted and scaled by its mean and spread over
    64 drawn textures, which are the same every time.

    Source: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models"
    (https://arxiv.org/abs/2002.09797), section 4, the embedding "R64".
    """

    name = "random-vgg16"
    dim = 64
    _SEED = 0
    _SIDE = 128

    def __init__(self, device: torch.device) -> None:
        from torchvision.models import vgg16

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._SEED)
            with torch.device("meta"):
                network = vgg16(weights=None, init_weights=False).features
            network = network.to_empty(device="cpu")
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                    nn.init.zeros_(module.get_parameter("bias"))
            projection = nn.Linear(512, self.dim, bias=False)
            nn.init.orthogonal_(projection.weight, math.sqrt(512 / self.dim))
        self._sha256 = weights_sha256(nn.ModuleList([network, projection]))
        self._network = network.eval().to(device)
        self._projection = projection.to(device)
        self._device = device
        self._centre, self._spread = torch.zeros(self.dim), torch.ones(self.dim)
        drawn = torch.cat([self(part) for part in _textures(64, self._SIDE, self._SEED).split(16)])
        self._centre, self._spread = drawn.mean(0), drawn.std(0)

    def __call__(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Return (batch, 64) float32 on the CPU."""
        with torch.inference_mode():
            pixels = images.to(self._device).float() / 127.5 - 1
            size = (self._SIDE, self._SIDE)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
            features = self._projection(self._network(pixels).mean((2, 3))).float().cpu()
        return (features - self._centre) / self._spread

    def describe(self) -> dict[str, Any]:
        """Return name, seed, and the checksum of the weights that follow from it."""
        return {
            "name": self.name,
            "dim": self.dim,
            "sha256": self._sha256,
            "seed": self._SEED,
            "resize": f"bilinear, antialiased, to {self._SIDE} x {self._SIDE}",
            "layer": "last convolutions, mean over positions, random projection, standardised on textures",
        }


def _textures(count: int, side: int, seed: int) -> UInt8[Tensor, "count 3 side side"]:
    """Draw clouds with a falling spectrum, in the colours of H&E and around: a scale for features."""
    generator = torch.Generator().manual_seed(seed)
    frequency = (torch.fft.rfftfreq(side)[None] ** 2 + torch.fft.fftfreq(side)[:, None] ** 2).sqrt()
    pink = torch.tensor([200.0, 150.0, 190.0])[:, None, None]
    textures = []
    for _ in range(count):
        spectrum = torch.view_as_complex(torch.randn(3, side, side // 2 + 1, 2, generator=generator))
        clouds = torch.fft.irfft2(spectrum / (frequency + 1 / side), s=(side, side))
        mixed = torch.eye(3) + 0.4 * torch.randn(3, 3, generator=generator)
        clouds = torch.einsum("ij,jhw->ihw", mixed, clouds / clouds.std())
        contrast = 15 + 40 * torch.rand(1, generator=generator)
        colour = pink + 30 * torch.randn(3, 1, 1, generator=generator)
        textures.append((colour + contrast * clouds).clamp(0, 255).byte())
    return torch.stack(textures)


class EncoderSpace:
    """An encoder of the package as a feature space."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.name = encoder.name
        self.dim = encoder.dim

    def __call__(self, images: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Return (batch, dim) float32 on the CPU."""
        return self._encoder(images).cpu()

    def describe(self) -> dict[str, Any]:
        """Return what the encoder writes into columns, and its resize rule in words."""
        spec = self._encoder.spec
        resize = (
            "none: pictures are taken at their own size"
            if spec.resize is None
            else f"shorter side to {spec.resize} px ({spec.interpolation}, antialiased), then the central "
            f"{spec.input_size} x {spec.input_size}"
        )
        return {**self._encoder.made_by(), "resize": resize}


@dataclass(frozen=True)
class Features:
    """Feature vectors of the fields of a set of pictures.

    Attributes:
        values: One row per field.
        picture_of: Index of the picture that each row belongs to.
        pixel_hashes: One per picture: equal pixels, equal hash.
    """

    values: Float[np.ndarray, "fields dim"]
    picture_of: np.ndarray
    pixel_hashes: list[str]

    def __len__(self) -> int:
        return len(self.values)

    def rows_of(self, picture: int) -> np.ndarray:
        """Return the rows of one picture, in the order of its fields."""
        return np.flatnonzero(self.picture_of == picture)


def load_extractor(
    name: str, weights: Path | None = None, *, device: str = "auto", download: bool = False
) -> Extractor:
    """Return a feature space by name.

    Args:
        name: ``"inception"``, ``"random-vgg16"``, or an encoder: a name of the encoder table, a timm model, a
            local folder.
        weights: Weights on disk.
        device: Where the network runs.
        download: Whether weights may be downloaded.

    Raises:
        MissingWeights: If the weights are not on disk and downloading was not asked for.
        MissingExtra: If a package is missing.
    """
    if name == InceptionSpace.name:
        return InceptionSpace(weights or _inception_weights(download), choose_device(device))
    if name == RandomSpace.name:
        if weights is not None:
            raise EvaluationError(f"{name} draws its weights from a seed; leave --extractor-weights out.")
        return RandomSpace(choose_device(device))
    return EncoderSpace(load_encoder(name, weights=weights, download=download, device=choose_device(device)))


def extract(
    pictures: PictureSet, extractor: Extractor, *, batch_size: int = 32, field_size: int | None = None
) -> Features:
    """Compute the features of a set; pixels stream through in batches, features stay.

    Args:
        pictures: What to look at.
        extractor: The feature space.
        batch_size: Fields that go through the network at once.
        field_size: Cut pictures into squares of this many pixels first; None takes them whole.

    Raises:
        UnreadableSlide: If a picture is damaged; names it.
        EvaluationError: If features are NaN or infinite; names the pictures.
    """
    rows: list[np.ndarray] = []
    picture_of: list[int] = []
    hashes: list[str] = []
    # A batch needs equal sizes, so fields wait by size; `places` remembers where each row belongs.
    waiting: dict[tuple[int, ...], tuple[list[int], list[np.ndarray]]] = {}

    def flush(size: tuple[int, ...]) -> None:
        places, images = waiting.pop(size)
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        for place, vector in zip(places, extractor(batch).numpy(), strict=True):
            rows[place] = vector

    with progress(f"features of {pictures.path.name} ({extractor.name})", len(pictures)) as advance:
        for index, image in enumerate(_decoded(pictures)):
            hashes.append(_pixels_hash(image))
            for field in fields_of(image, field_size):
                places, images = waiting.setdefault(field.shape, ([], []))
                places.append(len(rows))
                images.append(field)
                rows.append(np.empty(0))
                picture_of.append(index)
                if len(images) == batch_size:
                    flush(field.shape)
            advance()
        for size in list(waiting):
            flush(size)
    values = np.stack(rows)
    _check_numbers(values, [pictures.pictures[index] for index in picture_of], extractor)
    return Features(values, np.array(picture_of), hashes)


def _decoded(pictures: PictureSet) -> Iterator[np.ndarray]:
    return reading(pictures.pictures, pictures.read)


def _pixels_hash(image: np.ndarray) -> str:
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def _check_numbers(values: np.ndarray, pictures: Sequence[Picture], extractor: Extractor) -> None:
    broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(broken):
        names = ", ".join(dict.fromkeys(pictures[row].name for row in broken[:3]))
        raise EvaluationError(
            f"{extractor.name} gave NaN or infinity for {len(broken)} of {len(values)} fields ({names}"
            f"{', ...' if len(broken) > 3 else ''}). Check the weights, or use another extractor."
        )


def _inception_weights(download: bool) -> Path:
    """Return the standard weights: torch-fidelity's copy on disk, or downloaded and checked if allowed."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ImportError as error:
        raise MissingExtra("torch_fidelity", "eval", "the feature space 'inception'") from error
    place = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_NAME
    if place.is_file():
        return place
    if not download:
        raise MissingWeights(
            f"the extractor 'inception' needs the weights {_INCEPTION_NAME} (96 MB, SHA-256 "
            f"{_INCEPTION_SHA256_START}...), and {place} does not exist. Give them with --extractor-weights, "
            f"ask for the download with --set download=true ({URL_INCEPTION_V3}), or use --extractor "
            "stain-texture, which needs no weights."
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(
            URL_INCEPTION_V3, str(place), hash_prefix=_INCEPTION_SHA256_START, progress=False
        )
    except (OSError, RuntimeError) as error:
        raise MissingWeights(
            f"{URL_INCEPTION_V3} could not be downloaded ({' '.join(str(error).split())[:200]})."
        ) from error
    return place
