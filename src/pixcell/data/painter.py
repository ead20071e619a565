"""A section of drawn tissue: first the plan of what grows where, then the picture, in strips of rows.

The plan lives on maps of 8-micron pixels (outline, epithelium, fat, inflammation, the flow of fibres) and in
lists of glands and nuclei. The picture adds up the optical densities of haematoxylin and eosin and lets light
through.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pixcell.data.stencils import NUM_DIRECTIONS, TEXTURE_SIZE, Gland, Stamp, ramp, stencils

__all__ = ["TissuePainter", "pen_colours"]

# Natural-log optical densities per unit of stain, in red, green and blue.
_HAEMATOXYLIN = np.array([0.56, 0.77, 0.31], np.float32)
_EOSIN = np.array([0.12, 0.86, 0.49], np.float32)
_GLASS = np.array([243, 242, 244], np.float32)
_PENS = {"blue": (40, 70, 190), "green": (30, 150, 90), "red": (205, 40, 60), "black": (35, 32, 38)}
_BAND = 512
"""Rows by which nuclei are looked up."""
_MAP_UM = 8.0
"""Side of a pixel of the maps that say what grows where."""


def pen_colours(pen: bool | Sequence[str]) -> list[str]:
    """Return the names of pens; True stands for one of each colour."""
    names = (list(_PENS) if pen else []) if isinstance(pen, bool) else list(pen)
    unknown = [name for name in names if name not in _PENS]
    if unknown:
        raise ValueError(f"no pen of colour {unknown[0]!r}; there are {', '.join(_PENS)}")
    return names


class TissuePainter:
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
            self._by_row.setdefault(y // _BAND, []).append((x, y, stamp))
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
        self.epithelium = ramp(self._map_noise(700.0) + 0.1, 0.0, 0.35)
        self.is_glandular = self._map_noise(1100.0, 1) > -0.3
        self.fat = ramp(self._map_noise(650.0, 2) - 1.5, 0.0, 0.3) * (1 - self.epithelium)
        self.inflamed = ramp(self._map_noise(260.0, 2) - 0.9, 0.0, 0.9) * (1 - self.fat)
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

    def _plan_glands(self) -> list["Gland"]:
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
                Gland(
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
        for row in range((first - reach) // _BAND, (last + reach) // _BAND + 1):
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
