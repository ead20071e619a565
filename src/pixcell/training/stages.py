"""How stages chain: a denoiser for the fields of a recipe, from scratch or grown from another run's.

What a model was trained on stands beside its weights (``pixcell.json``). A stage that would hand it the
latents of another autoencoder, the embeddings of another encoder, or another architecture is refused before
anything is computed. What became of each tensor is said in the log and kept as ``growth.json`` in the run.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pixcell.config import Config
from pixcell.console import console
from pixcell.data.datasets import FieldDataset
from pixcell.diffusion.conditioning import encoder_difference
from pixcell.diffusion.noise_schedules import Target
from pixcell.diffusion.pipelines import load_transformer
from pixcell.errors import ModelError, PixCellError, RecipeError
from pixcell.models.configurations import config_in
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.models.weights import fit_weights
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.run_state import WeightsChoice, weights_of

__all__ = ["TransformerConfig", "architecture_of", "make_transformer", "weights_folder"]


class TransformerConfig(Config):
    """Architecture of a :class:`PixCellTransformer2DModel`, and what it starts from."""

    name: Literal["transformer"]
    init: Path | None = None
    """Run, checkpoint or pipeline to start from, grown to the new size. None: from scratch."""
    init_weights: WeightsChoice = "trained"
    """Of a run or checkpoint: the weights themselves (``trained``), as the published stages do, their average
    (``averaged``), or that of another decay the run kept (``averaged-0.999``)."""
    redraw_unconditional: bool = False
    """Draw new "no condition" tokens when a stage begins, as the released code does. Else those of the stage
    before are spread over the new grid, and "no condition" keeps its meaning."""
    num_layers: int = Field(28, gt=0)
    num_attention_heads: int = Field(16, gt=0)
    attention_head_dim: int = Field(72, gt=0)
    patch_size: int = Field(2, gt=0)
    interpolation_scale: float | None = Field(None, gt=0)
    """Of positions. None: the published rule, field size / 512 px, kept when a model grows."""

    @model_validator(mode="after")
    def _something_is_redrawn(self) -> Self:
        if self.redraw_unconditional and self.init is None:
            raise ValueError(
                "redraw_unconditional is for a stage that starts from another: set model.init or leave it out"
            )
        return self


def architecture_of(
    model: TransformerConfig, learn_variance: bool, latent_channels: int, embedding_dim: int
) -> dict[str, Any]:
    """Return what stays equal when a model grows, as arguments of :class:`PixCellTransformer2DModel`."""
    return {
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "attention_head_dim": model.attention_head_dim,
        "patch_size": model.patch_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels * (2 if learn_variance else 1),
        "caption_channels": embedding_dim,
    }


def make_transformer(
    model: TransformerConfig,
    learn_variance: bool,
    target: Target,
    fields: FieldDataset,
    checkpoint: Checkpoint | None = None,
) -> tuple[PixCellTransformer2DModel, Mapping[str, Any] | None]:
    """Make a model for these fields, or grow the one that the stage starts from.

    Args:
        model: Its architecture.
        learn_variance: Whether it has channels for the variance of a step.
        target: What it predicts.
        fields: What it is trained on: they decide sizes, channels and widths.
        checkpoint: Of the run itself, if it goes on: the trainer will put its weights in, so those of the
            stage before need not be there any more, and are not read.

    Returns:
        The model; and, where it grew, what became of each tensor, as JSON values.

    Raises:
        RecipeError: If latents are no whole number of patches.
        ModelError: If the model to start from is of another encoder, autoencoder or architecture.
        RunError: If there is nothing to start from, or it is damaged.
    """
    shapes = fields.shapes
    channels, side, _ = shapes["posterior_mean"]
    rows, columns, width = shapes["embedding_grid"]
    num_tokens = rows * columns
    if side % model.patch_size:
        raise RecipeError(
            f"data.size {fields.size} gives latents of {side} x {side}, which are no whole number of latent "
            f"patches of {model.patch_size}. Choose another data.size or model.patch_size."
        )
    architecture = architecture_of(model, learn_variance, channels, width)
    if model.init is None:
        return PixCellTransformer2DModel(
            **architecture,
            cross_attention_dim=None,
            sample_size=side,
            caption_num_tokens=num_tokens,
            interpolation_scale=model.interpolation_scale,
        ), None
    if checkpoint is not None:
        return _empty_like(checkpoint), None
    source, facts, origin = _initial(model.init, model.init_weights)
    _must_agree(facts, fields, model.init)
    _must_predict(facts, target, model.init)
    _must_be(architecture, source, model.init)
    grown, report = source.grown_to(
        side, num_tokens, model.interpolation_scale, redraw_unconditional=model.redraw_unconditional
    )
    console.print(f"from {model.init}: {report}", markup=False)
    sizes = {
        name: {"latents": one.config.sample_size, "condition_tokens": one.config.caption_num_tokens}
        for name, one in (("before", source), ("after", grown))
    }
    lists = {
        "carried": list(report.carried),
        "rebuilt": dict(report.rebuilt),
        "dropped": dict(report.dropped),
    }
    return grown, {"init": str(model.init), **origin, **sizes, **lists}


def weights_folder(place: str) -> str | Path:
    """Return the pipeline folder of a run or checkpoint; anything else as it is."""
    path = Path(place)
    if (path / "recipe.yaml").is_file() or (path / "checkpoint.json").is_file():
        return Checkpoint.find(path).pipeline
    return place


def _empty_like(checkpoint: Checkpoint) -> PixCellTransformer2DModel:
    """Make a model of a checkpoint's architecture and positions, without its weights."""
    try:
        config = config_in(checkpoint.pipeline / "transformer", PixCellTransformer2DModel)
    except PixCellError:
        checkpoint.verify()  # says which file is damaged, and how to go on
        raise
    return PixCellTransformer2DModel(**config)


def _initial(
    place: Path, weights: str
) -> tuple[PixCellTransformer2DModel, Mapping[str, Any], dict[str, Any]]:
    """Load the transformer of a run, checkpoint or pipeline folder, the facts beside it, and its origin."""
    folder, checkpoint, origin = place, None, {}
    if not (place / "transformer").is_dir():
        checkpoint = Checkpoint.find(place)
        checkpoint.verify("pipeline")
        folder = checkpoint.pipeline
        origin = {"checkpoint": str(checkpoint.path), "step": checkpoint.step, "weights": weights}
    elif weights not in ("trained", "averaged"):
        raise ModelError(
            f"model.init {place} is a pipeline, which holds one set of weights; {weights!r} can be taken "
            "from a run or checkpoint. Give that, or leave out model.init_weights."
        )
    if not (folder / "transformer" / "config.json").is_file():
        raise ModelError(
            f"model.init {place} holds no transformer: give a run that trained one, or a pipeline folder."
        )
    transformer = load_transformer(folder / "transformer")
    if checkpoint is not None and weights != "averaged":
        values = weights_of(checkpoint, weights, transformer.state_dict())
        if values is None:
            raise ModelError(
                f"model.init {place} trained another model than the transformer in its pipeline. Give the "
                "run that trained it, or take the one in the pipeline: model.init_weights=averaged."
            )
        fit_weights(transformer, values, str(checkpoint.state))
    facts = folder / "pixcell.json"
    return transformer, json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}, origin


def _must_agree(facts: Mapping[str, Any], fields: FieldDataset, place: Path) -> None:
    """Refuse a stage whose latents or embeddings are not those that the model was trained on."""
    for kind, part in (("latents", "codec"), ("embeddings", "encoder")):
        before, now = facts.get(part), fields.made_by[kind][part]
        # Published models know their encoder by its name alone.
        if before and encoder_difference(before, now):
            raise ModelError(
                f"model.init {place} was trained on {kind} by {_named(before)}; "
                f"the store holds those by {_named(now)}. "
                "Encode the store with the first, or train from scratch."
            )
    before, now = facts.get("field_size"), fields.made_by["embeddings"].get("field_size")
    if before and now and before != now:
        raise ModelError(
            f"model.init {place} was trained on embeddings of fields of {before} px; the store's describe "
            f"fields of {now} px. Encode it with --field-size {before}, or train from scratch."
        )
    if facts.get("mpp") and not math.isclose(facts["mpp"], fields.mpp, rel_tol=0.01):
        console.print(
            f"{place} was trained at {facts['mpp']} microns per pixel and goes on at {fields.mpp}.",
            style="yellow",
            markup=False,
        )


def _must_predict(facts: Mapping[str, Any], target: Target, place: Path) -> None:
    before = facts.get("target", "noise")
    if before != target:
        raise ModelError(
            f"model.init {place} predicts the {before}, and objective.target is {target!r}. "
            f"Set objective.target={before}, or train from scratch."
        )


def _must_be(architecture: Mapping[str, Any], source: PixCellTransformer2DModel, place: Path) -> None:
    differing = [
        f"{name} {source.config[name]} instead of {value}"
        for name, value in architecture.items()
        if source.config[name] != value
    ]
    if differing:
        raise ModelError(
            f"model.init {place} is another architecture: {', '.join(differing)}. "
            "Give the recipe the values of the model that it starts from."
        )


def _named(maker: Mapping[str, Any]) -> str:
    """A name and the beginning of a hash, as far as they are known."""
    digest = maker.get("sha256")
    return f"{maker.get('name')!r}" + (f" ({digest[:12]})" if digest else "")
