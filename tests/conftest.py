"""Fixtures that every room uses."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pixcell.data.drawn import DrawnSlide


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real histology; tests on it skip where it is absent."""
    place = Path(os.environ.get("PIXCELL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (place / "index.csv").is_file():
        pytest.skip(f"real histology is not at {place} (set PIXCELL_SHARED_DATA)")
    return place


@pytest.fixture(scope="session")
def drawn_slide(tmp_path_factory: pytest.TempPathFactory) -> "DrawnSlide":
    """A small drawn slide, 2048 x 2048 pixels at 0.5 microns: tissue on glass, three levels."""
    from pixcell.data.drawn import draw_slide

    return draw_slide(tmp_path_factory.mktemp("slides") / "drawn.tiff", 2048, 2048, mpp=0.5, seed=0)
