"""Open whatever holds tiles: a store, a pack here or elsewhere, a folder in the published layout."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixcell.data.pack_format import is_pack
from pixcell.data.published_layout import PUBLISHED_CODEC
from pixcell.data.published_tiles import PublishedConfig, PublishedSource
from pixcell.data.shard_cache import CacheConfig
from pixcell.data.shards import ShardSource
from pixcell.data.store import TileStore
from pixcell.errors import StoreError, listed

__all__ = ["open_source"]

logger = logging.getLogger(__name__)


def open_source(
    place: str | Path,
    *,
    cache: CacheConfig | None = None,
    published: PublishedConfig | None = None,
    codec: Mapping[str, Any] = PUBLISHED_CODEC,
) -> TileStore | ShardSource | PublishedSource:
    """Open a source of tiles; what it is follows from what is in it.

    Args:
        place: A folder, or the address of a pack, such as ``s3://bucket/brca``.
        cache: Where shards from elsewhere are kept.
        published: What a folder in the published layout does not say of itself.
        codec: Facts about the autoencoder of published latents.

    Raises:
        StoreError: If nothing is there, or nothing that holds tiles; says what was found.
    """
    text = str(place)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" in text:
        cache = cache or CacheConfig()
        source = ShardSource.open(text, cache)
        size = cache.size.human_readable(decimal=True)
        logger.info("shards of %s are kept in %s, up to %s", text, cache.place, size)
        return source
    path = Path(text)
    if (path / "store.json").is_file():
        return TileStore.open(path)
    if is_pack(path):
        return ShardSource.open(path, cache)
    if (path / "packing").is_dir():
        raise StoreError(f"{path} is a pack that is not complete. Run the same `pixcell pack` again.")
    if (path / "patches" / "metadata").is_dir():
        return PublishedSource(path, published, codec)
    raise StoreError(
        f"{path} {_what_is_there(path)}. Give a tile store (it has store.json; made by `pixcell "
        "tile`), a pack (pack.json; `pixcell pack`), the address of one, or a folder in the published layout "
        "(patches/ with metadata/patch_names_all.hdf5)."
    )


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "does not exist"
    if not path.is_dir():
        return "is a file, and holds no tiles"
    if path.name == "patches" and (path / "metadata").is_dir():
        return f"is a part of a folder in the published layout: give the folder above it, {path.parent}"
    found = sorted(item.name for item in path.iterdir())
    return f"holds no tiles (there: {listed(found)})" if found else "is an empty folder"
