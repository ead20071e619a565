"""How the command ends when a run stops early: what scripts of a cluster go by."""

import pytest
from typer.testing import CliRunner

from pixcell.cli import app
from pixcell.config import save_recipe
from pixcell.tasks.train import train
from pixcell.training.checkpoints import Checkpoint
from training_fixtures import codec_folder, recipe, store

__all__ = ["codec_folder", "recipe", "store"]  # fixtures

NO_TIME = "trainer.max_hours=1e-9"


def test_the_exit_code_says_whether_the_run_is_complete(recipe, tmp_path):
    save_recipe(recipe(), tmp_path / "recipe.yaml")
    command = ["train", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run")]
    stopped = CliRunner().invoke(app, [*command, "--set", NO_TIME])
    assert stopped.exit_code == 75, stopped.output
    assert Checkpoint.find(tmp_path / "run").step == 1
    for _ in ("goes on", "is complete already"):
        assert CliRunner().invoke(app, command).exit_code == 0
        assert Checkpoint.find(tmp_path / "run").step == 6


def test_only_the_main_process_says_that_it_stopped(recipe, tmp_path, monkeypatch):
    """Launchers end the others as soon as one ends with an error."""
    result = train(recipe(NO_TIME), tmp_path / "run")
    assert (result.stopped_by, result.exit_code) == ("trainer.max_hours", 75)
    monkeypatch.setenv("RANK", "1")
    assert result.exit_code == 0


@pytest.mark.parametrize(
    "changed",
    ["trainer.micro_batch_size=2", "trainer.compile=true", "trainer.max_hours=9", "trainer.spike.factor=99"],
)
def test_what_only_rounds_may_change_between_starts(recipe, tmp_path, changed, monkeypatch):
    from torch import nn

    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **_: None
    )  # half a minute that is not ours to test
    train(recipe("trainer.steps=2"), tmp_path / "run")
    assert train(recipe("trainer.steps=3", changed), tmp_path / "run").step == 3
