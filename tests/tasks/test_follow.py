"""Every checkpoint of a run, measured on tissue that it was not trained on."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from pixcell.cli import app
from pixcell.config import parse_recipe
from pixcell.data.store import TileStore
from pixcell.errors import EvaluationError, RunError, StoreError
from pixcell.provenance import read_provenance
from pixcell.tasks.encode import encode_store
from pixcell.tasks.follow import follow, is_run
from pixcell.tasks.train import train
from pixcell.training.recipe import TrainRecipe
from training_fixtures import _Tile, codec_folder, codec_recipe, store

__all__ = ["codec_folder", "codec_recipe", "store"]  # fixtures

TEST = {"split": ["test"]}


@pytest.fixture(scope="module")
def tissue(tmp_path_factory, codec_folder) -> TileStore:
    """Two slides of eight 128-px tiles, one of them held out; encoded as 64-px fields."""
    made = two_slides(tmp_path_factory.mktemp("tissue") / "store", seed=0)
    encode_store(made.path, codec=str(codec_folder), encoder="stain-texture", field_size=64)
    return made


def two_slides(path, seed) -> TileStore:
    made = TileStore.create(path, {"tile_size": 128, "mpp": 0.5})
    rng = np.random.default_rng(seed)
    for slide_id, split in (("a", "train"), ("b", "test")):
        tiles = []
        for x in range(8):
            file = io.BytesIO()
            pattern = Image.fromarray(rng.integers(60, 255, (12, 12, 3), dtype=np.uint8))
            pattern.resize((128, 128), Image.Resampling.BICUBIC).save(file, "JPEG")
            tiles.append(
                (_Tile(slide_id, x * 128, 0, size=128, attributes={"split": split}), file.getvalue())
            )
        made.write_images(slide_id, tiles, {"source": f"{slide_id}.svs"})
    return made


@pytest.fixture(scope="module")
def run(tissue, codec_folder, tmp_path_factory):
    latents = next(name for name in tissue.columns() if name.startswith("latents"))
    content = {
        "name": "followed",
        "data": {
            "store": str(tissue.path), "size": 64, "latents": latents,
            "embeddings": "embeddings-stain-texture", "where": {"split": ["train"]}, "held_out": 2,
        },
        "model": {"name": "transformer", "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
        "objective": {"name": "denoising", "codec": str(codec_folder), "preview_steps": 2},
        "optimizer": {"lr": 1e-2},
        "trainer": {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "tensorboard": False},
    }  # fmt: skip
    return train(parse_recipe(TrainRecipe, content), tmp_path_factory.mktemp("runs") / "followed").run


FEW = {"where": TEST, "count": 6, "num_references": 4, "steps": 2}


def test_each_checkpoint_is_measured_after_the_same_held_out_fields(tissue, run, tmp_path):
    course = follow(tissue.path, run, out=tmp_path, **FEW)
    assert list(course.reports) == [2, 4]
    for step, report in course.reports.items():
        assert report.generator["step"] == step
        assert report.settings["where"] == TEST
        assert (report.real.num_fields, report.synthetic.num_pictures) == (32, 6)
        assert report.pairs.num_pairs == 6, report.pairs.reason
        assert (tmp_path / f"step-{step:08d}.html").is_file()
    first, last = (sorted((tmp_path / f"step-{step:08d}").glob("0*.png")) for step in (2, 4))
    assert [path.name for path in first] == [path.name for path in last]
    assert {path.name[6:] for path in first} == {path.name for path in (tmp_path / "references").iterdir()}
    assert not np.array_equal(np.asarray(Image.open(first[0])), np.asarray(Image.open(last[0])))
    assert read_provenance(course.sheet)["synthetic"] is True
    with Console(width=160).capture() as shown:
        Console(width=160).print(course)
    assert Image.open(course.plot).width > 1000, shown


def test_checkpoints_that_were_measured_are_not_measured_again(tissue, run, tmp_path):
    follow(tissue.path, run, out=tmp_path, **FEW)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("step-*.json")}
    again = follow(tissue.path, run, out=tmp_path, **FEW)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("step-*.json")} == written
    assert list(again.reports) == [2, 4]
    other = follow(tissue.path, run, out=tmp_path, **{**FEW, "seed": 1})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("step-*.json")} != written
    assert other.reports[2].measures != again.reports[2].measures


def test_fewer_tiles_of_the_store_can_be_compared_with(tissue, run, tmp_path):
    course = follow(tissue.path, run, out=tmp_path, max_images=4, **FEW)
    assert {report.real.num_fields for report in course.reports.values()} == {16}
    assert {report.synthetic.num_pictures for report in course.reports.values()} == {4}


def test_a_real_field_is_looked_at_once_for_all_checkpoints(tissue, run, tmp_path):
    class Counting:
        name, dim = "mean-colour", 3
        seen = 0

        def __call__(self, images):
            Counting.seen += len(images)
            return images.float().mean((2, 3))

        def describe(self):
            return {"name": self.name, "dim": self.dim, "resize": "none"}

    course = follow(tissue.path, run, out=tmp_path, extractor=Counting(), **FEW)
    assert list(course.reports) == [2, 4]
    assert Counting.seen <= 32 + 4 + 2 * 6  # fields of the store, references, pictures of two checkpoints


def test_a_report_that_was_cut_short_is_made_anew(tissue, run, tmp_path):
    whole = follow(tissue.path, run, out=tmp_path, **FEW)
    (tmp_path / "step-00000004.json").unlink()  # killed before it was written
    (tmp_path / ".step-00000002.settings").write_text("{")  # damaged
    again = follow(tissue.path, run, out=tmp_path, **FEW)
    assert replace(again.reports[2], created="") == replace(whole.reports[2], created="")
    assert replace(again.reports[4], created="") == replace(whole.reports[4], created="")


def test_a_measurement_cut_short_leaves_none_of_another_one_behind(tissue, run, tmp_path, monkeypatch):
    whole = follow(tissue.path, run, out=tmp_path, **FEW)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pixcell.tasks.follow.evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            follow(tissue.path, run, out=tmp_path, **{**FEW, "seed": 1})
    (tmp_path / "step-00000002.json").write_text((tmp_path / "step-00000004.json").read_text())
    again = follow(tissue.path, run, out=tmp_path, **FEW)
    assert replace(again.reports[2], created="") == replace(whole.reports[2], created="")


def test_a_store_that_was_tiled_anew_is_measured_anew(run, tmp_path):
    two_slides(tmp_path / "store", seed=0)
    before = follow(tmp_path / "store", run, out=tmp_path / "out", **FEW)
    shutil.rmtree(tmp_path / "store")
    two_slides(tmp_path / "store", seed=1)
    after = follow(tmp_path / "store", run, out=tmp_path / "out", **FEW)
    fresh = follow(tmp_path / "store", run, out=tmp_path / "fresh", **FEW)
    assert after.reports[4].measures == fresh.reports[4].measures != before.reports[4].measures
    assert np.array_equal(np.asarray(Image.open(after.sheet)), np.asarray(Image.open(fresh.sheet)))


def test_the_sheet_shows_the_references_that_had_their_turn(tissue, run, tmp_path):
    course = follow(tissue.path, run, out=tmp_path, **{**FEW, "count": 2})
    assert Image.open(course.sheet).width == 2 * (64 + 4) + 4


def test_the_command_takes_a_run_for_the_pictures(tissue, run, tmp_path):
    arguments = [
        "evaluate",
        str(tissue.path),
        str(run),
        "--extractor",
        "stain-texture",
        "--out",
        str(tmp_path),
    ]
    few = [
        "--set",
        "count=4",
        "--set",
        "num_references=4",
        "--set",
        "steps=1",
        "--set",
        "where={split: [test]}",
    ]
    result = CliRunner().invoke(app, [*arguments, *few])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "step-00000002.json").read_text())["generator"]["step"] == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"count": 1}, EvaluationError, "count must be at least 2, not 1"),
        ({"max_images": 1}, EvaluationError, "max_images must be at least 2, not 1"),
        ({"num_references": 30}, EvaluationError, "32 such field.s. of 64 px, too few to imitate 30"),
        ({"where": {"split": ["validation"]}}, StoreError, "validation"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_is_sampled(
    tissue, run, tmp_path, change, error, message
):
    with pytest.raises(error, match=message):
        follow(tissue.path, run, out=tmp_path / "out", **{**FEW, **change})
    assert not list(tmp_path.rglob("*.png"))


def test_a_run_without_a_denoiser_is_refused(tissue, codec_recipe, tmp_path):
    codec_run = train(codec_recipe(), tmp_path / "codec").run
    assert is_run(codec_run)
    with pytest.raises(EvaluationError, match="no denoiser"):
        follow(tissue.path, codec_run, **FEW)


def test_a_run_that_has_no_checkpoint_yet_is_said_to_have_none(tissue, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(RunError, match="no checkpoint yet"):
        follow(tissue.path, tmp_path / "run", **FEW)
