"""Measure the constants of ``stain-texture`` on open H&E tiles, one field per picture or original.

    python benchmarks/stain_texture_constants.py DATA

DATA holds ``index.csv`` (path, set, organ, stain, ...) and the pictures. Prints the table for
``pixcell/models/stain_texture.py``. Sets count equally, however many pictures they have.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixcell.models.stain_texture import StainTexture

SETS = {
    "lc25000_768": 256,
    "oral_hires": 256,
    "osteosarcoma": 256,
    "breakhis_400x": 256,
    "crc_val_he_7k": 224,
    "brca_m2c": 256,
    "tnbc_nuclei": 256,
    "brecahad": 256,
}
PER_SET = 150


def main(data: Path) -> None:
    paths = defaultdict(list)
    with (data / "index.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["set"] in SETS and Path(row["path"]).suffix == ".jpg":
                paths[row["set"]].append(data / row["path"])
    descriptor = StainTexture()
    per_set = []
    for name, size in SETS.items():
        chosen = np.random.default_rng(0).permutation(sorted(paths[name]))[:PER_SET]
        fields = [field for path in chosen for field in fields_of(path, size)][: 4 * PER_SET]
        per_set.append(torch.stack([descriptor.raw(field) for field in fields]))
        print(f"# {name}: {len(fields)} fields of {len(chosen)} pictures")
    mean = torch.stack([numbers.mean(0) for numbers in per_set]).mean(0)
    variance = torch.stack([(numbers - mean).square().mean(0) for numbers in per_set]).mean(0)
    mean, variance = pooled(mean), pooled(variance)
    # Directions and their signs are a matter of how a slide lies: centred at zero by definition.
    mean[38:48] = 0
    for center, spread in zip(mean.tolist(), variance.sqrt().tolist(), strict=True):
        print(f"    ({center:.3f}, {spread:.3f}),")


def pooled(numbers: torch.Tensor) -> torch.Tensor:
    """One value for the 16 cells of each map."""
    return torch.cat([numbers[:48], numbers[48:].view(5, 16).mean(1)])


def fields_of(path: Path, size: int) -> list[torch.Tensor]:
    picture = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
    height, width = picture.shape[-2:]
    return [
        picture[:, top : top + size, left : left + size]
        for top in range(0, height - size + 1, size)
        for left in range(0, width - size + 1, size)
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
