"""A run can be handed on with the weights that were trained, or with any average that it kept."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.errors import ModelError, RunError
from pixcell.tasks.convert import convert
from pixcell.tasks.train import train
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.recipe import build_objective
from training_fixtures import codec_folder, codec_recipe, recipe, store

__all__ = ["codec_folder", "codec_recipe", "recipe", "store"]  # fixtures


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    chosen = recipe("trainer.ema_decays=[0.9, 0.05]", "trainer.steps=3")
    return train(chosen, tmp_path_factory.mktemp("runs") / "first").run


FILES = {
    "auto": "averages",
    "averaged": "averages",
    "ema": "averages",
    "averaged-0.9": "averages",
    "averaged-0.05": "averages-0.05",
    "trained": "weights",
    "raw": "weights",
}


@pytest.mark.parametrize("weights", ["auto", "averaged-0.9", "averaged-0.05", "raw"])
def test_a_converted_run_has_the_weights_that_were_asked_for(run, tmp_path, weights):
    result = convert(str(run), tmp_path / "out", weights=weights)
    expected = load_file(Checkpoint.find(run).state / f"{FILES[weights]}.safetensors")
    found = PixCellPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert result.kind == "pipeline"
    assert "weights of first, step 3" in result.notes[0]
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert origin["name"] == "first, step 3"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "origin.json", "model_index.json", "pixcell.json", "scheduler", "transformer", "vae",
    }  # fmt: skip
    Checkpoint.find(run).verify()


def test_the_three_choices_differ(run):
    state = Checkpoint.find(run).state
    values = [load_file(state / f"{file}.safetensors")["proj_out.weight"] for file in set(FILES.values())]
    assert not any(torch.equal(values[one], values[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def test_the_same_checkpoint_gives_the_same_bytes(run, tmp_path):
    for place in ("one", "other"):
        convert(str(Checkpoint.find(run).path), tmp_path / place, weights="averaged-0.05")
    for file in (tmp_path / "one").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "other" / file.relative_to(tmp_path / "one")).read_bytes()


def test_an_average_that_was_not_kept_is_refused_with_those_that_were(run, tmp_path):
    with pytest.raises(
        RunError, match=r"no weights 'averaged-0\.99'.*averaged, trained, averaged-0\.9, aver"
    ):
        convert(str(run), tmp_path / "out", weights="averaged-0.99")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_run_has_no_averages_of_several_decays(tmp_path):
    with pytest.raises(ModelError, match=r"has no weights 'averaged-0\.05'.*runs of pixcell"):
        convert(str(tmp_path), tmp_path / "out", weights="averaged-0.05")


def test_an_autoencoder_is_converted_with_the_weights_its_scale_was_measured_with(codec_recipe, tmp_path):
    run = train(codec_recipe("trainer.steps=2"), tmp_path / "codec").run
    result = convert(str(run), tmp_path / "out")
    assert result.kind == "autoencoder"
    with pytest.raises(ModelError, match="scale of latents was measured with the averaged weights"):
        convert(str(run), tmp_path / "other", weights="trained")


@pytest.mark.parametrize("weights", ["trained", "averaged", "averaged-0.05"])
def test_a_stage_begins_with_the_weights_that_were_asked_for(run, recipe, weights):
    objective = build_objective(recipe("data.size=64", f"model.init={run}", f"model.init_weights={weights}"))
    expected = load_file(Checkpoint.find(run).state / f"{FILES[weights]}.safetensors")["proj_out.weight"]
    assert torch.equal(objective.trainable.proj_out.weight, expected)


def test_a_stage_that_wants_an_average_that_is_not_there_is_refused(run, recipe):
    with pytest.raises(RunError, match=r"no weights 'averaged-0\.7'"):
        build_objective(recipe(f"model.init={run}", "model.init_weights=averaged-0.7"))
    pipeline = Checkpoint.find(run).pipeline
    with pytest.raises(ModelError, match="is a pipeline, which holds one set of weights"):
        build_objective(recipe(f"model.init={pipeline}", "model.init_weights=averaged-0.05"))
