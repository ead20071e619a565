"""How stages chain: what is carried and made anew, what is refused, and what need not be there any more."""

import json
import re
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.errors import ModelError, RunError
from pixcell.tasks.train import train
from pixcell.training import stages
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.recipe import build_objective

NULL = "caption_projection.uncond_embedding"
LARGER = "data.size=64"


@pytest.fixture
def pipeline(recipe, tmp_path):
    """A pipeline as one is exported, and what changes the facts beside it."""
    folder = tmp_path / "pipeline"
    build_objective(recipe()).export(folder, None)

    def with_facts(**changes):
        path = folder / "pixcell.json"
        facts = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))
        return f"model.init={folder}"

    return with_facts


def state_of(run):
    return load_file(Checkpoint.find(run).state / "weights.safetensors")


def test_growth_is_said_and_kept_beside_the_run(recipe, tmp_path, monkeypatch):
    first = train(recipe("trainer.steps=2"), tmp_path / "first").run
    spoken = Console(width=1000, record=True)
    monkeypatch.setattr(stages, "console", spoken)
    second = train(recipe("trainer.steps=2", LARGER, f"model.init={first}"), tmp_path / "second").run
    growth = json.loads((second / "growth.json").read_text())
    model = PixCellPipeline.from_pretrained(Checkpoint.find(second).pipeline).transformer
    assert {*growth["carried"], *growth["rebuilt"]} == {*model.state_dict(), "pos_embed.pos_embed"}
    assert (growth["step"], growth["weights"], growth["init"]) == (2, "trained", str(first))
    assert growth["before"] == {"latents": 4, "condition_tokens": 1}
    assert growth["after"] == {"latents": 8, "condition_tokens": 4}
    text = spoken.export_text()
    assert f"{len(growth['carried'])} tensors carried" in text
    for name, how in growth["rebuilt"].items():
        assert f"rebuilt {name}: {how}" in text
    assert not (first / "growth.json").exists()


def test_no_condition_is_spread_over_the_new_grid_or_drawn_anew(recipe, pipeline):
    old = build_objective(recipe()).transformer.unconditional_embedding
    spread, redrawn = (
        build_objective(recipe(LARGER, pipeline(), f"model.redraw_unconditional={value}"))
        for value in ("false", "true")
    )
    assert torch.equal(spread.transformer.unconditional_embedding, old.expand(4, -1))
    assert not torch.isin(redrawn.transformer.unconditional_embedding, old).any()
    assert NULL not in {*spread.growth["carried"], *redrawn.growth["carried"]}
    assert spread.growth["rebuilt"][NULL] == "1 tokens spread over 4"
    assert redrawn.growth["rebuilt"][NULL] == "4 tokens drawn anew"
    assert spread.growth["carried"] == redrawn.growth["carried"]


def test_what_is_drawn_anew_depends_on_the_seed_alone(recipe, pipeline):
    settings = (LARGER, pipeline(), "model.redraw_unconditional=true")
    one, again, other = (
        build_objective(recipe(*settings, f"trainer.seed={seed}")).transformer.unconditional_embedding
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_no_condition_can_be_drawn_anew_at_the_same_size(recipe, pipeline):
    grown = build_objective(recipe(pipeline(), "model.redraw_unconditional=true"))
    assert grown.growth["rebuilt"][NULL] == "1 tokens drawn anew"
    assert NULL in build_objective(recipe(pipeline())).growth["carried"]


@pytest.mark.parametrize("redraw", ["false", "true"])
def test_a_run_goes_on_without_the_one_it_began_from(recipe, tmp_path, redraw):
    """Bit for bit, and with positions and "no condition" tokens of its own."""
    first = train(recipe("trainer.steps=2"), tmp_path / "first").run
    second = (LARGER, f"model.init={first}", f"model.redraw_unconditional={redraw}", "trainer.keep_last=9")
    scale = "model.interpolation_scale=0.4"  # not what a fresh model would take
    whole = train(recipe(*second, scale), tmp_path / "whole").run
    train(recipe(*second, scale, "trainer.steps=2"), tmp_path / "parts")
    growth = (tmp_path / "parts" / "growth.json").read_text()
    shutil.rmtree(first)
    parts = train(recipe(*second, scale), tmp_path / "parts").run
    one, other = state_of(whole), state_of(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (parts / "growth.json").read_text() == growth


def test_a_damaged_configuration_is_named_when_a_run_goes_on(recipe, tmp_path):
    first = train(recipe("trainer.steps=2"), tmp_path / "first").run
    settings = (LARGER, f"model.init={first}")
    second = train(recipe(*settings, "trainer.steps=2"), tmp_path / "second")
    (second.checkpoint / "pipeline" / "transformer" / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is not what was written"):
        train(recipe(*settings), tmp_path / "second")


def test_a_fresh_start_needs_what_it_starts_from(recipe, tmp_path):
    with pytest.raises(RunError, match="nowhere is not a run"):
        train(recipe(f"model.init={tmp_path / 'nowhere'}"), tmp_path / "run")


def test_a_run_that_trained_something_else_is_refused(recipe, codec_recipe, tmp_path):
    codec = train(codec_recipe("trainer.steps=2"), tmp_path / "codec").run
    with pytest.raises(ModelError, match="holds no transformer: give a run that trained one"):
        build_objective(recipe(f"model.init={codec}"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"field_size": 16},
            r"embeddings of fields of 16 px; the store's describe fields of 32 px.*--field-size 16",
        ),
        ({"encoder": {"name": "uni2-h"}}, r"trained on embeddings by 'uni2-h'; .* by 'colour' \(c{12}\)"),
        ({"encoder": {"name": "colour", "sha256": "d" * 64}}, r"by 'colour' \(d{12}\)"),
        ({"codec": {"name": "sd3.5", "sha256": "e" * 64}}, r"trained on latents by 'sd3\.5' \(e{12}\)"),
        ({"target": "flow"}, r"predicts the flow.*objective\.target=flow"),
    ],
)
def test_a_stage_of_other_data_is_refused_with_both_sides_named(recipe, pipeline, facts, message):
    with pytest.raises(ModelError, match=message):
        build_objective(recipe(pipeline(**facts)))


@pytest.mark.parametrize("encoder", [None, {"name": "colour"}, {"name": "another", "sha256": "c" * 64}])
def test_a_model_that_knows_less_of_its_encoder_is_taken(recipe, pipeline, encoder):
    """Published models tell no hash; and equal weights are one encoder, whatever it is called."""
    assert build_objective(recipe(pipeline(encoder=encoder))).growth is not None


def test_another_resolution_is_allowed_and_said(recipe, pipeline, monkeypatch):
    spoken = Console(width=1000, record=True)
    monkeypatch.setattr(stages, "console", spoken)
    build_objective(recipe(pipeline(mpp=0.25)))
    assert re.search(r"was trained at 0\.25 microns per pixel and goes on at 0\.5", spoken.export_text())


def test_sizes_that_do_not_follow_from_each_other_are_refused(recipe, tmp_path, pipeline):
    wide = build_objective(recipe(LARGER))
    wide.export(tmp_path / "wide", None)
    shrunk = build_objective(recipe(f"model.init={tmp_path / 'wide'}"))
    assert shrunk.growth["dropped"] == {"y_pos_embed.y_pos_embed": "a single condition token has no position"}
    with pytest.raises(ModelError, match="another architecture: patch_size 2 instead of 4"):
        build_objective(recipe(LARGER, pipeline(), "model.patch_size=4"))
