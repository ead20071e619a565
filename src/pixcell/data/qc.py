"""One picture per slide that shows what was kept and why the rest was not.

Side by side: the thumbnail, the mask over it, and the fate of every tile. Meant for a person who flips
through hundreds of them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pixcell.data.tiling import VERDICTS, Candidate, Verdict
from pixcell.data.tissue import TissueMap
from pixcell.files import write_whole

__all__ = ["draw_examples", "draw_overlay", "save_overlay"]

_COLOURS: dict[Verdict, tuple[int, int, int]] = {
    "kept": (20, 150, 60),
    "glass": (150, 150, 150),
    "pen": (230, 120, 0),
    "blurred": (40, 90, 220),
    "unreadable": (210, 0, 60),
}
_TISSUE, _PEN = (20, 150, 60), (230, 120, 0)
_PANEL = 900  # longer side of a panel, in pixels


def draw_overlay(
    thumbnail: np.ndarray, tissue_map: TissueMap, candidates: Sequence[Candidate], scale: float, title: str
) -> Image.Image:
    """Draw the three panels with a legend.

    Args:
        thumbnail: (height, width, 3) uint8 of the whole slide.
        tissue_map: Tissue and pen over it.
        candidates: Every place of the grid with its verdict.
        scale: Level-0 pixels per thumbnail pixel.
        title: A line above, such as the slide's id.
    """
    height, width = thumbnail.shape[:2]
    ratio = _PANEL / max(height, width)
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    plain = Image.fromarray(thumbnail).resize(
        size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.BICUBIC
    )
    panels = [plain, _masked(plain, tissue_map), _tiled(plain, candidates, ratio / scale)]
    margin, header = 12, 56
    canvas = Image.new("RGB", (3 * size[0] + 4 * margin, size[1] + header + margin), "white")
    for column, panel in enumerate(panels):
        canvas.paste(panel, (margin + column * (size[0] + margin), header))
    _label(canvas, title, Counter(candidate.verdict for candidate in candidates), margin)
    return canvas


def draw_examples(
    examples: Sequence[tuple[np.ndarray, Candidate]], counts: Mapping[Verdict, int], title: str
) -> Image.Image:
    """Draw ready-made tiles in rows, framed by their fate.

    Args:
        examples: Small pictures, (side, side, 3) uint8, all of one size, with their candidates.
        counts: Number of candidates per verdict, of all of them.
        title: A line above, such as the shard's id.
    """
    side = examples[0][0].shape[0] if examples else 1
    columns, margin, header = 8, 12, 56
    rows = max(1, -(-len(examples) // columns))
    step = side + margin
    canvas = Image.new("RGB", (columns * step + margin, rows * step + header), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (picture, candidate) in enumerate(examples):
        x, y = margin + index % columns * step, header + index // columns * step
        canvas.paste(Image.fromarray(picture), (x, y))
        draw.rectangle(
            (x - 3, y - 3, x + side + 2, y + side + 2), outline=_COLOURS[candidate.verdict], width=3
        )
    _label(canvas, title, counts, margin)
    return canvas


def save_overlay(path: Path, overlay: Image.Image) -> None:
    """Write the picture as JPEG, whole or not at all."""
    with write_whole(path) as temporary:
        overlay.save(temporary, format="JPEG", quality=85)


def _masked(plain: Image.Image, tissue_map: TissueMap) -> Image.Image:
    pixels = np.asarray(plain).astype(np.float32)
    for mask, colour in ((tissue_map.tissue, _TISSUE), (tissue_map.pen, _PEN)):
        shown = np.asarray(Image.fromarray(mask).resize(plain.size, Image.Resampling.NEAREST))
        pixels[shown] = 0.75 * pixels[shown] + 0.25 * np.array(colour, np.float32)
        pixels[shown & ~ndimage.binary_erosion(shown, iterations=2)] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def _tiled(plain: Image.Image, candidates: Sequence[Candidate], ratio: float) -> Image.Image:
    panel = plain.copy()
    draw = ImageDraw.Draw(panel, "RGBA")
    for candidate in candidates:
        # Bare glass all around is most of a slide; frames there would only hide what matters.
        if candidate.verdict == "glass" and candidate.tissue == 0:
            continue
        box = candidate.box
        corners = [value * ratio for value in (box.x, box.y, box.right, box.bottom)]
        corners[2:] = [max(end - 1, start) for start, end in zip(corners[:2], corners[2:], strict=True)]
        colour = _COLOURS[candidate.verdict]
        strength = 50 if candidate.verdict in ("kept", "glass") else 110
        draw.rectangle(corners, fill=(*colour, strength), outline=(*colour, 255), width=1)
    return panel


def _label(canvas: Image.Image, title: str, counts: Mapping[Verdict, int], margin: int) -> None:
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    # Pillow's own font knows Latin letters only; others would be empty boxes.
    shown = "".join(letter if ord(letter) < 0x250 else "·" for letter in title)
    draw.text((margin, 4), shown, fill="black", font=font)
    x = margin
    for verdict in VERDICTS:
        draw.rectangle((x, 32, x + 14, 46), fill=_COLOURS[verdict])
        text = f"{verdict} {counts.get(verdict, 0)}"
        draw.text((x + 20, 28), text, fill="black", font=font)
        x += round(44 + draw.textlength(text, font=font))
