"""True is no number, and places in a recipe are shown as the recipe writes them."""

import pytest

from pixcell.config import Config, parse_recipe
from pixcell.errors import RecipeError


class Inner(Config):
    steps: int = 1
    share: float | None = None
    flag: bool = False
    either: bool | str = False
    sizes: str | list[str] = "a"


class Outer(Config):
    trainer: Inner = Inner()
    stores: str | list[str] = "a"


@pytest.mark.parametrize("key", ["trainer.steps", "trainer.share"])
def test_yes_is_no_number(key):
    with pytest.raises(
        RecipeError, match=f"{key.split('.')[1]} is neither yes nor no, but was given as True"
    ):
        parse_recipe(Outer, {}, [f"{key}=true"])


def test_yes_and_no_stay_what_they_are_where_they_mean_something():
    recipe = parse_recipe(Outer, {}, ["trainer.flag=yes", "trainer.either=true", "trainer.steps=2"])
    assert (recipe.trainer.flag, recipe.trainer.either, recipe.trainer.steps) == (True, True, 2)


def test_the_types_that_were_tried_are_no_keys():
    with pytest.raises(RecipeError) as error:
        parse_recipe(Outer, {}, ["stores={a: 1}", "trainer.sizes=3"])
    assert "stores:" in str(error.value)
    assert "trainer.sizes:" in str(error.value)
    assert ".str" not in str(error.value)
    assert "list[" not in str(error.value)
