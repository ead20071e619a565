"""Previews: the same held-out samples at every checkpoint, in captioned rows, and the way back to them.

    runs/<name>/previews/step-00001200.png

A sheet carries its layout in its record, so that a report can set one field of many checkpoints side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from pixcell.provenance import read_provenance, save_synthetic_png

__all__ = ["Preview", "picture_rows", "preview_path", "read_preview", "save_preview", "write_line"]

_GAP, _CAPTION, _TITLE, _SIZE = 4, 20, 28, 12
_INK, _SOFT = (29, 36, 48), (93, 102, 117)
Picture = UInt8[np.ndarray, "height width 3"]
Sheet = UInt8[np.ndarray, "sheet_height sheet_width 3"]


@dataclass(frozen=True)
class Preview:
    """A look at the model on samples it was not trained on."""

    picture: Sheet
    figures: Mapping[str, float] = field(default_factory=dict)
    """Written to the metrics, as ``held_out/<name>``."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    """Where the pictures of a sheet stand; empty for a picture that is no sheet."""

    @classmethod
    def of_rows(
        cls,
        rows: Mapping[str, Sequence[Picture]],
        figures: Mapping[str, float],
        names: Sequence[str] = (),
    ) -> Self:
        """Lay pictures of one size out in rows.

        Args:
            rows: Pictures by caption. Captions of real tissue begin with "real".
            figures: Written to the metrics, as ``held_out/<name>``.
            names: What stands in each column, such as the key of a field.
        """
        height, width = next(iter(rows.values()))[0].shape[:2]
        layout = {
            "captions": list(rows),
            "counts": [len(pictures) for pictures in rows.values()],
            "height": height,
            "width": width,
            "top": _CAPTION if names else 0,
        }
        return cls(picture_rows(rows, names), figures, layout)


def picture_rows(rows: Mapping[str, Sequence[Picture]], names: Sequence[str] = ()) -> Sheet:
    """Lay pictures of one size out in captioned rows, column under column.

    Args:
        rows: Pictures by caption.
        names: Written above the columns, cut short where a picture is narrower.
    """
    height, width = next(iter(rows.values()))[0].shape[:2]
    columns = max(len(pictures) for pictures in rows.values())
    head = _CAPTION if names else 0
    sheet = Image.new(
        "RGB", (columns * (width + _GAP) + _GAP, head + len(rows) * (height + _CAPTION + _GAP)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        write_line(pen, (column * (width + _GAP) + _GAP, 3), name, width, _SIZE, _SOFT)
    for row, (caption, pictures) in enumerate(rows.items()):
        top = head + row * (height + _CAPTION + _GAP)
        write_line(pen, (_GAP, top + 2), caption, sheet.width - 2 * _GAP, _SIZE, _INK)
        for column, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture), (column * (width + _GAP) + _GAP, top + _CAPTION))
    return np.asarray(sheet)


def preview_path(run: Path, step: int) -> Path:
    """Return where the preview of a step is."""
    return run / "previews" / f"step-{step:08d}.png"


def save_preview(run: Path, step: int, preview: Preview, title: str) -> Sheet:
    """Write the preview of a step under a title; return it as it was written.

    Raises:
        OutputError: If the disk is full.
    """
    height, width = preview.picture.shape[:2]
    sheet = Image.new("RGB", (width, height + _TITLE), "white")
    write_line(ImageDraw.Draw(sheet), (_GAP, 6), title, width - 2 * _GAP, _SIZE + 2, _INK)
    sheet.paste(Image.fromarray(preview.picture), (0, _TITLE))
    picture = np.asarray(sheet)
    layout = {**preview.layout, "top": preview.layout["top"] + _TITLE} if preview.layout else {}
    record = {
        "preview_of": run.name,
        "step": step,
        "note": "rows of real tissue are captioned so",
        "layout": layout,
    }
    save_synthetic_png(preview_path(run, step), picture, record)
    return picture


def read_preview(path: Path) -> tuple[Sheet, dict[str, list[Picture]]]:
    """Return a sheet, and its pictures by caption (none if it is no sheet of rows).

    Raises:
        UnreadableSlide: If the file is damaged.
    """
    layout = (read_provenance(path) or {}).get("layout")
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    if not layout:
        return sheet, {}
    height, width = layout["height"], layout["width"]
    rows: dict[str, list[Picture]] = {}
    for row, (caption, count) in enumerate(zip(layout["captions"], layout["counts"], strict=True)):
        top = layout["top"] + row * (height + _CAPTION + _GAP) + _CAPTION
        lefts = [column * (width + _GAP) + _GAP for column in range(count)]
        rows[caption] = [sheet[top : top + height, left : left + width] for left in lefts]
    return sheet, rows


def write_line(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    width: int,
    size: int,
    ink: tuple[int, int, int],
) -> None:
    """Write a line, cut short with an ellipsis where it would run over ``width`` pixels."""
    font = ImageFont.load_default(size)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)  # file names may hold newlines
    if pen.textlength(text, font=font) > width:
        while text and pen.textlength(f"{text}…", font=font) > width:
            text = text[:-1]
        text = f"{text}…"
    pen.text(place, text, fill=ink, font=font)
