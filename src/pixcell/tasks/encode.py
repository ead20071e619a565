"""Encode a store: latents and embeddings beside the images, one column each.

For every slide three things go on at once: threads decode JPEGs a few batches ahead, the model encodes, and
the finished records are written. A slide appears in a column when it is complete, so a run that was stopped
goes on with the slide it was at, and memory depends on the batch, not on the slide.
"""

import csv
import io
import logging
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from pixcell.console import Advance, progress, table
from pixcell.data.columns import differences, read_sidecar, stale_message
from pixcell.data.images import ImageShard
from pixcell.data.sealed import broken_seal, sealed_digest
from pixcell.data.store import TileStore
from pixcell.errors import CorruptShard, ModelError, RecipeError, SomeFailed, StoreError, StoreMismatch
from pixcell.files import write_text
from pixcell.models.codec import LatentCodec
from pixcell.models.encoders import Encoder, load_encoder
from pixcell.models.weights import Precision, choose_device, dtype_of
from pixcell.parallel import default_workers
from pixcell.training.checkpoints import Checkpoint

__all__ = ["ColumnSummary", "EncodeResult", "encode_store"]

logger = logging.getLogger(__name__)

_AHEAD = 2
"""Batches that wait between two stages: enough that neither idles, few enough that memory stays flat."""


@dataclass(frozen=True)
class ColumnSummary:
    """What was done for one column."""

    column: str
    num_encoded: int
    """Slides encoded in this run."""
    num_skipped: int
    """Slides that were there already."""
    num_tiles: int
    """Tiles encoded in this run."""
    duration_s: float


@dataclass(frozen=True)
class EncodeResult:
    """What :func:`encode_store` did."""

    store: Path
    columns: Sequence[ColumnSummary]

    def __rich__(self) -> Table:
        """Show a line per column."""
        return table(
            f"Encoded {self.store}",
            ("column", "slides encoded", "already there", "tiles", "tiles/s"),
            [
                (c.column, c.num_encoded, c.num_skipped, c.num_tiles, c.num_tiles / max(c.duration_s, 1e-9))
                for c in self.columns
            ],
        )


def encode_store(
    store: Path,
    *,
    codec: str | None = None,
    encoder: str | None = None,
    encoder_weights: Path | None = None,
    field_size: int = 256,
    latents_column: str | None = None,
    embeddings_column: str | None = None,
    batch_size: int = 16,
    device: str = "auto",
    precision: Precision = "fp32",
    download: bool = False,
    workers: int | None = None,
) -> EncodeResult:
    """Add latents, embeddings, or both to a store.

    Finished slides are skipped, so the same command goes on where it was stopped. Slides that fail are listed
    in ``STORE/reports/encoding-failures.csv``; the others are finished first.

    Args:
        store: A tile store.
        codec: Autoencoder for the latents: a folder, a training run, or a name with ``download``. None: none.
        encoder: Encoder for the embeddings: a name or a folder; see ``models.encoders``. None: none.
        encoder_weights: Weights of the encoder on this machine.
        field_size: Side of the field that one embedding describes, in pixels of the tile. Latents are laid
            out by the same fields, so that a field is one contiguous read.
        latents_column: Name of the latents' column; by default ``latents-<codec>``.
        embeddings_column: Name of the embeddings' column; by default ``embeddings-<encoder>``.
        batch_size: Fields of 256 px, or their area, that go through a model at once; at least one tile.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        precision: Number format to compute in. Columns store float16 whatever it is, and remember it.
        download: Whether weights that were named and are not on this machine may be downloaded.
        workers: Threads that decode JPEGs; by default one per processor.

    Raises:
        ModelError: If neither a codec nor an encoder was named, or one cannot be loaded.
        StoreMismatch: If the tiles are no whole number of fields, or a column was made by something else.
        RecipeError: If numbers make no sense, or both columns have one name.
        SomeFailed: If some slides failed; everything else is in the store.
    """
    if codec is None and encoder is None:
        raise ModelError(
            "nothing to encode with: name an autoencoder (--codec), an encoder (--encoder), or both. "
            "--encoder stain-texture needs no weights."
        )
    for name, number in (("batch_size", batch_size), ("workers", workers)):
        if number is not None and number < 1:
            raise RecipeError(f"{name} must be at least 1, not {number}.")
    opened = TileStore.open(store)
    opened.remove_leftovers()
    if field_size < 1 or opened.tile_size % field_size:
        raise StoreMismatch(
            f"tiles of {opened.tile_size} px in {store} are no whole number of {field_size} px fields. "
            "Choose a --field-size that divides them."
        )
    where, dtype = choose_device(device), dtype_of(precision)
    tiles_at_once = max(1, batch_size * 256**2 // opened.tile_size**2)
    run = _Run(opened, tiles_at_once, workers or default_workers(), [])
    # Everything that can be refused is refused before the first slide, not after hours of the first column.
    targets = []
    if codec is not None:
        loaded = _load_codec(codec, download, dtype)
        targets.append(_latents_of(loaded, opened, field_size, precision, latents_column))
    if encoder is not None:
        described = load_encoder(encoder, weights=encoder_weights, download=download, dtype=dtype)
        targets.append(_embeddings_of(described, opened, field_size, precision, embeddings_column))
    if len({target.column for target in targets}) < len(targets):
        raise RecipeError(
            f"latents and embeddings cannot share the column {targets[0].column!r}. Give them two names."
        )
    for target in targets:
        run.check_maker(target)
    columns = []
    for target in targets:
        # One after the other: two large models need not fit on the device together.
        target.model.to(where)
        columns.append(run.encode(target))
        target.model.to("cpu")
    result = EncodeResult(store, columns)
    run.report_failures(result)
    return result


# ── what is encoded ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Target:
    """A column to be filled: its description, and the function from tiles to records."""

    column: str
    model: LatentCodec | Encoder
    shape: tuple[int, ...]
    made_by: Mapping[str, Any]
    records: Callable[[torch.Tensor], torch.Tensor]
    """(batch, 3, height, width) uint8 to (batch, *shape)."""


def _load_codec(place: str, download: bool, dtype: torch.dtype) -> LatentCodec:
    path = Path(place)
    if (path / "recipe.yaml").is_file() or (path / "checkpoint.json").is_file():
        checkpoint = Checkpoint.find(path)
        checkpoint.verify()
        name = path.resolve().name
        return LatentCodec.from_pretrained(checkpoint.pipeline, name=name, dtype=dtype)
    return LatentCodec.from_pretrained(place, download=download, dtype=dtype)


def _latents_of(
    codec: LatentCodec, store: TileStore, field_size: int, precision: Precision, column: str | None
) -> _Target:
    if field_size % codec.downsampling:
        raise StoreMismatch(
            f"fields of {field_size} px are no whole number of {codec.name}'s latents "
            f"({codec.downsampling} px each)."
        )
    side, cells = store.tile_size // field_size, field_size // codec.downsampling
    channels = 2 * codec.latent_channels

    def records(tiles: torch.Tensor) -> torch.Tensor:
        posterior = torch.cat(codec.encode(tiles), dim=1)
        return posterior.reshape(-1, channels, side, cells, side, cells).permute(0, 2, 4, 1, 3, 5)

    made_by = {
        "kind": "latents",
        "codec": codec.made_by(),
        "field_size": field_size,
        "source": "images",
        "precision": precision,
    }
    shape = (side, side, channels, cells, cells)
    return _Target(column or f"latents-{_slug(codec.name)}", codec, shape, made_by, records)


def _embeddings_of(
    encoder: Encoder, store: TileStore, field_size: int, precision: Precision, column: str | None
) -> _Target:
    side = store.tile_size // field_size

    def records(tiles: torch.Tensor) -> torch.Tensor:
        return encoder.grid(tiles, field_size)

    made_by = {
        "kind": "embeddings",
        "encoder": encoder.made_by(),
        "field_size": field_size,
        "source": "images",
        "precision": precision,
    }
    return _Target(
        column or f"embeddings-{_slug(encoder.name)}", encoder, (side, side, encoder.dim), made_by, records
    )


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "unnamed"


# ── how it is encoded ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Run:
    store: TileStore
    tiles_at_once: int
    num_threads: int
    failures: list[tuple[str, str, str]]
    """Column, slide, reason."""

    def encode(self, target: _Target) -> ColumnSummary:
        """Fill a column; slides that fail are noted and left out."""
        slides = self.store.slide_ids()
        pending = [slide_id for slide_id in slides if not self.store.has(target.column, slide_id)]
        self._note_stale(target, sorted(set(slides) - set(pending)))
        started, num_encoded, num_tiles = time.monotonic(), 0, 0
        shards = list(self._openable(target, pending))
        total = sum(count for _, count in shards)
        with progress(f"encoding {target.column}", total) as advance:
            for slide_id, count in shards:
                try:
                    self._encode_slide(target, slide_id, advance)
                except CorruptShard as error:
                    self._note(target, slide_id, error)
                    continue
                num_encoded, num_tiles = num_encoded + 1, num_tiles + count
        return ColumnSummary(
            target.column, num_encoded, len(slides) - len(pending), num_tiles, time.monotonic() - started
        )

    def report_failures(self, result: EncodeResult) -> None:
        """Write the table of failures, or remove that of an earlier run.

        Raises:
            SomeFailed: If there are any.
        """
        path = self.store.path / "reports" / "encoding-failures.csv"
        if not self.failures:
            path.unlink(missing_ok=True)
            return
        text = io.StringIO()
        csv.writer(text).writerows([("column", "slide", "reason"), *self.failures])
        write_text(path, text.getvalue())
        failed = [(f"{slide_id} ({column})", reason) for column, slide_id, reason in self.failures]
        raise SomeFailed("slides", failed, path, result)

    def check_maker(self, target: _Target) -> None:
        """Refuse before any work what the store would refuse at the first slide.

        Raises:
            StoreMismatch: If the column was made by something else; names what differs.
            StoreError: If the column cannot have that name.
        """
        if target.column == "images":
            raise StoreError("the column 'images' holds the tiles themselves. Choose another column name.")
        self.store.shard_path(target.column, "any")
        for slide_id in self.store.slide_ids(target.column)[:1]:
            stored = read_sidecar(self.store.shard_path(target.column, slide_id))
            found = differences(
                {key: stored[key] for key in ("made_by", "shape")},
                {"made_by": dict(target.made_by), "shape": target.shape},
            )
            if found:
                raise StoreMismatch(
                    f"column {target.column!r} of {self.store.path} was made by something else: "
                    f"{'; '.join(found)}. Use the same settings, or give the new column another name "
                    "(--set latents_column=... or embeddings_column=...)."
                )

    def _openable(self, target: _Target, slide_ids: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Yield slides with their number of tiles."""
        for slide_id in slide_ids:
            try:
                with self.store.images(slide_id) as shard:
                    yield slide_id, len(shard)
            except CorruptShard as error:
                self._note(target, slide_id, error)

    def _note_stale(self, target: _Target, done: Sequence[str]) -> None:
        """A slide that was tiled again after it was encoded is not done, whatever files are there."""
        for slide_id in done:
            try:
                stored = read_sidecar(self.store.shard_path(target.column, slide_id))
                if stored["images_sha256"] != sealed_digest(self.store.shard_path("images", slide_id)):
                    raise StoreMismatch(stale_message(target.column, slide_id))
            except (CorruptShard, StoreMismatch) as error:
                self._note(target, slide_id, error)

    def _note(self, target: _Target, slide_id: str, error: StoreError) -> None:
        reason = " ".join(str(error).split())
        logger.warning("%s failed: %s", slide_id, reason)
        self.failures.append((target.column, slide_id, reason))

    def _encode_slide(self, target: _Target, slide_id: str, advance: Advance) -> None:
        path = self.store.shard_path("images", slide_id)
        # What a damaged file still decodes to would go into the column unnoticed.
        if problem := broken_seal(path):
            raise CorruptShard(f"{path} is damaged ({problem}). Delete it and tile the slide again.")
        with (
            self.store.images(slide_id) as shard,
            ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode") as threads,
            _Ahead(self._encoded(target, shard, threads)) as batches,
        ):

            def counted() -> Iterator[np.ndarray]:
                for batch in batches:
                    yield batch
                    advance(len(batch), note=slide_id)

            self.store.write_column(
                target.column,
                slide_id,
                counted(),
                shape=target.shape,
                dtype=np.float16,
                made_by=target.made_by,
                num_tiles=len(shard),
            )

    def _encoded(
        self, target: _Target, shard: ImageShard, threads: ThreadPoolExecutor
    ) -> Iterator[np.ndarray]:
        for tiles in _decoded(shard, self.store.tile_size, self.tiles_at_once, threads):
            yield _as_float16(target, shard.slide_id, target.records(torch.from_numpy(tiles)))


def _decoded(
    shard: ImageShard, tile_size: int, tiles_at_once: int, threads: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """Yield batches (n, 3, height, width) uint8, in order; threads are a few batches ahead."""
    waiting: deque[Future[np.ndarray]] = deque()
    num_ahead = (_AHEAD + 1) * tiles_at_once
    num_submitted = 0
    for first in range(0, len(shard), tiles_at_once):
        while num_submitted < min(len(shard), first + num_ahead):
            waiting.append(threads.submit(_pixels, shard, num_submitted, tile_size))
            num_submitted += 1
        batch = [waiting.popleft().result() for _ in range(min(tiles_at_once, len(shard) - first))]
        yield np.stack(batch).transpose(0, 3, 1, 2)


def _pixels(shard: ImageShard, tile: int, tile_size: int) -> np.ndarray:
    pixels = shard.image(tile)
    if pixels.shape != (tile_size, tile_size, 3):
        raise CorruptShard(
            f"tile {tile} of {shard.path} is {pixels.shape}, not {tile_size} x {tile_size} in three colours."
        )
    return pixels


def _as_float16(target: _Target, slide_id: str, records: torch.Tensor) -> np.ndarray:
    stored = records.to(torch.float16)
    if not torch.isfinite(stored).all():
        raise ModelError(
            f"column {target.column!r}: the model returned values that float16 cannot hold, on slide "
            f"{slide_id!r} in {target.made_by['precision']}. Use --set precision=fp32, and check the weights."
        )
    return stored.cpu().contiguous().numpy()


class _Ahead:
    """Run an iterator in a thread of its own, ``_AHEAD`` pieces ahead of who consumes it."""

    def __init__(self, pieces: Iterable[Any]) -> None:
        self._pieces = pieces
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="encode", daemon=True)

    def __enter__(self) -> Iterator[Any]:
        self._thread.start()
        return self._consume()

    def __exit__(self, *_: object) -> None:
        """Let the thread end, also when the consumer gave up in the middle."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _produce(self) -> None:
        try:
            for piece in self._pieces:
                if self._stop.is_set():
                    return
                self._queue.put(("piece", piece))
            self._queue.put(("end", None))
        except BaseException as error:  # noqa: BLE001 - raised again where it is consumed
            self._queue.put(("error", error))

    def _consume(self) -> Iterator[Any]:
        while True:
            kind, value = self._queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
