"""Reports: figures one may quote, with everything that has to be known to compare them.

A report is data (JSON). The same content as Markdown, as a plot and as one HTML page stands beside it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pixcell.console import facts, table
from pixcell.errors import EvaluationError
from pixcell.evaluation.comparison import Measure, PairFigures

__all__ = ["MEANINGS", "Report", "SetFacts", "figure_text"]

_FORMAT = "pixcell-report"
_VERSION = 1
_ENOUGH = 100  # pictures: from here on, not being told from real ones says something for them

MEANINGS = {
    "frechet": "How far apart the two sets are in mean and covariance of their features. 0 is equal. It "
    "falls as pictures are added, so it compares only with figures of the same count and the same extractor.",
    "kernel": "How far apart the two sets are in all moments up to the third. Unbiased: about 0 (a little "
    "below, too) where the sets are alike, at any count.",
    "precision": "Share of synthetic pictures that lie among the real ones: do they look real?",
    "recall": "Share of real pictures that lie among the synthetic ones: is the variety of tissue there?",
    "pairs": "Cosine similarity of the features of a synthetic picture and of the real one that it was made "
    "after, beside that with the references of other pictures.",
    "floor": "The same figure between two halves of the real set: what a perfect generator would score. "
    "Compare it with the column 'at that count', not with the value from all pictures.",
}


@dataclass(frozen=True)
class SetFacts:
    """What one side of the comparison consisted of."""

    path: str
    kind: str
    num_found: int
    num_pictures: int
    num_fields: int
    sizes: Mapping[str, int]
    mpp: Sequence[float]
    num_marked_synthetic: int
    num_duplicates: int
    left_out: Sequence[str]


@dataclass(frozen=True)
class Report:
    """The outcome of an evaluation.

    Attributes:
        real: The real set.
        synthetic: The generated set.
        generator: What the generated pictures say about how they were made.
        extractor: The feature space: name, weights' checksum, resize rule.
        measures: Figures about the sets.
        pairs: Figures about pairs.
        settings: What decided the figures: seeds, counts, field size, unit of the split.
        warnings: What a reader has to know before quoting a figure.
        environment: Versions of software.
        created: When, UTC.
        files: Where the report and its companions are, when it was written or read.
    """

    real: SetFacts
    synthetic: SetFacts
    generator: Mapping[str, Any]
    extractor: Mapping[str, Any]
    measures: Sequence[Measure]
    pairs: PairFigures
    settings: Mapping[str, Any]
    warnings: Sequence[str]
    environment: Mapping[str, Any]
    created: str
    files: Sequence[str] = field(default=(), compare=False)

    def measure(self, name: str) -> Measure:
        """Return a measure by name: ``frechet``, ``kernel``, ``precision``, ``recall``."""
        return next(measure for measure in self.measures if measure.name == name)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values; :meth:`from_json` reads them back."""
        content = dataclasses.asdict(self)
        del content["files"]
        return {"format": _FORMAT, "version": _VERSION, "summary": self.summary, **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str = "the report") -> Self:
        """Rebuild a report.

        Raises:
            EvaluationError: If the content is not a report of this version.
        """
        if content.get("format") != _FORMAT or content.get("version") != _VERSION:
            raise EvaluationError(
                f"{source} is no report that this version of pixcell reads (it has format "
                f"{content.get('format')!r}, version {content.get('version')!r})."
            )
        try:
            values = {
                each.name: content[each.name] for each in dataclasses.fields(cls) if each.name != "files"
            }
            return cls(
                **values
                | {
                    "real": SetFacts(**values["real"]),
                    "synthetic": SetFacts(**values["synthetic"]),
                    "measures": [Measure(**measure) for measure in values["measures"]],
                    "pairs": PairFigures(**values["pairs"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{source} is damaged: {error!r}.") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a report from its JSON file.

        Raises:
            EvaluationError: If the file is not a report.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path} cannot be read as a report: {error}.") from error
        if not isinstance(content, dict):
            raise EvaluationError(f"{path} is not a report: it holds no JSON object.")
        return cls.from_json(content, str(path))

    @property
    def summary(self) -> str:
        """One or two sentences for people: how far from real, measured by what a perfect score would be."""
        space = self.extractor["name"]
        frechet, kernel = self.measure("frechet"), self.measure("kernel")
        if frechet.floor and frechet.matched is not None:
            times = frechet.matched / frechet.floor
            far = (
                "as near to the real ones as two halves of the real ones are to each other"
                if times < 1.1
                else f"{times:.3g} times as far from the real ones as their two halves are from each other"
            )
            text = (
                f"In the space of {space}, the synthetic pictures are {far} (Frechet distance, equal counts)."
            )
        elif kernel.floor is not None and kernel.floor_std is not None and kernel.matched is not None:
            limit = kernel.floor + 3 * max(kernel.floor_std, 1e-12)
            count = min(self.real.num_fields, self.synthetic.num_fields)
            if kernel.matched > limit:
                text = (
                    f"In the space of {space}, the synthetic pictures are told apart from real ones: "
                    f"kernel distance {figure_text(kernel.matched, kernel.matched_std)}, against "
                    f"{figure_text(kernel.floor, kernel.floor_std)} between halves of the real set."
                )
            elif count < _ENOUGH:
                # Of eight pictures, even noise is within what eight real ones differ by.
                text = (
                    f"In the space of {space}, {count} pictures are too few for the kernel distance to tell "
                    "synthetic from real ones, good or bad. Compare some hundreds."
                )
            else:
                text = (
                    f"In the space of {space}, the kernel distance does not tell these synthetic pictures "
                    "from real ones at this count."
                )
        else:
            text = f"In the space of {space}, there are too few pictures to judge a distance."
        if self.pairs.nearest_share is not None:
            text += (
                f" {self.pairs.nearest_share:.0%} of the pictures are nearest to the reference that they "
                f"were made after (chance: {1 / self.pairs.num_references:.0%})."
            )
        return text

    def measure_rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return the table of measures as text: name, value, at the floor's count, floor, which is better."""
        return [
            (
                measure.title,
                figure_text(measure.value, measure.uncertainty),
                figure_text(measure.matched, measure.matched_std),
                figure_text(measure.floor, measure.floor_std),
                measure.better,
            )
            for measure in self.measures
        ]

    def protocol(self) -> dict[str, dict[str, str]]:
        """Return everything that decides the figures, in sections of plain text."""
        generator = {key: _plain(value) for key, value in self.generator.items()}
        return {
            "Real pictures": _set_text(self.real),
            "Synthetic pictures": _set_text(self.synthetic),
            "Generator (from the pictures' records)": generator
            or {"record": "none: the pictures say nothing"},
            "Extractor": {key: _plain(value) for key, value in self.extractor.items()},
            "Settings": {key: _plain(value) for key, value in self.settings.items()},
            "Software": {key: _plain(value) for key, value in self.environment.items()},
        }

    def markdown(self, plot: str | None = None) -> str:
        """Return the report as Markdown; ``plot`` is the file name of the picture to show."""
        lines = ["# Synthetic against real tissue", "", self.summary, ""]
        for warning in self.warnings:
            lines += [f"> **Note.** {warning}", ""]
        lines += ["| measure | value | at the floor's count | floor (real against real) | better |"]
        lines += ["|---|---|---|---|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in self.measure_rows()]
        lines += [""] + [
            f"- {measure.title}: {measure.reason}" for measure in self.measures if measure.reason
        ]
        lines += ["", "## Pairs", "", self.pairs_text(), ""]
        if plot:
            lines += [f"![Features, distances and pairs]({plot})", ""]
        lines += ["## What the figures mean", ""]
        lines += [f"- **{name}**: {meaning}" for name, meaning in MEANINGS.items()]
        for title, entries in self.protocol().items():
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {key} | {value.replace('|', '/')} |" for key, value in entries.items()]
        lines += [
            "",
            f"Made {self.created} by pixcell. Research use only; synthetic pictures are no patient's.",
        ]
        return "\n".join(lines) + "\n"

    def pairs_text(self) -> str:
        """Return what is known about pairs, in a sentence."""
        pairs = self.pairs
        if pairs.cosine_mean is None:
            return pairs.reason or "No pairs."
        text = (
            f"{pairs.num_pairs} pictures with {pairs.num_references} references (found by {pairs.found_by}): "
            f"cosine similarity {pairs.cosine_mean:.3f} ± {pairs.cosine_std or 0:.3f} (scatter over pairs)"
        )
        if pairs.mismatched_mean is not None and pairs.nearest_share is not None:
            text += (
                f"; with the references of others {pairs.mismatched_mean:.3f}; nearest to their own "
                f"reference {pairs.nearest_share:.0%} (chance {1 / pairs.num_references:.0%})"
            )
        return text + "."

    def __rich__(self) -> Group:
        """Show the figures in a terminal."""
        header = ("measure", "value", "at the floor's count", "floor (real/real)", "better")
        shown: list[Table | Text] = [table("Synthetic against real", header, self.measure_rows())]
        shown += [
            Text(f"{each.title}: {each.reason}", style="yellow") for each in self.measures if each.reason
        ]
        shown.append(
            facts(
                "",
                {
                    "pictures": f"{self.real.num_pictures} real, {self.synthetic.num_pictures} synthetic",
                    "extractor": self.extractor["name"],
                    "pairs": self.pairs_text(),
                    "written": ", ".join(self.files) or "nowhere",
                },
            )
        )
        shown += [Text(f"Note: {warning}", style="yellow") for warning in self.warnings]
        shown.append(Text(self.summary, style="bold"))
        return Group(*shown)


def figure_text(value: float | None, uncertainty: float | None = None) -> str:
    """Write a figure with as many digits as its uncertainty leaves: two of that.

    Examples:
        >>> figure_text(12.3456, 0.21), figure_text(0.01234), figure_text(None)
        ('12.35 ± 0.21', '0.0123', '–')
    """
    if value is None:
        return "–"
    if uncertainty is None:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if not uncertainty:
        return f"{value:.3g} ± 0"
    digits = max(0, 1 - math.floor(math.log10(uncertainty)))
    return f"{value:.{digits}f} ± {uncertainty:.{digits}f}"


def _set_text(side: SetFacts) -> dict[str, str]:
    chosen = "" if side.num_found == side.num_pictures else f" of {side.num_found}, drawn at random"
    rows = {
        "folder" if side.kind == "folder" else "store": side.path,
        "pictures": f"{side.num_pictures}{chosen}",
        "fields": str(side.num_fields),
        "sizes": ", ".join(f"{size} px ({count})" for size, count in side.sizes.items()),
        "microns per pixel": ", ".join(f"{mpp:g}" for mpp in side.mpp) or "not stated",
        "marked as synthetic": str(side.num_marked_synthetic),
        "duplicates": str(side.num_duplicates),
    }
    if side.left_out:
        rows["left out"] = ", ".join(side.left_out)
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(each) for each in value)
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
