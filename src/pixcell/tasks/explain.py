"""What can be said about slides, pictures, stores and reports; see ``tasks.inspect``."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pixcell.data.index import INDEX_COLUMNS
from pixcell.data.shards import ShardSource
from pixcell.data.slides import Slide, find_slides
from pixcell.data.store import TileStore
from pixcell.data.tissue import find_tissue
from pixcell.errors import CorruptShard, EvaluationError, PixCellError
from pixcell.provenance import read_provenance
from pixcell.tasks.facts import Facts, Section, flattened, size_of, size_text

__all__ = [
    "explain_folder",
    "explain_pack",
    "explain_picture",
    "explain_report",
    "explain_slide",
    "explain_store",
]

_PLAIN_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def explain_slide(path: Path, verify: bool = False) -> Facts:
    """Explain a slide or plain image; ``verify`` has nothing to compare with."""
    del verify
    with Slide.open(path) as slide:
        resolution = slide.resolution
        entries: dict[str, Any] = {
            "reader": slide.backend,
            "vendor": slide.properties.get("openslide.vendor"),
            "objective": slide.properties.get("openslide.objective-power"),
            "size on disk": size_text(size_of(path)),
            "size": f"{slide.width:,} x {slide.height:,} px",
        }
        if resolution is None:
            entries["resolution"] = "not stated: give it with --source-mpp when tiling"
        else:
            width_mm, height_mm = (side * slide.mpp / 1000 for side in (slide.width, slide.height))
            entries["size in tissue"] = f"{width_mm:.2f} x {height_mm:.2f} mm"
            entries["resolution"] = f"{resolution.mpp:.4g} microns per pixel"
            entries["resolution read from"] = resolution.source
            if not math.isclose(resolution.mpp_x, resolution.mpp_y, rel_tol=1e-3):
                entries["pixels"] = f"{resolution.mpp_x:.4g} x {resolution.mpp_y:.4g} microns, not square"
        entries["colour"] = slide.colour
        bounds = slide.bounds
        if (bounds.width, bounds.height) != (slide.width, slide.height):
            entries["scanned area"] = f"x {bounds.x}, y {bounds.y}, {bounds.width:,} x {bounds.height:,} px"
        entries |= _tissue_of(slide)
        entries["fingerprint"] = slide.fingerprint
        levels = [
            (
                number,
                level.width,
                level.height,
                level.downsample,
                slide.mpp * level.downsample if resolution else None,
            )
            for number, level in enumerate(slide.levels)
        ]
        kind = "plain image" if slide.backend == "image" else "slide"
        return Facts(
            kind,
            path,
            [
                Section("slide", entries),
                Section("levels", columns=("level", "width", "height", "downsample", "mpp"), rows=levels),
                # Properties may name a patient or a case: they are shown only when asked for.
                Section("properties", dict(slide.properties), shown=False),
            ],
        )


def explain_picture(path: Path, verify: bool = False) -> Facts:
    """Explain a picture that carries a record of how it was made."""
    del verify
    record = read_provenance(path)
    if record is None:
        raise EvaluationError(f"{path.name} carries no record of how it was made.")
    with Slide.open(path) as image:
        size = f"{image.width} x {image.height} px"
    what = (
        "synthetic: made by a model, no patient's tissue"
        if record.get("synthetic")
        else "not said to be synthetic"
    )
    return Facts(
        "generated picture",
        path,
        [
            Section("picture", {"this is": what, "size": size, "size on disk": size_text(size_of(path))}),
            Section("record", flattened(record)),
        ],
    )


def explain_folder(path: Path, verify: bool = False) -> Facts:
    """Explain a folder of slides, or of pictures (real ones, or generated ones with their records)."""
    del verify
    found = find_slides(path)
    if all(file.suffix.lower() in _PLAIN_IMAGES for file in found):
        return _explain_pictures(path, found)
    rows: list[Sequence[Any]] = []
    problems = []
    for file in found:
        name = file.relative_to(path).as_posix()
        try:
            with Slide.open(file) as slide:
                resolution = slide.resolution
                rows.append(
                    (
                        name,
                        f"{slide.width} x {slide.height}",
                        resolution.mpp if resolution else None,
                        resolution.source if resolution else "not stated",
                        len(slide.levels),
                        slide.backend,
                        size_text(size_of(file)),
                    )
                )
        except PixCellError as error:
            problems.append(str(error))
    columns = ("slide", "size in px", "mpp", "read from", "levels", "reader", "on disk")
    total = sum(size_of(file) for file in found)
    facts = {"slides": len(found), "readable": len(rows), "size on disk": size_text(total)}
    return Facts(
        "folder of slides",
        path,
        [Section("folder", facts), Section("slides", columns=columns, rows=rows)],
        problems,
    )


def explain_pack(path: Path, verify: bool = False) -> Facts:
    """Explain a pack of shards; ``verify`` reads every byte."""
    pack = ShardSource.open(path)
    manifest = pack.manifest
    problems = [f"{each.slide_id}: {each.reason}" for each in pack.verify()] if verify else []
    if any(problem.startswith(manifest.index.name) for problem in problems):
        return Facts("pack of shards", path, [], problems, verified=True)
    index = pack.index()
    records = [(name, " x ".join(map(str, column.shape))) for name, column in manifest.columns.items()]
    if manifest.has_images:
        records.insert(0, ("images", "JPEG"))
    sizes = [shard.num_bytes for shard in manifest.shards]
    return Facts(
        "pack of shards",
        path,
        [
            Section(
                "pack",
                {
                    "slides": len(pc.unique(index["slide_id"])),
                    "tiles": pack.num_tiles,
                    "tile": f"{pack.tile_size} px at {pack.mpp:g} microns per pixel",
                    "shards": f"{len(sizes)}, of {size_text(min(sizes))} to {size_text(max(sizes))}",
                    "tiles per shard": manifest.tiles_per_shard,
                    "shuffled": manifest.request["shuffle"],
                    "size on disk": size_text(sum(sizes) + manifest.index.num_bytes),
                },
            ),
            Section("columns", columns=("column", "a tile's record"), rows=records),
            *(Section(f"{name} made by", flattened(one.made_by)) for name, one in manifest.columns.items()),
            Section("attributes", columns=("attribute", "values"), rows=_attributes(index)),
        ],
        problems,
        verified=verify,
    )


def _attributes(index: pa.Table) -> list[tuple[str, str]]:
    """Attributes of tiles with their most common values."""
    return [
        (
            name,
            ", ".join(
                f"{value if value is not None else 'not stated'} ({count})" for value, count in counted
            ),
        )
        for name in index.column_names
        if name not in INDEX_COLUMNS
        for counted in [_counted(index.column(name)).most_common(8)]
    ]


def explain_store(path: Path, verify: bool = False) -> Facts:
    """Explain a tile store; ``verify`` reads every byte."""
    store = TileStore.open(path)
    problems = [f"{each.column}/{each.slide_id}: {each.reason}" for each in store.verify()] if verify else []
    slides = store.slide_ids()
    try:
        summary, index = store.summary(), store.index()
    except CorruptShard:
        if not problems:
            raise
        # Too damaged to be described; everything that is wrong with it helps more than the first thing.
        return Facts("tile store", path, [Section("store", {"slides": len(slides)})], problems, verified=True)
    attributes = _attributes(index)
    columns = [
        (
            each.name,
            each.num_slides,
            each.num_missing,
            size_text(each.num_bytes),
            " x ".join(map(str, each.shape)) if each.shape else "JPEG",
        )
        for each in summary
    ]
    missing = [
        (slide_id, ", ".join(names))
        for slide_id in slides
        if (names := [each.name for each in summary if not store.has(each.name, slide_id)])
    ]
    tiles = _counted(index.column("slide_id"))
    return Facts(
        "tile store",
        path,
        [
            Section(
                "store",
                {
                    "slides": len(slides),
                    "tiles": index.num_rows,
                    "tile": f"{store.tile_size} px at {store.mpp:g} microns per pixel",
                    "size on disk": size_text(sum(each.num_bytes for each in summary)),
                },
            ),
            Section(
                "columns", columns=("column", "slides", "missing", "on disk", "a tile's record"), rows=columns
            ),
            *(Section(f"{each.name} made by", flattened(each.made_by)) for each in summary if each.made_by),
            Section("missing columns", columns=("slide", "missing"), rows=missing),
            Section("attributes of tiles", columns=("attribute", "values (tiles)"), rows=attributes),
            Section("tiling", flattened(store.tiling)),
            Section("tiles of slides", {slide_id: tiles[slide_id] for slide_id in slides}, shown=False),
        ],
        problems,
        verified=verify,
    )


def explain_report(path: Path, verify: bool = False) -> Facts:
    """Explain an evaluation report."""
    del verify
    from pixcell.evaluation.report import Report

    report = Report.load(path)
    columns = ("measure", "value", "at the floor's count", "floor (real/real)", "better")
    sections = [
        Section(
            "summary", {"in words": report.summary, "pairs": report.pairs_text(), "made": report.created}
        ),
        Section("figures", columns=columns, rows=report.measure_rows()),
        Section("notes", {str(number): note for number, note in enumerate(report.warnings, 1)}),
        *(Section(title, entries) for title, entries in report.protocol().items()),
    ]
    return Facts("report of an evaluation", path, sections)


def _counted(values: pa.ChunkedArray) -> Counter[str | None]:
    """Count in Arrow: a store may have tens of millions of tiles."""
    return Counter({each["values"].as_py(): each["counts"].as_py() for each in pc.value_counts(values)})


def _explain_pictures(path: Path, files: Sequence[Path]) -> Facts:
    sizes: Counter[str] = Counter()
    records: list[Mapping[str, Any]] = []
    problems = []
    for file in files:
        try:
            with Slide.open(file) as image:
                sizes[f"{image.width} x {image.height} px"] += 1
            record = read_provenance(file)
            if record is not None:
                records.append(record)
        except PixCellError as error:
            problems.append(str(error))
    synthetic = sum(bool(record.get("synthetic")) for record in records)
    entries = {
        "pictures": len(files),
        "say that they are synthetic": synthetic,
        "sizes": ", ".join(f"{size} ({count})" for size, count in sizes.most_common(5)),
        "size on disk": size_text(sum(size_of(file) for file in files)),
    }
    values: dict[str, Counter[str]] = {}
    for each in records:
        for key, value in flattened(each).items():
            values.setdefault(key, Counter())[str(value)] += 1
    told = {
        key: next(iter(counts)) if len(counts) == 1 else f"{len(counts)} different values"
        for key, counts in sorted(values.items())
    }
    kind = "folder of generated pictures" if synthetic else "folder of pictures"
    return Facts(kind, path, [Section("folder", entries), Section("what the records say", told)], problems)


def _tissue_of(slide: Slide) -> dict[str, Any]:
    """Estimate tissue on the thumbnail, as tiling does before it looks closer."""
    side = max(slide.width, slide.height)
    thumbnail = slide.thumbnail(2048)
    found = find_tissue(
        thumbnail, side / max(thumbnail.shape[:2]), slide.resolution.mpp if slide.resolution else None
    )
    share = float(found.tissue.mean())
    entries = {"tissue (estimate)": f"{share:.1%} of the area"}
    if slide.resolution is not None:
        area_mm2 = share * slide.width * slide.height * (slide.mpp / 1000) ** 2
        entries["tissue (estimate)"] += f", {area_mm2:.3g} mm²"
    if found.pen.any():
        entries["pen (estimate)"] = f"{float(found.pen.mean()):.1%} of the area"
    return entries
