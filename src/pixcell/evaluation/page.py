"""The page of a report: figures, plot, and real pictures beside synthetic ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from pixcell.evaluation.document import cards, data_uri, document, facts_table, jpeg
from pixcell.evaluation.report import MEANINGS, Report

__all__ = ["Example", "html_page"]

_SIDE = 224


@dataclass(frozen=True)
class Example:
    """A picture to show: pixels (height, width, 3) uint8, and what stands below it."""

    image: np.ndarray
    caption: str


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
    counts = (
        f"{report.synthetic.num_pictures} synthetic against {report.real.num_pictures} real pictures · "
        f"extractor {report.extractor['name']} · {report.created}"
    )
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in report.warnings)
    meanings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in MEANINGS.items())
    body = f"""<div class="soft">{escape(counts)}</div>
<p class="lead">{escape(report.summary)}</p>
{notes}
{cards(_main_figures(report))}
<section><img class="plot" alt="Features, distances and pairs" src="{data_uri(plot, "png")}"></section>
{_contact_sheet(real, synthetic, pairs)}
<section><h2>Figures</h2>{_measures(report)}<p class="soft">{escape(report.pairs_text())}</p></section>
<section><h2>What the figures mean</h2><dl>{meanings}</dl></section>
<section><h2>Protocol</h2>
<p class="soft">Figures compare only where extractor, counts, field size and resolution are the same.</p>
{_protocol(report.protocol())}</section>
<footer>Made by pixcell. Research use only. Synthetic pictures show no patient's tissue and are not for
diagnosis; a small distance does not show that they are no copies of training pictures.</footer>
"""
    return document("Synthetic against real tissue", body)


def _main_figures(report: Report) -> list[tuple[str, str, str, str]]:
    entries = []
    for measure, row in zip(report.measures, report.measure_rows(), strict=True):
        value, _, uncertainty = row[1].partition(" ± ")
        if measure.value is None:
            below = "not given: too few pictures for it"
        elif measure.floor is None:
            below = f"{measure.better} is better; no floor: too few real pictures"
        else:
            below = f"at {measure.matched_count} a side {row[2]}; real against real {row[3]}"
        entries.append((measure.title, value, f"± {uncertainty}" if uncertainty else "", below))
    pairs = report.pairs
    if pairs.cosine_mean is not None:
        below = f"{pairs.num_pairs} pairs"
        if pairs.mismatched_mean is not None:
            below = f"with the references of others: {pairs.mismatched_mean:.2f}"
        scatter = f"± {pairs.cosine_std or 0:.2f}"
        entries.append(("Similarity of pairs", f"{pairs.cosine_mean:.2f}", scatter, below))
    return entries


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
    caption = escape(example.caption)
    source = data_uri(jpeg(example.image, _SIDE), "jpeg")
    return (
        f'<figure class="{kind}"><img src="{source}" alt="{kind}: {caption}" '
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
    return "".join(
        f"<details open><summary>{escape(title)}</summary>{facts_table(entries)}</details>"
        for title, entries in sections.items()
    )
