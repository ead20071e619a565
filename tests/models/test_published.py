"""Whatever a published file calls itself, its tensors say what it is; and all of them are used."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from golden_vectors import FOLDER, load, weights
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.adapters import add_lora, lora_state, merge_lora
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.encoders import ENCODERS
from pixcell.models.pathldm import ClassEmbedder
from pixcell.models.pathldm_layout import to_ldm
from pixcell.models.published import KINDS, load_model, load_published, open_published, recognise
from pixcell.models.published_configs import config_of_autoencoder, config_of_controlnet, uni_arguments
from pixcell.models.published_layouts import original_from_diffusers
from pixcell.models.published_sources import PUBLISHED_WEIGHTS, find_source
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.models.translator import EmbeddingTranslator
from tiny_models import awake, tiny_transformer, tiny_vae
from tiny_pathldm import tiny_text_tower, tiny_unet

TINY_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "force_upcast": True,
    "sample_size": 1024,
}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def transformer():
    return tiny_transformer()


@pytest.fixture
def original(transformer):
    """The same denoiser in the original layout."""
    return original_from_diffusers(transformer.state_dict(), transformer.pos_embed.pos_embed)


# ── every kind, from the file that is published ──────────────────────────────────────────────────────


def test_a_denoiser_folder_is_loaded_by_its_tensors_whatever_its_class_is_called(transformer, tmp_path):
    """Published control pipelines call the same weights PixCellTransformer2DModelControlNet."""
    transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    legacy = {
        "double_self_attention": False,
        "num_vector_embeds": None,
        "_name_or_path": "pixart_256/transformer",
    }
    config |= legacy | {"_class_name": "PixCellTransformer2DModelControlNet"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pixcell_transformer_2d.py").write_text("raise SystemExit('the folder was run')")
    published = open_published(tmp_path)
    assert published.kind == "pixcell"
    assert not published.notes
    assert same(published.load()["transformer"], transformer)


def test_a_denoiser_in_shards_is_the_same(transformer, tmp_path):
    transformer.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert same(load_published(tmp_path)["transformer"], transformer)


def test_a_single_file_needs_no_configuration(transformer, tmp_path):
    """What shapes do not tell is said."""
    save_file(transformer.state_dict(), tmp_path / "weights.safetensors")
    published = open_published(
        tmp_path / "weights.safetensors",
        num_attention_heads=2,
        config={"sample_size": 16, "interpolation_scale": 0.25},
    )
    assert "latents of 64 x 64" in published.notes[0]
    model = published.load()["transformer"]
    assert same(model, transformer)
    assert {key: model.config[key] for key in transformer.config if key != "_use_default_values"} == {
        key: value for key, value in transformer.config.items() if key != "_use_default_values"
    }


@pytest.mark.parametrize(("which", "shift"), [("auto", 1.0), ("ema", 1.0), ("raw", 0.0)])
def test_the_original_layout_is_loaded_trained_or_averaged(transformer, original, tmp_path, which, shift):
    averaged = {
        name: value + 1.0 if name == "final_layer.linear.bias" else value for name, value in original.items()
    }
    content = {"state_dict": original, "state_dict_ema": averaged, "optimizer": {"state": {}}, "epoch": 4}
    torch.save(content, tmp_path / "epoch_4.pth")
    published = open_published(tmp_path / "epoch_4.pth", which=which, num_attention_heads=2)
    assert published.kind == "pixcell-original"
    model = published.load()["transformer"]
    assert torch.equal(model.proj_out.bias, transformer.proj_out.bias + shift)
    with torch.no_grad():
        model.proj_out.bias -= shift
        sample = [m(torch.ones(1, 4, 16, 16), 500, torch.ones(1, 4, 12)).sample for m in (model, transformer)]
    torch.testing.assert_close(*sample, rtol=0, atol=1e-5)


def test_the_original_layout_in_half_precision_is_loaded_as_it_is_or_as_asked(original, tmp_path):
    torch.save({name: value.half() for name, value in original.items()}, tmp_path / "half.ckpt")
    published = open_published(tmp_path / "half.ckpt", num_attention_heads=2)
    assert published.load(None)["transformer"].dtype is torch.float16
    assert published.load()["transformer"].dtype is torch.float32
    assert published.load(torch.bfloat16)["transformer"].dtype is torch.bfloat16


@pytest.mark.parametrize("entry", [{"num_layers": "two"}, {"in_channels": None}, {"activation_fn": "x"}])
def test_a_configuration_with_values_of_another_kind_is_refused(transformer, tmp_path, entry):
    transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no model can be built"):
        load_published(tmp_path)


@pytest.mark.parametrize("shape", [(), (0, 0, 0, 0), (3, 3)])
def test_known_names_with_shapes_of_nothing_are_refused(original, tmp_path, shape):
    torch.save({name: torch.zeros(shape) for name in original}, tmp_path / "x.ckpt")
    with pytest.raises(WrongWeights):
        load_published(tmp_path / "x.ckpt", num_attention_heads=1)


def test_a_position_table_that_is_not_the_models_is_refused(original, tmp_path):
    """It would not be loaded, and pictures would be garbage without a word."""
    save_file(
        original | {"pos_embed": original["pos_embed"].roll(1, 1).contiguous()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(WrongWeights, match="position"):
        open_published(tmp_path / "x.safetensors", num_attention_heads=2).load()


def test_the_control_branch_is_loaded(transformer, tmp_path):
    branch = awake(PixCellControlNetModel.from_transformer(transformer, control_positions=True))
    branch.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"_class_name": "PixCellControlNet"}
    del config["control_positions"]  # as published
    (tmp_path / "config.json").write_text(json.dumps(config))
    published = open_published(tmp_path)
    assert published.kind == "controlnet"
    model = published.load()["controlnet"]
    assert same(model, branch)
    assert model.config.control_positions is True


def test_a_branch_without_configuration_controls_one_block_more(transformer, tmp_path):
    branch = PixCellControlNetModel.from_transformer(transformer)
    save_file(branch.state_dict(), tmp_path / "branch.safetensors")
    published = open_published(tmp_path / "branch.safetensors", num_attention_heads=2)
    assert (published.load()["controlnet"].config.num_layers, len(branch.transformer_blocks)) == (2, 1)


@pytest.fixture
def adapted(transformer):
    add_lora(transformer, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, value in lora_state(transformer).items():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    return transformer


def test_a_whole_denoiser_with_adapters_in_it_is_loaded(adapted, tmp_path):
    torch.save(adapted.state_dict(), tmp_path / "mist_her2_lora.pth")
    published = open_published(
        tmp_path / "mist_her2_lora.pth",
        num_attention_heads=2,
        config={"sample_size": 16, "interpolation_scale": 0.25},
    )
    assert published.kind == "lora"
    assert same(published.load()["transformer"], adapted)


def test_adapters_alone_are_added_to_their_denoiser(adapted, tmp_path):
    torch.save(lora_state(adapted), tmp_path / "adapter.pth")
    with pytest.raises(MissingWeights, match="--base"):
        open_published(tmp_path / "adapter.pth")
    published = open_published(tmp_path / "adapter.pth", base=tiny_transformer())
    assert published.kind == "lora-adapter"
    assert same(published.load()["transformer"], adapted)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "adapters alone"])
@pytest.mark.parametrize("told", [True, False], ids=["in the file", "given"])
def test_how_much_adapters_count_is_read_from_the_file_or_given(adapted, tmp_path, whole, told):
    """Their tensors do not tell; alpha is 8 here, and the rank 4."""
    state = adapted.state_dict() if whole else lora_state(adapted)
    notes = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 8})} if told else None
    save_file(state, tmp_path / "lora.safetensors", notes)
    config = {} if told else {"lora_alpha": 8}
    if whole:
        config |= {"sample_size": 16, "interpolation_scale": 0.25}
    options = {"num_attention_heads": 2} if whole else {"base": tiny_transformer()}
    model = open_published(tmp_path / "lora.safetensors", config=config, **options).load()["transformer"]
    assert model.peft_config["default"].lora_alpha == 8
    assert same(model, adapted)


def test_entries_that_would_change_nothing_are_refused(adapted, transformer, tmp_path):
    torch.save(lora_state(adapted), tmp_path / "adapter.pth")
    with pytest.raises(ModelError, match=r"alpha cannot be set for adapters; what can is lora_alpha"):
        open_published(tmp_path / "adapter.pth", base=tiny_transformer(), config={"alpha": 8})
    translator = EmbeddingTranslator(6, 4, 4, 4, 6, 1)
    torch.save(translator.state_dict(), tmp_path / "mlp.pth")
    with pytest.raises(ModelError, match="names and shapes tell all of it"):
        open_published(tmp_path / "mlp.pth", config={"dropout": 0.1})
    torch.save({f"model.diffusion_model.{k}": v for k, v in to_ldm(tiny_unet()).items()}, tmp_path / "l.ckpt")
    with pytest.raises(ModelError, match="scale_factor cannot be set for a PathLDM checkpoint"):
        open_published(tmp_path / "l.ckpt", config={"scale_factor": 0.18215})
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="is a pipeline, whose parts have configurations"):
        open_published(tmp_path / "pipeline", config={"sample_size": 32})


@torch.no_grad()
def test_heads_of_a_text_tower_are_64_wide_or_given(tmp_path):
    tower, ids = tiny_text_tower(), torch.tensor([[1, 2, 3]])
    state = {f"cond_stage_model.transformer.{name}": value for name, value in to_ldm(tower).items()}
    torch.save({"state_dict": state}, tmp_path / "ldm.ckpt")
    with pytest.raises(ModelError, match="16 wide, no whole number of heads 64 wide"):
        open_published(tmp_path / "ldm.ckpt")
    published = open_published(tmp_path / "ldm.ckpt", config={"text_num_attention_heads": 2})
    loaded = published.load()["text_encoder"]
    assert torch.equal(loaded(ids).last_hidden_state, tower(ids).last_hidden_state)


def test_merged_adapters_are_a_denoiser_again(adapted, tmp_path):
    merge_lora(adapted)
    save_file(adapted.state_dict(), tmp_path / "merged.safetensors")
    assert recognise(load_file(tmp_path / "merged.safetensors")) == "pixcell"


def test_the_translator_is_loaded_from_its_flat_state(tmp_path):
    tensors, case = load("flow_mlp")
    torch.save(weights(tensors), tmp_path / "mist_her2_mlp.pth")
    published = open_published(tmp_path / "mist_her2_mlp.pth")
    assert published.kind == "translator"
    model = published.load()["translator"]
    assert isinstance(model, EmbeddingTranslator)
    assert {key: model.config[key] for key in case["config"]} == case["config"]


def test_uni2h_is_loaded_from_its_pickle(tmp_path):
    tensors, _ = load("uni_tiny_vit")
    torch.save(weights(tensors), tmp_path / "pytorch_model.bin")
    published = open_published(tmp_path / "pytorch_model.bin", num_attention_heads=2)
    assert published.kind == "uni2-h"
    state = published.load()["encoder"].state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights(tensors).items())


@pytest.mark.parametrize("with_config", [True, False])
def test_the_autoencoder_is_loaded_with_its_scale(tmp_path, with_config):
    torch.manual_seed(0)
    vae = AutoencoderKL(**TINY_VAE)
    vae.save_pretrained(tmp_path)
    if not with_config:
        (tmp_path / "config.json").unlink()
    published = open_published(tmp_path)
    assert published.kind == "autoencoder"
    assert bool(published.notes) != with_config
    loaded = published.load()["vae"]
    assert same(loaded, vae)
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (1.5305, 0.0609)
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.encode(pixels).latent_dist.mean, vae.eval().encode(pixels).latent_dist.mean)


def test_an_autoencoder_whose_scale_nothing_tells_is_refused(tmp_path):
    vae = AutoencoderKL(**TINY_VAE | {"latent_channels": 4})
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(ModelError, match="how its latents are scaled"):
        open_published(tmp_path / "vae.safetensors")
    given = open_published(tmp_path / "vae.safetensors", config={"scaling_factor": 0.18215})
    assert given.load()["vae"].config.scaling_factor == 0.18215


@pytest.mark.parametrize(("which", "shift"), [("auto", 1.0), ("ema", 1.0), ("raw", 0.0)])
def test_averages_inside_an_ldm_checkpoint_are_taken_if_there_are_any(tmp_path, which, shift):
    unet = to_ldm(tiny_unet())
    state = {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    state |= {f"model_ema.diffusion_model{name.replace('.', '')}": value + 1 for name, value in unet.items()}
    torch.save({"state_dict": state}, tmp_path / "ldm.ckpt")
    model = load_published(tmp_path / "ldm.ckpt", which=which)["unet"]
    assert torch.equal(model.conv_out.bias, tiny_unet().conv_out.bias + shift)


# ── names and shapes of the published files, at full size ────────────────────────────────────────────


def manifest(name, prefix="", block="transformer_blocks"):
    about = json.loads((FOLDER / f"manifest_{name}.json").read_text())
    shapes = about.get("tensors") or about.get("parameters") or dict(about["others"])
    for number in range(about.get("num_blocks", 0)):
        shapes |= {f"{block}.{number}.{key}": shape for key, shape in about["block"].items()}
    return {prefix + key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, about


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("pixcell_256", "transformer_blocks", "pixcell"),
        ("pixcell_1024", "transformer_blocks", "pixcell"),
        ("pixcell_controlnet", "transformer_blocks", "controlnet"),
        ("staining_lora", "transformer_blocks", "lora"),
        ("staining_translator", "res_blocks", "translator"),
        ("uni2h", "", "uni2-h"),
        ("sd35_vae", "", "autoencoder"),
        ("pathldm-unet", "", "pathldm"),
        ("pathldm-first-stage-vq-f4", "", "pathldm"),
        ("pathldm-first-stage-kl-f8", "", "pathldm"),
        ("pathldm-text-encoder", "", "text-encoder"),
    ],
)
def test_published_names_are_recognised(name, block, kind):
    state, about = manifest(name, block=block)
    assert len(state) == about.get("num_tensors", len(state))
    assert recognise(state) == kind
    if kind == "lora":
        assert recognise({key for key in state if ".lora_" in key}) == "lora-adapter"
    if kind == "text-encoder":
        assert recognise({f"cond_stage_model.transformer.{key}" for key in state}) == "pathldm"


def test_the_published_encoder_is_told_by_its_shapes():
    state, _ = manifest("uni2h")
    arguments, _ = uni_arguments(state, ENCODERS["uni2-h"].arguments)
    assert arguments == ENCODERS["uni2-h"].arguments


def test_the_published_autoencoder_is_told_by_its_shapes():
    state, about = manifest("sd35_vae")
    config, assumed = config_of_autoencoder(state)
    assert config == {key: about["config"][key] for key in config}
    assert "Stable Diffusion 3" in assumed[0]
    with torch.device("meta"):
        model = AutoencoderKL(**config)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }


def test_the_published_branch_is_told_by_its_shapes():
    state, about = manifest("pixcell_controlnet")
    config, _ = config_of_controlnet(state)
    assert config == {key: about["config"][key] for key in config}


# ── pipelines ────────────────────────────────────────────────────────────────────────────────────────


def published_pipeline(folder, transformer, vae_weights=True):
    """A folder as the published ones are: custom classes in the index, code beside the weights."""
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKL(**TINY_VAE | {"latent_channels": 4}).save_pretrained(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "DPMSolverMultistepScheduler"}'
    )
    index = {
        "_class_name": "PixCellPipeline",
        "transformer": ["pixcell_transformer_2d", "PixCellTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "pixcell_transformer_2d.py").write_text("raise SystemExit('run')")
    if not vae_weights:
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def test_a_published_pipeline_is_its_parts(transformer, tmp_path):
    published = open_published(published_pipeline(tmp_path, transformer))
    assert published.kind == "pipeline"
    parts = published.load()
    assert set(parts) == {"transformer", "vae"}
    assert same(parts["transformer"], transformer)


def test_an_autoencoder_that_is_kept_elsewhere_is_told(transformer, tmp_path):
    published = open_published(published_pipeline(tmp_path, transformer, vae_weights=False))
    assert set(published.parts) == {"transformer"}
    assert published.notes == ("vae/ has a configuration and no weights",)


def test_a_part_that_is_missing_is_named(transformer, tmp_path):
    shutil.rmtree(published_pipeline(tmp_path, transformer) / "vae")
    with pytest.raises(MissingWeights, match="names vae"):
        open_published(tmp_path)


# ── what does not fit ────────────────────────────────────────────────────────────────────────────────


def test_weights_of_no_known_model_are_refused_with_their_names(tmp_path):
    save_file({"down.weight": torch.zeros(1), "up.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(WrongWeights, match=r"2 tensors of no model .*down\.weight, up\.weight.*--as"):
        open_published(tmp_path / "x.safetensors")


def test_a_kind_can_be_said_but_must_be_known(transformer, tmp_path):
    save_file(transformer.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"Choose one of {', '.join(KINDS)}"):
        open_published(tmp_path / "x.safetensors", kind="dit")
    with pytest.raises(WrongWeights, match="translator"):
        open_published(tmp_path / "x.safetensors", kind="translator").load()


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(original, tmp_path):
    del original["blocks.1.attn.qkv.bias"], original["t_block.1.bias"]
    original |= {"blocks.0.norm.weight": torch.zeros(3), "final_layer.linear.bias": torch.zeros(5)}
    save_file(original, tmp_path / "x.safetensors")
    with pytest.raises(WrongWeights) as caught:
        load_published(tmp_path / "x.safetensors", num_attention_heads=2)
    message = str(caught.value)
    for part in (
        "4 tensors missing",
        "transformer_blocks.1.attn1.to_v.bias",
        "adaln_single.linear.bias",
        "1 tensors unexpected (blocks.0.norm.weight)",
        "proj_out.bias (5,) instead of (32,)",
    ):
        assert part in message


def test_a_configuration_with_an_unknown_setting_is_refused(transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"qk_norm": "rms"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="sets qk_norm to rms"):
        open_published(tmp_path)


def test_a_configuration_of_another_size_is_refused(transformer, tmp_path):
    transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WrongWeights, match=r"missing \(transformer_blocks\.2\."):
        load_published(tmp_path)
    with pytest.raises(WrongWeights, match=r"missing \(transformer_blocks\.2\."):
        load_model(PixCellTransformer2DModel, tmp_path)


def test_a_model_folder_without_configuration_is_refused_where_it_is_needed(transformer, tmp_path):
    save_file(transformer.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(MissingWeights, match=r"no config\.json"):
        load_model(PixCellTransformer2DModel, tmp_path)


# ── where weights are looked for ─────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_hub(monkeypatch):
    """A hub whose cache is empty, and which must not be asked."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def snapshot_download(repository, **options):
        asked.append(
            (repository, options["allow_patterns"], options["local_files_only"], options["revision"])
        )
        raise LocalEntryNotFoundError("nothing here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("name", sorted(PUBLISHED_WEIGHTS))
def test_nothing_is_downloaded_unasked(no_hub, name):
    with pytest.raises(MissingWeights, match="downloading was not asked for"):
        find_source(name)
    assert no_hub == [(PUBLISHED_WEIGHTS[name].repository, no_hub[0][1], True, None)]
    assert not any(pattern.endswith(".py") for pattern in no_hub[0][1])


def test_a_place_on_the_hub_may_name_a_file_and_a_revision(no_hub):
    with pytest.raises(MissingWeights):
        find_source("owner/name/ckpts/a.pth@v2", download=True)
    assert no_hub == [("owner/name", ["ckpts/a.pth"], False, "v2")]


@pytest.mark.parametrize("path", ["no-such", "./no/such", "/no/such", "models/pixcell_256.ckpt", "../x/y"])
def test_a_path_with_nothing_there_is_not_taken_for_the_hub(no_hub, path):
    with pytest.raises(MissingWeights, match="neither a file, a folder"):
        find_source(path)
    assert not no_hub


def test_what_comes_from_the_hub_knows_its_licence(monkeypatch, transformer, tmp_path):
    import huggingface_hub

    published_pipeline(tmp_path, transformer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    published = open_published("pixcell-256")
    assert published.origin.repository == "StonyBrook-CVLab/PixCell-256"
    assert published.origin.licence == "Apache-2.0"


# ── a folder that was saved ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (PixCellTransformer2DModel, tiny_transformer),
        (PixCellControlNetModel, lambda: PixCellControlNetModel.from_transformer(tiny_transformer())),
        (EmbeddingTranslator, lambda: EmbeddingTranslator(12, 8, 8, 8, 12, 1)),
        (ClassEmbedder, lambda: ClassEmbedder(5, 8)),
        (TissueAutoencoder, tiny_vae),
    ],
)
def test_a_model_that_is_saved_opens_and_is_saved_to_the_same_bytes(kind, make, tmp_path):
    make().save_pretrained(tmp_path / "a")
    kind.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    load_model(kind, tmp_path / "a").save_pretrained(tmp_path / "c")
    for other in ("b", "c"):
        for file in (tmp_path / "a").iterdir():
            assert (tmp_path / other / file.name).read_bytes() == file.read_bytes()
