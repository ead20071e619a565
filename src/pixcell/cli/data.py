"""Commands about slides and stores."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from pixcell.cli.shared import Device, Overrides, Recipe, app, attributes, call, split
from pixcell.config import load_recipe
from pixcell.console import results


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
        call(
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

    results.print(call("import", import_published_layout, {"root": published, "store": store}, set_))


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

    results.print(call("export", export_published_layout, {"store": store, "root": published}, set_))


@app.command()
def pack(
    store: Annotated[Path, Argument(help="A tile store.")],
    folder: Annotated[Path, Argument(help="Where the shards go; what is there already stays.")],
    columns: Annotated[
        list[str] | None, Option(help="Columns to take, images among them: a,b,c. By default all.")
    ] = None,
    where: Annotated[
        list[str] | None, Option(help="Take tiles with this attribute: split=train. Repeatable.")
    ] = None,
    shard_size: Annotated[str, Option(help="About how large a shard is.")] = "512MB",
    workers: Annotated[int | None, Option(min=1, help="Processes; by default one per processor.")] = None,
    set_: Overrides = None,
) -> None:
    """Write a store as WebDataset shards, to train from object storage.

    Example: pixcell pack stores/brca packs/brca --columns latents-sd3.5,embeddings-uni2-h,images
    """
    from pixcell.tasks.pack import pack_store

    given = {
        "store": store,
        "folder": folder,
        "columns": split(columns),
        "where": attributes(where),
        "shard_size": shard_size,
        "workers": workers,
    }
    results.print(call("pack", pack_store, given, set_))
