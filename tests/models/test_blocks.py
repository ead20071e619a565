"""A block is diffusers' own block; what it leaves out cannot matter."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from pixcell.models.blocks import PixCellBlock
from tiny_models import awake

WIDTH = 32
# Everything here is float64: what remains is the order of sums.
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture
def block() -> PixCellBlock:
    return make_block()


def make_block(dropout: float = 0.0) -> PixCellBlock:
    torch.manual_seed(0)
    return awake(
        PixCellBlock(
            WIDTH,
            4,
            8,
            dropout=dropout,
            cross_attention_dim=WIDTH,
            activation_fn="gelu-approximate",
            attention_bias=True,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        )
    ).double()


def inputs(num_tokens: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    sizes = ((3, 20, WIDTH), (3, num_tokens, WIDTH), (rows, 6 * WIDTH))
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)


def plain(block, hidden_states, condition, modulation):
    """The full computation, scores and all, with the same weights."""
    return BasicTransformerBlock.forward(
        block, hidden_states, encoder_hidden_states=condition, timestep=modulation.expand(3, -1)
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 4, 9])
@torch.no_grad()
def test_a_block_is_the_plain_block(block, num_tokens, rows):
    """One modulation for all samples, or one each."""
    given = inputs(num_tokens, rows)
    torch.testing.assert_close(block(*given), plain(block, *given), **CLOSE)


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_gradients_are_those_of_the_plain_block(block, num_tokens):
    given = inputs(num_tokens)
    gradients = []
    for forward in (plain, lambda block, *given: block(*given)):
        block.zero_grad(set_to_none=True)
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        forward(block, *leaves).square().sum().backward()
        named = {name: parameter.grad for name, parameter in block.named_parameters()}
        gradients.append([*(leaf.grad for leaf in leaves), *named.values()])
    largest = max(gradient.abs().max() for gradient in gradients[0])
    for ours, full in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, full, rtol=1e-9, atol=1e-12 * largest.item())


def test_with_one_condition_token_queries_and_keys_cannot_learn(block):
    """In the plain block their gradient is rounding noise; here it is zero, and it is there."""
    given = inputs(1)
    names = [f"attn2.{layer}.{kind}" for layer in ("to_q", "to_k") for kind in ("weight", "bias")]
    plain(block, *given).square().sum().backward()
    full = {name: block.get_parameter(name).grad.abs().max().item() for name in names}
    assert max(full.values()) < 1e-12 * block.attn2.to_v.weight.grad.abs().max().item()
    block.zero_grad(set_to_none=True)
    block(*given).square().sum().backward()
    for name in names:
        parameter = block.get_parameter(name)
        assert parameter.grad.shape == parameter.shape
        assert not parameter.grad.any()
        parameter.grad.add_(1)  # a tensor of its own, as optimisers need it
        assert parameter.grad.sum() == parameter.numel()


def test_zero_gradients_add_to_what_is_there(block):
    block.attn2.to_q.weight.grad = torch.ones_like(block.attn2.to_q.weight)
    block(*inputs(1)).sum().backward()
    assert (block.attn2.to_q.weight.grad == 1).all()


@pytest.mark.parametrize("training", [False, True])
def test_with_one_condition_token_no_query_key_or_score_is_computed(block, training):
    for layer in (block.attn2, block.attn2.to_q, block.attn2.to_k):
        layer.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    with torch.set_grad_enabled(training):
        block.train(training)(*inputs(1))


def test_frozen_queries_and_keys_get_no_gradient(block):
    block.attn2.to_q.requires_grad_(False)
    block.attn2.to_k.requires_grad_(False)
    block(*inputs(1)).sum().backward()
    assert block.attn2.to_q.weight.grad is None
    assert block.attn2.to_v.weight.grad.any()


@pytest.mark.parametrize("num_tokens", [1, 4])
@torch.no_grad()
def test_a_prepared_condition_gives_the_same_bits(block, num_tokens):
    hidden_states, condition, modulation = inputs(num_tokens)
    prepared = block.prepare(condition)
    assert (prepared.key is None) == (num_tokens == 1)
    assert torch.equal(
        block(hidden_states, prepared, modulation), block(hidden_states, condition, modulation)
    )


def test_dropout_drops_for_each_image_token_as_in_the_plain_block():
    """Then what image tokens receive is not one vector, and the shortcut is not taken."""
    block, given = make_block(dropout=0.5).train(), inputs(1)
    torch.manual_seed(3)
    ours = block(*given)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, plain(block, *given), **CLOSE)
    assert block.prepare(given[1]).key is not None
    assert block.eval().prepare(given[1]).key is None


@torch.no_grad()
def test_a_residual_is_added_to_the_output(block):
    given, residual = inputs(4), torch.randn(3, 20, WIDTH)
    assert torch.equal(block(*given, residual), block(*given) + residual)


class TestAdapters:
    """Low-rank adapters wrap the projections; the shortcut goes through the wrapped ones."""

    @pytest.fixture
    def adapted(self, block) -> PixCellBlock:
        from peft import LoraConfig, inject_adapter_in_model

        names = ["attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
        adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=names), block).double()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        return adapted

    @pytest.mark.parametrize("num_tokens", [1, 4])
    @torch.no_grad()
    def test_an_adapted_block_is_the_plain_adapted_block(self, adapted, num_tokens):
        given = inputs(num_tokens)
        torch.testing.assert_close(adapted(*given), plain(adapted, *given), **CLOSE)
        assert not torch.allclose(adapted(*given), make_block()(*given))

    @torch.no_grad()
    def test_with_one_token_adapters_of_queries_and_keys_change_nothing(self, adapted):
        given = inputs(1)
        before = adapted(*given)
        for layer in (adapted.attn2.to_q, adapted.attn2.to_k):
            layer.lora_B["default"].weight.normal_()
        assert torch.equal(adapted(*given), before)
        adapted.attn2.to_v.lora_B["default"].weight.normal_()
        assert not torch.allclose(adapted(*given), before)

    def test_their_gradient_is_zero_and_that_of_the_others_is_not(self, adapted):
        adapted(*inputs(1)).square().sum().backward()
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                assert parameter.grad.any() == ("to_v" in name or "to_out" in name), name
            else:
                assert parameter.grad is None

    def test_dropout_in_an_adapter_of_the_output_is_for_each_image_token(self, block):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=2, target_modules=["attn2.to_out.0"], lora_dropout=0.5)
        adapted = inject_adapter_in_model(config, block).double().train()
        assert adapted.prepare(inputs(1)[1]).key is not None


def test_image_attention_is_that_of_diffusers_to_the_last_bit():
    from diffusers.models.attention_processor import AttnProcessor2_0

    block = make_block().float()
    tokens = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(0))
    ours = block.attn1(tokens)
    block.attn1.set_processor(AttnProcessor2_0())
    assert torch.equal(ours, block.attn1(tokens))


def test_in_bfloat16_few_tokens_attend_in_float32_where_that_is_faster():
    """Nearer to the truth than all in bfloat16; and only in training, on a processor."""
    block = make_block().float()
    tokens = torch.randn(2, 64, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        truth = block.attn1(tokens)
        sampled = block.bfloat16().attn1(tokens.bfloat16())
    trained = block.attn1(tokens.bfloat16())
    assert trained.dtype == sampled.dtype == torch.bfloat16
    assert (trained.float() - truth).abs().mean() <= 1.02 * (sampled.float() - truth).abs().mean()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block.attn1(tokens.bfloat16()), trained)
