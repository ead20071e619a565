"""Generate pictures of tissue, each with its record, and a contact sheet of them.

    OUT/00000_<reference>.png ...   8-bit RGB; in its metadata: that it is synthetic, and how to make it again
                                    (00000_prior.png where its condition was drawn from a prior)
    OUT/contact_sheet.png           references, framed, beside what was made after them
    OUT/samples.json                all records in one file

Picture number *i* takes reference ``i % number of references``, or draw ``(seed, i)`` of the prior, and the
noise of ``(seed, i)``. So a larger ``count`` is a continuation: the first 16 of 100 are the 16 of 16. A run
that was stopped goes on.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import nn

from pixcell.console import facts, progress
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import (
    check_steps,
    generator_for,
    make_scheduler,
    scheduler_settings,
    target_of,
)
from pixcell.errors import OutputError, RecipeError
from pixcell.files import write_json, writing_to
from pixcell.models.weights import Precision, choose_device, dtype_of, weights_sha256
from pixcell.provenance import environment, hash_of, read_provenance, save_synthetic_png
from pixcell.tasks.contact_sheet import SheetRow, draw_contact_sheet
from pixcell.tasks.references import (
    SHEET_NAME,
    Draws,
    Reference,
    draws_from,
    encoder_of,
    pictures_in,
    read_reference,
)
from pixcell.training.checkpoints import Checkpoint

__all__ = ["SampleResult", "sample"]

_STEPS = 20
_NAME = re.compile(r"\d{5,}_.*\.png")
_OF_ONE_PICTURE = {"index", "like", "like_sha256", "like_resolution", "embedding_hash"}
"""Entries of a record that belong to one picture; the others are the recipe, the same for all."""
_NOT_COMPARED = {"versions", "synthetic"}
_SHEET_PICTURES = 64
_MOST_PICTURES = 1_000_000
"""The plan of all of them is held in memory."""


@dataclass(frozen=True)
class SampleResult:
    """What a call made."""

    out: Path
    model: str
    step: int | None
    num_made: int
    num_kept: int
    """Pictures that were there already, with the same record."""
    references: tuple[str, ...]
    contact_sheet: Path
    seconds: float
    prior: str | None = None
    """What conditions were drawn from."""

    def __rich__(self) -> Table:
        """Lay the result out for a terminal."""
        rate = f", {self.seconds / self.num_made:.2f} s each" if self.num_made else ""
        return facts(
            f"Samples in {self.out}",
            {
                "model": self.model if self.step is None else f"{self.model}, step {self.step}",
                "pictures": f"{self.num_made} made{rate}; {self.num_kept} were there",
                "like": ", ".join(self.references) or self.prior or "nothing (unconditional)",
                "contact sheet": self.contact_sheet,
            },
        )


@dataclass(frozen=True)
class _Picture:
    """One picture of the plan."""

    index: int
    path: Path
    reference: Reference | None
    record: Mapping[str, Any]


def sample(
    model: Path | str,
    out: Path,
    *,
    like: Sequence[Path] = (),
    prior: Path | None = None,
    label: str | None = None,
    temperature: float = 1.0,
    unconditional: bool = False,
    count: int = 16,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 8,
    scheduler: str | None = None,
    device: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    source_mpp: float | None = None,
    encoder: str | None = None,
    encoder_weights: Path | None = None,
    download: bool = False,
    overwrite: bool = False,
) -> SampleResult:
    """Generate pictures.

    Args:
        model: A run (its last checkpoint), a checkpoint, or a pipeline folder.
        out: Where pictures go. Pictures of the same recipe that are there already are kept.
        like: Pictures, or folders of them, whose tissue to imitate: the centre of each is encoded.
        prior: Folder that ``pixcell prior`` wrote: each picture gets an embedding of its own, drawn from it.
        label: Which of the prior's labels to draw. None: any, as often as it was seen.
        temperature: How far draws lie from the centres of the prior: 1 as measured, 0 not at all.
        unconditional: Imitate nothing.
        count: Number of pictures in all; references take turns.
        seed: Same seed, same pictures.
        steps: Of the sampler. None: 20.
        guidance_scale: s in u + s (c - u); 1 is none. None: the model's, else 2.0 (1.2 from 4 x 4 fields).
        batch_size: Pictures that are worked on together; they do not depend on it.
        scheduler: One of :data:`~pixcell.diffusion.sampling.SCHEDULERS`. None: the model's own.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        precision: Of the denoiser. "auto": bf16 on CUDA, else fp32.
        source_mpp: Microns per pixel of the references, where they do not state it.
        encoder: Where the model's encoder is, if not under the name it was trained with; with ``prior``, its
            name, if the model does not tell.
        encoder_weights: Weight file of the encoder.
        download: Whether encoder weights may be downloaded.
        overwrite: Replace generated pictures of another recipe in ``out``.

    Raises:
        RecipeError: If numbers make no sense, or not exactly one of ``like``, ``prior`` and ``unconditional``
            is given.
        RunError: If there is no checkpoint; MissingWeights, WrongWeights, ModelError: if it cannot be used.
        UnreadableSlide: If a reference is no image; SlideError: if it is smaller than the model's pictures.
        OutputError: If ``out`` holds pictures of another recipe, or cannot be written.
    """
    started = time.monotonic()
    _check_arguments(like, prior, label, unconditional, count, seed, guidance_scale, batch_size)
    out = Path(out)
    folder, name, step = _find_model(Path(model))
    pipeline = PixCellPipeline.from_pretrained(folder)
    if scheduler is not None:
        pipeline.scheduler = make_scheduler(scheduler, target_of(pipeline.scheduler))
    steps = _STEPS if steps is None else steps
    check_steps(steps, pipeline.scheduler)
    chosen_device = choose_device(device)
    if precision == "auto":
        precision = "bf16" if chosen_device.type == "cuda" else "fp32"
    dtype = dtype_of(precision)
    model_sha256 = weights_sha256(pipeline.transformer)
    codec_sha256 = pipeline.codec.sha256

    references: list[Reference] = []
    draws: Draws | None = None
    own_encoder: dict[str, Any] | None = None
    if prior is not None:
        draws = draws_from(Path(prior), pipeline, seed, label, temperature, encoder)
        own_encoder = {key: draws.prior.facts["encoder"][key] for key in ("name", "sha256")}
    elif not unconditional:
        loaded = encoder_of(pipeline, encoder, encoder_weights, download, chosen_device)
        own_encoder = {"name": loaded.name, "sha256": loaded.sha256}
        references = [read_reference(path, pipeline, loaded, source_mpp) for path in pictures_in(like)]
    if guidance_scale is None:
        guidance_scale = pipeline.usual_guidance_scale
    fixed_batch = _fixed_batch(pipeline, chosen_device)
    recipe = {
        "model": name,
        "model_sha256": model_sha256,
        "step": step,
        "codec_sha256": codec_sha256,
        "encoder": own_encoder,
        "prior": None if draws is None else draws.record,
        "seed": seed,
        "steps": steps,
        "guidance_scale": None if unconditional else float(guidance_scale),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_settings": scheduler_settings(pipeline.scheduler),
        "size": pipeline.sample_size,
        "mpp": pipeline.facts.get("mpp"),
        "device": chosen_device.type,
        "precision": precision,
        "fixed_batch": fixed_batch,
        "versions": environment(),
    }
    plan = _plan(out, count, references, recipe)
    kept = _settle(out, plan, recipe, overwrite)

    # diffusers' own ``to`` warns at every cast, even where no module asks to stay in float32.
    nn.Module.to(pipeline.transformer, device=chosen_device, dtype=dtype)
    nn.Module.to(pipeline.vae, device=chosen_device)
    pipeline.set_progress_bar_config(disable=True)
    with progress("sampling", len(plan)) as advance:
        advance(len(kept))
        for batch in _batches(plan, kept, fixed_batch, batch_size):
            pictures = _sampled(pipeline, batch, draws, seed, steps, float(guidance_scale), fixed_batch)
            for picture, pixels in zip(batch, pictures, strict=True):
                if picture.index not in kept:
                    save_synthetic_png(picture.path, pixels, picture.record)
                    advance(1)
    sheet = _write_sheet(out, plan, references, recipe, "unconditional" if draws is None else str(draws))
    write_json(
        out / "samples.json",
        {
            "recipe": recipe,
            "pictures": [
                {"file": each.path.name, **{key: each.record[key] for key in sorted(_OF_ONE_PICTURE)}}
                for each in plan
            ],
        },
    )
    return SampleResult(
        out=out,
        model=name,
        step=step,
        num_made=len(plan) - len(kept),
        num_kept=len(kept),
        references=tuple(reference.name for reference in references),
        contact_sheet=sheet,
        seconds=time.monotonic() - started,
        prior=None if draws is None else str(draws),
    )


def _check_arguments(
    like: Sequence[Path],
    prior: Path | None,
    label: str | None,
    unconditional: bool,
    count: int,
    seed: int,
    guidance_scale: float | None,
    batch_size: int,
) -> None:
    given = [
        name
        for name, there in (
            ("--like", like),
            ("--prior", prior is not None),
            ("--unconditional", unconditional),
        )
        if there
    ]
    if not given:
        raise RecipeError(
            "there is nothing to imitate. Give a picture with --like, draw from a --prior, or sample "
            "with --unconditional."
        )
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)} contradict each other; leave all but one out.")
    if label is not None and prior is None:
        raise RecipeError(f"--label {label} is one of a prior's labels; give the prior with --prior.")
    for what, value, least in (("--count", count, 1), ("--batch-size", batch_size, 1), ("--seed", seed, 0)):
        if value < least:
            raise RecipeError(f"{what} {value} must be at least {least}.")
    if count > _MOST_PICTURES:
        raise RecipeError(
            f"--count {count} is more than the {_MOST_PICTURES} that one folder takes. "
            "Sample several folders, each with its own --seed."
        )
    if guidance_scale is not None and not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise RecipeError(f"--guidance {guidance_scale} must be 0 or more (1 is no guidance, 2 is usual).")


def _find_model(place: Path) -> tuple[Path, str, int | None]:
    """Return the pipeline folder, what the model is called, and its step if it is known."""
    if (place / "model_index.json").is_file():
        if place.name != "pipeline" or not (place.parent / "checkpoint.json").is_file():
            return place, place.resolve().name, None
        place = place.parent
    checkpoint = Checkpoint.find(place)
    checkpoint.verify("pipeline")  # changed weights would make other pictures, and say nothing
    resolved = checkpoint.path.resolve()
    run = resolved.parent.parent if resolved.parent.name == "checkpoints" else resolved
    return checkpoint.pipeline, run.name, checkpoint.step


def _fixed_batch(pipeline: PixCellPipeline, device: torch.device) -> int:
    """Return how many pictures the network sees at once: never a matter of ``batch_size``.

    On a CPU one: cores work on different pictures. On an accelerator enough for about 4096 image tokens.
    """
    if device.type == "cpu":
        return 1
    config = pipeline.transformer.config
    return max(1, 4096 // (config.sample_size // config.patch_size) ** 2)


def _plan(
    out: Path, count: int, references: Sequence[Reference], recipe: Mapping[str, Any]
) -> list[_Picture]:
    plan = []
    otherwise = "unconditional" if recipe["prior"] is None else "prior"
    for index in range(count):
        reference = references[index % len(references)] if references else None
        stem = Path(reference.name).stem if reference else otherwise
        record = {
            **recipe,
            "index": index,
            "like": reference.name if reference else None,
            "like_sha256": reference.sha256 if reference else None,
            "like_resolution": reference.resolution if reference else None,
            "embedding_hash": hash_of(reference.embedding_grid.numpy()) if reference else None,
        }
        plan.append(_Picture(index, out / f"{index:05d}_{stem}.png", reference, record))
    return plan


def _settle(out: Path, plan: Sequence[_Picture], recipe: Mapping[str, Any], overwrite: bool) -> set[int]:
    """Look at what is in the folder; return the indices of pictures that are there already.

    Raises:
        OutputError: If generated pictures of another recipe are there, and may not be replaced.
    """
    planned = {picture.path.name: picture for picture in plan}
    kept, foreign = set(), []
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        present = sorted(path for path in out.iterdir() if _NAME.fullmatch(path.name))
    for path in present:
        record = read_provenance(path)
        picture = planned.get(path.name)
        differing = _differing(record, picture.record if picture else recipe, whole=picture is not None)
        if differing:
            foreign.append((path, record, differing))
        elif picture is not None:
            kept.add(picture.index)
    if foreign and not overwrite:
        path, _, differing = foreign[0]
        raise OutputError(
            f"{out} holds {len(foreign)} picture(s) of another recipe: {path.name} differs in {differing}. "
            "Choose another --out, or replace them with --overwrite."
        )
    for path, record, _ in foreign:
        if record is None:
            raise OutputError(
                f"{path} was not generated by pixcell and will not be replaced; choose another --out."
            )
        with writing_to(path):
            path.unlink()
    return kept


def _differing(record: Mapping[str, Any] | None, wanted: Mapping[str, Any], whole: bool) -> str:
    """Name the first entry in which a picture's record is not the wanted one; empty: none."""
    if record is None:
        return "everything (it has no record)"
    ignored = _NOT_COMPARED if whole else _NOT_COMPARED | _OF_ONE_PICTURE
    for key in sorted((set(record) | set(wanted)) - ignored):
        if record.get(key) != wanted.get(key):
            return f"{key} ({record.get(key)!r} instead of {wanted.get(key)!r})"
    return ""


def _batches(
    plan: Sequence[_Picture], kept: set[int], fixed_batch: int, batch_size: int
) -> Iterator[list[_Picture]]:
    """Yield what to work on together.

    Picture *i* is always row ``i % fixed_batch`` of what the network sees, whatever is there already: so a
    group with one missing picture is computed whole.
    """
    groups = [plan[start : start + fixed_batch] for start in range(0, len(plan), fixed_batch)]
    wanted = [group for group in groups if any(picture.index not in kept for picture in group)]
    at_once = max(1, batch_size // fixed_batch)
    for start in range(0, len(wanted), at_once):
        yield [picture for group in wanted[start : start + at_once] for picture in group]


def _sampled(
    pipeline: PixCellPipeline,
    batch: Sequence[_Picture],
    draws: Draws | None,
    seed: int,
    steps: int,
    guidance_scale: float,
    fixed_batch: int,
) -> list[np.ndarray]:
    grids = [picture.reference.embedding_grid for picture in batch if picture.reference is not None]
    conditions = Conditioning(torch.stack(grids)) if grids else Conditioning()
    if draws is not None:
        conditions = draws.of([picture.index for picture in batch])
    (images,) = pipeline(
        conditions,
        num_images_per_embedding=len(batch) if conditions.is_empty else 1,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[generator_for(seed, picture.index) for picture in batch],
        fixed_batch=fixed_batch,
        return_dict=False,
    )
    return [np.asarray(image) for image in images]


def _write_sheet(
    out: Path,
    plan: Sequence[_Picture],
    references: Sequence[Reference],
    recipe: Mapping[str, Any],
    otherwise: str,
) -> Path:
    """Draw the first pictures beside their references, from the files as they are.

    Pictures without a reference are called what ``otherwise`` says.
    """
    shown = plan[:_SHEET_PICTURES]
    rows = []
    everyone: Sequence[Reference | None] = references or [None]
    for reference in everyone:
        pictures = [picture for picture in shown if picture.reference is reference]
        if pictures:
            rows.append(
                SheetRow(
                    name=reference.name if reference else otherwise,
                    reference=reference.pixels if reference else None,
                    pictures=[_pixels(picture.path) for picture in pictures],
                    labels=[f"{picture.index:05d}" for picture in pictures],
                )
            )
    more = f", the first {len(shown)} of {len(plan)}" if len(shown) < len(plan) else ""
    step = "" if recipe["step"] is None else f" step {recipe['step']}"
    guidance = (
        "unconditional" if recipe["guidance_scale"] is None else f"guidance {recipe['guidance_scale']:g}"
    )
    how = f"seed {recipe['seed']}, {recipe['steps']} steps, {guidance}"
    if recipe["prior"] is not None:
        how += f", {otherwise}"
    title = f"Synthetic tissue{more}: {recipe['model']}{step}, {how}"
    path = out / SHEET_NAME
    sheet = draw_contact_sheet(title, rows)
    save_synthetic_png(path, np.asarray(sheet), {"contact_sheet": True, **recipe})
    return path


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
