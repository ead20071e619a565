"""Going on with a run: by its own recipe, whatever wrote it; and by no other."""

import pytest
import yaml

from pixcell.errors import OutputError, RunError
from pixcell.tasks.train import train
from training_fixtures import codec_folder, recipe, store

__all__ = ["codec_folder", "recipe", "store"]  # fixtures


@pytest.fixture
def run(recipe, tmp_path):
    return train(recipe("trainer.steps=1", "trainer.ema_decays=[0.99]"), tmp_path / "run").run


def rewrite(run, change):
    file = run / "recipe.yaml"
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content))


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(run, recipe):
    def as_an_earlier_version_wrote_it(content):
        content["trainer"]["ema_decay"] = content["trainer"].pop("ema_decays")[0]
        for name in ("keep_every", "ema_warmup", "spike", "max_hours"):
            del content["trainer"][name]
        for name in ("warmup", "warmup_advance"):
            del content["optimizer"][name]

    rewrite(run, as_an_earlier_version_wrote_it)
    assert train(recipe("trainer.steps=2", "trainer.ema_decay=0.99"), run).step == 2


def test_a_recipe_that_this_version_does_not_understand_is_said_to_be_one(run, recipe):
    rewrite(run, lambda content: content["trainer"].update(from_the_future=1))
    with pytest.raises(RunError, match=r"another version of pixcell.*from_the_future.*another folder"):
        train(recipe("trainer.steps=2"), run)


@pytest.mark.parametrize("damaged", [b"", b"name: [", b"\x00\xff\xfe", b"- 1\n"])
def test_a_damaged_recipe_is_not_blamed_on_another_version(run, recipe, damaged):
    file = run / "recipe.yaml"
    file.write_bytes(damaged)
    with pytest.raises(RunError, match=r"recipe\.yaml is damaged.*delete the file"):
        train(recipe("trainer.steps=2", "trainer.ema_decays=[0.99]"), run)
    file.unlink()
    assert train(recipe("trainer.steps=2", "trainer.ema_decays=[0.99]"), run).step == 2
    assert file.is_file()


@pytest.mark.parametrize("name", ["store.json", "pack.json", "model_index.json"])
def test_a_run_is_not_written_into_a_store_a_pack_or_a_model(recipe, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(OutputError, match="a run needs a folder of its own"):
        train(recipe(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["trainer.ema_decays=[0.99, 0.9]"],
            r"trainer\.ema_decays was \[0\.99\] and is \[0\.99, 0\.9\]\. Choose",
        ),
        (["optimizer.name=came"], r"recipe: optimizer\.name was 'adamw' and is 'came'\. Choose"),
        (["data.where.split=[train]"], r"data\.where\.split was not given and is \['train'\]\. Choose"),
    ],
)
def test_by_another_recipe_a_run_does_not_go_on(run, recipe, overrides, said):
    with pytest.raises(RunError, match=said):
        train(recipe("trainer.steps=2", "trainer.ema_decays=[0.99]", *overrides), run)
