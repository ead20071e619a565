"""Alignment with stored embeddings: a helper of training that leaves no trace in what is used."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import default_collate

from pixcell.config import save_recipe
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.errors import MissingColumn, RecipeError, RunError, StoreMismatch
from pixcell.models.codec import LatentCodec
from pixcell.tasks.train import train
from pixcell.training.alignment import Alignment, AlignmentConfig
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.determinism import rng_for
from pixcell.training.metrics import read_metrics
from pixcell.training.recipe import build_objective
from pixcell.training.run_state import weights_of
from training_fixtures import make_store

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch` tells its processes, by recipes/accelerate/fsdp2.yaml."""
ALIGNED = "objective.alignment={column: embeddings-fine, layer: 1}"


def add_fine_column(store, field_size, name, seed=0):
    """Embeddings, five wide, of smaller fields than those of the condition."""
    side = 64 // field_size
    for slide_id in ("a", "b"):
        values = np.random.default_rng(seed).standard_normal((6, side, side, 5)).astype(np.float16)
        store.write_column(
            name,
            slide_id,
            iter([values]),
            shape=values.shape[1:],
            dtype=values.dtype,
            made_by={
                "kind": "embeddings",
                "field_size": field_size,
                "source": "images",
                "encoder": {"name": "fine", "sha256": f"{seed:064d}"},
            },
            num_tiles=6,
        )


@pytest.fixture(scope="module")
def fine_store(tmp_path_factory, codec_folder):
    store = make_store(tmp_path_factory.mktemp("fine") / "store", LatentCodec.from_pretrained(codec_folder))
    add_fine_column(store, 16, "embeddings-fine")
    add_fine_column(store, 8, "embeddings-too-fine")
    add_fine_column(store, 16, "embeddings-other", seed=1)
    return store


@pytest.fixture
def aligned(recipe, fine_store):
    """A recipe with alignment; overrides as on the command line."""
    return lambda *overrides: recipe(f"data.store={fine_store.path}", ALIGNED, *overrides)


def batch_of(objective, count=4, **more):
    drawn = objective.samples.draw(range(count), [rng_for(0, 0, place) for place in range(count)])
    return {**default_collate(drawn), **more}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def alignment():
    torch.manual_seed(0)
    return Alignment(AlignmentConfig(column="c", layer=1), 8, 2, num_tokens=16, num_embeddings=4, dim=5)


@torch.no_grad()
def test_it_is_zero_where_all_embeddings_are_met_and_two_where_they_are_opposed(alignment):
    tokens = torch.randn(3, 1, 8).expand(-1, 16, -1)
    met = alignment.projector(tokens[:, :4]).unflatten(1, (2, 2))
    torch.testing.assert_close(alignment(tokens, 7 * met), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(alignment(tokens, -met), torch.full((3,), 2.0), rtol=0, atol=1e-6)


@torch.no_grad()
def test_tokens_are_averaged_over_the_field_of_their_embedding(alignment):
    """Tokens may change places inside of a field, not between fields."""
    tokens, embeddings = torch.randn(2, 16, 8), torch.randn(2, 2, 2, 5)
    grid = tokens.unflatten(1, (4, 4))
    inside, between = grid.clone(), grid.clone()
    inside[:, 0, 0], inside[:, 1, 1] = grid[:, 1, 1], grid[:, 0, 0]
    between[:, 0, 0], between[:, 3, 3] = grid[:, 3, 3], grid[:, 0, 0]
    before = alignment(tokens, embeddings)
    torch.testing.assert_close(alignment(inside.flatten(1, 2), embeddings), before)
    assert not torch.allclose(alignment(between.flatten(1, 2), embeddings), before, atol=1e-4)


def test_the_loss_is_that_of_denoising_and_the_weighed_alignment(aligned):
    plain = build_objective(aligned("objective.alignment=null"))
    weighed = build_objective(aligned("objective.alignment.weight=0.25"))
    batch = batch_of(weighed, step=0)
    with torch.no_grad():
        without, found = plain.loss(batch), weighed.loss(batch)
    torch.testing.assert_close(found.per_sample, without.per_sample + 0.25 * found.parts["alignment"])
    assert torch.equal(found.parts["mse"], without.parts["mse"])
    assert set(found.parts) - set(without.parts) == {"alignment"}


def test_the_model_begins_as_it_would_without(aligned):
    plain = build_objective(aligned("objective.alignment=null"))
    assert same(plain.transformer.state_dict(), build_objective(aligned()).transformer.state_dict())


def test_a_sample_carries_the_embeddings_of_its_own_field(aligned, fine_store):
    samples = build_objective(aligned()).samples
    (drawn,) = samples.draw([9], [rng_for(0)])
    slide_id, place, field = drawn["key"].split("/")
    row, column = map(int, field.split("_"))
    stored = fine_store.column("embeddings-fine").array(slide_id)[int(place.split("_")[0])]
    expected = torch.from_numpy(stored[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].copy()).float()
    assert torch.equal(drawn["fine_embedding_grid"], expected)


@pytest.mark.parametrize(("step", "acts"), [(0, True), (3, True), (4, False)])
def test_it_ends_after_its_steps_and_every_weight_still_has_a_gradient(aligned, step, acts):
    objective = build_objective(aligned("objective.alignment.until_step=4"))
    losses = objective.loss(batch_of(objective, step=step))
    losses.per_sample.mean().backward()
    assert ("alignment" in losses.parts) is acts
    gradients = {name: weight.grad for name, weight in objective.trainable.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    moved = [gradient.abs().max() > 0 for name, gradient in gradients.items() if "projector" in name]
    assert any(moved) is acts


def test_checkpointed_activations_change_nothing(aligned):
    gradients = []
    for switch in (False, True):
        objective = build_objective(aligned())
        objective.trainable.train()
        if switch:
            objective.transformer.enable_gradient_checkpointing()
        objective.loss(batch_of(objective, step=0)).per_sample.mean().backward()
        gradients.append({name: weight.grad for name, weight in objective.trainable.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_projector_is_kept_with_the_run_and_not_with_the_model(aligned, tmp_path):
    checkpoint = Checkpoint.find(train(aligned("trainer.steps=2"), tmp_path / "run").run)
    pipeline = PixCellPipeline.from_pretrained(checkpoint.pipeline)
    names = pipeline.transformer.state_dict()
    assert not [name for name in names if "projector" in name]
    state = load_file(checkpoint.state / "weights.safetensors")
    assert {name.removeprefix("transformer.") for name in state if name.startswith("transformer.")} == set(
        names
    )
    assert [name for name in state if name.startswith("alignment.projector.")]
    averaged = weights_of(checkpoint, "averaged", names)
    assert torch.equal(averaged["proj_out.weight"], pipeline.transformer.proj_out.weight)


def test_an_aligned_run_that_was_stopped_is_the_undisturbed_one(aligned, tmp_path):
    """Also across the step where alignment ends, and with activations computed twice."""
    settings = (
        "objective.alignment.until_step=3",
        "trainer.keep_last=9",
        "trainer.gradient_checkpointing=true",
    )
    whole = train(aligned(*settings), tmp_path / "whole")
    train(aligned(*settings, "trainer.steps=2"), tmp_path / "parts")
    parts = train(aligned(*settings), tmp_path / "parts")
    for name in ("weights", "averages"):
        one, other = (
            load_file(result.checkpoint / "state" / f"{name}.safetensors") for result in (whole, parts)
        )
        assert same(one, other)
    logged = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in line]
    assert ["alignment" in line for line in logged] == [True, True, True, False, False, False]


def test_its_mean_is_over_the_steps_that_it_had(aligned, tmp_path):
    settings = ("objective.alignment.until_step=3", "trainer.checkpoint_every=6")
    lines = {
        every: [
            line["alignment"]
            for line in read_metrics(
                train(aligned(*settings, f"trainer.log_every={every}"), tmp_path / f"{every}").run
                / "metrics.jsonl"
            )
            if "alignment" in line
        ]
        for every in (1, 6)
    }
    assert lines[6] == [pytest.approx(np.mean(lines[1]), rel=1e-5)]


def test_embeddings_are_approached(aligned, tmp_path):
    train(aligned("trainer.steps=60", "trainer.log_every=20", "optimizer.lr=0.01"), tmp_path / "run")
    logged = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "alignment" in line]
    # Random embeddings of 48 fields: cosines rise from 0 as the projector learns them.
    assert logged[-1]["alignment"] < logged[0]["alignment"] < 1.2


def test_a_stage_starts_from_an_aligned_run(aligned, tmp_path):
    run = train(aligned("trainer.steps=2"), tmp_path / "first").run
    state = load_file(Checkpoint.find(run).state / "weights.safetensors")
    grown = build_objective(aligned("data.size=64", f"model.init={run}", "objective.alignment=null"))
    assert torch.equal(grown.transformer.proj_out.weight, state["transformer.proj_out.weight"])
    assert grown.growth is not None
    assert json.loads(json.dumps(grown.growth)) == grown.growth


def test_a_run_cannot_go_on_with_other_embeddings(aligned, tmp_path):
    train(aligned("trainer.steps=2"), tmp_path)
    with pytest.raises(RunError, match=r"objective\.alignment\.column was 'embeddings-fine' and is"):
        train(aligned("objective.alignment.column=embeddings-other"), tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("layer=2", RecipeError, r"layer 2 is none of the 1 blocks"),
        (
            "column=embeddings-too-fine",
            RecipeError,
            r"4 x 4 embeddings .* 2 x 2 image tokens cannot be shared",
        ),
        ("column=embeddings-none", MissingColumn, "embeddings-none"),
        ("column=latents-tiny", StoreMismatch, "holds latents, not embeddings"),
    ],
)
def test_what_cannot_be_aligned_is_refused(aligned, change, error, message):
    with pytest.raises(error, match=message):
        build_objective(aligned(f"objective.alignment.{change}"))


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_align_as_one_does(aligned, tmp_path, environment):
    """Also after alignment has ended, when each process would wait for gradients of the projector."""
    chosen = aligned("objective.alignment.until_step=2", "trainer.steps=4", "trainer.device=cpu")
    save_recipe(chosen, tmp_path / "recipe.yaml")
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    ended = subprocess.run(
        [*together, "pixcell", "train", "recipe.yaml"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    train(chosen, tmp_path / "one")
    logs = [
        [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (tmp_path / "one", tmp_path / "runs" / "tiny")
    ]
    assert ["alignment" in line for line in logs[1]] == [True, True, False, False]
    for one, other in zip(*logs, strict=True):
        figures = {name: one[name] for name in ("loss", "mse", "alignment") if name in one}
        assert {name: other[name] for name in figures} == pytest.approx(figures, rel=1e-4)  # another order
