"""The two layouts of the denoiser hold the same numbers, and shapes tell the configuration."""

import json

import pytest
import torch

from golden_vectors import FOLDER, load, weights
from pixcell.errors import ModelError, WrongWeights
from pixcell.models.published_configs import (
    config_from_original,
    config_of_controlnet,
    config_of_original,
    config_of_transformer,
)
from pixcell.models.published_layouts import diffusers_from_original, original_from_diffusers
from pixcell.models.transformer import PixCellTransformer2DModel

# As in test_transformer: the stored values come from another exp in the sinusoids of the time.
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
SIZES = (256, 512, 1024)


def manifest(size):
    return json.loads((FOLDER / "manifest_pixcell_original.json").read_text())[str(size)]


def published(size):
    """Every tensor of the original layout at full size, without values."""
    about = manifest(size)
    shapes = dict(about["others"])
    for block in range(about["num_blocks"]):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in about["block"].items()}
    assert len(shapes) == about["num_tensors"]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def original_model(name, **settings):
    """Our class with the weights of a case in the original layout."""
    tensors, case = load(name)
    state = weights(tensors)
    model = PixCellTransformer2DModel(**config_from_original(**case["config"]), **settings).eval()
    model.load_state_dict(diffusers_from_original(state), strict=True)
    return model, tensors, case


# ── full size, no values ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", SIZES)
def test_full_size_original_weights_become_ours_name_by_name(size):
    state = published(size)
    config, _ = config_of_original(state)
    with torch.device("meta"):
        model = PixCellTransformer2DModel(**config)
    assert shapes_of(diffusers_from_original(state)) == shapes_of(model.state_dict())
    assert len(model.state_dict()) == (604 if size == 256 else 605)
    assert sum(value.numel() for value in model.parameters()) == manifest(size)["num_trainable_elements"]


@pytest.mark.parametrize("size", SIZES)
def test_our_full_size_weights_become_the_original_ones_name_by_name(size):
    state = published(size)
    back = original_from_diffusers(diffusers_from_original(state), state["pos_embed"])
    assert shapes_of(back) == shapes_of(state)
    assert sum(value.numel() for value in back.values()) == manifest(size)["num_elements"]


@pytest.mark.parametrize("size", SIZES)
def test_the_configuration_of_published_weights_is_read_off_their_shapes(size):
    config, assumed = config_of_original(published(size))
    assert config == config_from_original(**manifest(size)["config"])
    assert assumed == ["16 attention heads, 72 wide"]


@pytest.mark.parametrize("size", [256, 1024])
def test_the_configuration_of_the_diffusers_layout_is_read_off_its_shapes(size):
    stated = json.loads((FOLDER / f"manifest_pixcell_{size}.json").read_text())["config"]
    config, _ = config_of_transformer(diffusers_from_original(published(size)))
    assert config == {key: stated[key] for key in config}


# ── tiny, with values ────────────────────────────────────────────────────────────────────────────────


def test_the_published_conversion_is_ours_bit_for_bit_in_both_directions():
    tensors, _ = load("convert_original_to_diffusers")
    original = weights(tensors)
    expected = {
        name.removeprefix("out.converted."): value
        for name, value in tensors.items()
        if name.startswith("out.converted.")
    }
    ours = diffusers_from_original(original)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    back = original_from_diffusers(ours, original["pos_embed"])
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


@torch.no_grad()
def test_converted_weights_give_the_output_of_both_reference_classes():
    model, tensors, _ = original_model("convert_original_to_diffusers")
    sample = model(tensors["in.x"], tensors["in.timestep"], tensors["in.y"][:, 0]).sample
    torch.testing.assert_close(sample, tensors["out.original_output"], **CLOSE)
    torch.testing.assert_close(sample, tensors["out.diffusers_output"], **CLOSE)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_original_weights_give_the_original_output(size):
    model, tensors, _ = original_model(f"original_transformer_{size}like")
    x, y, half = tensors["in.x"], tensors["in.y"][:, 0], tensors["in.x"].shape[1]
    sample = model(x, tensors["in.timestep"], y).sample
    for name, ours in {
        "out": sample,
        "out_3d_condition": sample,
        "out_dpm": sample[:, :half],
        "out_float_t": model(x, tensors["in.timestep_float"], y).sample,
        "out_null": model(x, tensors["in.timestep"]).sample,
    }.items():
        torch.testing.assert_close(ours, tensors[f"out.{name}"], **CLOSE)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_conditions_dropped_in_training_are_bare_in_the_reference_and_placed_in_ours(size):
    """The reference trains on one null condition and samples with another; ours is the latter."""
    outputs = {}
    for positions in (False, True):
        model, tensors, _ = original_model(
            f"original_transformer_{size}like", unconditional_positions=positions
        )
        x, y, dropped = tensors["in.x"], tensors["in.y"][:, 0], tensors["out.drop_mask"]
        outputs[positions] = model(x, tensors["in.timestep"], y, dropped=dropped).sample
    expected = tensors["out.out_train_with_drop"]
    torch.testing.assert_close(outputs[False], expected, **CLOSE)
    assert 0 < dropped.sum() < len(dropped)
    torch.testing.assert_close(outputs[True][~dropped], expected[~dropped], **CLOSE)
    torch.testing.assert_close(outputs[True][dropped], tensors["out.out_null"][dropped], **CLOSE)
    differs = not torch.allclose(outputs[True][dropped], expected[dropped], **CLOSE)
    assert differs == (size > 256), "a single token has no position"


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_original_time_vectors_and_position_tables_are_ours(size):
    model, tensors, _ = original_model(f"original_transformer_{size}like")
    times = tensors["in.timestep"]
    modulation, embedded = model.adaln_single(times, batch_size=len(times), hidden_dtype=torch.float32)
    torch.testing.assert_close(embedded, tensors["out.t_embedded"], **CLOSE)
    torch.testing.assert_close(modulation, tensors["out.t_block"], **CLOSE)
    torch.testing.assert_close(model.pos_embed.pos_embed, tensors["out.pos_embed_table"], rtol=0, atol=2e-6)
    if size > 256:
        fresh = PixCellTransformer2DModel(**model.config).y_pos_embed.y_pos_embed
        torch.testing.assert_close(fresh, tensors["out.y_pos_embed_table"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "name", ["convert_original_to_diffusers", *(f"original_transformer_{s}like" for s in SIZES)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_interpolation_and_size_are_read_off_the_stored_table(name, dtype):
    tensors, case = load(name)
    state = {key: value.to(dtype) for key, value in weights(tensors).items()}
    config, assumed = config_of_original(state, num_attention_heads=case["config"]["num_heads"])
    assert config == config_from_original(**case["config"])
    assert not assumed


def test_an_interpolation_that_is_no_power_of_two_is_read_too():
    model = PixCellTransformer2DModel(
        num_layers=0, sample_size=24, caption_channels=8, interpolation_scale=0.7
    )
    state = original_from_diffusers(model.state_dict(), model.pos_embed.pos_embed)
    assert config_of_original(state)[0]["interpolation_scale"] == 0.7


def test_without_a_stored_table_the_published_rules_hold():
    state = weights(load("original_transformer_512like")[0])
    del state["pos_embed"]
    config, assumed = config_of_original(state, num_attention_heads=4)
    assert (config["sample_size"], config["interpolation_scale"]) == (64, 1.0)
    assert assumed == ["latents of 64 x 64, 32 for each of the 4 fields"] or "64 x 64" in assumed[0]


@torch.no_grad()
def test_a_condition_without_positions_is_one_with_zeros():
    """A published 512 stage was trained so; adding zeros is adding nothing."""
    tensors, case = load("original_transformer_512like")
    state = weights(tensors)
    del state["y_pos_embed"]
    converted = diffusers_from_original(state)
    assert not converted["y_pos_embed.y_pos_embed"].any()
    model = PixCellTransformer2DModel(
        **config_from_original(**(case["config"] | {"use_cond_pos_embed": False}))
    )
    model.load_state_dict(converted, strict=True)


def test_heads_that_are_not_72_wide_must_be_given():
    state = weights(load("original_transformer_256like")[0])
    with pytest.raises(ModelError, match=r"32 wide, .*--heads"):
        config_of_original(state)
    with pytest.raises(ModelError, match="no whole number of 5 heads"):
        config_of_original(state, num_attention_heads=5)
    assert config_of_original(state, num_attention_heads=8)[0]["attention_head_dim"] == 4


def test_unknown_names_survive_the_conversion_so_that_a_check_finds_them():
    assert "blocks.0.attn.rel_pos" in diffusers_from_original({"blocks.0.attn.rel_pos": torch.zeros(3)})


def test_weights_that_are_not_a_denoisers_have_no_original_layout():
    state = diffusers_from_original(weights(load("original_transformer_256like")[0]))
    with pytest.raises(WrongWeights, match="2 tensors are not those of a PixCell denoiser"):
        original_from_diffusers(
            {name: value for name, value in state.items() if name != "proj_out.bias"} | {"x": torch.zeros(1)},
            torch.zeros(1, 16, 32),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "qk_norm True"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 2.0"),
        ({"num_heads": 5}, "no whole number of 5 heads"),
        ({"use_cond_pos_embed": True}, "no position"),
    ],
)
def test_an_original_configuration_that_our_class_does_not_have_is_refused(changes, message):
    config = load("original_transformer_256like")[1]["config"] | changes
    with pytest.raises(ModelError, match=message):
        config_from_original(**config)


def test_the_branch_of_published_shapes_controls_one_block_more():
    manifest_256 = diffusers_from_original(published(256))
    branch = {
        name: value for name, value in manifest_256.items() if not name.startswith("transformer_blocks.27.")
    }
    config, assumed = config_of_controlnet(branch)
    assert (config["num_layers"], config["n_controlnet_blocks"]) == (28, 27)
    assert "28 blocks" in assumed[-1]
