"""Drawn tissue: slides for tests, examples and the first run, where no real slide is at hand.

Haematoxylin and eosin are painted as optical densities, as light meets them in a section: collagen fibres
that follow a flow, glands with a lumen and a ring of nuclei, solid nests of epithelium, clusters of
lymphocytes, fat, clefts, dust on the glass and strokes of a marker pen. Every length is in microns. It looks
like tissue; it is not a model of any, and nothing about medicine can be learnt from it.

The picture is made in strips and depends on the size, the resolution and the seed only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageDraw

from pixcell.data.stencils import NUM_DIRECTIONS, TEXTURE_SIZE, Stamp, stencils
from pixcell.files import write_whole
from pixcell.geometry import Box

__all__ = ["DrawnSlide", "Square", "draw_slide", "draw_tissue"]

# Natural-log optical densities per unit of stain, in red, green and blue.
_HAEMATOXYLIN = np.array([0.56, 0.77, 0.31], np.float32)
_EOSIN = np.array([0.12, 0.86, 0.49], np.float32)
_GLASS = np.array([243, 242, 244], np.float32)
_PENS = {"blue": (40, 70, 190), "green": (30, 150, 90), "red": (205, 40, 60), "black": (35, 32, 38)}
_STRIP = 512
_MAP_UM = 8.0
"""Side of a pixel of the maps that say what grows where."""


@dataclass(frozen=True)
class Square:
    """A plain square painted over everything, for asking where a pixel went."""

    box: Box
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class DrawnSlide:
    """What was drawn, with the truth that a test can ask for."""

    path: Path
    width: int
    height: int
    mpp: float
    seed: int
    num_levels: int
    num_nuclei: int
    squares: tuple[Square, ...]
    tissue: np.ndarray = field(repr=False)
    """(height, width) bool map of where tissue was drawn, coarse."""
    pen: np.ndarray = field(repr=False)
    """(height, width) bool map of pen strokes, of the same size as ``tissue``."""
    map_scale: float
    """Level-0 pixels per pixel of the maps."""


def draw_slide(
    path: Path,
    width: int = 4096,
    height: int = 4096,
    mpp: float = 0.5,
    seed: int = 0,
    *,
    pen: bool | Sequence[str] = False,
    tissue: bool = True,
    states_mpp: bool = True,
    squares: Sequence[Square] = (),
    quality: int = 87,
) -> DrawnSlide:
    """Draw a slide and save it as a pyramidal TIFF of JPEG tiles, which OpenSlide and others open.

    Args:
        path: Where; written whole or not at all. End it in ``.tiff``.
        width: Level-0 width in pixels.
        height: Level-0 height in pixels.
        mpp: Microns per pixel, stated in the resolution tags.
        seed: Another seed is another patient: other shapes, proportions and shades of stain.
        pen: Strokes of a marker: True for one of each colour, or names out of blue, green, red, black.
        tissue: False draws bare glass with some dust.
        states_mpp: False leaves the resolution out of the file.
        squares: Painted last, at every level.
        quality: Of the JPEG tiles.

    Returns:
        What was drawn and where.

    Raises:
        ValueError: If a size is not positive or a pen has no such colour.
        OutputError: If the place cannot be written.
    """
    painter = _Painter(width, height, mpp, seed, _pen_colours(pen), tissue)
    sizes = [(height, width)]
    while max(sizes[-1]) > 512:
        sizes.append((max(1, sizes[-1][0] // 2), max(1, sizes[-1][1] // 2)))
    reduced = np.full((*(sizes[1] if len(sizes) > 1 else (1, 1)), 3), 255, np.uint8)

    def level0() -> Iterator[np.ndarray]:
        for top in range(0, height, _STRIP):
            strip = painter.strip(top, min(height, top + _STRIP))
            _paint_squares(strip, top, squares)
            half = Image.fromarray(strip).reduce(2) if len(sizes) > 1 else None
            if half is not None:
                rows = reduced[top // 2 : top // 2 + half.height]
                rows[:] = np.asarray(half)[: rows.shape[0], : rows.shape[1]]
            yield from _tiles(strip)

    resolution = (1e4 / mpp, 1e4 / mpp) if states_mpp else None
    unit = "CENTIMETER" if states_mpp else None
    options = {
        "tile": (256, 256),
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": quality},
        "dtype": np.uint8,
        "metadata": None,
        "software": "pixcell (drawn, not real tissue)",
    }
    with (
        write_whole(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=width * height > 1 << 30) as tiff,
    ):
        tiff.write(
            level0(),
            shape=(height, width, 3),
            resolution=resolution,
            resolutionunit=unit,
            description="Drawn tissue: synthetic, not a patient's sample",
            **options,
        )
        level = reduced
        for number, size in enumerate(sizes[1:], start=1):
            if number > 1:
                level = np.asarray(Image.fromarray(level).reduce(2))[: size[0], : size[1]]
            scaled = (resolution[0] / 2**number, resolution[1] / 2**number) if resolution else None
            tiff.write(
                _tiles(level),
                shape=(*size, 3),
                subfiletype=1,
                resolution=scaled,
                resolutionunit=unit,
                **options,
            )
    return DrawnSlide(
        path=path,
        width=width,
        height=height,
        mpp=mpp,
        seed=seed,
        num_levels=len(sizes),
        num_nuclei=painter.num_nuclei,
        squares=tuple(squares),
        tissue=painter.tissue_truth,
        pen=painter.pen_truth,
        map_scale=painter.map_scale,
    )


def draw_tissue(width: int, height: int, mpp: float = 0.5, seed: int = 0, full: bool = True) -> np.ndarray:
    """Return drawn tissue as (height, width, 3) uint8.

    Args:
        width: In pixels.
        height: In pixels.
        mpp: Microns per pixel.
        seed: Another seed, another piece.
        full: Tissue from border to border. False: a section on glass, as :func:`draw_slide` shows it.
    """
    painter = _Painter(width, height, mpp, seed, [], tissue=True, full=full)
    return np.concatenate([painter.strip(top, min(height, top + _STRIP)) for top in range(0, height, _STRIP)])


def _pen_colours(pen: bool | Sequence[str]) -> list[str]:
    names = (list(_PENS) if pen else []) if isinstance(pen, bool) else list(pen)
    unknown = [name for name in names if name not in _PENS]
    if unknown:
        raise ValueError(f"no pen of colour {unknown[0]!r}; there are {', '.join(_PENS)}")
    return names


def _tiles(rows: np.ndarray, size: int = 256) -> Iterator[np.ndarray]:
    """Cut rows into tiles as TIFF wants them: whole ones, the last repeating its border."""
    height, width = rows.shape[:2]
    padded = np.pad(rows, ((0, -height % size), (0, -width % size), (0, 0)), mode="edge")
    for y in range(0, height, size):
        for x in range(0, width, size):
            yield padded[y : y + size, x : x + size]


def _paint_squares(strip: np.ndarray, top: int, squares: Sequence[Square]) -> None:
    rows = Box(0, top, strip.shape[1], strip.shape[0])
    for square in squares:
        seen = square.box.intersection(rows)
        if seen:
            strip[seen.y - top : seen.bottom - top, seen.x : seen.right] = square.colour


class _Painter:
    """Knows where everything is; paints any strip of it."""

    def __init__(
        self,
        width: int,
        height: int,
        mpp: float,
        seed: int,
        pens: Sequence[str],
        tissue: bool,
        full: bool = False,
    ) -> None:
        if width <= 0 or height <= 0 or not mpp > 0:
            raise ValueError(f"cannot draw {width} x {height} pixels of {mpp} um")
        self.width, self.height, self.mpp = width, height, mpp
        self.random = np.random.default_rng([seed, 20_240])
        self.map_scale = _MAP_UM / mpp
        self.map_height = math.ceil(height / self.map_scale) + 2
        self.map_width = math.ceil(width / self.map_scale) + 2
        self._choose_stain()
        self._plan_regions(tissue, full)
        self.stencils = stencils(mpp)
        self.offsets = self.random.integers(0, TEXTURE_SIZE, (16, 2))
        self._mix_directions()
        self._glands = self._plan_glands() if tissue else []
        self._cells = self._plan_cells() if tissue else []
        self.num_nuclei = len(self._cells)
        self._by_row: dict[int, list[tuple[int, int, Stamp]]] = {}
        for x, y, stamp in self._cells:
            self._by_row.setdefault(y // _STRIP, []).append((x, y, stamp))
        self._pen_layers = [self._draw_pen(name) for name in pens]
        self._dust = self._plan_dust()
        shown = (math.ceil(height / self.map_scale), math.ceil(width / self.map_scale))
        self.tissue_truth = self.presence[: shown[0], : shown[1]] > 0.5
        self.pen_truth = np.zeros(shown, bool)
        for _, layer in self._pen_layers:
            self.pen_truth |= layer[: shown[0], : shown[1]] > 0.5

    # ── the plan ────────────────────────────────────────────────────────────────────────────────

    def _choose_stain(self) -> None:
        """Every laboratory stains a little differently."""
        jitter = self.random.normal(1.0, 0.05, (2, 3)).astype(np.float32)
        self.haematoxylin = _HAEMATOXYLIN * jitter[0] * np.float32(self.random.uniform(0.88, 1.1))
        self.eosin = _EOSIN * jitter[1] * np.float32(self.random.uniform(0.8, 1.15))

    def _map_noise(self, period_um: float, octaves: int = 3) -> np.ndarray:
        """Smooth noise over the map with mean 0 and deviation about 1."""
        total = np.zeros((self.map_height, self.map_width), np.float32)
        for octave in range(octaves):
            period = period_um / _MAP_UM / 2**octave
            rows, columns = (max(4, math.ceil(side / period) + 3) for side in total.shape)
            coarse = self.random.standard_normal((rows, columns)).astype(np.float32)
            # A frame of fixed scale, so that the grain of a small drawing is that of a large one.
            frame = (1.0, 1.0, 1.0 + total.shape[1] / period, 1.0 + total.shape[0] / period)
            grown = Image.fromarray(coarse).resize(
                (total.shape[1], total.shape[0]), Image.Resampling.BICUBIC, box=frame
            )
            total += np.asarray(grown) * 0.55**octave
        return total * 1.35

    def _plan_regions(self, tissue: bool, full: bool) -> None:
        shape = (self.map_height, self.map_width)
        y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
        x, y = x / shape[1] * 2 - 1, y / shape[0] * 2 - 1
        outline = np.full(shape, -9.0, np.float32)
        if full:
            outline[:] = 9.0
        elif tissue:
            for _ in range(int(self.random.integers(1, 4))):
                centre_x, centre_y = self.random.uniform(-0.25, 0.25, 2)
                radius_x, radius_y = self.random.uniform(0.55, 0.8, 2)
                turn = self.random.uniform(0, math.pi)
                across = (x - centre_x) * math.cos(turn) + (y - centre_y) * math.sin(turn)
                along = (y - centre_y) * math.cos(turn) - (x - centre_x) * math.sin(turn)
                outline = np.maximum(outline, 1 - np.hypot(across / radius_x, along / radius_y))
            rough = self._map_noise(420.0, 4) * 0.1 + self._map_noise(90.0, 3) * 0.025
            outline = ((outline + rough + 0.02) * 14).astype(np.float32)
        else:
            self._map_noise(420.0, 4)
        self.presence = np.clip(outline * 0.5 + 0.5, 0, 1).astype(np.float32)
        self.epithelium = _ramp(self._map_noise(700.0) + 0.1, 0.0, 0.35)
        self.is_glandular = self._map_noise(1100.0, 1) > -0.3
        self.fat = _ramp(self._map_noise(650.0, 2) - 1.5, 0.0, 0.3) * (1 - self.epithelium)
        self.inflamed = _ramp(self._map_noise(260.0, 2) - 0.9, 0.0, 0.9) * (1 - self.fat)
        self.clefts = self._map_noise(140.0, 3)
        self.density = 1.0 + 0.16 * self._map_noise(240.0)
        angle = self._map_noise(520.0, 2) * 1.1 + self.random.uniform(0, math.pi)
        self.angle = np.mod(angle, math.pi)

    def _mix_directions(self) -> None:
        """Say how much of each fibre texture there is at every place."""
        directions = np.arange(NUM_DIRECTIONS)[:, None, None] * math.pi / NUM_DIRECTIONS
        bins = np.mod(self.angle[None] - directions, math.pi)
        away = np.minimum(bins, math.pi - bins) / (math.pi / NUM_DIRECTIONS)
        self.direction_weights = np.clip(1 - away, 0, 1).astype(np.float32)

    def _at(self, layer: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Look a map up at level-0 positions."""
        rows = np.clip((y / self.map_scale).astype(int), 0, self.map_height - 1)
        columns = np.clip((x / self.map_scale).astype(int), 0, self.map_width - 1)
        return layer[rows, columns]

    def _scattered(self, spacing_um: float, jitter: float = 0.38) -> tuple[np.ndarray, np.ndarray]:
        """Positions about ``spacing_um`` apart, on a shaken grid of triangles."""
        step = spacing_um / self.mpp
        rows, columns = int(self.height / (step * 0.87)) + 1, int(self.width / step) + 1
        y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
        x = (x + 0.5 * (y % 2) + self.random.uniform(-jitter, jitter, x.shape)) * step
        y = (y * 0.87 + self.random.uniform(-jitter, jitter, y.shape)) * step
        inside = (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)
        return x[inside], y[inside]

    def _plan_glands(self) -> list["_Gland"]:
        glands = []
        xs, ys = self._scattered(118.0, jitter=0.2)
        wanted = (
            (self._at(self.presence, xs, ys) > 0.95)
            & (self._at(self.epithelium, xs, ys) > 0.6)
            & self._at(self.is_glandular, xs, ys)
            & (self.random.random(len(xs)) < 0.88)
        )
        for x, y in zip(xs[wanted], ys[wanted], strict=True):
            glands.append(
                _Gland(
                    x=float(x),
                    y=float(y),
                    radius=float(self.random.triangular(24, 38, 64)) / self.mpp,
                    squeeze=float(self.random.uniform(0.62, 1.0)),
                    turn=float(self.random.uniform(0, math.pi)),
                    wobble=self.random.normal(0, 0.075, 4),
                    phase=self.random.uniform(0, 2 * math.pi, 4),
                    lumen=float(self.random.uniform(0.28, 0.6)),
                    filled=bool(self.random.random() < 0.25),
                )
            )
        return glands

    def _plan_cells(self) -> list[tuple[int, int, Stamp]]:
        self.in_gland = np.zeros((self.map_height, self.map_width), np.float32)
        for gland in self._glands:
            gland.mark(self.in_gland, self.map_scale)
        cells: list[tuple[int, int, Stamp]] = []

        def add(kind: str, x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> None:
            stamps = self.stencils.nuclei[kind]
            num_turns = len(stamps)
            turns = np.rint(np.mod(angle, math.pi) / math.pi * num_turns).astype(int) % num_turns
            variants = self.random.integers(0, len(stamps[0]), len(x))
            cells.extend(
                (int(px), int(py), stamps[turn][variant])
                for px, py, turn, variant in zip(x, y, turns, variants, strict=True)
            )

        def keep(x: np.ndarray, y: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            here = (self.random.random(len(x)) < share) & (self._at(self.presence, x, y) > 0.7)
            return x[here], y[here]

        nests = self.epithelium * ~self.is_glandular
        free = 1 - self.in_gland
        x, y = self._scattered(17.0)
        stroma = (1 - nests) * free * (1 - self.fat)
        x, y = keep(x, y, self._at(stroma, x, y) * 0.55)
        add("spindle", x, y, self._at(self.angle, x, y) + self.random.normal(0, 0.22, len(x)))
        x, y = self._scattered(10.4)
        x, y = keep(x, y, self._at(nests * free, x, y) * 0.93)
        add("epithelial", x, y, self.random.uniform(0, math.pi, len(x)))
        x, y = self._scattered(7.4)
        amount = (0.85 * self.inflamed * (1 - nests * 0.8) + 0.012) * free * (1 - self.fat)
        x, y = keep(x, y, self._at(amount, x, y))
        add("lymphocyte", x, y, self.random.uniform(0, math.pi, len(x)))
        for gland in self._glands:
            add("columnar", *gland.nuclei(self.random, self.mpp))
        return [(x, y, stamp) for x, y, stamp in cells if 0 <= x < self.width and 0 <= y < self.height]

    def _plan_dust(self) -> list[tuple[float, float, float, float, float]]:
        area = self.width * self.height * self.mpp**2 / 1e6
        count = int(self.random.poisson(max(0.4, area * 2.5)))
        return [
            (
                float(self.random.uniform(0, self.width)),
                float(self.random.uniform(0, self.height)),
                float(self.random.uniform(2, 9)) / self.mpp,
                float(self.random.uniform(0.5, 1)),
                float(self.random.uniform(0, math.pi)),
            )
            for _ in range(count)
        ]

    def _draw_pen(self, name: str) -> tuple[str, np.ndarray]:
        """A stroke of a felt pen over the map: a wavy line somewhere around the middle."""
        layer = Image.new("L", (self.map_width * 2, self.map_height * 2), 0)
        draw = ImageDraw.Draw(layer)
        start = self.random.uniform(0.08, 0.92, 2)
        heading = self.random.uniform(0, 2 * math.pi)
        side = min(layer.size)
        thick = max(2, round(side * float(self.random.uniform(0.018, 0.032))))
        points = [start * layer.size]
        for _ in range(26):
            heading += self.random.normal(0, 0.24)
            points.append(points[-1] + np.array([math.cos(heading), math.sin(heading)]) * side * 0.022)
        line = [(float(x), float(y)) for x, y in points]
        draw.line(line, fill=255, width=thick, joint="curve")
        for x, y in (line[0], line[-1]):
            draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=255)
        small = layer.resize((self.map_width, self.map_height), Image.Resampling.BOX)
        return name, np.asarray(small, np.float32) / 255

    # ── the picture ─────────────────────────────────────────────────────────────────────────────

    def strip(self, top: int, bottom: int) -> np.ndarray:
        """Paint rows ``top`` to ``bottom``."""
        stain_h, stain_e, edge = self._ground(top, bottom)
        for gland in self._glands:
            gland.paint(stain_h, stain_e, top, self.mpp, self.stencils.grain)
        self._stamp_nuclei(stain_h, stain_e, top, bottom)
        stain_h *= edge
        stain_e *= edge
        picture = np.empty((bottom - top, self.width, 3), np.float32)
        noise = self._wrapped(self.stencils.speckle, top, bottom, 14)
        for channel in range(3):
            density = self.haematoxylin[channel] * stain_h + self.eosin[channel] * stain_e
            picture[..., channel] = _GLASS[channel] * np.exp(-density) + noise * 1.6
        self._paint_dust(picture, top)
        self._paint_pens(picture, top, bottom)
        return np.clip(np.rint(picture), 0, 255).astype(np.uint8)

    def _ground(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Everything but glands and nuclei: fibres, cytoplasm, fat, clefts; and where tissue ends."""
        presence = self._grown(self.presence, first, last)
        fibres = np.zeros_like(presence)
        for number, weight in enumerate(self.direction_weights):
            if weight.any():
                fibres += self._grown(weight, first, last) * self._wrapped(
                    self.stencils.fibres[number], first, last, number
                )
        grain = self._wrapped(self.stencils.grain, first, last, 10)
        clumps = self._wrapped(self.stencils.clumps, first, last, 11)
        nest = self._grown(self.epithelium * ~self.is_glandular, first, last)
        inflamed = self._grown(self.inflamed, first, last)
        density = self._grown(self.density, first, last)
        # Stroma: pink bundles with paler gaps between them.
        stain_e = (0.43 + 0.15 * fibres + 0.05 * clumps + 0.03 * grain) * density
        stain_h = 0.07 + 0.03 * clumps + 0.02 * np.maximum(fibres, 0)
        # Slits along the fibres, where shrinking tissue tore; and loose, pale places.
        clefts = self._grown(self.clefts, first, last)
        loose = np.clip((clefts - 0.7) * 0.9, 0, 0.62)
        slits = np.clip((0.22 - np.abs(clefts + 0.35 * fibres + 0.6)) * 5, 0, 1)
        paler = 1 - np.maximum(loose * (1 - 0.35 * fibres), 0.93 * slits) * (1 - nest)
        stain_e *= paler
        stain_h *= paler
        # Nests: the cytoplasm of epithelium is more purple and finely grained.
        stain_e += nest * (0.44 + 0.07 * clumps + 0.06 * grain - stain_e)
        stain_h += nest * (0.33 + 0.09 * clumps + 0.05 * grain - stain_h)
        stain_h += 0.1 * inflamed
        fat = self._grown(self.fat, first, last)
        if fat.any():
            walls = self._wrapped(self.stencils.adipocytes, first, last, 12)
            inside = np.clip(fat * 1.6 - 0.3, 0, 1)
            stain_e += inside * (walls * 0.55 - stain_e)
            stain_h += inside * (walls * 0.1 - stain_h)
        edge = np.clip((presence - 0.5 + 0.045 * fibres) * 6 + 0.5, 0, 1)
        return np.maximum(stain_h, 0), np.maximum(stain_e, 0), edge

    def _stamp_nuclei(self, stain_h: np.ndarray, stain_e: np.ndarray, first: int, last: int) -> None:
        reach = max(stamp[0][0].cover.shape[0] for stamp in self.stencils.nuclei.values())
        for row in range((first - reach) // _STRIP, (last + reach) // _STRIP + 1):
            for x, y, stamp in self._by_row.get(row, ()):
                half = stamp.cover.shape[0] // 2
                y0, x0 = y - half - first, x - half
                top, left = max(0, -y0), max(0, -x0)
                high = min(stamp.cover.shape[0], stain_h.shape[0] - y0)
                wide = min(stamp.cover.shape[1], stain_h.shape[1] - x0)
                if high <= top or wide <= left:
                    continue
                cover = stamp.cover[top:high, left:wide]
                place = (slice(y0 + top, y0 + high), slice(x0 + left, x0 + wide))
                under = stain_h[place]
                under += cover * (stamp.stain[top:high, left:wide] - under)
                stain_e[place] *= 1 - 0.45 * cover

    def _paint_dust(self, picture: np.ndarray, first: int) -> None:
        for x, y, size, dark, angle in self._dust:
            if not first - 3 * size < y < first + len(picture) + 3 * size:
                continue
            reach = int(2.2 * size) + 1
            x0, x1 = max(0, int(x) - reach), min(self.width, int(x) + reach)
            y0, y1 = max(0, int(y) - first - reach), min(len(picture), int(y) - first + reach)
            if x1 <= x0 or y1 <= y0:
                continue
            rows, columns = np.mgrid[y0:y1, x0:x1].astype(np.float32)
            dx, dy = columns - x, rows + first - y
            along = dx * math.cos(angle) + dy * math.sin(angle)
            across = dy * math.cos(angle) - dx * math.sin(angle)
            inside = np.clip(1.2 - np.hypot(along / (2 * size), across / (0.8 * size)), 0, 1) * dark
            picture[y0:y1, x0:x1] *= 1 - 0.75 * inside[..., None]

    def _paint_pens(self, picture: np.ndarray, first: int, last: int) -> None:
        for name, layer in self._pen_layers:
            if not layer.any():
                continue
            cover = np.clip(self._grown(layer, first, last), 0, 1)
            streaks = self._wrapped(self.stencils.clumps, first, last, 13)
            opacity = (0.93 if name == "black" else 0.82) * cover * (1 + 0.04 * streaks)
            ink = np.asarray(_PENS[name], np.float32)
            # Ink lies over the coverslip: what is below shines through as a multiplication.
            picture *= 1 - opacity[..., None] * (1 - (0.15 + 0.85 * ink / 255) * 0.95)
            picture += opacity[..., None] * ink * 0.12

    def _grown(self, layer: np.ndarray, first: int, last: int) -> np.ndarray:
        """Enlarge rows of a map to full size."""
        # The map begins half a cell before the picture, so that every row asked for lies inside.
        top = max(0.0, first / self.map_scale + 0.5)
        bottom = min(float(self.map_height), last / self.map_scale + 0.5)
        frame = (0.0, top, self.width / self.map_scale, bottom)
        grown = Image.fromarray(layer).resize((self.width, last - first), Image.Resampling.BICUBIC, box=frame)
        return np.array(grown)

    def _wrapped(self, texture: np.ndarray, first: int, last: int, use: int) -> np.ndarray:
        """Repeat a periodic texture over rows; every use has an offset of its own."""
        down, right = self.offsets[use]
        rows = np.arange(first + down, last + down) % TEXTURE_SIZE
        columns = np.arange(right, right + self.width) % TEXTURE_SIZE
        return texture[rows[:, None], columns]


@dataclass(frozen=True)
class _Gland:
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
        inside = _ramp(1.0 - ratio, -soft, soft)
        opening = _ramp(self.lumen - ratio, -soft, soft)
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


def _ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Rise smoothly from 0 at ``low`` to 1 at ``high``."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)
