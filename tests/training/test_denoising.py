"""The denoising objective, on a tiny store with a tiny autoencoder."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.errors import ModelError, RecipeError, StoreMismatch, WrongWeights
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.training.determinism import rng_for
from pixcell.training.objectives import Objective, Samples
from pixcell.training.recipe import build_objective


def rngs(count, step=0):
    return [rng_for(0, step, place) for place in range(count)]


def test_it_keeps_the_protocol(recipe):
    objective = build_objective(recipe())
    assert isinstance(objective, Objective)
    assert isinstance(objective.samples, Samples)


def test_each_visit_draws_anew_from_the_posterior_and_the_same_key_draws_the_same(recipe):
    samples = build_objective(recipe()).samples
    first, again, later = (samples.draw([3], rngs(1, step))[0] for step in (0, 0, 1))
    assert torch.equal(first["latents"], again["latents"])
    assert torch.equal(first["noise"], again["noise"])
    assert not torch.equal(first["latents"], later["latents"])
    assert first["key"] == later["key"]


def test_latents_are_the_normalised_posterior(recipe):
    """The mean of many draws is the normalised mean; their spread is the posterior's, times the scale."""
    samples = build_objective(recipe()).samples
    drawn = torch.stack([one["latents"] for one in samples.draw([0] * 4000, rngs(4000))])
    item = samples.fields[samples._kept[0]]
    std = item["posterior_std"].float() * 1.5  # the tiny codec's scale is 1.5, its shift 0.1
    expected = (item["posterior_mean"].float() - 0.1) * 1.5
    # Five standard errors: one draw in two million goes beyond, and the draws are fixed.
    assert ((drawn.mean(0) - expected).abs() < 5 * std / 4000**0.5).all()
    torch.testing.assert_close(drawn.std(0), std, rtol=0.06, atol=1e-4)


def test_conditions_are_dropped_as_often_as_asked_and_times_are_uniform(recipe):
    samples = build_objective(recipe("objective.drop_conditioning=0.25")).samples
    drawn = samples.draw([0] * 4000, rngs(4000))
    assert np.mean([one["dropped"] for one in drawn]) == pytest.approx(0.25, abs=0.035)
    times = np.array([one["timestep"] for one in drawn])
    assert times.min() in range(50)
    assert times.max() in range(950, 1000)
    assert np.histogram(times, 10, (0, 1000))[0] == pytest.approx(400, abs=100)


def test_held_out_fields_are_not_trained_on(recipe):
    objective = build_objective(recipe("data.held_out=5"))
    fields = objective.samples.fields
    seen = {
        one["key"]
        for one in objective.samples.draw(range(len(objective.samples)), rngs(len(objective.samples)))
    }
    held_out = {fields.key(index) for index in objective._held_out}
    assert len(held_out) == 5
    assert seen.isdisjoint(held_out)
    assert len(seen) == len(fields) - 5


def test_a_dropped_sample_does_not_see_its_embedding(recipe):
    objective = build_objective(recipe())
    for weight in objective.trainable.parameters():  # a fresh model ignores every condition
        torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(weight.numel()))
    batch = torch.utils.data.default_collate(objective.samples.draw([0, 1], rngs(2)))
    for dropped, changes in ((True, False), (False, True)):
        batch["dropped"] = torch.full((2,), dropped)
        losses = [
            objective.loss({**batch, "embedding_grid": batch["embedding_grid"] + shift}).per_sample.mean()
            for shift in (0, 1)
        ]
        assert bool(losses[0] != losses[1]) == changes


def test_without_learned_variance_the_loss_is_the_squared_error(recipe):
    objective = build_objective(recipe("objective.learn_variance=false"))
    batch = torch.utils.data.default_collate(objective.samples.draw([0, 1], rngs(2)))
    losses = objective.loss(batch)
    assert set(losses.parts) == {"mse"}
    # A fresh model predicts zero, so the error is the power of the noise.
    torch.testing.assert_close(losses.per_sample, batch["noise"].square().mean((1, 2, 3)))


def test_a_flow_is_trained_on_its_own_line_and_sampled_along_it(recipe, tmp_path):
    changes = ("objective.target=flow", "objective.learn_variance=false", "objective.scheduler=euler")
    objective = build_objective(recipe(*changes))
    batch = torch.utils.data.default_collate(objective.samples.draw(range(6), rngs(6)))
    assert batch["timestep"].min() >= 1
    # A fresh model predicts zero, so the error is the power of the flow.
    power = (batch["noise"] - batch["latents"]).square().mean((1, 2, 3))
    torch.testing.assert_close(objective.loss(batch).per_sample, power)
    assert np.isfinite(objective.preview().figures["mse"])
    objective.export(tmp_path / "pipeline", None)
    pipeline = PixCellPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.facts["target"] == "flow"
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_the_flow_is_trained_at_pure_noise_where_sampling_begins(recipe):
    changes = ("objective.target=flow", "objective.learn_variance=false", "objective.scheduler=euler")
    samples = build_objective(recipe(*changes)).samples
    times = np.array([one["timestep"] for one in samples.draw([0] * 4000, rngs(4000))])
    assert times.min() in range(1, 51)
    assert times.max() in range(951, 1001)


def test_logit_normal_times_are_most_often_in_the_middle(recipe):
    """Their logits are normal: 2.3 % lie beyond two deviations on either side, half below the mean."""
    changes = ("objective.target=flow", "objective.learn_variance=false", "objective.scheduler=euler")
    times = "objective.times={name: logit-normal, mean: 0.5, std: 1.0}"
    samples = build_objective(recipe(*changes, times)).samples
    drawn = np.array([one["timestep"] for one in samples.draw([0] * 4000, rngs(4000))])
    assert drawn.min() >= 1
    assert drawn.max() <= 1000
    logits = [np.log(share / (1 - share)) for share in (drawn - 0.5) / 1000]
    # Four standard errors of a mean and of a deviation over 4000 draws.
    assert np.mean(logits) == pytest.approx(0.5, abs=0.064)
    assert np.std(logits) == pytest.approx(1.0, abs=0.045)


@pytest.mark.parametrize("share", ["-1e9", "1e9"])
def test_extreme_times_stay_on_the_line(recipe, share):
    changes = ("objective.target=flow", "objective.learn_variance=false", "objective.scheduler=euler")
    times = f"objective.times={{name: logit-normal, mean: {share}, std: 1e-3}}"
    (drawn,) = build_objective(recipe(*changes, times)).samples.draw([0], rngs(1))
    assert drawn["timestep"] == (1 if share.startswith("-") else 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("objective.target=flow",), "no variance to learn"),
        (
            ("objective.target=flow", "objective.learn_variance=false", "objective.scheduler=ddim"),
            "'ddim' cannot",
        ),
        (("objective.scheduler=euler",), "'euler' cannot follow a model that predicts the noise"),
        (("objective.scheduler=fast",), "no scheduler 'fast'"),
        (("objective.scheduler=ddpm-learned", "objective.learn_variance=false"), "needs learn_variance"),
        (("objective.min_snr_gamma=5", "objective.clean_below=250"), "two ways of weighing"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*changes)


def test_errors_of_clean_latents_can_be_counted_at_clean_steps(recipe):
    objectives = [build_objective(recipe(*changes)) for changes in ((), ("objective.clean_below=250",))]
    batch = torch.utils.data.default_collate(objectives[0].samples.draw([0, 1], rngs(2)))
    for timestep, equal in ((300, True), (100, False)):
        batch["timestep"] = torch.full((2,), timestep)
        plain, clean = (objective.loss(batch).parts["mse"] for objective in objectives)
        assert torch.equal(plain, clean) is equal


def test_the_export_is_a_pipeline_that_says_what_it_was_trained_on(recipe, tmp_path):
    objective = build_objective(recipe())
    objective.export(tmp_path / "first", None)
    objective.export(tmp_path / "second", tmp_path / "first")
    pipeline = PixCellPipeline.from_pretrained(tmp_path / "second")
    assert pipeline.facts["encoder"] == {"name": "colour", "sha256": "c" * 64, "dim": 4}
    assert (pipeline.facts["field_size"], pipeline.facts["mpp"]) == (32, 0.5)
    assert pipeline.codec.sha256 == objective.codec.sha256
    weights = [
        next((tmp_path / name / "vae").glob("*.safetensors")).stat().st_ino for name in ("first", "second")
    ]
    assert weights[0] == weights[1]


def test_a_preview_shows_all_held_out_fields_and_repeats_itself(recipe):
    objective = build_objective(recipe("data.held_out=3"))
    first, again = objective.preview(), objective.preview()
    assert np.array_equal(first.picture, again.picture)
    assert first.figures == again.figures
    assert first.picture.shape[1] == 3 * (32 + 4) + 4


def test_another_autoencoder_than_the_latents_is_refused(recipe, tmp_path):
    TissueAutoencoder(2, (4, 8), 1).save_pretrained(tmp_path / "vae")
    with pytest.raises(StoreMismatch, match="did not make these latents"):
        build_objective(recipe(f"objective.codec={tmp_path}"))


def test_a_stage_grows_from_a_pipeline_and_says_so(recipe, tmp_path):
    start = build_objective(recipe())
    start.export(tmp_path / "pipeline", None)
    grown = build_objective(recipe("data.size=64", f"model.init={tmp_path / 'pipeline'}")).trainable
    assert (grown.config.sample_size, grown.config.caption_num_tokens) == (8, 4)
    assert torch.equal(
        grown.transformer_blocks[0].attn1.to_q.weight, start.trainable.transformer_blocks[0].attn1.to_q.weight
    )


def test_a_stage_from_weights_with_a_gap_is_refused(recipe, tmp_path):
    """diffusers would fill the gap with random numbers, and only warn."""
    build_objective(recipe()).export(tmp_path / "pipeline", None)
    file = tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["proj_out.bias"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(WrongWeights, match=r"proj_out\.bias"):
        build_objective(recipe(f"model.init={tmp_path / 'pipeline'}"))


def test_a_stage_from_another_encoder_is_refused(recipe, tmp_path):
    start = build_objective(recipe())
    start._pipeline.facts["encoder"]["sha256"] = "d" * 64
    start.export(tmp_path / "pipeline", None)
    with pytest.raises(ModelError, match=r"trained on embeddings by 'colour' \(d{12}\)"):
        build_objective(recipe(f"model.init={tmp_path / 'pipeline'}"))


def test_a_stage_from_another_architecture_is_refused(recipe, tmp_path):
    build_objective(recipe()).export(tmp_path / "pipeline", None)
    with pytest.raises(ModelError, match="num_layers 1 instead of 2"):
        build_objective(recipe(f"model.init={tmp_path / 'pipeline'}", "model.num_layers=2"))


def test_a_patch_that_does_not_divide_the_latents_is_refused(recipe):
    with pytest.raises(RecipeError, match="no whole number of latent patches of 3"):
        build_objective(recipe("model.patch_size=3"))


def test_a_stage_that_predicts_something_else_than_the_one_before_is_refused(recipe, tmp_path):
    build_objective(recipe()).export(tmp_path / "pipeline", None)
    with pytest.raises(ModelError, match=r"predicts the noise.*objective.target=noise"):
        build_objective(recipe(f"model.init={tmp_path / 'pipeline'}", "objective.target=velocity"))
