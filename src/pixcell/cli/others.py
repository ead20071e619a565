"""Commands that explain, list and show."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from pixcell.cli.shared import Overrides, app, call
from pixcell.console import results


@app.command()
def inspect(
    path: Annotated[Path, Argument(help="A slide, store, run, checkpoint, recipe, picture or report.")],
    verify: Annotated[bool, Option("--verify", help="Read everything and compare checksums.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
    set_: Overrides = None,
) -> None:
    """Explain what something is: resolution, contents, provenance.

    Example: pixcell inspect slides/case-1.svs
    """
    import json

    from pixcell.tasks.inspect import inspect as explain

    found = call("inspect", explain, {"path": path, "verify": verify}, set_)
    if as_json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        results.print(found)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, Argument(help="Where everything goes.")] = Path("demo"),
    slides: Annotated[
        list[Path] | None, Option(help="A slide or a folder of slides instead of a drawn one. Repeatable.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Walk the whole line within a quarter of an hour: slide, tiles, tiny model, pictures, report.

    Example: pixcell demo demo --slides case-1.svs
    """
    from pixcell.tasks.demo import demo as walk

    results.print(call("demo", walk, {"out": out, "slides": slides or []}, set_))


@app.command()
def encoders() -> None:
    """List the encoders that pixcell knows by name, with width, licence and source.

    Example: pixcell encoders
    """
    from pixcell.models.encoders import encoder_table

    results.print(encoder_table())
