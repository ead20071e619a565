"""One HTML file that opens anywhere: asks no other host for anything, runs no script, pictures inside."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

__all__ = ["cards", "data_uri", "document", "facts_table", "jpeg", "rows_table"]

_STYLE = """
:root { --ink: #1d2430; --soft: #5d6675; --line: #e2e5ea; --real: #4a6fa5; --synthetic: #c2417c; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 28px 60px; }
h1 { font-size: 30px; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 0 0 12px; }
section { background: white; border: 1px solid var(--line); border-radius: 12px; padding: 24px 26px;
  margin-top: 20px; }
.lead { font-size: 19px; line-height: 1.5; margin: 14px 0 0; max-width: 62em; }
.soft { color: var(--soft); font-size: 14px; }
.note { border-left: 4px solid #d9922b; background: #fdf6ea; padding: 10px 14px; margin: 10px 0 0;
  border-radius: 4px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(185px, 1fr)); gap: 14px;
  margin-top: 20px; }
.card { background: white; border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.card b { display: block; font-size: 27px; font-weight: 650; letter-spacing: -0.01em; margin: 2px 0; }
.card b small { font-size: 15px; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.card p { margin: 4px 0 0; font-size: 14px; color: var(--soft); }
.plot { width: 100%; display: block; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 10px; }
.sheet + h3 { margin-top: 24px; }
h3 { font-size: 15px; margin: 0 0 10px; }
figure { margin: 0; min-width: 0; }
figure img { width: 100%; display: block; border-radius: 6px; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 16px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.real img { border-bottom: 5px solid var(--real); }
.synthetic img { border-bottom: 5px solid var(--synthetic); }
figcaption { font-size: 12px; color: var(--soft); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.tag { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; }
td, th { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
td:first-child { white-space: nowrap; }
td.figure { font-variant-numeric: tabular-nums; }
.facts td:first-child { width: 15em; color: var(--soft); white-space: normal; }
.facts td { overflow-wrap: anywhere; }
details { margin-top: 10px; } summary { cursor: pointer; font-weight: 600; }
dl { margin: 0; display: grid; grid-template-columns: 9em 1fr; gap: 8px 14px; font-size: 15px; }
dt { font-weight: 600; } dd { margin: 0; color: #3a4352; }
pre { margin: 0; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; }
.scroll { overflow-x: auto; }
footer { margin-top: 26px; color: var(--soft); font-size: 14px; }
"""


def document(title: str, body: str) -> str:
    """Return a page in the style of the house.

    Args:
        title: Plain text, of the window and of the head line.
        body: HTML below the head line.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="pixcell">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body><main>
<h1>{escape(title)}</h1>
{body}
</main></body></html>
"""


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture as an address that holds it; ``kind`` is ``png`` or ``jpeg``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def jpeg(image: np.ndarray, side: int | None = None) -> bytes:
    """Compress a (height, width, 3) uint8 picture, made smaller first if it is larger than ``side``."""
    picture = Image.fromarray(image)
    if side is not None:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def cards(entries: Sequence[tuple[str, str, str, str]]) -> str:
    """Return the figures that count most, large: (title, value, small print behind it, line below)."""
    shown = "".join(
        f'<div class="card">{escape(title)}<b>{escape(value)}'
        f"{f' <small>{escape(small)}</small>' if small else ''}</b><p>{escape(below)}</p></div>"
        for title, value, small, below in entries
    )
    return f'<div class="cards">{shown}</div>'


def facts_table(entries: Mapping[str, str]) -> str:
    """Return names and values, as text, in two columns."""
    rows = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in entries.items()
    )
    return f'<table class="facts">{rows}</table>'


def rows_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return text in columns, with a head line."""
    header = "".join(f"<th>{escape(title)}</th>" for title in titles)
    cells = ("".join(f'<td class="figure">{escape(cell)}</td>' for cell in row) for row in rows)
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="scroll"><table><tr>{header}</tr>{lines}</table></div>'
