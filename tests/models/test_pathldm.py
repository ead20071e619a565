"""PathLDM's networks give the published numbers, and a checkpoint becomes models or an error."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from golden_vectors import FOLDER, load
from pixcell.errors import ModelError, WrongWeights
from pixcell.models.codec import LatentCodec
from pixcell.models.pathldm import ClassEmbedder, first_stage_from_ldm, unet_from_ldm
from pixcell.models.pathldm_configs import (
    PATHLDM_FIRST_STAGES,
    PATHLDM_UNET,
    first_stage_config_of,
    text_config_of,
    unet_config_of,
)
from pixcell.models.pathldm_layout import from_ldm, split_ldm_checkpoint, to_ldm
from pixcell.models.weights import fit_weights
from tiny_pathldm import tiny_first_stage, tiny_text_tower, tiny_unet

CLOSE = {"rtol": 0, "atol": 1e-4}  # single forward passes in float32; values are of order 1


def filled(model, tensors, prefix):
    """Give a model the weights of a golden case, which are stored as float16 and exact in it."""
    state = {name[len(prefix) :]: value.float() for name, value in tensors.items() if name.startswith(prefix)}
    fit_weights(model, from_ldm(model, state), "the golden case")
    return model.eval()


# ── the U-Net ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def unet_case():
    tensors, about = load("pathldm-unet-tiny")
    return filled(unet_from_ldm(**about["config"]), tensors, "unet."), tensors, about


def predict(unet, tensors, context, rows=slice(None)):
    with torch.no_grad():
        return unet(tensors["in.x"][rows], tensors["in.t"][rows], encoder_hidden_states=context).sample


def test_the_unet_predicts_the_published_noise(unet_case):
    unet, tensors, _ = unet_case
    close = {"rtol": 0, "atol": 2e-4 * tensors["out.eps"].std().item()}  # the tolerance of the case
    one = slice(0, 1)
    torch.testing.assert_close(predict(unet, tensors, tensors["in.context"]), tensors["out.eps"], **close)
    context = tensors["in.context154"]
    torch.testing.assert_close(predict(unet, tensors, context, one), tensors["out.eps154"], **close)
    torch.testing.assert_close(predict(unet, tensors, context[:, :77], one), tensors["out.eps77"], **close)


BLOCKS = {
    "time_embed": "time_embedding",
    "input_blocks.0": "conv_in",
    "input_blocks.1": "down_blocks.0.resnets.0",
    "input_blocks.2": "down_blocks.0.downsamplers.0",
    "input_blocks.3": "down_blocks.1.attentions.0",
    "input_blocks.4": "down_blocks.1.downsamplers.0",
    "input_blocks.5": "down_blocks.2.attentions.0",
    "middle_block": "mid_block",
    "output_blocks.0": "up_blocks.0.attentions.0",
    "output_blocks.1": "up_blocks.0.upsamplers.0",
    "output_blocks.2": "up_blocks.1.attentions.0",
    "output_blocks.3": "up_blocks.1.upsamplers.0",
    "output_blocks.4": "up_blocks.2.resnets.0",
    "output_blocks.5": "up_blocks.2.resnets.1",
}


def test_every_block_of_the_unet_gives_the_published_output(unet_case):
    unet, tensors, _ = unet_case
    seen = {}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    handles = [unet.get_submodule(ours).register_forward_hook(keep(name)) for name, ours in BLOCKS.items()]
    predict(unet, tensors, tensors["in.context"])
    for handle in handles:
        handle.remove()
    assert {f"act.{name}" for name in seen} == {name for name in tensors if name.startswith("act.")}
    for name, output in seen.items():
        published = tensors[f"act.{name}"].float()
        # Stored as float16: 2e-3 of the largest value.
        torch.testing.assert_close(output, published, rtol=2e-3, atol=2e-3 * published.std().item(), msg=name)


def test_time_features_are_the_published_ones(unet_case):
    """Cosines first; whole and fractional times."""
    unet, tensors, _ = unet_case
    for case in ("temb", "temb_frac"):
        torch.testing.assert_close(unet.time_proj(tensors[f"{case}.t"]), tensors[f"{case}.out"], **CLOSE)


def test_the_published_configuration_is_what_is_built(unet_case):
    unet, _, about = unet_case
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in unet.config.items()}
    assert {key: own[key] for key in about["diffusers_config"]} == about["diffusers_config"]


def test_heads_are_as_many_as_ldm_has():
    """The trap: diffusers' argument that is called the width of a head is their number."""
    heads = [module.heads for name, module in tiny_unet().named_modules() if name.endswith("attn2")]
    assert set(heads) == {1}
    heads = [
        module.heads for name, module in tiny_unet(num_heads=4).named_modules() if name.endswith("attn2")
    ]
    assert set(heads) == {4}
    heads = [
        (module.heads, module.inner_dim // module.heads)
        for name, module in tiny_unet(num_heads=-1, num_head_channels=16).named_modules()
        if name.endswith("attn2")
    ]
    assert set(heads) == {(4, 16)}


def test_an_untrained_unet_predicts_nothing():
    """Its last layers start at zero, as published."""
    unet = unet_from_ldm(**(PATHLDM_UNET | {"model_channels": 32, "context_dim": 8, "image_size": 8}))
    with torch.no_grad():
        output = unet(torch.randn(1, 3, 8, 8), torch.tensor([5]), encoder_hidden_states=torch.randn(1, 2, 8))
    assert not output.sample.any()
    assert any(parameter.any() for parameter in unet.parameters())


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_near_to_full(dtype, error):
    """On the average over pixels; a dozen layers at 8 or 11 bits, of the prediction's own spread."""
    unet = tiny_unet()
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    t = torch.tensor([5, 900])
    with torch.no_grad():
        full = unet(x, t, encoder_hidden_states=context).sample
        half = unet.to(dtype)(x.to(dtype), t, encoder_hidden_states=context.to(dtype)).sample
    assert half.dtype == dtype
    assert (half.float() - full).std() < error * full.std()


def test_checkpointing_changes_neither_value_nor_gradient():
    unet = tiny_unet().train()
    x, t, context = torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 7, 16)
    results = []
    for checkpointing in (False, True):
        unet.zero_grad()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        output = unet(x, t, encoder_hidden_states=context).sample
        output.square().mean().backward()
        results.append((output.detach(), {name: p.grad.clone() for name, p in unet.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_scale_shift_norm": True}, "use_scale_shift_norm=True"),
        ({"use_spatial_transformer": False}, "use_spatial_transformer=False"),
        ({"num_classes": 1000}, "num_classes=1000"),
        ({"colour": "blue"}, "colour='blue' \\(not known\\)"),
        ({"model_channels": 48}, "multiple of 32"),
        ({"num_heads": 5}, "5 heads|\\[5, 5\\] heads"),
        ({"num_head_channels": 16}, "one of num_heads and num_head_channels"),
    ],
)
def test_a_network_of_another_kind_is_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        tiny_unet(**changes)


# ── first stages ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def vq_case():
    tensors, about = load("pathldm-vq-tiny")
    return filled(first_stage_from_ldm(**about["config"]), tensors, "vq."), tensors


@torch.no_grad()
def test_the_vq_autoencoder_gives_the_published_numbers(vq_case):
    vq, tensors = vq_case
    latents = vq.encode(tensors["in.image"]).latents
    torch.testing.assert_close(latents, tensors["out.latent"], **CLOSE)
    rows, loss, (_, _, indices) = vq.quantize(latents)
    assert torch.equal(indices.view_as(tensors["out.indices"]), tensors["out.indices"])
    torch.testing.assert_close(rows, tensors["out.quantized"], **CLOSE)
    torch.testing.assert_close(loss.view(1), tensors["out.commit_loss"], rtol=1e-4, atol=0)
    torch.testing.assert_close(vq.decode(latents).sample, tensors["out.reconstruction"], **CLOSE)
    without = vq.decode(latents, force_not_quantize=True).sample
    torch.testing.assert_close(without, tensors["out.reconstruction_no_quant"], **CLOSE)
    arbitrary = vq.decode(tensors["in.latent_arbitrary"]).sample
    torch.testing.assert_close(arbitrary, tensors["out.decoded_arbitrary"], **CLOSE)


def test_a_codec_diffuses_before_the_codebook_and_decodes_behind_it(vq_case):
    vq, tensors = vq_case
    codec = LatentCodec(vq, "vq-f4")
    mean, std = codec.encode(tensors["in.image"] / 2 + 0.5)
    torch.testing.assert_close(codec.normalise(mean), tensors["out.latent"], **CLOSE)
    assert not std.any()
    for latents, pictures in (
        (mean, tensors["out.reconstruction"]),
        (tensors["in.latent_arbitrary"], tensors["out.decoded_arbitrary"]),
    ):
        torch.testing.assert_close(codec.decode(latents), (pictures / 2 + 0.5).clamp(0, 1), **CLOSE)


@torch.no_grad()
def test_the_kl_autoencoder_gives_the_published_numbers():
    tensors, about = load("pathldm-kl-tiny")
    kl = filled(first_stage_from_ldm(**about["config"]), tensors, "vae.")
    posterior = kl.encode(tensors["in.image"]).latent_dist
    torch.testing.assert_close(posterior.parameters, tensors["out.moments"], **CLOSE)
    torch.testing.assert_close(posterior.mean, tensors["out.mean"], **CLOSE)
    torch.testing.assert_close(posterior.logvar, tensors["out.logvar"], **CLOSE)
    torch.testing.assert_close(posterior.kl(), tensors["out.kl"], rtol=1e-4, atol=0)
    sample = posterior.mean + posterior.std * tensors["in.noise"]
    torch.testing.assert_close(sample, tensors["out.sample"], **CLOSE)
    torch.testing.assert_close(kl.decode(posterior.mean).sample, tensors["out.decode_mode"], **CLOSE)
    torch.testing.assert_close(kl.decode(sample).sample, tensors["out.decode_sample"], **CLOSE)
    codec = LatentCodec(kl, "kl-f4")
    mean, std = codec.encode(tensors["in.image"] / 2 + 0.5)
    torch.testing.assert_close(codec.normalise(mean), tensors["out.mean"], **CLOSE)
    torch.testing.assert_close(std, (tensors["out.logvar"] / 2).exp(), **CLOSE)


@torch.no_grad()
def test_attention_of_a_level_is_that_of_ldm():
    """vq-f8 has it; the tiny cases do not. One head over all positions, on 1 x 1 convolutions."""
    stage = tiny_first_stage(attn_resolutions=[8])
    state, x = to_ldm(stage), torch.randn(1, 32, 4, 6, generator=torch.Generator().manual_seed(0))
    for ours, theirs in (("down_blocks.2", "encoder.down.2"), ("up_blocks.0", "decoder.up.2")):
        side = stage.encoder if "down" in ours else stage.decoder
        inside = torch.nn.functional.group_norm(
            x, 32, state[f"{theirs}.attn.0.norm.weight"], state[f"{theirs}.attn.0.norm.bias"], eps=1e-6
        )

        def layer(name, inside, theirs=theirs):
            weight, bias = (state[f"{theirs}.attn.0.{name}.{kind}"] for kind in ("weight", "bias"))
            return torch.nn.functional.conv2d(inside, weight, bias)

        q, k, v = (layer(name, inside).flatten(2) for name in "qkv")
        scores = (q.transpose(1, 2) @ k / 32**0.5).softmax(dim=-1)
        expected = x + layer("proj_out", (v @ scores.transpose(1, 2)).view_as(x))
        torch.testing.assert_close(side.get_submodule(f"{ours}.attentions.0")(x), expected, **CLOSE)


def test_latents_are_not_scaled_unless_asked():
    """diffusers' default would be Stable Diffusion's 0.18215."""
    assert LatentCodec(tiny_first_stage(), "vq").scale == 1
    assert LatentCodec(tiny_first_stage(None), "kl").scale == 1


@pytest.mark.parametrize("name", PATHLDM_FIRST_STAGES)
def test_first_stages_by_name_are_the_published_ones(name):
    published = json.loads((FOLDER / f"manifest_pathldm-first-stage-{name}.json").read_text())["config"]
    assert PATHLDM_FIRST_STAGES[name] == published


@pytest.mark.parametrize(
    ("embed_dim", "n_embed", "changes", "message"),
    [
        (3, 32, {"double_z": True}, "double_z is True and n_embed 32"),
        (3, None, {"double_z": False}, "double_z is False and n_embed None"),
        (4, None, {}, "embed_dim 4 differs from z_channels 3"),
        (3, 32, {"attn_type": "linear"}, "attn_type='linear'"),
        (3, 32, {"ch": 48}, "levels .* wide cannot be built"),
        (3, 32, {"tanh_out": True}, "tanh_out=True"),
    ],
)
def test_an_autoencoder_of_another_kind_is_refused(embed_dim, n_embed, changes, message):
    base = PATHLDM_FIRST_STAGES["vq-f4" if n_embed else "kl-f4"]["ddconfig"]
    with pytest.raises(ModelError, match=message):
        first_stage_from_ldm(embed_dim=embed_dim, n_embed=n_embed, ddconfig=base | changes)


def test_keys_of_the_training_are_no_matter_and_unknown_ones_are():
    config = PATHLDM_FIRST_STAGES["vq-f4"] | {
        "ddconfig": PATHLDM_FIRST_STAGES["vq-f4"]["ddconfig"] | {"ch": 32}
    }
    stage = first_stage_from_ldm(**config, lossconfig={"target": "any"}, monitor="val/rec_loss")
    assert stage.config.num_vq_embeddings == 8192
    with pytest.raises(ModelError, match=r"n_embd=4 \(not known\)"):
        first_stage_from_ldm(**config, n_embd=4)
    with pytest.raises(ModelError, match="remap='rows'"):
        first_stage_from_ldm(**config, remap="rows")


def test_an_incomplete_configuration_says_what_it_lacks():
    config = PATHLDM_FIRST_STAGES["vq-f4"]["ddconfig"]
    short = {key: value for key, value in config.items() if key not in ("ch_mult", "z_channels")}
    with pytest.raises(ModelError, match="lacks ch_mult, z_channels"):
        first_stage_from_ldm(embed_dim=3, n_embed=8, ddconfig=short)


# ── classes ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_class_is_one_token():
    embedder = ClassEmbedder(5, 8)
    tokens = embedder(torch.tensor([0, 4, 0]))
    assert tokens.shape == (3, 1, 8)
    assert torch.equal(tokens[:, 0], embedder.embedding.weight[[0, 4, 0]])
    assert embedder.unconditional_label == 4


def test_a_class_that_does_not_exist_is_refused():
    with pytest.raises(ModelError, match="0 to 4"):
        ClassEmbedder(5, 8)(torch.tensor([1, 5]))


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────


def test_configurations_are_read_off_the_shapes_of_published_weights():
    for part, reader in (
        ("unet", unet_config_of),
        *((f"first-stage-{name}", first_stage_config_of) for name in PATHLDM_FIRST_STAGES),
    ):
        published = json.loads((FOLDER / f"manifest_pathldm-{part}.json").read_text())
        state = {
            name.removeprefix("model.diffusion_model.").removeprefix("first_stage_model."): torch.empty(
                shape, device="meta"
            )
            for name, shape in published["parameters"].items()
        }
        read = reader(state)
        for config in (read, published["config"]):
            config["attention_resolutions"] = sorted(config.get("attention_resolutions", []))
        assert read == published["config"]
    published = json.loads((FOLDER / "manifest_pathldm-text-encoder.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in published["parameters"].items()}
    read = text_config_of(state)
    assert {key: read[key] for key in published["config"] if key in read} == {
        key: value for key, value in published["config"].items() if key in read
    }
    assert (read["num_attention_heads"], read["bos_token_id"], read["eos_token_id"]) == (8, 49406, 49407)


def test_the_published_unet_is_the_default():
    published = json.loads((FOLDER / "manifest_pathldm-unet.json").read_text())["config"]
    assert published == PATHLDM_UNET


@pytest.fixture
def checkpoint():
    """A checkpoint as the published training writes it, and the models it was made of."""
    parts = {"unet": tiny_unet(), "first_stage": tiny_first_stage(), "text_encoder": tiny_text_tower()}
    prefixes = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.")
    state = {
        prefix + name: value
        for prefix, model in zip(prefixes, parts.values(), strict=True)
        for name, value in to_ldm(model).items()
    }
    return state, parts


def rebuilt(part, state):
    """Build and fill a model from nothing but the tensors of its part."""
    from transformers import CLIPTextConfig, CLIPTextModel

    if part == "unet":
        model = unet_from_ldm(**unet_config_of(state, image_size=8))
    elif part == "first_stage":
        model = first_stage_from_ldm(**first_stage_config_of(state, resolution=32))
    else:
        model = CLIPTextModel(CLIPTextConfig(**text_config_of(state, num_heads=2)))
    fit_weights(model, from_ldm(model, state), "the checkpoint")
    return model.eval()


def test_a_checkpoint_becomes_its_models_again(checkpoint):
    """No configuration comes with a released file: shapes are enough."""
    state, parts = checkpoint
    split = split_ldm_checkpoint(state)
    again = {part: rebuilt(part, getattr(split, part)) for part in parts}
    for part in ("unet", "first_stage"):
        assert dict(again[part].config) == dict(parts[part].config)
    x, t, context, ids = (
        torch.randn(1, 3, 8, 8),
        torch.tensor([5]),
        torch.randn(1, 7, 16),
        torch.tensor([[1, 2, 3]]),
    )
    with torch.no_grad():
        for models in (parts, again):
            models["outputs"] = [
                models["unet"](x, t, encoder_hidden_states=context).sample,
                models["first_stage"].decode(x).sample,
                models["text_encoder"](ids).last_hidden_state,
            ]
    for ours, theirs in zip(again["outputs"], parts["outputs"], strict=True):
        assert torch.equal(ours, theirs)


def test_a_unet_that_lacks_a_tensor_is_refused(checkpoint):
    unet = split_ldm_checkpoint(checkpoint[0]).unet
    unet.pop("middle_block.0.in_layers.0.bias")
    with pytest.raises(WrongWeights, match=r"1 tensors missing \(mid_block\.resnets\.0\.norm1\.bias"):
        rebuilt("unet", unet)


@pytest.mark.parametrize(
    ("reader", "message"),
    [(unet_config_of, "cross-attention"), (first_stage_config_of, "autoencoder"), (text_config_of, "CLIP")],
)
def test_weights_of_something_else_have_no_configuration(reader, message):
    with pytest.raises(WrongWeights, match=message):
        reader({"input_blocks.0.0.weight": torch.zeros(32, 3, 3, 3)})


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
def test_a_first_stage_saved_and_loaded_is_itself(kind, tmp_path):
    model = tiny_first_stage(32 if kind is VQModel else None)
    model.save_pretrained(tmp_path / "vae")
    codec = LatentCodec.from_pretrained(tmp_path / "vae")
    assert isinstance(codec.vae, kind)
    assert codec.made_by() == LatentCodec(model, "vae").made_by()
