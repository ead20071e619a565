"""The engine in one process; see test_processes.py for several."""

import io
import math

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from pixcell.errors import OutputError, RecipeError
from pixcell.training import engine as engine_module
from pixcell.training.engine import Engine
from pixcell.training.optimizers import AdamWConfig, CameConfig, make_optimizer
from pixcell.training.trainer_config import TrainerConfig
from tiny_objective import Line, fit, weights


def engine_for(objective=None, **settings):
    objective = objective or Line()
    config = TrainerConfig(**{"steps": 1, "batch_size": 4, "device": "cpu", **settings})
    return Engine(objective, lambda model: torch.optim.AdamW(model.parameters(), lr=0.1), config)


def samples(objective, count=4):
    rngs = [np.random.default_rng(place) for place in range(count)]
    return torch.utils.data.default_collate(objective.samples.draw(range(count), rngs))


def test_other_weights_are_held_for_a_block_and_come_back_bit_for_bit_even_after_an_error():
    engine = engine_for()
    own = {name: weight.clone() for name, weight in engine.trainable.state_dict().items()}
    kept = engine.weights()

    def look_and_fail():
        with engine.holding({name: weight + 1 for name, weight in own.items()}):
            assert not engine.trainable.training
            for name, weight in engine.trainable.named_parameters():
                assert torch.equal(weight, own[name] + 1)
            assert all(torch.equal(kept[name], own[name]) for name in own)  # what was gathered stays
            raise KeyError

    with pytest.raises(KeyError):
        look_and_fail()
    assert engine.trainable.training
    assert all(torch.equal(weight, own[name]) for name, weight in engine.trainable.state_dict().items())


def test_micro_batches_add_up_to_the_gradient_of_the_batch():
    gradients = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        objective = Line()
        engine = engine_for(objective)
        batch = samples(objective)
        for part in parts:
            engine.forward_backward(
                {name: value[part] for name, value in batch.items()}, 1 / 4, part.stop == 4
            )
        gradients.append(torch.cat([weight.grad.flatten() for weight in engine.trainable.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_row_that_does_not_count_has_no_part_in_loss_and_gradient():
    gradients = []
    for rows, counts in ((slice(0, 4), torch.tensor([True, False, True, True])), ([0, 2, 3], None)):
        objective = Line()
        engine = engine_for(objective)
        batch = {
            name: np.array(value)[rows].tolist() if name == "key" else value[rows]
            for name, value in samples(objective).items()
        }
        assert len(engine.forward_backward(batch, 1 / 4, True, counts).per_sample) == 3
        gradients.append(torch.cat([weight.grad.flatten() for weight in engine.trainable.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_step_without_a_finite_gradient_is_not_taken():
    engine = engine_for()
    before = {name: weight.clone() for name, weight in engine.trainable.state_dict().items()}
    for weight in engine.trainable.parameters():
        weight.grad = torch.full_like(weight, torch.inf)
    assert not np.isfinite(engine.move_weights(0.1, 1.0))
    assert all(torch.equal(weight, before[name]) for name, weight in engine.trainable.state_dict().items())


def test_what_fails_in_the_main_process_is_raised_there():
    def fail():
        raise OutputError("full")

    with pytest.raises(OutputError, match="full"):
        engine_for().in_main(fail)


@pytest.mark.parametrize("repeated", [(), ("Linear",)])
def test_compiling_changes_neither_names_nor_losses(tmp_path, monkeypatch, repeated):
    # The compiler's front end alone: its back end takes half a minute and is not ours to test.
    monkeypatch.setattr(engine_module, "_COMPILE", {"backend": "aot_eager"})
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    objective = Line()
    objective.trainable._repeated_blocks = repeated
    engine_for(objective, compile=True)
    assert compiled == (["Linear", "Linear"] if repeated else ["_LossOf"])
    monkeypatch.undo()
    monkeypatch.setattr(engine_module, "_COMPILE", {"backend": "aot_eager"})
    objective = Line()
    objective.trainable._repeated_blocks = repeated
    fit(tmp_path / "compiled", objective, compile=True, steps=3)
    fit(tmp_path / "plain", steps=3)
    found, expected = weights(tmp_path / "compiled"), weights(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_half_precision_without_a_gpu_is_refused_not_ignored():
    with pytest.raises(RecipeError, match="fp16 needs a GPU"):
        engine_for(precision="fp16")


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch):
    """Else each of them would train the same run alone, in the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="started 2 processes, and accelerate joins 1"):
        engine_for(device="auto")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params is not supported"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "trainer.gradient_checkpointing=true"),
    ],
)
def test_settings_of_a_launcher_that_cannot_be_kept_are_refused(monkeypatch, variable, value, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=message):
        engine_for()


def test_what_a_launcher_says_of_the_step_is_not_used(monkeypatch):
    """A config with accumulation of 4 would divide the loss by 4 once more."""
    gradients = []
    for environment in (
        {},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16"},
    ):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        objective = Line()
        engine = engine_for(objective)
        engine.forward_backward(samples(objective), 1 / 4, True)
        gradients.append(torch.cat([weight.grad.flatten() for weight in engine.trainable.parameters()]))
    assert torch.equal(gradients[0], gradients[1])


def test_it_says_how_the_work_is_spread():
    assert str(engine_for()) == "1 process on cpu"


@pytest.mark.parametrize("optimizer", [AdamWConfig(lr=1e-2), CameConfig(lr=1e-2)])
def test_a_loss_scale_leaves_out_what_overflows_and_goes_on_bit_for_bit(optimizer):
    """On a CPU, where fp16 itself is refused: its scale is the same."""

    def scaled():
        engine = Engine(
            Line(),
            lambda model: make_optimizer(model, optimizer),
            TrainerConfig(steps=9, batch_size=4, device="cpu"),
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
        engine.accelerator.scaler = scaler
        engine.accelerator.native_amp = True
        engine.accelerator.state._mixed_precision = "fp16"
        engine.optimizer = AcceleratedOptimizer(engine.optimizer.optimizer, scaler=scaler)
        engine.accelerator._optimizers[:] = [engine.optimizer]
        return engine, samples(Line())

    def step(engine, batch, share=1 / 4):
        engine.forward_backward(batch, share, is_last=True)
        return engine.move_weights(1e-2, clip_norm=0.5)

    torch.manual_seed(0)
    plain = step(engine_for(), samples(Line()))
    torch.manual_seed(0)
    engine, batch = scaled()
    assert step(engine, batch) == pytest.approx(plain, rel=1e-3)  # the scale is taken out before clipping
    before = {name: weight.clone() for name, weight in engine.weights().items()}
    assert not math.isfinite(step(engine, batch, share=1e38))
    assert all(torch.equal(weight, before[name]) for name, weight in engine.weights().items())
    assert engine.accelerator.scaler.get_scale() == 512
    step(engine, batch)
    state = io.BytesIO()
    torch.save({"weights": engine.weights(), "optimizer": engine.optimizer_state()}, state)
    again, _ = scaled()
    kept = torch.load(io.BytesIO(state.getvalue()), weights_only=True)
    again.load_weights(kept["weights"], "state")
    again.load_optimizer_state(kept["optimizer"])
    for _ in range(3):
        assert step(again, batch) == step(engine, batch)
    assert again.accelerator.scaler.state_dict() == engine.accelerator.scaler.state_dict()
    assert engine.accelerator.scaler.get_scale() == 1024  # grown again after three good steps
    weights_of_both = zip(again.weights().values(), engine.weights().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights_of_both)
