"""A training on shards from elsewhere goes on in the middle of an epoch, and fetches only what comes next."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from file_server import FileServer
from pixcell.data import shard_cache
from pixcell.errors import MissingColumn, StoreError
from pixcell.tasks.pack import pack_store
from pixcell.tasks.train import train
from pixcell.training.order import BlockOrder
from pixcell.training.recipe import build_objective

pytest.importorskip("aiohttp", reason="reading over HTTP needs pixcell[shards]")

COLUMNS = ("latents-tiny", "embeddings-colour", "images")


@pytest.fixture
def packed(store, tmp_path):
    """Twelve tiles of four fields, two in a shard."""
    done = pack_store(store.path, tmp_path / "packed", columns=COLUMNS, shard_size=12_000, workers=1)
    assert done.num_shards == 6
    return done.folder


@pytest.fixture
def on(recipe, tmp_path):
    """A recipe that shuffles two shards at a time: in five steps of four it comes to the second pair."""

    def on(place, *overrides, cache="cache"):
        common = [f"data.store={place}", f"data.cache.folder={tmp_path / cache}", "data.shuffle_blocks=2"]
        return recipe(
            *common, "trainer.workers=0", "trainer.steps=5", "trainer.checkpoint_every=3", *overrides
        )

    return on


def weights_of(result) -> dict[str, torch.Tensor]:
    return load_file(result.checkpoint / "state" / "weights.safetensors")


def shards_of(objective, seed: int, places: range) -> set[int]:
    """Shards that the samples at some places of the order lie in."""
    order = objective.samples.order(seed)
    assert isinstance(order, BlockOrder)
    kept = objective.samples._kept
    return {kept[order[place]] // (2 * 4) for place in places}


def test_where_a_pack_lies_does_not_change_a_training(packed, on, tmp_path):
    here = weights_of(train(on(packed), tmp_path / "here"))
    with FileServer(packed) as server:
        there = weights_of(train(on(server.url), tmp_path / "there"))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_it_goes_on_in_the_middle_of_an_epoch_and_fetches_only_what_it_needs(packed, on, tmp_path):
    whole = weights_of(train(on(packed), tmp_path / "whole"))
    objective = build_objective(on(packed))
    with FileServer(packed) as server:
        first = train(on(server.url, "trainer.steps=3"), tmp_path / "run")
        assert first.step == 3
        server.requests.clear()
        # Another machine: nothing is in its cache.
        last = train(on(server.url, cache="elsewhere"), tmp_path / "run")
        assert last.step == 5
        fetched = {int(name.removeprefix("shards/").removesuffix(".tar")) for name in server.fetched()}
        assert len(server.fetched()) == len(fetched), "no shard is fetched twice"
    assert all(torch.equal(whole[name], value) for name, value in weights_of(last).items())
    needed = shards_of(objective, seed=0, places=range(3 * 4, 5 * 4))
    shown = {index // 8 for index in objective._held_out}
    assert len(needed | shown) < 6, "otherwise this shows nothing"
    assert needed <= fetched <= needed | shown


def test_a_pack_that_cannot_be_reached_or_shown_is_an_error_before_anything_begins(
    packed, on, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_cache, "_PAUSE_S", 0.01)
    with pytest.raises(StoreError, match="attempts failed"):
        train(on("http://127.0.0.1:9/pack", "data.cache.attempts=2"), tmp_path / "run")
    with FileServer(packed) as server, pytest.raises(StoreError, match="cannot hold 2 shards at once"):
        train(on(server.url, "data.cache.size=35KB"), tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").rglob("*.safetensors"))


def test_a_pack_without_images_is_refused_at_once(store, on, tmp_path):
    pack_store(store.path, tmp_path / "bare", columns=COLUMNS[:2], workers=1)
    with pytest.raises(MissingColumn, match="has no images"):
        train(on(tmp_path / "bare"), tmp_path / "run")


def test_two_shards_at_a_time_are_trained_on_and_each_sample_once_an_epoch(packed, on):
    objective = build_objective(on(packed))
    order, count = objective.samples.order(0), len(objective.samples)
    assert sorted(order[place] for place in range(count)) == list(range(count))
    shards = np.array([objective.samples._kept[order[place]] // 8 for place in range(count)])
    lifetimes = [np.flatnonzero(shards == shard) for shard in range(6)]
    assert all(np.ptp(places) < 2 * 8 for places in lifetimes), "a shard is done with before two others begin"
