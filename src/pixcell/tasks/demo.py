"""Walk the whole line on this machine, offline: what a newcomer runs first.

No trained weights ship with the package yet, so the demo trains a tiny model itself and says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.table import Table

from pixcell.config import load_recipe
from pixcell.console import console, facts
from pixcell.data.drawn import draw_slide
from pixcell.data.slides import find_slides
from pixcell.data.store import TileStore
from pixcell.data.tiling import TilingRecipe
from pixcell.errors import NoTissue, SomeFailed
from pixcell.files import write_whole
from pixcell.tasks.encode import encode_store
from pixcell.tasks.evaluate import evaluate
from pixcell.tasks.sample import sample
from pixcell.tasks.tile import tile_slides
from pixcell.tasks.train import train
from pixcell.training.objectives import spread_over
from pixcell.training.recipe import TrainRecipe

__all__ = ["DemoResult", "demo"]

_DRAWN_SIDE = 6144
"""Pixels at 0.5 mpp: some hundred tiles of 256."""
_MIN_TILES = 64
_HELD_OUT = 8
"""Tiles that no training sees; the pictures imitate these."""


@dataclass(frozen=True)
class DemoResult:
    """Where to look."""

    report: Path
    contact_sheet: Path
    overlays: Path
    run: Path

    def __rich__(self) -> Table:
        """Lay the result out for a terminal."""
        return facts(
            "Look at",
            {
                "report": f"{self.report} (open it in a browser)",
                "pictures": self.contact_sheet,
                "tiles kept and dropped": self.overlays,
                "how the training went": self.run / "previews",
            },
        )


def demo(
    out: Path,
    *,
    slides: Sequence[Path] = (),
    codec_steps: int = 300,
    steps: int = 800,
    count: int = 16,
    seed: int = 0,
) -> DemoResult:
    """Slides to tiles, tiles to a tiny model, the model to pictures, pictures to a report.

    Can be stopped and run again; what is done is not done twice.

    Args:
        out: Where everything goes.
        slides: Slides or folders of slides. None: one is drawn.
        codec_steps: Training steps of the small autoencoder.
        steps: Training steps of the tiny diffusion model.
        count: Pictures to generate.
        seed: Of the drawn slide, the trainings and the pictures.

    Raises:
        PixCellError: Whatever one of the tasks finds wrong.
    """
    chosen = list(slides)
    if chosen:
        _say(1, f"Your slides: {', '.join(str(path) for path in chosen)}.")
    else:
        _say(1, "No slide given, so one is drawn: shapes and colours of H&E, nobody's tissue.")
        chosen = [out / "slides" / "drawn.tiff"]
        if not chosen[0].is_file():
            draw_slide(chosen[0], _DRAWN_SIDE, _DRAWN_SIDE, seed=seed)

    _say(2, "Cutting tiles of tissue, 256 px at 0.5 microns per pixel.")
    store = out / "store"
    for place in chosen:
        find_slides(place)  # a wrong path ends the demo before any work
    for place in chosen:
        try:
            tile_slides(place, store, load_recipe(TilingRecipe, "tiles-256"))
        except SomeFailed as failed:
            console.print(f"  {failed} The demo goes on with the others.", style="yellow", markup=False)
    num_tiles = TileStore.open(store).num_tiles
    if num_tiles < _MIN_TILES:
        raise NoTissue(
            f"{num_tiles} tiles are too few to train even a tiny model on (at least {_MIN_TILES}). "
            f"See {store / 'qc'} for the reasons, or give more slides; without --slides, one is drawn."
        )
    console.print(f"  {num_tiles} tiles. Kept and dropped ones are marked in {store / 'qc'}.", markup=False)

    _say(3, f"Training a small autoencoder ({codec_steps} steps): pictures to latents and back.")
    codec = out / "runs" / "nano-codec"
    common = [f"data.store={store}", f"data.held_out={_HELD_OUT}", f"trainer.seed={seed}"]
    train(load_recipe(TrainRecipe, "nano-codec", [*common, *_lasting(codec_steps)]), codec)

    _say(4, "Encoding the tiles: latents, and embeddings that say what tissue each shows.")
    encode_store(store, codec=str(codec), encoder="stain-texture", field_size=128)

    _say(5, f"Training a tiny diffusion model ({steps} steps). This is the long part.")
    run = out / "runs" / "nano"
    train(load_recipe(TrainRecipe, "nano", [*common, f"objective.codec={codec}", *_lasting(steps)]), run)

    _say(6, f"Generating {count} pictures, each in the likeness of a tile that training did not see.")
    references = _held_out_tiles(TileStore.open(store), out / "references")
    samples = out / "samples"
    sample(str(run), samples, like=references, count=count, seed=seed)

    _say(7, "Comparing generated with real pictures.")
    report = out / "report.json"
    evaluate(store, samples, extractor="stain-texture", references=out / "references", out=report)
    console.print(
        "Done. A model of this size, trained for minutes, makes soft pictures with the right colours: "
        "it shows that the line works, not what the method can do.",
        markup=False,
    )
    return DemoResult(report.with_suffix(".html"), samples / "contact_sheet.png", store / "qc", run)


def _say(number: int, text: str) -> None:
    console.print(f"[bold]{number}/7[/] ", end="")
    console.print(text, markup=False)


def _lasting(steps: int) -> list[str]:
    """Overrides for a training of so many steps, with one checkpoint in the middle to go on from."""
    return [f"trainer.steps={steps}", f"trainer.checkpoint_every={max(1, steps // 2)}"]


def _held_out_tiles(store: TileStore, folder: Path) -> list[Path]:
    """Save as pictures the tiles that the autoencoder held out."""
    places = [
        (slide_id, tile) for slide_id in store.slide_ids() for tile in range(_num_tiles(store, slide_id))
    ]
    paths = []
    for number, chosen in enumerate(spread_over(_HELD_OUT, len(places))):
        slide_id, tile = places[chosen]
        path = folder / f"tile-{number:02d}.png"
        with store.images(slide_id) as shard, write_whole(path) as temporary:
            Image.fromarray(shard.image(tile)).save(temporary, format="PNG")
        paths.append(path)
    return paths


def _num_tiles(store: TileStore, slide_id: str) -> int:
    with store.images(slide_id) as shard:
        return len(shard)
