"""What an accelerate config may say of DeepSpeed; what it then does is in test_processes.py."""

import json
from importlib.machinery import ModuleSpec

import pytest
import torch

from pixcell.errors import MissingExtra, RecipeError
from pixcell.training import zero
from pixcell.training.engine import Engine
from pixcell.training.trainer_config import TrainerConfig
from pixcell.training.zero import zero_settings
from tiny_objective import Line


@pytest.fixture
def asked_for(monkeypatch):
    """A config that asks for DeepSpeed, which looks installed: reading the config needs none of it."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setattr(zero, "find_spec", lambda name: ModuleSpec(name, None))
    return monkeypatch


def engine_for(optimizer=torch.optim.AdamW, **settings):
    config = TrainerConfig(**{"steps": 1, "batch_size": 4, "device": "cpu", **settings})
    return Engine(Line(), lambda model: optimizer(model.parameters(), lr=0.1), config)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pixcell\[deepspeed\]"):
        engine_for()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", r"zero_stage 1 or 2, .* says 3.*fsdp2\.yaml"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0", "zero_stage 1 or 2, .* says 0"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer would change the run"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "offload_param would change the run"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(asked_for, variable, value, message):
    asked_for.setenv(variable, value)
    with pytest.raises(RecipeError, match=message):
        engine_for()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer would change the run behind its recipe"),
        ({"bf16": {"enabled": True}}, "bf16 would change"),
        ({"communication_data_type": "fp16"}, "communication_data_type would change"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"zero_optimization": None}, "does not go: Please specify the ZeRO"),
    ],
)
def test_a_deepspeed_file_that_decides_what_the_recipe_does_is_refused(asked_for, tmp_path, content, message):
    content = {name: part for name, part in ({"zero_optimization": {"stage": 2}} | content).items() if part}
    (tmp_path / "zero.json").write_text(json.dumps(content))
    asked_for.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    with pytest.raises(RecipeError, match=message):
        engine_for()


def test_what_a_deepspeed_file_says_of_the_exchange_is_kept_and_what_it_leaves_open_is_not(
    asked_for, tmp_path
):
    exchange = {"stage": 1, "reduce_bucket_size": 4096, "overlap_comm": True}
    content = {
        "zero_optimization": exchange | {"allgather_bucket_size": "auto", "stage3_max_live_parameters": 1e9},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "train_batch_size": "auto",
        "gradient_clipping": 3.0,
    }
    (tmp_path / "zero.json").write_text(json.dumps(content))
    asked_for.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    assert zero_settings() == exchange


def test_an_optimizer_that_looks_at_whole_tensors_is_refused(asked_for):
    with pytest.raises(RecipeError, match=r"SGD looks at whole tensors, .* under DeepSpeed"):
        engine_for(torch.optim.SGD)


def test_fp16_is_refused(asked_for):
    with pytest.raises(RecipeError, match="fp16 is not possible under DeepSpeed"):
        engine_for(precision="fp16")


def test_one_process_has_nothing_to_spread(asked_for):
    engine = engine_for()
    assert str(engine) == "1 process on cpu"
    assert type(engine.optimizer.optimizer) is torch.optim.AdamW
