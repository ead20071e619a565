"""The index of a store: one row per tile, derived from the images shards and kept as Parquet.

It states in its metadata which shards it was made from, by checksum. So it never goes stale in silence,
depends on the tiles only, and may be deleted at any time.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixcell.data.images import ImageShard
from pixcell.errors import OutputError, StoreError, listed
from pixcell.files import write_whole

__all__ = ["INDEX_COLUMNS", "tiles_where", "up_to_date_index"]

logger = logging.getLogger(__name__)

_SHARDS_KEY = b"pixcell_shards"
# Large: the names of thirty million tiles are more than the two gigabytes that plain strings may hold.
_TEXT = pa.large_string()
INDEX_COLUMNS = {
    "slide_id": _TEXT,
    "tile": pa.int32(),
    "x": pa.int64(),
    "y": pa.int64(),
    "tissue": pa.float64(),
    "pen": pa.float64(),
    "sharpness": pa.float64(),
    "name": _TEXT,
}
"""Columns that every index has; attributes of tiles follow."""


def up_to_date_index(
    path: Path,
    checksums: Mapping[str, str],
    open_images: Callable[[str], ImageShard],
) -> pa.Table:
    """Return the index of a store, reading only the shards that it does not know yet.

    Args:
        path: Where the index is kept; written when something changed.
        checksums: Of every images shard, by slide.
        open_images: Opens the images of a slide.
    """
    stamp = json.dumps(checksums, sort_keys=True).encode()
    known = _stored(path)
    if known is None or known.schema.metadata[_SHARDS_KEY] != stamp:
        known = _rebuilt(known, checksums, open_images).replace_schema_metadata({_SHARDS_KEY: stamp})
        try:
            with write_whole(path) as temporary:
                pq.write_table(known, temporary)
        except OutputError as error:  # a store that may only be read: the index is made anew each time
            logger.info("%s", error)
    return known


def _stored(path: Path) -> pa.Table | None:
    if not path.exists():
        return None
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        logger.info("%s is damaged (%s); it is derived, so it is made again", path, error)
        return None
    return table if _SHARDS_KEY in (table.schema.metadata or {}) else None


def _rebuilt(
    old: pa.Table | None, checksums: Mapping[str, str], open_images: Callable[[str], ImageShard]
) -> pa.Table:
    states = {} if old is None else json.loads(old.schema.metadata[_SHARDS_KEY])
    kept = {slide_id for slide_id in checksums if states.get(slide_id) == checksums[slide_id]}
    parts = [pa.schema(list(INDEX_COLUMNS.items())).empty_table()]
    if old is not None and kept:
        rows = old.filter(pc.is_in(old["slide_id"], pa.array(sorted(kept), old["slide_id"].type)))
        # An attribute that only shards had which are gone must go, too: the index is what the shards say.
        gone = [
            name for name in rows.column_names[len(INDEX_COLUMNS) :] if rows[name].null_count == len(rows)
        ]
        parts.append(rows.drop_columns(gone).replace_schema_metadata(None))
    parts += [_rows_of(open_images(slide_id)) for slide_id in checksums if slide_id not in kept]
    table = pa.concat_tables(parts, promote_options="permissive")
    attributes = sorted(set(table.column_names) - set(INDEX_COLUMNS))
    table = table.select([*INDEX_COLUMNS, *attributes])
    return table.sort_by([("slide_id", "ascending"), ("tile", "ascending")]).combine_chunks()


def _rows_of(shard: ImageShard) -> pa.Table:
    tiles = shard.tiles
    columns = {
        "slide_id": pa.array([shard.slide_id] * len(tiles), _TEXT),
        "tile": pa.array(range(len(tiles)), pa.int32()),
    }
    for name, kind in list(INDEX_COLUMNS.items())[2:]:
        columns[name] = pa.array([tile[name] for tile in tiles], kind)
    for name in sorted({name for tile in tiles for name in tile["attributes"]}):
        columns[name] = pa.array([tile["attributes"].get(name) for tile in tiles], _TEXT)
    return pa.table(columns)


def tiles_where(index: pa.Table, where: Mapping[str, Sequence[str]]) -> pa.Table:
    """Return the rows of the tiles that have one of the wanted values of every attribute.

    Args:
        index: Of a store.
        where: Values by attribute, such as ``{"split": ["train"]}``; all must hold. Empty: every tile.

    Raises:
        StoreError: If the store is empty, no tile has such an attribute, or none remains.
        TypeError: If values are a string instead of a list of strings.
    """
    if not len(index):
        raise StoreError("the store holds no tiles yet. Run `pixcell tile` first.")
    texts = (pa.string(), pa.large_string())
    attributes = [field.name for field in index.schema if field.type in texts]
    for attribute, values in where.items():
        if isinstance(values, str):
            raise TypeError(f"where[{attribute!r}] is a list of values, not {values!r}")
        if attribute not in attributes:
            near = get_close_matches(attribute, attributes, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Attributes: {listed(attributes)}."
            raise StoreError(f"no tile of the store has an attribute {attribute!r}.{hint}")
        kept = index.filter(
            pc.is_in(index[attribute], pa.array([str(value) for value in values], index[attribute].type))
        )
        if not len(kept):
            there = sorted(str(value) for value in pc.unique(index[attribute]).to_pylist())
            raise StoreError(
                f"no tile remains where {attribute} is {listed(values)}. Values there: {listed(there)}."
            )
        index = kept
    return index
