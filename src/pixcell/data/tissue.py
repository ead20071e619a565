"""Where the tissue is: a mask over the thumbnail, and the share of tissue and pen in any box.

Everything is decided on optical density, ``-ln(pixel / glass)`` per channel, because dyes add up there and
the colour of lamp and glass drops out. Three observations carry the method:

- A stain absorbs one colour more than another, dirt does not. So tissue is where the densities of the three
  channels *differ* (their spread, here called ``chroma``), however pale; dust, coverslip edges, air bubbles
  and shadows are grey and stay out.
- Inks absorb in ratios that haematoxylin, eosin, DAB and blood do not have (the table ``_is_ink``), and a
  pen stroke is wider than a nucleus, a vessel or a pigment grain.
- Lumens and fat cells belong to tissue although they are empty: gaps and enclosed holes up to a stated size
  are filled, larger ones are glass.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field
from scipy import ndimage

from pixcell.config import Config
from pixcell.geometry import Box

__all__ = ["TissueConfig", "TissueMap", "find_tissue", "sharpness_of"]

Ink = Literal["blue", "green", "red", "black"]


class TissueConfig(Config):
    """How tissue and pen are told from glass. Lengths are on the glass, in microns."""

    thumbnail_side: int = Field(2048, ge=64)
    """Longer side of the overview the mask is made from, in pixels. Bounds the memory for any slide."""
    map_mpp: float = Field(8.0, gt=0)
    """Finest resolution of the mask. At 8 microns a nucleus melts into its surroundings, so that colours are
    those of tissue; a tile of 1024 px at 0.5 mpp is still 64 mask pixels wide."""
    min_chroma: float = Field(0.025, gt=0)
    """Lowest threshold on the spread of optical density. Glass and bubbles measure 0.00 to 0.02, pale
    haematoxylin of an immunostain 0.07, eosin 0.3 to 0.5."""
    max_chroma: float = Field(0.04, gt=0)
    """Highest threshold. Between the two, the threshold is the valley between glass and stain (Otsu); without
    a ceiling it would split strongly stained slides into dark and pale tissue."""
    smoothing_um: float = Field(8.0, ge=0)
    """Width (sigma) of the Gaussian that joins cells and fibres before the threshold."""
    gap_um: float = Field(16.0, ge=0)
    """Gaps up to twice this are closed: walls of fat cells, loose stroma."""
    max_hole_um2: float = Field(150_000.0, ge=0)
    """Enclosed holes up to this area are tissue: lumens of glands, vessels, fat (0.15 square millimetres are
    0.39 mm square). Tiling takes at most a quarter of a tile, so that no tile can be all hole."""
    min_object_um2: float = Field(15_000.0, ge=0)
    """Smaller islands are dropped: dust, debris, floating cells (0.2 mm square)."""
    min_thickness_um: float = Field(60.0, ge=0)
    """Islands nowhere as thick as this are dropped: fibres, coloured fringes of coverslip edges."""
    pens: tuple[Ink, ...] = ("blue", "green", "red", "black")
    """Inks to look for. Leave one out for a special stain of that colour (``green`` for Masson-Goldner,
    ``blue`` for Alcian blue, ``black`` for silver)."""
    pen_width_um: float = Field(40.0, gt=0)
    """Narrower ink is not a pen stroke. Pens draw 0.3 to 2 mm, fine liners 0.05; a nucleus is 0.01."""
    wide_pen_width_um: float = Field(80.0, gt=0)
    """The same for red and black, which are also the colours of blood, bone, pigment and inked margins."""
    pen_reach_um: float = Field(300.0, ge=0)
    """How far the faint rim of a stroke is followed from its core."""


@dataclass(frozen=True)
class TissueMap:
    """What covers the glass, on a coarse grid.

    ``tissue`` and ``pen`` are (height, width) bool and never both true; ``scale`` is level-0 pixels per
    pixel of the map, whose corner is the corner of level 0.
    """

    tissue: np.ndarray
    pen: np.ndarray
    scale: float

    def tissue_fraction(self, box: Box) -> float:
        """Return the share of a level-0 box that is tissue, 0 to 1. Outside of the slide is none."""
        return self._fraction(self._tissue_sums, box)

    def pen_fraction(self, box: Box) -> float:
        """Return the share of a level-0 box that is pen, 0 to 1."""
        return self._fraction(self._pen_sums, box)

    @cached_property
    def _tissue_sums(self) -> np.ndarray:
        return _summed(self.tissue)

    @cached_property
    def _pen_sums(self) -> np.ndarray:
        return _summed(self.pen)

    def _fraction(self, sums: np.ndarray, box: Box) -> float:
        # A tile seldom begins on a mask pixel: the summed table is read between its nodes, which weighs
        # cut pixels by the part that lies inside.
        x = np.array([box.x, box.right]) / self.scale
        y = np.array([box.y, box.bottom]) / self.scale
        corners = ndimage.map_coordinates(sums, [np.repeat(y, 2), np.tile(x, 2)], order=1, mode="nearest")
        covered = corners[3] - corners[1] - corners[2] + corners[0]
        return float(np.clip(covered * self.scale**2 / box.area, 0.0, 1.0))


def find_tissue(
    thumbnail: np.ndarray, scale: float, mpp: float | None = None, config: TissueConfig | None = None
) -> TissueMap:
    """Find tissue and pen on an overview of a slide, or on a small image.

    Args:
        thumbnail: (height, width, 3) uint8 of the whole slide.
        scale: Level-0 pixels per thumbnail pixel.
        mpp: Microns per level-0 pixel. None: lengths of the configuration are taken as if a thumbnail pixel
            were ``map_mpp`` wide, which suits overviews of sections but not close-ups.
        config: Thresholds; the defaults if None.

    Raises:
        ValueError: If the thumbnail is not (height, width, 3) uint8.
    """
    if thumbnail.ndim != 3 or thumbnail.shape[2] != 3 or thumbnail.dtype != np.uint8:
        raise ValueError(f"a thumbnail is (height, width, 3) uint8, not {thumbnail.shape} {thumbnail.dtype}")
    config = config or TissueConfig()
    pixel_um = mpp * scale if mpp else config.map_mpp
    small = _shrunk(thumbnail, pixel_um / config.map_mpp)
    shrink = thumbnail.shape[1] / small.shape[1]
    pixel_um *= shrink

    density = _optical_density(small)
    border = _scanner_border(small)
    pen = _find_pens(density, pixel_um, config) & ~border
    stained = _find_stain(density, pen | border, pixel_um, config)
    tissue = _tidied(stained, pen, pixel_um, config) & ~pen & ~border
    return TissueMap(tissue, pen, scale * shrink)


def sharpness_of(image: np.ndarray) -> float:
    """Return how steeply an image changes over one or two pixels, compared with seven.

    With ``v(k)`` the mean squared difference of pixels ``k`` apart, it is
    ``6 (v(2) - v(1)) / (v(7) - v(1))``: 1 where ``v`` grows in a straight line, as at edges, and 0.37 where
    it grows as a square, as in a blur. A ratio does not depend on contrast or on how much of the tile is
    glass, and white noise adds the same to every ``v`` and cancels.

    Measured on tissue: 0.9 to 2.5 at 0.5 mpp, 0.65 to 1.1 at 0.25 mpp; blurred with a sigma of three
    pixels 0.43 to 0.55, out-of-focus ink 0.4. The green channel is used, where haematoxylin and eosin
    both absorb most.

    Args:
        image: (height, width, 3) uint8, more than 7 pixels each way.

    Returns:
        The ratio; 0 where nothing changes at all.
    """
    green = image[..., 1]
    # Every fourth line is plenty for a mean, and costs a quarter.
    rows, columns = green[::4].astype(np.float32), green[:, ::4].T.astype(np.float32)
    near, next_nearest, far = (
        np.square(rows[:, k:] - rows[:, :-k]).mean() + np.square(columns[:, k:] - columns[:, :-k]).mean()
        for k in (1, 2, 7)
    )
    return float(6 * max(next_nearest - near, 0) / (far - near)) if far > near else 0.0


def _shrunk(thumbnail: np.ndarray, ratio: float) -> np.ndarray:
    """Average down so that a pixel is ``1 / ratio`` times as wide; never enlarge."""
    if ratio >= 1:
        return thumbnail
    height, width = (max(1, round(side * ratio)) for side in thumbnail.shape[:2])
    return np.asarray(Image.fromarray(thumbnail).resize((width, height), Image.Resampling.BOX))


def _optical_density(image: np.ndarray) -> np.ndarray:
    """Return (height, width, 3) float32 densities relative to the glass of this very image."""
    # There are only 256 values per channel: a table is as exact, and ten million logarithms sooner.
    values = np.arange(1, 257, dtype=np.float32)
    tables = [-np.log(values / (glass + 1)) for glass in _glass_colour(image)]
    return np.stack([table[image[..., channel]] for channel, table in enumerate(tables)], axis=-1)


def _glass_colour(image: np.ndarray) -> np.ndarray:
    """Return the commonest bright, nearly grey colour; neutral white where there is no glass to look at."""
    pixels = image.reshape(-1, 3)
    darkest, brightest = _extremes(pixels)
    # Exact white is padding of the reader or the scanner as often as glass, and tells nothing of the tint.
    glass = pixels[(darkest > 215) & (brightest - darkest < 20) & (darkest < 255)]
    if len(glass) < 0.01 * len(pixels):
        return np.full(3, 245, np.float32)
    levels = glass.sum(axis=1, dtype=np.int32) // 6
    commonest = np.bincount(levels).argmax()
    return np.median(glass[np.abs(levels - commonest) <= 1], axis=0).astype(np.float32)


def _scanner_border(image: np.ndarray) -> np.ndarray:
    """Return what is black and reaches the image's edge: area that was not scanned."""
    labels, _ = ndimage.label(_extremes(image)[1] < 40)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    border = np.isin(labels, np.unique(edge[edge > 0]))
    # Resampling and JPEG leave a coloured fringe beside the black.
    return ndimage.binary_dilation(border, iterations=3) if border.any() else border


def _is_ink(ink: Ink, red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where densities look like the core of a stroke, and like its faint rim.

    Measured on thumbnails (densities of red, green and blue): green ink 1.5 0.4 0.6, and on tissue
    1.3 0.8 0.8; blue ink 2.1 1.8 0.8; red ink 0.2 1.8 1.4. For comparison haematoxylin with eosin 0.3 0.7
    0.5, haematoxylin alone 0.7 0.4 0.3, DAB 0.6 0.9 1.3, blood 0.2 1.0 0.8.
    """
    if ink == "green":  # no common stain lets green through better than blue
        return (
            (red > 0.5) & (red > 1.25 * green) & (blue > 0.75 * green),
            (red > 0.08) & (red > 1.15 * green) & (blue > 0.85 * green) & (red > blue),
        )
    if ink == "blue":  # haematoxylin absorbs blue light at least half as well as green
        return (
            ((red > 0.6) & (red > 1.05 * green) & (blue < 0.55 * green))
            | ((red > 1.4) & (red > 1.3 * green) & (blue < 0.9 * green))
            | ((red > 1.6) & (red > 0.88 * green) & (blue < 0.6 * green)),
            (red > 0.25) & (red > 0.85 * green) & (blue < 0.65 * green),
        )
    if ink == "red":  # eosin in bone and blood have these ratios, but are paler or let less red through
        return (
            (((green > 1.2) & (red < 0.12 * green)) | ((green > 1.6) & (red < 0.6 * green)))
            & (blue > 0.7 * green)
            & (blue < 0.92 * green),
            (green > 0.15) & (red < 0.6 * green) & (blue > 0.7 * green) & (blue < 0.95 * green),
        )
    darkest, brightest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    # Where blue light is absorbed most it is DAB or silver, dark as it may be.
    return (
        (brightest > 1.1) & (darkest < 1.3 * brightest) & (blue < 1.08 * red),
        (brightest > 0.6) & (darkest < 1.25 * brightest) & (blue < 1.08 * red),
    )


def _find_pens(density: np.ndarray, pixel_um: float, config: TissueConfig) -> np.ndarray:
    red, green, blue = (ndimage.gaussian_filter(density[..., channel], 1) for channel in range(3))
    pen = np.zeros(red.shape, bool)
    for ink in config.pens:
        core, rim = _is_ink(ink, red, green, blue)
        width_um = config.wide_pen_width_um if ink in ("red", "black") else config.pen_width_um
        core = _opened(core, width_um / 2 / pixel_um)
        if core.any():
            reach = _grown(core, config.pen_reach_um / pixel_um)
            pen |= ndimage.binary_propagation(core, mask=reach & (rim | core))
    return _grown(pen, 2)  # the smoothing above leaves a pixel or two of every edge behind


def _find_stain(density: np.ndarray, hidden: np.ndarray, pixel_um: float, config: TissueConfig) -> np.ndarray:
    density = np.where(hidden[..., None], 0, density)
    sigma = config.smoothing_um / pixel_um
    smooth = ndimage.gaussian_filter(density, (sigma, sigma, 0))
    lowest, highest = _extremes(smooth)
    chroma = highest - lowest
    return chroma > np.clip(_otsu(chroma), config.min_chroma, config.max_chroma)


def _tidied(stained: np.ndarray, pen: np.ndarray, pixel_um: float, config: TissueConfig) -> np.ndarray:
    """Close gaps, fill small holes, drop specks, fibres and what holds no stain."""
    # A stroke over tissue must neither count as a wide gap nor cut a lumen open: it is bridged here and
    # taken out by the caller.
    covered = _closed(stained | pen, config.gap_um / pixel_um)
    hole_sizes, holes = _parts(~covered)
    small = hole_sizes * pixel_um**2 <= config.max_hole_um2
    small[0] = False
    tissue = (covered | small[holes]) & (_closed(stained, config.gap_um / pixel_um) | ~pen)
    # Islands of a close-up go on beyond its edges: there, a part of the image is enough.
    sizes, islands = _parts(tissue & ~pen)
    least = min(config.min_object_um2, 0.05 * stained.size * pixel_um**2)
    kept = sizes * pixel_um**2 >= least
    # A gap between two strokes is enclosed as well, but holds no stain.
    kept &= np.bincount(islands.ravel(), stained.ravel(), len(sizes)) >= 0.1 * sizes
    half = min(config.min_thickness_um / 2 / pixel_um, min(stained.shape) / 8)
    kept &= np.isin(np.arange(len(sizes)), np.unique(islands[_shrunken(islands > 0, half)]))
    kept[0] = False
    return kept[islands]


def _parts(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the areas of the connected parts of a mask, in pixels, and the image of their numbers.

    Number 0 is everything outside of the mask.
    """
    labels, _ = ndimage.label(mask)
    return np.bincount(labels.ravel()), labels


def _extremes(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest channel of each pixel; NumPy is slow along an axis of three."""
    red, green, blue = (image[..., channel] for channel in range(3))
    return np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue)


# Squares, not discs: they grow along one axis and then the other. The scene goes on beyond the image's edge,
# so nothing erodes from there.
def _grown(mask: np.ndarray, radius: float) -> np.ndarray:
    """Return where the square around a pixel holds any of the mask; a stretch is doubled until it fits."""
    reach = round(radius)
    for _ in range(2):
        grown, length = np.pad(mask, ((reach, reach), (0, 0)), mode="edge"), 1
        while length < 2 * reach + 1:
            step = min(length, 2 * reach + 1 - length)
            grown = grown[:-step] | grown[step:]
            length += step
        mask = grown.T
    return mask


def _shrunken(mask: np.ndarray, radius: float) -> np.ndarray:
    return ~_grown(~mask, radius)


def _opened(mask: np.ndarray, radius: float) -> np.ndarray:
    return _grown(_shrunken(mask, radius), radius)


def _closed(mask: np.ndarray, radius: float) -> np.ndarray:
    return _shrunken(_grown(mask, radius), radius)


def _otsu(values: np.ndarray, bins: int = 256) -> float:
    """Return the threshold that splits values best into two classes.

    Source: Otsu 1979, "A threshold selection method from gray-level histograms".
    """
    counts, edges = np.histogram(values, bins=bins)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        separation = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[np.nanargmax(separation)]) if np.isfinite(separation).any() else float(centres[0])


def _summed(mask: np.ndarray) -> np.ndarray:
    """Return the (height + 1, width + 1) table of sums above and left of each corner."""
    return np.pad(mask.cumsum(axis=0, dtype=np.float64).cumsum(axis=1), ((1, 0), (1, 0)))
