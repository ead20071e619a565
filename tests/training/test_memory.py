"""What is predicted before a tensor is made is what is there afterwards."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.training.averages import AveragedWeights
from pixcell.training.memory import activation_bytes, bytes_of, hollow, state_bytes
from pixcell.training.optimizers import AdamW8bitConfig, AdamWConfig, CameConfig, make_optimizer


def transformer():
    return PixCellTransformer2DModel(
        num_attention_heads=4, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=4,
        cross_attention_dim=96, sample_size=32, caption_channels=16, caption_num_tokens=4,
    )  # fmt: skip


def loss_of_transformer(model, count=8):
    return model(torch.zeros(count, 4, 32, 32), 500.0, torch.zeros(count, 4, 16)).sample.square().mean()


def autoencoder():
    return TissueAutoencoder(4, (16, 32), 2)


def loss_of_autoencoder(model, count=8):
    images = torch.zeros(count, 3, 64, 64)
    return model.decode(model.encode(images).latent_dist.mode()).sample.square().mean()


@pytest.mark.parametrize(
    "optimizer", [AdamWConfig(), CameConfig(), AdamW8bitConfig()], ids=lambda config: config.name
)
def test_state_is_predicted_to_the_byte(optimizer):
    if optimizer.name == "adamw-8bit":
        pytest.importorskip("bitsandbytes", reason="the extra 8bit is not installed")
    with torch.device("meta"):
        predicted = state_bytes(transformer(), optimizer, 2)
    model = transformer()
    taken = make_optimizer(model, optimizer)
    averages = AveragedWeights(model, (0.9, 0.99))
    loss_of_transformer(model, 2).backward()
    taken.step()
    moments = [value for value in tree_leaves(taken.state_dict()["state"]) if isinstance(value, torch.Tensor)]
    assert predicted.weights == bytes_of([*model.parameters(), *model.buffers()])
    assert predicted.gradients == bytes_of(weight.grad for weight in model.parameters())
    assert predicted.moments == bytes_of(moment for moment in moments if moment.ndim)
    assert predicted.averages == bytes_of(value for one in averages.averages for value in one.values())


def test_frozen_weights_have_neither_gradients_nor_moments():
    def half_frozen():
        model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
        model[0].requires_grad_(False)
        return model

    with torch.device("meta"):
        kept = state_bytes(half_frozen(), AdamWConfig())
    assert (kept.weights, kept.gradients, kept.moments, kept.averages) == (800, 400, 800, 400)


def test_a_model_with_content_is_not_moved():
    with pytest.raises(ValueError, match="meta device"):
        state_bytes(nn.Linear(2, 2), AdamWConfig())


def allocated(make_model, loss, autocast=None):
    """What the allocator handed out at most during forward and backward, beside what was there before."""
    model = make_model()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            result = loss(model)
        result.backward()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("make_model", "loss"),
    [(transformer, loss_of_transformer), (autoencoder, loss_of_autoencoder)],
    ids=["transformer", "autoencoder"],
)
def test_activations_are_estimated_within_a_tenth_of_what_is_allocated(make_model, loss, autocast):
    measured = allocated(make_model, loss, autocast)
    with hollow():
        model = make_model()
        estimated = activation_bytes(model, lambda: loss(model), autocast)
    # Kernels take scratch memory of their own, which operations do not show.
    assert estimated == pytest.approx(measured, rel=0.1)


def test_gradient_checkpointing_saves_what_it_says():
    with hollow():
        model = transformer()
        whole = activation_bytes(model, lambda: loss_of_transformer(model))
        model.enable_gradient_checkpointing()
        saved = activation_bytes(model, lambda: loss_of_transformer(model))
    assert saved < 0.5 * whole


def test_activations_grow_with_the_batch_and_nothing_is_allocated_for_large_models():
    with hollow():
        model = PixCellTransformer2DModel(num_layers=3, sample_size=128, caption_num_tokens=16)

        def found(count):
            return activation_bytes(
                model,
                lambda: model(
                    torch.empty(count, 16, 128, 128), 500.0, torch.empty(count, 16, 1536)
                ).sample.mean(),
                torch.bfloat16,
            )

        one, two = found(1), found(2)
    assert 1.8 < two / one < 2.01
    assert one > 2**29  # of three blocks of 28
