"""FLOPs are those of the formulas on paper, and counting them leaves everything as it was."""

import pytest
import torch
from torch import nn

from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.training.flops import (
    PUBLISHED_PEAKS,
    Peak,
    count_flops,
    flop_use,
    matmul_precision,
    peak_of,
    published_peak,
    training_flops,
)
from pixcell.training.memory import hollow
from pixcell.training.objectives import Losses
from pixcell.training.recipe import build_objective

CPU = torch.device("cpu")


def test_a_linear_layer_costs_two_forward_and_four_backward_by_weight_and_row():
    with hollow():
        model = nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(5, 3, bias=False))
        rows = torch.empty(11, 7)
        found = count_flops(model, lambda: model(rows).sum())
    # The first layer's input wants no gradient.
    assert found == 11 * (6 * 5 * 3 + 4 * 7 * 5)


def transformer(**changes):
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
        "num_layers": 3, "cross_attention_dim": 32, "sample_size": 16, "caption_channels": 12,
    }  # fmt: skip
    return PixCellTransformer2DModel(**{**settings, **changes})


def flops_of(count, **changes):
    with hollow():
        model = transformer(**changes)
        tokens = torch.empty(count, model.config.caption_num_tokens, 12)
        latents = torch.empty(count, 4, 16, 16)
        return count_flops(model, lambda: model(latents, 500.0, tokens).sample.sum())


def test_a_block_costs_what_its_products_cost():
    """Per token: query, key, value, out (4 w^2), MLP (8 w^2), scores and their sums (2 tokens w): all times 2
    for multiply and add, and times 3 for forward and backward."""
    tokens, width = 64, 32
    block = 6 * tokens * (12 * width**2 + 2 * tokens * width)
    # Once a sample: value and out of the one condition token.
    condition = 6 * 2 * width**2
    assert flops_of(1, num_layers=4) - flops_of(1, num_layers=3) == block + condition


def test_flops_grow_with_the_samples():
    assert flops_of(5) - flops_of(3) == flops_of(3) - flops_of(1)


def test_what_is_computed_twice_counts_once():
    with hollow():
        model = transformer()
        latents, tokens = torch.empty(2, 4, 16, 16), torch.empty(2, 1, 12)
        once = count_flops(model, lambda: model(latents, 500.0, tokens).sample.sum())
        model.enable_gradient_checkpointing()
        assert count_flops(model, lambda: model(latents, 500.0, tokens).sample.sum()) == once
        assert model.gradient_checkpointing


@pytest.fixture
def batch_of():
    from torch.utils.data import default_collate

    from pixcell.training.determinism import rng_for

    def draw(objective, count=2):
        rngs = [rng_for(0, place) for place in range(count)]
        return {**default_collate(objective.samples.draw(range(count), rngs)), "step": 0}

    return draw


def test_counting_a_real_objective_touches_nothing(recipe, batch_of):
    objective = build_objective(recipe())
    batch = batch_of(objective)
    before = {name: value.clone() for name, value in objective.trainable.state_dict().items()}
    loss = objective.loss(batch).per_sample
    assert (training_flops(objective, batch) or 0) > 1e5
    assert all(torch.equal(value, before[name]) for name, value in objective.trainable.state_dict().items())
    assert all(weight.grad is None for weight in objective.trainable.parameters())
    assert torch.equal(objective.loss(batch).per_sample, loss)


def test_tables_made_while_counting_have_content(recipe, batch_of):
    """The noise schedule computes its tables at first use: that must not be the hollow one."""
    objective = build_objective(recipe())
    batch = batch_of(objective)
    training_flops(objective, batch)
    assert objective.loss(batch).per_sample.isfinite().all()
    assert type(objective.schedule.alpha_bar) is torch.Tensor


def test_a_loss_that_looks_at_values_cannot_be_counted(recipe, batch_of, monkeypatch):
    objective = build_objective(recipe())
    loss = objective.loss

    def looks(batch):
        found = loss(batch)
        return Losses(found.per_sample * (2.0 if found.per_sample.sum().item() > 0 else 1.0))

    monkeypatch.setattr(objective, "loss", looks)
    assert training_flops(objective, batch_of(objective)) is None


@pytest.mark.parametrize(
    ("name", "products", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA A10", "fp16", 125),
        ("NVIDIA A10G", "fp16", None),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla T4", "fp32", 8.1),
        ("NVIDIA GeForce GTX 1080", "fp32", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, products, tflops):
    found = published_peak(name, products)
    assert found is None if tflops is None else found == pytest.approx(tflops * 1e12)


def test_lower_precision_is_never_slower_by_the_makers_word():
    for _, peaks in PUBLISHED_PEAKS:
        order = [peaks[name] for name in ("fp32", "tf32", "fp16") if name in peaks]
        assert order == sorted(order)


def test_a_processor_is_measured_and_says_so():
    peak = peak_of(CPU, "fp32")
    assert peak.is_measured
    assert "timed here" in str(peak)
    assert 1e9 < peak.flops_per_s < 1e14


def test_flop_use_counts_all_devices():
    peak = Peak(1e12, "device", "bf16", is_measured=False)
    assert flop_use(1e9, 800, peak, num_devices=4) == pytest.approx(0.2)


def test_the_precision_of_products_is_given_back_also_after_an_error():
    before = torch.get_float32_matmul_precision()
    with matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(ValueError, match="fails"), matmul_precision("high"):
            raise ValueError("fails")
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
