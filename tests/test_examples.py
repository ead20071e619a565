"""The examples run as they stand, offline, and leave what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMISES = {
    "01_read_a_slide.py": (["drawn.tiff", "."], ["centre-0.5mpp.png", "centre-1mpp.png"]),
    "02_tile_a_slide.py": (["."], ["first-tile.png", "store/store.json"]),
    "03_train_tiny.py": (["."], ["nano-codec/recipe.yaml", "nano/metrics.jsonl"]),
    "04_stain.py": (["."], ["he.png", "her2.png", "her2/lora/pytorch_lora_weights.safetensors"]),
    "05_draw_conditions.py": (["."], ["sheet.png", "prior/prior.json", "prior/prototypes/all"]),
}


def test_every_example_is_promised_something():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", sorted(PROMISES))
def test_example_runs(name, tmp_path):
    arguments, results = PROMISES[name]
    ended = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert [path for path in results if not (tmp_path / path).exists()] == []
