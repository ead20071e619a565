"""Features are those of the standard tools, whatever the batch, and are never made of broken numbers."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell.errors import EvaluationError, MissingWeights, ModelError, WrongWeights
from pixcell.evaluation import features as features_module
from pixcell.evaluation.features import Extractor, InceptionSpace, extract, load_extractor
from pixcell.evaluation.pictures import PictureSet
from pixcell.models.encoders import load_encoder


class MeanColour:
    """A feature space one can compute in the head."""

    name = "mean-colour"
    dim = 3

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        self.batches.append(tuple(images.shape))
        return images.float().mean((2, 3))

    def describe(self):
        return {"name": self.name, "dim": self.dim, "resize": "none"}


@pytest.fixture
def pictures(real):
    return PictureSet.open(real)


def test_every_space_keeps_the_protocol():
    assert isinstance(MeanColour(), Extractor)
    assert isinstance(load_extractor("stain-texture"), Extractor)
    assert isinstance(load_extractor("random-vgg16"), Extractor)


def test_features_do_not_depend_on_the_batch(pictures):
    space = load_extractor("stain-texture")
    one, many = (extract(pictures, space, batch_size=size).values for size in (1, 7))
    # Kernels sum in another order for another batch: float32 rounding is all that may differ.
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-4)


def test_features_of_an_encoder_are_the_encoder_s(pictures):
    picture = torch.from_numpy(pictures.read(pictures.pictures[3])).permute(2, 0, 1)[None]
    expected = load_encoder("stain-texture")(picture)[0].numpy()
    found = extract(pictures, load_extractor("stain-texture"))
    np.testing.assert_allclose(found.values[3], expected, rtol=1e-4, atol=1e-4)


def test_pictures_of_unlike_sizes_keep_their_order(tmp_path):
    for number, side in enumerate([64, 96, 64, 128, 96, 64]):
        Image.fromarray(np.full((side, side, 3), number * 10, np.uint8)).save(tmp_path / f"{number}.png")
    space = MeanColour()
    found = extract(PictureSet.open(tmp_path), space, batch_size=2)
    assert found.values[:, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert found.picture_of.tolist() == [0, 1, 2, 3, 4, 5]
    assert max(batch[0] for batch in space.batches) == 2


def test_a_picture_cut_into_fields_has_a_row_for_each(tmp_path):
    image = np.zeros((128, 192, 3), np.uint8)
    image[64:, 128:] = 100
    for name in "ab":
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    found = extract(PictureSet.open(tmp_path), MeanColour(), batch_size=4, field_size=64)
    assert found.values[found.rows_of(1), 0].tolist() == [0, 0, 0, 0, 0, 100]


def test_equal_pixels_have_equal_hashes_whatever_the_file(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(image).save(tmp_path / "b.bmp")
    Image.fromarray(image[::-1]).save(tmp_path / "c.png")
    one, same, other = extract(PictureSet.open(tmp_path), MeanColour()).pixel_hashes
    assert one == same != other


def test_features_that_are_not_numbers_name_the_pictures(pictures):
    class Broken(MeanColour):
        def __call__(self, images):
            values = super().__call__(images)
            values[1] = torch.nan
            return values

    with pytest.raises(
        EvaluationError, match=r"mean-colour gave NaN .* 3 of 24 fields \(case-01\.png, case-09"
    ):
        extract(pictures, Broken(), batch_size=8)


def test_an_unknown_extractor_is_refused():
    with pytest.raises((ModelError, MissingWeights)):
        load_extractor("no-such-encoder")


# ── Inception ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """Random weights in the layout of the standard file: the arithmetic is tested, not the training."""
    pytest.importorskip("torch_fidelity", reason="the extra 'eval' is not installed")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    class Unloaded(Network):
        def load_state_dict(self, state_dict, *args, **kwargs):
            return None

    torch.manual_seed(0)
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Unloaded("inception", ["2048"], nothing)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_features_are_torch_fidelity_s(inception_weights, tissue):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = torch.from_numpy(np.stack(tissue[:3])).permute(0, 3, 1, 2).contiguous()
    theirs = FeatureExtractorInceptionV3("x", ["2048"], str(inception_weights))(images)[0]
    ours = load_extractor("inception", inception_weights, device="cpu")
    assert ours(images).shape == (3, 2048)
    torch.testing.assert_close(ours(images), theirs, rtol=0, atol=0)


def test_inception_that_is_not_the_standard_one_says_so(inception_weights):
    described = load_extractor("inception", inception_weights, device="cpu").describe()
    assert described["is_standard"] is False
    assert len(described["sha256"]) == 64
    assert "299" in described["resize"]


def test_weights_of_another_network_are_refused(tmp_path):
    pytest.importorskip("torch_fidelity", reason="the extra 'eval' is not installed")
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(WrongWeights, match=r"other\.pth does not hold the Inception network"):
        InceptionSpace(tmp_path / "other.pth", torch.device("cpu"))


def test_a_weight_file_cannot_run_code(tmp_path):
    """A pickle that would create a file when it is opened is refused, and nothing is created."""
    pytest.importorskip("torch_fidelity", reason="the extra 'eval' is not installed")
    sign = tmp_path / "was-run"

    class Trap:
        def __reduce__(self):
            return (open, (str(sign), "w"))

    torch.save({"fc.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(WrongWeights, match=r"trap\.pth"):
        load_extractor("inception", tmp_path / "trap.pth", device="cpu")
    assert not sign.exists()


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity", reason="the extra 'eval' is not installed")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("a download began"))
    with (
        warnings.catch_warnings(),
        pytest.raises(MissingWeights, match=r"6726825d.*--extractor-weights.*download=true"),
    ):
        load_extractor("inception")
    assert features_module.InceptionSpace.dim == 2048


def test_the_untrained_space_is_the_same_every_time_and_touches_no_global_chance():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 3, 96, 96), dtype=np.uint8))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = load_extractor("random-vgg16")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = load_extractor("random-vgg16")
    assert first.describe() == second.describe()
    torch.testing.assert_close(first(images), second(images), rtol=0, atol=0)
    torch.testing.assert_close(first(images[1:2])[0], first(images)[1], rtol=1e-4, atol=1e-4)
    assert first(images).shape == (3, 64)


def test_the_untrained_space_sees_blur_and_colour_more_than_pictures_of_one_kind_differ():
    space = load_extractor("random-vgg16")
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 255, (8, 3, 16, 16), dtype=np.uint8)).float()
    sharp = torch.nn.functional.interpolate(coarse, size=128, mode="nearest")
    blurred = torch.nn.functional.avg_pool2d(sharp, 17, stride=1, padding=8, count_include_pad=False)
    tinted = sharp * torch.tensor([1.0, 0.4, 1.0])[:, None, None]
    means = {name: space(images.byte()).mean(0) for name, images in
             {"a": sharp[:4], "b": sharp[4:], "blurred": blurred, "tinted": tinted}.items()}  # fmt: skip
    floor = (means["a"] - means["b"]).norm()
    assert (means["blurred"] - means["a"]).norm() > 2 * floor
    assert (means["tinted"] - means["a"]).norm() > 1.5 * floor


def test_weights_for_a_space_that_draws_its_own_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="draws its weights from a seed"):
        load_extractor("random-vgg16", tmp_path / "weights.safetensors")


def test_pictures_are_not_all_alike_to_the_untrained_space():
    textures = features_module._textures(24, 96, seed=5)
    features = load_extractor("random-vgg16")(textures)
    directions = features / features.norm(dim=1, keepdim=True)
    likeness = (directions @ directions.T)[~torch.eye(24, dtype=torch.bool)]
    assert likeness.mean().abs() < 0.3  # as they come out of the network: 0.99
    assert 0.5 < features.std(0).mean() < 2
