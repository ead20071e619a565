"""How good a run became: every checkpoint it keeps, measured on tissue that it was not trained on.

    RUN/evaluations/references/          fields of the store that are imitated (real tissue)
    RUN/evaluations/step-…/              what a checkpoint makes of them
    RUN/evaluations/step-….json          the report of that checkpoint (.md, .html, .png beside it)
    RUN/evaluations/course.png           distances over the steps, beside their floors
    RUN/evaluations/sheet.png            the same fields, seen through one checkpoint after the other

Every checkpoint gets the same references, noise and settings, so what changes from one to the next is the
model. Checkpoints that were measured before, with the same settings, are not measured again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from pixcell.console import console, table
from pixcell.data.datasets import FieldDataset
from pixcell.data.slides import find_slides
from pixcell.data.store import TileStore
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.errors import EvaluationError, RunError
from pixcell.evaluation.features import Extractor, load_extractor
from pixcell.evaluation.plots import draw_course
from pixcell.evaluation.report import Report
from pixcell.files import sha256_of, write_json, write_whole, writing_to
from pixcell.provenance import save_synthetic_png
from pixcell.tasks.evaluate import evaluate
from pixcell.tasks.sample import sample
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.objectives import spread_over
from pixcell.training.previews import picture_rows

__all__ = ["Course", "follow", "is_run"]

_ON_SHEET = 8


@dataclass(frozen=True)
class Course:
    """The reports of a run's checkpoints, in the order of their steps."""

    run: Path
    reports: Mapping[int, Report]
    plot: Path
    sheet: Path

    def __rich__(self) -> Table:
        """Lay the figures out for a terminal, each beside its floor at the same count."""
        rows = []
        for step, report in self.reports.items():
            cells = [f"{step}"]
            for measure in report.measures:
                value = "-" if measure.matched is None else f"{measure.matched:.3g}"
                floor = "" if measure.floor is None else f" ({measure.floor:.3g})"
                cells.append(value + floor)
            own, others = report.pairs.cosine_mean, report.pairs.mismatched_mean
            cells.append("-" if own is None or others is None else f"{own:.2f} ({others:.2f})")
            rows.append(cells)
        names = [measure.name for measure in next(iter(self.reports.values())).measures]
        return table(
            f"{self.run}: distances over its checkpoints (in brackets: real against real; other pairs)",
            ["step", *names, "pairs"],
            rows,
        )


def is_run(place: Path) -> bool:
    """Say whether a folder is a training run."""
    return (place / "recipe.yaml").is_file() and (place / "checkpoints").is_dir()


def follow(
    store: Path,
    run: Path,
    *,
    extractor: str | Extractor = "stain-texture",
    extractor_weights: Path | None = None,
    where: Mapping[str, Sequence[str]] | None = None,
    count: int = 256,
    num_references: int = 64,
    max_images: int | None = None,
    steps: int = 20,
    guidance_scale: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "auto",
    kernel_subset_size: int = 1000,
    kernel_subsets: int = 100,
    encoder_weights: Path | None = None,
    download: bool = False,
    out: Path | None = None,
) -> Course:
    """Sample every checkpoint of a run after held-out fields, and measure the pictures.

    Args:
        store: Tiles at the run's resolution. Fields are cut from them at the size of the model's pictures.
        run: The run folder; its checkpoints are those that its recipe kept.
        extractor: The feature space, as for :func:`~pixcell.tasks.evaluate.evaluate`.
        extractor_weights: Its weights on disk.
        where: Which tiles were held out, such as ``{"split": ["test"]}``. None: all of the store, which is
            right only if the run was trained on none of it.
        count: Pictures of each checkpoint; references take turns.
        num_references: Fields that are imitated, evenly spread over the chosen tiles.
        max_images: Compare with at most so many tiles of the store, drawn at random, and use at most so many
            pictures. None: all.
        steps: Of the sampler.
        guidance_scale: None: the model's own.
        seed: Of the noise: the same for every checkpoint.
        batch_size: Pictures at a time; does not change them.
        device: Where the networks run.
        kernel_subset_size: See :func:`~pixcell.tasks.evaluate.evaluate`.
        kernel_subsets: See there.
        encoder_weights: Weight file of the run's encoder.
        download: Whether encoder weights may be downloaded.
        out: The folder of the reports. None: ``evaluations`` in the run.

    Raises:
        RunError: If the run has no checkpoint, or one is damaged.
        EvaluationError: If numbers make no sense, or the store has fewer fields than are to be imitated.
        StoreError: If the store cannot be read, or no tile is such.
        OutputError: If results cannot be written.
    """
    for name, number, least in (
        ("count", count, 2),
        ("num_references", num_references, 2),
        ("max_images", 2 if max_images is None else max_images, 2),
        ("seed", seed, 0),
    ):
        if number < least:
            raise EvaluationError(f"{name} must be at least {least}, not {number}.")
    checkpoints = _checkpoints(run)
    out = out or run / "evaluations"
    size, mpp = _size_of(checkpoints[-1])
    fields = FieldDataset(TileStore.open(store), size=size, images=True, where=where or {})
    if mpp is not None and fields.mpp != mpp:
        raise EvaluationError(
            f"{run} makes pictures at {mpp} microns per pixel, {store} holds tiles at {fields.mpp}. "
            "Tile the slides at the resolution of the run."
        )
    chosen = spread_over(num_references, len(fields))
    if len(chosen) < num_references:
        raise EvaluationError(
            f"{store} has {len(fields)} such field(s) of {size} px, too few to imitate {num_references} of "
            "them (at most every second one): lower num_references, or choose more tiles."
        )
    references = out / "references"
    digest = _write_references(fields, chosen, references)
    settings = {
        "count": count, "num_references": num_references, "max_images": max_images, "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed, "where": where, "store": str(store.resolve()), "fields": len(fields),
        "references": digest, "extractor": _name(extractor),
        "extractor_weights": _digest_of(extractor_weights), "encoder_weights": _digest_of(encoder_weights),
        "kernel_subset_size": kernel_subset_size, "kernel_subsets": kernel_subsets,
    }  # fmt: skip
    space = _Remembering(
        load_extractor(extractor, extractor_weights, device=device, download=download)
        if isinstance(extractor, str)
        else extractor
    )
    reports: dict[int, Report] = {}
    for place, checkpoint in enumerate(checkpoints):
        path = out / f"{checkpoint.path.name}.json"
        done = _done(path, {**settings, "checkpoint": _digest(checkpoint)})
        if done is None:
            console.print(
                f"step {checkpoint.step} ({place + 1} of {len(checkpoints)} checkpoints)", markup=False
            )
            # Of an earlier measurement, which is overwritten from here on: if this one is cut short, what
            # then lies here belongs to neither.
            _settings_of(path).unlink(missing_ok=True)
            pictures = out / checkpoint.path.name
            sample(
                checkpoint.path, pictures, like=[references], count=count, seed=seed, steps=steps,
                guidance_scale=guidance_scale, batch_size=batch_size, source_mpp=mpp, device=device,
                encoder_weights=encoder_weights, download=download, overwrite=True,
            )  # fmt: skip
            done = evaluate(
                store, pictures, extractor=space, out=path, where=where,
                references=references, field_size=size, max_images=max_images, device=device,
                seed=seed, kernel_subset_size=kernel_subset_size, kernel_subsets=kernel_subsets,
                download=download,
            )  # fmt: skip
            write_json(_settings_of(path), {**settings, "checkpoint": _digest(checkpoint)})
        reports[checkpoint.step] = done
    course = Course(run, reports, out / "course.png", out / "sheet.png")
    with write_whole(course.plot) as temporary:
        temporary.write_bytes(draw_course(reports))
    _write_sheet(course, references, count, out)
    return course


class _Remembering:
    """A feature space that looks at a field once: the real ones come again with every checkpoint."""

    def __init__(self, space: Extractor) -> None:
        self.name, self.dim, self._space = space.name, space.dim, space
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        keys = [
            hashlib.sha256(f"{tuple(one.shape)}".encode() + one.numpy().tobytes()).digest() for one in images
        ]
        new = [place for place, key in enumerate(keys) if key not in self._known]
        if new:
            for place, vector in zip(new, self._space(images[new]), strict=True):
                self._known[keys[place]] = vector
        return torch.stack([self._known[key] for key in keys])

    def describe(self) -> dict[str, Any]:
        return self._space.describe()


def _checkpoints(run: Path) -> list[Checkpoint]:
    found = [Checkpoint.open(path) for path in sorted((run / "checkpoints").glob("step-*"))]
    if not found:
        raise RunError(f"{run} holds no checkpoint yet; `pixcell train` writes them.")
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _size_of(checkpoint: Checkpoint) -> tuple[int, float | None]:
    """Side of the model's pictures, and their resolution."""
    if not (checkpoint.pipeline / "transformer").is_dir():
        raise EvaluationError(
            f"{checkpoint.path} holds no denoiser: only runs that generate pictures can be followed."
        )
    pipeline = PixCellPipeline.from_pretrained(checkpoint.pipeline)
    return pipeline.sample_size, pipeline.facts.get("mpp")


def _write_references(fields: FieldDataset, chosen: Sequence[int], folder: Path) -> str:
    """Save the fields as PNG, under names that tell where they are from; remove those of other choices.

    Returns:
        A checksum of their names and pixels: a store may be tiled anew under the same names.
    """
    wanted = {f"{fields.key(index).replace('/', '_')}.png": index for index in chosen}
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.png"):
            if path.name not in wanted:
                path.unlink()
    digest = hashlib.sha256()
    for name, index in wanted.items():
        image = np.ascontiguousarray(fields[index]["image"].permute(1, 2, 0).numpy())
        digest.update(name.encode() + image.tobytes())
        with write_whole(folder / name) as temporary:
            Image.fromarray(image).save(temporary, format="PNG")
    return digest.hexdigest()


def _done(path: Path, settings: Mapping[str, Any]) -> Report | None:
    """The report of an earlier call, if it was made with the same settings from the same weights."""
    if not (path.is_file() and _settings_of(path).is_file()):
        return None
    try:
        before = json.loads(_settings_of(path).read_text(encoding="utf-8"))
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # damaged: measured anew
    if before != json.loads(json.dumps(settings)):
        return None
    return Report.from_json(report, str(path))


def _settings_of(report: Path) -> Path:
    return report.with_name(f".{report.stem}.settings")


def _digest(checkpoint: Checkpoint) -> str:
    """Checksums of everything a picture depends on."""
    files = checkpoint.facts["files"]
    return json.dumps({name: files[name] for name in sorted(files) if name.startswith("pipeline/")})


def _digest_of(weights: Path | None) -> str | None:
    return None if weights is None or not weights.is_file() else sha256_of(weights)


def _name(extractor: str | Extractor) -> str:
    return extractor if isinstance(extractor, str) else json.dumps(extractor.describe(), sort_keys=True)


def _write_sheet(course: Course, references: Path, count: int, out: Path) -> None:
    """Real fields on top, below them one row a checkpoint."""
    # In the order in which ``sample`` lets them take turns; with few pictures not all of them had one.
    real = find_slides(references)[:count]
    shown = [len(real) * place // _ON_SHEET for place in range(min(_ON_SHEET, len(real)))]
    rows = {"real, held out": [_pixels(real[index]) for index in shown]}
    for step in course.reports:
        made = {
            int(path.name.split("_")[0]): path for path in (out / f"step-{step:08d}").glob("[0-9]*_*.png")
        }
        rows[f"step {step}"] = [_pixels(made[index]) for index in shown]
    record = {"contact_sheet": True, "run": course.run.name, "note": "the first row is real tissue"}
    save_synthetic_png(course.sheet, picture_rows(rows), record)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
