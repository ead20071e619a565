"""How near draws of a prior come to embeddings that it was not fitted to, for several kinds of prior.

    python benchmarks/priors.py STORE [--column NAME] [--by label]

Fits to the tiles of split ``train`` and compares as many draws as there are fields in the other splits with
these. Kernel distance (smaller is nearer); precision and recall among 5 neighbours: how many draws lie among
real embeddings, and how many of these among the draws. The first row compares real embeddings of ``train``.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from pixcell.data.datasets import FieldDataset
from pixcell.data.store import TileStore
from pixcell.diffusion.priors import EmbeddingPrior
from pixcell.evaluation.metrics import kernel_distance, precision_recall
from pixcell.tasks.prior import fit_prior

KINDS = {
    "Gaussian, every dimension for itself": {"shrinkage": 1.0},
    "Gaussian": {},
    "Gaussian along 16 directions": {"rank": 16},
    "4 Gaussians": {"components": 4},
    "16 Gaussians": {"components": 16},
    "per label, 1 Gaussian": {"by": "LABEL"},
    "per label, 2 Gaussians": {"by": "LABEL", "components": 2},
}


def embeddings(store: TileStore, column: str, splits: list[str]) -> np.ndarray:
    fields = FieldDataset(
        store, size=store.column(column).made_by["field_size"], embeddings=column, where={"split": splits}
    )
    grids = torch.stack([item["embedding_grid"] for item in fields.__getitems__(range(len(fields)))])
    return grids.flatten(1).double().numpy()


def show(name: str, found: np.ndarray, real: np.ndarray) -> None:
    distance = kernel_distance(real, found, np.random.default_rng(0), num_subsets=20)
    coverage = precision_recall(real, found, 5)
    print(
        f"| {name} | {distance.value:.4f} ({distance.std:.4f}) | {coverage.precision:.2f} "
        f"| {coverage.recall:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--column", default="embeddings-stain-texture")
    parser.add_argument("--by", default="label")
    options = parser.parse_args()
    store = TileStore.open(options.store)
    splits = set(store.index()["split"].to_pylist()) - {None, "train"}
    held_out = embeddings(store, options.column, sorted(splits))
    train = embeddings(store, options.column, ["train"])
    print(f"{len(train)} embeddings of train, {len(held_out)} of {', '.join(sorted(splits))}\n")
    print("| prior | kernel distance (its scatter) | precision | recall |\n|---|---|---|---|")
    show(
        "real ones of train",
        train[np.random.default_rng(0).permutation(len(train))[: len(held_out)]],
        held_out,
    )
    for name, settings in KINDS.items():
        settings = {key: options.by if value == "LABEL" else value for key, value in settings.items()}
        with tempfile.TemporaryDirectory() as folder:
            fit_prior(
                options.store, Path(folder), column=options.column, where={"split": ["train"]}, **settings
            )
            prior = EmbeddingPrior.load(Path(folder))
        draws = [prior.sample(0, index).flatten() for index in range(len(held_out))]
        show(name, torch.stack(draws).double().numpy(), held_out)


if __name__ == "__main__":
    main()
