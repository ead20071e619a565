"""Whatever one points at explains itself, and what is unknown or damaged says what it is."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from pixcell.config import find_recipe, load_recipe, save_recipe
from pixcell.data.drawn import draw_slide
from pixcell.data.store import TileStore
from pixcell.data.tiling import Tile
from pixcell.errors import CorruptShard, ModelError, PixCellError, RecipeError, UnreadableSlide
from pixcell.provenance import save_synthetic_png
from pixcell.tasks.inspect import inspect


def shown(facts) -> str:
    """What a person sees."""
    console = Console(width=200, file=io.StringIO())
    console.print(facts)
    return console.file.getvalue()


def checked(path: Path, verify: bool = False):
    """Inspect, and make sure that both faces of the result work."""
    facts = inspect(path, verify=verify)
    assert json.loads(json.dumps(facts.as_json(), allow_nan=False))["kind"] == facts.kind
    assert str(facts.kind) in shown(facts)
    return facts


def jpeg(side: int, seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path) -> TileStore:
    """Two slides with three tiles each; embeddings of the first only."""
    store = TileStore.create(tmp_path / "store", {"mpp": 0.5, "tile_size": 64})
    for slide in ("one", "two"):
        tiles = [
            (Tile(slide, x * 64, 0, 64, 0.5, 1.0, 0.0, 1.0, attributes={"organ": "lung"}), jpeg(64, x))
            for x in range(3)
        ]
        store.write_images(slide, tiles, {"name": f"{slide}.svs"})
    made_by = {"kind": "embeddings", "encoder": {"name": "tiny", "sha256": "e" * 64}, "field_size": 64}
    embeddings = np.zeros((3, 1, 1, 5), np.float16)
    store.write_column(
        "embeddings-tiny",
        "one",
        [embeddings],
        shape=(1, 1, 5),
        dtype=np.float16,
        made_by=made_by,
        num_tiles=3,
    )
    return store


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with one checkpoint."""
    from pixcell.training.checkpoints import write_checkpoint
    from pixcell.training.recipe import TrainRecipe

    run = tmp_path / "run"
    save_recipe(load_recipe(TrainRecipe, "nano-codec", ["trainer.steps=40"]), run / "recipe.yaml")
    lines = [{"step": 10, "loss": 0.5, "lr": 0.1}, {"step": 20, "psnr": 20.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "environment.json").write_text(
        json.dumps([{"started": "2025-01-01T00:00:00+00:00", "torch": "2"}])
    )

    def write(folder: Path) -> None:
        vae = folder / "pipeline" / "vae"
        vae.mkdir(parents=True)
        (folder / "pipeline" / "pixcell.json").write_text('{"kind": "autoencoder", "mpp": 0.5}')
        (vae / "config.json").write_text('{"_class_name": "TissueAutoencoder", "latent_channels": 4}')
        save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2)}, vae / "diffusion_pytorch_model.safetensors")

    write_checkpoint(run, 20, write, {"held_out/psnr_db": 20.0})
    return run


def test_a_slide_tells_its_resolution_and_where_that_was_read(drawn_slide):
    facts = checked(drawn_slide.path)
    slide = facts.section("slide")
    assert facts.kind == "slide"
    assert slide["resolution"] == "0.5 microns per pixel"
    assert "XResolution" in slide["resolution read from"]
    assert slide["size"] == "2,048 x 2,048 px"
    assert slide["size in tissue"] == "1.02 x 1.02 mm"
    assert slide["colour"]
    assert len(slide["fingerprint"]) >= 16
    levels = facts.section("levels")
    assert len(levels) == drawn_slide.num_levels
    assert [level["mpp"] for level in levels] == [0.5 * level["downsample"] for level in levels]


def test_the_tissue_estimate_is_about_what_was_drawn(drawn_slide):
    stated = checked(drawn_slide.path).section("slide")["tissue (estimate)"]
    assert float(stated.split("%")[0]) / 100 == pytest.approx(drawn_slide.tissue.mean(), abs=0.12)


def test_a_slide_without_resolution_says_how_to_give_it(tmp_path):
    slide = draw_slide(tmp_path / "x.tiff", 512, 512, states_mpp=False)
    facts = checked(slide.path)
    assert "--source-mpp" in facts.section("slide")["resolution"]
    assert facts.section("levels")[0]["mpp"] is None


def test_a_slide_is_known_by_its_content_when_it_is_named_directly(tmp_path, drawn_slide):
    shutil.copy(drawn_slide.path, tmp_path / "slide.backup")
    assert checked(tmp_path / "slide.backup").kind == "slide"


def test_a_folder_of_slides_lists_them_and_what_is_broken(tmp_path, drawn_slide):
    shutil.copy(drawn_slide.path, tmp_path / "good.tiff")
    (tmp_path / "text.svs").write_text("no slide")
    facts = checked(tmp_path)
    assert facts.kind == "folder of slides"
    assert [row["slide"] for row in facts.section("slides")] == ["good.tiff"]
    assert facts.section("folder")["slides"] == 2
    assert len(facts.problems) == 1
    assert "text.svs" in facts.problems[0]


def test_a_store_tells_counts_provenance_and_what_is_missing(store):
    facts = checked(store.path)
    assert facts.section("store")["slides"] == 2
    assert facts.section("store")["tiles"] == 6
    columns = {row["column"]: row for row in facts.section("columns")}
    assert (columns["images"]["slides"], columns["images"]["missing"]) == (2, 0)
    assert (columns["embeddings-tiny"]["slides"], columns["embeddings-tiny"]["missing"]) == (1, 1)
    assert facts.section("missing columns") == [{"slide": "two", "missing": "embeddings-tiny"}]
    assert facts.section("embeddings-tiny made by")["encoder.sha256"] == "e" * 64
    assert {"attribute": "organ", "values (tiles)": "lung (6)"} in facts.section("attributes of tiles")
    assert facts.section("tiles of slides") == {"one": 3, "two": 3}
    assert "--verify" in shown(facts)


def test_verifying_a_store_finds_a_changed_byte(store):
    whole = checked(store.path, verify=True)
    assert (whole.problems, whole.verified) == ([], True)
    assert "Every checksum agrees" in shown(whole)
    shard = store.path / "embeddings-tiny" / "one.npy"
    content = bytearray(shard.read_bytes())
    content[130] ^= 1
    shard.write_bytes(content)
    assert checked(store.path).problems == []
    facts = checked(store.path, verify=True)
    assert any("embeddings-tiny/one" in problem for problem in facts.problems)


def test_verifying_lists_everything_even_where_a_store_is_too_damaged_to_be_described(store):
    for name in ("images/one.h5", "embeddings-tiny/one.npy"):
        (store.path / name).write_bytes((store.path / name).read_bytes()[:-200])
    with pytest.raises(CorruptShard, match=r"one\.h5"):
        inspect(store.path)
    facts = checked(store.path, verify=True)
    assert {problem.split(":")[0] for problem in facts.problems} >= {"images/one", "embeddings-tiny/one"}


def test_a_run_tells_how_far_it_is_and_its_newest_figures(run):
    facts = checked(run)
    assert facts.kind == "training run"
    assert facts.section("run")["steps"] == "20 of 40"
    assert facts.section("last figures") == {"step": 20, "loss": 0.5, "lr": 0.1, "psnr": 20.0}
    assert facts.section("checkpoints")[0]["step"] == 20
    assert facts.section("environment at the last start")["torch"] == "2"
    assert facts.section("recipe")["trainer.steps"] == 40


def test_verifying_a_run_finds_a_changed_weight(run):
    assert checked(run, verify=True).problems == []
    weights = next(run.rglob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "checksum differs" in checked(run, verify=True).problems[0]
    assert "checksum differs" in checked(next(run.glob("checkpoints/*")), verify=True).problems[0]


def test_a_checkpoint_tells_its_step_and_counts_its_parameters(run):
    facts = checked(next(run.glob("checkpoints/step-*")))
    assert facts.section("checkpoint")["step"] == 20
    part = facts.section("parts")[0]
    assert (part["part"], part["class"], part["parameters"]) == ("vae", "TissueAutoencoder", "17")
    assert facts.section("what its numbers mean")["mpp"] == 0.5


def test_a_pipeline_names_its_parts_and_misses_those_that_are_gone(tmp_path):
    from diffusers import AutoencoderKL, DDPMScheduler

    AutoencoderKL(block_out_channels=(32,), latent_channels=2).save_pretrained(tmp_path / "vae")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": "PixCellPipeline", "_diffusers_version": "0.42", "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"], "transformer": ["pixcell", "PixCellTransformer2DModel"],
        "safety_checker": [None, None],
    }  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    facts = checked(tmp_path)
    parts = {row["part"]: row for row in facts.section("parts")}
    expected = sum(each.numel() for each in AutoencoderKL.from_pretrained(tmp_path / "vae").parameters())
    assert parts["vae"]["parameters"] == f"{expected:,}"
    assert parts["safety_checker"]["class"] == "left out"
    assert facts.section("vae")["latent_channels"] == 2
    assert facts.section("scheduler")["num_train_timesteps"] == 1000
    assert "transformer" in facts.problems[0]
    assert checked(tmp_path / "vae").section("model")["class"] == "AutoencoderKL"


def test_a_weight_file_tells_its_tensors_without_being_loaded(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(3, 5, dtype=torch.float16)}, path, metadata={"made": "here"})
    facts = checked(path)
    assert facts.section("weights")["parameters"] == "15"
    assert facts.section("metadata") == {"made": "here"}
    assert facts.section("tensors") == [{"name": "a", "format": "F16", "shape": "3 x 5"}]


def test_published_weights_say_which_they_are_and_are_not_run(tmp_path):
    original = {
        "x_embedder.proj.weight": torch.zeros(4, 2, 2, 2),
        "y_embedder.y_proj.fc1.weight": torch.zeros(4, 3),
    }
    torch.save({"state_dict": original, "state_dict_ema": original, "epoch": 1}, tmp_path / "pixcell.ckpt")
    facts = checked(tmp_path / "pixcell.ckpt")
    assert facts.section("weights")["recognised as"] == "PixCell denoiser, original layout (pixcell-original)"
    assert "averaged" in facts.section("weights")["taken from it"]
    assert facts.section("tensors")[0]["shape"] == "4 x 2 x 2 x 2"
    torch.save({"state_dict": original, "hook": Path("x")}, tmp_path / "more.pth")
    with pytest.raises(ModelError, match="would run code"):
        inspect(tmp_path / "more.pth")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 8, (2).to_bytes(8, "little") + b"[]"])
def test_a_damaged_weight_file_is_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        inspect(tmp_path / "w.safetensors")


def test_a_generated_picture_shows_its_record(tmp_path):
    path = tmp_path / "00000.png"
    save_synthetic_png(path, np.zeros((64, 64, 3), np.uint8), {"seed": 7, "encoder": {"name": "tiny"}})
    facts = checked(path)
    assert facts.kind == "generated picture"
    assert "synthetic" in facts.section("picture")["this is"]
    assert facts.section("record")["seed"] == 7
    assert facts.section("record")["encoder.name"] == "tiny"


def test_a_folder_of_samples_sums_their_records_up(tmp_path):
    for index in range(3):
        save_synthetic_png(
            tmp_path / f"{index}.png",
            np.zeros((64, 64, 3), np.uint8),
            {"seed": 7, "index": index, "steps": 20},
        )
    facts = checked(tmp_path)
    assert facts.kind == "folder of generated pictures"
    assert facts.section("folder")["say that they are synthetic"] == 3
    assert facts.section("what the records say")["index"] == "3 different values"
    assert facts.section("what the records say")["steps"] == "20"


def test_a_plain_picture_is_not_called_synthetic(tmp_path):
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "x.png")
    assert checked(tmp_path / "x.png").kind == "plain image"


@pytest.mark.parametrize(
    ("name", "kind"), [("tiles-20x", "tiling recipe"), ("nano-codec", "training recipe")]
)
def test_a_recipe_shows_every_value(name, kind):
    facts = checked(find_recipe(name))
    assert facts.kind == kind
    assert len(facts.section("settings")) > 5


@pytest.mark.parametrize(
    ("content", "reason"), [("a: [", "not valid YAML"), ("a: 1", "no recipe"), ("tiling: {mppp: 1}", "mppp")]
)
def test_yaml_that_is_no_recipe_is_refused(tmp_path, content, reason):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(RecipeError, match=reason):
        inspect(tmp_path / "x.yaml")


def test_a_report_says_its_figures_again(tmp_path):
    from pixcell.tasks.evaluate import evaluate

    rng = np.random.default_rng(0)
    for name in ("real", "synthetic"):
        (tmp_path / name).mkdir()
        for number in range(4):
            noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{name}-{number}.png")
    out = tmp_path / "report.json"
    report = evaluate(tmp_path / "real", tmp_path / "synthetic", out=out, kernel_subsets=2, device="cpu")
    facts = checked(out)
    assert facts.section("summary")["in words"] == report.summary
    assert facts.section("figures")[1]["measure"] == "Kernel distance"


@pytest.mark.parametrize("name", ["notes.txt", "data.json", "folder", "nowhere"])
def test_what_is_unknown_is_refused_with_a_list_of_what_is_known(tmp_path, name):
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PixCellError) as caught:
        inspect(tmp_path / name)
    message = str(caught.value)
    assert name in message
    assert name == "nowhere" or "tile store" in message


@pytest.mark.parametrize("content", [b"", b"this is text"])
def test_a_file_that_only_calls_itself_a_slide_is_refused(tmp_path, content):
    (tmp_path / "x.svs").write_bytes(content)
    with pytest.raises(UnreadableSlide, match=r"x\.svs"):
        inspect(tmp_path / "x.svs")


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "prostate_whole_section_lowres.tiff"])
def test_real_slides_explain_themselves(shared_data, name):
    slide = checked(shared_data / "wsi" / name).section("slide")
    if name.startswith("CMU"):
        assert (slide["vendor"], slide["objective"]) == ("aperio", "20")
        assert slide["resolution"] == "0.499 microns per pixel"
    else:
        assert "--source-mpp" in slide["resolution"]


def test_a_recipe_of_the_package_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "training recipe" in str(inspect(Path("nano")).as_json())
    with pytest.raises(PixCellError, match="tiles-20x"):
        inspect(Path("nana"))
