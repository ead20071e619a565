"""One page tells the life of a run, from its folder alone, at any moment of that life."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from pixcell.errors import OutputError, RunError
from pixcell.evaluation.comparison import Measure, PairFigures
from pixcell.evaluation.report import Report, SetFacts
from pixcell.tasks.run_curves import _running_mean, _thinned
from pixcell.tasks.run_findings import findings, state_of
from pixcell.tasks.run_history import RunHistory
from pixcell.tasks.run_starts import noting_start
from pixcell.tasks.train import train
from pixcell.tasks.training_report import report_training
from pixcell.training.denoising import Denoising
from pixcell.training.previews import Preview, save_preview
from training_fixtures import codec_folder, recipe, store

__all__ = ["codec_folder", "recipe", "store"]  # fixtures

RECIPE = {
    "name": "tiny",
    "data": {"store": "stores/tiny", "size": 32},
    "objective": {"name": "denoising"},
    "optimizer": {"lr": 0.001, "clip_norm": 1.0},
    "trainer": {"steps": 40, "batch_size": 4, "ema_decays": [0.99, 0.999]},
}


def line(step, **figures):
    return {
        "step": step, "loss": 1 / step, "mse": 0.9 / step, "loss_by_time/0.000-0.125": 2 / step,
        "loss_by_time/0.875-1.000": 0.5 / step, "gradient_norm": 0.5, "gradient_norm_max": 1.5, "lr": 0.001,
        "samples_per_s": 60.0, "flop_use": 0.4, "memory_gib": 1.5, "seconds": float(step), "epoch": step / 10,
        "seconds_left": float(40 - step), **figures,
    }  # fmt: skip


def write_lines(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


@pytest.fixture
def run(tmp_path):
    """A run that was killed once and is complete: two checkpoints are left of four."""
    run = tmp_path / "tiny"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    held_out = {10: 0.9, 20: 0.8, 30: 0.7, 40: 0.6}
    lines = [line(step) for step in range(1, 41)]
    write_lines(
        run / "metrics.jsonl",
        [*lines, *({"step": s, "held_out/mse": value} for s, value in held_out.items())],
    )
    starts = [
        {"started": "2026-01-01T00:00:00+00:00", "engine": "1 process on cpu", "from_step": 0, "steps": 40},
        {
            "started": "2026-01-02T00:00:00+00:00", "engine": "2 processes (DDP over gloo) on cpu",
            "from_step": 20, "steps": 40, "torch": "2.15.0", "ended": "2026-01-02T01:00:00+00:00", "step": 40,
            "ended_by": "its last step",
        },
    ]  # fmt: skip
    (run / "environment.json").write_text(json.dumps(starts))
    for step in (30, 40):
        folder = run / "checkpoints" / f"step-{step:08d}"
        (folder / "state").mkdir(parents=True)
        data = {
            "num_samples": 44,
            "made_by": {"latents": {"codec": {"name": "tiny-codec", "sha256": "c" * 64}}},
        }
        (folder / "state" / "progress.json").write_text(json.dumps({"step": step, "data": data}))
        (folder / "checkpoint.json").write_text(json.dumps({"step": step, "files": {}}))
    for step in held_out:
        rows = {
            "real, held out": [np.full((16, 16, 3), 90, np.uint8)] * 2,
            "made": [np.zeros((16, 16, 3), np.uint8)] * 2,
        }
        save_preview(run, step, Preview.of_rows(rows, {}), f"step {step}")
    return run


class Page(HTMLParser):
    """What a browser would ask for, and what it would show."""

    def __init__(self, path):
        super().__init__()
        self.asks, self.tags, self.text = [], set(), ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.asks += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text += data


def page_of(run):
    return Page(report_training(run).path)


def test_the_page_asks_no_other_host_and_runs_nothing(run):
    page = page_of(run)
    assert page.asks
    assert all(each.startswith("data:image/") for each in page.asks)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})


def test_a_complete_run_is_told_whole(run):
    page = page_of(run)
    assert "Step 40 of 40, complete. 40 s of training at 60 images a second." in page.text
    assert "mse is 0.6, -14.3% against the checkpoint before (step 30)" in page.text
    assert "median; MFU 40%" in page.text
    assert "2 processes (DDP over gloo) on cpu" in page.text
    assert "tiny-codec (cccccccccccc)" in page.text
    assert "ema_decays" in page.text
    assert page.text.count("pruned") == 2


def test_what_came_with_a_run_only_is_shown_only_then(run):
    plain = page_of(run).text
    assert not any(
        title in plain for title in ("What it started from", "Mixture", "Dropped tiles", "Distances")
    )
    growth = {
        "from": "runs/first",
        "carried": ["a", "b"],
        "rebuilt": {"pos_embed": "positions of 8 x 8"},
        "dropped": {},
    }
    (run / "growth.json").write_text(json.dumps(growth))
    share = {"group": "lung", "samples": 30, "share": 2 / 3, "draws": 107, "passes": 3.56}
    (run / "mixture.json").write_text(json.dumps([share]))
    bad = {"step": 3, "position": 1, "slide_id": "a", "tile": 7, "x": 0, "y": 64, "reason": "it is torn"}
    write_lines(run / "dropped.jsonl", [bad, {**bad, "step": 9}])
    page = page_of(run).text
    assert "positions of 8 x 8" in page
    assert "2 tensors" in page
    assert "66.7%" in page
    assert "it is torn" in page
    assert "2 times a sample could not be read" in page
    assert "(1 different tiles" in page


def test_a_kill_is_told_with_the_step_from_which_it_was_made_good(run):
    found = findings(RunHistory.read(run))
    assert len(found) == 1
    assert "2026-01-01T00:00:00+00:00 was killed; the run went on from step 20" in found[0]


def test_a_run_without_an_end_is_in_progress_or_killed(run):
    starts = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(starts[:1]))
    write_lines(run / "metrics.jsonl", [line(1), line(2)])
    (run / "metrics.jsonl").open("a").write('{"step": 3, "lo')
    for folder in (run / "checkpoints").iterdir():
        folder.rename(run / folder.name)
    history = RunHistory.read(run)
    assert history.step == 2
    assert state_of(history).startswith("Step 2 of 40: in progress, or killed; its last figures are of 20")
    assert "38 s left at its pace" in page_of(run).text


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert "Nothing was logged yet" in page_of(tmp_path).text
    assert report_training(tmp_path).state == "Step 0 of 40: in progress, or killed; nothing was logged yet."


def test_an_end_by_an_error_is_told_with_the_error(run):
    path = run / "environment.json"

    def fails():
        with noting_start(path, {"from_step": 40}) as end:
            end["step"] = 41
            raise RunError("the loss became nan at step 42")

    with pytest.raises(RunError, match="nan at step 42"):
        fails()
    last = json.loads(path.read_text())[-1]
    assert (last["step"], last["ended_by"], last["error"]) == (
        41,
        "an error",
        "the loss became nan at step 42",
    )
    assert "an error: the loss became nan at step 42" in page_of(run).text


def test_a_start_is_noted_before_it_ends(tmp_path):
    path = tmp_path / "environment.json"
    with noting_start(path, {"from_step": 7}) as end:
        assert "ended" not in json.loads(path.read_text())[0]
        end |= {"step": 9, "ended_by": "SIGTERM"}
    noted = json.loads(path.read_text())[0]
    assert (noted["from_step"], noted["step"], noted["ended_by"]) == (7, 9, "SIGTERM")
    assert "torch" in noted


@pytest.mark.parametrize("text", ["", "[{", "\x00"])
def test_a_damaged_list_of_starts_is_an_error_with_a_way_out(tmp_path, text):
    path = tmp_path / "environment.json"
    path.write_text(text)
    with (
        pytest.raises(RunError, match=r"environment\.json is damaged .* or delete it"),
        noting_start(path, {}),
    ):
        pass
    assert path.read_text() == text


def test_a_recipe_of_bytes_is_an_error_and_not_a_crash(run):
    (run / "recipe.yaml").write_bytes(b"\x00\xff\xfe")
    with pytest.raises(RunError, match=r"recipe\.yaml is damaged"):
        report_training(run)


def test_an_entry_that_is_no_start_does_not_keep_the_page_from_being_written(run):
    starts = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps([1, *starts]))
    assert len(RunHistory.read(run).starts) == len(starts)
    report_training(run)


def test_a_figure_that_is_no_number_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "loss": "much"}) + "\n")
    steps, values = RunHistory.read(run).series("loss")
    assert 60 not in steps
    assert len(steps) == len(values) > 0
    report_training(run)


def test_a_held_out_error_that_rises_again_is_noted(run):
    for step, value in ((50, 0.65), (60, 0.7), (70, 0.8)):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "held_out/mse": value, "held_out/psnr_db": step / 2}) + "\n")
    told = [text for text in findings(RunHistory.read(run)) if "learning its samples by heart" in text]
    assert len(told) == 1, "a PSNR that rises is no bad sign"
    assert "mse was best at step 40 (0.6)" in told[0]


def test_a_loss_that_was_no_number_and_slow_stretches_are_noted(run):
    lines = [line(step, **({"samples_per_s": 5.0} if 10 <= step < 20 else {})) for step in range(1, 41)]
    lines[4]["loss"] = None
    write_lines(run / "metrics.jsonl", lines)
    told = " ".join(findings(RunHistory.read(run)))
    assert "no finite number in 1 log line(s), first at step 5" in told
    assert "In 10 of 40 log lines it was slower than half of its median speed (60 images a second)" in told
    assert "steps 10 to 19" in told


def test_real_tissue_stands_once_above_all_steps(run):
    text = page_of(run).text
    assert text.count("real, held out") == 1
    assert [f"step {step}: made" in text for step in (10, 20, 30, 40)] == [True] * 4


def report_at(step, frechet, space="stain-texture"):
    side = SetFacts("real", "folder", 24, 24, 24, {"32 x 32": 24}, [0.5], 0, 0, [])
    return Report(
        real=side,
        synthetic=side,
        generator={} if step is None else {"step": step},
        extractor={"name": space, "sha256": "0" * 64, "dim": 8, "resize": "none"},
        measures=[
            Measure("frechet", "Frechet", "lower", frechet, matched=frechet, floor=0.5, matched_count=12),
            *(Measure(name, name.title(), "higher") for name in ("kernel", "precision", "recall")),
        ],
        pairs=PairFigures(0, 0, None, reason="No pairs."),
        settings={},
        warnings=[],
        environment={},
        created="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def test_evaluations_stand_at_the_step_of_their_pictures(run):
    folder = run / "evaluations"
    folder.mkdir()
    for name, report in {
        "step-00000010": report_at(10, 4.25), "another-name": report_at(20, 3.5),
        "step-00000030": report_at(None, 2.75), "nowhere": report_at(None, 9.0),
        "vgg": report_at(10, 7.5, "random-vgg16"),
    }.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(report.as_json()))
    (folder / "samples.json").write_text("[]")
    history = RunHistory.read(run)
    found = {
        space: {step: each.measure("frechet").value for step, each in of.items()}
        for space, of in history.evaluations.items()
    }
    assert found == {"stain-texture": {10: 4.25, 20: 3.5, 30: 2.75}, "random-vgg16": {10: 7.5}}
    assert "nowhere.json does not say of which step" in history.problems[0]
    text = page_of(run).text
    assert "In the space of random-vgg16" in text
    assert "2.75 (0.5)" in text


def test_a_damaged_checkpoint_is_told_and_does_not_end_the_report(run):
    (run / "checkpoints" / "step-00000040" / "checkpoint.json").write_text("{")
    (run / "growth.json").write_text("{")
    text = page_of(run).text
    assert "damaged" in text
    assert "growth.json cannot be read" in text


def test_a_recipe_cannot_put_code_into_the_page(run):
    content = {**RECIPE, "name": "<script>alert(1)</script>"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(content))
    page = page_of(run)
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize(("latents", "told"), [("latents-tiny", False), ("latents-sd3", True)])
def test_names_for_the_published_layout_are_told_only_where_it_was_read(run, latents, told):
    file = run / "recipe.yaml"
    content = yaml.safe_load(file.read_text())
    content.setdefault("data", {}).update(
        latents=latents, published={"latents": "latents-sd3", "embeddings": "embeddings-uni2-h"}
    )
    file.write_text(yaml.safe_dump(content))
    report_training(run)
    assert ("embeddings-uni2-h" in (run / "report.html").read_text().split("<h2>Recipe")[0]) is told


def test_a_training_ends_with_its_report_and_its_figures(recipe, tmp_path):
    chosen = recipe("trainer.report=true", "trainer.mfu=true", "trainer.steps=4", "trainer.keep_last=1")
    result = train(chosen, tmp_path / "run")
    history = RunHistory.read(result.run)
    figures = history.lines[-1]
    assert 0 < figures["flop_use"] < 1
    assert {"gradient_norm_max", "clipped", "memory_gib", "seconds_left"} <= set(figures)
    by_time = [value for name, value in figures.items() if name.startswith("loss_by_time/")]
    assert min(by_time) <= figures["loss"] <= max(by_time)
    assert (history.starts[0].end, history.starts[0].facts["step"]) == ("its last step", 4)
    text = Page(result.run / "report.html").text
    assert "Step 4 of 4, complete" in text
    assert "step 2: generated from their embeddings, guidance 2" in text


def test_a_training_that_an_error_ends_has_its_report_too(recipe, tmp_path, monkeypatch):
    def broken(self):
        raise RunError("the preview broke")

    monkeypatch.setattr(Denoising, "preview", broken)
    with pytest.raises(RunError, match="the preview broke"):
        train(recipe("trainer.report=true"), tmp_path / "run")
    assert "an error: the preview broke" in Page(tmp_path / "run" / "report.html").text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is not a run: it holds no recipe\.yaml"):
        report_training(tmp_path)
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(RunError, match="is damaged"):
        report_training(tmp_path)


def test_a_place_that_cannot_be_written_is_an_output_error(run):
    with pytest.raises(OutputError, match="cannot write"):
        report_training(run, run / "recipe.yaml" / "report.html")


def test_a_running_mean_shifts_nothing_and_keeps_a_straight_line():
    values = np.arange(400.0)
    np.testing.assert_allclose(_running_mean(values), values)
    noise = np.random.default_rng(0).standard_normal(400)
    assert _running_mean(noise)[20:-20].std() < 0.4 * noise.std()


def test_long_logs_are_thinned_to_their_means():
    steps, values = _thinned(range(10_000), np.arange(10_000.0))
    assert len(steps) == 1500
    np.testing.assert_allclose(steps, values)
