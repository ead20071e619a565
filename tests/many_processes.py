"""Train in one of several processes, one run after the other: FOLDER SCENARIO...

Runs stand in FOLDER/<scenario>, by FOLDER/recipe.yaml. Each process notes which samples its steps took, in
FOLDER/<scenario>.<rank>.jsonl.
"""

import json
import os
import signal
import sys
from pathlib import Path

from pixcell.config import load_recipe
from pixcell.errors import RunError
from pixcell.tasks.train import train
from pixcell.training.engine import Engine
from pixcell.training.recipe import TrainRecipe

RANK = int(os.environ.get("RANK", "0"))
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch` tells its processes, by recipes/accelerate/fsdp2.yaml."""
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
"""The same, by recipes/accelerate/deepspeed.yaml; on a CPU wherever the tests run."""
SCENARIOS = {
    "ddp": {},
    "micro": {"overrides": ["trainer.micro_batch_size=1"]},
    "fsdp2": {
        "overrides": ["trainer.steps=4", "trainer.micro_batch_size=1", "trainer.gradient_checkpointing=true"],
        "environment": FSDP2,
    },
    "told": {"moment": (3, 1, signal.SIGTERM)},
    "alone": {"run": "chain", "moment": (3, 0, signal.SIGKILL)},
    "pair": {"run": "chain", "moment": (5, 1, signal.SIGKILL)},
    "zero1": {
        "overrides": ["trainer.micro_batch_size=1"],
        "environment": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    },
    "zero2": {
        "overrides": ["trainer.steps=4", "trainer.micro_batch_size=1", "trainer.gradient_checkpointing=true"],
        "environment": ZERO,
    },
    "zero-killed": {"run": "zero-chain", "environment": ZERO, "moment": (5, 1, signal.SIGKILL)},
    "zero-rest": {
        "run": "zero-chain",
        "environment": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    },
    "zero-blown-up": {"environment": ZERO, "blown_up": (3, 1)},
}
"""``moment``: the signal that a process sends itself in a step: (step, process, signal); the first is 1.
``blown_up``: the step and the process whose gradient is infinite, though its losses are not."""


def train_scenario(folder, name, run=None, overrides=(), environment=None, moment=None, blown_up=None):
    """Train, noting the samples of each step."""
    whole = Engine.forward_backward

    def noting(self, batch, share, *rest):
        with (folder / f"{name}.{RANK}.jsonl").open("a") as file:
            file.write(json.dumps([batch["step"] + 1, list(batch["key"])]) + "\n")
        if moment and moment[:2] == (batch["step"] + 1, RANK):
            os.kill(os.getpid(), moment[2])
        if blown_up == (batch["step"] + 1, RANK):
            share = float("inf")
        return whole(self, batch, share, *rest)

    Engine.forward_backward = noting
    os.environ.update(environment or {})
    try:
        recipe = load_recipe(TrainRecipe, folder / "recipe.yaml", list(overrides))
        print(f"{name}.{RANK}: {train(recipe, folder / (run or name)).stopped_by}", flush=True)
    except RunError as error:
        print(f"{name}.{RANK}: {error}", flush=True)
        raise
    finally:
        Engine.forward_backward = whole
        for key in environment or {}:
            del os.environ[key]


if __name__ == "__main__":
    for scenario in sys.argv[2:]:
        train_scenario(Path(sys.argv[1]), scenario, **SCENARIOS[scenario])
