"""Same seed, same picture, whatever the batch size; every picture says what it is."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import make_scheduler
from pixcell.errors import (
    MissingWeights,
    ModelError,
    OutputError,
    RecipeError,
    RunError,
    SlideError,
    UnreadableSlide,
)
from pixcell.models.encoders import load_encoder
from pixcell.provenance import environment, read_provenance
from pixcell.tasks.sample import sample
from pixcell.training.checkpoints import write_checkpoint
from tiny_models import tiny_transformer, tiny_vae

STEPS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder: 128-pixel pictures of 2 x 2 fields, imitating stain and texture."""
    encoder = load_encoder("stain-texture")
    pipeline = PixCellPipeline(
        tiny_transformer(caption_channels=encoder.dim),
        tiny_vae(),
        make_scheduler(),
        {"encoder": encoder.made_by(), "field_size": 64, "mpp": 0.5},
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


def tissue(seed, height=128, width=128):
    """Pink with purple dots: enough for an encoder of stains."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), (225, 160, 200), np.int16) + rng.integers(
        -20, 20, (height, width, 3)
    )
    for y, x in rng.integers(4, min(height, width) - 4, (40, 2)):
        pixels[y - 3 : y + 3, x - 3 : x + 3] = (90, 50, 140)
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("like")
    for index, name in enumerate(("one", "zwei Gewebe", "三")):
        Image.fromarray(tissue(index, 140, 150)).save(folder / f"{name}.png")
    return sorted(folder.iterdir())


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


@pytest.fixture(scope="module")
def eight(model, references, tmp_path_factory):
    """The pictures that all others are compared with."""
    out = tmp_path_factory.mktemp("eight")
    result = sample(model, out, like=references, count=8, seed=1, steps=STEPS, batch_size=8)
    return out, result


class TestPictures:
    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    def test_files_are_identical_whatever_the_batch_size(
        self, model, references, eight, tmp_path, batch_size
    ):
        sample(model, tmp_path, like=references, count=8, seed=1, steps=STEPS, batch_size=batch_size)
        assert bytes_of(tmp_path) == bytes_of(eight[0])

    def test_files_are_identical_whatever_the_number_of_threads(self, model, references, eight, tmp_path):
        before = torch.get_num_threads()
        torch.set_num_threads(2 if before == 1 else 1)
        try:
            sample(model, tmp_path, like=references, count=8, seed=1, steps=STEPS, batch_size=8)
        finally:
            torch.set_num_threads(before)
        assert bytes_of(tmp_path) == bytes_of(eight[0])

    def test_more_pictures_are_a_continuation(self, model, references, eight, tmp_path):
        sample(model, tmp_path, like=references, count=3, seed=1, steps=STEPS)
        assert bytes_of(tmp_path).items() <= bytes_of(eight[0]).items()
        result = sample(model, tmp_path, like=references, count=8, seed=1, steps=STEPS)
        assert (result.num_made, result.num_kept) == (5, 3)
        assert bytes_of(tmp_path) == bytes_of(eight[0])

    def test_seed_reference_and_steps_matter(self, model, references, tmp_path):
        def made(name, **changes):
            arguments = {"like": references[:1], "count": 1, "seed": 1, "steps": STEPS} | changes
            sample(model, tmp_path / name, **arguments)
            return np.asarray(Image.open(next((tmp_path / name).glob("00000_*.png")))).astype(int)

        plain = made("plain")
        for name, changes in {
            "seed": {"seed": 2},
            "like": {"like": references[1:2]},
            "steps": {"steps": STEPS + 1},
            "guidance": {"guidance_scale": 6.0},
            "unguided": {"guidance_scale": 1.0},
            "scheduler": {"scheduler": "ddpm"},
            "nothing": {"like": (), "unconditional": True},
        }.items():
            assert np.abs(made(name, **changes) - plain).max() > 0, name

    @pytest.mark.parametrize("scheduler", ["ddpm", "sde-dpm-solver++"])
    def test_stochastic_schedulers_keep_the_promise(self, model, references, tmp_path, scheduler):
        for batch_size in (1, 3):
            sample(
                model,
                tmp_path / str(batch_size),
                like=references,
                count=3,
                seed=1,
                steps=4,
                scheduler=scheduler,
                batch_size=batch_size,
            )
        assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "3")

    def test_references_take_turns_and_names_say_so(self, eight, references):
        names = sorted(bytes_of(eight[0]))
        assert len(names) == 8
        assert [name[6:-4] for name in names] == [references[i % 3].stem for i in range(8)]

    def test_pictures_are_of_the_models_size(self, eight):
        for path in eight[0].glob("0*.png"):
            with Image.open(path) as image:
                assert (image.size, image.mode) == ((128, 128), "RGB")


class TestRecords:
    def test_each_picture_says_that_it_is_synthetic_and_how_to_make_it_again(self, eight, references):
        record = read_provenance(sorted(eight[0].glob("00004_*.png"))[0])
        assert record["synthetic"] is True
        expected = {
            "model": "tiny",
            "seed": 1,
            "index": 4,
            "steps": STEPS,
            "guidance_scale": 2.0,
            "scheduler": "DPMSolverMultistepScheduler",
            "scheduler_settings": {},
            "like": references[1].name,
            "mpp": 0.5,
            "size": 128,
            "device": "cpu",
            "precision": "fp32",
        }
        assert {key: record[key] for key in expected} == expected
        assert record["encoder"]["name"] == "stain-texture"
        assert len(record["model_sha256"]) == len(record["like_sha256"]) == len(record["codec_sha256"]) == 64
        assert record["embedding_hash"]
        assert record["like_resolution"] == "not stated: taken pixel for pixel"
        assert record["versions"] == environment()

    def test_two_solvers_of_one_class_are_two_recipes(self, model, references, tmp_path):
        arguments = {"like": references[:1], "count": 1, "seed": 1, "steps": STEPS}
        sample(model, tmp_path, **arguments, scheduler="dpm-solver++")
        with pytest.raises(OutputError, match=r"differs in scheduler_settings .*sde-dpmsolver\+\+"):
            sample(model, tmp_path, **arguments, scheduler="sde-dpm-solver++")

    def test_the_list_names_every_picture(self, eight):
        listed = json.loads((eight[0] / "samples.json").read_text())
        assert [entry["file"] for entry in listed["pictures"]] == sorted(bytes_of(eight[0]))
        assert listed["recipe"]["seed"] == 1

    def test_the_contact_sheet_shows_each_reference_beside_its_pictures(self, eight, references):
        sheet = np.asarray(Image.open(eight[1].contact_sheet)).astype(int)
        assert read_provenance(eight[1].contact_sheet)["contact_sheet"] is True
        reference = Image.fromarray(tissue(0, 140, 150)[6:134, 11:139]).resize(
            (192, 192), Image.Resampling.LANCZOS
        )
        top = 16 + 28
        np.testing.assert_array_equal(sheet[top : top + 192, 16:208], np.asarray(reference))
        picture = Image.open(next(eight[0].glob("00000_*.png"))).resize((192, 192), Image.Resampling.LANCZOS)
        left = 16 + 192 + 24
        np.testing.assert_array_equal(sheet[top : top + 192, left : left + 192], np.asarray(picture))

    def test_the_result_says_what_was_done(self, eight):
        assert eight[1].num_made == 8
        assert eight[1].references == tuple(sorted(eight[1].references))
        table = eight[1].__rich__()
        assert "pictures" in [str(cell) for cell in table.columns[0].cells]


class TestModels:
    def test_a_run_and_a_checkpoint_are_models(self, model, references, eight, tmp_path):
        def write(folder):
            shutil.copytree(model, folder / "pipeline")

        run = tmp_path / "my run"
        (run / "checkpoints").mkdir(parents=True)
        checkpoint = write_checkpoint(run, 40, write)
        for place in (run, checkpoint.path, checkpoint.pipeline):
            out = tmp_path / f"out-{place.name}"
            result = sample(place, out, like=references, count=1, seed=1, steps=STEPS)
            assert (result.model, result.step) == ("my run", 40)
            mine, other = (np.asarray(Image.open(next(f.glob("00000*.png")))) for f in (out, eight[0]))
            np.testing.assert_array_equal(mine, other)

    def test_a_resolution_is_heeded(self, model, tmp_path):
        """A reference at 0.25 microns per pixel is seen at the model's 0.5."""
        fine = np.repeat(np.repeat(tissue(0), 2, 0), 2, 1)
        Image.fromarray(fine).save(tmp_path / "fine.png")
        Image.fromarray(tissue(0)).save(tmp_path / "same.png")
        for name, mpp in (("fine", 0.25), ("same", 0.5)):
            sample(
                model, tmp_path / name, like=[tmp_path / f"{name}.png"], count=1, steps=STEPS, source_mpp=mpp
            )
        one, other = (read_provenance(tmp_path / name / f"00000_{name}.png") for name in ("fine", "same"))
        assert one["like_resolution"].startswith("0.25 mpp")
        assert other["like_resolution"].startswith("0.5 mpp")
        sheets = [Image.open(tmp_path / name / "contact_sheet.png") for name in ("fine", "same")]
        seen, expected = (np.asarray(sheet).astype(int)[44:236, 16:208] for sheet in sheets)
        assert np.abs(seen - expected).mean() < 5, "the same piece of tissue at the same size"

    def test_a_folder_of_references(self, model, references, eight, tmp_path):
        sample(model, tmp_path, like=[references[0].parent], count=8, seed=1, steps=STEPS)
        assert bytes_of(tmp_path) == bytes_of(eight[0])

    def test_a_folder_of_samples_is_imitated_without_its_contact_sheet(self, model, eight, tmp_path):
        out, _ = eight
        result = sample(model, tmp_path, like=[out], count=1, steps=1)
        assert len(result.references) == 8
        assert "contact_sheet.png" not in result.references


class TestRestart:
    def test_what_is_there_is_kept(self, model, references, eight, tmp_path):
        sample(model, tmp_path, like=references, count=8, seed=1, steps=STEPS)
        victim = sorted(tmp_path.glob("00002_*.png"))[0]
        victim.unlink()
        times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
        result = sample(model, tmp_path, like=references, count=8, seed=1, steps=STEPS)
        assert (result.num_made, result.num_kept) == (1, 7)
        assert all(path.stat().st_mtime_ns == then for path, then in times.items())
        assert bytes_of(tmp_path) == bytes_of(eight[0])

    def test_pictures_of_another_recipe_are_refused_and_named(self, model, references, tmp_path):
        sample(model, tmp_path, like=references[:1], count=2, seed=1, steps=STEPS)
        before = bytes_of(tmp_path)
        with pytest.raises(
            OutputError, match=r"2 picture\(s\) of another recipe: 00000_one\.png differs in seed \(1 inst"
        ):
            sample(model, tmp_path, like=references[:1], count=2, seed=2, steps=STEPS)
        assert bytes_of(tmp_path) == before

    def test_pictures_under_other_names_count_too(self, model, references, tmp_path):
        sample(model, tmp_path, like=references[:1], count=2, seed=1, steps=STEPS)
        with pytest.raises(OutputError, match="of another recipe"):
            sample(model, tmp_path, unconditional=True, count=1, seed=1, steps=STEPS)

    def test_they_are_replaced_when_asked(self, model, references, tmp_path):
        sample(model, tmp_path, like=references[:1], count=3, seed=1, steps=STEPS)
        sample(model, tmp_path, like=references[:1], count=2, seed=2, steps=STEPS, overwrite=True)
        assert {read_provenance(path)["seed"] for path in tmp_path.glob("0*.png")} == {2}

    def test_pictures_that_nobody_generated_are_never_replaced(self, model, references, tmp_path):
        own = tmp_path / "00000_one.png"
        Image.fromarray(tissue(0)).save(own)
        before = own.read_bytes()
        for overwrite in (False, True):
            with pytest.raises(OutputError):
                sample(model, tmp_path, like=references[:1], count=1, steps=STEPS, overwrite=overwrite)
        assert own.read_bytes() == before

    def test_a_killed_process_loses_nothing_but_time(self, model, references, eight, tmp_path):
        """SIGKILL in the middle, then the same command: the same bytes as undisturbed."""
        arguments = {"like": [str(path) for path in references], "count": 400, "seed": 1, "steps": STEPS}
        code = (
            "from pathlib import Path; from pixcell.tasks.sample import sample; "
            f"sample({str(model)!r}, Path({str(tmp_path)!r}), **{arguments!r})"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while len(list(tmp_path.glob("0*.png"))) < 3 and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.kill()
        assert process.wait() == -9, "it was still at work"
        assert not (tmp_path / "samples.json").exists()
        result = sample(model, tmp_path, like=references, count=8, seed=1, steps=STEPS)
        assert result.num_kept >= 3
        assert bytes_of(tmp_path).items() >= bytes_of(eight[0]).items()


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"like": ()}, RecipeError, "nothing to imitate"),
            ({"unconditional": True}, RecipeError, "contradict"),
            ({"count": 0}, RecipeError, "--count 0 must be at least 1"),
            ({"count": 10**9}, RecipeError, "--count 1000000000 is more than"),
            ({"batch_size": 0}, RecipeError, "--batch-size 0"),
            ({"seed": -1}, RecipeError, "--seed -1"),
            ({"guidance_scale": float("nan")}, RecipeError, "--guidance nan"),
            ({"steps": -5}, ModelError, "-5 sampling steps are not possible"),
            ({"scheduler": "euler-x"}, ModelError, "no scheduler 'euler-x'"),
            ({"device": "tpu:7"}, ModelError, "tpu"),
            ({"precision": "fp8"}, ModelError, "fp8"),
            ({"source_mpp": -1.0}, SlideError, "positive number"),
            ({"encoder": "timm/vit_tiny_patch16_224"}, MissingWeights, "."),
        ],
    )
    def test_arguments(self, model, references, tmp_path, arguments, error, message):
        with pytest.raises(error, match=message):
            sample(
                model, tmp_path / "out", **({"like": references[:1], "count": 1, "steps": STEPS} | arguments)
            )
        assert not (tmp_path / "out").exists()

    def test_no_model(self, references, tmp_path):
        with pytest.raises(RunError, match="is not a run"):
            sample(tmp_path / "nowhere", tmp_path / "out", like=references)

    def test_a_reference_that_is_missing_or_no_picture(self, model, tmp_path):
        (tmp_path / "notes.png").write_text("not a picture")
        for name in ("notes.png", "missing.png"):
            with pytest.raises(UnreadableSlide, match=name):
                sample(model, tmp_path / "out", like=[tmp_path / name], steps=STEPS)

    def test_a_store_is_no_folder_of_references(self, model, tmp_path):
        """Its only pictures are overviews with masks drawn over them."""
        (tmp_path / "store.json").touch()
        (tmp_path / "qc").mkdir()
        Image.fromarray(tissue(1)).save(tmp_path / "qc" / "case.png")
        with pytest.raises(SlideError, match="is a tile store"):
            sample(model, tmp_path / "out", like=[tmp_path], count=1, steps=1)

    def test_a_changed_checkpoint_makes_no_pictures(self, model, references, tmp_path):
        """Changed weights would make other pictures, and nothing would tell."""
        checkpoint = write_checkpoint(
            tmp_path / "run", 3, lambda folder: shutil.copytree(model, folder / "pipeline") and None
        )
        weights = next((checkpoint.pipeline / "transformer").glob("*.safetensors"))
        changed = bytearray(weights.read_bytes())
        changed[-1] ^= 1
        weights.write_bytes(changed)
        for place in (tmp_path / "run", checkpoint.path, checkpoint.pipeline):
            with pytest.raises(RunError, match="its checksum differs"):
                sample(place, tmp_path / "out", like=references, count=1, steps=1)

    def test_a_guidance_beyond_all_numbers_makes_no_black_pictures(self, model, references, tmp_path):
        with pytest.raises(ModelError, match="Lower the guidance"):
            sample(model, tmp_path / "out", like=references, count=1, steps=1, guidance_scale=1e38)
        assert not list((tmp_path / "out").glob("*.png"))

    def test_a_folder_without_pictures(self, model, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(SlideError):
            sample(model, tmp_path / "out", like=[tmp_path / "empty"], steps=STEPS)

    def test_a_reference_smaller_than_the_field(self, model, tmp_path):
        Image.fromarray(tissue(0, 100, 300)).save(tmp_path / "small.png")
        with pytest.raises(
            SlideError, match=r"small\.png is 300 x 100 pixels .* makes pictures of 128 x 128"
        ):
            sample(model, tmp_path / "out", like=[tmp_path / "small.png"], steps=STEPS)
        Image.fromarray(tissue(0, 200, 200)).save(tmp_path / "fine.png")
        with pytest.raises(SlideError, match="must have 256 x 256"):
            sample(model, tmp_path / "out", like=[tmp_path / "fine.png"], source_mpp=0.25, steps=STEPS)

    def facts_changed(self, model, tmp_path, change):
        shutil.copytree(model, tmp_path / "model")
        path = tmp_path / "model/pixcell.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content)))
        return tmp_path / "model"

    def test_another_encoder_than_the_model_was_trained_with(self, model, references, tmp_path):
        changed = self.facts_changed(
            model, tmp_path, lambda facts: facts | {"encoder": facts["encoder"] | {"sha256": "f" * 64}}
        )
        with pytest.raises(ModelError, match="is not the one the model was trained with"):
            sample(changed, tmp_path / "out", like=references)

    def test_a_model_that_names_no_encoder(self, model, references, tmp_path):
        changed = self.facts_changed(model, tmp_path, lambda facts: {"mpp": 0.5})
        with pytest.raises(ModelError, match="does not say which encoder"):
            sample(changed, tmp_path / "out", like=references)
        named = sample(
            changed, tmp_path / "out", like=references, encoder="stain-texture", count=1, steps=STEPS
        )
        assert named.num_made == 1

    def test_embeddings_of_another_width(self, references, tmp_path):
        pipeline = PixCellPipeline(tiny_transformer(), tiny_vae(), make_scheduler())
        pipeline.save_pretrained(tmp_path / "narrow")
        with pytest.raises(ModelError, match=r"embeddings \d+ wide, the model takes 12"):
            sample(tmp_path / "narrow", tmp_path / "out", like=references, encoder="stain-texture")

    def test_a_place_that_cannot_be_written(self, model, references, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="choose another output folder"):
            sample(model, tmp_path / "file", like=references[:1], count=1, steps=STEPS)
