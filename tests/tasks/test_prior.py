"""From a store to a prior, and from a prior to pictures that differ as tissue does."""

import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pixcell.cli import app
from pixcell.data.store import TileStore
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.priors import EmbeddingPrior
from pixcell.diffusion.prototypes import Prototypes
from pixcell.diffusion.sampling import make_scheduler
from pixcell.errors import (
    MissingColumn,
    MissingWeights,
    ModelError,
    OutputError,
    RecipeError,
    StoreError,
    StoreMismatch,
)
from pixcell.provenance import read_provenance
from pixcell.tasks.inspect import inspect
from pixcell.tasks.prior import fit_prior
from pixcell.tasks.sample import sample
from stores import EMBEDDINGS_MADE_BY, TILING, fill, tiles_of
from tiny_models import tiny_transformer, tiny_vae


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two slides of 128 px tiles with 4 x 4 embeddings 6 wide, and one of another kind."""
    made = TileStore.create(tmp_path_factory.mktemp("stores") / "small", TILING)
    fill(made, "A 1", 30, organ="breast", split="train")
    fill(made, "Präparat Ω", 20, organ="colon/rectum", split="test")
    fill(made, "unknown", 4)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder of 2 x 2 fields that was trained with the store's encoder."""
    pipeline = PixCellPipeline(
        tiny_transformer(),
        tiny_vae(),
        make_scheduler(),
        {"encoder": {**EMBEDDINGS_MADE_BY["encoder"], "dim": 12}, "field_size": 64, "mpp": 0.5},
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A store whose embeddings are of 64 px fields, as the model's are."""
    made = TileStore.create(tmp_path_factory.mktemp("stores") / "pair", TILING)
    made.write_images("A", tiles_of("A", 40, organ="breast"), {"fingerprint": "A"})
    random = np.random.default_rng(0)
    made.write_column(
        "embeddings-tiny",
        "A",
        iter([random.normal(size=(40, 2, 2, 12)).astype(np.float16)]),
        shape=(2, 2, 12),
        dtype=np.float16,
        made_by={**EMBEDDINGS_MADE_BY, "field_size": 64},
        num_tiles=40,
    )
    return made


@pytest.fixture(scope="module")
def prior(pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("priors") / "small"
    fit_prior(pair.path, folder, size=128, by="organ", components=2)
    return folder


def records(folder):
    return {path.name: read_provenance(path) for path in sorted(folder.glob("0*.png"))}


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*.png"))}


class TestFitting:
    def test_a_prior_of_fields_is_of_every_field_of_every_tile(self, store, tmp_path):
        result = fit_prior(store.path, tmp_path / "prior")
        assert (result.number, result.rows, result.columns) == (54 * 16, 1, 1)
        prior = EmbeddingPrior.load(tmp_path / "prior")
        values = np.concatenate([store.column("embeddings-tiny").array(each) for each in store.slide_ids()])
        np.testing.assert_allclose(prior.mean, values.reshape(-1, 6).astype(float).mean(0), atol=1e-5)
        assert prior.facts["encoder"] == {**EMBEDDINGS_MADE_BY["encoder"], "dim": 6}
        assert (prior.facts["field_size"], prior.facts["mpp"]) == (32, 0.5)
        assert prior.facts["fitted_to"]["column"] == "embeddings-tiny"
        assert "gaussians" in [str(cell) for cell in result.__rich__().columns[0].cells]

    def test_a_prior_of_pictures_is_of_whole_grids(self, store, tmp_path):
        result = fit_prior(store.path, tmp_path / "prior", size=64)
        assert (result.number, result.rows, result.columns) == (54 * 4, 2, 2)
        assert EmbeddingPrior.load(tmp_path / "prior").sample(0, 0).shape == (2, 2, 6)

    def test_labels_are_those_of_the_tiles_and_tiles_without_are_left_out(self, store, tmp_path):
        result = fit_prior(store.path, tmp_path / "prior", by="organ", components=2)
        assert result.per_label == {"breast": 30 * 16, "colon/rectum": 20 * 16}
        assert result.num_unlabelled == 4
        assert EmbeddingPrior.load(tmp_path / "prior").names == ["breast", "colon/rectum"]
        by_slide = fit_prior(store.path, tmp_path / "slides", by="slide_id")
        assert set(by_slide.per_label) == set(store.slide_ids())

    def test_where_and_a_limit_choose_what_is_read(self, store, tmp_path):
        chosen = fit_prior(store.path, tmp_path / "a", where={"split": ["train"]})
        assert chosen.number == 30 * 16
        few = fit_prior(store.path, tmp_path / "b", max_fields=100, by="organ")
        assert sum(few.per_label.values()) == few.number == 100
        assert few.per_label["breast"] == pytest.approx(60, abs=1), "evenly spread over the store"

    def test_the_same_command_gives_the_same_bytes(self, store, tmp_path):
        for name in ("a", "b"):
            fit_prior(store.path, tmp_path / name, by="organ", components=3, prototypes=2, size=64)
        for file in ("prior.json", "prior.safetensors", "prototypes.json", "prototypes.safetensors"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    def test_prototypes_are_real_fields_with_their_pictures(self, store, tmp_path):
        result = fit_prior(store.path, tmp_path, by="organ", size=64, prototypes=3)
        assert result.num_prototypes == 6
        prototypes = Prototypes.load(tmp_path)
        assert prototypes.names == ["breast", "colon/rectum"]
        pictures = sorted((tmp_path / "prototypes").glob("*/*.png"))
        assert {path.parent.name for path in pictures} == {"breast", "colon_rectum"}
        assert len(pictures) == 6
        for place, path in enumerate(sorted(pictures, key=lambda each: each.name)):
            slide_id, position, field = prototypes.keys[place].split("/")
            tile = (int(position.split("_")[0]) - 1000) // 256
            row, column = map(int, field.split("_"))
            with store.images(slide_id) as shard:
                whole = shard.image(tile)
            np.testing.assert_array_equal(
                np.asarray(Image.open(path)),
                whole[64 * row : 64 * row + 64, 64 * column : 64 * column + 64],
            )
            assert read_provenance(path) is None, "it is real, and does not say that it is synthetic"

    def test_a_prior_is_replaced_when_asked_and_takes_its_prototypes_along(self, store, tmp_path):
        fit_prior(store.path, tmp_path, prototypes=2)
        own = tmp_path / "prototypes" / "all" / "mine.png"
        own.write_bytes(b"mine")
        with pytest.raises(OutputError, match="there is a prior in"):
            fit_prior(store.path, tmp_path)
        fit_prior(store.path, tmp_path, overwrite=True, components=2)
        assert EmbeddingPrior.load(tmp_path).facts["components_per_label"] == 2
        assert not (tmp_path / "prototypes.json").exists()
        assert list(tmp_path.glob("prototypes/*/*")) == [own], "what somebody else put there stays"


class TestSampling:
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_pictures_differ_and_do_not_depend_on_the_batch(self, model, prior, tmp_path, batch_size):
        for name, size in (("all", 8), ("parts", batch_size)):
            sample(model, tmp_path / name, prior=prior, count=4, seed=1, steps=2, batch_size=size)
        assert bytes_of(tmp_path / "all") == bytes_of(tmp_path / "parts")
        assert len(set(bytes_of(tmp_path / "all").values())) == 4

    def test_more_pictures_are_a_continuation(self, model, prior, tmp_path):
        sample(model, tmp_path / "few", prior=prior, count=2, seed=1, steps=2)
        result = sample(model, tmp_path / "many", prior=prior, count=4, seed=1, steps=2)
        assert bytes_of(tmp_path / "few").items() <= bytes_of(tmp_path / "many").items()
        assert sample(model, tmp_path / "few", prior=prior, count=4, seed=1, steps=2).num_kept == 2
        assert bytes_of(tmp_path / "few") == bytes_of(tmp_path / "many")
        assert result.prior == "drawn from prior small"

    def test_it_is_the_condition_that_makes_the_difference(self, model, prior, tmp_path):
        """Same seed, same noise: without the prior other pictures, and with none of its spread, too."""
        arguments = {"count": 1, "seed": 1, "steps": 2}
        made = {}
        for name, changes in {
            "drawn": {"prior": prior},
            "cold": {"prior": prior, "temperature": 0.0},
            "nothing": {"unconditional": True},
        }.items():
            sample(model, tmp_path / name, **arguments, **changes)
            made[name] = np.asarray(Image.open(next((tmp_path / name).glob("0*.png")))).astype(int)
        assert np.abs(made["drawn"] - made["nothing"]).max() > 0
        assert np.abs(made["drawn"] - made["cold"]).max() > 0

    def test_the_record_says_which_draw_it_was(self, model, prior, tmp_path):
        sample(model, tmp_path, prior=prior, label="breast", temperature=0.5, count=2, seed=3, steps=2)
        found = records(tmp_path)
        assert sorted(found) == ["00000_prior.png", "00001_prior.png"]
        record = found["00001_prior.png"]
        assert record["prior"] == {
            "name": "small",
            "sha256": EmbeddingPrior.load(prior).sha256,
            "label": "breast",
            "temperature": 0.5,
        }
        assert record["encoder"] == EMBEDDINGS_MADE_BY["encoder"]
        assert (record["seed"], record["index"], record["like"]) == (3, 1, None)

    def test_draws_of_another_prior_are_another_recipe(self, model, prior, tmp_path):
        sample(model, tmp_path, prior=prior, count=1, steps=2)
        with pytest.raises(OutputError, match="differs in prior"):
            sample(model, tmp_path, prior=prior, temperature=0.5, count=1, steps=2)

    def test_a_model_without_facts_must_be_told_its_encoder(self, model, prior, tmp_path):
        shutil.copytree(model, tmp_path / "model")
        (tmp_path / "model" / "pixcell.json").unlink()
        with pytest.raises(ModelError, match="does not say which encoder"):
            sample(tmp_path / "model", tmp_path / "out", prior=prior, count=1, steps=1)
        with pytest.raises(ModelError, match="encoder=uni2-h was named"):
            sample(tmp_path / "model", tmp_path / "out", prior=prior, encoder="uni2-h", count=1, steps=1)
        made = sample(tmp_path / "model", tmp_path / "out", prior=prior, encoder="tiny", count=1, steps=1)
        assert made.num_made == 1


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"components": 0}, RecipeError, "--components 0"),
            ({"prototypes": -1}, RecipeError, "--prototypes -1"),
            ({"max_fields": 1}, RecipeError, "max_fields 1"),
            ({"shrinkage": 2.0}, RecipeError, "shrinkage 2.0"),
            ({"rank": 900}, ModelError, "rank 900 is not possible"),
            (
                {"by": "organs"},
                StoreError,
                "no tile of the store has an attribute 'organs'. Did you mean 'organ'",
            ),
            ({"by": "tissue"}, StoreError, "no tile of the store has an attribute 'tissue'"),
            ({"by": "organ", "where": {"slide_id": ["unknown"]}}, StoreError, "none of the chosen tiles has"),
            ({"column": "latents-tiny"}, StoreMismatch, "holds latents, not embeddings"),
            ({"column": "embeddings-uni2-h"}, MissingColumn, "there: embeddings-tiny, latents-tiny"),
            ({"size": 48}, StoreMismatch, "48 px cannot be cut"),
            ({"by": "slide_id", "components": 40}, ModelError, "of label 'unknown' are too few for 40"),
        ],
    )
    def test_arguments(self, store, tmp_path, arguments, error, message):
        with pytest.raises(error, match=message):
            fit_prior(store.path, tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()

    def test_a_store_without_or_with_several_columns_of_embeddings(self, tmp_path):
        made = TileStore.create(tmp_path / "store", TILING)
        made.write_images("A", tiles_of("A", 3), {"fingerprint": "A"})
        with pytest.raises(MissingColumn, match=r"has none\. Run `pixcell encode STORE --encoder"):
            fit_prior(made.path, tmp_path / "out")
        for name in ("embeddings-one", "embeddings-two"):
            records = np.random.default_rng(0).normal(size=(3, 4, 4, 6)).astype(np.float16)
            made.write_column(
                name, "A", iter([records]), shape=(4, 4, 6), dtype=np.float16, num_tiles=3,
                made_by={**EMBEDDINGS_MADE_BY, "field_size": 32},
            )  # fmt: skip
        with pytest.raises(MissingColumn, match=r"has several: embeddings-one, embeddings-two\. Name one"):
            fit_prior(made.path, tmp_path / "out")
        assert fit_prior(made.path, tmp_path / "out", column="embeddings-two").number == 48

    def test_an_embedding_that_is_no_number_is_named(self, tmp_path):
        made = TileStore.create(tmp_path / "store", TILING)
        made.write_images("A", tiles_of("A", 3), {"fingerprint": "A"})
        records = np.ones((3, 4, 4, 6), np.float16)
        records[1, 2, 3, 0] = np.nan
        made.write_column(
            "embeddings-bad", "A", iter([records]), shape=(4, 4, 6), dtype=np.float16, num_tiles=3,
            made_by=EMBEDDINGS_MADE_BY,
        )  # fmt: skip
        with pytest.raises(ModelError, match="the embedding of A/1256_512/2_3 holds NaN"):
            fit_prior(made.path, tmp_path / "out")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"unconditional": True}, "--prior and --unconditional contradict"),
            ({"like": ["a.png"]}, "--like and --prior contradict"),
            ({"prior": None, "label": "breast", "unconditional": True}, "give the prior with --prior"),
            ({"label": "lung"}, "no label 'lung'. Labels: breast"),
            ({"temperature": -1.0}, "temperature -1.0"),
        ],
    )
    def test_what_contradicts_itself_makes_no_picture(self, model, prior, tmp_path, arguments, message):
        with pytest.raises((RecipeError, ModelError), match=message):
            sample(model, tmp_path / "out", **({"prior": prior, "count": 1, "steps": 1} | arguments))
        assert not (tmp_path / "out").exists()

    def test_a_prior_of_fields_is_none_of_pictures(self, model, pair, tmp_path):
        fit_prior(pair.path, tmp_path / "prior")
        with pytest.raises(
            ModelError, match=r"of 1 x 1 fields; a picture of the model has 2 x 2\. .*--size 128"
        ):
            sample(model, tmp_path / "out", prior=tmp_path / "prior", count=1, steps=1)

    def test_no_prior(self, model, pair, tmp_path):
        for place in (tmp_path / "nowhere", pair.path):
            with pytest.raises(MissingWeights, match="Fit one with `pixcell prior"):
                sample(model, tmp_path / "out", prior=place, count=1, steps=1)


def test_a_prior_explains_itself(prior, tmp_path):
    facts = inspect(prior, verify=True)
    assert (facts.kind, facts.problems) == ("prior over embeddings", [])
    assert facts.section("prior")["of"] == "grids of 2 x 2 embeddings"
    assert facts.section("labels") == [{"label": "breast", "embeddings": 40, "gaussians": 2}]
    assert facts.section("encoder")["name"] == "tiny"
    shutil.copytree(prior, tmp_path / "changed")
    numbers = tmp_path / "changed" / "prior.safetensors"
    *kept, last = numbers.read_bytes()
    numbers.write_bytes(bytes([*kept, last ^ 1]))
    (problem,) = inspect(tmp_path / "changed", verify=True).problems
    assert "the hash of its numbers differs" in problem


def test_the_commands_fit_and_draw(model, pair, tmp_path):
    def run(*arguments):
        ended = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert ended.exit_code == 0, ended.output
        return ended.output

    place, out = tmp_path / "prior", tmp_path / "out"
    printed = run("prior", pair.path, place, "--size", 128, "--by", "organ", "--set", "rank=5")
    assert "breast (40)" in printed
    drawn = ["--prior", place, "--label", "breast", "--set", "temperature=0.8"]
    run("sample", model, "--out", out, *drawn, "--count", 2, "--steps", 1)
    assert records(out)["00000_prior.png"]["prior"]["temperature"] == 0.8
