"""A plan is what the training then does; and it needs neither data nor a GPU to be made."""

import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pixcell.config import load_recipe
from pixcell.errors import RecipeError, StoreError, StoreMismatch
from pixcell.tasks.plan import plan
from pixcell.tasks.train import train
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.flops import training_flops
from pixcell.training.recipe import TrainRecipe, build_objective
from training_fixtures import codec_folder, codec_recipe, recipe, store

__all__ = ["codec_folder", "codec_recipe", "recipe", "store"]  # fixtures


def shown(planned):
    console = Console(width=200)
    with console.capture() as text:
        console.print(planned)
    return text.get()


def test_a_plan_of_one_process_is_what_the_run_becomes(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = recipe("trainer.ema_decays=[0.9, 0.99]", "trainer.keep_last=2")
    planned = plan(chosen, with_probe=False)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"
    result = train(chosen, tmp_path / "run")
    checkpoint = Checkpoint.find(result.run)
    weights = load_file(checkpoint.state / "weights.safetensors")
    trained = build_objective(chosen).trainable
    assert sum(planned.parameters.values()) == sum(weight.numel() for weight in trained.parameters())
    kept = planned.memory["one process"]
    assert kept["weights"] == sum(
        value.numel() * value.element_size() for value in trained.state_dict().values()
    ) + (
        # the table of image positions is no part of a checkpoint
        sum(value.numel() * 4 for name, value in trained.named_buffers() if name not in weights)
    )
    assert kept["running averages"] == 2 * kept["gradients"]
    assert kept["moments of the optimiser"] == 2 * kept["gradients"]
    assert planned.num_samples == 46
    assert (planned.num_steps, planned.num_checkpoints) == (
        6,
        len(list((result.run / "checkpoints").iterdir())),
    )
    files = [path for path in checkpoint.path.rglob("*") if path.is_file() and path.parent.name != "vae"]
    # Headers and descriptions come on top: much for a tiny model, nothing for a real one.
    assert 0 < sum(path.stat().st_size for path in files) - planned.checkpoint_bytes < 120_000


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("recipe", []), ("codec_recipe", []), ("codec_recipe", ["objective.scale_consistency=1"])],
)
def test_flops_of_a_plan_are_those_of_the_objective(kind, changes, request):
    from pixcell.training.determinism import rng_for

    chosen = request.getfixturevalue(kind)(*changes)
    objective = build_objective(chosen)
    (sample,) = objective.samples.draw([0], [rng_for(0)])
    batch = {**torch.utils.data.default_collate([dict(sample)]), "step": 0}
    assert plan(chosen, with_probe=False).flops_per_sample == training_flops(objective, batch)


@pytest.mark.parametrize("kind", ["recipe", "codec_recipe"])
def test_a_probe_times_the_real_thing_and_leaves_nothing_behind(kind, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = request.getfixturevalue(kind)("trainer.micro_batch_size=2")
    planned = plan(chosen)
    assert planned.probe is not None
    assert planned.probe.micro_batch_size == 2
    assert planned.probe.computing_s > 0
    assert planned.seconds == pytest.approx(6 * planned.seconds_per_step)
    assert planned.seconds_per_step > 2 * planned.probe.computing_s, "two micro-batches a step"
    assert not list(tmp_path.iterdir())
    assert "without checkpoints and previews" in shown(planned)


def test_alignment_is_part_of_the_plan(recipe):
    plain, aligned = (
        plan(recipe(*extra), with_probe=False)
        for extra in ((), ("objective.alignment={column: embeddings-colour, layer: 1, width: 8}",))
    )
    assert sum(aligned.parameters.values()) > sum(plain.parameters.values())
    assert aligned.flops_per_sample > plain.flops_per_sample
    assert any(name.startswith("alignment.") for name in aligned.parameters)


@pytest.fixture(scope="module")
def of_the_paper():
    chosen = load_recipe(TrainRecipe, "train-1024-paper", ["model.num_layers=2"])
    return plan(chosen, processes=32)


def test_a_published_stage_is_planned_without_its_data(of_the_paper):
    assert of_the_paper.num_samples is None
    assert of_the_paper.num_steps == 80_000
    assert of_the_paper.micro_batch_size == 12
    assert "32 x A100" in shown(of_the_paper)
    assert "sizes follow from the names latents-sd3.5 and embeddings-uni2-h" in shown(of_the_paper)
    assert "there are no data here to probe with" in shown(of_the_paper)
    # The autoencoder of Stable Diffusion 3.5, by its published architecture: 83,819,683 parameters.
    assert of_the_paper.codec_bytes == 4 * 83_819_683


def test_sharding_divides_what_stays_and_not_what_passes(of_the_paper):
    whole, spread = of_the_paper.memory["DDP"], of_the_paper.memory["FSDP2"]
    assert spread["weights, 1/32"] == -(-whole["weights"] // 32)
    assert spread["running averages, 1/32"] == -(-whole["running averages"] // 32)
    activations = "activations of 12 sample(s), estimated"
    assert spread[activations] == whole[activations]
    assert sum(spread.values()) < sum(whole.values())


def test_the_length_of_a_run_in_epochs_needs_its_data():
    chosen = load_recipe(TrainRecipe, "train-256-code", ["model.num_layers=1"])
    planned = plan(chosen, processes=16)
    assert (planned.num_steps, planned.disk_bytes) == (None, None)
    assert "epochs of an unknown number of samples" in shown(planned)


@pytest.mark.parametrize(
    ("overrides", "processes", "error", "message"),
    [
        ((), 3, RecipeError, r"batch_size 4 is not a whole number of micro-batches .* on 3 process"),
        ((), 8, RecipeError, "on 8 process"),
        (("trainer.micro_batch_size=3",), 1, RecipeError, "micro-batches of 3 on 1 process"),
        (("trainer.batch_size=64",), 1, RecipeError, "46 samples, fewer than one batch of 64"),
        (("data.size=48",), 1, StoreMismatch, "48"),
        (("model.patch_size=3",), 1, RecipeError, "no whole number of latent patches of 3"),
        (("data.store=nowhere",), 1, StoreError, "nowhere is not on this machine, and sizes do not follow"),
    ],
)
def test_what_could_not_be_trained_cannot_be_planned(recipe, overrides, processes, error, message):
    with pytest.raises(error, match=message):
        plan(recipe(*overrides), processes, with_probe=False)


def test_under_a_launcher_there_is_nothing_to_plan(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="--plan runs in one process"):
        plan(recipe())


def test_an_autoencoder_that_is_not_here_is_the_reason_for_no_probe(recipe, codec_folder, tmp_path):
    gone = tmp_path / "codec"
    shutil.copytree(codec_folder, gone)
    chosen = recipe(f"objective.codec={gone}")
    shutil.rmtree(gone)
    planned = plan(chosen)
    assert planned.probe is None
    assert "the training could not start here" in (planned.not_probed or "")
