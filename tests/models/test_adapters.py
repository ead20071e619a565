"""An adapter is the published one, belongs to one denoiser, and is used whole or not at all."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from golden_vectors import FOLDER, load, weights
from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.adapters import (
    LORA_TARGETS,
    add_lora,
    base_state,
    load_lora,
    lora_state,
    merge_lora,
    read_lora,
    save_lora,
)
from pixcell.models.transformer import PixCellTransformer2DModel
from tiny_models import tiny_transformer

# As for the denoiser without adapters; see test_transformer.py.
CLOSE = {"rtol": 1e-4, "atol": 5e-5}


def trained(transformer, seed=0):
    """Give adapters values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for value in lora_state(transformer).values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return transformer


@pytest.fixture
def adapted():
    transformer = tiny_transformer()
    add_lora(transformer)
    return trained(transformer)


def base_of(transformer):
    """Return another denoiser with the same weights, without adapters."""
    plain = tiny_transformer()
    plain.load_state_dict(base_state(transformer), strict=True)
    return plain


@torch.no_grad()
def output_of(transformer):
    generator = torch.Generator().manual_seed(5)
    config = transformer.config
    side, tokens = config.sample_size, config.caption_num_tokens
    latents = torch.randn(2, config.in_channels, side, side, generator=generator)
    condition = torch.randn(2, tokens, config.caption_channels, generator=generator)
    return transformer(latents.to(transformer.dtype), 321.5, condition.to(transformer.dtype)).sample


class TestPublished:
    @pytest.fixture
    def golden(self):
        tensors, case = load("lora_transformer")
        lora = read_lora(weights(tensors))
        model = PixCellTransformer2DModel(**case["config"]).eval()
        model.load_state_dict(lora.base, strict=True)
        load_lora(model, lora)
        return model, tensors

    @torch.no_grad()
    def sample_of(self, golden):
        model, tensors = golden
        names = ("hidden_states", "timestep", "encoder_hidden_states")
        return model(*(tensors[f"in.{name}"] for name in names)).sample

    def test_with_the_adapter(self, golden):
        torch.testing.assert_close(self.sample_of(golden), golden[1]["out.sample"], **CLOSE)

    def test_switched_off_it_is_the_base(self, golden):
        golden[0].disable_adapters()
        torch.testing.assert_close(self.sample_of(golden), golden[1]["out.sample_disabled"], **CLOSE)
        golden[0].enable_adapters()
        torch.testing.assert_close(self.sample_of(golden), golden[1]["out.sample"], **CLOSE)

    def test_merged(self, golden):
        model, tensors = golden
        merge_lora(model)
        torch.testing.assert_close(self.sample_of(golden), tensors["out.sample"], **CLOSE)
        merged = {name[11:]: value for name, value in tensors.items() if name.startswith("out.merged.")}
        assert len(merged) == len(LORA_TARGETS)
        for name, value in merged.items():
            torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-5, atol=1e-6)

    def test_the_adapted_state_has_the_published_names(self, golden):
        assert golden[0].state_dict().keys() == weights(golden[1]).keys()

    def test_at_full_size_names_shapes_and_counts_are_the_published_ones(self):
        manifest = json.loads((FOLDER / "manifest_staining_lora.json").read_text())
        with torch.device("meta"):
            model = PixCellTransformer2DModel(**manifest["config"])
            add_lora(model, rank=manifest["lora"]["r"], alpha=manifest["lora"]["lora_alpha"])
        expected = dict(manifest["others"])
        for block in range(manifest["num_blocks"]):
            names = manifest["block"].items()
            expected |= {f"transformer_blocks.{block}.{name}": shape for name, shape in names}
        assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
        assert len(expected) == manifest["num_tensors"]
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count == manifest["num_trainable_elements"]
        assert tuple(manifest["lora"]["target_modules_that_exist"]) == LORA_TARGETS
        # adapter-only
        alone = lora_state(model)
        assert alone.keys() == {name for name in expected if ".lora_" in name}
        assert len(alone) == manifest["num_adapter_tensors"]
        assert sum(tensor.numel() for tensor in alone.values()) == manifest["num_adapter_elements"]


class TestMath:
    def test_a_fresh_adapter_changes_nothing(self):
        transformer = tiny_transformer()
        before = output_of(transformer)
        add_lora(transformer, rank=3)
        assert torch.equal(output_of(transformer), before)

    def test_it_starts_from_the_generator_alone(self):
        def start(seed):
            transformer = tiny_transformer()
            add_lora(transformer, rank=2, generator=torch.Generator().manual_seed(seed))
            return torch.cat([v.flatten() for k, v in lora_state(transformer).items() if ".lora_A." in k])

        assert torch.equal(start(1), start(1))
        assert not torch.equal(start(1), start(2))
        assert start(1).std() == pytest.approx(0.5, rel=0.1)  # 1 / rank; 512 numbers

    def test_alpha_and_scale_count_in_proportion(self, adapted):
        """Twice alpha is twice the change of every projection; a scale of 0 is the base."""
        base = tiny_transformer()
        projection = "transformer_blocks.1.attn2.to_v"
        tokens = torch.randn(3, 32)
        plain = base.get_submodule(projection)(tokens)
        change = adapted.get_submodule(projection)(tokens) - plain
        twice = tiny_transformer()
        load_lora(twice, lora_state(adapted), alpha=8)
        torch.testing.assert_close(twice.get_submodule(projection)(tokens) - plain, 2 * change)
        adapted.set_adapters("default", weights=0.0)
        assert torch.equal(output_of(adapted), output_of(base))

    def test_merged_is_the_adapter_at_the_scale_it_had(self, adapted):
        adapted.set_adapters("default", weights=0.5)
        before = output_of(adapted)
        merge_lora(adapted)
        torch.testing.assert_close(output_of(adapted), before, rtol=1e-4, atol=1e-5)
        assert adapted.state_dict().keys() == tiny_transformer().state_dict().keys()

    def test_switched_off_it_is_not_merged_unnoticed(self, adapted):
        adapted.disable_adapters()
        off = output_of(adapted)
        with pytest.raises(ModelError, match="switched off"):
            merge_lora(adapted)
        assert torch.equal(output_of(adapted), off)

    def test_taken_out_it_leaves_the_base(self, adapted):
        adapted.unload_lora()
        assert torch.equal(output_of(adapted), output_of(tiny_transformer()))
        add_lora(adapted)  # there is room again

    def test_only_the_adapter_learns(self):
        transformer = tiny_transformer()
        add_lora(transformer)
        transformer.train()
        latents, condition = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 12)
        transformer(latents, 10.0, condition).sample.square().mean().backward()
        with_gradient = {name for name, value in transformer.named_parameters() if value.grad is not None}
        assert with_gradient == set(lora_state(transformer))
        # B is zero at the start, so only B moves at first; A as soon as B is not.
        grads = {
            name: value.grad.any() for name, value in transformer.named_parameters() if value.grad is not None
        }
        assert {name for name, moves in grads.items() if moves} == {n for n in grads if ".lora_B." in n}
        trained(transformer)
        transformer.zero_grad()
        transformer(latents, 10.0, condition).sample.square().mean().backward()
        assert all(dict(transformer.named_parameters())[name].grad.any() for name in grads)

    @pytest.mark.parametrize("side", ["to_q", "to_k"])
    def test_with_one_condition_token_queries_and_keys_do_not_matter(self, side):
        transformer = tiny_transformer(caption_num_tokens=1)
        before = output_of(transformer)
        add_lora(transformer, targets=(f"attn2.{side}",))
        trained(transformer)
        torch.testing.assert_close(output_of(transformer), before, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("side", ["to_v", "to_out.0"])
    def test_with_one_condition_token_values_and_output_do(self, side):
        transformer = tiny_transformer(caption_num_tokens=1)
        before = output_of(transformer)
        add_lora(transformer, targets=(f"attn2.{side}",))
        trained(transformer)
        assert (output_of(transformer) - before).abs().max() > 0.01
        merged = output_of(transformer)
        merge_lora(transformer)
        torch.testing.assert_close(output_of(transformer), merged, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, adapted, dtype):
        exact = output_of(adapted)
        half = output_of(adapted.to(dtype))
        assert half.dtype == dtype
        assert (half.float() - exact).abs().mean() < 0.03 * exact.abs().mean()
        merge_lora(adapted)
        assert adapted.dtype == dtype
        assert (output_of(adapted).float() - exact).abs().mean() < 0.03 * exact.abs().mean()


class TestFiles:
    def test_saved_and_loaded_it_is_the_same(self, adapted, tmp_path):
        save_lora(adapted, tmp_path / "her2.safetensors")
        again = tiny_transformer()
        load_lora(again, tmp_path / "her2.safetensors", name="her2")
        assert torch.equal(output_of(again), output_of(adapted))
        assert list(again.peft_config) == ["her2"]

    def test_the_file_is_small_and_stable(self, adapted, tmp_path):
        save_lora(adapted, tmp_path / "one.safetensors")
        again = tiny_transformer()
        load_lora(again, tmp_path / "one.safetensors", name="other")
        save_lora(again, tmp_path / "two.safetensors", name="other")
        assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
        assert len(load_file(tmp_path / "one.safetensors")) == 2 * 4 * 2

    def test_alpha_is_in_the_file(self, tmp_path):
        transformer = tiny_transformer()
        add_lora(transformer, rank=2, alpha=6)
        trained(transformer)
        save_lora(transformer, tmp_path / "a.safetensors")
        assert read_lora(tmp_path / "a.safetensors").alpha == 6
        again = tiny_transformer()
        load_lora(again, tmp_path / "a.safetensors")
        assert torch.equal(output_of(again), output_of(transformer))

    def test_an_alpha_that_is_given_counts_whatever_the_adapter_comes_as(self, adapted):
        twice = base_of(adapted)
        load_lora(twice, lora_state(adapted), alpha=8)
        again = base_of(adapted)
        load_lora(again, read_lora(lora_state(adapted)), alpha=8)
        assert torch.equal(output_of(again), output_of(twice))
        assert not torch.allclose(output_of(again), output_of(adapted))

    def test_a_whole_state_as_peft_wraps_it_is_its_own_base(self, adapted):
        wrapped = {f"base_model.model.{name}": value for name, value in adapted.state_dict().items()}
        plain = base_of(adapted)
        load_lora(plain, wrapped)
        assert torch.equal(output_of(plain), output_of(adapted))

    def test_diffusers_opens_it(self, adapted, tmp_path):
        save_lora(adapted, tmp_path / "pytorch_lora_weights.safetensors")
        again = tiny_transformer()
        again.load_lora_adapter(
            str(tmp_path), weight_name="pytorch_lora_weights.safetensors", prefix=None, local_files_only=True
        )
        assert torch.equal(output_of(again), output_of(adapted))

    def test_what_diffusers_wrote_is_read(self, adapted, tmp_path):
        adapted.save_lora_adapter(str(tmp_path))
        again = tiny_transformer()
        load_lora(again, tmp_path / "pytorch_lora_weights.safetensors")
        assert torch.equal(output_of(again), output_of(adapted))

    @pytest.mark.parametrize(
        ("suffix", "prefix", "name"),
        [
            (".pth", "", ".default"),
            (".safetensors", "", ".other"),
            (".safetensors", "transformer.", ""),
            (".pth", "base_model.model.", ""),
        ],
    )
    def test_every_way_to_write_it_is_read(self, adapted, tmp_path, suffix, prefix, name):
        state = {
            prefix + key.replace(".default.weight", f"{name}.weight"): value.contiguous()
            for key, value in lora_state(adapted).items()
        }
        path = tmp_path / f"lora{suffix}"
        if suffix == ".pth":
            torch.save(state, path)
        else:
            save_file(state, path)
        again = tiny_transformer()
        load_lora(again, path)
        assert torch.equal(output_of(again), output_of(adapted))

    def test_a_whole_adapted_state_goes_onto_its_own_base(self, adapted, tmp_path):
        torch.save(adapted.state_dict(), tmp_path / "her2_lora.pth")
        again = tiny_transformer()
        load_lora(again, tmp_path / "her2_lora.pth")
        assert torch.equal(output_of(again), output_of(adapted))
        half = tiny_transformer().to(torch.bfloat16)
        load_lora(half, tmp_path / "her2_lora.pth")

    def test_an_adapter_keeps_no_whole_state_in_memory(self, adapted, tmp_path):
        torch.save(adapted.state_dict(), tmp_path / "her2_lora.pth")
        lora = read_lora(tmp_path / "her2_lora.pth")
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in lora.state.values())

    def test_the_base_can_be_had_without_the_adapter(self, adapted):
        plain = tiny_transformer()
        assert base_state(adapted).keys() == plain.state_dict().keys()
        plain.load_state_dict(read_lora(adapted.state_dict()).base, strict=True)
        assert torch.equal(output_of(plain), output_of(tiny_transformer()))


class TestAnotherBase:
    def other(self):
        transformer = tiny_transformer()
        with torch.no_grad():
            transformer.proj_out.bias[0] += 1e-3
        return transformer

    def test_weights_that_differ_are_noticed(self, adapted):
        with pytest.raises(WrongWeights, match=r"another denoiser: .* 1 different \(proj_out.bias\)"):
            load_lora(self.other(), adapted.state_dict())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_their_hash_is_in_the_file(self, adapted, tmp_path, dtype):
        save_lora(adapted, tmp_path / "a.safetensors")
        with pytest.raises(WrongWeights, match="was trained on the denoiser with sha256"):
            load_lora(self.other().to(dtype), tmp_path / "a.safetensors")
        load_lora(tiny_transformer().to(dtype), tmp_path / "a.safetensors")

    def test_it_may_be_insisted_upon(self, adapted, tmp_path):
        save_lora(adapted, tmp_path / "a.safetensors")
        load_lora(self.other(), tmp_path / "a.safetensors", check_base=False)

    def test_the_hash_is_that_of_the_denoiser_without_adapters(self, adapted, tmp_path):
        load_lora(adapted, lora_state(adapted), name="second")
        save_lora(adapted, tmp_path / "a.safetensors")
        load_lora(tiny_transformer(), tmp_path / "a.safetensors")

    def test_in_half_precision_only_that_hash_is_known(self, adapted, tmp_path):
        save_lora(adapted.to(torch.bfloat16), tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert list(json.loads(file.metadata()["base_sha256"])) == ["bf16"]
        load_lora(self.other(), tmp_path / "a.safetensors")  # cannot be told
        with pytest.raises(WrongWeights, match="sha256"):
            load_lora(self.other().to(torch.bfloat16), tmp_path / "a.safetensors")


def test_an_adapted_denoiser_does_not_grow_without_what_is_adapted(adapted):
    """Its projections have other names, and would begin anew."""
    with pytest.raises(ModelError, match=r"carries adapters \(default\).*merge_lora"):
        adapted.grown_to(32, 16)
    merge_lora(adapted)
    grown, report = adapted.grown_to(32, 16)
    assert not report.dropped
    name = "transformer_blocks.1.attn2.to_v.weight"
    assert torch.equal(grown.state_dict()[name], adapted.state_dict()[name])


class TestRefused:
    @pytest.fixture
    def state(self, adapted):
        return {key: value.clone() for key, value in lora_state(adapted).items()}

    def refused(self, state, message):
        transformer = tiny_transformer()
        with pytest.raises(WrongWeights, match=message):
            load_lora(transformer, state)
        assert transformer.state_dict().keys() == tiny_transformer().state_dict().keys()

    def test_no_file(self, tmp_path):
        with pytest.raises(MissingWeights, match="no weight file"):
            read_lora(tmp_path / "absent.pth")

    def test_no_adapter(self):
        self.refused(tiny_transformer().state_dict(), "holds no adapter")

    def test_half_a_pair(self, state):
        state.pop("transformer_blocks.0.attn2.to_q.lora_B.default.weight")
        self.refused(state, "not a whole adapter: .*lora_A.* has no other half")

    def test_a_block_missing(self, state):
        part = {key: value for key, value in state.items() if "transformer_blocks.1" not in key}
        self.refused(part, "transformer_blocks.1.attn2.to_k is not adapted")

    def test_a_block_too_many(self, state):
        more = {key.replace("blocks.0", "blocks.2"): value for key, value in state.items()}
        self.refused(state | more, "blocks.2.* has no projection")

    def test_another_width(self, state):
        wide = {
            key: torch.cat([value, value], dim=1 if ".lora_A." in key else 0) for key, value in state.items()
        }
        self.refused(wide, r"\(4, 64\) for a projection \(32, 32\)")

    def test_several_ranks(self, state):
        name = "transformer_blocks.0.attn2.to_q.lora_{}.default.weight"
        state[name.format("A")] = torch.zeros(2, 32)
        state[name.format("B")] = torch.zeros(32, 2)
        self.refused(state, r"several ranks \(2, 4\)")

    def test_nan(self, state):
        state["transformer_blocks.0.attn2.to_q.lora_A.default.weight"][0, 0] = float("nan")
        self.refused(state, "holds NaN")

    def test_two_adapters_in_one_file(self, state):
        self.refused(state | {k.replace("default", "b"): v for k, v in state.items()}, "holds 2 adapters")

    def test_tensors_that_are_none_of_the_denoiser(self, state):
        self.refused(state | {"foreign": torch.zeros(1)}, "1 unexpected")

    def test_a_rank_that_is_not_the_stated_one(self, state, tmp_path):
        notes = {"lora_adapter_metadata": json.dumps({"r": 8, "lora_alpha": 8})}
        save_file(state, tmp_path / "a.safetensors", metadata=notes)
        with pytest.raises(WrongWeights, match="says it has rank 8"):
            read_lora(tmp_path / "a.safetensors")

    def test_notes_that_are_no_json(self, state, tmp_path):
        save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": "{"})
        with pytest.raises(WrongWeights, match="is not JSON"):
            read_lora(tmp_path / "a.safetensors")

    def test_a_name_that_is_taken(self, adapted):
        with pytest.raises(ModelError, match="has an adapter 'default' already"):
            add_lora(adapted)
        with pytest.raises(ModelError, match="has no dots"):
            add_lora(adapted, name="a.b")

    def test_a_denoiser_without_adapters(self, tmp_path):
        for action in (merge_lora, lora_state, lambda model: save_lora(model, tmp_path / "a.safetensors")):
            with pytest.raises(ModelError, match="has no adapter"):
                action(tiny_transformer())

    def test_an_adapter_of_another_name(self, adapted):
        with pytest.raises(ModelError, match="no adapter 'her2'; it has default"):
            lora_state(adapted, "her2")

    @pytest.mark.parametrize("arguments", [{"rank": 0}, {"targets": ("attn2.to_x",)}, {"targets": ()}])
    def test_adapters_that_cannot_be(self, arguments):
        with pytest.raises(ModelError):
            add_lora(tiny_transformer(), **arguments)
