"""Two processes are one run: the same samples, the same losses, the same weights, within rounding.

Real processes under torchrun, exchanging by gloo; one launch for all tests, since starting takes longest.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import many_processes
from pixcell.config import load_recipe, save_recipe
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.tasks.train import train
from pixcell.training.checkpoints import Checkpoint
from pixcell.training.metrics import read_metrics
from pixcell.training.recipe import TrainRecipe

SCRIPT = Path(many_processes.__file__)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are told to stop by POSIX signals")


def start(arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=400, check=False, **options
    )


@pytest.fixture(scope="module")
def launched(recipe, tmp_path_factory):
    """Every scenario of two processes, after one that trained alone and was killed."""
    folder = tmp_path_factory.mktemp("processes")
    # Where a gradient is nothing but rounding, a smaller eps would blow it up to a whole step.
    chosen = recipe("model.num_layers=2", "optimizer.eps=1e-5", "trainer.keep_last=9")
    save_recipe(chosen, folder / "recipe.yaml")
    alone = start([str(SCRIPT), str(folder), "alone"])
    assert alone.returncode == -9, alone.stderr
    pair = start([*TORCHRUN, str(SCRIPT), str(folder), "ddp", "micro", "fsdp2", "told", "pair"])
    train(chosen, folder / "whole")
    return {"folder": folder, "pair": pair}


@pytest.fixture(scope="module")
def deepspeed(launched):
    """A run that one process began, ZeRO 2 went on with and was killed, ZeRO 1 ended; and two more."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install 'pixcell[deepspeed]'")
    folder = launched["folder"]
    train(load_recipe(TrainRecipe, folder / "recipe.yaml", ["trainer.steps=2"]), folder / "zero-chain")
    killed = start([*TORCHRUN, str(SCRIPT), str(folder), "zero1", "zero2", "zero-killed"])
    assert Checkpoint.find(folder / "zero-chain").step == 4, killed.stderr
    rest = start([*TORCHRUN, str(SCRIPT), str(folder), "zero-rest", "zero-blown-up"])
    assert Checkpoint.find(folder / "zero-chain").step == 6, rest.stderr
    return {"folder": folder, "killed": killed, "rest": rest}


def weights(run, step=None):
    place = run if step is None else run / "checkpoints" / f"step-{step:08d}"
    state = Checkpoint.find(place).state
    return {
        f"{kind}.{name}": value
        for kind in ("weights", "averages")
        for name, value in load_file(state / f"{kind}.safetensors").items()
    }


def assert_same_within_rounding(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Sums in another order, over six steps of Adam: a thousandth of what a weight moved (lr 1e-3 a step).
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=5e-6)


def assert_saved_as_by_one_process(place, expected):
    """The optimiser's state of two checkpoints: whole, plain tensors, the same within rounding."""
    found, expected = (
        torch.load(Checkpoint.find(path).state / "optimizer.pt", weights_only=True)["optimizer"]
        for path in (place, expected)
    )
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for place, moments in expected["state"].items():
        assert found["state"][place].keys() == moments.keys()
        for name, moment in moments.items():
            assert type(found["state"][place][name]) is torch.Tensor
            torch.testing.assert_close(found["state"][place][name], moment, rtol=1e-3, atol=1e-7)


def figure(run, name="loss"):
    return {line["step"]: line[name] for line in read_metrics(run / "metrics.jsonl") if name in line}


def samples_by_step(folder, name, processes):
    """The samples of each step, in the order of their places in the batch."""
    found = {}
    for rank in range(processes):
        for line in (folder / f"{name}.{rank}.jsonl").read_text().splitlines():
            step, keys = json.loads(line)
            found[step] = found.get(step, []) + keys
    return found


@pytest.mark.parametrize("scenario", ["ddp", "micro"])
def test_two_processes_have_the_losses_and_weights_of_one(launched, scenario):
    folder = launched["folder"]
    assert (folder / f"{scenario}.1.jsonl").is_file(), launched["pair"].stderr
    assert figure(folder / scenario) == pytest.approx(figure(folder / "whole"), rel=1e-5)
    assert_same_within_rounding(weights(folder / scenario), weights(folder / "whole"))
    assert "2 processes (DDP over gloo)" in launched["pair"].stderr


def test_sharded_weights_are_those_of_one_process_and_saved_in_its_layout(launched):
    folder = launched["folder"]
    assert "2 processes (FSDP2 over gloo)" in launched["pair"].stderr
    expected = {step: loss for step, loss in figure(folder / "whole").items() if step <= 4}
    assert figure(folder / "fsdp2") == pytest.approx(expected, rel=1e-5)
    assert_same_within_rounding(weights(folder / "fsdp2"), weights(folder / "whole", 4))
    assert_saved_as_by_one_process(folder / "fsdp2", folder / "whole" / "checkpoints" / "step-00000004")


def test_a_model_is_previewed_and_exported_whole_while_it_is_sharded(launched):
    folder = launched["folder"]
    exported = PixCellPipeline.from_pretrained(Checkpoint.find(folder / "fsdp2").pipeline)
    averages = load_file(Checkpoint.find(folder / "fsdp2").state / "averages.safetensors")
    for name, weight in exported.transformer.named_parameters():
        assert torch.equal(weight, averages[name])
    expected = figure(folder / "whole", "held_out/mse")
    assert figure(folder / "fsdp2", "held_out/mse") == pytest.approx(
        {step: expected[step] for step in (2, 4)}, rel=1e-4
    )
    assert (folder / "fsdp2" / "previews" / "step-00000004.png").is_file()


def test_a_sharded_run_goes_on_in_one_process(launched):
    folder = launched["folder"]
    result = train(load_recipe(TrainRecipe, folder / "recipe.yaml"), folder / "fsdp2")
    assert result.step == 6
    assert_same_within_rounding(weights(folder / "fsdp2"), weights(folder / "whole"))


def test_a_signal_to_one_process_stops_and_saves_in_all(launched):
    folder = launched["folder"]
    assert Checkpoint.find(folder / "told").step == 3
    for rank in (0, 1):
        assert f"told.{rank}: SIGTERM" in launched["pair"].stdout


def test_one_process_that_is_killed_ends_the_others(launched):
    pair = launched["pair"]
    assert pair.returncode != 0
    assert "pair.0: process 0 lost the others" in pair.stdout
    assert "goes on from the last checkpoint" in pair.stdout


def test_killed_and_gone_on_with_by_one_then_two_then_one_process(launched):
    """Killed in step 3, alone; gone on from 2 as a pair, killed in step 5; gone on from 4 alone."""
    folder = launched["folder"]
    assert Checkpoint.find(folder / "chain").step == 4
    for name, run in (("rest", "chain"), ("all", "again")):
        many_processes.train_scenario(folder, name, run)
    expected = samples_by_step(folder, "all", 1)
    assert samples_by_step(folder, "alone", 1) == {step: expected[step] for step in (1, 2, 3)}
    pair = samples_by_step(folder, "pair", 2)
    assert {step: pair[step] for step in (3, 4)} == {step: expected[step] for step in (3, 4)}
    assert samples_by_step(folder, "rest", 1) == {step: expected[step] for step in (5, 6)}
    assert_same_within_rounding(weights(folder / "chain"), weights(folder / "whole"))


@pytest.mark.parametrize(("stage", "step"), [(1, 6), (2, 4)])
def test_deepspeed_has_the_losses_and_weights_of_one_process_and_saves_in_its_layout(deepspeed, stage, step):
    folder = deepspeed["folder"]
    assert f"2 processes (DeepSpeed ZeRO {stage} over gloo)" in deepspeed["killed"].stderr
    whole = folder / "whole" / "checkpoints" / f"step-{step:08d}"
    for name in ("loss", "gradient_norm"):
        expected = {place: value for place, value in figure(folder / "whole", name).items() if place <= step}
        assert figure(folder / f"zero{stage}", name) == pytest.approx(expected, rel=1e-5)
    assert_same_within_rounding(weights(folder / f"zero{stage}"), weights(whole))
    assert_saved_as_by_one_process(folder / f"zero{stage}", whole)
    assert PixCellPipeline.from_pretrained(Checkpoint.find(folder / f"zero{stage}").pipeline)


def test_a_run_goes_from_one_process_to_deepspeed_is_killed_and_goes_on(deepspeed):
    """One process to step 2; two under ZeRO 2, killed in step 5; gone on from 4 by two under ZeRO 1."""
    folder = deepspeed["folder"]
    assert "zero-killed.0: process 0 lost the others" in deepspeed["killed"].stdout
    pair, alone = samples_by_step(folder, "zero-rest", 2), samples_by_step(folder, "zero1", 2)
    assert {step: sorted(keys) for step, keys in pair.items()} == {
        step: sorted(alone[step]) for step in (5, 6)
    }
    assert_same_within_rounding(weights(folder / "zero-chain"), weights(folder / "whole"))


def test_a_run_under_deepspeed_goes_on_in_one_process(deepspeed):
    folder = deepspeed["folder"]
    result = train(load_recipe(TrainRecipe, folder / "recipe.yaml"), folder / "zero2")
    assert result.step == 6
    assert_same_within_rounding(weights(folder / "zero2"), weights(folder / "whole"))


def test_a_gradient_of_one_process_that_is_no_number_ends_all_under_deepspeed(deepspeed):
    for rank in (0, 1):
        assert f"zero-blown-up.{rank}: the gradient became inf at step 3" in deepspeed["rest"].stdout
    assert Checkpoint.find(deepspeed["folder"] / "zero-blown-up").step == 2
