"""``stain-texture``: a description of a field of H&E that needs no weights.

Learned encoders know more, but they are large, and the good ones are gated. This one is a formula, so that
the whole line from slide to picture runs offline, and so that a condition means something a person can
name: how much of each stain, how it varies, how coarse the texture is, and where in the field it lies.

A field is turned into optical density (Beer and Lambert), ``od = -ln((255 * rgb + 1) / 256)`` per colour,
and that into densities of hematoxylin and eosin with the stain vectors of Ruifrok and Johnston 2001
("Quantification of histochemical staining by color deconvolution"). Then, in this order:

    ====== =======================================================================================
    9      optical density in red, green, blue: mean, standard deviation, cube root of the third moment
    6      the same of hematoxylin and of eosin
    3      correlation of the densities in red and green, red and blue, green and blue
    20     of hematoxylin, then eosin: in five octaves, fine to coarse, the logarithm of the mean
           absolute band value, then five times how evenly it is spread (mean absolute over root mean
           square: low for scattered nuclei, high for an even texture)
    10     of hematoxylin in five octaves: direction of the texture as (cos 2a, sin 2a), 0 where it
           has none
    80     five maps of 4 x 4 cells, each row-major: optical density in red, green and blue, and the
           logarithm of hematoxylin's band values, fine (nuclei) and coarse (glands, vessels)
    ====== =======================================================================================

Octaves are octaves of pixels, so embeddings compare only at one resolution. Every number is shifted and
scaled by a constant measured once on open H&E tiles, and limited to +-5. Not meant for other stains: it runs
on them, but the constants are those of H&E.
"""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pixcell.models.threads import side_by_side

__all__ = ["StainTexture"]

_OCTAVES = 5
_GRID = 4
_SMALLEST = 64
_LIMIT = 5.0
# Ruifrok & Johnston 2001, table 1: optical density of hematoxylin and eosin in red, green, blue.
_HEMATOXYLIN, _EOSIN = (0.650, 0.704, 0.286), (0.072, 0.990, 0.105)
# Below this a band holds nothing but the noise of JPEG and 8 bits (in units of optical density).
_FLOOR = 2e-3


class StainTexture(nn.Module):
    """The descriptor as a module: images in, 128 numbers each out. It has no parameters.

    Each image is described on its own, so the numbers do not depend on what else is in the batch, down to
    the last bit, nor on the number of threads.
    """

    dim = 128
    densities_from_od: Tensor
    center: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        # In the state, so that a hash of the module's weights covers the constants of the formula.
        self.register_buffer("densities_from_od", _unmixing())
        center, spread = _constants()
        self.register_buffer("center", center)
        self.register_buffer("spread", spread)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 128"]:
        """Describe fields.

        Args:
            images: RGB in [0, 1], both sides at least 64 px.

        Returns:
            About zero mean and unit variance over H&E tissue.

        Raises:
            ValueError: If a side is shorter than 64 px: five octaves do not fit.
        """
        if min(images.shape[-2:]) < _SMALLEST:
            raise ValueError(
                f"stain-texture needs fields of at least {_SMALLEST} px, not {tuple(images.shape[-2:])}"
            )
        # One at a time: kernels split sums by the shape of a batch, which would show in the last bit.
        raw = torch.stack(side_by_side(self.raw, images.float(), images.device))
        return ((raw - self.center) / self.spread).clamp(-_LIMIT, _LIMIT)

    def raw(self, image: Float[Tensor, "3 height width"]) -> Float[Tensor, "128"]:
        """Return the numbers of one field before they are shifted and scaled."""
        od = -torch.log((image * 255 + 1) / 256)
        densities = torch.einsum("sc,chw->shw", self.densities_from_od, od)
        octaves = _octaves(densities)
        return torch.cat(
            [
                _moments(od),
                _moments(densities),
                _correlations(od),
                *(_energies([band[stain] for band in octaves]) for stain in (0, 1)),
                *(_direction(band[0]) for band in octaves),
                F.adaptive_avg_pool2d(od, _GRID).flatten(),
                _energy_map(octaves[1][0]),
                _energy_map(octaves[3][0]),
            ]
        )


def _unmixing() -> Tensor:
    """The first two rows of the inverse of the stain matrix: optical density to hematoxylin and eosin."""
    h, e = (F.normalize(torch.tensor(v, dtype=torch.float64), dim=0) for v in (_HEMATOXYLIN, _EOSIN))
    rest = F.normalize(torch.linalg.cross(h, e), dim=0)
    return torch.linalg.inv(torch.stack([h, e, rest], dim=1))[:2].float()


def _moments(channels: Tensor) -> Tensor:
    mean = channels.mean(dim=(1, 2))
    deviation = channels - mean[:, None, None]
    third = deviation.pow(3).mean(dim=(1, 2))
    spread = deviation.square().mean(dim=(1, 2)).sqrt()
    return torch.stack([mean, spread, third.sign() * third.abs().pow(1 / 3)], dim=1).flatten()


def _correlations(channels: Tensor) -> Tensor:
    deviation = channels - channels.mean(dim=(1, 2), keepdim=True)
    # A blank field has no correlation; the floor (of 8-bit noise) makes it 0 and not noise over noise.
    unit = deviation / (deviation.square().mean(dim=(1, 2), keepdim=True) + _FLOOR**2).sqrt()
    return torch.stack([(unit[a] * unit[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))])


def _octaves(channels: Tensor) -> list[Tensor]:
    """Split into five bands of one octave each (a Laplacian pyramid; Burt and Adelson 1983)."""
    bands = []
    for _ in range(_OCTAVES):
        smooth = _blur(channels)
        bands.append(channels - smooth)
        channels = smooth[:, ::2, ::2]
    return bands


def _blur(channels: Tensor) -> Tensor:
    """Convolve rows and columns with (1, 4, 6, 4, 1) / 16, mirrored at the border."""
    for dim in (1, 2):
        padding = (0, 0, 2, 2) if dim == 1 else (2, 2, 0, 0)
        padded = F.pad(channels[None], padding, mode="reflect")[0]
        length = channels.shape[dim]
        shifted = [padded.narrow(dim, start, length) for start in range(5)]
        channels = (shifted[0] + shifted[4]) / 16 + (shifted[1] + shifted[3]) / 4 + shifted[2] * 0.375
    return channels


def _energies(bands: list[Tensor]) -> Tensor:
    size = torch.stack([band.abs().mean() for band in bands])
    power = torch.stack([band.square().mean() for band in bands])
    return torch.cat([(size + _FLOOR).log(), (size + _FLOOR) / (power + _FLOOR**2).sqrt()])


def _direction(band: Tensor) -> Tensor:
    """Structure tensor of a band: twice the angle of its main direction, 0 to 1 long by how clear it is."""
    dy, dx = band[1:, :-1] - band[:-1, :-1], band[:-1, 1:] - band[:-1, :-1]
    power = (dx.square() + dy.square()).mean() + _FLOOR**2
    return torch.stack([(dx.square() - dy.square()).mean(), 2 * (dx * dy).mean()]) / power


def _energy_map(band: Tensor) -> Tensor:
    return (F.adaptive_avg_pool2d(band.abs()[None], _GRID).flatten() + _FLOOR).log()


@cache
def _constants() -> tuple[Tensor, Tensor]:
    """Expand the measured table to 128 pairs; a map's 16 cells share one pair."""
    pairs = torch.tensor([*_MEASURED[:48], *(pair for pair in _MEASURED[48:] for _ in range(_GRID**2))])
    return pairs[:, 0].clone(), pairs[:, 1].clone()


# Mean and standard deviation of each number: made by benchmarks/stain_texture_constants.py.
_MEASURED: tuple[tuple[float, float], ...] = (
    # optical density: red, green, blue
    (0.313, 0.164),
    (0.205, 0.109),
    (0.230, 0.156),
    (0.578, 0.297),
    (0.332, 0.201),
    (0.332, 0.323),
    (0.260, 0.161),
    (0.135, 0.075),
    (0.109, 0.096),
    # hematoxylin, eosin
    (0.505, 0.249),
    (0.320, 0.153),
    (0.348, 0.221),
    (0.232, 0.215),
    (0.159, 0.155),
    (0.145, 0.258),
    # correlations
    (0.917, 0.108),
    (0.892, 0.117),
    (0.927, 0.096),
    # hematoxylin: size and evenness of five bands
    (-3.409, 0.722),
    (-3.200, 0.645),
    (-3.038, 0.610),
    (-2.974, 0.628),
    (-3.015, 0.656),
    (0.730, 0.107),
    (0.715, 0.101),
    (0.704, 0.103),
    (0.720, 0.103),
    (0.761, 0.093),
    # eosin
    (-4.448, 0.615),
    (-4.263, 0.640),
    (-3.949, 0.678),
    (-3.765, 0.704),
    (-3.756, 0.725),
    (0.740, 0.248),
    (0.758, 0.193),
    (0.763, 0.156),
    (0.780, 0.133),
    (0.812, 0.119),
    # direction
    (0.000, 0.188),
    (0.000, 0.103),
    (0.000, 0.174),
    (0.000, 0.125),
    (0.000, 0.181),
    (0.000, 0.131),
    (0.000, 0.191),
    (0.000, 0.134),
    (0.000, 0.209),
    (0.000, 0.136),
    # maps
    (0.313, 0.186),
    (0.578, 0.338),
    (0.260, 0.171),
    (-3.266, 0.786),
    (-3.089, 0.853),
)
