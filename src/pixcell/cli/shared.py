"""The application, the types of options that several commands share, and how a command calls its task."""

import inspect as signatures
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_type_hints

import typer
from pydantic import ConfigDict, create_model
from typer import Option

from pixcell.config import Config, parse_recipe
from pixcell.errors import RecipeError

__all__ = ["Device", "Overrides", "Recipe", "app", "attributes", "call", "split"]

app = typer.Typer(
    name="pixcell",
    help="Generative digital histopathology: whole-slide images in, generated tissue and honest figures out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

Device = Literal["auto", "cpu", "cuda", "mps"]
Overrides = Annotated[list[str] | None, Option("--set", help="Override one value: --set section.key=value.")]
Recipe = Annotated[str, Option("--recipe", help="A recipe file, or the name of one that comes with pixcell.")]


class _Options(Config):
    """Arguments of a task; some may be objects that only Python code can give."""

    model_config = ConfigDict(arbitrary_types_allowed=True)


def call(command: str, task: Callable[..., Any], given: dict[str, Any], overrides: list[str] | None) -> Any:
    """Call a task with its keyword arguments checked; ``--set`` reaches those that have no flag."""
    hints = get_type_hints(task)
    fields = {
        name: (hints[name], ... if parameter.default is signatures.Parameter.empty else parameter.default)
        for name, parameter in signatures.signature(task).parameters.items()
    }
    kind: type[Config] = create_model("Options", __base__=_Options, **fields)  # type: ignore[call-overload]
    options = parse_recipe(kind, given, overrides or (), source=f"pixcell {command}")
    return task(**{name: getattr(options, name) for name in fields})


def split(values: list[str] | None) -> list[str] | None:
    """Take a list given as ``a,b``, as repeated options, or both, apart. None stays None."""
    return None if values is None else [part for value in values for part in value.split(",")]


def attributes(pairs: list[str] | None) -> dict[str, list[str]]:
    """Collect ``attribute=value`` options into values by attribute.

    Raises:
        RecipeError: If one is of another form.
    """
    collected: dict[str, list[str]] = {}
    for pair in pairs or []:
        name, separator, value = pair.partition("=")
        if not (name and separator and value):
            raise RecipeError(f"--where {pair!r} is not of the form attribute=value, such as split=train.")
        collected.setdefault(name, []).append(value)
    return collected
