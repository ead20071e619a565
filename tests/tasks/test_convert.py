"""Converting is a copy into another form: every number arrives, whole or not at all."""

import json
import shutil
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from golden_vectors import load, weights
from pixcell.cli import app
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.schedulers import make_scheduler
from pixcell.diffusion.staining import VirtualStainingPipeline
from pixcell.diffusion.text_pipeline import TextPipeline
from pixcell.errors import MissingWeights, ModelError, OutputError, WrongWeights
from pixcell.files import sha256_of
from pixcell.models.adapters import add_lora, load_lora, lora_state
from pixcell.models.codec import LatentCodec
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.encoders import ENCODERS, load_encoder
from pixcell.models.pathldm_layout import to_ldm
from pixcell.models.published_layouts import original_from_diffusers
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.models.translator import EmbeddingTranslator
from pixcell.tasks.convert import convert
from tiny_models import awake, tiny_transformer, tiny_vae
from tiny_pathldm import tiny_first_stage, tiny_text_tower, tiny_tokenizer, tiny_unet

# What no shape of the tiny denoiser tells.
TINY = {"heads": 2, "config": {"sample_size": 16, "interpolation_scale": 0.25}}


def files(folder):
    return {
        file.relative_to(folder).as_posix(): sha256_of(file) for file in folder.rglob("*") if file.is_file()
    }


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ── a source of each kind, and what opens the result ─────────────────────────────────────────────────


def original_checkpoint(folder):
    model = tiny_transformer()
    state = original_from_diffusers(model.state_dict(), model.pos_embed.pos_embed)
    torch.save({"state_dict": state, "state_dict_ema": state, "epoch": 2}, folder / "pixcell.ckpt")
    return folder / "pixcell.ckpt", TINY


def denoiser_folder(folder):
    tiny_transformer().save_pretrained(folder / "denoiser")
    return folder / "denoiser", {}


def branch_folder(folder):
    awake(PixCellControlNetModel.from_transformer(tiny_transformer())).save_pretrained(folder / "branch")
    return folder / "branch", {}


def translator_file(folder):
    torch.save(weights(load("flow_mlp")[0]), folder / "mist_her2_mlp.pth")
    return folder / "mist_her2_mlp.pth", {}


def encoder_file(folder):
    torch.save(weights(load("uni_tiny_vit")[0]), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin", {"heads": 2}


def autoencoder_folder(folder):
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(32,), scaling_factor=1.5).save_pretrained(folder / "vae")
    return folder / "vae", {}


def adapted_file(folder):
    torch.save(adapted_transformer().state_dict(), folder / "mist_her2_lora.pth")
    return folder / "mist_her2_lora.pth", TINY


def pipeline_folder(folder):
    """As published: custom classes, code beside the weights, no facts."""
    place = folder / "pipeline"
    tiny_transformer().save_pretrained(place / "transformer")
    tiny_vae().save_pretrained(place / "vae")
    (place / "scheduler").mkdir()
    scheduler = {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear", "beta_end": 0.02}
    (place / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "PixCellPipeline",
        "transformer": ["pixcell_transformer_2d", "PixCellTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    }
    (place / "model_index.json").write_text(json.dumps(index))
    (place / "transformer" / "pixcell_transformer_2d.py").write_text("raise SystemExit('run')")
    return place, {}


def staining_folder(folder):
    pipeline = VirtualStainingPipeline(
        adapted_transformer(),
        tiny_vae(),
        make_scheduler(),
        awake(EmbeddingTranslator(12, 8, 8, 8, 12, 1)),
        facts={"stain": "HER2"},
    )
    pipeline.save_pretrained(folder / "her2")
    return folder / "her2", {}


def adapted_transformer():
    model = tiny_transformer()
    add_lora(model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, value in lora_state(model).items():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    return model


SOURCES = [
    original_checkpoint,
    denoiser_folder,
    branch_folder,
    translator_file,
    encoder_file,
    autoencoder_folder,
    adapted_file,
    pipeline_folder,
    staining_folder,
]


@pytest.mark.parametrize("make", SOURCES)
def test_the_same_source_gives_the_same_bytes_and_the_result_gives_them_again(make, tmp_path):
    source, options = make(tmp_path)
    convert(str(source), tmp_path / "a", **options)
    convert(str(source), tmp_path / "b", **options)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    again = {"heads": 2} if make is encoder_file else {}
    if make is adapted_file:  # adapters alone now; they belong to a denoiser
        denoiser_folder(tmp_path)
        again = {"base": str(tmp_path / "denoiser")}
    convert(str(tmp_path / "a"), tmp_path / "c", **again)
    assert files(tmp_path / "c") == files(tmp_path / "a")


@pytest.mark.parametrize("make", SOURCES)
def test_a_card_says_what_it_is_and_where_it_came_from(make, tmp_path):
    source, options = make(tmp_path)
    before = files(source) if source.is_dir() else {}
    result = convert(str(source), tmp_path / "out", licence="CC BY 4.0", **options)
    assert before == (files(source) if source.is_dir() else {}), "the source is only read"
    card = (tmp_path / "out" / "README.md").read_text()
    assert source.name in card
    assert "license_name: 'CC BY 4.0'" in card
    assert "synthetic" in card
    assert result.what.lower() in card.lower()
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert origin["kind"] == result.kind
    for name, digest in origin["files_sha256"].items():
        assert sha256_of(source if source.is_file() else source / name) == digest
        assert digest in card
    for digest in origin["weights_sha256"].values():
        assert digest in card
    assert (
        str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "out").rglob("*.json")) + card
    )
    assert not list((tmp_path / "out").rglob("*.py"))


def test_an_autoencoder_put_beside_keeps_its_own_licence(tmp_path):
    """The denoiser's does not cover it."""
    source, _ = denoiser_folder(tmp_path)
    tiny_vae().save_pretrained(tmp_path / "stability")
    convert(str(source), tmp_path / "out", vae=str(tmp_path / "stability"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of vae/: not known" in card
    assert "the autoencoder in vae/ is from stability" in card
    convert(str(tmp_path / "out"), tmp_path / "again", licence="MIT")
    assert "MIT (as given at the conversion)" in (tmp_path / "again" / "README.md").read_text()


def test_the_original_layout_opens_as_our_class(tmp_path):
    source, options = original_checkpoint(tmp_path)
    result = convert(str(source), tmp_path / "out", **options)
    assert "averaged weights" in result.notes[0]
    assert same(PixCellTransformer2DModel.from_pretrained(tmp_path / "out"), tiny_transformer())


@torch.no_grad()
def test_golden_original_weights_open_and_give_the_original_output(tmp_path):
    tensors, case = load("original_transformer_512like")
    torch.save({"state_dict": weights(tensors)}, tmp_path / "pixcell_512.ckpt")
    convert(str(tmp_path / "pixcell_512.ckpt"), tmp_path / "out", heads=case["config"]["num_heads"])
    model = PixCellTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    sample = model(tensors["in.x"], tensors["in.timestep"], tensors["in.y"][:, 0]).sample
    torch.testing.assert_close(sample, tensors["out.out"], rtol=1e-4, atol=5e-5)


def test_a_branch_opens(tmp_path):
    source, options = branch_folder(tmp_path)
    convert(str(source), tmp_path / "out", **options)
    assert same(
        PixCellControlNetModel.from_pretrained(tmp_path / "out"),
        PixCellControlNetModel.from_pretrained(source),
    )


def test_a_translator_opens(tmp_path):
    source, options = translator_file(tmp_path)
    convert(str(source), tmp_path / "out", **options)
    state = EmbeddingTranslator.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights(load("flow_mlp")[0]).items())


def test_an_encoder_opens_and_sees_what_it_saw(tmp_path):
    from dataclasses import replace

    source, options = encoder_file(tmp_path)
    convert(str(source), tmp_path / "out", **options)
    uni = ENCODERS["uni2-h"]
    arguments = dict(uni.arguments) | {"img_size": 28, "depth": 2, "num_heads": 2, "embed_dim": 24}
    before = load_encoder(replace(uni, dim=24, input_size=28, resize=28, arguments=arguments), weights=source)
    after = load_encoder(tmp_path / "out")
    assert after.made_by()["sha256"] == before.made_by()["sha256"]
    assert after.made_by()["preprocessing"] == before.made_by()["preprocessing"]
    fields = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(after(fields), before(fields))


def test_adapters_are_taken_out_and_know_their_denoiser(tmp_path):
    source, options = adapted_file(tmp_path)
    result = convert(str(source), tmp_path / "out", **options)
    assert "not written" in result.notes[-1]
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").stat().st_size < 100_000
    model = tiny_transformer()
    load_lora(model, tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert same(model, adapted_transformer())
    with pytest.raises(WrongWeights, match="trained on"):
        load_lora(awake(tiny_transformer()), tmp_path / "out" / "pytorch_lora_weights.safetensors")


def test_a_folder_of_adapters_is_refused_for_another_denoiser(tmp_path):
    source, options = adapted_file(tmp_path)
    convert(str(source), tmp_path / "her2", **options)
    awake(tiny_transformer()).save_pretrained(tmp_path / "another")
    with pytest.raises(WrongWeights, match="trained on"):
        convert(str(tmp_path / "her2"), tmp_path / "out", base=str(tmp_path / "another"))
    assert not (tmp_path / "out").exists()


def test_adapters_can_bring_their_denoiser_along(tmp_path):
    source, options = adapted_file(tmp_path)
    convert(str(source), tmp_path / "out", with_base=True, **options)
    assert same(
        PixCellTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer"), tiny_transformer()
    )


def test_a_published_pipeline_opens_and_makes_the_same_pictures(tmp_path):
    source, _ = pipeline_folder(tmp_path)
    convert(str(source), tmp_path / "out")
    pictures = []
    for folder in (source, tmp_path / "out"):
        pipeline = PixCellPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        pictures.append(
            pipeline(
                torch.ones(1, 4, 12), num_inference_steps=2, generator=generator, output_type="pt"
            ).images
        )
    assert torch.equal(*pictures)


def test_a_denoiser_and_an_autoencoder_make_a_pipeline(tmp_path):
    source, options = original_checkpoint(tmp_path)
    tiny_vae().save_pretrained(tmp_path / "vae")
    result = convert(str(source), tmp_path / "out", vae=str(tmp_path / "vae"), **options)
    assert set(result.parameters) == {"transformer", "vae"}
    pipeline = PixCellPipeline.from_pretrained(tmp_path / "out")
    assert same(pipeline.transformer, tiny_transformer())
    assert pipeline.facts["codec"]["sha256"] == pipeline.codec.sha256
    assert "encoder is not known" in result.notes[-1]


def test_a_denoiser_of_published_sizes_names_its_encoder(tmp_path):
    model = tiny_transformer(caption_channels=1536, caption_num_tokens=1, sample_size=32)
    model.save_pretrained(tmp_path / "denoiser")
    tiny_vae().save_pretrained(tmp_path / "vae")
    convert(str(tmp_path / "denoiser"), tmp_path / "out", vae=str(tmp_path / "vae"))
    stated = json.loads((tmp_path / "out" / "pixcell.json").read_text())
    assert stated["encoder"] == {"name": "uni2-h", "dim": 1536}
    assert (stated["field_size"], stated["mpp"], stated["guidance_scale"]) == (256, 0.5, 2.0)


def test_a_pipeline_without_an_autoencoder_says_how_to_give_one(tmp_path):
    source, _ = pipeline_folder(tmp_path)
    shutil.move(source / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(MissingWeights, match=r"--vae .*sd3\.5"):
        convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tiny_vae().save_pretrained(tmp_path / "vae")
    convert(str(source), tmp_path / "out", vae=str(tmp_path / "vae"))
    assert same(PixCellPipeline.from_pretrained(tmp_path / "out").vae, tiny_vae())


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_number_format_can_be_chosen_and_is_kept_afterwards(tmp_path, precision, dtype):
    source, options = original_checkpoint(tmp_path)
    convert(str(source), tmp_path / "half", precision=precision, **options)
    stored = load_file(tmp_path / "half" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    assert f"rounded to {precision}" in (tmp_path / "half" / "README.md").read_text()
    convert(str(tmp_path / "half"), tmp_path / "again")
    assert files(tmp_path / "half") == files(tmp_path / "again")


def test_weights_that_changed_since_get_an_origin_of_their_own(tmp_path):
    source, options = original_checkpoint(tmp_path)
    convert(str(source), tmp_path / "a", **options)
    file = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file(state | {"proj_out.bias": state["proj_out.bias"] + 1}, file, metadata={"format": "pt"})
    convert(str(tmp_path / "a"), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "origin.json").read_text())["name"] == "a"


# ── PathLDM ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def pathldm(tmp_path):
    """A checkpoint as a training framework writes it: settings and callbacks beside the weights."""
    parts = {
        "model.diffusion_model.": tiny_unet(),
        "first_stage_model.": tiny_first_stage(),
        "cond_stage_model.transformer.": tiny_text_tower(),
    }
    state = {prefix + name: value for prefix, model in parts.items() for name, value in to_ldm(model).items()}
    state["betas"] = torch.linspace(0, 1, 1000)
    content = {"state_dict": state, "callbacks": {Namespace: {"best": torch.tensor(1.0)}}, "epoch": 3}
    torch.save(content, tmp_path / "pathldm.ckpt")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "pathldm.ckpt", dict(zip(("unet", "vae", "text_encoder"), parts.values(), strict=True))


TEXT_HEADS = {"text_num_attention_heads": 2}  # the published tower has heads 64 wide, this one 8


def test_a_whole_pathldm_checkpoint_becomes_a_pipeline(pathldm, tmp_path):
    source, parts = pathldm
    options = {"tokenizer": str(tmp_path / "tokenizer"), "config": {"sample_size": 8} | TEXT_HEADS}
    with pytest.raises(WrongWeights, match="--skip-objects"):
        convert(str(source), tmp_path / "out", **options)
    result = convert(str(source), tmp_path / "out", skip_objects=True, **options)
    assert any("argparse.Namespace" in note for note in result.notes)
    pipeline = TextPipeline.from_pretrained(tmp_path / "out")
    assert all(same(getattr(pipeline, name), part) for name, part in parts.items())
    convert(str(tmp_path / "out"), tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_a_text_tower_without_tokenizer_is_a_question(pathldm, tmp_path):
    with pytest.raises(MissingWeights, match="--set tokenizer=plip or clip"):
        convert(str(pathldm[0]), tmp_path / "out", skip_objects=True, config=TEXT_HEADS)
    with pytest.raises(MissingWeights, match="neither a folder nor one of plip, clip"):
        convert(str(pathldm[0]), tmp_path / "out", skip_objects=True, tokenizer="bert", config=TEXT_HEADS)


def test_an_ldm_autoencoder_alone_is_one_model(pathldm, tmp_path):
    vae = pathldm[1]["vae"]
    save_file(
        {name: value.contiguous() for name, value in to_ldm(vae).items()}, tmp_path / "vq-f4.safetensors"
    )
    result = convert(str(tmp_path / "vq-f4.safetensors"), tmp_path / "out")
    assert result.kind == "pathldm"
    assert same(LatentCodec.from_pretrained(tmp_path / "out").vae, vae)


# ── whole or not at all ──────────────────────────────────────────────────────────────────────────────


def test_what_is_there_is_not_written_over(tmp_path):
    source, _ = denoiser_folder(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="is there already"):
        convert(str(source), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_source_that_fails_leaves_nothing(tmp_path):
    source, options = original_checkpoint(tmp_path)
    state = torch.load(source, weights_only=True)["state_dict"]
    del state["t_block.1.bias"]
    torch.save(state, source)
    with pytest.raises(WrongWeights, match=r"adaln_single\.linear\.bias"):
        convert(str(source), tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pixcell.ckpt"]


def test_a_kill_leaves_nothing_half(tmp_path):
    source, _ = denoiser_folder(tmp_path)
    code = (
        "from pathlib import Path; import time\n"
        "from pixcell.tasks import convert as task\n"
        "def stop(*_):\n    print('written', flush=True); time.sleep(60)\n"
        "task._forget_places = stop\n"
        f"task.convert({str(source)!r}, Path({str(tmp_path / 'out')!r}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    convert(str(source), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["denoiser", "out"]


# ── the command ──────────────────────────────────────────────────────────────────────────────────────


def test_the_command_says_what_it_recognised(tmp_path):
    source, _ = original_checkpoint(tmp_path)
    arguments = [str(source), str(tmp_path / "out"), "--heads", "2", "--weights", "raw"]
    settings = ["--set", "config={sample_size: 16, interpolation_scale: 0.25}"]
    result = CliRunner().invoke(app, ["convert", *arguments, *settings])
    assert result.exit_code == 0, result.output
    assert "original layout" in result.output
    assert "trained weights" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dit"}, "Choose one of"),
        ({"kind": "translator"}, "EmbeddingTranslator does not know"),
        ({"vae": "no-such-vae"}, "no-such-vae"),
        ({"precision": "fp8"}, "fp8"),
        ({"base": "denoiser"}, "--base is for adapters"),
        ({"with_base": True}, "with_base is for PixCell denoiser with adapters"),
        ({"tokenizer": "plip"}, "tokenizer is for PathLDM"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message, monkeypatch):
    source, _ = denoiser_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        convert(str(source), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_goes_with_a_denoiser_only(tmp_path):
    source, _ = autoencoder_folder(tmp_path)
    with pytest.raises(ModelError, match="--vae goes with a denoiser"):
        convert(str(source), tmp_path / "out", vae=str(source))
