"""A recipe is complete, typed, and refuses what it does not know."""

import itertools
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from pixcell.config import Config, find_recipe, load_recipe, parse_recipe, recipe_names, save_recipe
from pixcell.errors import RecipeError


class Slow(Config):
    name: Literal["slow"] = "slow"
    patience: int = 3


class Fast(Config):
    name: Literal["fast"] = "fast"
    speed: float = 1.0


class Inner(Config):
    tile_size: int = Field(1024, gt=0)
    names: list[str] = []


class Outer(Config):
    inner: Inner = Inner()
    method: Annotated[Slow | Fast, Field(discriminator="name")] = Slow()
    rate: float = 0.1


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("inner: {tile_size: 512}\nmethod: {name: fast, speed: 2}\n")
    return path


def test_what_is_saved_loads_as_the_same_recipe(tmp_path, recipe_file):
    recipe = load_recipe(Outer, recipe_file, ["inner.names=[a, b]"])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(Outer, tmp_path / "saved.yaml") == recipe


def test_later_overrides_win(recipe_file):
    recipe = load_recipe(Outer, recipe_file, ["inner.tile_size=256", "inner.tile_size=128", "rate=2e-5"])
    assert (recipe.inner.tile_size, recipe.rate) == (128, 2e-5)


def test_an_override_reaches_into_a_section_the_file_leaves_out():
    assert parse_recipe(Outer, {"inner": None}, ["inner.tile_size=64"]).inner.tile_size == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.tile_sise=256", "Did you mean 'tile_size'"),
        ("method.sped=1", "Did you mean 'speed'"),
        ("inner.tile_size=-1", "greater than 0, not -1"),
        ("inner.tile_size=many", "valid integer"),
        ("rate", "section.key=value"),
        ("rate.x.y=1", "single value"),
        ("=3", "section.key=value"),
        ("method.name=fats", "fast"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(recipe_file, override, message):
    overrides = ["rate=0.5", override]
    with pytest.raises(RecipeError, match=message):
        load_recipe(Outer, recipe_file, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1\n- 2\n", "keys and values"),
        ("rate: 1\nrate: 2\n", "stands twice"),
        ("rate: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("rate: 2026-13-01\n", "not valid YAML: month must be"),
        ("rate: !!int many\n", "not valid YAML"),
        ("rate: !!bool maybe\n", "not valid YAML"),
        ("inner: &a\n  names: *a\n", "inner.names: Input should be a valid list"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(Outer, path)


def test_anchors_that_multiply_are_neither_unfolded_nor_shown(tmp_path):
    path, names = tmp_path / "bomb.yaml", "abcdefghijklmnopqrst"
    lines = [
        f"{one}: &{one} {{{', '.join(f'k{i}: *{of}' for i in range(9))}}}"
        for of, one in itertools.pairwise(names)
    ]
    path.write_text("\n".join(["a: &a {x: 1}", *lines, "inner: {names: [*t]}"]))
    with pytest.raises(RecipeError, match=r"inner\.names\.0") as caught:
        load_recipe(Outer, path)
    assert len(str(caught.value)) < 5000


def test_an_override_moves_one_section_though_an_anchor_put_it_in_two_places(tmp_path):
    class Twice(Config):
        first: Inner
        second: Inner

    path = tmp_path / "anchor.yaml"
    path.write_text("first: &a {tile_size: 8}\nsecond: *a\n")
    recipe = load_recipe(Twice, path, ["first.tile_size=4"])
    assert (recipe.first.tile_size, recipe.second.tile_size) == (4, 8)


def test_a_section_may_be_merged_into_another(tmp_path):
    class Twice(Config):
        first: Inner
        second: Inner

    path = tmp_path / "merge.yaml"
    path.write_text("first: &a {tile_size: 8, names: [x]}\nsecond: {<<: *a, tile_size: 4}\n")
    assert load_recipe(Twice, path).second == Inner(tile_size=4, names=["x"])


@pytest.mark.parametrize("value", ["2026-13-01", "!!int many", "!!bool maybe", "9" * 5000])
def test_a_value_that_yaml_cannot_make_is_a_mistake_of_the_override(value):
    with pytest.raises(RecipeError, match="the value is not valid YAML"):
        parse_recipe(Outer, {}, [f"rate={value}"])


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    with pytest.raises(RecipeError, match="tiles-20x"):
        find_recipe("tiles-20")


def test_recipes_of_the_package_are_found_by_name_and_by_their_path_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "tiles-20x" in recipe_names()
    assert find_recipe("recipes/tiles-20x.yaml") == find_recipe("tiles-20x")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400"])
def test_a_number_that_is_not_finite_is_refused(recipe_file, value):
    with pytest.raises(RecipeError, match="rate: Input should be a finite number"):
        load_recipe(Outer, recipe_file, [f"rate={value}"])


def test_a_changed_copy_is_validated_again():
    with pytest.raises(ValueError, match="greater than 0"):
        Inner().with_changes(tile_size=0)


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        Inner().tile_size = 3
