"""Speed of sampling: the plain published loop against ours, and what a user may choose beyond that.

    python benchmarks/sampling_speed.py exact                    same weights, same pictures
    python benchmarks/sampling_speed.py training                 forward and backward, same gradients
    python benchmarks/sampling_speed.py options                  precision, compiling, interval, caches
    python benchmarks/sampling_speed.py options --model PIPELINE --like PICTURES

Without ``--model``, the denoiser of PixCell-256 at full width with random weights: speed only. With it, a
trained pipeline samples pictures from the embeddings of others, and each option's pictures are compared with
the exact ones. Times are of the denoising loop, without the decoder. All variants take turns, round by round,
in one process, so that other work on the machine meets them all; figures are medians, and ratios come from
the same round. ``--device cuda`` is all a GPU needs.

The plain loop is written as published: diffusers' own blocks, each step on the doubled batch (no condition
first, then the condition), timesteps and conditions projected for every sample at every step, and only the
noise channels of the guided output used. (Random weights are taken to predict the velocity, on both sides:
what they predict for noise would drive latents to a thousand. It costs the same.)
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.denoisers import denoiser_of
from pixcell.diffusion.guidance import guided
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import generator_for, make_scheduler, noise_for, sample_latents
from pixcell.diffusion.schedulers import lay_out
from pixcell.models.blocks import ConditionProjection
from pixcell.models.codec import to_uint8
from pixcell.models.transformer import PixCellTransformer2DModel

GUIDANCE = 2.0
TARGET = "velocity"
INTERVAL = (200.0, 800.0)
THRESHOLDS = (0.05, 0.1, 0.2)


class PlainTransformer(nn.Module):
    """The published denoiser of one condition token, of diffusers' parts, nothing spared."""

    def __init__(self, config) -> None:
        super().__init__()
        width = config.num_attention_heads * config.attention_head_dim
        self.config = config
        self.pos_embed = PatchEmbed(
            config.sample_size,
            config.sample_size,
            config.patch_size,
            config.in_channels,
            width,
            interpolation_scale=config.interpolation_scale,
        )
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                config.num_attention_heads,
                config.attention_head_dim,
                cross_attention_dim=width,
                activation_fn="gelu-approximate",
                attention_bias=True,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
            )
            for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.proj_out = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaln_single = AdaLayerNormSingle(width)
        self.caption_projection = ConditionProjection(config.caption_channels, width, 1, False)

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        height, width = (side // self.config.patch_size for side in latents.shape[2:])
        tokens = self.pos_embed(latents)
        modulation, embedded = self.adaln_single(
            timesteps, batch_size=len(latents), hidden_dtype=latents.dtype
        )
        condition = self.caption_projection(condition)
        for block in self.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=condition, timestep=modulation)
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        tokens = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        patches = tokens.unflatten(1, (height, width)).unflatten(3, (self.config.patch_size,) * 2 + (-1,))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(latents), -1, *latents.shape[2:])


@torch.no_grad()
def published_loop(model: PlainTransformer, noise: Tensor, embeddings: Tensor, steps: int) -> Tensor:
    scheduler = make_scheduler(target=TARGET)
    scheduler.set_timesteps(steps, device=noise.device)
    null = model.caption_projection.uncond_embedding.expand(len(noise), -1, -1)
    condition = torch.cat([null, embeddings])
    latents = noise
    for timestep in scheduler.timesteps:
        doubled = torch.cat([latents, latents])
        output = model(doubled, timestep.expand(len(doubled)), condition)
        without, with_ = output.chunk(2)
        prediction = (without + GUIDANCE * (with_ - without))[:, : latents.shape[1]]
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def our_loop(
    model: PixCellTransformer2DModel,
    noise: Tensor,
    embeddings: Tensor,
    steps: int,
    interval: tuple[float, float] | None = None,
) -> Tensor:
    scheduler = make_scheduler(target=TARGET)
    lay_out(scheduler, steps, noise.device)
    denoiser = guided(denoiser_of(model, timesteps=scheduler.timesteps), GUIDANCE, interval)
    return sample_latents(denoiser, scheduler, noise, Conditioning.from_tokens(embeddings), steps)


def full_width(layers: int, device: str) -> PixCellTransformer2DModel:
    torch.manual_seed(0)
    model = PixCellTransformer2DModel(num_layers=layers).eval()
    with torch.no_grad():  # what starts at zero would make conditions and timesteps idle
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return model.to(device)


def seconds(function: Callable[[], object], options: argparse.Namespace) -> float:
    clock = time.process_time if options.processor_time else time.perf_counter
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    started = clock()
    function()
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - started


def both_models(options: argparse.Namespace) -> tuple[PixCellTransformer2DModel, PlainTransformer]:
    ours = full_width(options.layers, options.device)
    with torch.device("meta"):
        plain = PlainTransformer(ours.config)
    plain.load_state_dict(ours.state_dict(), strict=True, assign=True)  # one set of weights for both
    plain.pos_embed.register_buffer("pos_embed", ours.pos_embed.pos_embed, persistent=False)
    return ours, plain.eval()


def measure_training(options: argparse.Namespace) -> None:
    ours, plain = both_models(options)
    latents = noise_for(0, 0, (options.batch, 16, 32, 32)).to(options.device)
    embeddings = noise_for(0, 1, (options.batch, 1, 1536)).to(options.device)
    timesteps = torch.linspace(0, 999, options.batch, device=options.device)

    plain_parameters = dict(plain.named_parameters())

    def plain_step() -> list[Tensor]:
        plain.zero_grad(set_to_none=True)
        plain(latents, timesteps, embeddings).square().mean().backward()
        return [plain_parameters[name].grad for name, _ in ours.named_parameters()]

    def our_step() -> list[Tensor]:
        ours.zero_grad(set_to_none=True)
        ours(latents, timesteps, embeddings).sample.square().mean().backward()
        return [parameter.grad for parameter in ours.parameters()]

    pair = {"plain": plain_step, "ours": our_step}
    gradients = {name: function() for name, function in pair.items()}
    largest = max(gradient.abs().max().item() for gradient in gradients["plain"])
    difference = max(
        (one - other).abs().max().item()
        for one, other in zip(gradients["plain"], gradients["ours"], strict=True)
    )
    gradients.clear()
    times = take_turns(pair, options)
    ratios = [one / other for one, other in zip(times["plain"], times["ours"], strict=True)]
    print(
        f"training: {options.layers} blocks, batch {options.batch}, float32, "
        f"{torch.get_num_threads()} threads, {options.rounds} rounds"
    )
    for name, series in times.items():
        print(f"  {name:6s} {statistics.median(series):.3f} s per step")
    print(f"  ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"  largest difference of gradients {difference:.1e}; largest gradient {largest:.1e}")


def measure_exact(options: argparse.Namespace) -> None:
    ours, plain = both_models(options)
    shape = (options.batch, 16, 32, 32)
    noise = noise_for(0, 0, shape).to(options.device)
    embeddings = noise_for(0, 1, (options.batch, 1, 1536)).to(options.device)
    pair = {
        "published loop": lambda: published_loop(plain, noise, embeddings, options.steps),
        "ours": lambda: our_loop(ours, noise, embeddings, options.steps),
    }
    results = {name: function() for name, function in pair.items()}  # also warms up
    times = take_turns(pair, options)
    ratios = [one / other for one, other in zip(times["published loop"], times["ours"], strict=True)]
    print(
        f"PixCell-256, {options.layers} blocks, random weights, float32, {options.batch} picture(s), "
        f"{options.steps} guided steps, {torch.get_num_threads()} threads, {options.rounds} rounds"
    )
    for name, series in times.items():
        print(f"  {name:15s} {statistics.median(series) / options.steps:.3f} s per step")
    print(f"  ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    difference = (results["ours"] - results["published loop"]).abs().max().item()
    largest = results["published loop"].abs().max().item()
    print(f"  largest difference of the latents {difference:.1e}; largest latent {largest:.2f}")


def take_turns(
    variants: dict[str, Callable[[], object]], options: argparse.Namespace
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds):
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in order:
            times[name].append(seconds(variants[name], options))
    return times


@dataclass
class Option:
    """A way to sample: what is switched on around it, and on which weights."""

    name: str
    dtype: torch.dtype = torch.float32
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    interval: tuple[float, float] | None = None
    threshold: float | None = None
    compiled: bool = False


@contextlib.contextmanager
def faster_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def options_to_measure(with_caches: bool, with_compile: bool) -> list[Option]:
    measured = [
        Option("float32"),
        Option('float32, matmul precision "medium"', around=faster_products),
        Option("bfloat16", torch.bfloat16),
        Option(f"guidance at {INTERVAL[0]:.0f} to {INTERVAL[1]:.0f} only", interval=INTERVAL),
    ]
    if with_compile:
        measured.append(Option("torch.compile", compiled=True))
        measured.append(Option("bfloat16 and torch.compile", torch.bfloat16, compiled=True))
    if with_caches:
        measured += [
            Option(f"first-block cache, threshold {threshold}", threshold=threshold)
            for threshold in THRESHOLDS
        ]
    return measured


def variant_for(
    option: Option, weights: dict[torch.dtype, PixCellTransformer2DModel]
) -> PixCellTransformer2DModel:
    """Return a model of its own that shares its weights with all others of the same number format."""
    if option.dtype not in weights:
        model = weights[torch.float32]
        converted = {name: tensor.to(option.dtype) for name, tensor in model.state_dict().items()}
        weights[option.dtype] = sharing(model, converted)
    variant = sharing(weights[option.dtype], weights[option.dtype].state_dict())
    if option.threshold is not None:
        variant.enable_cache(FirstBlockCacheConfig(threshold=option.threshold))
    if option.compiled:
        variant.compile_repeated_blocks(dynamic=False)
    return variant


def sharing(model: PixCellTransformer2DModel, state: dict[str, Tensor]) -> PixCellTransformer2DModel:
    with torch.device("meta"):
        twin = type(model).from_config(model.config)
    twin.load_state_dict(state, assign=True)
    positions = model.pos_embed.pos_embed.to(twin.pos_embed.proj.weight.dtype)
    twin.pos_embed.register_buffer("pos_embed", positions, persistent=False)
    return twin.eval()


def measure_options(options: argparse.Namespace) -> None:
    if options.model:
        pipeline = PixCellPipeline.from_pretrained(options.model).to(options.device)
        model, embeddings = pipeline.transformer, embeddings_of(pipeline, options)
    else:
        pipeline, model = None, full_width(options.layers, options.device)
        embeddings = noise_for(0, 1, (options.batch, 1, 1536)).to(options.device)
    variants, results, weights = {}, {}, {torch.float32: model}
    for option in options_to_measure(pipeline is not None, options.compile):
        variant = variant_for(option, weights)
        variants[option.name] = runner(option, variant, pipeline, embeddings, options)
        started = time.perf_counter()
        results[option.name] = variants[option.name]()
        print(f"warmed up: {option.name}, {time.perf_counter() - started:.1f} s", flush=True)
    times = take_turns(variants, options)
    baseline = times["float32"]
    print(f"{len(embeddings)} picture(s), {options.steps} steps, {torch.get_num_threads()} threads")
    print("| option | s per step | gain | change in the picture |")
    print("|---|---|---|---|")
    for name, series in times.items():
        ratios = [one / other for one, other in zip(baseline, series, strict=True)]
        change = "" if pipeline is None else change_of(pipeline, results[name], results["float32"])
        change = "none: this is the measure" if name == "float32" else change
        print(
            f"| {name} | {statistics.median(series) / options.steps:.3f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {change} |"
        )


def runner(option, model, pipeline, embeddings, options) -> Callable[[], Tensor]:
    def latents() -> Tensor:
        noise = noise_for(0, 0, (len(embeddings), 16, 32, 32)).to(options.device)
        with option.around():
            return our_loop(model, noise, embeddings, options.steps, option.interval)

    def latents_of_pipeline() -> Tensor:
        pipeline.transformer = model
        with option.around():
            return pipeline(
                embeddings,
                num_inference_steps=options.steps,
                guidance_scale=GUIDANCE,
                guidance_interval=option.interval,
                generator=[generator_for(0, index) for index in range(len(embeddings))],
                output_type="latent",
            ).images

    if pipeline is None:
        return latents
    pipeline.set_progress_bar_config(disable=True)
    return latents_of_pipeline


def change_of(pipeline: PixCellPipeline, latents: Tensor, exact: Tensor) -> str:
    pictures, truth = (to_uint8(pipeline.codec.decode(given)).float() for given in (latents, exact))
    difference = (pictures - truth).abs()
    mse = difference.square().mean().item()
    psnr = 10 * torch.log10(torch.tensor(255.0**2 / mse)).item() if mse else float("inf")
    return f"{difference.mean().item():.2f} of 255 levels on average, PSNR {psnr:.1f} dB"


def embeddings_of(pipeline: PixCellPipeline, options: argparse.Namespace) -> Tensor:
    from pixcell.tasks.references import encoder_of, pictures_in, read_reference

    encoder = encoder_of(pipeline, None, None, False, torch.device(options.device))
    paths = pictures_in([options.like])[: options.batch]
    grids = [read_reference(path, pipeline, encoder, pipeline.facts["mpp"]).embedding_grid for path in paths]
    return torch.stack(grids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["exact", "training", "options"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="Pictures at once.")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--compile", action="store_true", help="Measure torch.compile too (minutes to compile)."
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="Time of the processor instead of the clock: for a busy machine, with --threads 1.",
    )
    parser.add_argument("--model", type=Path, help="A trained pipeline folder, to see pictures change.")
    parser.add_argument("--like", type=Path, help="Pictures whose embeddings it samples from.")
    options = parser.parse_args()
    if options.model and not options.like:
        parser.error("--model needs --like")
    torch.set_num_threads(options.threads)
    measures = {"exact": measure_exact, "training": measure_training, "options": measure_options}
    measures[options.what](options)


if __name__ == "__main__":
    main()
