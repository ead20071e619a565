"""Commands that train models, sample from them, and judge what they make."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from pixcell.cli.shared import Device, Overrides, app, call
from pixcell.config import load_recipe
from pixcell.console import results
from pixcell.errors import EvaluationError, RecipeError


@app.command()
def train(
    recipe: Annotated[str, Argument(help="A recipe file, or the name of one that comes with pixcell.")],
    run: Annotated[Path | None, Option(help="The run's folder; by default runs/<recipe name>.")] = None,
    on_bad_tile: Annotated[
        Literal["fail", "drop"] | None,
        Option(help="A tile that cannot be read ends the run, or is left out and listed."),
    ] = None,
    plan: Annotated[
        bool, Option("--plan", help="Only say what it will take: memory, time, disk. Writes nothing.")
    ] = False,
    processes: Annotated[int, Option(min=1, help="With --plan: devices that would train together.")] = 1,
    probe: Annotated[
        bool, Option("--probe/--no-probe", help="With --plan: time a few steps here, half a minute.")
    ] = True,
    set_: Overrides = None,
) -> None:
    """Train a model; run it again to go on from the last checkpoint.

    Ends with 0 when complete, 75 when a signal or trainer.max_hours stopped it early, 2 on errors.

    Example: pixcell train nano --set data.store=stores/brca --set trainer.steps=2000

    Before: pixcell train train-256-paper --plan --processes 16
    """
    from pixcell.tasks.plan import plan as plan_training
    from pixcell.tasks.train import train as train_model
    from pixcell.training.recipe import TrainRecipe

    chosen = [f"trainer.on_bad_tile={on_bad_tile}"] if on_bad_tile else []
    wanted = load_recipe(TrainRecipe, recipe, [*(set_ or []), *chosen])
    if plan:
        results.print(plan_training(wanted, processes, probe))
        return
    if processes != 1 or not probe:
        raise RecipeError(
            "--processes and --no-probe are for --plan; a launcher decides how many processes train: "
            "torchrun --nproc-per-node N -m pixcell train RECIPE."
        )
    result = train_model(wanted, run)
    results.print(result)
    raise typer.Exit(result.exit_code)


@app.command()
def report(
    run: Annotated[Path, Argument(help="A run's folder: complete, in progress, stopped or killed.")],
    out: Annotated[Path | None, Option(help="The HTML file; by default report.html in the run.")] = None,
) -> None:
    """Write the report of a training: curves, previews, checkpoints, starts and stops on one page.

    Example: pixcell report runs/nano
    """
    from pixcell.tasks.training_report import report_training

    results.print(report_training(run, out))


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
        call(
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
        call(
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
    synthetic: Annotated[
        Path, Argument(help="A folder of generated pictures; or a run, whose every checkpoint is measured.")
    ],
    extractor: Annotated[
        str,
        Option(help="The feature space: 'inception', or any encoder but the model's own."),
    ],
    out: Annotated[
        Path | None,
        Option(
            help="The report; Markdown, HTML, plots go beside it. By default report.json; of a run the "
            "folder evaluations/ in it."
        ),
    ] = None,
    extractor_weights: Annotated[Path | None, Option(help="The extractor's weights on disk.")] = None,
    references: Annotated[
        Path | None, Option(help="The pictures given as --like, if they are not among REAL.")
    ] = None,
    device: Annotated[Device, Option(help="Where the networks run.")] = "auto",
    set_: Overrides = None,
) -> None:
    """Compare generated pictures with real ones.

    Example: pixcell evaluate stores/brca samples --extractor stain-texture --out report.json

    A run: pixcell evaluate stores/brca runs/mini --extractor inception --set 'where={split: [test]}'
    """
    from pixcell.tasks.evaluate import evaluate as evaluate_pictures
    from pixcell.tasks.follow import follow, is_run

    if is_run(synthetic):
        if references is not None:
            raise EvaluationError(
                f"{synthetic} is a run: its pictures are made after fields of {real}; leave --references out."
            )
        given = {
            "store": real,
            "run": synthetic,
            "extractor": extractor,
            "extractor_weights": extractor_weights,
            "device": device,
            "out": out,
        }
        results.print(call("evaluate", follow, given, set_))
        return
    results.print(
        call(
            "evaluate",
            evaluate_pictures,
            {
                "real": real,
                "synthetic": synthetic,
                "extractor": extractor,
                "extractor_weights": extractor_weights,
                "references": references,
                "out": out or Path("report.json"),
                "device": device,
            },
            set_,
        )
    )


@app.command()
def convert(
    source: Annotated[
        str, Argument(help="A run, a file, a folder, a published name, or owner/name on the hub.")
    ],
    dest: Annotated[Path, Argument(help="The folder to write; it must not exist.")],
    kind: Annotated[
        str | None,
        Option(
            "--as", help="What it is (pixcell-original, lora, ...), where tensor names should not decide."
        ),
    ] = None,
    weights: Annotated[
        str,
        Option(help="averaged, trained, or auto: averaged if there are any. Of a run also averaged-0.999."),
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
    """Turn published weights, or those of a run, into safetensors in the diffusers layout, with a model card.

    Example: pixcell convert pixcell_256.ckpt models/pixcell-256 --vae weights/sd3.5-vae
    """
    from pixcell.tasks.convert import convert as convert_weights

    results.print(
        call(
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
