"""One picture from a denoiser and an autoencoder of the published size, with random weights: time and memory.

    python benchmarks/full_size_sampling.py [--size 256] [--dtype bfloat16] [--steps 20] [--device cuda]

PixCell-256 has 608 million weights, the autoencoder 84 million, which stay in float32. Random weights take as
long as trained ones. (They are taken to predict the velocity: what they predict for noise would drive latents
out of range.) Memory is the largest resident size of the process, libraries included; on a GPU the most that
torch had allocated there.
"""

import argparse
import resource
import time

import torch
from diffusers import AutoencoderKL
from torch import nn

from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.sampling import generator_for, make_scheduler, noise_for
from pixcell.models.transformer import PixCellTransformer2DModel

STAGES = {256: (32, 1), 512: (64, 4), 1024: (128, 16)}
SD35_AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, choices=sorted(STAGES), default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")

    libraries = resident_gib()
    started = time.perf_counter()
    pipeline = random_pipeline(options.size, getattr(torch, options.dtype), options.device)
    weights = sum(
        tensor.numel() * tensor.element_size()
        for module in (pipeline.transformer, pipeline.vae)
        for tensor in module.parameters()
    )
    print(f"weights: {weights / 2**30:.2f} GiB, made in {time.perf_counter() - started:.1f} s", flush=True)
    num_tokens = STAGES[options.size][1]
    embeddings = noise_for(0, 1, (options.pictures, num_tokens, 1536))
    for name in ("first", "second") if on_gpu else ("only",):  # the first run on a GPU chooses kernels
        started = time.perf_counter()
        marks: list[float] = []
        pipeline(
            embeddings.to(options.device),
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[generator_for(0, index) for index in range(options.pictures)],
            callback_on_step_end=lambda *_, marks=marks: marks.append(time.perf_counter()) or {},
        )
        total = time.perf_counter() - started
        loop = marks[-1] - started
        print(
            f"{name} run: {total:.1f} s for {options.pictures} picture(s) of {options.size} px, "
            f"{options.steps} steps at guidance {options.guidance:g}, {options.dtype}: "
            f"{loop / options.steps:.2f} s a step, {total - loop:.1f} s decoding"
        )
    if on_gpu:
        print(f"peak memory on the GPU: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(f"peak resident memory: {resident_gib():.2f} GiB, of which libraries {libraries:.2f}")


def random_pipeline(size: int, dtype: torch.dtype, device: str) -> PixCellPipeline:
    side, num_tokens = STAGES[size]
    stage = {"sample_size": side, "caption_num_tokens": num_tokens}
    with torch.device("meta"):
        transformer = PixCellTransformer2DModel(**stage)
        vae = AutoencoderKL(**SD35_AUTOENCODER)
    transformer = filled(nn.Module.to(transformer, dtype), device)
    # Tables of positions are no weights: they come from a model without blocks.
    tables = dict(PixCellTransformer2DModel(**stage, num_layers=0).named_buffers())
    with torch.no_grad():
        for name, buffer in transformer.named_buffers():
            buffer.copy_(tables[name])
    pipeline = PixCellPipeline(transformer, filled(vae, device), make_scheduler(target="velocity"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def filled(module: nn.Module, device: str) -> nn.Module:
    """Give a module on the meta device memory and random weights, in place: nothing exists twice."""
    module = module.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.normal_(std=0.02, generator=generator)
    return module


def resident_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
