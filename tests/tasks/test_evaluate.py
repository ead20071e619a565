"""From two folders to a report that a person can open."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from pixcell.data.drawn import draw_tissue
from pixcell.errors import EvaluationError, OutputError, StoreError, UnreadableSlide
from pixcell.evaluation.report import Report
from pixcell.provenance import save_synthetic_png
from pixcell.tasks.evaluate import evaluate

SIDE = 96
FAST = {"kernel_subsets": 10, "device": "cpu"}


@pytest.fixture(scope="session")
def tissue():
    image = draw_tissue(6 * SIDE, 6 * SIDE, seed=3)
    return [
        image[y : y + SIDE, x : x + SIDE] for y in range(0, 6 * SIDE, SIDE) for x in range(0, 6 * SIDE, SIDE)
    ]


def record(number, **more):
    return {
        "like": f"case-{number:02d}.png", "index": number, "seed": 1, "steps": 20, "guidance_scale": 2.0,
        "scheduler": "DPMSolverMultistepScheduler", "model": "nano", "model_sha256": "a" * 64, "mpp": 0.5,
        "encoder": "stain-texture", **more,
    }  # fmt: skip


@pytest.fixture
def folders(tmp_path, tissue):
    """24 real pictures, and 12 paler ones that were "made" after the first of them."""
    real, synthetic = tmp_path / "real", tmp_path / "synthetic"
    real.mkdir()
    for number, image in enumerate(tissue[:24]):
        Image.fromarray(image).save(real / f"case-{number:02d}.png")
    for number, image in enumerate(tissue[:12]):
        paler = np.clip(image + (255.0 - image) * 0.3, 0, 255).astype(np.uint8)
        save_synthetic_png(synthetic / f"{number:05d}.png", paler, record(number))
    return real, synthetic


@pytest.fixture
def report(folders, tmp_path):
    return evaluate(*folders, out=tmp_path / "out" / "report.json", **FAST)


def test_a_report_says_what_was_compared_and_how(report):
    assert (report.real.num_pictures, report.synthetic.num_pictures) == (24, 12)
    assert report.synthetic.num_marked_synthetic == 12
    assert report.synthetic.mpp == [0.5]
    assert report.generator["model_sha256"] == "a" * 64
    assert (report.generator["steps"], report.generator["guidance_scale"], report.generator["seed"]) == (
        20,
        2.0,
        1,
    )
    assert "like" not in report.generator
    assert len(report.extractor["sha256"]) == 64
    assert report.extractor["resize"]
    assert {"pixcell", "torch", "numpy", "pillow"} <= set(report.environment)
    assert report.settings["split_unit"] == "picture"


def test_few_pictures_have_a_kernel_distance_with_floor_and_no_frechet_distance(report):
    frechet, kernel = report.measure("frechet"), report.measure("kernel")
    assert frechet.value is None
    assert "129 pictures" in frechet.reason
    assert kernel.value > 0
    assert kernel.floor is not None
    assert kernel.matched_count == 12
    assert any("Few pictures" in warning for warning in report.warnings)


def test_pictures_are_nearest_to_the_reference_they_were_made_after(report):
    assert (report.pairs.num_pairs, report.pairs.num_references, report.pairs.found_by) == (12, 12, "like")
    assert report.pairs.cosine_mean > report.pairs.mismatched_mean


def test_the_space_that_conditioned_the_generator_is_named_as_flattering(report):
    assert any("flatters" in warning for warning in report.warnings)


def test_json_markdown_plot_and_page_stand_beside_each_other(report, tmp_path):
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        f"report.{end}" for end in ("html", "json", "md", "png")
    ]
    assert Report.load(out / "report.json") == report
    with Image.open(out / "report.png") as plot:
        assert plot.width > 1000
    assert report.summary in (out / "report.md").read_text(encoding="utf-8")


def test_the_page_asks_no_other_host_and_escapes_what_it_shows(folders, tmp_path, tissue):
    real, synthetic = folders
    save_synthetic_png(synthetic / "<script>.png", tissue[30], record(30, model="<b>nano</b>"))
    evaluate(real, synthetic, out=tmp_path / "report.json", **FAST)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "<b>nano" not in page
    assert page.count('<figure class="real">') == 8 + 14
    assert page.count('<figure class="synthetic">') == 8 + 13


def test_the_same_call_gives_the_same_figures_and_the_same_plot(report, folders, tmp_path):
    again = evaluate(*folders, out=tmp_path / "again" / "report.json", **FAST)
    assert dataclasses.replace(again, created=report.created) == report
    assert (tmp_path / "again" / "report.png").read_bytes() == (tmp_path / "out" / "report.png").read_bytes()


def test_a_report_in_the_folder_of_the_samples_does_not_count_as_a_sample(folders):
    real, synthetic = folders
    first = evaluate(real, synthetic, out=synthetic, **FAST)
    again = evaluate(real, synthetic, out=synthetic, **FAST)
    assert (synthetic / "report.json").is_file()
    assert first.synthetic.num_pictures == again.synthetic.num_pictures == 12
    assert again.synthetic.left_out == ["report.png"]


def test_references_outside_of_the_random_choice_still_make_pairs(folders, tmp_path):
    report = evaluate(*folders, out=tmp_path / "r.json", max_images=6, **FAST)
    assert (report.real.num_pictures, report.real.num_found) == (6, 24)
    assert report.pairs.num_pairs == 6
    assert report.real.num_fields == 6


def test_references_may_be_somewhere_else(folders, tmp_path, tissue):
    real, synthetic = folders
    elsewhere = tmp_path / "references"
    elsewhere.mkdir()
    for number in range(12):
        (real / f"case-{number:02d}.png").rename(elsewhere / f"case-{number:02d}.png")
    without = evaluate(real, synthetic, out=tmp_path / "without.json", **FAST)
    assert "references" in without.pairs.reason
    report = evaluate(real, synthetic, references=elsewhere, out=tmp_path / "with.json", **FAST)
    assert (report.pairs.num_pairs, report.pairs.num_references) == (12, 12)
    assert (report.real.num_pictures, report.real.num_fields) == (12, 12)
    Image.fromarray(tissue[0][:40, :40]).save(elsewhere / "case-00.png")
    with pytest.raises(EvaluationError, match=r"reference case-.* smaller than a field"):
        evaluate(real, synthetic, references=elsewhere, out=tmp_path / "r.json", field_size=64, **FAST)


def test_pairs_can_be_left_out(folders, tmp_path):
    report = evaluate(*folders, out=tmp_path / "r.json", pairs=False, **FAST)
    assert report.pairs.cosine_mean is None
    assert report.pairs.reason == "Pairs were not asked for."


def test_copies_and_duplicates_are_counted_and_told(folders, tmp_path, tissue):
    real, synthetic = folders
    Image.fromarray(tissue[0]).save(real / "again.png")
    save_synthetic_png(synthetic / "copy.png", tissue[5], record(5))
    report = evaluate(real, synthetic, out=tmp_path / "r.json", **FAST)
    assert report.real.num_duplicates == 1
    assert any("1 real pictures repeat" in warning for warning in report.warnings)
    assert any(
        "1 synthetic pictures are pixel for pixel equal to a real one" in each for each in report.warnings
    )


def test_synthetic_pictures_among_the_real_are_told(folders, tmp_path, tissue):
    real, synthetic = folders
    save_synthetic_png(real / "x.png", tissue[30], {"seed": 1})
    report = evaluate(real, synthetic, out=tmp_path / "r.json", **FAST)
    assert any("1 of the real pictures say that they are synthetic" in warning for warning in report.warnings)


def test_pictures_without_a_record_are_told(folders, tmp_path, tissue):
    real, synthetic = folders
    Image.fromarray(tissue[30]).save(synthetic / "unknown.png")
    report = evaluate(real, synthetic, out=tmp_path / "r.json", **FAST)
    assert any("1 of 13 synthetic pictures carry no record" in warning for warning in report.warnings)


def test_pictures_of_two_models_are_told(folders, tmp_path, tissue):
    real, synthetic = folders
    save_synthetic_png(synthetic / "other.png", tissue[30], record(30, model_sha256="b" * 64))
    report = evaluate(real, synthetic, out=tmp_path / "r.json", **FAST)
    assert report.generator["model_sha256"] == ["a" * 64, "b" * 64]
    assert any("more than one model" in warning for warning in report.warnings)


def test_large_pictures_are_compared_field_by_field(folders, tmp_path, tissue):
    _, synthetic = folders
    large = tmp_path / "large"
    large.mkdir()
    for number in range(4):
        tiles = tissue[number * 4 : number * 4 + 4]
        image = np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])
        Image.fromarray(image).save(large / f"{number}.png")
    report = evaluate(large, synthetic, out=tmp_path / "r.json", field_size=SIDE, **FAST)
    assert (report.real.num_pictures, report.real.num_fields) == (4, 16)
    assert (report.settings["field_size"], report.settings["split_unit"]) == (SIDE, "picture")


def test_tiles_of_a_store_are_cut_to_the_size_of_the_samples(folders, tmp_path, tissue):
    import io

    from pixcell.data.store import TileStore
    from pixcell.data.tiling import Tile

    store = TileStore.create(tmp_path / "store", {"mpp": 0.5, "tile_size": 2 * SIDE})
    for slide in range(4):
        tiles = tissue[slide * 4 : slide * 4 + 4]
        buffer = io.BytesIO()
        Image.fromarray(np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])).save(buffer, format="JPEG")
        split = {"split": "train" if slide < 2 else "test"}
        tile = Tile(f"s{slide}", 0, 0, 2 * SIDE, 0.5, 1.0, 0.0, 1.0, attributes=split)
        store.write_images(f"s{slide}", [(tile, buffer.getvalue())], {"name": f"s{slide}"})
    report = evaluate(store.path, folders[1], out=tmp_path / "r.json", **FAST)
    assert (report.real.kind, report.real.num_pictures, report.real.num_fields) == ("store", 4, 16)
    assert (report.settings["field_size"], report.settings["split_unit"]) == (SIDE, "slide")

    held_out = evaluate(store.path, folders[1], out=tmp_path / "test.json", where={"split": ["test"]}, **FAST)
    assert (held_out.real.num_pictures, held_out.real.num_fields) == (2, 8)
    assert held_out.settings["where"] == {"split": ["test"]}
    with pytest.raises(StoreError, match=r"split is validation\. Values there: test, train"):
        evaluate(store.path, folders[1], out=tmp_path / "r.json", where={"split": ["validation"]}, **FAST)
    with pytest.raises(EvaluationError, match="only tiles of a store have attributes"):
        evaluate(*folders, out=tmp_path / "r.json", where={"split": ["test"]}, **FAST)


def test_an_own_extractor_is_as_good_as_a_named_one(folders, tmp_path):
    class MeanColour:
        name, dim = "mean-colour", 3

        def __call__(self, images):
            return images.float().mean((2, 3))

        def describe(self):
            return {"name": self.name, "dim": self.dim, "resize": "none"}

    report = evaluate(*folders, extractor=MeanColour(), out=tmp_path / "r.json", **FAST)
    frechet = report.measure("frechet")
    assert frechet.matched > 3 * frechet.floor
    assert "times as far" in report.summary


@pytest.mark.parametrize(
    ("setting", "value"), [("max_images", 1), ("batch_size", 0), ("field_size", 8), ("kernel_subsets", 0)]
)
def test_settings_that_make_no_sense_are_refused(folders, tmp_path, setting, value):
    with pytest.raises(EvaluationError, match=f"{setting} must be at least"):
        evaluate(*folders, out=tmp_path / "r.json", **{setting: value})


def test_a_place_that_cannot_be_written_is_told_before_the_work(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("pixcell.tasks.evaluate.extract", lambda *_, **__: pytest.fail("work began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another output folder"):
        evaluate(*folders, out=tmp_path / "file" / "r.json")
    with pytest.raises(OutputError, match=r"\.json file"):
        evaluate(*folders, out=tmp_path / "report.html")


def test_a_damaged_picture_is_named_and_no_report_appears(folders, tmp_path):
    real, synthetic = folders
    whole = (real / "case-03.png").read_bytes()
    (real / "case-03.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableSlide, match=r"case-03\.png"):
        evaluate(real, synthetic, out=tmp_path / "r.json", **FAST)
    assert not list(tmp_path.glob("r.*"))


def test_real_tissue_is_nearer_to_itself_than_to_another_organ(shared_data, tmp_path):
    """Lung against lung, and lung against oral mucosa, in the space of stain and texture."""
    lung = sorted((shared_data / "lc25000_lung_224").rglob("*.jpg"))
    oral = sorted((shared_data / "oral_224").rglob("*.jpg"))[:40]
    for name, files in (("real", lung[:120:3]), ("same", lung[1:120:3]), ("other", oral)):
        (tmp_path / name).mkdir()
        for number, file in enumerate(files):
            (tmp_path / name / f"{number}.jpg").symlink_to(file)
    same, other = (
        evaluate(tmp_path / "real", tmp_path / name, out=tmp_path / f"{name}.json", pairs=False, **FAST)
        for name in ("same", "other")
    )
    assert other.measure("kernel").value > 5 * abs(same.measure("kernel").value)
