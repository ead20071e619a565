"""Embeddings travel from one stain to another as the published network moves them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from golden_vectors import FOLDER, load, weights
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.translator import EmbeddingTranslator, flow_pair, load_translator, translation_loss
from tiny_models import awake, tiny_vae

# Rounding of float32 over some thirty layers; the sines of timesteps up to 999 take part with about 1e-5.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def small(**changes) -> EmbeddingTranslator:
    """Every width is another one, so that no two can be mixed up."""
    settings = {
        "in_channels": 6,
        "time_embed_dim": 10,
        "model_channels": 7,
        "bottleneck_channels": 5,
        "out_channels": 6,
        "num_res_blocks": 2,
    }
    torch.manual_seed(0)
    return awake(EmbeddingTranslator(**(settings | changes)))


@pytest.fixture
def golden():
    tensors, case = load("flow_mlp")
    model = EmbeddingTranslator(**case["config"]).eval()
    model.load_state_dict(weights(tensors), strict=True)
    return model, tensors


class TestPublished:
    def test_full_size_has_the_published_tensors(self):
        manifest = json.loads((FOLDER / "manifest_staining_translator.json").read_text())
        with torch.device("meta"):
            model = EmbeddingTranslator(**manifest["config"])
            assert {name: model.config[name] for name in manifest["config"]} == manifest["config"]
            published = EmbeddingTranslator()  # what it is unless told otherwise
            assert published.config["in_channels"] == model.config["in_channels"]
            assert published.state_dict().keys() == model.state_dict().keys()
        expected = dict(manifest["others"])
        for block in range(manifest["num_blocks"]):
            expected |= {f"res_blocks.{block}.{name}": shape for name, shape in manifest["block"].items()}
        assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
        assert len(expected) == manifest["num_tensors"]
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == manifest["num_trainable_elements"]

    @torch.no_grad()
    def test_velocity(self, golden):
        model, tensors = golden
        seen = []
        model.time_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        velocity = model(tensors["in.he"], tensors["in.time_input"])
        torch.testing.assert_close(seen[0], tensors["out.time_features"], **CLOSE)
        torch.testing.assert_close(velocity, tensors["out.velocity"], **CLOSE)

    @torch.no_grad()
    def test_loss(self, golden):
        model, tensors = golden
        between, target = flow_pair(tensors["in.he"], tensors["in.ihc"], tensors["in.t"])
        torch.testing.assert_close(between, tensors["out.xt"], **CLOSE)
        torch.testing.assert_close(target, tensors["out.target"], **CLOSE)
        prediction = model(between, 999 * tensors["in.t"])
        torch.testing.assert_close(prediction, tensors["out.prediction"], **CLOSE)
        loss = translation_loss(model, tensors["in.he"], tensors["in.ihc"], tensors["in.t"])
        assert loss.shape == (32,)
        torch.testing.assert_close(loss.mean()[None], tensors["out.loss"], **CLOSE)

    def test_translation(self, golden):
        model, tensors = golden
        steps = tensors["out.euler_trajectory"]
        translated = model.translate(tensors["in.he"], num_steps=len(steps))
        torch.testing.assert_close(translated, steps[-1], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("width", [16, 7])
    @torch.no_grad()
    def test_sines_and_cosines_of_the_timestep(self, width):
        """Cosines first; an odd width ends in a zero."""
        tensors, _ = load("timestep_features")
        model = small(model_channels=width, time_embed_dim=width)
        seen = []
        model.time_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(torch.zeros(8, 6), tensors["in.t"])
        torch.testing.assert_close(seen[0], tensors[f"out.flow_{width}"], **CLOSE)


class TestForward:
    @torch.no_grad()
    def test_any_leading_dimensions_are_the_same_tokens(self):
        model, grid = small(), torch.randn(2, 3, 4, 6)
        timesteps = torch.rand(2, 3, 4) * 999
        one_by_one = model(grid.flatten(0, 2), timesteps.flatten()).unflatten(0, (2, 3, 4))
        torch.testing.assert_close(model(grid, timesteps), one_by_one)
        torch.testing.assert_close(
            model(grid[0, 0, 0], timesteps[0, 0, 0]), one_by_one[0, 0, 0], rtol=1e-5, atol=1e-6
        )

    @torch.no_grad()
    def test_a_timestep_may_be_one_for_all_or_one_for_each_sample(self):
        model, tokens = small(), torch.randn(3, 4, 6)
        each = model(tokens, torch.full((3, 4), 250.5))
        for timestep in (250.5, torch.tensor(250.5), torch.tensor([250.5]), torch.full((3,), 250.5)):
            torch.testing.assert_close(model(tokens, timestep), each)
        per_sample = model(tokens, torch.tensor([1.0, 500.0, 999.0]))
        torch.testing.assert_close(per_sample[1], model(tokens[1], 500.0), rtol=1e-5, atol=1e-6)

    @torch.no_grad()
    def test_untrained_nothing_moves(self):
        model = EmbeddingTranslator(6, 10, 7, 5, 6, 2)
        assert not model(torch.randn(4, 6), 500.0).any()

    def test_every_weight_is_used(self):
        model = small()
        translation_loss(model, torch.randn(4, 6), torch.randn(4, 6), torch.rand(4)).mean().backward()
        assert all(parameter.grad.any() for parameter in model.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        model, tokens = small(), torch.randn(4, 6)
        exact = model.translate(tokens, num_steps=4)
        half = model.to(dtype).translate(tokens, num_steps=4)
        assert model(tokens, 0.5).dtype == dtype
        assert half.dtype == torch.float32
        # eight bits of mantissa; the steps together move by about the size of the tokens
        torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)

    def test_wrong_input_is_refused(self):
        model = small()
        with pytest.raises(ModelError, match="6 values each"):
            model(torch.zeros(2, 7), 0.0)
        with pytest.raises(ValueError, match="not one for each"):
            model(torch.zeros(2, 3, 6), torch.zeros(3))
        with pytest.raises(ValueError, match="not one for each"):
            model(torch.zeros(2, 6), torch.zeros(2, 6))


class TestTranslate:
    def test_a_constant_velocity_carries_exactly_to_the_target(self):
        """Whatever the number of steps: their lengths add up to one."""
        model, start = small(), torch.randn(5, 6)
        with torch.no_grad():
            model.out[-1].weight.zero_()
        for num_steps in (1, 3, 7):
            moved = model.translate(start, num_steps=num_steps)
            torch.testing.assert_close(moved, start + model.out[-1].bias, rtol=1e-5, atol=1e-5)

    def test_the_velocity_is_seen_between_the_first_and_the_last_thousandth(self):
        model, seen = small(), []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1])))
        model.translate(torch.zeros(1, 6), num_steps=3)
        assert seen == pytest.approx([0.999, 499.5, 998.001], rel=1e-6)

    def test_a_token_does_not_depend_on_its_neighbours(self):
        model, tokens = small(), torch.randn(3, 16, 6)
        together = model.translate(tokens, num_steps=5)
        torch.testing.assert_close(together[1:2, 3], model.translate(tokens[1, 3:4], num_steps=5))

    def test_the_norm_can_be_kept(self):
        model, tokens = small(), torch.randn(3, 2, 2, 6)
        free = model.translate(tokens, num_steps=5)
        kept = model.translate(tokens, num_steps=5, keep_norm=True)

        def mean_norm(grid):
            return grid.norm(dim=-1).flatten(1).mean(dim=1)

        torch.testing.assert_close(mean_norm(kept), mean_norm(tokens))
        assert not torch.allclose(mean_norm(free), mean_norm(tokens), rtol=1e-2)
        # one factor a sample: directions, and the lengths inside a sample, stay
        factors = (kept / free).flatten(1)
        torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))

    @pytest.mark.parametrize(
        ("embeddings", "steps", "message"),
        [
            (torch.zeros(2, 5), 10, "6 values each"),
            (torch.full((2, 6), float("nan")), 10, "NaN or infinity"),
            (torch.zeros(2, 6), 0, "choose 1 or more"),
        ],
    )
    def test_wrong_input_is_refused_before_any_compute(self, embeddings, steps, message):
        model = small()
        model.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
        with pytest.raises(ModelError, match=message):
            model.translate(embeddings, num_steps=steps)

    def test_a_network_that_changes_the_width_does_not_translate(self):
        with pytest.raises(ModelError, match="a translation keeps the width"):
            small(out_channels=8).translate(torch.zeros(1, 6))


class TestLoss:
    def test_ends_of_the_way_are_source_and_target(self):
        source, target = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
        between, velocity = flow_pair(source, target, torch.tensor([0.0, 1.0]))
        assert torch.equal(between[0], source[0])
        assert torch.equal(between[1], target[1])
        assert torch.equal(velocity, target - source)

    def test_it_is_computed_in_float32_under_autocast(self):
        model = small()
        with torch.autocast("cpu", torch.bfloat16):
            loss = translation_loss(model, torch.randn(2, 6), torch.randn(2, 6), torch.rand(2))
        assert loss.dtype == torch.float32

    def test_what_is_no_pair_is_refused(self):
        with pytest.raises(ValueError, match="do not go together"):
            flow_pair(torch.zeros(2, 6), torch.zeros(2, 6), torch.zeros(3))


class TestLoading:
    @pytest.mark.parametrize("way", ["folder", "pth", "safetensors", "state"])
    def test_saved_and_loaded_it_is_the_same(self, way, tmp_path):
        model, tokens = small(), torch.randn(2, 6)
        place = tmp_path / f"translator.{way}"
        if way == "folder":
            model.save_pretrained(place)
        elif way == "pth":
            torch.save(model.state_dict(), place)
        elif way == "safetensors":
            save_file(model.state_dict(), place)
        again = load_translator(model.state_dict() if way == "state" else place)
        assert torch.equal(again.translate(tokens, 3), model.translate(tokens, 3))
        assert not again.training
        sizes = {key: value for key, value in model.config.items() if not key.startswith("_")}
        assert {key: again.config[key] for key in sizes} == sizes

    def test_in_half_precision(self):
        assert load_translator(small().state_dict(), dtype=torch.bfloat16).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("out.2.bias"), r"1 tensors missing \(out.2.bias\)"),
            (lambda state: state.pop("input_proj.weight"), "none is the matrix input_proj.weight"),
            (lambda state: state.update(foreign=torch.zeros(1)), r"1 tensors unexpected \(foreign\)"),
            (lambda state: state.update({"out.0.bias": torch.zeros(3)}), r"\(3,\) instead of \(7,\)"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change, message):
        state = small().state_dict()
        change(state)
        with pytest.raises(WrongWeights, match=message):
            load_translator(state)

    def test_folders_of_something_else(self, tmp_path):
        with pytest.raises(MissingWeights, match="holds no configuration of a translator"):
            load_translator(tmp_path)
        tiny_vae().save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="not an EmbeddingTranslator"):
            load_translator(tmp_path)
        with pytest.raises(MissingWeights, match="no weight file"):
            load_translator(tmp_path / "absent.pth")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"use_context": True}, "use_context"),
            ({"bottleneck_channels": 0}, "bottleneck_channels 0"),
            ({"model_channels": 1}, "at least 2"),
        ],
    )
    def test_configurations_that_make_no_model(self, changes, message):
        with pytest.raises(ModelError, match=message):
            small(**changes)


def test_weights_that_are_no_numbers_are_refused():
    state = EmbeddingTranslator(6, 4, 4, 4, 6, 1).state_dict()
    state["out.2.bias"][0] = torch.nan
    with pytest.raises(WrongWeights, match=r"out\.2\.bias \(1 tensors\) hold NaN"):
        load_translator(state)
