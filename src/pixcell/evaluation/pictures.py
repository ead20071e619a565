"""The two sets of pictures that are compared: folders of files, or the tiles of a store.

A picture may be looked at whole or cut into fields; a field has the same number of pixels everywhere, so sets
of unlike picture sizes are compared at one field of view instead of at one number of pixels.
"""

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pixcell.data.images import ImageShard
from pixcell.data.index import tiles_where
from pixcell.data.slides import Slide
from pixcell.data.store import TileStore
from pixcell.errors import EvaluationError, listed
from pixcell.files import sha256_of
from pixcell.geometry import Box
from pixcell.parallel import default_workers
from pixcell.provenance import read_provenance

__all__ = ["PLOT_SOFTWARE", "Picture", "PictureSet", "check_comparable", "fields_of", "pairs_of", "reading"]

_ENDINGS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
_CONTACT_SHEET = "contact_sheet"
PLOT_SOFTWARE = "pixcell report"
"""What the ``Software`` chunk of a report's plot says."""
_SHARDS_OPEN = 4

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Picture:
    """One picture of a set.

    Attributes:
        name: Path below the folder, or ``slide_id/x_y`` in a store.
        group: What must stay on one side when a set is split: the slide, or the picture itself.
        height: In pixels.
        width: In pixels.
        record: What a generated picture says about itself; None if it says nothing.
        place: The file, or the slide id and row of a tile.
        alias: Name of the file that a tile was before it entered a store.
    """

    name: str
    group: str
    height: int
    width: int
    record: Mapping[str, Any] | None
    place: Path | tuple[str, int] = field(repr=False)
    alias: str = ""


class PictureSet:
    """Pictures in a fixed order, read when asked for.

    Attributes:
        path: The folder or store.
        kind: Which of the two.
        pictures: Those that take part.
        num_found: How many there were to choose from.
        left_out: Files of the folder that are no samples, such as contact sheets.
    """

    def __init__(
        self, path: Path, kind: Literal["folder", "store"], pictures: Sequence[Picture], **facts: Any
    ) -> None:
        self.path, self.kind, self.pictures = path, kind, list(pictures)
        self.num_found: int = facts.get("num_found", len(self.pictures))
        self.left_out: list[str] = facts.get("left_out", [])
        self._store: TileStore | None = facts.get("store")
        self._shards: OrderedDict[str, ImageShard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, where: Mapping[str, Sequence[str]] | None = None) -> Self:
        """List the pictures of a folder (recursive, sorted by name) or of a store.

        Args:
            path: Of either.
            where: Take only tiles of a store with these attributes, such as ``{"split": ["test"]}``.

        Raises:
            EvaluationError: If there are no pictures, or a folder was to be chosen from by attributes.
            StoreError: If no tile has such attributes.
            UnreadableSlide: If a file is not an image; names it.
        """
        if not path.exists():
            raise EvaluationError(f"there is no {path}.")
        if path.is_file():
            raise EvaluationError(f"{path} is a file; give a folder of pictures, or a tile store.")
        if (path / "store.json").is_file():
            return cls._of_store(path, where or {})
        if where:
            raise EvaluationError(
                f"{path} is a folder; only tiles of a store have attributes ({listed(list(where))})."
            )
        return cls._of_folder(path)

    @classmethod
    def _of_folder(cls, folder: Path) -> Self:
        files = sorted(
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in _ENDINGS
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        )
        described = list(reading(files, lambda file: _described(file, folder)))
        pictures = [picture for picture in described if picture is not None]
        if not pictures:
            raise EvaluationError(
                f"{folder} holds no pictures ({', '.join(sorted(_ENDINGS))}). Give a folder of pictures, "
                "or a tile store."
            )
        left_out = [
            file.relative_to(folder).as_posix()
            for file, picture in zip(files, described, strict=True)
            if picture is None
        ]
        return cls(folder, "folder", pictures, left_out=left_out)

    @classmethod
    def _of_store(cls, path: Path, where: Mapping[str, Sequence[str]]) -> Self:
        store = TileStore.open(path)
        size = store.tile_size
        index = store.index()
        if not len(index):
            raise EvaluationError(f"the store {path} holds no tiles. Fill it with `pixcell tile`.")
        tiles = tiles_where(index, where).select(["slide_id", "tile", "x", "y", "name"]).to_pylist()
        pictures = [
            Picture(
                f"{tile['slide_id']}/{tile['x']}_{tile['y']}",
                tile["slide_id"],
                size,
                size,
                None,
                (tile["slide_id"], tile["tile"]),
                tile["name"],
            )
            for tile in tiles
        ]
        return cls(path, "store", pictures, store=store)

    def __len__(self) -> int:
        return len(self.pictures)

    def with_pictures(self, pictures: Sequence[Picture]) -> "PictureSet":
        """Return the same set reduced to some of its pictures."""
        return PictureSet(
            self.path,
            self.kind,
            pictures,
            num_found=self.num_found,
            left_out=self.left_out,
            store=self._store,
        )

    def chosen(self, max_images: int | None, seed: int) -> "PictureSet":
        """Return at most so many pictures, drawn at random, in their order. None: all."""
        if max_images is None or max_images >= len(self):
            return self
        rows = np.random.default_rng(seed).choice(len(self), max_images, replace=False)
        return self.with_pictures([self.pictures[row] for row in sorted(rows)])

    def read(self, picture: Picture) -> np.ndarray:
        """Return the pixels, (height, width, 3) uint8. Safe to call from several threads.

        Raises:
            UnreadableSlide: If the file is damaged; names it.
        """
        if isinstance(picture.place, Path):
            with Slide.open(picture.place) as image:
                return image.read(Box(0, 0, image.width, image.height))
        slide_id, row = picture.place
        return self._shard(slide_id).image(row)

    def _shard(self, slide_id: str) -> ImageShard:
        """Opening a shard reads its table, so the last few stay; they may be read by several threads."""
        with self._lock:
            if slide_id not in self._shards:
                assert self._store is not None
                self._shards[slide_id] = self._store.images(slide_id)
                while len(self._shards) > _SHARDS_OPEN:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(slide_id)
            return self._shards[slide_id]

    @property
    def sizes(self) -> dict[str, int]:
        """How many pictures there are of each size, as ``"width x height"``; the commonest first."""
        return dict(Counter(f"{each.width} x {each.height}" for each in self.pictures).most_common())

    @property
    def mpp(self) -> list[float]:
        """The resolutions that the set states: the store's, or those in the pictures' records."""
        if self._store is not None:
            return [self._store.mpp]
        stated = {each.record.get("mpp") for each in self.pictures if each.record}
        return sorted(float(mpp) for mpp in stated if mpp is not None)

    @property
    def num_synthetic(self) -> int:
        """How many pictures say of themselves that they are synthetic."""
        return sum(bool(each.record and each.record.get("synthetic")) for each in self.pictures)


def reading(items: Sequence[Item], function: Callable[[Item], Value]) -> Iterator[Value]:
    """Yield ``function(item)`` in order, some items ahead in threads; memory stays flat.

    Image decoders let go of Python's lock, so threads use all processors.
    """
    ahead = 4 * default_workers()
    with ThreadPoolExecutor(default_workers()) as pool:
        waiting: list[Future[Value]] = []
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def fields_of(image: np.ndarray, field_size: int | None) -> list[np.ndarray]:
    """Cut a picture into a centred grid of whole squares, in row-major order. None: the picture itself.

    Examples:
        >>> [part.shape for part in fields_of(np.zeros((300, 600, 3), np.uint8), 256)]
        [(256, 256, 3), (256, 256, 3)]
    """
    if field_size is None:
        return [image]
    height, width = image.shape[:2]
    rows, columns = height // field_size, width // field_size
    top, left = (height - rows * field_size) // 2, (width - columns * field_size) // 2
    boxes = Box(left, top, columns * field_size, rows * field_size).split(field_size)
    return [image[box.y : box.bottom, box.x : box.right] for box in boxes]


def check_comparable(real: PictureSet, synthetic: PictureSet, field_size: int | None) -> list[str]:
    """Refuse sets that no resizing makes alike; return warnings about those that need it.

    Raises:
        EvaluationError: If the sets are one folder or lie within each other, have fewer than two pictures,
            pictures smaller than a field, or of unlike shape.
    """
    _check_places(real.path, synthetic.path)
    for name, pictures in (("REAL", real), ("SYNTHETIC", synthetic)):
        if len(pictures) < 2:
            raise EvaluationError(
                f"{name} ({pictures.path}) holds {len(pictures)} picture; a set to compare needs at least 2."
            )
    everything = [*real.pictures, *synthetic.pictures]
    warnings = _warnings_about_resolution(real, synthetic)
    if field_size is not None:
        small = [each for each in everything if min(each.height, each.width) < field_size]
        if small:
            raise EvaluationError(
                f"{len(small)} pictures are smaller than a field of {field_size} px (the first is "
                f"{small[0].name}, {small[0].width} x {small[0].height}). Choose a field_size of at most "
                f"{min(min(each.height, each.width) for each in everything)}."
            )
        return warnings
    ratios = {each.width / each.height for each in everything}
    if not math.isclose(min(ratios), max(ratios), rel_tol=0.01):
        sizes = "; ".join(
            f"{name}: " + ", ".join(list(each.sizes)[:4])
            for name, each in (("REAL", real), ("SYNTHETIC", synthetic))
        )
        raise EvaluationError(
            f"the pictures are of unlike shape ({sizes}), and resizing them to one would stretch tissue. "
            "Cut all of them into squares with --set field_size=256 (or another size), or crop them first."
        )
    for name, pictures in (("real", real), ("synthetic", synthetic)):
        if len(pictures.sizes) > 1:
            warnings.append(
                f"The {name} pictures have {len(pictures.sizes)} different sizes; all were resized by the "
                "extractor's rule, so their magnification in feature space differs."
            )
    if not set(real.sizes) & set(synthetic.sizes):
        warnings.append(
            f"Real pictures ({', '.join(list(real.sizes)[:3])}) and synthetic ones "
            f"({', '.join(list(synthetic.sizes)[:3])}) differ in size; resized to one size they show tissue "
            "at different magnification unless both cover the same area. To compare at one scale, cut both "
            "into fields: --set field_size=256."
        )
    return warnings


def pairs_of(
    real: PictureSet, synthetic: PictureSet
) -> tuple[list[tuple[Picture, Picture]], Literal["like", "file name", None], list[str]]:
    """Find for each synthetic picture the real one that it was made after.

    By the name in its record (``like``), where that fits several by the checksum beside it; if no record
    names anything, by an equal file stem.

    Returns:
        Pairs (real, synthetic); by what they were found; and warnings about names that fit several pictures.
    """
    by_name: dict[str, list[Picture]] = {}
    for picture in real.pictures:
        for name in {*_names_of(picture.name), *_names_of(picture.alias)}:
            by_name.setdefault(name, []).append(picture)

    def fitting(names: Iterable[str]) -> list[Picture]:
        return next((by_name[name] for name in names if name in by_name), [])

    likes = [(each.record or {}).get("like") for each in synthetic.pictures]
    found_by: Literal["like", "file name"] = "like" if any(likes) else "file name"
    pairs, ambiguous = [], []
    for picture, like in zip(synthetic.pictures, likes, strict=True):
        if found_by == "like":
            names = _names_of(like) if isinstance(like, str) else []
        else:
            names = _names_of(picture.name)
        candidates = fitting(names)
        if len(candidates) > 1:
            digest = (picture.record or {}).get("like_sha256")
            exact = [
                each
                for each in candidates
                if isinstance(each.place, Path) and sha256_of(each.place) == digest
            ]
            candidates = exact or candidates
        if len(candidates) == 1:
            pairs.append((candidates[0], picture))
        elif candidates:
            ambiguous.append(picture.name)
    warnings = (
        [
            f"{len(ambiguous)} synthetic pictures name a reference that fits several real pictures (the "
            f"first is {ambiguous[0]}); they are left out of the pairs."
        ]
        if ambiguous
        else []
    )
    return pairs, found_by if pairs else None, warnings


def _names_of(name: str) -> list[str]:
    """What a picture may be called, the most exact first."""
    return [name, Path(name).name, Path(name).stem] if name else []


def _described(file: Path, folder: Path) -> Picture | None:
    """Return what is known of a file before its pixels are needed; None for what is no sample."""
    if file.stem == _CONTACT_SHEET:
        return None
    name = file.relative_to(folder).as_posix()
    record = read_provenance(file) if file.suffix.lower() == ".png" else None
    try:
        with Image.open(file) as image:
            if image.info.get("Software") == PLOT_SOFTWARE:
                return None
            width, height = image.size
            if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # lies on its side
                width, height = height, width
    except (UnidentifiedImageError, OSError):  # what only the slide readers know: colour TIFF of 16 bits, say
        with Slide.open(file) as slide:
            width, height = slide.width, slide.height
    return Picture(name, name, height, width, record, file)


def _check_places(real: Path, synthetic: Path) -> None:
    one, other = real.resolve(), synthetic.resolve()
    if one == other:
        raise EvaluationError(f"REAL and SYNTHETIC are the same folder ({one}); give two.")
    for inner, outer in ((one, other), (other, one)):
        if inner.is_relative_to(outer):
            raise EvaluationError(
                f"{inner} lies inside {outer}: its pictures would count on both sides. Move one of them."
            )


def _warnings_about_resolution(real: PictureSet, synthetic: PictureSet) -> list[str]:
    stated = {"real": real.mpp, "synthetic": synthetic.mpp}
    every = [mpp for values in stated.values() for mpp in values]
    if every and not math.isclose(min(every), max(every), rel_tol=0.05):
        listed = ", ".join(
            f"{name} {' and '.join(f'{mpp:g}' for mpp in values)}"
            for name, values in stated.items()
            if values
        )
        return [
            f"The pictures differ in resolution ({listed} microns per pixel); the distance measures that."
        ]
    return []
