"""What drawn tissue is painted with: periodic textures, stencils of nuclei, glands.

Textures and nuclei depend on the resolution only and are made once per process; every slide lays them at
offsets of its own, so that no two show the same place.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

__all__ = ["NUM_DIRECTIONS", "TEXTURE_SIZE", "Gland", "Stamp", "Stencils", "ramp", "stencils"]

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


@dataclass(frozen=True)
class Gland:
    """A gland cut across: a wobbly ring of columnar cells around a lumen. Lengths in level-0 pixels."""

    x: float
    y: float
    radius: float
    squeeze: float
    turn: float
    wobble: np.ndarray
    phase: np.ndarray
    lumen: float
    filled: bool

    def _ratio(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """0 in the centre, 1 on the basement membrane."""
        along = x * math.cos(self.turn) + y * math.sin(self.turn)
        across = (y * math.cos(self.turn) - x * math.sin(self.turn)) / self.squeeze
        return np.hypot(along, across) / (self.radius * self._outline(np.arctan2(across, along)))

    def _outline(self, polar: np.ndarray) -> np.ndarray:
        total = np.ones_like(polar)
        for k in range(4):
            total = total + self.wobble[k] * np.cos((k + 2) * polar + self.phase[k])
        return total

    def mark(self, layer: np.ndarray, scale: float) -> None:
        """Set the map to 1 where the gland is."""
        reach = self.radius * 1.35 / scale
        y0, y1 = max(0, int(self.y / scale - reach)), min(layer.shape[0], int(self.y / scale + reach) + 2)
        x0, x1 = max(0, int(self.x / scale - reach)), min(layer.shape[1], int(self.x / scale + reach) + 2)
        rows, columns = np.mgrid[y0:y1, x0:x1].astype(np.float32)
        inside = self._ratio((columns + 0.5) * scale - self.x, (rows + 0.5) * scale - self.y) < 1.12
        layer[y0:y1, x0:x1][inside] = 1

    def nuclei(self, random: np.random.Generator, mpp: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places and directions of the ring: near the membrane, pointing to the lumen."""
        around = 2 * math.pi * self.radius * (1 + self.squeeze) / 2 * mpp
        count = max(8, int(around / 5.6))
        polar = (np.arange(count) + random.uniform(-0.28, 0.28, count)) / count * 2 * math.pi
        polar = np.concatenate([polar, random.uniform(0, 2 * math.pi, count // 3)])
        depth = np.concatenate([random.normal(0.84, 0.035, count), random.normal(0.68, 0.05, count // 3)])
        distance = self.radius * self._outline(polar) * depth
        along, across = distance * np.cos(polar), distance * np.sin(polar) * self.squeeze
        x = along * math.cos(self.turn) - across * math.sin(self.turn)
        y = along * math.sin(self.turn) + across * math.cos(self.turn)
        return self.x + x, self.y + y, np.arctan2(y, x) + random.normal(0, 0.18, len(x))

    def paint(
        self, stain_h: np.ndarray, stain_e: np.ndarray, first: int, mpp: float, grain: np.ndarray
    ) -> None:
        """Lay membrane, cytoplasm and lumen over the ground."""
        reach = int(self.radius * 1.4) + 2
        y0, y1 = max(0, int(self.y) - first - reach), min(len(stain_h), int(self.y) - first + reach)
        x0, x1 = max(0, int(self.x) - reach), min(stain_h.shape[1], int(self.x) + reach)
        if y1 <= y0 or x1 <= x0:
            return
        rows, columns = np.mgrid[y0:y1, x0:x1].astype(np.float32)
        rows += first
        ratio = self._ratio(columns - self.x, rows - self.y)
        soft = max(0.02, 1.2 / mpp / self.radius)
        inside = ramp(1.0 - ratio, -soft, soft)
        opening = ramp(self.lumen - ratio, -soft, soft)
        halo = np.exp(-(((ratio - 1.06) / 0.05) ** 2))
        texture = grain[rows.astype(int) % TEXTURE_SIZE, columns.astype(int) % TEXTURE_SIZE]
        place = (slice(y0, y1), slice(x0, x1))
        h, e = stain_h[place], stain_e[place]
        e += 0.16 * halo
        apical = np.clip((0.85 - ratio) / 0.4, 0, 1)
        h += inside * (0.36 - 0.16 * apical + 0.05 * texture - h)
        e += inside * (0.42 + 0.05 * texture - e)
        content = 0.2 if self.filled else 0.012
        h += opening * (0.01 - h)
        e += opening * (content * (1 + 0.12 * texture) - e)


def ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Rise smoothly from 0 at ``low`` to 1 at ``high``."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)
