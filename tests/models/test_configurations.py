"""A model is loaded whole or not at all, by the method that users of diffusers know too."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixcell.errors import WrongWeights
from pixcell.models.pathldm import ClassEmbedder
from pixcell.models.translator import EmbeddingTranslator
from tiny_models import tiny_controlnet, tiny_transformer, tiny_vae

MODELS = {
    "transformer": tiny_transformer,
    "controlnet": tiny_controlnet,
    "vae": tiny_vae,
    "translator": lambda: EmbeddingTranslator(6, 4, 4, 4, 6, 1),
    "class embedder": lambda: ClassEmbedder(3, 8),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path)
    return type(model), tmp_path


def change(folder, **values):
    """Replace tensors of the saved model; None takes one out."""
    file = folder / "diffusion_pytorch_model.safetensors"
    state = {**load_file(file), **{name.replace("__", "."): value for name, value in values.items()}}
    save_file({name: value for name, value in state.items() if value is not None}, file)


def name_in(folder):
    return next(iter(load_file(folder / "diffusion_pytorch_model.safetensors")))


@pytest.mark.parametrize(("value", "message"), [(None, "1 tensors missing"), (torch.zeros(7, 7, 7), "shape")])
def test_a_tensor_that_does_not_fit_is_an_error_not_a_random_number(folder, value, message):
    kind, place = folder
    name = name_in(place)
    change(place, **{name.replace(".", "__"): value})
    with pytest.raises(WrongWeights, match=f"(?s){message}.*{name}|{name}.*{message}"):
        kind.from_pretrained(place)


def test_a_tensor_too_many_is_an_error(folder):
    kind, place = folder
    change(place, foreign=torch.zeros(1))
    with pytest.raises(WrongWeights, match=r"1 tensors unexpected \(foreign\)"):
        kind.from_pretrained(place)


def test_who_asks_for_the_report_decides(folder):
    kind, place = folder
    change(place, foreign=torch.zeros(1))
    model, report = kind.from_pretrained(place, output_loading_info=True)
    assert isinstance(model, kind)
    assert report["unexpected_keys"] == ["foreign"]
