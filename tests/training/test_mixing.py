"""A recipe says how much of each group is drawn; what does not fit the groups that there are is refused."""

import json
from collections import Counter

import pytest

from pixcell.data.datasets import FieldDataset
from pixcell.errors import RecipeError, RunError, StoreError
from pixcell.models.codec import LatentCodec
from pixcell.tasks.train import train
from pixcell.training.mixing import FieldPlan, FieldSamples, MixConfig
from pixcell.training.order import BlockOrder, MixedOrder, SampleOrder
from pixcell.training.recipe import build_objective
from training_fixtures import make_store


def drawn_of(samples, count, seed=0):
    """Which slides come, place by place."""
    order = samples.order(seed)
    return [samples.fields.key(samples._kept[order[place]]).split("/")[0] for place in range(count)]


@pytest.fixture
def second_store(tmp_path, codec_folder):
    return make_store(tmp_path / "second", LatentCodec.from_pretrained(codec_folder), seed=1)


def test_without_a_mix_every_field_comes_once_an_epoch(recipe):
    samples = build_objective(recipe()).samples
    assert isinstance(samples.order(0), SampleOrder)
    assert Counter(drawn_of(samples, len(samples))) == {"a": 23, "b": 23}  # 24 each, one of each held out


def test_weights_by_attribute_are_exact(recipe):
    """Slide a is split train, slide b is split test."""
    samples = build_objective(recipe("data.mix={by: split, weights: {train: 3, test: 1}}")).samples
    drawn = drawn_of(samples, 400)
    assert all(drawn[start : start + 4].count("a") == 3 for start in range(0, 400, 4))


def test_held_out_fields_are_not_drawn_in_a_mixture(recipe):
    objective = build_objective(recipe("data.mix={by: split, weights: equal}", "data.held_out=6"))
    samples = objective.samples
    order = samples.order(0)
    seen = {samples._kept[order[place]] for place in range(2 * len(samples))}
    assert seen.isdisjoint(objective._held_out)
    assert len(seen) == 48 - 6


def test_a_store_goes_by_the_name_of_its_folder_or_as_the_recipe_names_it(recipe, store, second_store):
    stores = f"data.store=[{store.path}, {second_store.path}]"
    for name in ("second", str(second_store.path), f"{second_store.path}/"):
        mix = f"data.mix={{by: store, weights: {{{store.path.name}: 1, {name}: 4}}}}"
        samples = build_objective(recipe(stores, mix)).samples
        order = samples.order(0)
        border = samples.fields.parts[1].start
        drawn = [samples._kept[order[place]] >= border for place in range(100)]
        assert sum(drawn) == 80


def test_stores_of_one_name_go_by_their_whole_path(recipe, store, tmp_path, codec_folder):
    other = make_store(tmp_path / store.path.name, LatentCodec.from_pretrained(codec_folder), seed=1)
    stores = f"data.store=[{store.path}, {other.path}]"
    build_objective(recipe(stores, f"data.mix={{by: store, weights: {{{store.path}: 1, {other.path}: 1}}}}"))
    with pytest.raises(RecipeError, match="names 'tiny'"):
        build_objective(recipe(stores, "data.mix={by: store, weights: {tiny: 1}, others: 1}"))


def test_a_group_spread_over_stores_is_one_group(recipe, store, second_store):
    stores = f"data.store=[{store.path}, {second_store.path}]"
    samples = build_objective(recipe(stores, "data.mix={by: slide_id, weights: {a: 1, b: 1}}")).samples
    order = samples.order(0)
    assert isinstance(order, MixedOrder)
    fields = {samples._kept[order[place]] for place in range(2 * len(samples))}
    assert len(fields) == len(samples) == 94


def test_others_are_one_group(recipe):
    samples = build_objective(recipe("data.mix={by: slide_id, weights: {a: 1}, others: 2}")).samples
    order = samples.order(0)
    assert [share.group for share in order.shares(90)] == ["a", "(others)"]
    assert Counter(drawn_of(samples, 90)) == {"a": 30, "b": 60}


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("{by: split, weights: {trian: 1, test: 1}}", "names 'trian'.*split.* Did you mean 'train'"),
        ("{by: split, weights: {zzz: 1}, others: 1}", "names 'zzz'.*There is: test, train"),
        ("{by: split, weights: {train: 1}}", r"no weight to test \(24 fields\).*data\.mix\.others"),
        ("{by: split, weights: equal, others: 1}", "others 1 has no effect"),
    ],
)
def test_weights_that_do_not_fit_the_groups_are_refused(recipe, mix, message):
    with pytest.raises(RecipeError, match=message):
        build_objective(recipe(f"data.mix={mix}"))


def test_an_attribute_that_no_tile_has_is_refused_with_the_nearest(recipe):
    with pytest.raises(StoreError, match=r"has an attribute 'splt'\. Did you mean 'split'"):
        build_objective(recipe("data.mix={by: splt, weights: equal}"))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("{by: split, weights: {train: 0}}", "greater than 0"),
        ("{by: split, weights: {}}", "at least one weight"),
        ("{by: split, weight: {train: 1}}", "unknown key 'data.mix.weight'. Did you mean 'weights'"),
    ],
)
def test_a_mix_that_says_nothing_is_refused_before_a_store_is_opened(recipe, mix, message):
    with pytest.raises(RecipeError, match=message):
        recipe(f"data.mix={mix}")


def test_a_group_that_is_all_held_out_is_refused(store):
    fields = FieldDataset(store, size=32, images=True, group_by="slide_id")
    plan = FieldPlan(MixConfig(by="slide_id", weights="equal"))
    with pytest.raises(RecipeError, match=r"all 24 field\(s\) of slide_id 'a' are held out"):
        FieldSamples(fields, range(24), plan)


def test_slides_can_be_shuffled_a_few_at_a_time(recipe):
    samples = build_objective(recipe("data.shuffle_blocks=1")).samples
    assert isinstance(samples.order(0), BlockOrder)
    drawn = drawn_of(samples, len(samples))
    assert len(set(drawn[:23])) == len(set(drawn[23:])) == 1


def test_blocks_within_a_mixture_keep_the_shares(recipe):
    changes = ("data.shuffle_blocks=1", "data.mix={by: split, weights: {train: 3, test: 1}}")
    samples = build_objective(recipe(*changes)).samples
    drawn = drawn_of(samples, 400)
    assert all(drawn[start : start + 4].count("a") == 3 for start in range(0, 400, 4))


def test_a_run_keeps_its_mixture_and_goes_on_only_with_it(recipe, tmp_path):
    mix = "data.mix={by: split, weights: {train: 3, test: 1}}"
    train(recipe(mix, "trainer.steps=2"), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "mixture.json").read_text(encoding="utf-8"))
    assert [(one["group"], one["samples"], one["share"], one["draws"]) for one in kept] == [
        ("train", 23, 0.75, 6),
        ("test", 23, 0.25, 2),
    ]
    with pytest.raises(RunError, match=r"data\.mix\.weights\.train was 3\.0 and is 5\.0"):
        train(recipe(mix.replace("3", "5")), tmp_path / "run")
    assert train(recipe(mix), tmp_path / "run").is_complete


def test_a_run_may_be_as_long_as_epochs_say(recipe, tmp_path):
    """46 fields in batches of 4: one and a half epochs are 17.25 steps, so 18."""
    result = train(
        recipe("trainer.steps=null", "trainer.epochs=1.5", "trainer.checkpoint_every=18"), tmp_path
    )
    assert (result.step, result.num_steps, result.is_complete) == (18, 18, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("trainer.epochs=2",), r"steps 6 and epochs 2 are two lengths.*trainer\.steps=null"),
        (("trainer.steps=null",), "as steps or as epochs"),
    ],
)
def test_a_run_has_one_length(recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*changes)
