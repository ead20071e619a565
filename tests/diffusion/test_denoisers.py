"""A denoiser computes once what a sampling repeats, and never relies on what has changed."""

import threading
from collections import Counter

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from pixcell.diffusion import memory
from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.control import control_by
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.guidance import guided
from pixcell.diffusion.sampling import in_fixed_batches, make_scheduler, sample_latents
from pixcell.errors import ModelError
from pixcell.models.controlnet import PixCellControlNetModel
from tiny_models import tiny_transformer

TIME = torch.tensor(500)


def latents_and_grid(transformer, rows=3):
    generator = torch.Generator().manual_seed(0)
    side = transformer.grid_size
    grid = torch.randn(rows, side, side, 12, generator=generator)
    return torch.randn(rows, 4, 16, 16, generator=generator), grid


@pytest.fixture(params=[1, 4], ids=["one token", "four tokens"])
def transformer(request):
    return tiny_transformer(caption_num_tokens=request.param)


def calls_of(*modules):
    """Count the calls of modules from now on."""
    counts = Counter()
    for number, module in enumerate(modules):
        module.register_forward_pre_hook(lambda *_, number=number: counts.update([number]))
    return counts


@pytest.mark.parametrize("unconditional_positions", [True, False])
@torch.no_grad()
def test_a_denoiser_is_its_transformer(unconditional_positions):
    """The first time and again; with conditions, without, and with some."""
    transformer = tiny_transformer(unconditional_positions=unconditional_positions)
    latents, grid = latents_and_grid(transformer)
    some = torch.tensor([False, True, False])
    for conditioning, tokens, dropped in (
        (Conditioning(grid), grid.flatten(1, 2), None),
        (Conditioning(grid, some), grid.flatten(1, 2), some),
        (Conditioning(), None, None),
    ):
        expected = transformer(latents, TIME, tokens, dropped=dropped).sample[:, :4]
        denoise = denoiser_of(transformer)
        for _ in range(2):
            assert torch.equal(denoise(latents, TIME, conditioning), expected)


def test_conditions_enter_the_blocks_once_per_sampling(transformer):
    latents, grid = latents_and_grid(transformer)
    block = transformer.transformer_blocks[1]
    counts = calls_of(transformer.caption_projection, block.attn2.to_v, block.ff, transformer.adaln_single)
    denoiser = guided(denoiser_of(transformer), 2.0)
    sample_latents(denoiser, make_scheduler(), latents, Conditioning(grid), 5)
    assert counts == {0: 1, 1: 1, 2: 5, 3: 5}


def test_known_timesteps_are_modulated_in_one_call(transformer):
    latents, grid = latents_and_grid(transformer)
    counts = calls_of(transformer.adaln_single)
    scheduler = make_scheduler()
    scheduler.set_timesteps(5)
    denoiser = guided(denoiser_of(transformer, timesteps=scheduler.timesteps), 2.0)
    ours = sample_latents(denoiser, scheduler, latents, Conditioning(grid), 5)
    assert counts == {0: 1}
    plain = sample_latents(guided(denoiser_of(transformer), 2.0), scheduler, latents, Conditioning(grid), 5)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_timestep_that_was_not_announced_is_computed_for_itself(transformer):
    latents, grid = latents_and_grid(transformer)
    denoise = denoiser_of(transformer, timesteps=torch.tensor([500, 250]))
    for timestep in (TIME, torch.tensor(499.5), torch.tensor([1, 2, 3])):
        expected = transformer(latents, timestep, grid.flatten(1, 2)).sample[:, :4]
        torch.testing.assert_close(
            denoise(latents, timestep, Conditioning(grid)), expected, rtol=1e-5, atol=1e-6
        )


def test_parts_of_a_batch_are_kept_side_by_side(transformer):
    latents, grid = latents_and_grid(transformer, rows=6)
    counts = calls_of(transformer.caption_projection)
    denoiser = in_fixed_batches(denoiser_of(transformer), 2)
    sample_latents(denoiser, make_scheduler(), latents, Conditioning(grid), 4)
    assert counts == {0: 3}


def test_beyond_its_share_of_memory_the_oldest_condition_is_made_anew(transformer, monkeypatch):
    latents, grid = latents_and_grid(transformer)
    rows = [Conditioning(grid[row : row + 1]) for row in range(3)]
    one = transformer.prepare(grid[:1].flatten(1, 2)).num_bytes
    assert one > 0
    monkeypatch.setattr(memory, "_MOST_BYTES", 2 * one)
    counts, denoise = calls_of(transformer.caption_projection), denoiser_of(transformer)
    with torch.no_grad():
        for row in (0, 1, 1, 2, 2, 1, 0):
            denoise(latents[:1], TIME, rows[row])
    assert counts[0] == 4


@torch.no_grad()
def test_another_condition_is_another_picture(transformer):
    latents, grid = latents_and_grid(transformer)
    denoise = denoiser_of(transformer)
    first = denoise(latents, TIME, Conditioning(grid))
    grid[1].add_(1)  # in place: the same object, another value
    second = denoise(latents, TIME, Conditioning(grid))
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def add_adapter(transformer):
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["attn2.to_v"]))
    transformer.eval()


def swap_in_an_average(transformer):
    """As running averages of weights do it: through ``.data``, which raises no version."""
    for parameter in transformer.parameters():
        parameter.data.mul_(1.1)


CHANGES = {
    "a weight in place": lambda model: model.transformer_blocks[0].attn2.to_v.weight[3, 4].add_(1),
    "the table of positions": lambda model: model.y_pos_embed.y_pos_embed.add_(1),
    "the modulation": lambda model: model.adaln_single.linear.weight.mul_(2),
    "loaded weights": lambda model: model.load_state_dict(
        {n: 1.1 * t for n, t in model.state_dict().items()}
    ),
    "an average": swap_in_an_average,
    "precision": lambda model: torch.nn.Module.to(model, torch.float64),
    "an adapter": add_adapter,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_weights_are_noticed(change):
    transformer = tiny_transformer()
    latents, grid = latents_and_grid(transformer)
    denoise = denoiser_of(transformer, timesteps=TIME[None])
    before = denoise(latents, TIME, Conditioning(grid))
    CHANGES[change](transformer)
    after = denoise(latents, TIME, Conditioning(grid))
    assert torch.equal(
        after, denoiser_of(transformer, timesteps=TIME[None])(latents, TIME, Conditioning(grid))
    )
    assert not torch.equal(after, before)


@torch.no_grad()
def test_settings_of_adapters_are_noticed():
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters

    transformer = tiny_transformer()
    latents, grid = latents_and_grid(transformer)
    plain = transformer(latents, TIME, grid.flatten(1, 2)).sample[:, :4]
    add_adapter(transformer)
    denoise = denoiser_of(transformer)
    seen = [denoise(latents, TIME, Conditioning(grid))]
    for setting in (
        lambda: set_weights_and_activate_adapters(transformer, ["default"], [0.5]),
        transformer.disable_adapters,
    ):
        setting()
        seen.append(denoise(latents, TIME, Conditioning(grid)))
    assert not torch.allclose(seen[0], seen[1])
    assert torch.equal(seen[2], plain)


@torch.no_grad()
def test_weights_of_an_adapter_alone_are_noticed():
    transformer = tiny_transformer()
    latents, grid = latents_and_grid(transformer)
    add_adapter(transformer)
    denoise = denoiser_of(transformer)
    before = denoise(latents, TIME, Conditioning(grid))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(-parameter)  # as averages of an adapter are swapped in: no version is raised
    after = denoise(latents, TIME, Conditioning(grid))
    assert torch.equal(after, denoiser_of(transformer)(latents, TIME, Conditioning(grid)))
    assert not torch.allclose(after, before)


@torch.no_grad()
def test_what_was_prepared_under_autocast_is_not_taken_without(transformer):
    latents, grid = latents_and_grid(transformer)
    denoise = denoiser_of(transformer, timesteps=TIME[None])
    expected = denoise(latents, TIME, Conditioning(grid))
    with torch.autocast("cpu", torch.bfloat16):
        low = denoise(latents, TIME, Conditioning(grid))
    assert torch.equal(denoise(latents, TIME, Conditioning(grid)), expected)
    assert not torch.equal(low, expected)


def test_with_gradients_nothing_is_kept(transformer):
    latents, grid = latents_and_grid(transformer)
    denoise = denoiser_of(transformer)
    counts = calls_of(transformer.caption_projection)
    for _ in range(2):
        transformer.zero_grad()
        denoise(latents, TIME, Conditioning(grid)).square().mean().backward()
        assert transformer.caption_projection.linear_1.weight.grad.any()
    assert counts == {0: 2}


@torch.no_grad()
def test_in_training_mode_nothing_is_kept(transformer):
    latents, grid = latents_and_grid(transformer)
    denoise, counts = denoiser_of(transformer.train()), calls_of(transformer.caption_projection)
    for _ in range(2):
        denoise(latents, TIME, Conditioning(grid))
    assert counts == {0: 2}


def test_under_inference_mode_too_the_picture_is_the_same(transformer):
    latents, grid = latents_and_grid(transformer)
    with torch.no_grad():
        expected = denoiser_of(transformer)(latents, TIME, Conditioning(grid))
    with torch.inference_mode():
        denoise = denoiser_of(transformer)
        assert all(torch.equal(denoise(latents, TIME, Conditioning(grid)), expected) for _ in range(2))


@torch.no_grad()
def test_the_learned_variance_is_left_out_or_left_in(transformer):
    latents, grid = latents_and_grid(transformer)
    whole = transformer(latents, TIME, grid.flatten(1, 2)).sample
    conditioning = Conditioning(grid)
    assert torch.equal(denoiser_of(transformer)(latents, TIME, conditioning), whole[:, :4])
    assert torch.equal(denoiser_of(transformer, with_variance=True)(latents, TIME, conditioning), whole)


def test_a_variance_that_was_not_learned_is_refused():
    with pytest.raises(ModelError, match="has learned no variance"):
        denoiser_of(tiny_transformer(out_channels=4), with_variance=True)


@torch.no_grad()
def test_control_is_added_behind_the_blocks(transformer):
    latents, grid = latents_and_grid(transformer)
    residual = torch.randn(3, 64, 32)
    denoise = denoiser_of(transformer, lambda latents, timestep, conditioning: (residual,))
    expected = transformer(latents, TIME, grid.flatten(1, 2), [residual]).sample[:, :4]
    assert torch.equal(denoise(latents, TIME, Conditioning(grid)), expected)


def test_conditions_enter_a_control_branch_once_per_sampling(transformer):
    branch = PixCellControlNetModel.from_transformer(transformer)
    latents, grid = latents_and_grid(transformer)
    counts = calls_of(
        branch.caption_projection, branch.transformer_blocks[0].ff, branch.adaln_single, branch.cond_pos_embed
    )
    scheduler = make_scheduler()
    scheduler.set_timesteps(4)
    control = control_by(branch, scheduler.timesteps)
    denoiser = guided(denoiser_of(transformer, control), 2.0)
    sample_latents(denoiser, scheduler, latents, Conditioning(grid, control_latents=latents), 4)
    assert counts == {0: 1, 1: 4, 2: 1, 3: 4}


class TestFeatureCaches:
    """diffusers' caches keep the features of the last call of the same name."""

    @pytest.fixture
    def cached(self):
        transformer = tiny_transformer(num_layers=3)
        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))  # reuses whatever there is
        return transformer

    @torch.no_grad()
    def test_a_cache_that_never_reuses_changes_nothing(self):
        transformer = tiny_transformer()
        latents, grid = latents_and_grid(transformer)
        expected = sample_latents(
            guided(denoiser_of(transformer), 2.0), make_scheduler(), latents, Conditioning(grid), 4
        )
        transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        cached = sample_latents(
            guided(denoiser_of(transformer), 2.0), make_scheduler(), latents, Conditioning(grid), 4
        )
        assert torch.equal(cached, expected)

    def test_a_cache_skips_blocks(self, cached):
        latents, grid = latents_and_grid(cached)
        first, last = (calls_of(cached.transformer_blocks[place].attn1) for place in (0, 2))
        sample_latents(denoiser_of(cached), make_scheduler(), latents, Conditioning(grid), 4)
        assert (first[0], last[0]) == (4, 1)

    def test_each_sampling_begins_afresh(self, cached):
        latents, grid = latents_and_grid(cached)
        denoise = denoiser_of(cached)
        with torch.no_grad():
            denoise(latents, TIME, Conditioning(grid))  # left unfinished
        last = calls_of(cached.transformer_blocks[2].attn1)
        with torch.no_grad():
            denoiser_of(cached)(latents, TIME, Conditioning(grid))
        assert last[0] == 1

    @torch.no_grad()
    def test_parts_of_a_batch_keep_their_own_features(self, cached):
        latents, grid = latents_and_grid(cached, rows=2)
        whole = denoiser_of(cached)
        expected = [whole(latents * step, TIME + step, Conditioning(grid)) for step in range(1, 4)]
        parts = denoiser_of(cached)
        for step in range(1, 4):
            rows = [
                parts(latents[row : row + 1] * step, TIME + step, Conditioning(grid[row : row + 1]))
                for row in range(2)
            ]
            torch.testing.assert_close(torch.cat(rows), expected[step - 1], rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_parts_side_by_side_are_refused(self, cached):
        latents, grid = latents_and_grid(cached)
        denoise, errors = denoiser_of(cached), []
        denoise(latents, TIME, Conditioning(grid))

        def elsewhere():
            try:
                denoise(latents, TIME, Conditioning(grid))
            except ModelError as error:
                errors.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert "fixed_batch" in errors[0]
