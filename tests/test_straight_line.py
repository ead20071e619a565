"""The whole house, front door to back: a drawn slide in, generated tissue and a report out."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pixcell.config import load_recipe
from pixcell.data.drawn import draw_slide
from pixcell.data.tiling import TilingRecipe
from pixcell.provenance import read_provenance

TINY_CODEC = [
    "model.channels=[16,16]",
    "model.num_blocks=1",
    "trainer.steps=3",
    "trainer.batch_size=4",
    "trainer.checkpoint_every=3",
    "trainer.precision=fp32",
]
TINY_MODEL = [
    "model.num_layers=1",
    "model.num_attention_heads=2",
    "model.attention_head_dim=16",
    "trainer.steps=5",
    "trainer.batch_size=4",
    "trainer.checkpoint_every=5",
    "trainer.precision=fp32",
    "objective.preview_steps=2",
]


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Path:
    """Walk the line once, as a user would."""
    from pixcell.tasks.encode import encode_store
    from pixcell.tasks.evaluate import evaluate
    from pixcell.tasks.sample import sample
    from pixcell.tasks.tile import tile_slides
    from pixcell.tasks.train import train
    from pixcell.training.recipe import TrainRecipe

    place = tmp_path_factory.mktemp("line")
    draw_slide(place / "slides" / "case 1.tiff", 2048, 2048, seed=3)
    tile_slides(place / "slides", place / "store", load_recipe(TilingRecipe, "tiles-256"), workers=1)
    store = f"data.store={place / 'store'}"
    train(load_recipe(TrainRecipe, "nano-codec", [store, *TINY_CODEC]), place / "nano-codec")
    encode_store(place / "store", codec=str(place / "nano-codec"), encoder="stain-texture", field_size=128)
    overrides = [store, f"objective.codec={place / 'nano-codec'}", *TINY_MODEL]
    train(load_recipe(TrainRecipe, "nano", overrides), place / "run")
    like = place / "like.png"
    _save_first_tile(place / "store", like)
    sample(str(place / "run"), place / "samples", like=[like], count=4, seed=1, steps=2)
    evaluate(place / "store", place / "samples", extractor="stain-texture", out=place / "report.json")
    return place


def _save_first_tile(store: Path, path: Path) -> None:
    from pixcell.data.store import TileStore

    tiles = TileStore.open(store)
    with tiles.images(tiles.slide_ids()[0]) as shard:
        Image.fromarray(shard.image(0)).save(path)


def test_the_line_ends_in_pictures_that_say_what_they_are(walked):
    pictures = sorted((walked / "samples").glob("0*.png"))
    assert len(pictures) == 4
    for index, picture in enumerate(pictures):
        record = read_provenance(picture)
        assert record["synthetic"] is True
        assert record["seed"] == 1
        assert record["index"] == index
        with Image.open(picture) as image:
            assert image.size == (128, 128)


def test_the_line_ends_in_a_report_that_says_how_it_was_made(walked):
    report = json.loads((walked / "report.json").read_text())
    text = json.dumps(report)
    assert "stain-texture" in text
    assert (walked / "report.html").is_file()


def test_every_stop_of_the_line_can_be_inspected(walked):
    from pixcell.tasks.inspect import inspect

    for place in (
        "slides/case 1.tiff",
        "store",
        "nano-codec",
        "run",
        "like.png",
        "samples/00000_like.png",
        "report.json",
    ):
        assert inspect(walked / place) is not None


def test_walking_again_changes_nothing(walked):
    from pixcell.tasks.encode import encode_store
    from pixcell.tasks.sample import sample
    from pixcell.tasks.tile import tile_slides

    before = {path: path.read_bytes() for path in walked.rglob("*") if path.suffix in (".h5", ".npy", ".png")}
    tile_slides(walked / "slides", walked / "store", load_recipe(TilingRecipe, "tiles-256"), workers=1)
    encode_store(walked / "store", codec=str(walked / "nano-codec"), encoder="stain-texture", field_size=128)
    sample(
        str(walked / "run"),
        walked / "samples",
        like=[walked / "like.png"],
        count=4,
        seed=1,
        steps=2,
        batch_size=3,
    )
    assert {path: path.read_bytes() for path in before} == before
