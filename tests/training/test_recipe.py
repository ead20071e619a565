"""The recipes of the package: published stages as published, and stages that chain."""

import itertools

import pytest

from pixcell.config import load_recipe, parse_recipe, recipe_names
from pixcell.errors import RecipeError
from pixcell.training.recipe import TrainRecipe

TRAININGS = [name for name in recipe_names() if not name.startswith("tiles-")]
SIZES = (256, 512, 1024)


def stage(size, variant):
    return load_recipe(TrainRecipe, f"train-{size}-{variant}")


@pytest.mark.parametrize("name", TRAININGS)
def test_every_recipe_of_the_package_is_valid(name):
    assert load_recipe(TrainRecipe, name).name


def test_all_published_stages_are_there_in_both_variants():
    assert {f"train-{size}-{variant}" for size in SIZES for variant in ("paper", "code")} <= set(TRAININGS)


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("size", SIZES)
def test_what_paper_and_code_have_in_common(size, variant):
    recipe = stage(size, variant)
    model = recipe.model
    assert recipe.data.size == size
    assert (model.num_layers, model.num_attention_heads, model.attention_head_dim) == (28, 16, 72)
    assert (model.patch_size, model.interpolation_scale) == (2, None)
    objective = recipe.objective
    assert (objective.drop_conditioning, objective.learn_variance, objective.target) == (0.1, True, "noise")
    assert (objective.min_snr_gamma, objective.clean_below, objective.alignment) == (None, None, None)
    assert objective.times.name == "uniform"
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.schedule, optimizer.clip_norm) == (2e-5, "constant", 0.01)
    trainer = recipe.trainer
    assert (trainer.precision, trainer.gradient_checkpointing, trainer.ema_decays) == (
        "fp16",
        True,
        (0.9999,),
    )
    assert (trainer.checkpoint_every, trainer.log_every) == (2000, 20)
    assert trainer.seed == {256: 24, 512: 24, 1024: 43}[size]


@pytest.mark.parametrize(
    ("size", "steps", "batch_size", "gpus"),
    [(256, 120_000, 4096, 16), (512, 60_000, 1536, 24), (1024, 80_000, 384, 32)],
)
def test_the_papers_stages_have_the_values_of_the_paper(size, steps, batch_size, gpus):
    recipe = stage(size, "paper")
    assert (recipe.trainer.steps, recipe.trainer.batch_size) == (steps, batch_size)
    assert (recipe.optimizer.name, recipe.optimizer.weight_decay) == ("adamw", 0.03)
    assert batch_size // gpus % recipe.trainer.micro_batch_size == 0


@pytest.mark.parametrize(("size", "each", "processes"), [(256, 128, 16), (512, 64, 24), (1024, 12, 32)])
def test_the_codes_stages_have_the_values_of_the_released_code(size, each, processes):
    recipe = stage(size, "code")
    optimizer, trainer = recipe.optimizer, recipe.trainer
    assert (optimizer.name, optimizer.weight_decay, optimizer.betas) == ("came", 0.0, (0.9, 0.999, 0.9999))
    assert (optimizer.eps, optimizer.clip_threshold) == ((1e-30, 1e-16), 1.0)
    assert (optimizer.warmup_steps, optimizer.warmup, optimizer.warmup_advance) == (
        1000,
        "from-zero",
        processes,
    )
    assert (trainer.epochs, trainer.steps) == (10, None)
    assert (trainer.micro_batch_size, trainer.batch_size) == (each, each * processes)
    assert recipe.model.redraw_unconditional == (size > 256)


@pytest.mark.parametrize(
    "chain",
    [
        *(tuple(f"train-{size}-{variant}" for size in SIZES) for variant in ("paper", "code")),
        pytest.param(
            ("mini-128", "mini", "mini-512"),
            marks=pytest.mark.skipif("mini" not in TRAININGS, reason="the mini recipes are not there"),
        ),
    ],
)
def test_each_stage_starts_from_the_run_of_the_one_before(chain):
    stages = [load_recipe(TrainRecipe, name) for name in chain]
    assert stages[0].model.init is None
    for before, after in itertools.pairwise(stages):
        assert str(after.model.init) == f"runs/{before.name}"
        assert after.data.size == 2 * before.data.size
        shared = {"init", "init_weights", "redraw_unconditional"}
        assert after.model.model_dump(exclude=shared) == before.model.model_dump(exclude=shared)
        assert (after.data.latents, after.data.embeddings) == (before.data.latents, before.data.embeddings)
        assert after.objective.target == before.objective.target


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainr.steps=3", r"unknown key 'trainr'\. Did you mean 'trainer'"),
        ("data.sizes=3", r"unknown key 'data\.sizes'\. Did you mean 'size'"),
        ("model.num_layer=3", r"unknown key 'model\.num_layer'\. Did you mean 'num_layers'"),
        ("optimizer.warm_up=3", r"unknown key 'optimizer\.warm_up'\. Did you mean 'warmup"),
        (
            "objective.alignment={colum: a}",
            r"unknown key 'objective\.alignment\.colum'\. Did you mean 'column'",
        ),
        ("objective.alignment={layer: 3}", r"'objective\.alignment\.column' is missing"),
        ("objective.times={name: logitnormal}", r"objective\.times: .*Did you mean 'logit-normal'"),
        (
            "objective.times={std: 1}",
            r"'objective\.times\.name' is missing: one of 'uniform', 'logit-normal'",
        ),
        ("objective.name=denoisin", r"objective: .*Did you mean 'denoising'"),
        ("optimizer.name=adamv", r"optimizer: .*adamw"),
        ("trainer.precision=pf16", r"trainer\.precision: .*'fp16'"),
        ("model.redraw_unconditional=true", "for a stage that starts from another"),
        ("objective.times={name: logit-normal}", "are those of a flow"),
        ("objective.alignment={column: a, weight: 0}", "greater than 0"),
        ("objective.alignment={column: a, until_step: 0}", "greater than 0"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_with_the_way_out(recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        recipe(override)


def test_every_mistake_of_a_recipe_is_named_at_once(recipe):
    content = recipe().model_dump(mode="json")
    content["trainer"]["batchsize"] = content["trainer"].pop("batch_size")
    content["optimizer"]["Lr"] = 1
    with pytest.raises(RecipeError) as refused:
        parse_recipe(TrainRecipe, content)
    for text in ("'trainer.batch_size' is missing", "'batch_size'?", "Did you mean 'lr'"):
        assert text in str(refused.value)
