"""Explain whatever one is pointed at."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from pixcell.config import find_recipe, recipe_names
from pixcell.data.pack_format import is_pack
from pixcell.data.slides import SLIDE_SUFFIXES, find_slides
from pixcell.errors import PixCellError, UnreadableSlide
from pixcell.provenance import read_provenance
from pixcell.tasks.explain import (
    explain_folder,
    explain_pack,
    explain_picture,
    explain_report,
    explain_slide,
    explain_store,
)
from pixcell.tasks.explain_models import (
    explain_checkpoint,
    explain_model,
    explain_pickle,
    explain_pipeline,
    explain_prior,
    explain_recipe,
    explain_run,
    explain_weights,
)
from pixcell.tasks.facts import Facts

__all__ = ["Facts", "inspect"]

_KINDS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path, bool], Facts]], ...] = (
    # The first that recognises the path explains it; so the most particular stand first.
    ("a tile store (folder with store.json)", lambda path: (path / "store.json").is_file(), explain_store),
    ("a pack of shards (folder with pack.json)", is_pack, explain_pack),
    (
        "a checkpoint (folder with checkpoint.json)",
        lambda path: (path / "checkpoint.json").is_file(),
        explain_checkpoint,
    ),
    ("a prior (folder with prior.json)", lambda path: (path / "prior.json").is_file(), explain_prior),
    ("a training run (folder with recipe.yaml)", lambda path: (path / "recipe.yaml").is_file(), explain_run),
    (
        "a pipeline (folder with model_index.json or pixcell.json)",
        lambda path: (path / "model_index.json").is_file() or (path / "pixcell.json").is_file(),
        explain_pipeline,
    ),
    ("a model (folder with config.json)", lambda path: (path / "config.json").is_file(), explain_model),
    (
        "a slide (file, or folder of DICOM instances)",
        lambda path: path.is_dir() and _slides_in(path) == [path],
        explain_slide,
    ),
    (
        "a folder of slides or pictures",
        lambda path: path.is_dir() and bool(_slides_in(path)),
        explain_folder,
    ),
    ("a recipe (.yaml)", lambda path: path.suffix.lower() in (".yaml", ".yml"), explain_recipe),
    ("a report (.json)", lambda path: _is_report(path), explain_report),
    ("weights (.safetensors)", lambda path: path.suffix == ".safetensors", explain_weights),
    (
        "weights (.ckpt, .pth, .pt, .bin)",
        lambda path: path.is_file() and path.suffix in (".ckpt", ".pth", ".pt", ".bin"),
        explain_pickle,
    ),
    ("a generated picture (.png)", lambda path: _has_record(path), explain_picture),
    ("a slide or image", lambda path: path.suffix.lower() in SLIDE_SUFFIXES, explain_slide),
)


def inspect(path: Path, *, verify: bool = False) -> Facts:
    """Say what something is: resolution and where it was read, contents, provenance.

    Knows slides, folders of slides or pictures, tile stores, packs, recipes, training runs, checkpoints,
    pipelines, models, weight files, priors, generated pictures and reports.

    Args:
        path: The thing; recipes of the package also by name.
        verify: Read everything of a store, run or checkpoint and compare it with its checksums. What is wrong
            stands in ``problems``.

    Raises:
        PixCellError: If nothing is there, it is of no known kind (the kinds are listed), or it is damaged.
    """
    path = Path(path)
    if not path.exists() and path.stem in recipe_names() and path.suffix in ("", ".yaml"):
        path = find_recipe(path)
    if not path.exists():
        raise PixCellError(
            f"there is no {path}: it is neither a file or folder nor a recipe of the package "
            f"({', '.join(recipe_names())})."
        )
    for _, recognises, explain in _KINDS:
        if recognises(path):
            return explain(path, verify)
    if path.is_file():  # a slide may have any ending when it is named directly
        with contextlib.suppress(UnreadableSlide):
            return explain_slide(path, verify)
    known = "; ".join(name for name, _, _ in _KINDS)
    what = "this folder" if path.is_dir() else f"a file of this kind ({path.suffix or 'no ending'})"
    raise PixCellError(f"{path}: {what} is nothing that pixcell can explain. It knows {known}.")


def _slides_in(folder: Path) -> list[Path]:
    try:
        return find_slides(folder)
    except UnreadableSlide:  # its way to say that there are none
        return []


def _is_report(path: Path) -> bool:
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PixCellError(f"{path} is not valid JSON: {error}.") from error
    return isinstance(content, dict) and content.get("format") == "pixcell-report"


def _has_record(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".png" and read_provenance(path) is not None
