"""Which weights of a training run are handed on: those trained, or one of their averages.

``pipeline/`` of a checkpoint holds the first average. Another choice is put together as a pipeline of its
own, with the weights from ``state/`` in it.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from pixcell.errors import ModelError
from pixcell.models.weight_files import open_weights, weight_files_in
from pixcell.training.checkpoints import Checkpoint, link_or_copy
from pixcell.training.run_state import weights_of

__all__ = ["RunExport", "run_export"]

_FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class RunExport:
    """Weights of a run, as a folder to open."""

    place: Path
    name: str
    """Of the run, with the step."""
    notes: tuple[str, ...]
    """Which weights they are, for people."""


@contextlib.contextmanager
def run_export(source: str, weights: str, scratch: Path) -> Iterator[RunExport | None]:
    """Give the pipeline of a run or checkpoint with the wanted weights in it; None if ``source`` is neither.

    Args:
        source: A run (its last checkpoint), a checkpoint, or anything else.
        weights: ``auto`` and ``averaged``: those in ``pipeline/``; ``trained``; or ``averaged-<decay>``.
        scratch: A folder that does not exist; it is there while the block lasts, if it is needed.

    Raises:
        RunError: If there is no checkpoint, it is damaged, or it does not keep such weights.
        ModelError: If other weights than those in ``pipeline/`` would not fit the rest of it.
    """
    path = Path(source)
    if not any((path / name).exists() for name in ("recipe.yaml", "checkpoint.json")):
        yield None
        return
    checkpoint = Checkpoint.find(path)
    checkpoint.verify("pipeline")
    name = f"{checkpoint.facts.get('run', path.name)}, step {checkpoint.step}"
    note = f"{'averaged' if weights == 'auto' else weights} weights of {name}"
    # An autoencoder is one model, not a pipeline of several.
    is_pipeline = (checkpoint.pipeline / "model_index.json").is_file()
    place = checkpoint.pipeline if is_pipeline else checkpoint.pipeline / "vae"
    if weights in ("auto", "averaged"):
        yield RunExport(place, name, (note,))
        return
    if not is_pipeline:
        raise ModelError(
            f"{source} trained an autoencoder, whose scale of latents was measured with the averaged weights "
            f"and is no other's. Convert those: leave out --weights {weights}."
        )
    link_or_copy(checkpoint.pipeline, scratch)
    try:
        _replace_weights(checkpoint, weights, scratch)
        yield RunExport(scratch, name, (note,))
    finally:
        shutil.rmtree(scratch)


def _replace_weights(checkpoint: Checkpoint, weights: str, folder: Path) -> None:
    """Put the wanted weights into the models of a pipeline that the run trained; others are frozen."""
    num_replaced = 0
    for part in sorted(path for path in folder.iterdir() if (path / "config.json").is_file()):
        stored = open_weights(part)
        values = weights_of(checkpoint, weights, stored.shapes)
        if values is None:
            continue
        # The files are links to the run's own: taken away, not written over.
        for file in {*weight_files_in(part), *part.glob("*.index.json")}:
            file.unlink()
        save_file(values, part / _FILE, metadata={"format": "pt"})
        num_replaced += 1
    if not num_replaced:
        raise ModelError(
            f"{checkpoint.path} keeps its weights under names that no model in its pipeline has; only the "
            "averaged ones, which stand in the pipeline, can be converted. Leave out --weights."
        )
