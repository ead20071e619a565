"""The verb: a recipe in, a run folder out; and what a user can get wrong."""

import shutil

import pytest
from rich.console import Console

from pixcell.config import load_recipe, parse_recipe
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.errors import (
    MissingColumn,
    MissingWeights,
    ModelError,
    OutputError,
    RecipeError,
    RunError,
    StoreError,
    StoreMismatch,
)
from pixcell.provenance import read_provenance
from pixcell.tasks.train import train
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.recipe import TrainRecipe
from training_fixtures import codec_folder, codec_recipe, recipe, small_disk, store

__all__ = ["codec_folder", "codec_recipe", "recipe", "small_disk", "store"]  # fixtures


def test_a_run_folder_holds_all_that_is_promised(recipe, tmp_path):
    result = train(recipe("trainer.tensorboard=true"), tmp_path / "run")
    names = {path.name for path in result.run.iterdir()}
    assert names >= {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "tensorboard",
        "previews",
        "checkpoints",
    }
    assert load_recipe(TrainRecipe, result.run / "recipe.yaml") == recipe("trainer.tensorboard=true")
    assert PixCellPipeline.from_pretrained(result.checkpoint / "pipeline").sample_size == 32
    record = read_provenance(result.preview)
    assert record is not None
    assert (record["synthetic"], record["step"]) == (True, 6)
    with Console().capture() as shown:
        Console().print(result)
    assert result.is_complete, shown


def test_an_autoencoder_run_can_be_named_as_the_codec_of_the_next(codec_recipe, tmp_path):
    from pixcell.models.codec import LatentCodec
    from pixcell.training.stages import weights_folder

    result = train(codec_recipe(), tmp_path / "codec")
    assert weights_folder(str(result.run)) == result.checkpoint / "pipeline"
    assert LatentCodec.from_pretrained(weights_folder(str(result.run))).latent_channels == 2


def test_a_stage_starts_from_a_run_trained_or_averaged(recipe, tmp_path):
    import torch
    from safetensors.torch import load_file

    from pixcell.training.recipe import build_objective

    run = train(recipe(), tmp_path / "first").run
    state = Checkpoint.find(run).state
    for choice, file in (("trained", "weights"), ("averaged", "averages")):
        objective = build_objective(
            recipe("data.size=64", f"model.init={run}", f"model.init_weights={choice}")
        )
        expected = load_file(state / f"{file}.safetensors")["proj_out.weight"]
        assert torch.equal(objective.trainable.proj_out.weight, expected)


def test_another_recipe_in_the_same_folder_is_refused_with_the_difference(recipe, tmp_path):
    train(recipe("trainer.steps=2"), tmp_path)
    with pytest.raises(RunError, match=r"optimizer\.lr was 0\.001 and is 0\.1\. Choose another folder"):
        train(recipe("trainer.steps=4", "optimizer.lr=0.1"), tmp_path)


def test_what_moves_no_weight_may_change_between_starts(recipe, tmp_path):
    train(recipe("trainer.steps=2"), tmp_path)
    result = train(recipe("trainer.steps=4", "trainer.log_every=2", "trainer.keep_last=1"), tmp_path)
    assert (result.step, result.is_complete) == (4, True)


def test_a_cosine_run_cannot_be_lengthened(recipe, tmp_path):
    train(recipe("trainer.steps=2", "optimizer.schedule=cosine"), tmp_path)
    with pytest.raises(RunError, match=r"trainer\.steps was 2 and is 4"):
        train(recipe("trainer.steps=4", "optimizer.schedule=cosine"), tmp_path)


def test_without_resume_a_run_is_not_touched(recipe, tmp_path):
    train(recipe("trainer.steps=2"), tmp_path)
    with pytest.raises(OutputError, match="holds a run at step 2"):
        train(recipe("trainer.steps=2"), tmp_path, resume=False)


def test_a_full_disk_ends_the_run_with_a_message_and_a_usable_checkpoint(recipe, small_disk, tmp_path):
    one = train(recipe("trainer.steps=2"), tmp_path / "measure").checkpoint
    size = sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
    disk = small_disk(f"{int(size * 1.9)}")
    with pytest.raises(OutputError, match="disk is full"):
        train(recipe("trainer.keep_last=9"), disk / "run")
    last = Checkpoint.find(disk / "run")
    last.verify()
    assert last.step == 2
    PixCellPipeline.from_pretrained(last.pipeline)
    # With room again, the same command goes on.
    shutil.copytree(disk / "run", tmp_path / "run")
    assert train(recipe("trainer.keep_last=9"), tmp_path / "run").step == 6


def test_a_read_only_place_is_an_output_error(recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        train(recipe(), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.latents=latents-none", MissingColumn, "latents-none"),
        ("data.size=48", StoreMismatch, "48"),
        ("data.latents=embeddings-colour", StoreMismatch, "holds embeddings, not latents"),
        ("data.embeddings=latents-tiny", StoreMismatch, "holds latents, not embeddings"),
        ("model.attention_head_dim=15", ModelError, "need a multiple of 4"),
        ("data.store=nowhere", StoreError, "nowhere"),
        ("data.where.split=[validation]", StoreError, "no tile remains where split is validation"),
        ("trainer.batch_size=64", RecipeError, "46 samples, fewer than one batch of 64"),
        ("objective.codec=nowhere", MissingWeights, "nowhere"),
        ("model.init=nowhere", RunError, "nowhere is not a run"),
    ],
)
def test_what_a_user_gets_wrong_is_said(recipe, tmp_path, override, error, message):
    with pytest.raises(error, match=message):
        train(recipe(override), tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.batchsize=4", "unknown key 'trainer.batchsize'. Did you mean 'batch_size'"),
        ("objective.name=denoise", "objective"),
        ("objective.drop_conditoning=0.2", "Did you mean 'drop_conditioning'"),
        ("model.name=autoencoder", "unknown key"),
        ("data.store=[a, b, ./a]", "names one store twice"),
        ("trainer.seed=9223372036854775808", "trainer.seed: Input should be less than"),
        ("data.embeddings=null", "denoising needs data.latents and data.embeddings"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        recipe(override)


def test_an_objective_needs_its_own_model():
    content = {
        "name": "x",
        "data": {"store": "s", "size": 64},
        "model": {"name": "transformer"},
        "objective": {"name": "autoencoding"},
        "trainer": {"steps": 1, "batch_size": 1},
    }
    with pytest.raises(RecipeError, match="objective 'autoencoding' trains a model named 'autoencoder'"):
        parse_recipe(TrainRecipe, content)


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "..", "tab\there"])
def test_a_recipe_cannot_name_a_folder_outside_runs(recipe, name):
    with pytest.raises(RecipeError, match="cannot name a run's folder"):
        parse_recipe(TrainRecipe, recipe().model_dump(mode="json") | {"name": name})
