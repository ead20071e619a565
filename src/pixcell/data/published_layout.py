"""The folder layout of the published PixCell training data, read into a store and written from one.

    ROOT/patches/<source>/<cohort>/single_1024/<slide>/<x>_<y>.jpeg         1024 x 1024
                                                      <x>_<y>_sd3_vae.npy  float16 (32, 128, 128): mean, std
                                                      <x>_<y>_uni.npy      float16 (16, 1536), row-major
    ROOT/patches/metadata/patch_names_all.hdf5                              names below patches/, per source

The published documentation puts the features beside the images, as above; the published code reads them under
``ROOT/features/`` with the same relative path. Both are read; the documented place is written unless the
other is asked for. Through a store and back is lossless: bytes of images, arrays, names, and their order.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from pixcell.data.published_index import TILE_SIZE, PublishedSlide, name_parts
from pixcell.data.store import TileStore
from pixcell.data.tiling import Tile
from pixcell.errors import MissingColumn, OutputError, StoreError, StoreMismatch
from pixcell.files import write_whole
from pixcell.provenance import hash_of

__all__ = [
    "FILE_SHAPES",
    "PUBLISHED_CODEC",
    "RECORD_SHAPES",
    "SUFFIXES",
    "FeaturePlace",
    "ImportedColumn",
    "export_slide",
    "exportable_columns",
    "import_slide",
    "published_columns",
    "to_record",
]

FeaturePlace = Literal["beside", "features"]
"""Where features are: beside the images (documented), or below ``features/`` (as in the published code)."""

_FIELD = 256
_SIDE, _CELLS = TILE_SIZE // _FIELD, _FIELD // 8
_LATENTS, _EMBEDDINGS = "_sd3_vae.npy", "_uni.npy"
SUFFIXES = {"latents": _LATENTS, "embeddings": _EMBEDDINGS}
"""What a feature's file name ends in, by kind."""
FILE_SHAPES: dict[str, tuple[int, ...]] = {_LATENTS: (32, 128, 128), _EMBEDDINGS: (16, 1536)}
"""Shape of a tile's array, by the ending of its file."""
RECORD_SHAPES: dict[str, tuple[int, ...]] = {
    _LATENTS: (_SIDE, _SIDE, 32, _CELLS, _CELLS),
    _EMBEDDINGS: (_SIDE, _SIDE, 1536),
}
"""Shape of a tile's record in fields of 256 px, by the ending of its file."""

_NOT_RECORDED = "not recorded"
PUBLISHED_CODEC: Mapping[str, Any] = MappingProxyType(
    {
        "name": "stabilityai/stable-diffusion-3.5-large",
        "class": "AutoencoderKL",
        "sha256": _NOT_RECORDED,
        "latent_channels": 16,
        "downsampling": 8,
        "scale": 1.5305,
        "shift": 0.0609,
    }
)
"""The autoencoder of the published latents, as documented with the layout."""


@dataclass(frozen=True)
class ImportedColumn:
    """A column to make from published features."""

    name: str
    made_by: Mapping[str, Any]


def published_columns(
    codec: Mapping[str, Any] = PUBLISHED_CODEC,
    latents: str = "latents-sd3",
    embeddings: str = "embeddings-uni2-h",
) -> dict[str, ImportedColumn]:
    """Return what is known of the published features, by kind.

    Args:
        codec: Facts about the autoencoder, where it is at hand; the layout does not record its weights.
        latents: Name of the column of latents.
        embeddings: Name of the column of embeddings.

    Raises:
        StoreError: If such an autoencoder cannot have made published latents.
    """
    if (codec["latent_channels"], codec["downsampling"]) != (16, 8):
        raise StoreError(
            f"{codec['name']} cannot have made published latents: it has {codec['latent_channels']} channels "
            f"and shrinks by {codec['downsampling']}; they have 16 and 8."
        )
    common = {"field_size": _FIELD, "source": "published layout"}
    encoder = {"name": "uni2-h", "sha256": _NOT_RECORDED, "dim": 1536}
    return {
        "latents": ImportedColumn(latents, {"kind": "latents", "codec": dict(codec), **common}),
        "embeddings": ImportedColumn(embeddings, {"kind": "embeddings", "encoder": encoder, **common}),
    }


def import_slide(
    root: Path,
    store: TileStore,
    slide: PublishedSlide,
    *,
    columns: Mapping[str, ImportedColumn],
    features_in: FeaturePlace | None = None,
) -> int:
    """Read one slide into a store; return its number of tiles. What is there already stays.

    ``x`` and ``y`` are the numbers of the file name: the layout does not say what they count.

    Args:
        root: The folder above ``patches/``.
        store: A store of 1024-pixel tiles.
        slide: Which slide.
        columns: For ``"latents"`` and ``"embeddings"``; what is left out is not imported.
        features_in: Where features are. None: wherever they are found, if that is one place only.

    Raises:
        StoreError: If a file is missing, is in two places, or is not of the published shape.
    """
    facts = {
        "fingerprint": hash_of(list(slide.names)),
        "published": {"source": slide.source, "runs": _runs(slide.positions)},
        "positions": "numbers of the published file names; their unit is not documented",
    }
    count = store.write_images(slide.slide_id, _tiles(root, store, slide), facts)
    for kind, column in columns.items():
        suffix = SUFFIXES[kind]
        files = (_feature(root, name, suffix, features_in) for name in slide.names)
        store.write_column(
            column.name,
            slide.slide_id,
            (to_record(_load(path, suffix), suffix)[None] for path in files),
            shape=RECORD_SHAPES[suffix],
            dtype=np.float16,
            made_by=column.made_by,
            num_tiles=count,
        )
    return count


def _runs(positions: Iterable[int]) -> list[list[int]]:
    """Return ascending numbers as stretches of (first, count).

    Examples:
        >>> _runs([3, 4, 5, 9])
        [[3, 3], [9, 1]]
    """
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([position, 1])
    return runs


def _tiles(root: Path, store: TileStore, slide: PublishedSlide) -> Iterator[tuple[Tile, bytes]]:
    for name in slide.names:
        path = root / "patches" / name
        try:
            jpeg = path.read_bytes()
            with Image.open(BytesIO(jpeg)) as image:
                kind, width, height = image.format, image.width, image.height
        except FileNotFoundError:
            raise StoreError(f"{path} is in the index, but there is no such file.") from None
        except (UnidentifiedImageError, OSError) as error:
            raise StoreError(f"{path} cannot be read as a JPEG: {error}.") from error
        if (kind, width, height) != ("JPEG", TILE_SIZE, TILE_SIZE):
            raise StoreError(
                f"{path} is a {kind} of {width} x {height} px; published tiles are {TILE_SIZE} px JPEGs."
            )
        _, _, _, x, y = name_parts(name)
        yield (
            Tile(
                slide_id=slide.slide_id,
                x=x,
                y=y,
                size=store.tile_size,
                mpp=store.mpp,
                tissue=1.0,
                pen=0.0,
                sharpness=0.0,
                name=name,
                attributes={"source": slide.source, "cohort": slide.cohort},
            ),
            jpeg,
        )


def _feature(root: Path, name: str, suffix: str, features_in: FeaturePlace | None) -> Path:
    relative = name.removesuffix(".jpeg") + suffix
    places = {"beside": root / "patches" / relative, "features": root / "features" / relative}
    looked = [features_in] if features_in else list(places)
    found = [places[place] for place in looked if places[place].is_file()]
    if not found:
        where = " nor ".join(str(places[place]) for place in looked)
        raise StoreError(
            f"{name} has no {suffix}: it is not at {where}. Make the features, or import images only "
            "(--set latents=false --set embeddings=false)."
        )
    if len(found) > 1:
        raise StoreError(
            f"{name} has {suffix} both beside the image and below features/. Say which to read: "
            "--set features_in=beside or --set features_in=features."
        )
    return found[0]


def _load(path: Path, suffix: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise StoreError(f"{path} cannot be read as an array: {error}.") from error
    if array.shape != FILE_SHAPES[suffix] or array.dtype != np.float16:
        raise StoreError(
            f"{path} holds {array.shape} {array.dtype}; a published {suffix} holds "
            f"{FILE_SHAPES[suffix]} float16."
        )
    return array


def to_record(array: np.ndarray, suffix: str) -> np.ndarray:
    """Cut a published array into fields, ``(4, 4, ...)``."""
    if suffix == _EMBEDDINGS:
        return array.reshape(RECORD_SHAPES[suffix])
    return array.reshape(32, _SIDE, _CELLS, _SIDE, _CELLS).transpose(1, 3, 0, 2, 4)


def _from_record(record: np.ndarray, suffix: str) -> np.ndarray:
    """Put fields together again; the inverse of :func:`to_record`."""
    if suffix == _EMBEDDINGS:
        return record.reshape(FILE_SHAPES[suffix])
    return np.ascontiguousarray(record.transpose(2, 0, 3, 1, 4)).reshape(FILE_SHAPES[suffix])


def exportable_columns(
    store: TileStore, latents: str | None = None, embeddings: str | None = None
) -> dict[str, str]:
    """Return the columns of a store that fit the published layout, by kind.

    Args:
        store: Which store.
        latents: Column to take; None if there is only one that fits.
        embeddings: Column to take; None if there is only one that fits.

    Raises:
        StoreMismatch: If the tiles are not 1024 px, a column has another shape, or there is a choice.
        MissingColumn: If there is no such column, or slides are missing in it.
    """
    if store.tile_size != TILE_SIZE:
        raise StoreMismatch(
            f"{store.path} holds tiles of {store.tile_size} px; the published layout knows only {TILE_SIZE} "
            f"px. Tile the slides again with tiling.tile_size={TILE_SIZE}."
        )
    result = {}
    for kind, name in {"latents": latents, "embeddings": embeddings}.items():
        suffix = SUFFIXES[kind]
        shape = RECORD_SHAPES[suffix]
        if name is None:
            fitting = [one.name for one in store.summary() if one.shape == shape]
            if not fitting:
                raise MissingColumn(
                    f"{store.path} has no column of {kind} {shape}, so there is nothing to write as "
                    f"*{suffix}. {_needed(kind)}"
                )
            if len(fitting) > 1:
                raise StoreMismatch(f"several columns could be the {kind}: {', '.join(fitting)}. Name one.")
            name = fitting[0]
        column = store.column(name)
        if column.shape != shape or column.dtype != np.float16:
            raise StoreMismatch(
                f"column {name!r} holds records {column.shape} {column.dtype}; the published layout needs "
                f"{shape} float16. " + _needed(kind)
            )
        missing = sorted(set(store.slide_ids()) - set(column.slide_ids))
        if missing:
            raise MissingColumn(
                f"column {name!r} lacks {len(missing)} slides ({missing[0]!r}, ...). "
                "Run `pixcell encode` to complete it."
            )
        result[kind] = name
    return result


def _needed(kind: str) -> str:
    if kind == "latents":
        return "Encode with a 16-channel autoencoder (SD3) and --field-size 256."
    return "Encode with UNI2-h (1536 numbers) and --field-size 256."


def export_slide(
    store: TileStore,
    root: Path,
    slide_id: str,
    *,
    columns: Mapping[str, str],
    source: str = "others",
    cohort: str = "pixcell",
    features_in: FeaturePlace = "beside",
) -> list[tuple[str, str, int | None]]:
    """Write the tiles of one slide; return (source, name, position in the index it came from) per tile.

    Args:
        store: Which store.
        root: The folder above ``patches/``.
        slide_id: Which slide.
        columns: See :func:`exportable_columns`.
        source: For tiles that did not come from this layout: first folder, and key of the index.
        cohort: For tiles that did not come from this layout: second folder.
        features_in: Where to write features.

    Raises:
        OutputError: If another file stands where a tile belongs.
    """
    shard = store.images(slide_id)
    published = shard.slide.get("published")
    positions = [first + i for first, count in published["runs"] for i in range(count)] if published else []
    opened = {suffix: store.column(columns[kind]) for kind, suffix in SUFFIXES.items()}
    result: list[tuple[str, str, int | None]] = []
    for tile, facts in enumerate(shard.tiles):
        if published:
            key, name, position = published["source"], facts["name"], positions[tile]
        else:
            key, position = source, None
            name = f"{source}/{cohort}/single_{TILE_SIZE}/{slide_id}/{facts['x']}_{facts['y']}.jpeg"
        name_parts(name)
        _put(root / "patches" / name, shard.jpeg(tile))
        for suffix, column in opened.items():
            folder = "patches" if features_in == "beside" else "features"
            buffer = BytesIO()
            np.save(buffer, _from_record(column.read(slide_id, tile), suffix))
            _put(root / folder / (name.removesuffix(".jpeg") + suffix), buffer.getvalue())
        result.append((key, name, position))
    return result


def _put(path: Path, content: bytes) -> None:
    if path.exists():
        if path.read_bytes() != content:
            raise OutputError(f"{path} exists with other content. Choose an empty folder.")
        return
    with write_whole(path) as temporary:
        temporary.write_bytes(content)
