"""A store with a damaged tile: named, or gone without, from the first look at it to the last checkpoint."""

import pytest
from typer.testing import CliRunner

from pixcell.cli import app
from pixcell.config import load_recipe, save_recipe
from pixcell.data.store import TileStore
from pixcell.errors import RecipeError, UnreadableTile
from pixcell.models.codec import LatentCodec
from pixcell.tasks.train import train
from pixcell.training.dropped import read_dropped
from pixcell.training.recipe import TrainRecipe, build_objective
from training_fixtures import make_store


@pytest.fixture
def damaged(tmp_path, codec_folder):
    """A store whose tiles 1 and 3 of slide a hold zeros where their JPEGs were; tile 3 is held out below."""
    store = make_store(tmp_path / "damaged", LatentCodec.from_pretrained(codec_folder))
    shard = store.shard_path("images", "a")
    data = bytearray(shard.read_bytes())
    for tile in (1, 3):
        jpeg = store.images("a").jpeg(tile)
        place = data.find(jpeg)
        data[place : place + len(jpeg)] = bytes(len(jpeg))
    shard.write_bytes(bytes(data))
    return TileStore.open(store.path)


def test_it_is_named_before_anything_is_trained(codec_recipe, damaged, tmp_path):
    """Twelve fields of whole tiles; two are held out: numbers 3 and 9."""
    with pytest.raises(UnreadableTile, match=r"tile 3 of slide 'a', at x=3, y=0, cannot be read"):
        train(codec_recipe(f"data.store={damaged.path}"), tmp_path / "run")


def test_a_run_goes_without_it(codec_recipe, damaged, tmp_path):
    """Five epochs and more of ten fields: the bad one that is trained on comes once in each."""
    recipe = codec_recipe(
        f"data.store={damaged.path}",
        "trainer.on_bad_tile=drop",
        "trainer.steps=13",
        "trainer.checkpoint_every=13",
    )
    objective = build_objective(recipe)
    assert objective._held_out_names == ["b/3_0/0_0"]
    assert len(objective.samples) == 10  # what is held out stays out
    result = train(recipe, tmp_path / "run")
    dropped = read_dropped(tmp_path / "run")
    assert result.is_complete
    assert result.num_dropped == len(dropped)
    assert len(dropped) in (5, 6)
    assert {(one.slide_id, one.tile, one.x) for one in dropped} == {("a", 1, 1)}


def test_the_command_takes_the_choice_and_says_what_was_lost(codec_recipe, damaged, tmp_path):
    save_recipe(codec_recipe(f"data.store={damaged.path}", "trainer.steps=4"), tmp_path / "recipe.yaml")
    command = ["train", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run")]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, UnreadableTile)
    done = CliRunner().invoke(app, [*command, "--on-bad-tile", "drop"])
    assert done.exit_code == 0, done.exception
    assert load_recipe(TrainRecipe, tmp_path / "run" / "recipe.yaml").trainer.on_bad_tile == "drop"
    assert len(read_dropped(tmp_path / "run")) in (1, 2)


def test_a_store_whose_held_out_fields_are_all_bad_is_refused(codec_recipe, damaged):
    changes = (f"data.store={damaged.path}", "trainer.on_bad_tile=drop", "data.where={slide_id: [a]}")
    with pytest.raises(RecipeError, match=r"none of 1 held-out fields can be read \(a/3_0/0_0"):
        build_objective(codec_recipe(*changes, "data.held_out=1"))
