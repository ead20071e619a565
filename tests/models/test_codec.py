"""A codec knows one formula for latents, and decodes a canvas of any size as if at once."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models import AutoencoderTiny
from safetensors.torch import load_file, save_file

from golden_vectors import FOLDER, load, weights
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.codec import LatentCodec, to_uint8, to_unit


def kl(**changes):
    """A tiny autoencoder of the Stable Diffusion family."""
    torch.manual_seed(0)
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    return AutoencoderKL(**(settings | changes))


def tissue(**changes):
    """A tiny autoencoder of our own, with every weight at work."""
    torch.manual_seed(0)
    model = TissueAutoencoder(**({"latent_channels": 4, "channels": (8, 16), "num_blocks": 1} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


# ── the formula ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "shift", "scale"),
    [
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1.5305),
        ({"scaling_factor": 0.13025, "shift_factor": None}, 0.0, 0.13025),
    ],
    ids=["sd35", "sdxl"],
)
def test_latents_are_raw_minus_shift_times_scale(config, shift, scale):
    codec = LatentCodec(kl(**config), "vae")
    raw = torch.tensor([-1.0, 0.0, 2.5]).view(1, 1, 1, 3).expand(1, 4, 1, 3)
    torch.testing.assert_close(codec.normalise(raw), (raw - shift) * scale)


def test_statistics_per_channel_are_the_shift_and_scale_of_each():
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 4.0, 0.5]
    codec = LatentCodec(kl(scaling_factor=0.5, latents_mean=mean, latents_std=std), "vae")
    raw = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = (raw - torch.tensor(mean).view(1, 4, 1, 1)) * 0.5 / torch.tensor(std).view(1, 4, 1, 1)
    torch.testing.assert_close(codec.normalise(raw), expected)


def test_a_mean_without_a_deviation_is_refused():
    with pytest.raises(ModelError, match="not both"):
        LatentCodec(kl(latents_mean=[0.0] * 4), "vae")


@pytest.mark.parametrize("model", [kl(scaling_factor=0.18), tissue(scaling_factor=2.0, shift_factor=-0.3)])
def test_denormalise_undoes_normalise(model):
    codec = LatentCodec(model, "vae")
    raw = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(codec.denormalise(codec.normalise(raw)), raw)


# ── encoding ─────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_and_fractions_encode_alike(images):
    codec = LatentCodec(kl(), "vae")
    for from_bytes, from_fractions in zip(codec.encode(images), codec.encode(images / 255), strict=True):
        assert torch.equal(from_bytes, from_fractions)


def test_geometry_is_measured_not_guessed(images):
    codec = LatentCodec(kl(), "vae")
    mean, std = codec.encode(images)
    assert (codec.latent_channels, codec.downsampling) == (4, 4)
    assert mean.shape == std.shape == (2, 4, 16, 24)
    assert (std > 0).all()


def test_an_autoencoder_without_a_posterior_has_no_spread(images):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), latent_channels=4
    )
    codec = LatentCodec(tiny, "taesd")
    _, std = codec.encode(images)
    assert codec.downsampling == 8
    assert not std.any()


def test_a_side_that_leaves_a_rest_is_refused():
    with pytest.raises(ValueError, match="multiples of 8"):
        LatentCodec(tissue(), "vae").encode(torch.zeros(1, 3, 64, 60))


def test_what_is_no_autoencoder_of_pictures_is_refused():
    with pytest.raises(ModelError, match="3 channels"):
        LatentCodec(kl(in_channels=1), "grey")


def test_half_precision_that_would_overflow_is_refused():
    with pytest.raises(ModelError, match="bf16"):
        LatentCodec(kl(force_upcast=True), "vae", dtype=torch.float16)


# ── decoding ─────────────────────────────────────────────────────────────────────────────────────────


def test_one_window_is_plain_decoding():
    codec = LatentCodec(kl(scaling_factor=0.7), "vae")
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    plain = codec.vae.decode(latents / 0.7).sample / 2 + 0.5
    # Not bit for bit: latents / scale is computed once here and once inside.
    torch.testing.assert_close(codec.decode(latents, window=16, overlap=4), plain.clamp(0, 1))


@pytest.mark.parametrize("size", [(40, 24), (24, 57), (33, 64)])
def test_a_local_decoder_shows_no_windows(size):
    """Where a decoder reaches no further than what windows discard, the canvas is decoded as if at once."""
    model = tissue()
    codec = LatentCodec(model, "ours")
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(0))
    at_once = codec.decode(latents, window=64)
    in_windows = codec.decode(latents, window=3 * model.reach * 2 + 1, overlap=3 * model.reach)
    torch.testing.assert_close(in_windows, at_once, rtol=0, atol=1e-5)  # sums of blended float32 weights


def test_windows_too_narrow_for_the_decoder_would_show():
    """The last test can fail: without enough overlap the canvas differs."""
    codec = LatentCodec(tissue(), "ours")
    latents = torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(0))
    difference = codec.decode(latents, window=64) - codec.decode(latents, window=20, overlap=0)
    assert difference.abs().max() > 0.01


def test_pictures_stay_between_black_and_white():
    codec = LatentCodec(tissue(), "ours")
    latents = 50 * torch.randn(1, 4, 8, 40, generator=torch.Generator().manual_seed(0))
    for window in (64, 32):
        pictures = codec.decode(latents, window=window, overlap=9)
        assert pictures.min() == 0
        assert pictures.max() == 1


def test_bytes_are_rounded_not_cut_off():
    assert to_uint8(torch.tensor([0.0, 0.0019, 0.002, 0.999, 1.2]).view(1, 1, 5).expand(3, 1, 5))[
        0, 0
    ].tolist() == [0, 0, 1, 255, 255]


def test_bytes_survive_the_way_to_fractions_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 1, 256)
    assert torch.equal(to_uint8(to_unit(levels)), levels)


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [kl, tissue])
def test_a_saved_codec_loads_as_itself(make, tmp_path, images):
    model = make(scaling_factor=1.5, shift_factor=0.1)
    model.save_pretrained(tmp_path / "nano")
    loaded, original = LatentCodec.from_pretrained(tmp_path / "nano"), LatentCodec(model, "nano")
    assert loaded.made_by() == original.made_by()
    assert torch.equal(loaded.encode(images)[0], original.encode(images)[0])


def test_a_pipeline_folder_is_a_codec_too(tmp_path):
    kl().save_pretrained(tmp_path / "pipeline" / "vae")
    assert LatentCodec.from_pretrained(tmp_path / "pipeline").name == "pipeline"


def test_the_hash_is_that_of_the_values_not_of_the_file_or_format(tmp_path):
    """bfloat16 values written as float32 are the same weights."""
    model = kl().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    model.float().save_pretrained(tmp_path / "fp32")
    files = [
        hashlib.sha256(next((tmp_path / n).glob("*.safetensors")).read_bytes()) for n in ("bf16", "fp32")
    ]
    assert files[0].digest() != files[1].digest()
    codecs = [LatentCodec.from_pretrained(tmp_path / name) for name in ("bf16", "fp32")]
    assert codecs[0].sha256 == codecs[1].sha256
    assert LatentCodec.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).sha256 == codecs[0].sha256


def test_one_changed_weight_changes_the_hash():
    model = kl()
    before = LatentCodec(model, "vae").sha256
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    assert LatentCodec(model, "vae").sha256 != before


@pytest.fixture
def folder(tmp_path) -> Path:
    kl().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_a_missing_tensor_is_an_error_not_a_random_number(folder):
    weights = next(folder.glob("*.safetensors"))
    state = load_file(weights)
    state.pop("encoder.conv_in.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(WrongWeights, match=r"1 missing keys \(encoder.conv_in.weight\)"):
        LatentCodec.from_pretrained(folder)


def test_a_tensor_too_many_is_an_error(folder):
    weights = next(folder.glob("*.safetensors"))
    save_file(load_file(weights) | {"extra": torch.zeros(1)}, weights, metadata={"format": "pt"})
    with pytest.raises(WrongWeights, match="extra"):
        LatentCodec.from_pretrained(folder)


def test_weights_cut_short_are_an_error(folder):
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WrongWeights, match=str(folder)):
        LatentCodec.from_pretrained(folder)


def test_pickled_weights_are_not_opened(tmp_path):
    kl().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(MissingWeights, match="pickled weights are not read"):
        LatentCodec.from_pretrained(tmp_path)


def test_a_folder_of_something_else_says_so(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(ModelError, match="UNet2DModel"):
        LatentCodec.from_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(MissingWeights, match=r"neither config\.json nor vae/config\.json"):
        LatentCodec.from_pretrained(tmp_path)


def test_nothing_is_downloaded_unless_asked_for(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repository, **options: asked.append(options) or str(tmp_path),
    )
    with pytest.raises(MissingWeights):
        LatentCodec.from_pretrained("sd3.5")
    assert [options["local_files_only"] for options in asked] == [True]


def test_the_error_for_an_absent_codec_shows_the_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"--download.*sdxl"):
        LatentCodec.from_pretrained("sd3.5")
    with pytest.raises(MissingWeights, match=r"sd3\.5, sd3, sdxl, sd1"):
        LatentCodec.from_pretrained("no-such-thing")


# ── the published autoencoder ────────────────────────────────────────────────────────────────────────


def test_parity_with_the_published_family():
    """Tiny weights of the released architecture: posterior, stored half precision, decoding."""
    tensors, about = load("vae_tiny")
    model = AutoencoderKL(**about["config"])
    model.load_state_dict(weights(tensors))
    codec = LatentCodec(model, "sd35")
    mean, std = codec.encode(tensors["in.image"] / 2 + 0.5)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(mean, tensors["out.mean"], **close)
    torch.testing.assert_close(std, tensors["out.std"], **close)
    torch.testing.assert_close(2 * std.log(), tensors["out.logvar"], **close)
    torch.testing.assert_close(codec.normalise(mean), tensors["out.normalised_mean"], **close)
    stored = torch.cat([mean, std], dim=1).half()
    torch.testing.assert_close(stored, tensors["out.stored_half"], rtol=1e-3, atol=1e-5)  # half: 1 ulp
    decoded = codec.decode(tensors["in.latent_normalised"])
    torch.testing.assert_close(decoded, (tensors["out.decoded"] / 2 + 0.5).clamp(0, 1), **close)


def test_stored_latents_become_what_the_published_training_sees():
    tensors, about = load("latent_loading")
    scale, shift = about["config"]["scale"], about["config"]["shift"]
    codec = LatentCodec(kl(latent_channels=16, scaling_factor=scale, shift_factor=shift), "sd35")
    mean, std = tensors["in.stored"].chunk(2)
    drawn = mean + std * tensors["in.noise"]
    assert torch.equal(drawn, tensors["out.item"])
    # Half precision throughout, as there; shift and scale are rounded to half: 2 units in the last place.
    torch.testing.assert_close(codec.normalise(drawn[None])[0], tensors["out.clean"], rtol=2e-3, atol=1e-3)


def test_the_released_autoencoder_has_these_names_and_shapes():
    published = json.loads((FOLDER / "manifest_sd35_vae.json").read_text())
    with torch.device("meta"):
        model = AutoencoderKL(**published["config"])
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == published["tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published["num_elements"]
