"""Fixtures that every room uses."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real histology; tests on it skip where it is absent."""
    place = Path(os.environ.get("PIXCELL_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (place / "index.csv").is_file():
        pytest.skip(f"real histology is not at {place} (set PIXCELL_SHARED_DATA)")
    return place
