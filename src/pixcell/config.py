"""Recipes: complete, validated descriptions of a run, as YAML in and YAML out.

A configuration class lives in the module of the thing it configures; a recipe composes them. Values are
frozen, a key that does not exist is refused (with the nearest one that does), and the resolved recipe is
saved beside the result, so that reading it tells the whole run.
"""

import difflib
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pixcell.errors import RecipeError
from pixcell.files import write_text

__all__ = ["Config", "find_recipe", "load_recipe", "parse_recipe", "recipe_names", "save_recipe"]


class Config(BaseModel):
    """Base of every configuration: frozen, and a mistyped key is an error."""

    # No recipe means inf or NaN, and neither could be saved beside the result.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        """Python takes True for 1: ``steps: yes`` would train one step without a word."""
        if isinstance(values, dict):
            for name, value in values.items():
                field = cls.model_fields.get(name) if isinstance(value, bool) else None
                if field is not None and not _takes_yes_and_no(field.annotation):
                    raise ValueError(f"{name} is neither yes nor no, but was given as {value}")
        return values

    def with_changes(self, **changes: Any) -> Self:
        """Return a copy with some fields replaced, validated again."""
        return type(self).model_validate({**self.model_dump(), **changes})


ConfigT = TypeVar("ConfigT", bound=Config)


# PyYAML passes on what Python says of a date such as 2026-13-01, of !!bool maybe, of a thousand brackets.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)

# Anchors make a list of gigabytes out of a file of a few lines; nobody needs to see it.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 300, 300


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys without a word; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # "<<: *other"
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _recipe_folders() -> list[Path]:
    package = Path(__file__).parent
    return [folder for folder in (package / "recipes", package.parents[1] / "recipes") if folder.is_dir()]


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted({path.stem for folder in _recipe_folders() for path in folder.glob("*.yaml")})


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        RecipeError: If there is neither such a file nor such a name.
    """
    path = Path(name)
    if path.is_file():
        return path
    # "recipes/nano.yaml" works from a checkout as a path, and anywhere else as a name.
    if path.suffix in ("", ".yaml") and path.parent in (Path(), Path("recipes")):
        for folder in _recipe_folders():
            if (folder / f"{path.stem}.yaml").is_file():
                return folder / f"{path.stem}.yaml"
    near = _nearest(path.stem, recipe_names())
    raise RecipeError(
        f"no recipe {str(name)!r}: it is neither a file nor one of the recipes of the package "
        f"({', '.join(recipe_names())}).{near}"
    )


def load_recipe(kind: type[ConfigT], name: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read, override and validate a recipe.

    Args:
        kind: The configuration class that the recipe must fit.
        name: A YAML file, or the name of a recipe of the package.
        overrides: ``"section.key=value"``, applied in order; the value is YAML.

    Raises:
        RecipeError: Names the file, the key, the value, the rule, and the nearest valid key.
    """
    path = find_recipe(name)
    try:
        # A subclass of SafeLoader: no Python objects can be built from the file.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except _NOT_YAML as error:
        raise RecipeError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if content is not None and not isinstance(content, dict):
        raise RecipeError(f"{path} must hold keys and values, not {type(content).__name__}.")
    return parse_recipe(kind, content or {}, overrides, source=str(path))


def parse_recipe(
    kind: type[ConfigT], content: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "recipe"
) -> ConfigT:
    """Validate a recipe given as nested mappings; see :func:`load_recipe`."""
    merged = dict(content)
    for override in overrides:
        _apply(merged, override)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(_explain(error, kind, source)) from error


def save_recipe(recipe: Config, path: Path) -> None:
    """Write a resolved recipe as YAML that :func:`load_recipe` reads back to an equal object."""
    write_text(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _apply(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(f"--set {override!r} is not of the form section.key=value.")
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML: {_one_line(error)}") from error
    if isinstance(value, str):
        value = _number(value)
    for part in parts[:-1]:
        inner = content.get(part)
        if inner is not None and not isinstance(inner, Mapping):
            raise RecipeError(f"--set {override!r}: {part!r} is a single value, not a section.")
        # A copy: an anchor of YAML may have put the same section elsewhere, too.
        copy = content[part] = dict(inner or {})
        content = copy
    content[parts[-1]] = value


def _number(text: str) -> str | float:
    """YAML 1.1 reads ``1e-4`` as a string; people mean a number."""
    try:
        return float(text) if any(character.isdigit() for character in text) else text
    except ValueError:
        return text


def _explain(error: ValidationError, kind: type[Config], source: str) -> str:
    lines = []
    for problem in error.errors():
        kinds, place = _walk(kind, problem["loc"])
        if problem["type"] == "extra_forbidden":
            *above, key = problem["loc"]
            kinds, place = _walk(kind, above)
            valid = sorted(set().union(*(model.model_fields for model in kinds)))
            hint = _nearest(str(key), valid) or f" Valid keys: {', '.join(valid)}."
            lines.append(f"unknown key '{f'{place}.' if place else ''}{key}'.{hint}")
        elif problem["type"] == "missing":
            lines.append(f"{place!r} is missing.")
        elif problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
            names = [tag for model in kinds for tag in _tags_of(model)]
            choices = ", ".join(repr(name) for name in names)
            if problem["type"] == "union_tag_not_found":
                lines.append(f"'{place}.name' is missing: one of {choices}.")
            else:
                given = str(problem["ctx"]["tag"])
                lines.append(f"{place}: no name {given!r}; it is one of {choices}.{_nearest(given, names)}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if isinstance(problem["input"], dict) else f", not {_SHORT.repr(problem['input'])}"
            lines.append(f"{place or 'recipe'}: {message}{given}.")
    return f"{source}: " + " ".join(lines)


def _walk(kind: type[BaseModel], location: Sequence[str | int]) -> tuple[list[type[BaseModel]], str]:
    """Follow a place into a nested configuration.

    Returns:
        The classes that may stand there, and the place as a recipe writes it: which class of a union was
        chosen is a part of pydantic's places, and no key.
    """
    kinds, shown, choices = [kind], [], False
    for part in location:
        if choices and (part in _PYDANTIC_TYPES or "[" in str(part)):
            continue  # which type of several was tried
        holders = [model for model in kinds if part in model.model_fields]
        tagged = [model for model in kinds if part in (*_tags_of(model), model.__name__)]
        if holders:
            annotations = [model.model_fields[str(part)].annotation for model in holders]
            kinds = [model for annotation in annotations for model in _models_in(annotation)]
            choices = any(_is_union(annotation) for annotation in annotations)
        elif tagged:
            kinds = tagged
            continue
        shown.append(str(part))
    return kinds, ".".join(shown)


_PYDANTIC_TYPES = ("str", "int", "float", "bool", "dict", "list", "tuple", "path")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _takes_yes_and_no(annotation: Any) -> bool:
    if annotation in (bool, Any, object):
        return True
    return any(
        argument is True or argument is False or _takes_yes_and_no(argument)
        for argument in typing.get_args(annotation)
    )


def _tags_of(model: type[BaseModel]) -> tuple[str, ...]:
    """The names by which a recipe chooses a class among several."""
    field = model.model_fields.get("name")
    if field is None or typing.get_origin(field.annotation) is not Literal:
        return ()
    return tuple(str(tag) for tag in typing.get_args(field.annotation))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) is not None:  # unions, Annotated, lists, dictionaries
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)


def _nearest(word: str, words: Sequence[str]) -> str:
    by_letters = {known.lower(): known for known in words}
    near = difflib.get_close_matches(word.lower(), by_letters, n=1, cutoff=0.6)
    return f" Did you mean {by_letters[near[0]]!r}?" if near else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
