"""The control branch is the published one, and an untrained one changes nothing."""

import json

import pytest
import torch

from golden_vectors import FOLDER, load
from pixcell.errors import ModelError
from pixcell.models.controlnet import PixCellControlNetModel
from pixcell.models.transformer import PixCellTransformer2DModel
from tiny_models import awake, tiny_controlnet, tiny_transformer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # of one forward pass, as tests/golden says


def part(tensors, name):
    prefix = f"w.{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def golden():
    tensors, case = load("controlnet")
    branch = PixCellControlNetModel(**case["config"]["controlnet"]).eval()
    branch.load_state_dict(part(tensors, "controlnet"), strict=True)
    transformer = PixCellTransformer2DModel(**case["config"]["transformer"]).eval()
    transformer.load_state_dict(part(tensors, "transformer"), strict=True)
    return branch, transformer, tensors


def inputs(tensors):
    return tensors["in.hidden_states"], tensors["in.timestep"], tensors["in.encoder_hidden_states"]


def some_inputs(seed=0, batch_size=3):
    generator = torch.Generator().manual_seed(seed)
    latents, control = (torch.randn(batch_size, 4, 16, 16, generator=generator) for _ in range(2))
    return latents, torch.tensor(300), torch.randn(batch_size, 4, 12, generator=generator), control


class TestPublished:
    def test_names_and_shapes_at_full_size(self):
        manifest = json.loads((FOLDER / "manifest_pixcell_controlnet.json").read_text())
        with torch.device("meta"):
            branch = PixCellControlNetModel(**manifest["config"])
        expected = dict(manifest["others"])
        for block in range(manifest["num_blocks"]):
            expected |= {f"transformer_blocks.{block}.{name}": s for name, s in manifest["block"].items()}
        assert {name: list(tensor.shape) for name, tensor in branch.state_dict().items()} == expected
        assert len(expected) == manifest["num_tensors"]
        parameters = sum(parameter.numel() for parameter in branch.parameters())
        assert parameters == manifest["num_trainable_elements"]
        buffers = {name for name, _ in branch.named_buffers() if name in expected}
        assert buffers == set(manifest["buffers_in_state_dict"])
        assert {key: branch.config[key] for key in manifest["config"]} == manifest["config"]

    @pytest.mark.parametrize(("scale", "suffix"), [(1.0, ""), (0.7, "_scale07")])
    @torch.no_grad()
    def test_residuals_and_the_controlled_prediction_are_the_references(self, golden, scale, suffix):
        branch, transformer, tensors = golden
        residuals = branch(*inputs(tensors), tensors["in.conditioning"], scale).block_controlnet_hidden_states
        assert len(residuals) == 2
        for index, residual in enumerate(residuals):
            torch.testing.assert_close(residual, tensors[f"out.residual_{index}{suffix}"], **CLOSE)
        sample = transformer(*inputs(tensors), residuals).sample
        torch.testing.assert_close(sample, tensors[f"out.sample{suffix}"], **CLOSE)

    @torch.no_grad()
    def test_fewer_residuals_than_blocks_leave_the_last_blocks_alone(self, golden):
        branch, transformer, tensors = golden
        residuals = branch(*inputs(tensors), tensors["in.conditioning"]).block_controlnet_hidden_states
        first = transformer(*inputs(tensors), residuals[:1]).sample
        torch.testing.assert_close(first, tensors["out.sample_partial"], **CLOSE)
        none = transformer(*inputs(tensors)).sample
        torch.testing.assert_close(none, tensors["out.sample_without_control"], **CLOSE)

    @torch.no_grad()
    def test_positions_are_added_twice_as_in_the_reference_unless_switched_off(self, golden):
        """The reference adds its table to the control patches too, which its weights need."""
        branch, _, tensors = golden
        once = PixCellControlNetModel(**{**branch.config, "control_positions": False}).eval()
        once.load_state_dict(branch.state_dict(), strict=True)
        twice_tokens, once_tokens = [], []
        for model, tokens in ((branch, twice_tokens), (once, once_tokens)):
            hook = model.transformer_blocks[0].register_forward_pre_hook(
                lambda _m, given, tokens=tokens: tokens.append(given[0])
            )
            residuals = model(*inputs(tensors), tensors["in.conditioning"]).block_controlnet_hidden_states
            hook.remove()
        table = branch.pos_embed.pos_embed
        torch.testing.assert_close(twice_tokens[0] - once_tokens[0], table.expand(2, -1, -1), **CLOSE)
        assert (residuals[0] - tensors["out.residual_0"]).abs().max() > 0.1


class TestFromTransformer:
    def test_the_first_blocks_are_copied_and_what_is_new_is_zero(self):
        transformer = tiny_transformer(num_layers=3)
        branch = PixCellControlNetModel.from_transformer(transformer)
        own, given = branch.state_dict(), transformer.state_dict()
        new = {name for name in own if name not in given}
        assert new == {f"cond_pos_embed.proj.{kind}" for kind in ("weight", "bias")} | {
            f"controlnet_blocks.{index}.{kind}" for index in range(2) for kind in ("weight", "bias")
        }
        assert all(torch.equal(own[name], given[name]) for name in own if name not in new)
        assert not any(own[name].any() for name in new)
        assert {name for name in given if name not in own} == {
            name for name in given if name.startswith("transformer_blocks.2.")
        }

    @torch.no_grad()
    def test_an_untrained_branch_changes_nothing(self):
        transformer = tiny_transformer(num_layers=3)
        latents, timestep, embeddings, control = some_inputs()
        for positions in (True, False):
            branch = PixCellControlNetModel.from_transformer(transformer, control_positions=positions)
            residuals = branch(latents, timestep, embeddings, control).block_controlnet_hidden_states
            plain = transformer(latents, timestep, embeddings).sample
            assert torch.equal(transformer(latents, timestep, embeddings, residuals).sample, plain)

    @torch.no_grad()
    def test_its_blocks_begin_with_what_those_of_the_denoiser_see(self):
        """So the copied weights mean what they meant; the published branch does not begin so."""
        transformer = tiny_transformer(num_layers=2)
        latents, timestep, embeddings, control = some_inputs()

        def first_tokens(model, *arguments):
            seen = []
            hook = model.transformer_blocks[0].register_forward_pre_hook(
                lambda _m, given: seen.append(given[0])
            )
            model(*arguments)
            hook.remove()
            return seen[0]

        expected = first_tokens(transformer, latents, timestep, embeddings)
        for positions, same in ((False, True), (True, False)):
            branch = PixCellControlNetModel.from_transformer(transformer, control_positions=positions)
            tokens = first_tokens(branch, latents, timestep, embeddings, control)
            assert torch.allclose(tokens, expected) is same

    def test_the_branch_shares_nothing_with_the_denoiser(self):
        transformer = tiny_transformer()
        branch = PixCellControlNetModel.from_transformer(transformer)
        before = transformer.transformer_blocks[0].attn1.to_q.weight.clone()
        with torch.no_grad():
            branch.transformer_blocks[0].attn1.to_q.weight.zero_()
        assert torch.equal(transformer.transformer_blocks[0].attn1.to_q.weight, before)

    def test_precision_and_mode_are_the_denoisers(self):
        transformer = tiny_transformer().to(torch.bfloat16).train()
        branch = PixCellControlNetModel.from_transformer(transformer)
        assert branch.dtype == torch.bfloat16
        assert branch.training

    def test_a_denoiser_of_one_block_has_a_branch_of_one(self):
        branch = PixCellControlNetModel.from_transformer(tiny_transformer(num_layers=1))
        assert len(branch.controlnet_blocks) == 1

    @pytest.mark.parametrize("number", [0, -1, 3])
    def test_a_number_of_blocks_that_there_are_not(self, number):
        with pytest.raises(ModelError, match=f"n_controlnet_blocks is {number}; a denoiser of 2 blocks"):
            PixCellControlNetModel.from_transformer(tiny_transformer(), number)

    def test_adapters_that_are_not_merged(self):
        from peft import LoraConfig

        transformer = tiny_transformer()
        transformer.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_v"]))
        with pytest.raises(ModelError, match="Merge its adapters"):
            PixCellControlNetModel.from_transformer(transformer)


class TestForward:
    @torch.no_grad()
    def test_scale_is_a_factor_for_all_or_for_each(self):
        branch, arguments = tiny_controlnet(), some_inputs()
        whole = branch(*arguments).block_controlnet_hidden_states
        scales = torch.tensor([0.0, 0.5, 2.0])
        scaled = branch(*arguments, scales).block_controlnet_hidden_states
        for one, other in zip(whole, scaled, strict=True):
            torch.testing.assert_close(other, one * scales[:, None, None])
        halves = branch(*arguments, 0.5).block_controlnet_hidden_states
        torch.testing.assert_close(halves[0][1], scaled[0][1])

    @torch.no_grad()
    def test_every_sample_is_seen_by_itself(self):
        branch, (latents, timestep, embeddings, control) = tiny_controlnet(), some_inputs()
        together = branch(latents, timestep, embeddings, control, return_dict=False)[0]
        for row in range(3):
            one = slice(row, row + 1)
            alone = branch(latents[one], timestep, embeddings[one], control[one], return_dict=False)[0]
            for whole, single in zip(together, alone, strict=True):
                torch.testing.assert_close(whole[one], single, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_prepared_conditions_and_timesteps_give_the_same(self):
        branch, (latents, timestep, embeddings, control) = tiny_controlnet(), some_inputs()
        plain = branch(latents, timestep, embeddings, control).block_controlnet_hidden_states
        prepared = branch(
            latents, branch.modulation(timestep), branch.prepare(embeddings), control
        ).block_controlnet_hidden_states
        for one, other in zip(plain, prepared, strict=True):
            torch.testing.assert_close(one, other)

    @torch.no_grad()
    def test_no_embeddings_are_the_null_embedding(self):
        branch, (latents, timestep, _, control) = tiny_controlnet(), some_inputs()
        null = branch.unconditional_embedding.expand(3, -1, -1)
        none = branch(latents, timestep, None, control).block_controlnet_hidden_states
        given = branch(latents, timestep, null, control).block_controlnet_hidden_states
        torch.testing.assert_close(none[-1], given[-1])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @torch.no_grad()
    def test_half_precision_is_close_and_stays_half(self, dtype):
        branch, arguments = tiny_controlnet(), some_inputs()
        exact = branch(*arguments).block_controlnet_hidden_states
        half = branch.to(dtype)(*arguments).block_controlnet_hidden_states
        for one, other in zip(exact, half, strict=True):
            assert other.dtype == dtype
            assert (one - other).abs().mean() < 0.03 * one.abs().mean()

    def test_gradient_checkpointing_changes_neither_value_nor_gradient(self):
        arguments = some_inputs()

        def run(branch):
            residuals = branch(*arguments).block_controlnet_hidden_states
            sum(residual.square().sum() for residual in residuals).backward()
            return residuals, {name: p.grad for name, p in branch.named_parameters() if p.grad is not None}

        plain, with_checkpoints = tiny_controlnet().train(), tiny_controlnet().train()
        with_checkpoints.enable_gradient_checkpointing()
        (one, gradients), (other, others) = run(plain), run(with_checkpoints)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, others[name], msg=name)

    def test_all_but_the_unused_leftovers_are_trained(self):
        branch = tiny_controlnet().train()
        residuals = branch(*some_inputs()).block_controlnet_hidden_states
        sum(residual.square().sum() for residual in residuals).backward()
        without = {name for name, parameter in branch.named_parameters() if parameter.grad is None}
        assert without == {"scale_shift_table", "proj_out.weight", "proj_out.bias"}

    def test_a_branch_learns_through_a_denoiser_that_stays_as_it_is(self):
        """The wish: noise that is the control image. A denoiser that sees none cannot know it."""
        transformer = tiny_transformer().requires_grad_(False)
        branch = PixCellControlNetModel.from_transformer(transformer).train().requires_grad_(True)
        optimizer = torch.optim.Adam(branch.parameters(), lr=1e-2)
        latents, timestep, embeddings, control = some_inputs(batch_size=2)
        start = branch.transformer_blocks[0].attn1.to_q.weight.clone()
        losses = []
        for _ in range(30):
            residuals = branch(latents, timestep, embeddings, control).block_controlnet_hidden_states
            prediction = transformer(latents, timestep, embeddings, residuals).sample[:, :4]
            loss = (prediction - control).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.5 * losses[0]  # measured: 0.31
        assert branch.cond_pos_embed.proj.weight.any()
        assert not torch.equal(branch.transformer_blocks[0].attn1.to_q.weight, start)
        assert all(parameter.grad is None for parameter in transformer.parameters())

    @torch.no_grad()
    def test_a_scale_may_be_a_tensor_of_one_number_and_must_fit_the_batch(self):
        branch = tiny_controlnet()
        expected = branch(*some_inputs(), 0.7).block_controlnet_hidden_states[0]
        for scale in (torch.tensor(0.7), torch.tensor([0.7])):
            assert torch.equal(branch(*some_inputs(), scale).block_controlnet_hidden_states[0], expected)
        branch.transformer_blocks.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
        with pytest.raises(ModelError, match=r"conditioning_scale is \(2,\) for 3 latents"):
            branch(*some_inputs(), torch.ones(2))

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((3, 4, 16, 8), r"control latents are \(3, 4, 16, 8\), the latents \(3, 4, 16, 16\)"),
            ((1, 4, 16, 16), "both must be equal"),
            ((3, 3, 128, 128), "encode it with the same autoencoder"),
        ],
    )
    def test_control_of_another_size_is_refused(self, shape, message):
        branch = tiny_controlnet()
        branch.transformer_blocks.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
        latents, timestep, embeddings, _ = some_inputs()
        with pytest.raises(ModelError, match=message):
            branch(latents, timestep, embeddings, torch.zeros(shape))


class TestSaved:
    def test_it_comes_back_as_it_was(self, tmp_path):
        branch = tiny_controlnet(control_positions=False)
        branch.save_pretrained(tmp_path)
        again = PixCellControlNetModel.from_pretrained(tmp_path).eval()
        assert {key: again.config[key] for key in branch.config if key[0] != "_"} == {
            key: value for key, value in branch.config.items() if key[0] != "_"
        }
        with torch.no_grad():
            for one, other in zip(
                branch(*some_inputs()).block_controlnet_hidden_states,
                again(*some_inputs()).block_controlnet_hidden_states,
                strict=True,
            ):
                assert torch.equal(one, other)

    def test_a_branch_grows_like_its_denoiser(self):
        branch = awake(
            PixCellControlNetModel.from_transformer(tiny_transformer(caption_num_tokens=1, num_layers=3))
        )
        grown, report = branch.grown_to(32, 4)
        assert (grown.config.n_controlnet_blocks, grown.config.num_layers) == (2, 3)
        assert torch.equal(grown.controlnet_blocks[1].weight, branch.controlnet_blocks[1].weight)
        assert "cond_pos_embed.proj.weight" in report.carried
        residuals = grown(torch.zeros(1, 4, 32, 32), 10, torch.zeros(1, 4, 12), torch.zeros(1, 4, 32, 32))
        assert residuals.block_controlnet_hidden_states[0].shape == (1, 256, 32)
