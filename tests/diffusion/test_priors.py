"""A draw depends on the seed and its index, and means something only to a model of its encoder."""

import json
from dataclasses import replace

import pytest
import torch

from pixcell.diffusion.directions import coefficients_of
from pixcell.diffusion.fitting import fit_mixture
from pixcell.diffusion.priors import EmbeddingPrior, read_prior_facts
from pixcell.diffusion.sampling import generator_for
from pixcell.errors import MissingWeights, ModelError, OutputError, WrongWeights

ENCODER = {"name": "small", "sha256": "0" * 64, "preprocessing": {"resize": 224}}
FACTS = {"encoder": ENCODER, "field_size": 64, "mpp": 0.5}


def embeddings(number=200, rows=2, columns=2, dim=12):
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(rows * columns * dim, rows * columns * dim, generator=generator) / 5
    flat = torch.randn(number, len(turn), generator=generator) @ turn + 1
    return flat.reshape(number, rows, columns, dim)


@pytest.fixture(scope="module")
def prior():
    values = embeddings()
    labels = ["left" if row < 50 else "right" for row in range(200)]
    values[:50] -= 4
    found = coefficients_of(lambda: values.split(64), 20)
    return fit_mixture(found, FACTS, labels=labels, components=2)


class TestDraws:
    def test_a_draw_depends_on_seed_and_index_only(self, prior):
        draws = torch.stack([prior.sample(1, index) for index in range(6)])
        torch.testing.assert_close(prior.sample(1, 4), draws[4], rtol=0, atol=0)
        conditioning = prior.conditioning(1, [5, 2])
        torch.testing.assert_close(conditioning.embedding_grid, draws[[5, 2]], rtol=0, atol=0)
        assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 6
        assert not torch.equal(prior.sample(2, 4), draws[4])
        assert not torch.equal(prior.sample(4, 1), draws[4]), "index 4 of seed 1 is not index 1 of seed 4"

    def test_a_draw_does_not_touch_global_chance(self, prior):
        before = torch.get_rng_state()
        prior.sample(0, 0)
        assert torch.equal(torch.get_rng_state(), before)

    def test_an_embedding_and_the_noise_of_the_same_picture_are_unrelated(self, prior):
        """They have seed and index in common, and must have nothing else."""
        plain = replace(
            prior,
            mean=torch.zeros(48),
            basis=torch.eye(48)[:1],
            residual_std=torch.ones(48),
            weights=torch.ones(1),
            centers=torch.zeros(1, 1),
            factors=torch.zeros(1, 1, 1),
            labels=(None,),
        )
        pairs = [
            (plain.sample(0, index).flatten(), torch.randn(48, generator=generator_for(0, index)))
            for index in range(50)
        ]
        one, other = (torch.cat(part) for part in zip(*pairs, strict=True))
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.08  # four standard errors

    def test_many_draws_have_the_mean_and_covariance_of_the_prior(self):
        values = embeddings(dim=3)
        prior = fit_mixture(coefficients_of(lambda: values.split(64), 5), FACTS)
        draws = torch.stack([prior.sample(0, index).flatten() for index in range(4000)])
        flat = values.flatten(1)
        spread = float(flat.var(0).max())
        torch.testing.assert_close(draws.mean(0), flat.mean(0), rtol=0, atol=4 * (spread / 4000) ** 0.5)
        within = prior.basis.T @ prior.factors[0]
        expected = within @ within.T + torch.diag(prior.residual_std.square())
        torch.testing.assert_close(torch.cov(draws.T), expected, rtol=0, atol=6 * spread / 4000**0.5)

    def test_a_label_draws_its_own_tissue_and_none_draws_all_as_often_as_seen(self, prior):
        def share_of_left(label):
            draws = torch.stack([prior.sample(0, index, label=label) for index in range(300)])
            return float((draws.mean((1, 2, 3)) < -1).float().mean())

        assert share_of_left("left") > 0.97
        assert share_of_left("right") < 0.03
        assert share_of_left(None) == pytest.approx(0.25, abs=0.1)

    def test_no_temperature_is_the_centre_and_more_is_farther(self, prior):
        centers = prior.mean + prior.centers @ prior.basis
        for index in range(5):
            cold = prior.sample(3, index, temperature=0.0).flatten()
            nearest = (centers - cold).norm(dim=1).min()
            assert float(nearest) < 1e-4
            warm, hot = (prior.sample(3, index, temperature=each).flatten() for each in (0.5, 1.0))
            torch.testing.assert_close(warm - cold, (hot - cold) / 2, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"label": "top"}, "no label 'top'. Labels: left, right"),
            ({"temperature": -1.0}, "temperature -1.0 must be 0 or more"),
            ({"temperature": float("nan")}, "temperature nan must be"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused(self, prior, arguments, message):
        with pytest.raises(ModelError, match=message):
            prior.sample(0, 0, **arguments)


class TestFiles:
    def test_what_is_saved_is_what_is_loaded(self, prior, tmp_path):
        prior.save(tmp_path / "a")
        again = EmbeddingPrior.load(tmp_path / "a")
        assert again.facts == prior.facts
        assert (again.labels, again.sha256) == (prior.labels, prior.sha256)
        torch.testing.assert_close(again.sample(1, 2), prior.sample(1, 2), rtol=0, atol=0)
        again.save(tmp_path / "b")
        for name in ("prior.json", "prior.safetensors"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    def test_the_description_is_read_without_the_numbers(self, prior, tmp_path):
        prior.save(tmp_path)
        (tmp_path / "prior.safetensors").unlink()
        facts = read_prior_facts(tmp_path)
        assert facts["encoder"] == {**ENCODER, "dim": 12}
        assert (facts["rows"], facts["columns"], facts["number"]) == (2, 2, 200)

    def test_nothing_is_replaced_unasked(self, prior, tmp_path):
        prior.save(tmp_path)
        with pytest.raises(OutputError, match=r"holds a prior.json already"):
            prior.save(tmp_path)
        replace(prior, mean=prior.mean + 1).save(tmp_path, replace=True)
        assert EmbeddingPrior.load(tmp_path).sha256 != prior.sha256

    def test_what_is_missing_damaged_or_mixed_is_refused(self, prior, tmp_path):
        with pytest.raises(MissingWeights, match=r"there is no prior\.json\. Fit one with `pixcell prior"):
            EmbeddingPrior.load(tmp_path)
        prior.save(tmp_path)
        other = replace(prior, mean=prior.mean + 1)
        other.save(tmp_path / "other")
        (tmp_path / "prior.safetensors").write_bytes((tmp_path / "other" / "prior.safetensors").read_bytes())
        with pytest.raises(WrongWeights, match="the hash of its numbers differs"):
            EmbeddingPrior.load(tmp_path)
        facts = json.loads((tmp_path / "other" / "prior.json").read_text())
        for wrong, message in (
            ("{", "does not describe anything"),
            ("[]", "does not describe anything"),
            (json.dumps({**facts, "format": "pixcell-prior-9"}), "this pixcell reads 'pixcell-prior-1'"),
            (json.dumps({**facts, "rows": 3}), "holds no whole prior"),
            (json.dumps({**facts, "component_labels": ["a"]}), "holds no whole prior"),
        ):
            (tmp_path / "other" / "prior.json").write_text(wrong)
            with pytest.raises(WrongWeights, match=message):
                EmbeddingPrior.load(tmp_path / "other")


class TestModels:
    def fits(self, prior, facts=None, *, grid_size=2, dim=12, encoder=None):
        known = {"encoder": {**ENCODER, "dim": 12}, "field_size": 64, "mpp": 0.5}
        prior.check_fits(known | (facts or {}), grid_size=grid_size, dim=dim, encoder=encoder)

    def test_the_model_of_its_encoder_takes_it(self, prior):
        self.fits(prior)
        self.fits(prior, {"mpp": 0.499})
        prior.check_fits({}, grid_size=2, dim=12, encoder="small")

    @pytest.mark.parametrize(
        ("facts", "arguments", "message"),
        [
            ({"encoder": {**ENCODER, "sha256": "1" * 64}}, {}, "trained with small"),
            ({"encoder": {**ENCODER, "preprocessing": {"resize": 256}}}, {}, "would mean nothing"),
            ({}, {"encoder": "uni2-h"}, "of embeddings by small, and encoder=uni2-h was named"),
            ({"encoder": {}}, {}, "does not say which encoder .* this prior is of small"),
            ({}, {"dim": 1536}, "12 wide; the model takes 1536"),
            ({}, {"grid_size": 4}, "of 2 x 2 fields; a picture of the model has 4 x 4. .*--size 256"),
            ({"field_size": 128}, {}, "fields of 64 px; the model's have 128 px"),
            ({"mpp": 0.25}, {}, "fitted at 0.5 microns per pixel; the model's pictures are at 0.25"),
        ],
    )
    def test_another_model_refuses_it(self, prior, facts, arguments, message):
        with pytest.raises(ModelError, match=message):
            self.fits(prior, facts, **arguments)

    def test_draws_are_conditions_of_the_pipeline(self, prior, pipeline):
        (one,) = pipeline(
            prior.conditioning(0, [0, 1]),
            num_inference_steps=2,
            generator=[generator_for(0, index) for index in (0, 1)],
            output_type="pt",
            return_dict=False,
        )
        assert one.shape == (2, 3, 128, 128)
        assert float((one[0] - one[1]).abs().max()) > 0

    def test_the_pipeline_refuses_draws_of_another_encoder(self, prior, pipeline):
        foreign = replace(
            prior, facts={**prior.facts, "encoder": {**prior.facts["encoder"], "sha256": "f" * 64}}
        )
        with pytest.raises(ModelError, match="would mean nothing"):
            pipeline(foreign.conditioning(0, [0]), num_inference_steps=1)
