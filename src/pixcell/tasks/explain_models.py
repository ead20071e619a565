"""What can be said about recipes, runs, checkpoints, pipelines and weights; see ``tasks.inspect``.

Nothing here loads a network: configurations are JSON, and the head of a weight file tells shapes and formats.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixcell.config import load_recipe
from pixcell.errors import ModelError, RecipeError, RunError, WrongWeights
from pixcell.tasks.facts import Facts, Section, flattened, size_of, size_text

__all__ = [
    "explain_checkpoint",
    "explain_model",
    "explain_pickle",
    "explain_pipeline",
    "explain_prior",
    "explain_recipe",
    "explain_run",
    "explain_weights",
]


def explain_run(path: Path, verify: bool = False) -> Facts:
    """Explain a run folder; ``verify`` compares the files of every checkpoint."""
    from pixcell.training.checkpoints import Checkpoint
    from pixcell.training.metrics import read_metrics

    recipe = explain_recipe(path / "recipe.yaml")
    problems: list[str] = []
    rows = []
    for folder in sorted((path / "checkpoints").glob("step-*")):
        try:
            checkpoint = Checkpoint.open(folder)
            rows.append((checkpoint.step, folder.name, size_text(size_of(folder))))
            if verify:
                checkpoint.verify()
        except RunError as error:
            problems.append(str(error))
    metrics = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else []
    settings = recipe.section("settings")
    wanted = settings.get("trainer.steps")
    last = max((step for step, *_ in rows), default=0)
    entries = {
        "recipe": settings.get("name"),
        "objective": settings.get("objective.name"),
        "steps": _progress(last, wanted, settings.get("trainer.epochs")),
        "checkpoints": len(rows),
        "previews": sum(1 for _ in (path / "previews").glob("*")) if (path / "previews").is_dir() else 0,
        "size on disk": size_text(size_of(path)),
    }
    sections = [
        Section("run", entries),
        Section("checkpoints", columns=("step", "folder", "on disk"), rows=rows),
        # A line holds what was measured at its step; together they tell the newest of each figure.
        Section("last figures", {key: value for line in metrics for key, value in line.items()}),
    ]
    if (path / "environment.json").is_file():
        starts = _read_json(path / "environment.json")
        starts = starts if isinstance(starts, list) else [starts]
        if starts:
            sections.append(
                Section("environment at the last start", {"starts": len(starts), **flattened(starts[-1])})
            )
    sections.append(Section("recipe", settings))
    return Facts("training run", path, sections, problems, verified=verify)


def _progress(last: int, steps: object, epochs: object) -> str:
    """How far a run is. Steps follow from epochs and the number of samples, which a recipe does not know."""
    if steps is None:
        return f"{last} (the run is {epochs} epochs)" if epochs else str(last)
    return f"{last} of {steps}" + (", complete" if last == steps else "")


def explain_checkpoint(path: Path, verify: bool = False) -> Facts:
    """Explain a checkpoint; ``verify`` compares its files."""
    from pixcell.training.checkpoints import Checkpoint

    checkpoint = Checkpoint.open(path)
    problems = []
    if verify:
        try:
            checkpoint.verify()
        except RunError as error:
            problems.append(str(error))
    stated = {key: value for key, value in checkpoint.facts.items() if key != "files"}
    sections = [
        Section("checkpoint", {**flattened(stated), "size on disk": size_text(size_of(path))}),
    ]
    if checkpoint.pipeline.is_dir():
        inside = explain_pipeline(checkpoint.pipeline)
        sections += inside.sections
        problems += inside.problems
    sections.append(Section("files", dict(checkpoint.facts["files"]), shown=False))
    return Facts("checkpoint of a training run", path, sections, problems, verified=verify)


def explain_pipeline(path: Path, verify: bool = False) -> Facts:
    """Explain a pipeline in the diffusers layout: its parts, and what its numbers mean."""
    del verify
    named = path / "model_index.json"
    # A run that trains an autoencoder only has parts without an index.
    index = _read_json(named) if named.is_file() else _parts_found(path)
    rows: list[Sequence[Any]] = []
    sections: list[Section] = []
    problems = []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2:
            continue
        if value[1] is None:
            rows.append((name, "left out", "", "", ""))
            continue
        folder = path / name
        if not folder.is_dir():
            problems.append(f"{name} ({value[1]}) is named in model_index.json, and {folder} is not there.")
            continue
        rows.append((name, value[1], *_weights_row(folder)))
        for config in (folder / "config.json", folder / "scheduler_config.json"):
            if config.is_file():
                sections.append(Section(name, flattened(_public(_read_json(config)))))
    facts_file = path / "pixcell.json"
    meaning = Section(
        "what its numbers mean", flattened(_read_json(facts_file)) if facts_file.is_file() else {}
    )
    stated = {"class": index.get("_class_name"), "diffusers": index.get("_diffusers_version")}
    entries = {key: value for key, value in stated.items() if value is not None}
    columns = ("part", "class", "parameters", "number format", "on disk")
    parts = Section("parts", columns=columns, rows=rows)
    return Facts("pipeline", path, [Section("pipeline", entries), parts, meaning, *sections], problems)


def explain_model(path: Path, verify: bool = False) -> Facts:
    """Explain a folder with one model: its configuration and the size of its weights."""
    del verify
    config = _read_json(path / "config.json")
    kind = config.get("_class_name") or config.get("architectures") or config.get("architecture")
    parameters, formats, on_disk = _weights_row(path)
    entries = {"class": kind, "parameters": parameters, "number format": formats, "weights on disk": on_disk}
    return Facts(
        "model", path, [Section("model", entries), Section("configuration", flattened(_public(config)))]
    )


def explain_prior(path: Path, verify: bool = False) -> Facts:
    """Explain a prior over embeddings; ``verify`` compares its numbers with their hash."""
    from pixcell.diffusion.priors import EmbeddingPrior, read_prior_facts

    facts = read_prior_facts(path)
    problems = []
    if verify:
        try:
            EmbeddingPrior.load(path)
        except ModelError as error:
            problems.append(str(error))
    labels = facts["component_labels"]
    encoder = {key: facts["encoder"].get(key) for key in ("name", "sha256", "dim", "licence")}
    entries = {
        "of": f"grids of {facts['rows']} x {facts['columns']} embeddings",
        "field size": f"{facts['field_size']} px at {facts['mpp']:g} microns per pixel",
        "fitted to": facts["number"],
        "gaussians": len(labels),
        "directions": facts["rank"],
        "variance along them": f"{100 * facts['explained']:.1f} %",
        "size on disk": size_text(size_of(path / "prior.safetensors")),
    }
    rows = [(label, number, labels.count(label)) for label, number in facts["per_label"].items()]
    sections = [
        Section("prior", entries),
        Section("labels", columns=("label", "embeddings", "gaussians"), rows=rows),
        Section("encoder", encoder),
        Section("how it was fitted", flattened({**facts["fitted_to"], "seed": facts["seed"]})),
    ]
    return Facts("prior over embeddings", path, sections, problems, verified=verify)


def explain_weights(path: Path, verify: bool = False) -> Facts:
    """Explain a safetensors file: what its header says."""
    del verify
    header = _safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    rows = [(name, each["dtype"], " x ".join(map(str, each["shape"]))) for name, each in header.items()]
    parameters, formats = _counted([header])
    entries = {
        "recognised as": _recognised(set(header)),
        "tensors": len(rows),
        "parameters": f"{parameters:,}",
        "number format": formats,
        "size on disk": size_text(size_of(path)),
    }
    return Facts(
        "file of weights",
        path,
        [
            Section("weights", entries),
            Section("metadata", metadata),
            Section("tensors", columns=("name", "format", "shape"), rows=rows),
        ],
    )


def explain_pickle(path: Path, verify: bool = False) -> Facts:
    """Explain a pickle of tensors: their names, shapes and formats; no value is read and nothing is run.

    Raises:
        WrongWeights: If it is damaged, or holds more than tensors.
    """
    del verify
    from pixcell.models.weight_files import open_weights

    stored = open_weights(path)
    rows = [
        (name, str(stored.dtypes[name]).removeprefix("torch."), " x ".join(map(str, shape)))
        for name, shape in stored.shapes.items()
    ]
    entries = {
        "recognised as": _recognised(set(stored.shapes)),
        "tensors": len(rows),
        "values": f"{sum(math.prod(shape) for shape in stored.shapes.values()):,}",
        "number format": ", ".join(str(dtype).removeprefix("torch.") for dtype in stored.floating_dtypes),
        "size on disk": size_text(size_of(path)),
        **({"taken from it": "; ".join(stored.notes)} if stored.notes else {}),
    }
    return Facts(
        "file of weights (pickle)",
        path,
        [
            Section("weights", entries),
            Section("tensors", columns=("name", "format", "shape"), rows=rows),
        ],
    )


def _recognised(names: set[str]) -> str:
    from pixcell.models.published import KINDS, recognise

    try:
        kind = recognise(names)
    except WrongWeights:
        return "nothing published that pixcell knows"
    return f"{KINDS[kind]} ({kind})"


def explain_recipe(path: Path, verify: bool = False) -> Facts:
    """Explain a recipe: every value, defaults included.

    Raises:
        RecipeError: If it is neither a tiling nor a training recipe, or not a valid one.
    """
    del verify
    import yaml

    from pixcell.data.tiling import TilingRecipe

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and "tiling" in content:
        kind, recipe = "tiling recipe", load_recipe(TilingRecipe, path).model_dump(mode="json")
    elif isinstance(content, dict) and {"objective", "trainer"} & set(content):
        from pixcell.training.recipe import TrainRecipe

        kind, recipe = "training recipe", load_recipe(TrainRecipe, path).model_dump(mode="json")
    else:
        raise RecipeError(
            f"{path} is YAML, and no recipe: one for tiling has a section 'tiling', one for training has "
            "'data', 'model', 'objective', 'optimizer' and 'trainer'."
        )
    return Facts(kind, path, [Section("settings", flattened(recipe))])


def _parts_found(folder: Path) -> dict[str, Any]:
    """Return the parts of a folder as ``model_index.json`` would name them."""
    configs = sorted(folder.glob("*/config.json"))
    return {config.parent.name: ["", _read_json(config).get("_class_name", "?")] for config in configs}


def _weights_row(folder: Path) -> tuple[str, str, str]:
    """Count parameters by the headers of weight files, without reading them."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = [file for file in folder.glob("*") if file.suffix in (".bin", ".pth", ".pt")]
        return ("?" if others else "–", "–", size_text(sum(map(size_of, others))) if others else "–")
    parameters, formats = _counted([_safetensors_header(file) for file in files])
    return f"{parameters:,}", formats, size_text(sum(map(size_of, files)))


def _counted(headers: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    tensors = [each for header in headers for name, each in header.items() if name != "__metadata__"]
    return sum(math.prod(each["shape"]) for each in tensors), ", ".join(
        sorted({each["dtype"] for each in tensors})
    )


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Read the JSON at the head of a safetensors file: eight bytes of length, then the text."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file: {error}. Copy or download it again."
        ) from error
    return header


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and value is not None}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}.") from error
