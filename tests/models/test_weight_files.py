"""Weight files are data: recognised before they are read, read whole, and never run."""

import json
import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models import weight_files
from pixcell.models.weight_files import open_weights, weight_files_in
from pixcell.models.weights import empty_parameters, load_stored, read_weights


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(3, 5) for i in range(6)} | {"steps": torch.tensor(7)}


def values(stored, **options):
    return dict(stored.tensors(**options))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ── every container gives the same tensors ───────────────────────────────────────────────────────────


def save_safetensors(state, folder):
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def save_pickle(state, folder):
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def save_wrapped(state, folder):
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, folder / "epoch_3.ckpt")
    return folder / "epoch_3.ckpt"


def save_wrapped_twice(state, folder):
    torch.save({"state_dict": {"model": OrderedDict(state)}}, folder / "a.pth")
    return folder / "a.pth"


def save_before_torch_1_6(state, folder):
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(folder / "old.pth")
    return folder / "old.pth"


def save_distributed(state, folder):
    torch.save({f"module.{name}": value for name, value in state.items()}, folder / "ddp.pt")
    return folder / "ddp.pt"


def save_compiled(state, folder):
    torch.save({f"_orig_mod.module.{name}": value for name, value in state.items()}, folder / "compiled.pt")
    return folder / "compiled.pt"


def save_shards(state, folder):
    names = list(state)
    files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


CONTAINERS = [
    save_safetensors,
    save_pickle,
    save_wrapped,
    save_wrapped_twice,
    save_before_torch_1_6,
    save_distributed,
    save_compiled,
    save_shards,
]


@pytest.mark.parametrize("save", CONTAINERS)
@pytest.mark.parametrize("round_bytes", [1, 1 << 20])
def test_every_container_gives_the_same_tensors(state, tmp_path, save, round_bytes, monkeypatch):
    """However many at a time are read."""
    monkeypatch.setattr(weight_files, "_ROUND_BYTES", round_bytes)
    stored = open_weights(save(state, tmp_path))
    assert stored.shapes == {name: tuple(value.shape) for name, value in state.items()}
    assert stored.num_bytes == 6 * 60 + 8
    assert same(values(stored), state)


@pytest.mark.parametrize("save", CONTAINERS)
def test_tensors_lie_in_memory_of_their_own(state, tmp_path, save):
    """Where a file is mapped, its odd addresses may take a processor to another kernel."""
    for tensor in values(open_weights(save(state, tmp_path))).values():
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_a_file_may_vanish_after_it_was_read(state, tmp_path):
    path = save_safetensors(state, tmp_path)
    held = values(open_weights(path))
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same(held, state)


def test_reading_in_half_precision_leaves_integers_alone(state, tmp_path):
    held = values(open_weights(save_pickle(state, tmp_path)), dtype=torch.bfloat16)
    assert held["steps"].dtype is torch.int64
    assert torch.equal(held["layer.0.weight"], state["layer.0.weight"].bfloat16())


def test_the_commonest_number_format_stands_first(tmp_path):
    save_file(
        {"a": torch.zeros(9).half(), "b": torch.zeros(2), "c": torch.zeros(99).long()},
        tmp_path / "x.safetensors",
    )
    assert open_weights(tmp_path / "x.safetensors").floating_dtypes == (torch.float16, torch.float32)


def test_a_layout_is_applied_to_every_part_that_is_read(state, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "_ROUND_BYTES", 1)
    stored = open_weights(save_pickle(state, tmp_path)).converted(
        lambda found: {
            f"{name}.{i}": row for name, value in found.items() if value.ndim for i, row in enumerate(value)
        }
    )
    held = values(stored)
    assert len(held) == 18
    assert torch.equal(held["layer.2.weight.1"], state["layer.2.weight"][1])


# ── training checkpoints ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def checkpoint(tmp_path):
    trained = {"w": torch.zeros(2), "y_embedder.y_embedding": torch.full((1, 3), 5.0)}
    averaged = {"w": torch.ones(2), "y_embedder.y_embedding": torch.full((1, 3), 9.0)}
    torch.save({"state_dict": trained, "state_dict_ema": averaged, "epoch": 1}, tmp_path / "e.pth")
    return tmp_path / "e.pth"


@pytest.mark.parametrize(("which", "value"), [("auto", 1.0), ("ema", 1.0), ("raw", 0.0)])
def test_averaged_or_trained_weights_are_a_choice_and_it_is_told(checkpoint, which, value):
    stored = open_weights(checkpoint, which=which)
    assert values(stored)["w"].tolist() == [value, value]
    assert any(("averaged" if value else "trained") in note for note in stored.notes)


@pytest.mark.parametrize("which", ["auto", "ema", "raw"])
def test_no_condition_is_the_vector_that_was_trained_with(checkpoint, which):
    """The reference averages parameters only: its averaged copy keeps a vector that the model never saw."""
    stored = open_weights(checkpoint, which=which)
    assert values(stored)["y_embedder.y_embedding"].tolist() == [[5.0] * 3]
    assert any("another" in note for note in stored.notes) == (which != "raw")


def test_averages_that_are_not_there_are_not_made_up(state, tmp_path):
    with pytest.raises(MissingWeights, match="--weights raw"):
        open_weights(save_wrapped(state, tmp_path), which="ema")


def test_a_checkpoint_without_averages_needs_no_choice(state, tmp_path):
    assert open_weights(save_wrapped(state, tmp_path)).notes == ()


# ── pickles are not run ──────────────────────────────────────────────────────────────────────────────


class _Touch:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(state, tmp_path):
    torch.save({"state_dict": state, "hook": _Touch(tmp_path / "touched")}, tmp_path / "bad.ckpt")
    with pytest.raises(WrongWeights, match=r"would run code \(it asks for .*open\).*--skip-objects"):
        open_weights(tmp_path / "bad.ckpt")
    assert not (tmp_path / "touched").exists()


def _save_plain(content, path):
    path.write_bytes(pickle.dumps(content))


def _save_old(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("skip_objects", [False, True])
@pytest.mark.parametrize("save", [torch.save, _save_old, _save_plain])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, r"\w+\.system"), (eval, r"builtins\.eval"), (__import__, r"builtins\.__import__")],
)
def test_a_pickle_that_reaches_for_the_system_is_called_what_it_is(
    tmp_path, save, function, name, skip_objects
):
    """Whatever container it is in, and also where objects are to be left out."""

    class Attack:
        def __reduce__(self):
            return (function, (f"open({str(tmp_path / 'touched')!r}, 'w')",))

    save({"state_dict": {}, "hook": Attack()}, tmp_path / "bad.ckpt")
    with pytest.raises(WrongWeights, match=rf"would run {name}\. That is how pickles attack a machine"):
        open_weights(tmp_path / "bad.ckpt", skip_objects=skip_objects)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"P", b"\x89PNG\r\n"])
def test_what_is_no_pickle_is_not_said_to_run_code(tmp_path, content):
    """Pages of errors are often saved under the name of what was asked for."""
    (tmp_path / "weights.ckpt").write_bytes(content)
    with pytest.raises(WrongWeights, match="cannot be read as weights"):
        open_weights(tmp_path / "weights.ckpt", skip_objects=True)


@pytest.mark.parametrize("name", ["weights.ckpt", "weights.safetensors"])
def test_a_pointer_of_git_lfs_is_called_what_it_is(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(WrongWeights, match="git lfs pull"):
        open_weights(tmp_path / name)


@pytest.mark.parametrize("odd", [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), 3])
def test_averages_that_are_no_dense_tensors_are_refused(state, tmp_path, odd):
    torch.save({"state_dict": state, "state_dict_ema": dict.fromkeys(state, odd)}, tmp_path / "x.ckpt")
    with pytest.raises(WrongWeights, match=r"tensors"):
        open_weights(tmp_path / "x.ckpt")


def test_objects_of_a_training_can_be_left_out_without_running_them(state, tmp_path):
    """As in checkpoints of training frameworks: settings, callbacks by class, counters."""
    content = {
        "state_dict": state,
        "hyper_parameters": Namespace(lr=1e-4),
        "callbacks": {Namespace: {"best": torch.tensor(1.0)}},
        "hook": _Touch(tmp_path / "touched"),
    }
    torch.save(content, tmp_path / "run.ckpt")
    with pytest.raises(WrongWeights, match=r"argparse\.Namespace"):
        open_weights(tmp_path / "run.ckpt")
    stored = open_weights(tmp_path / "run.ckpt", skip_objects=True)
    assert same(values(stored), state)
    assert "argparse.Namespace" in stored.notes[-1]
    assert not (tmp_path / "touched").exists()
    with pytest.raises(WrongWeights, match="would run code"):  # nothing stays allowed afterwards
        open_weights(tmp_path / "run.ckpt")


class _Settings(dict):
    """A dictionary of a class of its own, as frameworks keep settings."""


def test_settings_that_are_filled_item_by_item_can_be_left_out(state, tmp_path):
    torch.save({"state_dict": state, "settings": _Settings(a=1)}, tmp_path / "run.ckpt")
    assert same(values(open_weights(tmp_path / "run.ckpt", skip_objects=True)), state)


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(WrongWeights, match="would run code"):
        open_weights(tmp_path / "model.pth")
    with pytest.raises(WrongWeights, match=r"Save model.state_dict\(\)"):
        open_weights(tmp_path / "model.pth", skip_objects=True)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_is_no_weight_file(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(WrongWeights, match=r"x\.bin"):
        open_weights(tmp_path / "x.bin")


# ── damaged, missing and ambiguous files ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("save", [save_safetensors, save_pickle, save_before_torch_1_6])
@pytest.mark.parametrize("kept", [0, 7, 0.3, 0.95])
def test_a_file_that_was_cut_off_is_refused(state, tmp_path, save, kept):
    path = save(state, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(WrongWeights, match=path.name):
        values(open_weights(path))


def test_a_missing_shard_is_named(state, tmp_path):
    save_shards(state, tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingWeights, match="model-00002-of-00002"):
        open_weights(tmp_path)


def test_shards_of_another_model_are_refused(state, tmp_path):
    save_shards(state, tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(WrongWeights, match="Files of two models were mixed"):
        open_weights(tmp_path)


def test_a_folder_with_two_unusual_files_is_a_question(state, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(state, tmp_path / name)
    with pytest.raises(ModelError, match=r"2 weight files \(a.safetensors, b.safetensors\)"):
        weight_files_in(tmp_path)


def test_variants_are_taken_only_when_asked_for(state, tmp_path):
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert weight_files_in(tmp_path) == (tmp_path / "diffusion_pytorch_model.safetensors",)
    assert weight_files_in(tmp_path, "fp16") == (tmp_path / "diffusion_pytorch_model.fp16.safetensors",)
    with pytest.raises(MissingWeights, match="variant bf16"):
        weight_files_in(tmp_path, "bf16")


def test_an_empty_folder_holds_no_weights(tmp_path):
    with pytest.raises(MissingWeights, match="holds no weights"):
        open_weights(tmp_path)
    with pytest.raises(MissingWeights, match="there is no weight file"):
        open_weights(tmp_path / "none.safetensors")


def test_numbers_in_place_of_tensors_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1), "b": 3}}, tmp_path / "x.pth")
    with pytest.raises(WrongWeights, match=r"named tensors \(b: something else\)"):
        open_weights(tmp_path / "x.pth")


# ── into a module ────────────────────────────────────────────────────────────────────────────────────


def test_a_module_built_empty_takes_the_tensors_over(tmp_path):
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.save(source.state_dict(), tmp_path / "x.pth")
    with empty_parameters():
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert module[0].weight.is_meta
    load_stored(module, open_weights(tmp_path / "x.pth"))
    assert same(module.state_dict(), source.state_dict())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_what_does_not_fit_is_listed_whole_before_anything_is_read(tmp_path, monkeypatch):
    state = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9))).state_dict()
    del state["4.bias"]
    state |= {"head.weight": torch.zeros(1), "0.weight": torch.zeros(3, 5)}
    save_file(state, tmp_path / "x.safetensors")
    stored = open_weights(tmp_path / "x.safetensors")
    monkeypatch.setattr(stored, "tensors", lambda dtype: pytest.fail("values were read"))
    with pytest.raises(WrongWeights) as caught:
        load_stored(nn.Sequential(*(nn.Linear(3, 3) for _ in range(9))), stored)
    for part in (
        "1 tensors missing (4.bias)",
        "1 tensors unexpected (head.weight)",
        "0.weight (3, 5) instead of (3, 3)",
    ):
        assert part in str(caught.value)


def test_tensors_of_many_blocks_are_listed_once(tmp_path):
    blocks = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(28))})
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(
        WrongWeights, match=r"56 tensors missing \(blocks.\*.weight, 28 times; blocks.\*.bias, 28"
    ):
        load_stored(blocks, open_weights(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_that_are_no_numbers_are_refused(tmp_path, value):
    """A million is none in half precision."""
    save_file({"weight": torch.full((2, 2), value), "bias": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(WrongWeights, match="weight holds NaN or infinity"):
        load_stored(nn.Linear(2, 2), open_weights(tmp_path / "x.safetensors"), torch.float16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_formats_that_no_model_computes_in_are_refused(tmp_path, dtype):
    save_file(
        {"weight": torch.ones(2, 2).to(dtype), "bias": torch.ones(2)}, tmp_path / "quantised.safetensors"
    )
    with pytest.raises(WrongWeights, match=r"weight \(\w+\).*Quantised"):
        load_stored(nn.Linear(2, 2), open_weights(tmp_path / "quantised.safetensors"))


def test_read_weights_takes_what_was_trained(checkpoint):
    assert read_weights(checkpoint)["w"].tolist() == [0.0, 0.0]
