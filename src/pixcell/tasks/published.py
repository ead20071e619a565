"""``pixcell import`` and ``pixcell export``: between a store and the published PixCell layout."""

import csv
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pixcell.console import facts, progress
from pixcell.data.published_index import PublishedSlide, exported_order, read_index, slides_in, write_index
from pixcell.data.published_layout import (
    PUBLISHED_CODEC,
    FeaturePlace,
    ImportedColumn,
    export_slide,
    exportable_columns,
    import_slide,
    published_columns,
)
from pixcell.data.store import TileStore
from pixcell.errors import SomeFailed, StoreError
from pixcell.files import write_text
from pixcell.parallel import Done, Failed, default_workers, map_slides

__all__ = ["PublishedResult", "export_published_layout", "import_published_layout"]


@dataclass(frozen=True)
class PublishedResult:
    """What went from one place to the other."""

    source: Path
    target: Path
    num_slides: int
    num_tiles: int
    columns: tuple[str, ...]

    def __rich__(self) -> Table:
        return facts(
            "Published layout",
            {
                "from": self.source,
                "to": self.target,
                "slides": self.num_slides,
                "tiles": self.num_tiles,
                "columns": ", ".join(self.columns),
            },
        )


def import_published_layout(
    root: Path,
    store: Path,
    *,
    latents: bool = True,
    embeddings: bool = True,
    latents_column: str = "latents-sd3",
    embeddings_column: str = "embeddings-uni2-h",
    mpp: float = 0.5,
    features_in: FeaturePlace | None = None,
    codec: str | None = None,
    sources: Sequence[str] | None = None,
    workers: int | None = None,
) -> PublishedResult:
    """Read a folder in the published layout into a store.

    Slides that are in the store already are skipped, so it may be stopped and started again.

    Args:
        root: The folder above ``patches/``.
        store: The store to make or complete.
        latents: Whether to import ``*_sd3_vae.npy``.
        embeddings: Whether to import ``*_uni.npy``.
        latents_column: Name of the new column.
        embeddings_column: Name of the new column.
        mpp: Resolution of the tiles; 0.5 as published ("20x"). The layout does not record it.
        features_in: ``beside`` the images (documented), or below ``features`` (as the published code has it).
            None: wherever they are, if in one place only.
        codec: The autoencoder that made the latents (folder or name), to be recorded with its hash. The
            layout does not record it; training asks for it.
        sources: Sources of the index to read; None: all.
        workers: Number of processes.

    Raises:
        StoreError: If the folder is not as published.
        SomeFailed: If some slides failed; the others are in the store.
    """
    index = read_index(root)
    if unknown := sorted(set(sources or ()) - set(index)):
        raise StoreError(f"{root} has no source {unknown[0]!r}; it has {', '.join(sorted(index))}.")
    slides = slides_in({source: names for source, names in index.items() if not sources or source in sources})
    target = TileStore.create(store, {"tile_size": 1024, "mpp": mpp, "layout": "published PixCell"})
    known = published_columns(_codec_facts(codec), latents_column, embeddings_column)
    wanted = {"latents": latents, "embeddings": embeddings}
    columns = {kind: column for kind, column in known.items() if wanted[kind]}
    work = functools.partial(_import_one, root, target, columns, features_in)
    num_tiles, failures = 0, []
    with progress("Importing", sum(len(slide.names) for slide in slides)) as advance:
        for result in map_slides(work, slides, workers or default_workers()):
            advance(len(result.item.names), note=result.item.slide_id)
            if isinstance(result, Done):
                num_tiles += result.value
            else:
                failures.append((result.item.slide_id, result.reason))
    target.index()
    names = ("images", *(column.name for column in columns.values()))
    done = PublishedResult(root, store, len(slides) - len(failures), num_tiles, names)
    _report(store / "reports" / "import-failures.csv", failures, done)
    return done


def _import_one(
    root: Path,
    store: TileStore,
    columns: dict[str, ImportedColumn],
    features_in: FeaturePlace | None,
    slide: PublishedSlide,
) -> int:
    return import_slide(root, store, slide, columns=columns, features_in=features_in)


def _codec_facts(codec: str | None) -> Mapping[str, Any]:
    if codec is None:
        return PUBLISHED_CODEC
    from pixcell.models.codec import LatentCodec

    return LatentCodec.from_pretrained(codec).made_by()


def export_published_layout(
    store: Path,
    root: Path,
    *,
    latents_column: str | None = None,
    embeddings_column: str | None = None,
    source: str = "others",
    cohort: str = "pixcell",
    features_in: FeaturePlace = "beside",
    workers: int | None = None,
) -> PublishedResult:
    """Write a store in the published layout.

    Tiles that were imported from it get their old names and order back. The index is written last; what
    is there already is compared and kept, so it may be stopped and started again.

    Args:
        store: A store of 1024-pixel tiles with 16-channel latents and 1536-wide embeddings.
        root: The folder to write; ``patches/`` appears in it.
        latents_column: Column to write; None if only one fits.
        embeddings_column: Column to write; None if only one fits.
        source: First folder and index key of tiles that did not come from this layout.
        cohort: Second folder of tiles that did not come from this layout.
        features_in: ``beside`` the images (documented), or below ``features``, where the published training
            code looks.
        workers: Number of processes.

    Raises:
        StoreMismatch: If tiles or columns do not fit the layout.
        MissingColumn: If latents or embeddings are missing.
        SomeFailed: If some slides failed; then no index is written.
    """
    opened = TileStore.open(store)
    columns = exportable_columns(opened, latents_column, embeddings_column)
    slide_ids = opened.slide_ids()
    work = functools.partial(_export_one, opened, root, columns, source, cohort, features_in)
    written, failures = {}, []
    with progress("Exporting", len(slide_ids)) as advance:
        for result in map_slides(work, slide_ids, workers or default_workers()):
            advance(note=result.item)
            if isinstance(result, Failed):
                failures.append((result.item, result.reason))
            else:
                written[result.item] = result.value
    entries = [entry for slide_id in slide_ids for entry in written.get(slide_id, ())]
    done = PublishedResult(store, root, len(written), len(entries), ("images", *columns.values()))
    _report(root / "export-failures.csv", failures, done)
    write_index(root, exported_order(entries))
    return done


def _export_one(
    store: TileStore,
    root: Path,
    columns: dict[str, str],
    source: str,
    cohort: str,
    features_in: FeaturePlace,
    slide_id: str,
) -> list[tuple[str, str, int | None]]:
    return export_slide(
        store, root, slide_id, columns=columns, source=source, cohort=cohort, features_in=features_in
    )


def _report(path: Path, failures: Sequence[tuple[str, str]], result: PublishedResult) -> None:
    """Write the table of failures and raise, or remove the table of an earlier run."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("slide", "reason"), *failures])
    write_text(path, text.getvalue())
    raise SomeFailed("slides", failures, path, result)
