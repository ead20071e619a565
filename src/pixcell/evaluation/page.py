"""A report as one HTML file: opens anywhere, asks no other host for anything, pictures inside."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from pixcell.evaluation.report import MEANINGS, Report

__all__ = ["Example", "html_page"]

_SIDE = 224


@dataclass(frozen=True)
class Example:
    """A picture to show: pixels (height, width, 3) uint8, and what stands below it."""

    image: np.ndarray
    caption: str


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
footer { margin-top: 26px; color: var(--soft); font-size: 14px; }
"""


def html_page(
    report: Report,
    plot: bytes,
    real: Sequence[Example],
    synthetic: Sequence[Example],
    pairs: Sequence[tuple[Example, Example]],
) -> str:
    """Return the page.

    Args:
        report: What it is about.
        plot: PNG bytes.
        real: Real pictures to show, drawn at random.
        synthetic: Generated pictures to show, drawn at random.
        pairs: (reference, generated) pictures to show side by side.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    counts = (
        f"{report.synthetic.num_pictures} synthetic against {report.real.num_pictures} real pictures · "
        f"extractor {report.extractor['name']} · {report.created}"
    )
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in report.warnings)
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in MEANINGS.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="pixcell">
<title>Synthetic against real tissue</title>
<style>{_STYLE}</style>
</head>
<body><main>
<h1>Synthetic against real tissue</h1>
<div class="soft">{escape(counts)}</div>
<p class="lead">{escape(report.summary)}</p>
{notes}
<div class="cards">{_cards(report)}</div>
<section><img class="plot" alt="Features, distances and pairs" src="{_uri(plot, "png")}"></section>
{_contact_sheet(real, synthetic, pairs)}
<section><h2>Figures</h2>{_measures(report)}<p class="soft">{escape(report.pairs_text())}</p></section>
<section><h2>What the figures mean</h2><dl>{meanings}</dl></section>
<section><h2>Protocol</h2>
<p class="soft">Figures compare only where extractor, counts, field size and resolution are the same.</p>
{_protocol(report.protocol())}</section>
<footer>Made by pixcell. Research use only. Synthetic pictures show no patient's tissue and are not for
diagnosis; a small distance does not show that they are no copies of training pictures.</footer>
</main></body></html>
"""


def _cards(report: Report) -> str:
    cards = []
    for measure, row in zip(report.measures, report.measure_rows(), strict=True):
        value, _, uncertainty = row[1].partition(" ± ")
        scatter = f" <small>± {escape(uncertainty)}</small>" if uncertainty else ""
        if measure.value is None:
            below = "not given: too few pictures for it"
        elif measure.floor is None:
            below = f"{measure.better} is better; no floor: too few real pictures"
        else:
            below = f"at {measure.matched_count} a side {row[2]}; real against real {row[3]}"
        cards.append((measure.title, f"{escape(value)}{scatter}", below))
    pairs = report.pairs
    if pairs.cosine_mean is not None:
        below = f"{pairs.num_pairs} pairs"
        if pairs.mismatched_mean is not None:
            below = f"with the references of others: {pairs.mismatched_mean:.2f}"
        scatter = f" <small>± {pairs.cosine_std or 0:.2f}</small>"
        cards.append(("Similarity of pairs", f"{pairs.cosine_mean:.2f}{scatter}", below))
    return "".join(
        f'<div class="card">{escape(title)}<b>{value}</b><p>{escape(below)}</p></div>'
        for title, value, below in cards
    )


def _contact_sheet(
    real: Sequence[Example], synthetic: Sequence[Example], pairs: Sequence[tuple[Example, Example]]
) -> str:
    legend = (
        '<p class="soft"><span class="tag" style="background:var(--real)"></span>real &nbsp; '
        '<span class="tag" style="background:var(--synthetic)"></span>synthetic'
    )
    beside = "".join(
        f'<div class="pair">{_figure(reference, "real")}{_figure(generated, "synthetic")}</div>'
        for reference, generated in pairs
    )
    parts = [f'<h3>Reference and what was made after it</h3><div class="sheet pairs">{beside}</div>'] * bool(
        pairs
    )
    for title, kind, examples in (("Real", "real", real), ("Synthetic", "synthetic", synthetic)):
        figures = "".join(_figure(example, kind) for example in examples)
        parts.append(f'<h3>{title}, drawn at random</h3><div class="sheet">{figures}</div>')
    return f"<section><h2>Pictures</h2>{legend}</p>{''.join(parts)}</section>"


def _figure(example: Example, kind: str) -> str:
    picture = Image.fromarray(example.image)
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=90)
    caption = escape(example.caption)
    return (
        f'<figure class="{kind}"><img src="{_uri(buffer.getvalue(), "jpeg")}" alt="{kind}: {caption}" '
        f'title="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _measures(report: Report) -> str:
    titles = ("Measure", "All pictures", "At the floor's count", "Floor", "Better")
    header = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    rows = []
    for measure, row in zip(report.measures, report.measure_rows(), strict=True):
        cells = "".join(f'<td class="figure">{escape(cell)}</td>' for cell in row)
        rows.append(f"<tr>{cells}</tr>")
        remarks = [measure.reason] if measure.reason else []
        if measure.uncertainty_kind:
            remarks.append(f"± is the {measure.uncertainty_kind}.")
        if remarks:
            rows.append(f'<tr><td></td><td colspan="4" class="soft">{escape(" ".join(remarks))}</td></tr>')
    return f"<table>{header}{''.join(rows)}</table>"


def _protocol(sections: Mapping[str, Mapping[str, str]]) -> str:
    parts = []
    for title, entries in sections.items():
        rows = "".join(
            f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in entries.items()
        )
        parts.append(
            f'<details open><summary>{escape(title)}</summary><table class="facts">{rows}</table></details>'
        )
    return "".join(parts)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
