"""Many pictures on one: each reference at the left, what was made after it beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pixcell.training.previews import write_line

__all__ = ["SheetRow", "draw_contact_sheet"]

_GAP, _MARGIN, _LABEL = 8, 16, 20
_PAPER, _INK, _MARK = (255, 255, 255), (40, 40, 40), (30, 90, 160)


@dataclass(frozen=True)
class SheetRow:
    """A reference and the pictures made after it.

    Args:
        name: Shown beside "reference"; or above pictures that have none.
        reference: (height, width, 3) uint8, or None.
        pictures: The same kind, in order.
        labels: One below each picture.
    """

    name: str
    reference: np.ndarray | None
    pictures: Sequence[np.ndarray]
    labels: Sequence[str]


def draw_contact_sheet(
    title: str, rows: Sequence[SheetRow], columns: int = 8, side: int = 192
) -> Image.Image:
    """Return the sheet: references framed and labelled, so that nobody takes one for a generated picture.

    Args:
        title: One line at the top.
        rows: In order; a long one continues on further lines.
        columns: Generated pictures on a line, at most.
        side: Side of a picture on the sheet, in pixels. Smaller pictures are not enlarged beyond it.
    """
    columns = max(1, min(columns, max(len(row.pictures) for row in rows)))
    has_reference = any(row.reference is not None for row in rows)
    offset = _MARGIN + (side + 3 * _GAP if has_reference else 0)
    lines = [-(-len(row.pictures) // columns) for row in rows]
    width = max(offset + columns * (side + _GAP) - _GAP + _MARGIN, 420)
    height = 2 * _MARGIN + 28 + sum(lines) * (side + _LABEL + _GAP) + len(rows) * _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    write_line(draw, (_MARGIN, _MARGIN), title, width - 2 * _MARGIN, 15, _INK)
    top = _MARGIN + 28
    for row, num_lines in zip(rows, lines, strict=True):
        if row.reference is not None:
            _paste(sheet, row.reference, _MARGIN, top, side)
            draw.rectangle((_MARGIN - 3, top - 3, _MARGIN + side + 2, top + side + 2), outline=_MARK, width=3)
            write_line(draw, (_MARGIN, top + side + 4), f"reference: {row.name}", side, 12, _MARK)
        for index, (picture, label) in enumerate(zip(row.pictures, row.labels, strict=True)):
            left = offset + index % columns * (side + _GAP)
            line_top = top + index // columns * (side + _LABEL + _GAP)
            _paste(sheet, picture, left, line_top, side)
            write_line(draw, (left, line_top + side + 4), label, side, 12, _INK)
        top += num_lines * (side + _LABEL + _GAP) + _GAP
    return sheet


def _paste(sheet: Image.Image, picture: np.ndarray, left: int, top: int, side: int) -> None:
    image = Image.fromarray(picture)
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    sheet.paste(image, (left, top))
