"""Fit a prior to the embeddings of a store, to draw conditions from; find real fields that stand for others.

    OUT/prior.json, prior.safetensors              what `pixcell sample --prior OUT` draws from
    OUT/prototypes.json, prototypes.safetensors    with ``prototypes``: real fields, chosen per label ...
    OUT/prototypes/<label>/*.png                   ... and their pictures, for `pixcell sample --like`

The prior is of whole pictures: for a model of 4 x 4 fields, of grids of 4 x 4 embeddings, so that neighbours
in a drawn grid fit each other as neighbours in tissue do.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from pixcell.console import Advance, console, facts, progress
from pixcell.data.datasets import FieldDataset
from pixcell.data.index import tiles_where
from pixcell.data.store import TileStore
from pixcell.diffusion.directions import coefficients_of
from pixcell.diffusion.fitting import fit_mixture
from pixcell.diffusion.priors import PRIOR_FILE
from pixcell.diffusion.prototypes import PROTOTYPES_FILE, Prototypes, find_prototypes
from pixcell.errors import MissingColumn, ModelError, OutputError, RecipeError, StoreError, listed
from pixcell.files import write_whole, writing_to
from pixcell.provenance import environment

__all__ = ["PriorResult", "fit_prior"]

_READ_AT_ONCE = 64 * 2**20
"""Bytes of embeddings, in double precision, that are worked on together."""
_PICTURES = "prototypes"


@dataclass(frozen=True)
class PriorResult:
    """What was fitted."""

    out: Path
    fitted_to: str
    """Store and column."""
    number: int
    """Grids it was fitted to."""
    rows: int
    columns: int
    num_components: int
    rank: int
    explained: float
    """Share of the variance along the directions that were kept."""
    per_label: Mapping[str, int]
    num_unlabelled: int
    """Tiles left out because they carry no label."""
    num_prototypes: int
    seconds: float

    def __rich__(self) -> Table:
        """Lay the result out for a terminal."""
        fields = "single fields" if self.rows * self.columns == 1 else f"{self.rows} x {self.columns} fields"
        labels = ", ".join(f"{label} ({number})" for label, number in self.per_label.items())
        entries = {
            "fitted to": f"{self.number} embeddings of {fields}, {self.fitted_to}",
            "gaussians": f"{self.num_components} along {self.rank} directions, which hold "
            f"{100 * self.explained:.1f} % of the variance; the rest is noise per dimension",
            "labels": (labels or "none")
            + (f"; {self.num_unlabelled} tiles without one left out" if self.num_unlabelled else ""),
            "prototypes": f"{self.num_prototypes} in {self.out / _PICTURES}"
            if self.num_prototypes
            else "none",
            "time": f"{self.seconds:.1f} s",
        }
        return facts(f"Prior in {self.out}", entries)


def fit_prior(
    store: Path,
    out: Path,
    *,
    column: str | None = None,
    size: int | None = None,
    by: str | None = None,
    components: int = 1,
    rank: int | None = None,
    shrinkage: float | None = None,
    prototypes: int = 0,
    where: dict[str, list[str]] | None = None,
    max_fields: int = 50_000,
    seed: int = 0,
    overwrite: bool = False,
) -> PriorResult:
    """Fit a prior over embeddings.

    Args:
        store: A store with a column of embeddings.
        out: Folder of the prior.
        column: The column. None: the only one there is.
        size: Side of the pictures that the model makes, in pixels. None: one field of the column.
        by: Attribute of the tiles (label, organ, slide_id, ...) whose values get components of their own.
            Tiles without it are left out.
        components: Gaussians per label (or in all). 1: a Gaussian; more: a mixture.
        rank: Directions that are kept. None: at most 256.
        shrinkage: 0 to 1. None: by the number of embeddings.
        prototypes: Real fields to choose per label.
        where: Attributes of tiles to take, such as ``{"split": ["train"]}``.
        max_fields: At most so many, evenly spread over the store.
        seed: Of what is drawn while fitting.
        overwrite: Replace a prior that is there.

    Raises:
        RecipeError: If numbers make no sense.
        StoreError: If there is no such store, column, attribute or field.
        ModelError: If there are too few embeddings.
        OutputError: If there is a prior already, or ``out`` cannot be written.
    """
    started = time.monotonic()
    out = Path(out)
    for name, value, least in (
        ("--components", components, 1),
        ("--prototypes", prototypes, 0),
        ("max_fields", max_fields, 2),
        ("rank", 1 if rank is None else rank, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise RecipeError(f"{name} {value} must be at least {least}.")
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise RecipeError(f"shrinkage {shrinkage} must be 0 (as measured) to 1 (variances only).")
    if (out / PRIOR_FILE).exists() and not overwrite:
        raise OutputError(f"there is a prior in {out} already. Choose another folder, or --overwrite it.")
    opened = TileStore.open(Path(store))
    fields = _Fields(opened, _column(opened, column), size, by, where or {}, max_fields)
    described = {
        "encoder": fields.made_by["encoder"],
        "field_size": fields.made_by["field_size"],
        "mpp": opened.mpp,
        "fitted_to": {
            "store": opened.path.resolve().name,
            "column": fields.column,
            "where": where or {},
            "by": by,
            "fields": len(fields),
            "fields_in_all": fields.number_in_all,
            "tiles_without_label": fields.num_unlabelled,
        },
        "made_with": environment(),
    }
    with progress(f"reading {fields.column}") as advance:
        found = coefficients_of(lambda: fields.batches(advance), rank, seed)
    prior = fit_mixture(
        found, described, labels=fields.labels, components=components, shrinkage=shrinkage, seed=seed
    )
    num_prototypes = 0
    _remove_prototypes(out)
    if prototypes:
        chosen = find_prototypes(
            found,
            fields.batches,
            fields.keys,
            described,
            labels=fields.labels,
            per_label=prototypes,
            seed=seed,
        )
        chosen.save(out, replace=True)
        _write_pictures(out / _PICTURES, chosen, fields)
        num_prototypes = len(chosen.keys)
    prior.save(out, replace=overwrite)
    return PriorResult(
        out=out,
        fitted_to=f"{opened.path.name}, {fields.column}",
        number=len(fields),
        rows=prior.grid_shape[0],
        columns=prior.grid_shape[1],
        num_components=len(prior.labels),
        rank=len(prior.basis),
        explained=prior.facts["explained"],
        per_label=prior.facts["per_label"],
        num_unlabelled=fields.num_unlabelled,
        num_prototypes=num_prototypes,
        seconds=time.monotonic() - started,
    )


class _Fields:
    """The embedding grids that are fitted to, with their labels, read in passes."""

    def __init__(
        self,
        store: TileStore,
        column: str,
        size: int | None,
        by: str | None,
        where: Mapping[str, Sequence[str]],
        max_fields: int,
    ) -> None:
        self.column = column
        self.made_by = store.column(column).made_by
        size = int(self.made_by["field_size"]) if size is None else size
        self._store, self._size, self._where = store, size, where
        self._dataset = FieldDataset(store, size=size, embeddings=column, where=where)
        self.number_in_all = len(self._dataset)
        per_tile = self.number_in_all // self._dataset.num_tiles
        places = np.arange(self.number_in_all)
        labels, self.num_unlabelled = None, 0
        if by is not None:
            of_tile = np.array(_labels(store, by, where), dtype=object)
            labels = of_tile.repeat(per_tile)
            labelled = np.array([label is not None for label in labels])
            self.num_unlabelled = int((~labelled).sum()) // per_tile
            places, labels = places[labelled], labels[labelled]
            if self.num_unlabelled:
                console.print(f"{self.num_unlabelled} tiles have no {by} and are left out.", markup=False)
        if len(places) > max_fields:
            taken = np.linspace(0, len(places) - 1, max_fields).round().astype(int)
            places, labels = places[taken], None if labels is None else labels[taken]
        self.places: list[int] = places.tolist()
        self.labels: list[str] | None = None if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def keys(self) -> list[str]:
        return [self._dataset.key(place) for place in self.places]

    def batches(self, advance: Advance | None = None) -> Iterator[Tensor]:
        """Read everything once, (number, rows, columns, dim)."""
        record = self._dataset[self.places[0]]["embedding_grid"].numel() if self.places else 1
        at_once = max(1, _READ_AT_ONCE // (8 * record))
        for start in range(0, len(self), at_once):
            taken = self.places[start : start + at_once]
            grids = torch.stack([item["embedding_grid"] for item in self._dataset.__getitems__(taken)])
            bad = (~grids.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
            if bad:
                raise ModelError(
                    f"the embedding of {self._dataset.key(taken[bad[0]])} holds NaN or infinity. Delete its "
                    f"slide's shard in {self.column} and encode it again in float32."
                )
            yield grids
            if advance is not None:
                advance(len(taken))

    def pictures(self, keys: Sequence[str]) -> Iterator[np.ndarray]:
        """Read the pixels of fields, (height, width, 3)."""
        pixels = FieldDataset(self._store, size=self._size, images=True, where=self._where)
        place_of = dict(zip(self.keys, self.places, strict=True))
        for key in keys:
            yield pixels[place_of[key]]["image"].permute(1, 2, 0).numpy()


def _column(store: TileStore, given: str | None) -> str:
    if given is not None:
        return given
    found = [each.name for each in store.summary() if each.made_by.get("kind") == "embeddings"]
    if len(found) != 1:
        there = f"has several: {listed(found)}. Name one with --column" if found else "has none"
        advice = "." if found else ". Run `pixcell encode STORE --encoder ...` first."
        raise MissingColumn(f"a prior is fitted to a column of embeddings, and {store.path} {there}{advice}")
    return found[0]


def _labels(store: TileStore, by: str, where: Mapping[str, Sequence[str]]) -> list[str | None]:
    """Return what each tile carries, in the order of the dataset."""
    index = tiles_where(store.index(), where)
    attributes = ["slide_id", *index.column_names[index.column_names.index("name") + 1 :]]
    if by not in attributes:
        near = get_close_matches(by, attributes, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Attributes: {listed(attributes)}."
        raise StoreError(f"no tile of the store has an attribute {by!r}. {hint}")
    labels: list[str | None] = index[by].to_pylist()
    if all(label is None for label in labels):
        raise StoreError(f"none of the chosen tiles has the attribute {by!r}.")
    return labels


def _write_pictures(folder: Path, chosen: Prototypes, fields: _Fields) -> None:
    """Write the pixels of the prototypes, a folder per label."""
    for place, pixels in enumerate(fields.pictures(chosen.keys)):
        label = chosen.labels[place]
        name = f"{place:03d}_{_file_name(chosen.keys[place])}.png"
        with write_whole(folder / _file_name("all" if label is None else label) / name) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")


def _remove_prototypes(out: Path) -> None:
    """Take away those of an earlier prior, or of one that was not finished; nothing else."""
    if not (out / PROTOTYPES_FILE).exists():
        return
    with writing_to(out):
        for picture in (out / _PICTURES).glob("*/[0-9][0-9][0-9]*_*.png"):
            picture.unlink()
        (out / PROTOTYPES_FILE).unlink()


def _file_name(text: str) -> str:
    return re.sub(r"[/\\\x00-\x1f]+", "_", text).strip(".") or "unnamed"
