"""Prototypes: real fields that stand for many, per label; and which of them an embedding is nearest to.

A prototype is a medoid: the member of a cluster that is nearest to its mean, which for squared Euclidean
distance is the one with the smallest sum of distances to all members. Unlike a mean it exists: its picture
can be shown.

    PROTOTYPES/prototypes.json, prototypes.safetensors
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.described import read_described, write_described
from pixcell.diffusion.directions import Batches, Coefficients
from pixcell.diffusion.fitting import clusters, rows_by_label
from pixcell.errors import ModelError, WrongWeights, listed

__all__ = ["PROTOTYPES_FILE", "Neighbour", "Prototypes", "find_prototypes"]

PROTOTYPES_FILE = "prototypes.json"
_NAME, _FORMAT = "prototypes", "pixcell-prototypes-1"
_ADVICE = "Find some with `pixcell prior STORE FOLDER --prototypes 3`."


@dataclass(frozen=True)
class Neighbour:
    """A prototype, as seen from an embedding."""

    key: str
    """Which field it is: ``<slide>/<x>_<y>/<row>_<column>``."""
    label: str | None
    distance: float
    """Euclidean, over the whole grid."""
    place: int
    """Among the prototypes."""


@dataclass(frozen=True)
class Prototypes:
    """Real fields that stand for others.

    Args:
        grids: Their embeddings, float32.
        labels: One each. None: without.
        keys: Which fields they are.
        counts: How many fields each stands for.
        facts: ``encoder``, ``field_size``, ``mpp``, and what they were chosen from.
    """

    grids: Float[Tensor, "number rows columns dim"]
    labels: tuple[str | None, ...]
    keys: tuple[str, ...]
    counts: tuple[int, ...]
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not len(self.grids) == len(self.labels) == len(self.keys) == len(self.counts):
            raise ValueError("every prototype has a grid, a label, a key and a count")

    @property
    def names(self) -> list[str]:
        """The labels there are, sorted."""
        return sorted({label for label in self.labels if label is not None})

    def places(self, label: str | None = None) -> list[int]:
        """Return which prototypes carry a label; None: all.

        Raises:
            ModelError: If none does.
        """
        places = [place for place, own in enumerate(self.labels) if label is None or own == label]
        if not places:
            known = listed(self.names, 20) or "none"
            raise ModelError(f"there is no prototype of {label!r}. Labels: {known}.")
        return places

    def conditioning(self, label: str | None = None) -> Conditioning:
        """Return the prototypes of a label as conditions that know their encoder."""
        return Conditioning(self.grids[self.places(label)], encoder=self.facts["encoder"])

    def nearest(
        self, grid: Float[Tensor, "rows columns dim"], *, label: str | None = None, most: int = 1
    ) -> list[Neighbour]:
        """Return the prototypes that are nearest to an embedding grid, the nearest first.

        Args:
            grid: Of the same encoder and size.
            label: Look among those of a label only.
            most: How many.

        Raises:
            ModelError: If the grid is of another size, not finite, or no prototype has the label.
        """
        if grid.shape != self.grids.shape[1:]:
            raise ModelError(
                f"an embedding grid of {tuple(grid.shape)} was given; the prototypes are of "
                f"{tuple(self.grids.shape[1:])}."
            )
        if not bool(grid.isfinite().all()):
            raise ModelError("the embeddings hold NaN or infinity.")
        places = self.places(label)
        apart = self.grids[places].double() - grid.double().to(self.grids.device)
        distances = apart.flatten(1).norm(dim=1)
        order = distances.argsort(stable=True)[:most].tolist()
        return [
            Neighbour(self.keys[places[i]], self.labels[places[i]], float(distances[i]), places[i])
            for i in order
        ]

    def save(self, folder: Path, *, replace: bool = False) -> None:
        """Write ``prototypes.safetensors`` and ``prototypes.json``.

        Raises:
            OutputError: If there are some already, unless they are to be replaced, or the place cannot be
                written.
        """
        rows = zip(self.keys, self.labels, self.counts, strict=True)
        chosen = [{"key": key, "label": label, "stands_for": count} for key, label, count in rows]
        facts = {**self.facts, "prototypes": chosen}
        write_described(Path(folder), _NAME, _FORMAT, {"grids": self.grids}, facts, replace)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read prototypes.

        Raises:
            MissingWeights: If there are none.
            WrongWeights: If a file is damaged, or they do not belong together.
        """
        tensors, facts = read_described(Path(folder), _NAME, _FORMAT, _ADVICE)
        try:
            chosen = facts.pop("prototypes")
            return cls(
                tensors["grids"],
                tuple(each["label"] for each in chosen),
                tuple(each["key"] for each in chosen),
                tuple(each["stands_for"] for each in chosen),
                facts,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WrongWeights(f"{folder} holds no whole prototypes ({error}). Find them again.") from error


def find_prototypes(
    found: Coefficients,
    batches: Batches,
    keys: Sequence[str],
    facts: Mapping[str, Any],
    *,
    labels: Sequence[str] | None = None,
    per_label: int = 1,
    seed: int = 0,
) -> Prototypes:
    """Choose real grids that stand for the others: per label, one of each cluster.

    Distances are those along the directions that were found.

    Args:
        found: The grids, along their leading directions.
        batches: Starts a pass over the grids, to read those that are chosen.
        keys: What the grids are called, in order.
        facts: At least ``encoder``, ``field_size`` and ``mpp``.
        labels: One per grid. None: without.
        per_label: Clusters per label; fewer where fewer different grids are.
        seed: Of the clusters.

    Raises:
        ModelError: If numbers make no sense.
    """
    if per_label < 1:
        raise ModelError(f"{per_label} prototypes per label are none; ask for at least 1.")
    if len(keys) != len(found.values):
        raise ModelError(f"{len(found.values)} embeddings were given with {len(keys)} keys.")
    chosen: list[tuple[int, str | None, int]] = []
    for label, rows in rows_by_label(len(found.values), labels).items():
        values = found.values[rows]
        count = min(per_label, len(torch.unique(values, dim=0)))
        belongs, centers = clusters(values, count, seed)
        for place, center in enumerate(centers):
            members = (belongs == place).nonzero().flatten()
            if len(members):
                nearest = (values[members] - center).square().sum(dim=1).argmin()
                chosen.append((int(rows[members[nearest]]), label, len(members)))
    grids = _picked(batches, [row for row, _, _ in chosen])
    num_rows, num_columns, dim = found.shape
    return Prototypes(
        grids=grids,
        labels=tuple(label for _, label, _ in chosen),
        keys=tuple(keys[row] for row, _, _ in chosen),
        counts=tuple(count for _, _, count in chosen),
        facts={
            **facts,
            "encoder": {**facts["encoder"], "dim": dim},
            "rows": num_rows,
            "columns": num_columns,
            "number": len(found.values),
            "seed": seed,
        },
    )


def _picked(batches: Batches, rows: Sequence[int]) -> Tensor:
    """Read some grids once more, in the order asked for."""
    wanted, kept, start = set(rows), {}, 0
    for batch in batches():
        for place in sorted(wanted & set(range(start, start + len(batch)))):
            kept[place] = batch[place - start].float().clone()
        start += len(batch)
    return torch.stack([kept[row] for row in rows])
