"""Sets of drawn tissue to compare."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixcell.data.drawn import draw_tissue
from pixcell.provenance import save_synthetic_png

SIDE = 96


def cut(image: np.ndarray, side: int = SIDE) -> list[np.ndarray]:
    """Cut a picture into squares."""
    rows, columns = image.shape[0] // side, image.shape[1] // side
    return [
        image[row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(rows)
        for column in range(columns)
    ]


def generated(image: np.ndarray, amount: float) -> np.ndarray:
    """What a poor generator makes of a picture: paler, by ``amount``."""
    return np.clip(image + (255.0 - image) * amount, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def tissue() -> list[np.ndarray]:
    """36 squares of drawn tissue."""
    return cut(draw_tissue(6 * SIDE, 6 * SIDE, seed=3))


@pytest.fixture
def real(tmp_path: Path, tissue: list[np.ndarray]) -> Path:
    """A folder of 24 real pictures."""
    folder = tmp_path / "real"
    folder.mkdir()
    for number, image in enumerate(tissue[:24]):
        Image.fromarray(image).save(folder / f"case-{number:02d}.png")
    return folder


@pytest.fixture
def synthetic(tmp_path: Path, tissue: list[np.ndarray]) -> Path:
    """A folder of 12 generated pictures that name their references in ``real``."""
    folder = tmp_path / "synthetic"
    for number, image in enumerate(tissue[:12]):
        record = {
            "like": f"case-{number:02d}.png", "index": number, "seed": 1, "steps": 20, "guidance_scale": 2.0,
            "scheduler": "DPMSolverMultistepScheduler", "model": "nano", "model_sha256": "a" * 64, "mpp": 0.5,
        }  # fmt: skip
        save_synthetic_png(folder / f"{number:05d}.png", generated(image, 0.3), record)
    return folder
