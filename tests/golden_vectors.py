"""Reading of tests/golden."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a case, copied to aligned memory, and its description."""
    tensors = {key: value.clone() for key, value in load_file(FOLDER / f"{name}.safetensors").items()}
    return tensors, json.loads((FOLDER / f"{name}.json").read_text())


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a case."""
    return {name[2:]: value for name, value in tensors.items() if name.startswith("w.")}
