"""An encoder is what its row says: architecture, weights, preprocessing, and the order of fields."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from golden_vectors import FOLDER, load, weights
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.encoders import ENCODERS, Encoder, EncoderSpec, encoder_specs, load_encoder

UNI = ENCODERS["uni2-h"]
# UNI2-h with every switch as published and every size as small as the golden weights.
TINY = replace(
    UNI,
    name="tiny-uni",
    dim=24,
    repository="",
    gated=False,
    input_size=28,
    resize=28,
    arguments=dict(UNI.arguments) | {"img_size": 28, "depth": 2, "num_heads": 2, "embed_dim": 24},
)


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("uni") / "pytorch_model.bin"
    torch.save(weights(load("uni_tiny_vit")[0]), path)
    return path


@pytest.fixture
def fields():
    return torch.randint(
        0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A hub whose cache is empty, and which must not be asked."""
    import huggingface_hub

    real, asked = huggingface_hub.snapshot_download, []

    def snapshot_download(repository, **options):
        asked.append(options["local_files_only"])
        return real(repository, **(options | {"local_files_only": True, "cache_dir": str(tmp_path / "hub")}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


# ── UNI2-h ───────────────────────────────────────────────────────────────────────────────────────────


def test_uni2h_has_the_published_names_and_shapes():
    from pixcell.models.encoders import _build_timm

    published = json.loads((FOLDER / "manifest_uni2h.json").read_text())
    with torch.device("meta"):
        model = _build_timm(UNI.architecture, UNI.arguments)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == published["tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == published["num_elements"]
    assert model.num_features == UNI.dim


def test_uni2h_sees_what_the_published_extraction_saw():
    """8-bit resampling of a 256 field to 224, scaled and normalised, pixel for pixel."""
    tensors, about = load("uni_preprocess")
    assert list(UNI.mean) == about["config"]["mean"]
    assert list(UNI.std) == about["config"]["std"]
    encoder = Encoder(UNI, torch.nn.Identity())
    seen = encoder.preprocess(tensors["in.crop"].permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(
        seen.half(), tensors["out.model_input_half"], rtol=1e-3, atol=1e-3
    )  # half: 1 ulp
    part = tensors["out.model_input_patch"]
    torch.testing.assert_close(seen[:, 100:132, 100:132], part)
    whole = np.asarray(
        Image.fromarray(tensors["in.crop"].numpy()).resize((224, 224), Image.Resampling.BILINEAR)
    )
    exact = (torch.from_numpy(whole.copy()).permute(2, 0, 1) / 255 - torch.tensor(UNI.mean).view(3, 1, 1)) / (
        torch.tensor(UNI.std).view(3, 1, 1)
    )
    torch.testing.assert_close(seen, exact)


def test_the_architecture_returns_the_published_embedding(tiny_weights):
    tensors, _ = load("uni_tiny_vit")
    encoder = load_encoder(TINY, weights=tiny_weights)
    # The golden inputs are already normalised.
    for image, embedding in (("in.image", "out.embedding"), ("in.image_large", "out.embedding_large")):
        with torch.no_grad():
            found = encoder.module(tensors[image])
        torch.testing.assert_close(found, tensors[embedding], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        tokens = encoder.module.forward_features(tensors["in.image"])
    torch.testing.assert_close(tokens, tensors["out.tokens"], rtol=1e-4, atol=1e-5)


def test_a_1024_tile_gives_16_embeddings_row_by_row():
    """Row 0 at the top, column 0 at the left, as in the published cut."""
    tensors, _ = load("uni_preprocess")
    spec = replace(TINY, dim=3, resize=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    class MeanColour(torch.nn.Module):
        def forward(self, images):
            return images.mean(dim=(2, 3))

    encoder = Encoder(spec, MeanColour())
    published = tensors["out.grid_order"].float().mean(dim=(1, 2)) / 255
    small = encoder.grid(tensors["in.grid_image"].permute(2, 0, 1)[None], field_size=16)
    torch.testing.assert_close(small.reshape(16, 3), published)

    tile = torch.zeros(1, 3, 1024, 1024, dtype=torch.uint8)
    for row in range(4):
        for column in range(4):
            place = tile[..., 256 * row : 256 * (row + 1), 256 * column : 256 * (column + 1)]
            place[:, 0], place[:, 1] = 60 * row, 60 * column
    grid = encoder.grid(tile, field_size=256)
    assert grid.shape == (1, 4, 4, 3)
    steps = torch.arange(4) * 60 / 255
    torch.testing.assert_close(grid[0, :, :, 0], steps[:, None].expand(4, 4))
    torch.testing.assert_close(grid[0, :, :, 1], steps[None, :].expand(4, 4))


def test_a_tile_that_leaves_a_rest_is_refused():
    with pytest.raises(ValueError, match="whole number of 48 px fields"):
        load_encoder("stain-texture").grid(torch.zeros(1, 3, 128, 128), field_size=48)


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────


def test_safetensors_and_plain_pickles_are_the_same_encoder(tiny_weights, tmp_path, fields):
    save_file(weights(load("uni_tiny_vit")[0]), tmp_path / "model.safetensors")
    from_pickle = load_encoder(TINY, weights=tiny_weights)
    from_folder = load_encoder(TINY, weights=tmp_path)
    assert from_pickle.made_by() == from_folder.made_by()
    assert torch.equal(from_pickle(fields), from_folder(fields))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("norm.bias"), r"1 tensors missing \(norm.bias\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 tensors unexpected \(extra\)"),
        (lambda state: state.update({"norm.bias": torch.zeros(25)}), r"norm.bias \(25,\) instead of \(24,\)"),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_weights_that_do_not_fit_are_refused(spoil, message, tmp_path):
    state = weights(load("uni_tiny_vit")[0])
    spoil(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WrongWeights, match=message):
        load_encoder(TINY, weights=tmp_path / "model.safetensors")


class Intruder:
    def __reduce__(self):
        return (print, ("code in a weight file was run",))


def test_code_in_a_weight_file_is_not_run(tmp_path, capsys):
    torch.save({"norm.bias": Intruder()}, tmp_path / "model.bin")
    with pytest.raises(WrongWeights, match="would run code"):
        load_encoder(TINY, weights=tmp_path / "model.bin")
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x08\0\0\0\0\0\0\0{}"], ids=len)
@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_files_that_are_no_weights_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WrongWeights, match=name):
        load_encoder(TINY, weights=tmp_path / name)


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(MissingWeights, match=r"nowhere\.bin"):
        load_encoder(TINY, weights=tmp_path / "nowhere.bin")


def test_stain_texture_takes_no_weights(tmp_path):
    with pytest.raises(ModelError, match="formula"):
        load_encoder("stain-texture", weights=tmp_path)


@pytest.mark.parametrize("name", [spec.name for spec in encoder_specs() if spec.library != "builtin"])
def test_an_absent_encoder_says_how_to_get_it(name, no_hub):
    with pytest.raises(MissingWeights, match=r"--download.*--encoder-weights.*stain-texture"):
        load_encoder(name)
    assert no_hub == [True], "the network was asked without leave"


def test_a_gated_encoder_says_where_to_accept_its_terms(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_, **__):
        raise GatedRepoError("gated", response=SimpleNamespace(headers={}, status_code=403, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        MissingWeights, match=r"huggingface.co/MahmoodLab/UNI2-h.*hf auth login.*Open encoders"
    ):
        load_encoder("uni2-h", download=True)


def test_the_pinned_revision_is_what_is_asked_for(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or str(tmp_path)
    )
    with pytest.raises(MissingWeights):  # the folder is empty
        load_encoder("uni2-h", download=True)
    assert asked["revision"] == UNI.revision
    assert asked["local_files_only"] is False


# ── other models ─────────────────────────────────────────────────────────────────────────────────────


def test_any_timm_model_by_name_with_local_weights(tmp_path, fields):
    """Its classifier is left behind; its preprocessing is timm's."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = load_encoder("timm/resnet10t", weights=tmp_path / "w.safetensors")
    assert encoder.name == "timm-resnet10t"
    assert encoder(fields).shape == (3, encoder.dim) == (3, 512)
    with torch.no_grad():
        by_hand = model.eval().forward_head(
            model.forward_features(encoder.preprocess(fields)), pre_logits=True
        )
    torch.testing.assert_close(encoder(fields), by_hand)


def test_random_weights_are_never_used(no_hub):
    with pytest.raises(MissingWeights):
        load_encoder("timm/resnet10t")
    spec = EncoderSpec("mine", "timm", "resnet10t", 512, "mine", arguments={"num_classes": 0})
    with pytest.raises(MissingWeights, match="random ones describe nothing"):
        load_encoder(spec)


def test_a_folder_that_timm_saved(tmp_path, fields):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **arguments)
    timm.models.save_for_hf(model, tmp_path / "mine", model_args=arguments, safe_serialization=True)
    encoder = load_encoder(str(tmp_path / "mine"))
    assert (encoder.name, encoder.dim) == ("mine", 48)
    with torch.no_grad():
        torch.testing.assert_close(encoder(fields), model.eval()(encoder.preprocess(fields)))


def test_a_folder_that_transformers_saved(tmp_path, fields):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config)
    model.save_pretrained(tmp_path)
    steps = {
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "resample": 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps))
    encoder = load_encoder(str(tmp_path))
    with torch.no_grad():
        tokens = model.eval()(pixel_values=encoder.preprocess(fields)).last_hidden_state
    torch.testing.assert_close(encoder(fields), tokens[:, 0])

    both = Encoder(replace(encoder.spec, dim=48, pooling="class_and_mean"), encoder.module)
    torch.testing.assert_close(both(fields), torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))


def test_part_of_a_larger_model_is_picked_by_its_prefix(tmp_path, tiny_weights, fields):
    state = {f"visual.{name}": value for name, value in weights(load("uni_tiny_vit")[0]).items()}
    save_file(
        state | {"visual_head.weight": torch.zeros(2), "text.x": torch.zeros(2)}, tmp_path / "m.safetensors"
    )
    part = load_encoder(replace(TINY, prefix="visual."), weights=tmp_path / "m.safetensors")
    assert torch.equal(part(fields), load_encoder(TINY, weights=tiny_weights)(fields))


@pytest.mark.parametrize("name", ["uni", "timm/no_such_net", "transformers/only-owner"])
def test_an_unknown_name_is_an_error_that_helps(name):
    with pytest.raises(ModelError, match=r"stain-texture|timm has no model"):
        load_encoder(name)


def test_a_width_other_than_the_row_says_is_caught(tiny_weights, fields):
    encoder = load_encoder(replace(TINY, dim=23), weights=tiny_weights)
    with pytest.raises(ModelError, match="23 values"):
        encoder(fields)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spec", encoder_specs(), ids=lambda spec: spec.name)
def test_every_row_is_complete_and_can_be_built(spec):
    from pixcell.models.encoders import _build_timm

    assert spec.licence
    assert spec.revision is None or len(spec.revision) == 40
    assert spec.commercial_use == ("non-commercial" not in spec.licence and "NC" not in spec.licence)
    if spec.library == "timm":
        with torch.device("meta"):
            assert _build_timm(spec.architecture, spec.arguments).num_features == spec.dim


def test_the_guide_lists_the_table_as_it_is():
    """Licences in the documentation are those in the code."""
    page = (FOLDER.parents[1] / "docs" / "concepts" / "encoders.md").read_text()
    for spec in encoder_specs():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{spec.name}`"))
        assert spec.licence in row
        assert str(spec.dim) in row
        assert (
            f"`{spec.revision[:12]}`" if spec.revision else "not pinned" if spec.repository else "—"
        ) in row


def test_half_precision_stays_near_full(tiny_weights, fields):
    full = load_encoder(TINY, weights=tiny_weights)(fields)
    half = load_encoder(TINY, weights=tiny_weights, dtype=torch.bfloat16)(fields)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)  # bfloat16 keeps 8 bits
    assert not torch.equal(half, full)
