"""The denoiser is the published one, tensor for tensor and number for number, without its faults."""

import json

import pytest
import torch

from golden_vectors import FOLDER, load, weights
from pixcell.errors import ModelError
from pixcell.models.transformer import PixCellTransformer2DModel, condition_positions

# What the golden cases ask for; the values are of size 5, and the differences measured below 8e-6.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "sample_size": 8,
    "caption_channels": 12,
    "interpolation_scale": 0.5,
}


@pytest.fixture
def small() -> PixCellTransformer2DModel:
    torch.manual_seed(0)
    return opened(PixCellTransformer2DModel(**SMALL))


def opened(model: PixCellTransformer2DModel) -> PixCellTransformer2DModel:
    with torch.no_grad():  # open what starts at zero
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def golden_model(name):
    tensors, case = load(name)
    model = PixCellTransformer2DModel(**case["config"]).eval()
    model.load_state_dict(weights(tensors), strict=True)
    return model, tensors


@pytest.mark.parametrize("size", [256, 1024])
def test_full_size_model_has_the_published_tensors(size):
    manifest = json.loads((FOLDER / f"manifest_pixcell_{size}.json").read_text())
    with torch.device("meta"):
        model = PixCellTransformer2DModel(**manifest["config"])
    expected = dict(manifest["others"])
    for block in range(manifest["num_blocks"]):
        expected |= {f"transformer_blocks.{block}.{name}": shape for name, shape in manifest["block"].items()}
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert len(expected) == manifest["num_tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == manifest["num_trainable_elements"]
    buffers = {name for name, _ in model.named_buffers() if name in expected}
    assert buffers == set(manifest["buffers_in_state_dict"])


def test_every_published_configuration_key_is_kept():
    manifest = json.loads((FOLDER / "manifest_pixcell_256.json").read_text())
    with torch.device("meta"):
        config = PixCellTransformer2DModel(**manifest["config"]).config
    assert {key: config[key] for key in manifest["config"]} == manifest["config"]


@pytest.mark.parametrize("name", ["1tok", "4tok", "16tok"])
@torch.no_grad()
def test_output_is_the_reference_output(name):
    model, tensors = golden_model(f"diffusers_transformer_{name}")
    latents, condition = tensors["in.hidden_states"], tensors["in.encoder_hidden_states"]
    for suffix, timestep in (("", "in.timestep"), ("_float_t", "in.timestep_float")):
        if timestep in tensors:
            sample = model(latents, tensors[timestep], condition).sample
            torch.testing.assert_close(sample, tensors[f"out.sample{suffix}"], **CLOSE)


@pytest.mark.parametrize("name", ["1tok", "4tok", "16tok"])
@torch.no_grad()
def test_no_condition_is_the_reference_null_condition(name):
    """With the weights' own table the published sampling comes out, positions on the null included."""
    model, tensors = golden_model(f"diffusers_transformer_{name}")
    sample = model(tensors["in.hidden_states"], tensors["in.timestep"]).sample
    torch.testing.assert_close(sample, tensors["out.sample_uncond"], **CLOSE)


@pytest.mark.parametrize("shape", ["big", "rect"])
@torch.no_grad()
def test_other_sizes_stretch_the_positions_as_the_reference_does(shape):
    model, tensors = golden_model("diffusers_transformer_1tok")
    sample = model(
        tensors[f"in.hidden_states_{shape}"],
        tensors["in.timestep"][1],
        tensors["in.encoder_hidden_states"][:1],
    ).sample
    torch.testing.assert_close(sample, tensors[f"out.sample_{shape}"], **CLOSE)


@pytest.mark.parametrize("name", ["1tok", "4tok", "16tok"])
@torch.no_grad()
def test_inner_tensors_are_the_reference_ones(name):
    model, tensors = golden_model(f"diffusers_transformer_{name}")
    seen = {}
    if model.y_pos_embed is not None:
        seen["y_pos_embed_table"] = model.y_pos_embed.y_pos_embed
    for index, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda _m, _i, out, index=index: seen.update({f"block_{index}": out}))
    model.pos_embed.register_forward_hook(lambda _m, _i, out: seen.update(patch_embedded_with_pos=out))
    model.adaln_single.register_forward_hook(
        lambda _m, _i, out: seen.update(adaln_six_way=out[0], timestep_embedded=out[1])
    )
    model.caption_projection.register_forward_hook(
        lambda _m, args, out: seen.update(condition_plus_pos=args[0], caption_projected=out)
    )
    model(tensors["in.hidden_states"], tensors["in.timestep"], tensors["in.encoder_hidden_states"])
    inner = {key for key in tensors if key.startswith("out.") and not key.startswith("out.sample")}
    assert len(inner) == {"1tok": 6, "4tok": 8, "16tok": 6}[name]
    for key in inner:
        torch.testing.assert_close(seen[key.removeprefix("out.")], tensors[key], **CLOSE)


def test_position_tables_are_the_original_ones():
    tensors, _ = load("position_tables")
    for size, tokens in ((512, 4), (1024, 16)):
        table = condition_positions(1536, tokens, size // 16, size / 512)
        torch.testing.assert_close(table[0], tensors[f"out.y_{size}"], rtol=0, atol=2e-6)
    for size in (256, 512, 1024):
        model = PixCellTransformer2DModel(num_layers=0, sample_size=size // 8, caption_channels=16)
        rows = model.pos_embed.pos_embed[0][tensors[f"in.row_index_{size}"]]
        torch.testing.assert_close(rows, tensors[f"out.full_rows_{size}"], rtol=0, atol=2e-6)


def test_a_fresh_512_model_places_its_conditions_right_where_the_reference_class_does_not():
    tensors, _ = load("position_tables")
    model = PixCellTransformer2DModel(num_layers=0, sample_size=64, caption_num_tokens=4)
    ours = model.y_pos_embed.y_pos_embed[0]
    torch.testing.assert_close(ours, tensors["out.y_512"], rtol=0, atol=2e-6)
    fault = (ours - tensors["out.y_4tok_sample64_diffusers"]).abs().max()
    assert fault > 1, "the reference's diffusers class divides by 2 at every size"


def test_published_weights_bring_their_own_condition_table():
    model, tensors = golden_model("diffusers_transformer_4tok")
    fresh = PixCellTransformer2DModel(**load("diffusers_transformer_4tok")[1]["config"])
    assert torch.equal(model.y_pos_embed.y_pos_embed, tensors["w.y_pos_embed.y_pos_embed"])
    assert not torch.allclose(fresh.y_pos_embed.y_pos_embed, model.y_pos_embed.y_pos_embed)


def test_the_null_embedding_given_as_a_condition_is_no_condition(small):
    latents = torch.randn(2, 4, 8, 8)
    null = small.unconditional_embedding.expand(2, -1, -1)
    with torch.no_grad():
        assert torch.equal(small(latents, 10, null).sample, small(latents, 10).sample)


class TestDropped:
    """Samples without a condition among others."""

    @pytest.fixture(params=[True, False], ids=["positions on null", "bare null"])
    def four(self, request) -> PixCellTransformer2DModel:
        torch.manual_seed(0)
        sizes = {"sample_size": 16, "caption_num_tokens": 4, "unconditional_positions": request.param}
        return opened(PixCellTransformer2DModel(**{**SMALL, **sizes}))

    @torch.no_grad()
    def test_a_dropped_sample_is_one_without_a_condition(self, four):
        latents, condition = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 12)
        dropped = torch.tensor([True, False, True])
        some = four(latents, 40, condition, dropped=dropped).sample
        with_, without = four(latents, 40, condition).sample, four(latents, 40).sample
        torch.testing.assert_close(some, torch.where(dropped[:, None, None, None], without, with_), **CLOSE)
        assert not torch.allclose(some[0], with_[0])

    @torch.no_grad()
    def test_positions_on_the_null_tokens_are_a_choice(self, four):
        """True: as the null embedding given as a condition, so as published sampling. False: bare."""
        latents, null = torch.randn(1, 4, 16, 16), four.unconditional_embedding[None]
        given, dropped = four(latents, 40, null).sample, four(latents, 40).sample
        assert torch.equal(given, dropped) == four.config.unconditional_positions
        four.y_pos_embed.y_pos_embed.zero_()
        torch.testing.assert_close(four(latents, 40).sample, four(latents, 40, null).sample, rtol=0, atol=0)

    def test_the_choice_travels_with_the_weights(self, four, tmp_path):
        four.save_pretrained(tmp_path)
        again = PixCellTransformer2DModel.from_pretrained(tmp_path)
        assert again.config.unconditional_positions == four.config.unconditional_positions
        assert again.grown_to(32, 16)[0].config.unconditional_positions == four.config.unconditional_positions

    def test_the_mask_has_one_value_each(self, four):
        with pytest.raises(ModelError, match="dropped marks 2 samples of 1"):
            four(
                torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 4, 12), dropped=torch.zeros(2, dtype=torch.bool)
            )


class TestPrepared:
    """What is computed once gives the same bits as what is computed each time."""

    @pytest.fixture(params=[1, 4], ids=["one token", "four tokens"])
    def model(self, request) -> PixCellTransformer2DModel:
        torch.manual_seed(0)
        return opened(PixCellTransformer2DModel(**{**SMALL, "caption_num_tokens": request.param}))

    @torch.no_grad()
    def test_a_prepared_condition_is_the_condition(self, model):
        latents = torch.randn(3, 4, 8, 8)
        condition = torch.randn(3, model.config.caption_num_tokens, 12)
        dropped = torch.tensor([False, True, False])
        for timestep in (torch.tensor([3, 500, 949.05]), 700):
            plain = model(latents, timestep, condition, dropped=dropped).sample
            assert torch.equal(model(latents, timestep, model.prepare(condition, dropped)).sample, plain)

    @torch.no_grad()
    def test_modulation_for_all_steps_is_that_of_each(self, model):
        latents, condition = torch.randn(2, 4, 8, 8), torch.randn(2, model.config.caption_num_tokens, 12)
        steps = torch.tensor([999, 949.05, 500, 0.25])
        together = model.modulation(steps)
        for number, step in enumerate(steps):
            torch.testing.assert_close(
                model(latents, together.row(number), condition).sample,
                model(latents, step, condition).sample,
                **CLOSE,
            )

    @torch.no_grad()
    def test_one_timestep_for_all_is_that_timestep_for_each(self, model):
        latents, condition = torch.randn(3, 4, 8, 8), torch.randn(3, model.config.caption_num_tokens, 12)
        one, each = (model(latents, t, condition).sample for t in (250, torch.full((3,), 250)))
        torch.testing.assert_close(one, each, **CLOSE)

    def test_its_gradients_are_those_of_the_condition(self, model):
        latents, condition = torch.randn(2, 4, 8, 8), torch.randn(2, model.config.caption_num_tokens, 12)
        gradients = []
        for prepare in (lambda given: given, model.prepare):
            model.zero_grad(set_to_none=True)
            model(latents, 500, prepare(condition)).sample.square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        for plain, prepared in zip(*gradients, strict=True):
            torch.testing.assert_close(prepared, plain, rtol=1e-5, atol=1e-7)

    def test_it_knows_what_was_dropped(self, model):
        prepared = model.prepare(torch.zeros(1, model.config.caption_num_tokens, 12))
        with pytest.raises(ModelError, match="give them to prepare"):
            model(torch.zeros(1, 4, 8, 8), 1, prepared, dropped=torch.ones(1, dtype=torch.bool))

    def test_it_belongs_to_its_model_and_batch(self, model):
        prepared = model.prepare(torch.zeros(1, model.config.caption_num_tokens, 12))
        with pytest.raises(ModelError, match="2 latents were given with 1 conditions"):
            model(torch.zeros(2, 4, 8, 8), 1, prepared)
        with pytest.raises(ModelError, match="prepared by another model"):
            PixCellTransformer2DModel(**{**SMALL, "num_layers": 1})(torch.zeros(1, 4, 8, 8), 1, prepared)


def test_a_new_model_predicts_zero_and_ignores_its_condition():
    model = PixCellTransformer2DModel(**SMALL)
    assert not model(torch.randn(1, 4, 8, 8), 5).sample.any()
    with torch.no_grad():
        model.proj_out.weight.normal_()
        latents = torch.randn(1, 4, 8, 8)
        one, other = (model(latents, 5, torch.randn(1, 1, 12)).sample for _ in range(2))
    assert torch.equal(one, other)


def test_initial_spreads_are_those_of_the_recipe():
    torch.manual_seed(0)
    model = PixCellTransformer2DModel(num_layers=1, num_attention_heads=4, cross_attention_dim=288)
    time = model.adaln_single.emb.timestep_embedder
    for layer in (
        time.linear_1,
        time.linear_2,
        model.adaln_single.linear,
        model.caption_projection.linear_1,
        model.caption_projection.linear_2,
    ):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
    block = model.transformer_blocks[0]
    assert block.scale_shift_table.std().item() == pytest.approx(288**-0.5, rel=0.1)
    # Xavier uniform: variance 2 / (fan in + fan out)
    assert block.ff.net[2].weight.var().item() == pytest.approx(2 / (288 + 1152), rel=0.05)
    assert model.pos_embed.proj.weight.var().item() == pytest.approx(2 / (288 + 64), rel=0.05)
    assert model.unconditional_embedding.std().item() == pytest.approx(1536**-0.5, rel=0.1)


def test_what_starts_at_zero_and_what_the_framework_draws():
    torch.manual_seed(0)
    model = PixCellTransformer2DModel(num_layers=2, num_attention_heads=4, cross_attention_dim=288)
    zero = [model.proj_out, *(block.attn2.to_out[0] for block in model.transformer_blocks)]
    assert not any(layer.weight.any() or layer.bias.any() for layer in zero)
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert not any(layer.bias.any() for layer in linear)
    assert all(layer.weight.any() for layer in linear if layer not in zero)
    # of the patch convolution: uniform within 1 / sqrt(fan in)
    bias = model.pos_embed.proj.bias
    assert 0 < bias.abs().max() <= 64**-0.5
    assert bias.var().item() == pytest.approx(64**-1 / 3, rel=0.2)


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("transformer_blocks.0.attn1.to_q.weight", "xavier"),
        ("transformer_blocks.0.attn2.to_v.weight", "xavier"),
        ("transformer_blocks.0.ff.net.0.proj.weight", "xavier"),
        ("pos_embed.proj.weight", "xavier"),
        ("adaln_single.linear.weight", "normal 0.02"),
        ("caption_projection.linear_2.weight", "normal 0.02"),
        ("transformer_blocks.0.scale_shift_table", "normal 1 / sqrt(width)"),
    ],
)
def test_initial_weights_follow_their_distribution(name, draw):
    """By the largest distance between distribution functions (Kolmogorov-Smirnov), with a fixed seed."""
    from scipy.stats import kstest

    torch.manual_seed(0)
    model = PixCellTransformer2DModel(num_layers=1, num_attention_heads=4, cross_attention_dim=288)
    weight = model.get_parameter(name).detach()
    if draw == "xavier":
        limit = (6 / sum(weight.flatten(1).shape)) ** 0.5
        expected = ("uniform", (-limit, 2 * limit))
    else:
        expected = ("norm", (0, 0.02 if draw == "normal 0.02" else 288**-0.5))
    assert kstest(weight.flatten().double().numpy(), expected[0], expected[1]).pvalue > 0.01


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_gradient_checkpointing_changes_neither_value_nor_gradient(num_tokens):
    torch.manual_seed(0)
    model = opened(PixCellTransformer2DModel(**{**SMALL, "caption_num_tokens": num_tokens})).train()
    latents, condition = torch.randn(2, 4, 8, 8), torch.randn(2, num_tokens, 12)
    dropped, residual = torch.tensor([False, True]), torch.randn(2, 16, 16, requires_grad=True)

    def outcome():
        model.zero_grad(set_to_none=True)
        residual.grad = None
        sample = model(latents, torch.tensor([3, 700]), condition, [residual], dropped=dropped).sample
        sample.square().mean().backward()
        return [sample.detach(), residual.grad, *(parameter.grad.clone() for parameter in model.parameters())]

    plain = outcome()
    model.enable_gradient_checkpointing()
    assert model.gradient_checkpointing
    calls = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for before, after in zip(plain, outcome(), strict=True):
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-7)
    assert len(calls) == 2, "computed again on the way back"


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_runs_in_half_precision(num_tokens, dtype):
    """In every layer: a module that returns float32 would turn all that follows into float32."""
    torch.manual_seed(0)
    model = opened(PixCellTransformer2DModel(**{**SMALL, "caption_num_tokens": num_tokens}))
    latents, condition = torch.randn(2, 4, 8, 8), torch.randn(2, num_tokens, 12)
    timestep = torch.tensor([500, 20])
    exact = model(latents, timestep, condition).sample
    model.to(dtype)
    seen = {}
    for name, module in model.named_modules():
        if name and "time_proj" not in name:  # the sinusoids themselves are float32
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    for given in (latents, latents.to(dtype)):
        for time in (timestep, 500):
            sample = model(given, time, condition).sample
            assert sample.dtype == dtype
    outputs = {
        name: part for name, out in seen.items() for part in (out if isinstance(out, tuple) else (out,))
    }
    assert len(outputs) > 20
    assert {name: out.dtype for name, out in outputs.items() if out.dtype != dtype} == {}
    sample = model(latents, timestep, condition).sample
    assert (sample.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_fractional_timesteps_stay_exact_in_half_precision(small, dtype):
    """949.05 would become 949.0 in float16 and 948.0 in bfloat16."""
    exact = small.modulation(torch.tensor([949.05]))
    rounded = small.modulation(torch.tensor([949.05]).to(dtype))
    seen = {}
    small.to(dtype).adaln_single.emb.time_proj.register_forward_hook(
        lambda _m, given, out: seen.update(timestep=given[0], features=out)
    )
    ours = small.modulation(torch.tensor([949.05])).output.float()
    assert seen["timestep"].dtype == seen["features"].dtype == torch.float32
    assert seen["timestep"].item() == torch.tensor(949.05).item()
    assert (ours - exact.output).abs().max() < 0.1 * (rounded.output - exact.output).abs().max()


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_training_under_autocast_gives_every_weight_its_gradient(num_tokens):
    torch.manual_seed(0)
    model = opened(PixCellTransformer2DModel(**{**SMALL, "caption_num_tokens": num_tokens})).train()
    latents, condition = torch.randn(2, 4, 8, 8), torch.randn(2, num_tokens, 12)
    exact = model(latents, torch.tensor([3, 700]), condition).sample
    with torch.autocast("cpu", torch.bfloat16):
        sample = model(latents, torch.tensor([3, 700]), condition).sample
    assert (sample.float() - exact).abs().max() < 0.05 * exact.abs().max()
    sample.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@torch.no_grad()
def test_control_residuals_are_added_behind_their_blocks(small):
    latents, condition = torch.randn(1, 4, 8, 8), torch.randn(1, 1, 12)
    plain = small(latents, 9, condition).sample
    zeros = [torch.zeros(1, 16, 16)] * 2
    assert torch.equal(small(latents, 9, condition, zeros).sample, plain)
    residual = torch.randn(1, 16, 16)
    only_first = small(latents, 9, condition, [residual]).sample
    handle = small.transformer_blocks[0].register_forward_hook(lambda _m, _i, out: out + residual)
    expected = small(latents, 9, condition).sample
    handle.remove()
    assert torch.equal(only_first, expected)
    assert not torch.allclose(only_first, plain)


def test_saved_and_loaded_it_is_the_same(small, tmp_path):
    small.save_pretrained(tmp_path)
    again = PixCellTransformer2DModel.from_pretrained(tmp_path)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(latents, 7).sample, small(latents, 7).sample)
    assert dict(again.config)["interpolation_scale"] == 0.5


def test_adapters_attach(small):
    from peft import LoraConfig

    small.add_adapter(
        LoraConfig(r=2, target_modules=["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"])
    )
    trainable = [name for name, parameter in small.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 4 * 2
    assert all("lora" in name for name in trainable)


def test_a_learned_null_embedding_is_trained_and_keeps_its_name():
    model = PixCellTransformer2DModel(**SMALL, learn_unconditional_embedding=True)
    torch.nn.init.normal_(model.proj_out.weight)
    torch.nn.init.normal_(model.transformer_blocks[0].attn2.to_out[0].weight)
    model(torch.randn(1, 4, 8, 8), 5).sample.square().mean().backward()
    assert model.unconditional_embedding.grad.abs().sum() > 0
    assert set(model.state_dict()) == set(PixCellTransformer2DModel(**SMALL).state_dict())


class TestGrowth:
    """256 to 512 to 1024."""

    def test_every_weight_is_carried_and_every_table_is_new(self, small):
        grown, report = small.grown_to(16, 4)
        fresh = PixCellTransformer2DModel(
            **{**SMALL, "sample_size": 16, "caption_num_tokens": 4, "interpolation_scale": 1.0}
        )
        assert set(report.carried) == {name for name, _ in small.named_parameters()}
        assert set(report.rebuilt) == {
            "pos_embed.pos_embed",
            "y_pos_embed.y_pos_embed",
            "caption_projection.uncond_embedding",
        }
        assert not report.dropped
        old, new = small.state_dict(), grown.state_dict()
        assert all(torch.equal(old[name], new[name]) for name in report.carried)
        assert torch.equal(grown.pos_embed.pos_embed, fresh.pos_embed.pos_embed)
        assert torch.equal(grown.y_pos_embed.y_pos_embed, fresh.y_pos_embed.y_pos_embed)
        assert grown.config.interpolation_scale == 1.0

    def test_positions_span_the_same_square_at_every_size(self, small):
        """Image token (i, j) of the small model stands where token (2i, 2j) of the grown one stands."""
        grown, _ = small.grown_to(16, 4)
        coarse = small.pos_embed.pos_embed.unflatten(1, (4, 4))
        fine = grown.pos_embed.pos_embed.unflatten(1, (8, 8))
        torch.testing.assert_close(coarse, fine[:, ::2, ::2], rtol=0, atol=1e-6)

    def test_null_tokens_are_spread_over_the_fields_they_covered(self):
        torch.manual_seed(0)
        model = PixCellTransformer2DModel(**{**SMALL, "sample_size": 16, "caption_num_tokens": 4})
        grown, _ = model.grown_to(32, 16)
        old = model.unconditional_embedding.reshape(2, 2, 12)
        new = grown.unconditional_embedding.reshape(4, 4, 12)
        assert torch.equal(new, old.repeat_interleave(2, 0).repeat_interleave(2, 1))

    @torch.no_grad()
    def test_without_positions_a_repeated_condition_means_the_same(self, small):
        """Attention over equal tokens is that token: growth itself loses nothing."""
        grown, _ = small.grown_to(8, 4, interpolation_scale=0.5)
        grown.y_pos_embed.y_pos_embed.zero_()
        latents, condition = torch.randn(2, 4, 8, 8), torch.randn(2, 1, 12)
        torch.testing.assert_close(
            grown(latents, 50, condition.expand(-1, 4, -1)).sample,
            small(latents, 50, condition).sample,
            **CLOSE,
        )
        torch.testing.assert_close(grown(latents, 50).sample, small(latents, 50).sample, **CLOSE)

    def test_shrinking_names_what_it_drops(self):
        model = PixCellTransformer2DModel(**{**SMALL, "sample_size": 16, "caption_num_tokens": 4})
        shrunk, report = model.grown_to(8, 1)
        assert set(report.dropped) == {"y_pos_embed.y_pos_embed"}
        assert shrunk.y_pos_embed is None
        assert "dropped y_pos_embed" in str(report)

    def test_same_size_is_the_same_model(self, small):
        grown, report = small.grown_to(8, 1)
        latents = torch.randn(1, 4, 8, 8)
        with torch.no_grad():
            assert torch.equal(grown(latents, 4).sample, small(latents, 4).sample)
        assert set(report.rebuilt) == {"pos_embed.pos_embed"}

    def test_grids_that_do_not_nest_are_refused(self):
        model = PixCellTransformer2DModel(**{**SMALL, "sample_size": 16, "caption_num_tokens": 4})
        with pytest.raises(ModelError, match="2 x 2 embedding grid cannot become 3 x 3"):
            model.grown_to(24, 9)


class TestWrongInput:
    """Each is refused before anything is computed, with both numbers."""

    @pytest.mark.parametrize(
        ("latents", "condition", "message"),
        [
            ((1, 3, 8, 8), (1, 1, 12), "3 channels, the model takes 4"),
            ((1, 4, 9, 8), (1, 1, 12), "9 x 8 are not a whole number of 2 x 2 patches"),
            ((1, 4, 8, 9), (1, 1, 12), "nearest latents are 8 x 8"),
            ((4, 8, 8), (1, 1, 12), "latents of shape \\(4, 8, 8\\) were given"),
            ((1, 4, 8, 8), (1, 1, 13), "13 wide, the model takes 12"),
            ((1, 4, 8, 8), (1, 4, 12), "4 condition tokens were given, the model takes 1"),
            ((2, 4, 8, 8), (3, 1, 12), "2 latents were given with 3 conditions"),
            ((1, 4, 8, 8), (1, 12), "it is \\(batch, tokens, dim\\)"),
        ],
    )
    def test_sizes(self, small, latents, condition, message):
        small.pos_embed.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
        with pytest.raises(ModelError, match=message):
            small(torch.zeros(latents), 1, torch.zeros(condition))

    @pytest.mark.parametrize("dropped", [torch.tensor([1, 0]), torch.tensor([True])])
    def test_dropped_samples(self, small, dropped):
        with pytest.raises(ModelError, match="give one boolean each"):
            small(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 1, 12), dropped=dropped)

    def test_timesteps(self, small):
        with pytest.raises(ModelError, match="2 timesteps were given for 3 latents"):
            small(torch.zeros(3, 4, 8, 8), torch.tensor([1, 2]), None)

    def test_too_many_residuals(self, small):
        with pytest.raises(ModelError, match="3 control residuals were given for 2 blocks"):
            small(torch.zeros(1, 4, 8, 8), 1, None, [torch.zeros(1, 16, 16)] * 3)

    @pytest.mark.parametrize("shape", [(1, 16, 12), (1, 64, 16), (3, 16, 16)])
    def test_residuals_of_other_latents(self, small, shape):
        small.pos_embed.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
        with pytest.raises(ModelError, match=r"control residual 1 is .* take \(2, 16, 16\)"):
            small(torch.zeros(2, 4, 8, 8), 1, None, [torch.zeros(2, 16, 16), torch.zeros(shape)])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"caption_num_tokens": 3}, "not a square number"),
            ({"cross_attention_dim": 20}, "must be equal"),
            (
                {"num_attention_heads": 2, "attention_head_dim": 15, "cross_attention_dim": 30},
                "need a multiple of 4",
            ),
            ({"num_attention_heads": 0, "cross_attention_dim": 0}, "need a multiple of 4"),
            ({"caption_num_tokens": 4, "caption_channels": 14}, "embeddings 14 wide cannot have positions"),
            ({"sample_size": 7}, "multiple of patch_size"),
            ({"norm_type": "layer_norm"}, "ada_norm_single"),
            ({"use_additional_conditions": True}, "set it to false"),
        ],
    )
    def test_architectures(self, changes, message):
        with pytest.raises(ModelError, match=message):
            PixCellTransformer2DModel(**{**SMALL, **changes})


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_positions_need_a_scale(scale):
    with pytest.raises(ModelError, match="interpolation_scale"):
        PixCellTransformer2DModel(interpolation_scale=scale)
