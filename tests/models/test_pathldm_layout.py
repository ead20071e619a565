"""A latent-diffusion checkpoint is renamed whole: every tensor finds its place, none is lost."""

import json

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from golden_vectors import FOLDER
from pixcell.errors import WrongWeights
from pixcell.models.pathldm import first_stage_from_ldm, unet_from_ldm
from pixcell.models.pathldm_layout import from_ldm, ldm_names, split_ldm_checkpoint, to_ldm
from pixcell.models.weights import fit_weights
from tiny_pathldm import tiny_first_stage, tiny_text_tower, tiny_unet

FIRST_STAGES = ["vq-f4", "vq-f8", "kl-f4", "kl-f8"]


def manifest(name):
    return json.loads((FOLDER / f"manifest_pathldm-{name}.json").read_text())


def shapes(state):
    return {name: list(value.shape) for name, value in state.items()}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def full_size(part):
    """Build a part of a published model without its values."""
    config = manifest(part)["config"]
    with torch.device("meta"):
        return unet_from_ldm(**config) if part == "unet" else first_stage_from_ldm(**config)


PARTS = ["unet", *(f"first-stage-{name}" for name in FIRST_STAGES)]
PREFIX = {"unet": "model.diffusion_model."} | dict.fromkeys(PARTS[1:], "first_stage_model.")


@pytest.mark.parametrize("part", PARTS)
def test_full_size_models_have_exactly_the_tensors_of_published_checkpoints(part):
    model, published = full_size(part), manifest(part)
    assert shapes(prefixed(PREFIX[part], to_ldm(model))) == published["parameters"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published["parameter_count"]


@pytest.mark.parametrize("part", PARTS)
def test_every_tensor_comes_from_where_the_published_key_map_says(part):
    model, published = full_size(part), manifest(f"{part}-diffusers")
    assert type(model).__name__ == published["model_class"]
    names = {name: PREFIX[part] + ldm for name, ldm in ldm_names(model).items()}
    assert names == {name: entry["from"] for name, entry in published["parameters"].items()}
    assert shapes(model.state_dict()) == {
        name: entry["shape"] for name, entry in published["parameters"].items()
    }
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}
    assert {key: own[key] for key in published["config"]} == published["config"]


def test_the_full_size_text_tower_has_exactly_the_tensors_of_published_checkpoints():
    from transformers import CLIPTextConfig, CLIPTextModel

    published = manifest("text-encoder")
    with torch.device("meta"):
        tower = CLIPTextModel(CLIPTextConfig(**published["config"]))
    assert shapes(to_ldm(tower)) == published["parameters"]
    assert sum(parameter.numel() for parameter in tower.parameters()) == published["parameter_count"]


MODELS = {
    "unet": tiny_unet,
    "wide unet": lambda: tiny_unet(num_res_blocks=2, channel_mult=[1, 2, 2], attention_resolutions=[1, 4]),
    "deep transformers": lambda: tiny_unet(transformer_depth=2),
    "vq": tiny_first_stage,
    "kl": lambda: tiny_first_stage(None),
    "attention on two levels": lambda: tiny_first_stage(ch_mult=[1, 2, 1], attn_resolutions=[8, 32]),
    "text": tiny_text_tower,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_to_ldm_and_back_is_the_same_model(make):
    model = make()
    back = from_ldm(model, to_ldm(model))
    own = model.state_dict()
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)


@pytest.mark.parametrize("make", [tiny_unet, MODELS["wide unet"]])
def test_names_are_those_of_diffusers_own_converter(make):
    model = make()
    theirs = convert_ldm_unet_checkpoint(prefixed("model.diffusion_model.", to_ldm(model)), model.config)
    own = model.state_dict()
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in own)


def test_names_of_an_autoencoder_are_those_of_diffusers_own_converter():
    model = tiny_first_stage(None)
    theirs = convert_ldm_vae_checkpoint(prefixed("first_stage_model.", to_ldm(model)), model.config)
    own = model.state_dict()
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in own)


def test_what_the_model_does_not_have_is_named_not_dropped():
    model = tiny_unet()
    state = to_ldm(model) | {"input_blocks.99.0.op.bias": torch.zeros(1)}
    state.pop("time_embed.0.bias")
    with pytest.raises(WrongWeights, match=r"time_embedding\.linear_1\.bias(.|\n)*input_blocks\.99"):
        fit_weights(model, from_ldm(model, state), "a.ckpt")


def test_a_module_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="Linear"):
        ldm_names(torch.nn.Linear(1, 1))


# ── whole checkpoints ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole():
    """A checkpoint with everything a training may leave in it."""
    buffers = {name: torch.zeros(1000) for name in manifest("buffers")["buffers"]}
    return (
        prefixed("model.diffusion_model.", to_ldm(tiny_unet()))
        | prefixed("first_stage_model.", to_ldm(tiny_first_stage()))
        | prefixed("cond_stage_model.transformer.", to_ldm(tiny_text_tower()))
        | buffers
        | {
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
            "inception.fc.weight": torch.zeros(2),
            "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2),
            "scale_factor": torch.tensor(0.5),
        }
    )


def test_a_checkpoint_falls_into_its_parts(whole):
    parts = split_ldm_checkpoint(whole)
    for part, model in (
        (parts.unet, tiny_unet()),
        (parts.first_stage, tiny_first_stage()),
        (parts.text_encoder, tiny_text_tower()),
    ):
        assert shapes(part) == shapes(to_ldm(model))
    assert (parts.scale_factor, parts.has_ema, parts.class_embedding) == (0.5, False, None)
    assert parts.betas is not None
    assert len(parts.ignored) == 4


def test_a_name_of_no_part_is_refused(whole):
    with pytest.raises(WrongWeights, match=r"1 tensors .* \(control_model\.weight\)"):
        split_ldm_checkpoint(whole | {"control_model.weight": torch.zeros(1)})


def test_a_file_of_something_else_is_refused():
    with pytest.raises(WrongWeights, match=r"blocks\.0\.attn"):
        split_ldm_checkpoint({"blocks.0.attn.qkv.weight": torch.zeros(1)})
    with pytest.raises(WrongWeights, match="neither a U-Net"):
        split_ldm_checkpoint({"betas": torch.zeros(1000)})


def test_parts_saved_alone_need_no_prefix():
    unet, stage = to_ldm(tiny_unet()), to_ldm(tiny_first_stage())
    assert shapes(split_ldm_checkpoint(unet).unet) == shapes(unet)
    alone = split_ldm_checkpoint(stage | {"loss.logvar": torch.zeros(1)})
    assert shapes(alone.first_stage) == shapes(stage)
    assert not alone.unet


def test_running_averages_are_taken_where_asked_for():
    unet = to_ldm(tiny_unet())
    named = prefixed("model.diffusion_model.", unet)
    averages = {
        f"model_ema.diffusion_model{name.replace('.', '')}": value + 1 for name, value in unet.items()
    }
    both = (
        named | averages | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}
    )
    name = "time_embed.0.bias"
    assert torch.equal(split_ldm_checkpoint(both, ema=True).unet[name], unet[name] + 1)
    assert torch.equal(split_ldm_checkpoint(both).unet[name], unet[name])
    assert [split_ldm_checkpoint(state).has_ema for state in (both, named)] == [True, False]
    with pytest.raises(WrongWeights, match="averages"):
        split_ldm_checkpoint(named, ema=True)
    both.pop("model_ema.diffusion_modeltime_embed0bias")
    with pytest.raises(WrongWeights, match="1 of"):
        split_ldm_checkpoint(both, ema=True)
