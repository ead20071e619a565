"""The command line: one short command per task, and no logic of its own.

A command parses, calls one public function, and shows the result. What a user can cause is one red line and
exit code 2 (1 when a batch ended and some of its items failed); a bug shows its traceback.
"""

import inspect as signatures
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from pydantic import ConfigDict, create_model
from typer import Argument, Option

from pixcell.config import Config, load_recipe, parse_recipe
from pixcell.console import console, results, set_up_logging
from pixcell.errors import PixCellError, SomeFailed

__all__ = ["app", "main"]

app = typer.Typer(
    name="pixcell",
    help="Generative digital histopathology: whole-slide images in, generated tissue and honest figures out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

_INTERRUPTED = 130
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Overrides = Annotated[list[str] | None, Option("--set", help="Override one value: --set section.key=value.")]
Recipe = Annotated[str, Option("--recipe", help="A recipe file, or the name of one that comes with pixcell.")]


def main() -> None:
    """Run the command line; turn users' errors into one line and an exit code."""
    for stream in (sys.stdout, sys.stderr):  # a slide's name must not end a command on a terminal of ASCII
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except PixCellError as error:
        if isinstance(error, SomeFailed) and error.result is not None:
            results.print(error.result)
        _print_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # permissions, names that are too long, a disk that died: never a bug of ours
        logging.getLogger(__name__).debug("the place in the program", exc_info=True)
        place = f"{error.filename}: " if error.filename else ""
        _print_error(
            f"{place}{error.strerror or error}. Correct the path, its permissions or the disk, and run the "
            "same command again. (-v before the command shows where it happened.)"
        )
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:  # typer has turned Ctrl-C into it already
            console.print("Stopped. Nothing that was finished is lost; run the same command again to go on.")
        raise


def _print_error(message: str) -> None:
    console.print("[bold red]Error:[/]", style="red", end=" ")
    console.print(message, style="red", markup=False, soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        from pixcell import __version__

        print(f"pixcell {__version__}")
        raise typer.Exit


@app.callback()
def _before(
    verbose: Annotated[bool, Option("--verbose", "-v", help="Say more while working.")] = False,
    version: Annotated[
        bool,
        Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    set_up_logging(verbose)


@app.command()
def tile(
    slides: Annotated[Path, Argument(help="A slide, a folder of slides, or of ready-made tiles.")],
    store: Annotated[Path, Argument(help="Where the tile store grows; finished slides are skipped.")],
    recipe: Recipe = "tiles-20x",
    metadata: Annotated[
        Path | None,
        Option(help="CSV: slide (or image), mpp, label, organ, stain, split, columns of yours."),
    ] = None,
    source_mpp: Annotated[
        float | None, Option(help="Microns per pixel of the slides, over what the files say.")
    ] = None,
    ready_made: Annotated[
        bool, Option("--ready-made", help="SLIDES is a folder of tile images, not of slides.")
    ] = False,
    workers: Annotated[int | None, Option(min=1, help="Processes; by default one per processor.")] = None,
    engine: Annotated[
        Literal["processes", "ray"], Option(help="Where the work runs: this machine, or a Ray cluster.")
    ] = "processes",
    set_: Overrides = None,
) -> None:
    """Cut slides into tiles of tissue.

    Example: pixcell tile slides/ stores/brca --set tiling.min_tissue=0.7
    """
    from pixcell.data.tiling import TilingRecipe
    from pixcell.tasks.tile import tile_slides

    result = tile_slides(
        slides,
        store,
        load_recipe(TilingRecipe, recipe, set_ or []),
        metadata=metadata,
        source_mpp=source_mpp,
        ready_made=ready_made,
        workers=workers,
        engine=engine,
    )
    results.print(result)


@app.command()
def encode(
    store: Annotated[Path, Argument(help="A tile store; finished slides are skipped.")],
    codec: Annotated[
        str | None, Option(help="Autoencoder for the latents: a folder, a run, or a hub id with --download.")
    ] = None,
    encoder: Annotated[
        str | None,
        Option(help="Encoder for the embeddings: one of 'pixcell encoders', timm/NAME, or a folder."),
    ] = None,
    encoder_weights: Annotated[Path | None, Option(help="The encoder's weights on disk.")] = None,
    field_size: Annotated[int, Option(help="Side of the field one embedding describes, in pixels.")] = 256,
    download: Annotated[bool, Option("--download", help="Fetch the named weights from the hub.")] = False,
    device: Annotated[Device, Option(help="Where the networks run.")] = "auto",
    set_: Overrides = None,
) -> None:
    """Add latents and embeddings to a store.

    Example: pixcell encode stores/brca --codec runs/nano-codec --encoder stain-texture
    """
    from pixcell.tasks.encode import encode_store

    results.print(
        _call(
            "encode",
            encode_store,
            {
                "store": store,
                "codec": codec,
                "encoder": encoder,
                "encoder_weights": encoder_weights,
                "field_size": field_size,
                "download": download,
                "device": device,
            },
            set_,
        )
    )


@app.command()
def train(
    recipe: Annotated[str, Argument(help="A recipe file, or the name of one that comes with pixcell.")],
    run: Annotated[Path | None, Option(help="The run's folder; by default runs/<recipe name>.")] = None,
    set_: Overrides = None,
) -> None:
    """Train a model; run it again to go on from the last checkpoint.

    Example: pixcell train nano --set data.store=stores/brca --set trainer.steps=2000
    """
    from pixcell.tasks.train import train as train_model
    from pixcell.training.recipe import TrainRecipe

    results.print(train_model(load_recipe(TrainRecipe, recipe, set_ or []), run))


@app.command()
def sample(
    model: Annotated[str, Argument(help="A run, a checkpoint, or a pipeline folder.")],
    out: Annotated[Path, Option(help="Where the pictures go.")],
    like: Annotated[
        list[Path] | None, Option(help="A picture, or a folder of them, whose tissue to imitate. Repeatable.")
    ] = None,
    prior: Annotated[
        Path | None, Option(help="Draw conditions from a prior that 'pixcell prior' fitted.")
    ] = None,
    label: Annotated[str | None, Option(help="Draw this label's tissue only (with --prior).")] = None,
    unconditional: Annotated[bool, Option("--unconditional", help="Imitate nothing.")] = False,
    count: Annotated[int, Option(help="How many pictures in all.")] = 16,
    seed: Annotated[int, Option(help="Same seed, same pictures.")] = 0,
    steps: Annotated[int | None, Option(help="Steps of the sampler; by default 20.")] = None,
    guidance: Annotated[
        float | None, Option(help="Guidance scale s in u + s (c - u); 1 is none; by default the model's.")
    ] = None,
    batch_size: Annotated[int, Option(help="Pictures at a time; does not change them.")] = 8,
    source_mpp: Annotated[float | None, Option(help="Microns per pixel of the --like pictures.")] = None,
    device: Annotated[Device, Option(help="Where the networks run.")] = "auto",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace pictures of another recipe.")] = False,
    set_: Overrides = None,
) -> None:
    """Generate tissue.

    Example: pixcell sample runs/nano --like tile.png --count 16 --seed 1 --out samples
    """
    from pixcell.tasks.sample import sample as sample_pictures

    results.print(
        _call(
            "sample",
            sample_pictures,
            {
                "model": model,
                "out": out,
                "like": like or [],
                "prior": prior,
                "label": label,
                "unconditional": unconditional,
                "count": count,
                "seed": seed,
                "steps": steps,
                "guidance_scale": guidance,
                "batch_size": batch_size,
                "source_mpp": source_mpp,
                "device": device,
                "overwrite": overwrite,
            },
            set_,
        )
    )


@app.command()
def prior(
    store: Annotated[Path, Argument(help="A store with a column of embeddings.")],
    out: Annotated[Path, Argument(help="The folder of the prior.")],
    column: Annotated[
        str | None, Option(help="The column of embeddings; by default the only one there is.")
    ] = None,
    size: Annotated[
        int | None, Option(help="Side of the model's pictures, in pixels; by default one field.")
    ] = None,
    by: Annotated[
        str | None, Option(help="Attribute (label, organ, ...) whose values can then be asked for.")
    ] = None,
    components: Annotated[int, Option(help="Gaussians per label; more than 1 is a mixture.")] = 1,
    prototypes: Annotated[int, Option(help="Real fields to choose per label, with their pictures.")] = 0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace a prior that is there.")] = False,
    set_: Overrides = None,
) -> None:
    """Fit a prior to embeddings, to sample without references.

    Example: pixcell prior stores/brca priors/brca --by label --components 4
    """
    from pixcell.tasks.prior import fit_prior

    results.print(
        _call(
            "prior",
            fit_prior,
            {
                "store": store,
                "out": out,
                "column": column,
                "size": size,
                "by": by,
                "components": components,
                "prototypes": prototypes,
                "overwrite": overwrite,
            },
            set_,
        )
    )


@app.command()
def evaluate(
    real: Annotated[Path, Argument(help="A store, or a folder of real pictures.")],
    synthetic: Annotated[Path, Argument(help="A folder of generated pictures.")],
    extractor: Annotated[
        str,
        Option(help="The feature space: 'inception', or any encoder but the model's own."),
    ],
    out: Annotated[Path, Option(help="The report; Markdown, HTML, plots go beside it.")] = Path(
        "report.json"
    ),
    extractor_weights: Annotated[Path | None, Option(help="The extractor's weights on disk.")] = None,
    references: Annotated[
        Path | None, Option(help="The pictures given as --like, if they are not among REAL.")
    ] = None,
    device: Annotated[Device, Option(help="Where the networks run.")] = "auto",
    set_: Overrides = None,
) -> None:
    """Compare generated pictures with real ones.

    Example: pixcell evaluate stores/brca samples --extractor stain-texture --out report.json
    """
    from pixcell.tasks.evaluate import evaluate as evaluate_pictures

    results.print(
        _call(
            "evaluate",
            evaluate_pictures,
            {
                "real": real,
                "synthetic": synthetic,
                "extractor": extractor,
                "extractor_weights": extractor_weights,
                "references": references,
                "out": out,
                "device": device,
            },
            set_,
        )
    )


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

    found = _call("inspect", explain, {"path": path, "verify": verify}, set_)
    if as_json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        results.print(found)
    if found.problems:
        raise typer.Exit(1)


@app.command("import")
def import_(
    published: Annotated[Path, Argument(help="A folder in the published PixCell layout.")],
    store: Annotated[Path, Argument(help="The store to make.")],
    set_: Overrides = None,
) -> None:
    """Read the published PixCell layout into a store.

    Example: pixcell import pancan/ stores/pancan
    """
    from pixcell.tasks.published import import_published_layout

    results.print(_call("import", import_published_layout, {"root": published, "store": store}, set_))


@app.command("export")
def export_(
    store: Annotated[Path, Argument(help="A store of 1024-px tiles.")],
    published: Annotated[Path, Argument(help="The folder to write in the published PixCell layout.")],
    set_: Overrides = None,
) -> None:
    """Write a store in the published PixCell layout, for the original training code.

    Example: pixcell export stores/pancan pancan/
    """
    from pixcell.tasks.published import export_published_layout

    results.print(_call("export", export_published_layout, {"store": store, "root": published}, set_))


@app.command()
def convert(
    source: Annotated[str, Argument(help="A file, a folder, a published name, or owner/name on the hub.")],
    dest: Annotated[Path, Argument(help="The folder to write; it must not exist.")],
    kind: Annotated[
        str | None,
        Option(
            "--as", help="What it is (pixcell-original, lora, ...), where tensor names should not decide."
        ),
    ] = None,
    weights: Annotated[
        Literal["auto", "ema", "raw"],
        Option(help="Of a training checkpoint: averaged, trained, or averaged ones if there are any."),
    ] = "auto",
    precision: Annotated[
        Literal["stored", "fp32", "bf16", "fp16"], Option(help="Number format to write.")
    ] = "stored",
    vae: Annotated[
        str | None, Option(help="Autoencoder that makes a denoiser a pipeline: a folder, or a name (sd3.5).")
    ] = None,
    base: Annotated[str | None, Option(help="The denoiser that adapters alone belong to.")] = None,
    heads: Annotated[
        int | None, Option(min=1, help="Attention heads, where nothing tells; published: 72 wide.")
    ] = None,
    skip_objects: Annotated[
        bool,
        Option("--skip-objects", help="Leave out what is no tensor of a pickle, instead of refusing it."),
    ] = False,
    download: Annotated[bool, Option("--download", help="Fetch what is not on this machine.")] = False,
    set_: Overrides = None,
) -> None:
    """Turn published weights into safetensors in the diffusers layout, with a model card.

    Example: pixcell convert pixcell_256.ckpt models/pixcell-256 --vae weights/sd3.5-vae
    """
    from pixcell.tasks.convert import convert as convert_weights

    results.print(
        _call(
            "convert",
            convert_weights,
            {
                "source": source,
                "dest": dest,
                "kind": kind,
                "weights": weights,
                "precision": precision,
                "vae": vae,
                "base": base,
                "heads": heads,
                "skip_objects": skip_objects,
                "download": download,
            },
            set_,
        )
    )


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

    results.print(_call("demo", walk, {"out": out, "slides": slides or []}, set_))


@app.command()
def encoders() -> None:
    """List the encoders that pixcell knows by name, with width, licence and source.

    Example: pixcell encoders
    """
    from pixcell.models.encoders import encoder_table

    results.print(encoder_table())


class _Options(Config):
    """Arguments of a task; some may be objects that only Python code can give."""

    model_config = ConfigDict(arbitrary_types_allowed=True)


def _call(command: str, task: Callable[..., Any], given: dict[str, Any], overrides: list[str] | None) -> Any:
    """Call a task with its keyword arguments checked; ``--set`` reaches those that have no flag."""
    hints = get_type_hints(task)
    fields = {
        name: (hints[name], ... if parameter.default is signatures.Parameter.empty else parameter.default)
        for name, parameter in signatures.signature(task).parameters.items()
    }
    kind: type[Config] = create_model("Options", __base__=_Options, **fields)  # type: ignore[call-overload]
    options = parse_recipe(kind, given, overrides or (), source=f"pixcell {command}")
    return task(**{name: getattr(options, name) for name in fields})
