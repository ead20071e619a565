"""``pixcell tile``: cut slides, or folders of ready-made images, into a tile store."""

import csv
import io
import logging
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from pixcell.config import save_recipe
from pixcell.console import progress, table
from pixcell.data.metadata import Row, match_rows, read_metadata
from pixcell.data.qc import draw_examples, draw_overlay, save_overlay
from pixcell.data.ready_made import ImageCutter, ReadyMade
from pixcell.data.slides import Slide, find_slides
from pixcell.data.store import TileStore
from pixcell.data.tiling import VERDICTS, SlideCutter, TilingConfig, TilingRecipe
from pixcell.errors import CorruptShard, MetadataError, OutputError, SlideError, SomeFailed, StoreMismatch
from pixcell.files import write_text
from pixcell.parallel import Failed, default_workers, map_slides

__all__ = ["SlideSummary", "TilingResult", "tile_slides"]

logger = logging.getLogger(__name__)

Status = Literal["tiled", "was there", "failed"]


@dataclass(frozen=True)
class SlideSummary:
    """A line of the summary table."""

    slide: str
    source: str
    status: Status
    counts: Mapping[str, int] = field(default_factory=dict)
    """Candidates per verdict; ``kept`` is the number of tiles."""
    mpp: float | None = None
    """Of level 0."""
    tissue_mm2: float | None = None
    reason: str = ""

    @property
    def num_tiles(self) -> int:
        """Tiles in the store."""
        return self.counts.get("kept", 0)


@dataclass(frozen=True)
class TilingResult:
    """What a tiling run did."""

    store: Path
    slides: list[SlideSummary]
    """One per slide of this run, sorted."""

    @property
    def num_tiles(self) -> int:
        """Tiles of the slides of this run, new or there before."""
        return sum(slide.num_tiles for slide in self.slides)

    def __rich__(self) -> RenderableType:
        """Show the table and where to look on."""
        rows = [
            [each.slide, each.status, each.num_tiles, *(each.counts.get(key, 0) for key in VERDICTS[1:])]
            for each in self.slides
        ]
        title = f"{self.num_tiles} tiles of {len(self.slides)} slides in {self.store}"
        columns = ["slide", "status", "tiles", *VERDICTS[1:]]
        note = Text(
            f"Pictures: {self.store / 'qc'}   Table: {self.store / 'reports' / 'tiling.csv'}", style="dim"
        )
        return Group(table(title, columns, rows), note)


@dataclass(frozen=True)
class _Job:
    """One shard to make. Travels to a worker process."""

    slide_id: str
    store: Path
    config: TilingConfig
    threads: int
    path: Path
    source_mpp: float | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    images: tuple[ReadyMade, ...] = ()


def tile_slides(
    slides: Path,
    store: Path,
    recipe: TilingRecipe,
    *,
    metadata: Path | None = None,
    source_mpp: float | None = None,
    ready_made: bool = False,
    workers: int | None = None,
    engine: Literal["processes", "ray"] = "processes",
) -> TilingResult:
    """Cut slides into tiles of tissue.

    Finished slides are skipped, so the same command goes on where it was stopped. Slides that fail are listed
    in ``STORE/reports/tiling-failures.csv``; the others are finished first. ``STORE/qc`` holds a picture per
    slide, ``STORE/reports/tiling.csv`` a line.

    Args:
        slides: A slide, or a folder of slides (or of images, with ``ready_made``).
        store: Where the tile store is or shall be.
        recipe: How to cut.
        metadata: CSV with a row per slide: column ``slide``, and optionally ``mpp``, ``organ``, ``stain``,
            ``label``, ``split`` or any other. With ``ready_made`` a row per image: column ``image``, and
            optionally ``slide``, the name of the shard it goes to.
        source_mpp: Microns per pixel of all slides, for files that do not state it or state it wrongly. A
            value in ``metadata`` goes before it.
        ready_made: Whether ``slides`` is a folder of images that were cut before.
        workers: Processors to use; all by default.
        engine: ``"ray"`` spreads slides over a Ray cluster.

    Raises:
        SomeFailed: If some slides failed; everything else is in the store.
        StoreMismatch: If the store holds tiles that were cut in another way.
        MetadataError: If the CSV is wrong.
        SlideError: If ``source_mpp`` is no positive number.
        UnreadableSlide: If there is no slide at all.
        OutputError: If the store cannot be written.
    """
    if source_mpp is not None and not (math.isfinite(source_mpp) and source_mpp > 0):
        raise SlideError(f"--source-mpp {source_mpp} is no positive number of microns per pixel.")
    slides, store = Path(slides), Path(store)
    workers = workers or default_workers()
    found = find_slides(slides)
    root = slides if slides.is_dir() and slides not in found else slides.parent
    if ready_made:
        jobs = _image_jobs(found, root, store, recipe.tiling, metadata, source_mpp)
    else:
        jobs = _slide_jobs(found, root, slides.is_dir(), store, recipe.tiling, metadata, source_mpp)
    tiles = TileStore.create(store, recipe.tiling.model_dump(mode="json"))
    if not ready_made:
        jobs = _renamed_as_stored(jobs, tiles)
    save_recipe(recipe, store / "reports" / "tiling-recipe.yaml")

    # Large slides first, so that the last ones to finish are small; and two threads per processor where
    # slides run side by side, so that a slide left over at the end still has them all.
    jobs = sorted(jobs, key=_weight, reverse=True)
    processes = min(workers, len(jobs))
    threads = max(1, min(workers, -(-2 * workers // processes)))
    jobs = [_with_threads(job, threads) for job in jobs]
    summaries = _run(jobs, processes, engine)

    _write_table(store / "reports" / "tiling.csv", _stored_summaries(tiles))
    failed = [each for each in summaries if each.status == "failed"]
    failures = store / "reports" / "tiling-failures.csv"
    if failed:
        _write_table(failures, failed)
        reasons = [(each.slide, each.reason) for each in failed]
        raise SomeFailed("slides", reasons, failures, TilingResult(store, summaries))
    failures.unlink(missing_ok=True)
    return TilingResult(store, summaries)


def _run(jobs: Sequence[_Job], processes: int, engine: Literal["processes", "ray"]) -> list[SlideSummary]:
    summaries = []
    results = map_slides(_tile, jobs, processes, engine)
    with progress("tiling slides", len(jobs)) as advance:
        for result in results:
            if isinstance(result, Failed):
                if isinstance(result.error, OutputError):
                    raise result.error  # no other slide could be written either
                job = result.item
                summary = SlideSummary(job.slide_id, _source_of(job), "failed", reason=result.reason)
                logger.warning("%s failed: %s", summary.slide, summary.reason)
            else:
                summary = result.value
            summaries.append(summary)
            advance(note=f"{summary.slide}: {summary.num_tiles} tiles")
    return sorted(summaries, key=lambda each: each.slide)


# ── one slide, in a worker ───────────────────────────────────────────────────────────────────────────


def _tile(job: _Job) -> SlideSummary:
    store = TileStore.open(job.store)
    return _tile_images(job, store) if job.images else _tile_slide(job, store)


def _tile_slide(job: _Job, store: TileStore) -> SlideSummary:
    if store.has("images", job.slide_id):
        with Slide.open(job.path, job.source_mpp) as slide:
            now = {"fingerprint": slide.fingerprint, "mpp": slide.mpp, "attributes": dict(job.attributes)}
        return _as_before(job, store, now)
    with SlideCutter(
        job.path, job.slide_id, job.config, job.source_mpp, job.attributes, job.threads
    ) as cutter:
        overview = job.store / "qc" / f"{job.slide_id}.jpg"
        facts = dict(cutter.facts)

        def tiles() -> Any:
            yield from cutter
            # Known only now, and written before the shard appears: a shard that exists is complete with its
            # picture and its counts.
            facts.update(cutter.facts)
            scale = cutter.slide.width / cutter.thumbnail.shape[1]
            picture = draw_overlay(
                cutter.thumbnail, cutter.tissue_map, cutter.candidates, scale, job.slide_id
            )
            save_overlay(overview, picture)
            if not cutter.counts["kept"]:
                raise cutter.no_tissue()

        store.write_images(job.slide_id, tiles(), facts)
    return _summary(job.slide_id, facts, "tiled")


def _tile_images(job: _Job, store: TileStore) -> SlideSummary:
    cutter = ImageCutter(job.images, job.slide_id, job.config, job.threads)
    fingerprint = cutter.fingerprint()
    if store.has("images", job.slide_id):
        return _as_before(job, store, {"fingerprint": fingerprint})
    facts = cutter.facts(fingerprint)

    def tiles() -> Any:
        yield from cutter
        facts.update(cutter.facts(fingerprint))
        save_overlay(
            job.store / "qc" / f"{job.slide_id}.jpg",
            draw_examples(cutter.examples, cutter.counts, job.slide_id),
        )
        if not cutter.counts["kept"]:
            raise cutter.no_tissue()

    store.write_images(job.slide_id, tiles(), facts)
    return _summary(job.slide_id, facts, "tiled")


def _as_before(job: _Job, store: TileStore, now: Mapping[str, Any]) -> SlideSummary:
    """Accept a finished slide, if it is the same one and is described in the same way."""
    with store.images(job.slide_id) as shard:
        stored = shard.slide
    for key, value in now.items():
        if stored.get(key) == value:
            continue
        if key == "fingerprint":
            what = "the images or their labels have changed" if job.images else "another slide has this name"
            raise StoreMismatch(
                f"{job.slide_id!r} is in the store already, but {what}. Rename it, or delete "
                f"{store.path / 'images' / (job.slide_id + '.h5')} and what was made from it."
            )
        raise StoreMismatch(
            f"{job.slide_id!r} was tiled with {key} {stored.get(key)}, now it has {value}. To tile it anew "
            f"delete {store.path / 'images' / (job.slide_id + '.h5')} and what was made from it."
        )
    return _summary(job.slide_id, stored, "was there")


def _summary(slide_id: str, facts: Mapping[str, Any], status: Status) -> SlideSummary:
    return SlideSummary(
        slide_id, facts["source"], status, facts["counts"], facts["mpp"], facts.get("tissue_mm2"),
        reason="; ".join(_place(place) for place in facts["unreadable"]),
    )  # fmt: skip


def _place(place: Mapping[str, Any]) -> str:
    where = place.get("name") or f"x={place['x']}, y={place['y']}"
    return f"left out {where}: {place['reason']}"


# ── what to do ───────────────────────────────────────────────────────────────────────────────────────


def _slide_jobs(
    found: Sequence[Path],
    root: Path,
    is_folder: bool,
    store: Path,
    config: TilingConfig,
    metadata: Path | None,
    source_mpp: float | None,
) -> list[_Job]:
    rows: dict[Path, Row] = {}
    if metadata is not None:
        # The table of a whole cohort may be used for one slide of it, not the other way round.
        rows = match_rows(metadata, read_metadata(metadata, "slide"), found, root, strict=is_folder)
        _warn_of_missing(metadata, len(found) - len(rows), "slides")
    jobs = []
    for path, slide_id in zip(found, _slide_ids(found, root), strict=True):
        row = rows.get(path, Row(0, ""))
        mpp = source_mpp if row.mpp is None else row.mpp
        jobs.append(_Job(slide_id, store, config, 1, path, mpp, dict(row.attributes or {})))
    return jobs


def _image_jobs(
    found: Sequence[Path],
    root: Path,
    store: Path,
    config: TilingConfig,
    metadata: Path | None,
    source_mpp: float | None,
) -> list[_Job]:
    rows: dict[Path, Row] = {}
    if metadata is not None:
        rows = match_rows(metadata, read_metadata(metadata, "image"), found, root, strict=True)
        _warn_of_missing(metadata, len(found) - len(rows), "images")
    groups: dict[str, list[ReadyMade]] = defaultdict(list)
    for path in found:
        row = rows.get(path, Row(0, ""))
        attributes = dict(row.attributes or {})
        folder = path.parent.relative_to(root).as_posix()
        group = attributes.pop("slide", root.resolve().name if folder == "." else folder.replace("/", "__"))
        mpp = source_mpp if row.mpp is None else row.mpp
        groups[_clean(group)].append(ReadyMade(path, path.relative_to(root).as_posix(), mpp, attributes))
    return [
        _Job(group, store, config, 1, root, images=tuple(sorted(images, key=lambda image: image.name)))
        for group, images in sorted(groups.items())
    ]


def _warn_of_missing(metadata: Path, number: int, things: str) -> None:
    if number:
        logger.warning("%d %s have no row in %s: they get no attributes.", number, things, metadata)


def _slide_ids(paths: Sequence[Path], root: Path) -> list[str]:
    """Name slides by their file names without ending; equal ones by as many parent folders as it takes.

    Two slides of one folder that differ only in their ending keep it.
    """

    def name(path: Path, parents: int, with_ending: bool) -> str:
        folders = path.relative_to(root).parts[:-1]
        # Without a slide's folder, its own name would still be that of the other.
        folders = folders[-parents:] if parents else ()
        stem = path.name if with_ending or path.is_dir() else path.stem
        return _clean("__".join([*folders, stem]))

    names = {path: name(path, 0, False) for path in paths}
    deepest = max((len(path.relative_to(root).parts) - 1 for path in paths), default=0)
    for with_ending in (False, True):
        for parents in range(0 if with_ending else 1, deepest + 1):
            same = _shared(names)
            if not same:
                return [names[path] for path in paths]
            # In the second round folders could not tell them apart, so start over with endings.
            names |= {path: name(path, parents, with_ending) for path in same}
    if same := _shared(names):
        listed = ", ".join(str(path) for path in same[:3])
        raise MetadataError(f"these slides cannot be told apart by name: {listed}. Rename one of them.")
    return [names[path] for path in paths]


def _shared(names: Mapping[Path, str]) -> list[Path]:
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path, name in names.items():
        # File systems that ignore case, or compose accents, would merge what differs only in that.
        by_name[unicodedata.normalize("NFC", name).casefold()].append(path)
    return [path for paths in by_name.values() if len(paths) > 1 for path in paths]


def _clean(name: str) -> str:
    """Replace what cannot stand in a file name; blanks and letters of any script stay."""
    printable = "".join(letter if letter.isprintable() else "_" for letter in name)
    return re.sub(r"^\.+", "_", printable.replace("/", "_").strip()) or "_"


def _renamed_as_stored(jobs: Sequence[_Job], store: TileStore) -> list[_Job]:
    """Give slides the ids they already have in the store.

    The id of a slide depends on its namesakes: cut alone it is ``a``, cut together with another ``a`` it is
    ``folder__a``. Neither may put it into the store twice.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for each in store.slide_ids():
        for start in (0, *(match.end() for match in re.finditer("(?<=__)", each))):
            by_stem[each[start:]].append(each)
    result = []
    for job in jobs:
        stem = _clean(job.path.name if job.path.is_dir() else job.path.stem)
        others = [each for each in by_stem.get(stem, ()) if each != job.slide_id]
        known = job.slide_id
        if others and not store.has("images", job.slide_id):
            fingerprint = _fingerprint(job)
            for other in others:
                with store.images(other) as shard:
                    if shard.slide.get("fingerprint") == fingerprint:
                        known = other
        result.append(_Job(**{**vars(job), "slide_id": known}))
    return result


def _fingerprint(job: _Job) -> str | None:
    try:
        with Slide.open(job.path, job.source_mpp) as slide:
            return slide.fingerprint
    except SlideError:
        return None  # the worker meets the same error, and reports it


def _with_threads(job: _Job, threads: int) -> _Job:
    return _Job(**{**vars(job), "threads": threads})


def _weight(job: _Job) -> int:
    files = [image.path for image in job.images] or [job.path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _source_of(job: _Job) -> str:
    return f"{len(job.images)} images" if job.images else str(job.path)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────


def _stored_summaries(store: TileStore) -> list[SlideSummary]:
    summaries = []
    for slide_id in store.slide_ids():
        try:
            with store.images(slide_id) as shard:
                summaries.append(_summary(slide_id, shard.slide, "tiled"))
        except CorruptShard as error:  # of an earlier run; this one's slides are to be reported all the same
            logger.warning("%s", error)
            summaries.append(SlideSummary(slide_id, "", "failed", reason=str(error)))
    return summaries


def _write_table(path: Path, summaries: Sequence[SlideSummary]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide", "source", "status", *VERDICTS, "mpp", "tissue_mm2", "reason"])
    for each in summaries:
        counts = [each.counts.get(verdict, "") for verdict in VERDICTS]
        numbers = ["" if number is None else f"{number:.6g}" for number in (each.mpp, each.tissue_mm2)]
        writer.writerow([each.slide, each.source, each.status, *counts, *numbers, each.reason])
    write_text(path, text.getvalue())
