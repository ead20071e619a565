"""What drawn tissue is painted with: periodic textures, and stencils of nuclei.

They depend on the resolution only and are made once per process; every slide lays them at offsets of its
own, so that no two show the same place.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

__all__ = ["NUM_DIRECTIONS", "TEXTURE_SIZE", "Stamp", "Stencils", "stencils"]

TEXTURE_SIZE = 1024
"""Pixels after which a texture repeats."""
NUM_DIRECTIONS = 6
"""Directions of fibres; others are mixed from the two nearest."""


@dataclass(frozen=True)
class Stamp:
    """A nucleus as a stencil: how far it covers, and its haematoxylin."""

    cover: np.ndarray
    stain: np.ndarray


@dataclass(frozen=True)
class _Nucleus:
    """How nuclei of one kind look."""

    length_um: float
    width_um: float
    stain: float
    """Haematoxylin at the rim."""
    vesicular: float
    """How much paler the inside is."""
    chromatin: float
    spread: float
    num_nucleoli: int
    num_turns: int
    num_variants: int
    bend: float = 0.0


_NUCLEI = {
    "spindle": _Nucleus(13.0, 3.1, 1.75, 0.18, 0.12, 0.22, 0, 16, 7, bend=0.7),
    "epithelial": _Nucleus(9.8, 7.6, 1.62, 0.5, 0.14, 0.18, 1, 8, 14),
    "columnar": _Nucleus(9.0, 5.2, 1.8, 0.3, 0.13, 0.13, 1, 16, 7),
    "lymphocyte": _Nucleus(6.3, 5.9, 2.35, 0.1, 0.16, 0.1, 0, 4, 10),
}


@functools.lru_cache(maxsize=2)
def stencils(mpp: float) -> "Stencils":
    """Return the textures and stencils for a resolution."""
    return Stencils(mpp)


class Stencils:
    """Textures are (TEXTURE_SIZE, TEXTURE_SIZE) float32, of mean 0 and deviation 1 unless said otherwise."""

    def __init__(self, mpp: float) -> None:
        """Make them; takes a second or two."""
        self.mpp = mpp
        self.random = np.random.default_rng(20_240)
        self.bend = self.texture(_softer_than(60.0)) * np.float32(3.4 / mpp)
        self.fibres = [self._fibre_texture(math.pi * k / NUM_DIRECTIONS) for k in range(NUM_DIRECTIONS)]
        self.grain = self.texture(_softer_than(1.1))
        self.clumps = self.texture(_softer_than(9.0))
        self.speckle = self.random.standard_normal((TEXTURE_SIZE, TEXTURE_SIZE)).astype(np.float32)
        self.adipocytes = self._fat_texture()
        self.nuclei = {kind: self._make_stamps(kind) for kind in _NUCLEI}
        """Stencils of a kind, by direction, then by variant."""

    def texture(self, response: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Return periodic noise; ``response`` weighs frequencies along x and y, in cycles per micron."""
        white = self.random.standard_normal((TEXTURE_SIZE, TEXTURE_SIZE)).astype(np.float32)
        fy = np.fft.fftfreq(TEXTURE_SIZE)[:, None].astype(np.float32) / np.float32(self.mpp)
        fx = np.fft.rfftfreq(TEXTURE_SIZE)[None].astype(np.float32) / np.float32(self.mpp)
        shaped = np.fft.irfft2(np.fft.rfft2(white) * response(fx, fy), s=white.shape).astype(np.float32)
        return (shaped - shaped.mean()) / (shaped.std() + 1e-6)

    def _fibre_texture(self, angle: float) -> np.ndarray:
        def response(fx: np.ndarray, fy: np.ndarray) -> np.ndarray:
            along = fx * math.cos(angle) + fy * math.sin(angle)
            across = fy * math.cos(angle) - fx * math.sin(angle)
            thickness = np.exp(-((across * 2.0) ** 2)) * (np.abs(across) * 9.0) ** 0.6
            return np.exp(-((along * 22.0) ** 2)) * thickness

        straight = self.texture(response)
        # Collagen is wavy: bend the texture across its fibres, by waves that are periodic too.
        y, x = np.mgrid[0:TEXTURE_SIZE, 0:TEXTURE_SIZE].astype(np.float32)
        source = (y + self.bend * math.cos(angle), x - self.bend * math.sin(angle))
        return ndimage.map_coordinates(straight, source, order=1, mode="grid-wrap").astype(np.float32)

    def _fat_texture(self) -> np.ndarray:
        """Walls of fat cells: 1 on a membrane, 0 inside, periodic."""
        spacing = 55.0 / self.mpp
        per_side = max(2, round(TEXTURE_SIZE / spacing))
        step = TEXTURE_SIZE / per_side
        grid = np.stack(np.meshgrid(np.arange(per_side), np.arange(per_side)), -1).reshape(-1, 2)
        points = (grid + self.random.uniform(0.12, 0.88, grid.shape)) * step
        y, x = np.mgrid[0:TEXTURE_SIZE:2, 0:TEXTURE_SIZE:2]
        tree = cKDTree(np.mod(points, TEXTURE_SIZE), boxsize=TEXTURE_SIZE)
        near, _ = tree.query(np.stack([x.ravel(), y.ravel()], -1), k=2)
        gap = ((near[:, 1] - near[:, 0]) / 2 * self.mpp).reshape(y.shape).astype(np.float32)
        walls = np.exp(-((gap / 1.3) ** 2))
        return np.asarray(
            Image.fromarray(walls).resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.BILINEAR)
        )

    def _make_stamps(self, kind: str) -> list[list[Stamp]]:
        """Stencils of one kind: by direction, then by variant."""
        shape = _NUCLEI[kind]
        turns = shape.num_turns
        stamps: list[list[Stamp]] = [[] for _ in range(turns)]
        reach = math.ceil(shape.length_um * 0.85 / self.mpp) + 2
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32) * self.mpp
        for _ in range(shape.num_variants):
            size = self.random.normal(1, shape.spread)
            size = float(np.clip(size, 0.65, 1.6))
            half_length, half_width = shape.length_um / 2 * size, shape.width_um / 2 * size
            wobble, phase = self.random.normal(0, 0.05, 3), self.random.uniform(0, 6.28, 3)
            dark = shape.stain * float(np.clip(self.random.normal(1, 0.13), 0.7, 1.35))
            spots = self.random.uniform(-0.45, 0.45, (shape.num_nucleoli, 2))
            chromatin = ndimage.gaussian_filter(
                self.random.standard_normal(x.shape).astype(np.float32), 0.55 / self.mpp, mode="wrap"
            )
            chromatin /= chromatin.std() + 1e-6
            for turn in range(turns):
                angle = math.pi * turn / turns
                along = x * math.cos(angle) + y * math.sin(angle)
                across = y * math.cos(angle) - x * math.sin(angle)
                if shape.bend:
                    across = across + shape.bend * (along / half_length) ** 2 * (1 if phase[0] > 3.14 else -1)
                polar = np.arctan2(across / half_width, along / half_length)
                outline = 1 + sum(wobble[k] * np.cos((k + 2) * polar + phase[k]) for k in range(len(wobble)))
                ratio = np.hypot(along / half_length, across / half_width) / outline
                edge = (1 - ratio) * half_width
                cover = np.clip(edge / 0.7 + 0.5, 0, 1).astype(np.float32)
                stain = dark * (1 - shape.vesicular * np.clip(edge / 1.6, 0, 1))
                stain = stain + dark * shape.chromatin * chromatin
                for spot in spots:
                    from_spot = (
                        np.hypot(along / half_length - spot[0], across / half_width - spot[1]) * half_width
                    )
                    stain = stain + dark * 0.75 * np.exp(-((from_spot / 0.75) ** 2))
                stamps[turn].append(Stamp(cover, np.maximum(stain, 0.2).astype(np.float32)))
        return stamps


def _softer_than(length_um: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Weights that leave little of what is finer than a length, in every direction."""
    return lambda fx, fy: np.exp(-((fx**2 + fy**2) * length_um**2))
