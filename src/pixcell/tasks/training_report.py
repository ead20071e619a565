"""The report of a training: one HTML file about a run folder, at any moment of its life.

    runs/<name>/report.html

It needs the folder and nothing else: no store, no models, no network; a run may be in progress, stopped or
killed. Distances over checkpoints stand in it where ``pixcell evaluate STORE RUN`` has put its reports into
``evaluations/``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pixcell.console import duration_text, facts
from pixcell.errors import UnreadableSlide
from pixcell.evaluation.document import cards, data_uri, document, facts_table, jpeg, rows_table
from pixcell.evaluation.plots import draw_course
from pixcell.files import write_text
from pixcell.provenance import now
from pixcell.tasks.facts import flattened, size_text
from pixcell.tasks.run_curves import draw_curves
from pixcell.tasks.run_findings import findings, state_of
from pixcell.tasks.run_history import KeptCheckpoint, RunHistory
from pixcell.training.previews import read_preview

__all__ = ["TrainingReport", "report_training"]

_PREVIEWS_SHOWN, _DROPPED_SHOWN = 8, 20
_ACROSS, _SIDE = 8, 280


@dataclass(frozen=True)
class TrainingReport:
    """A report that was written."""

    path: Path
    state: str
    """How far the run is, in words."""
    findings: Sequence[str]
    """What a reader has to know."""

    def __rich__(self) -> Table:
        """Lay the result out for a terminal."""
        notes = {f"note {place + 1}": text for place, text in enumerate(self.findings)}
        return facts("Report of a training", {"state": self.state, **notes, "page": self.path})


def report_training(run: Path, out: Path | None = None) -> TrainingReport:
    """Write the report of a run.

    Args:
        run: The run folder.
        out: The HTML file. None: ``report.html`` in the run.

    Raises:
        RunError: If the folder is no run.
        OutputError: If the file cannot be written.
    """
    history = RunHistory.read(run)
    out = out or run / "report.html"
    notes = findings(history)
    write_text(out, _page(history, notes))
    return TrainingReport(out, state_of(history), notes)


def _page(history: RunHistory, notes: Sequence[str]) -> str:
    recipe = history.settings
    lead = (
        f"{recipe.get('objective.name', 'training')} · fields of {recipe.get('data.size', '?')} px · "
        f"report of {now()}"
    )
    sections = [
        ("Curves", _curves(history)),
        ("Previews over the steps", _previews(history)),
        ("Distances over the checkpoints", _evaluations(history)),
        ("Checkpoints", _checkpoints(history.checkpoints)),
        ("Starts and stops", _starts(history)),
        ("What it started from", _growth(history.growth)),
        ("Data", _data(history)),
        ("Dropped tiles", _dropped(history.dropped)),
        ("Recipe", f"<pre>{escape(history.recipe_text)}</pre>"),
        ("Environment of the last start", _environment(history)),
    ]
    shown = "".join(f"<section><h2>{escape(title)}</h2>{body}</section>" for title, body in sections if body)
    warnings = "".join(f'<p class="note">{escape(text)}</p>' for text in notes)
    return document(
        f"Training of {history.name}",
        f"""<div class="soft">{escape(lead)}</div>
<p class="lead">{escape(state_of(history))}</p>
{warnings}
{cards(_main_figures(history))}
{shown}
<footer>Made by pixcell. Research use only. Synthetic pictures show no patient's tissue and are not for
diagnosis. Previews show rows of real tissue beside them, captioned so.</footer>
""",
    )


def _main_figures(history: RunHistory) -> list[tuple[str, str, str, str]]:
    """What one asks first: how far, how good, how fast."""
    entries = []
    last = history.lines[-1] if history.lines else {}
    total = history.num_steps
    passes = f"{last['epoch']:.3g} passes over the samples" if last.get("epoch") is not None else ""
    entries.append(("Steps", f"{history.step:,}", f"of {total:,}" if total else "", passes))
    if last.get("loss") is not None:
        _, losses = history.series("loss")
        entries.append(("Loss", f"{losses[-1]:.4g}", "", f"began at {losses[0]:.4g}"))
    for name, (steps, values) in history.held_out.items():
        best = int(np.argmax(values) if name.startswith("psnr") else np.argmin(values))
        entries.append(
            (f"Held out: {name}", f"{values[-1]:.4g}", "", f"best {values[best]:.4g} at step {steps[best]:,}")
        )
    _, speeds = history.series("samples_per_s")
    if speeds:
        _, use = history.series("flop_use")
        below = f"median; MFU {100 * np.median(use):.3g}%" if use else "median over the log"
        if last.get("memory_gib") is not None:
            below += f"; {last['memory_gib']:.3g} GiB at most"
        entries.append(("Images per second", f"{np.median(speeds):.3g}", "", below))
    if last.get("seconds") is not None:
        left = last.get("seconds_left")
        below = "on training, over all starts"
        if left is not None and not history.is_complete:
            below += f"; {duration_text(left)} left at its pace"
        entries.append(("Time", *_time(last["seconds"]), below))
    return entries


def _time(seconds: float) -> tuple[str, str]:
    """A number that fits on a card, and its unit."""
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g}", unit
    return f"{seconds:.3g}", "s"


def _curves(history: RunHistory) -> str:
    if not history.lines:
        return '<p class="soft">Nothing was logged yet.</p>'
    return (
        f'<img class="plot" alt="Curves of the training" src="{data_uri(draw_curves(history), "png")}">'
        '<p class="soft">Thin: as logged; thick: running mean over a twentieth of the log. Losses of the '
        "first twentieth may leave the picture at its top. Dotted: steps at which the run went on after a "
        "stop. Time runs from clean (0) to noise (1). Held out: fields that were not trained on, at fixed "
        "noise, by the averaged weights.</p>"
    )


def _previews(history: RunHistory) -> str:
    """The same fields through one checkpoint after the other, below the real ones."""
    steps = sorted(history.previews)
    if not steps:
        return ""
    chosen = sorted({steps[place] for place in _spread(len(steps), _PREVIEWS_SHOWN)})
    rows: list[tuple[str, str, Sequence[np.ndarray]]] = []
    whole = []
    for step in chosen:
        try:
            sheet, found = read_preview(history.previews[step])
        except UnreadableSlide as error:
            whole.append(f'<p class="soft">Step {step:,}: {escape(str(error))}</p>')
            continue
        if not found:
            picture = data_uri(jpeg(sheet), "jpeg")
            whole.append(f'<h3>Step {step:,}</h3><img class="plot" alt="step {step}" src="{picture}">')
            continue
        real = [(caption, "real", each) for caption, each in found.items() if caption.startswith("real")]
        if not rows:
            rows += real
        made = [(caption, each) for caption, each in found.items() if not caption.startswith("real")]
        rows += [(f"step {step:,}: {caption}", "synthetic", each) for caption, each in made]
    strips = "".join(_strip(*row) for row in rows)
    left_out = len(steps) - len(chosen)
    more = f" {left_out} more are in previews/." if left_out else ""
    about = f'<p class="soft">Same fields, same noise, averaged weights.{more}</p>'
    return f"{about}{strips}{''.join(whole)}"


def _strip(caption: str, kind: str, pictures: Sequence[np.ndarray]) -> str:
    figures = "".join(
        f'<figure class="{kind}"><img src="{data_uri(jpeg(picture, _SIDE), "jpeg")}" '
        f'alt="{kind}: {escape(caption)}"></figure>'
        for picture in pictures
    )
    style = f"grid-template-columns: repeat({max(len(pictures), _ACROSS)}, minmax(0, 1fr))"
    return (
        f'<p class="soft strip"><span class="tag" style="background:var(--{kind})"></span>{escape(caption)}'
        f'</p><div class="sheet" style="{style}">{figures}</div>'
    )


def _spread(count: int, most: int) -> list[int]:
    """First, last and evenly between them."""
    return [round(place) for place in np.linspace(0, count - 1, min(count, most))]


def _evaluations(history: RunHistory) -> str:
    parts = []
    for extractor, reports in history.evaluations.items():
        rows = []
        for step in sorted(reports):
            report = reports[step]
            cells = [f"{step:,}", str(report.synthetic.num_pictures)]
            for name in ("frechet", "kernel", "precision", "recall"):
                measure = report.measure(name)
                value, floor = measure.matched, measure.floor
                if value is None:
                    value = measure.value
                cells.append(
                    "–"
                    if value is None
                    else f"{value:.3g}" + (f" ({floor:.3g})" if floor is not None else "")
                )
            rows.append(cells)
        titles = (
            "Step",
            "Pictures",
            "Frechet (floor)",
            "Kernel (floor)",
            "Precision (floor)",
            "Recall (floor)",
        )
        plot = data_uri(draw_course(reports), "png")
        parts.append(
            f'<h3>In the space of {escape(extractor)}</h3><img class="plot" alt="Distances" src="{plot}">'
            f"{rows_table(titles, rows)}"
        )
    if not parts:
        return ""
    return (
        f'{"".join(parts)}<p class="soft">Floor: real against real at the same count. Rows compare where '
        "pictures, references and settings were the same; pixcell evaluate STORE RUN sees to that.</p>"
    )


def _checkpoints(checkpoints: Sequence[KeptCheckpoint]) -> str:
    if not checkpoints:
        return ""
    names = sorted({name for each in checkpoints for name in each.figures})
    rows = []
    for each in checkpoints:
        figures = [f"{each.figures[name]:.4g}" if name in each.figures else "–" for name in names]
        there = "pruned" if each.size is None else size_text(each.size)
        rows.append([f"{each.step:,}", *figures, "damaged" if each.problem else there])
    return rows_table(["Step", *(f"Held out: {name}" for name in names), "On disk"], rows)


def _starts(history: RunHistory) -> str:
    rows = []
    for place, start in enumerate(history.starts):
        noted = start.facts
        is_last = place == len(history.starts) - 1
        end = start.end or ("no end noted" if is_last else "killed: no end noted")
        if noted.get("error"):
            end = f"{end}: {noted['error']}"
        rows.append(
            [
                str(noted.get("started", "–")),
                f"{start.from_step:,}" if start.from_step is not None else "–",
                f"{noted['step']:,}" if "step" in noted else "–",
                str(noted.get("ended", "–")),
                end,
                str(noted.get("engine", "–")),
            ]
        )
    if not rows:
        return ""
    return rows_table(("Started (UTC)", "From step", "To step", "Ended (UTC)", "How", "On"), rows)


def _growth(growth: Mapping[str, Any] | None) -> str:
    if growth is None:
        return ""
    entries: dict[str, str] = {}
    for key, value in growth.items():
        if isinstance(value, Mapping):
            if not value:
                entries[key] = "nothing"
            for name, how in value.items():
                entries[f"{key}: {name}"] = str(how)
        elif isinstance(value, list | tuple):
            entries[key] = f"{len(value)} tensors" if value else "nothing"
        else:
            entries[key] = str(value)
    return facts_table(entries)


def _data(history: RunHistory) -> str:
    facts = {key: value for key, value in history.data.items() if key != "made_by"}
    asked = dict(history.recipe.get("data", {}))
    if asked.get("published", {}).get("latents") != asked.get("latents"):
        asked.pop("published", None)  # names for a layout that this run did not read
    known = flattened({"data": asked, **facts})
    makers = history.data.get("made_by", {})
    for kind, made_by in makers.items():
        maker = made_by.get("codec") or made_by.get("encoder") or {}
        known[f"{kind} made by"] = f"{maker.get('name', '?')} ({str(maker.get('sha256', '?'))[:12]})"
    parts = [facts_table({key: _plain(value) for key, value in known.items() if value is not None})]
    if makers:
        details = facts_table({key: _plain(value) for key, value in flattened(makers).items()})
        parts.append(f"<details><summary>How latents and embeddings were made</summary>{details}</details>")
    if history.mixture:
        rows = [
            [
                str(group["group"]),
                f"{group['samples']:,}",
                f"{group['share']:.1%}",
                f"{group['draws']:,}",
                f"{group['passes']:.3g}",
            ]
            for group in history.mixture
        ]
        titles = ("Group", "Samples", "Share", "Drawn in the whole run", "Passes")
        parts.append(f"<h3>Mixture</h3>{rows_table(titles, rows)}")
    return "".join(parts)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _dropped(dropped: Sequence[Mapping[str, Any]]) -> str:
    if not dropped:
        return ""
    titles = list(dropped[0])
    rows = [[str(each.get(title, "")) for title in titles] for each in dropped[:_DROPPED_SHOWN]]
    more = len(dropped) - len(rows)
    rest = f'<p class="soft">and {more:,} more in dropped.jsonl</p>' if more else ""
    return f"{rows_table([title.replace('_', ' ') for title in titles], rows)}{rest}"


def _environment(history: RunHistory) -> str:
    if not history.starts:
        return ""
    versions = flattened(history.starts[-1].versions)
    return facts_table({key: str(value) for key, value in versions.items()})
