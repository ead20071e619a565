"""Memory and time of loading full-size weights, against the size of the weights.

    python benchmarks/loading_memory.py [--work FOLDER] [--only pixcell-256,...]

Random weights of full size are written to a temporary folder (up to 8 GB) and removed at the end. Every case
runs in a process of its own. "By loading" is what the largest resident size of the process grew by after the
libraries were loaded, mapped pages of files included; "in all" is that size itself. Both are given over the
size of the weights as they are in memory afterwards. The last case is the plain way: build, read, copy in.
"""

import argparse
import importlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "pixcell-256": "PixCell-256, diffusers folder, fp32",
    "pixcell-256-bf16": "the same, loaded as bf16",
    "pixcell-256-shards": "the same in five shards",
    "pixcell-256-ckpt": "PixCell-256, original .ckpt with trained and averaged weights",
    "uni2-h": "UNI2-h, pytorch_model.bin",
    "pipeline": "PixCell-256 and the autoencoder, PixCellPipeline.from_pretrained",
    "plain": "PixCell-256, original .ckpt: build, torch.load, load_state_dict",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="Where the temporary folder goes.")
    parser.add_argument("--only", help=f"Some of {', '.join(CASES)}, with commas.")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make[0], Path(options.make[1]))
        return
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    folder = Path(tempfile.mkdtemp(dir=options.work))
    try:
        for case in (options.only or ",".join(CASES)).split(","):
            run("--make", case, str(folder))
            found = json.loads(run("--measure", case, str(folder)).splitlines()[-1])
            size = found["weights_mib"]
            print(
                f"{CASES[case]}: {size:.0f} MiB of weights; by loading {found['loading_mib'] / size:.2f}x, "
                f"in all {found['peak_mib'] / size:.2f}x; {found['seconds']:.1f} s",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    ).stdout


# ── random weights of full size, written a tensor at a time ──────────────────────────────────────────


def make(case: str, folder: Path) -> None:
    import torch

    from pixcell.models.published_layouts import original_from_diffusers
    from pixcell.models.transformer import PixCellTransformer2DModel

    with torch.device("meta"):
        model = PixCellTransformer2DModel(interpolation_scale=0.5)
    if case in ("pixcell-256", "pixcell-256-bf16", "pixcell-256-shards", "pipeline"):
        place = folder / "transformer"
        if not place.exists():
            place.mkdir()
            model.save_config(str(place))
            write(place / "diffusion_pytorch_model.safetensors", model.state_dict(), 0)
        if case == "pixcell-256-shards":
            shards(model.state_dict(), folder / "shards")
            shutil.copy(place / "config.json", folder / "shards")
        if case == "pipeline":
            pipeline(folder)
    if case in ("pixcell-256-ckpt", "plain") and not (folder / "pixcell_256.ckpt").exists():
        from safetensors.torch import load_file

        table = PixCellTransformer2DModel(num_layers=0, caption_channels=8).pos_embed.pos_embed
        state = original_from_diffusers(model.state_dict(), table)
        files = [folder / name for name in ("raw.safetensors", "ema.safetensors")]
        for seed, file in enumerate(files):
            write(file, state, seed)
        raw, ema = map(load_file, files)  # mapped, not read
        torch.save({"state_dict": raw, "state_dict_ema": ema, "epoch": 1}, folder / "pixcell_256.ckpt")
        for file in files:
            file.unlink()
    if case == "uni2-h":
        import timm
        from safetensors.torch import load_file

        from pixcell.models.encoders import ENCODERS

        spec = ENCODERS["uni2-h"]
        layers = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
        with torch.device("meta"):
            encoder = timm.create_model(spec.architecture, **(dict(spec.arguments) | layers))
        write(folder / "uni.safetensors", encoder.state_dict(), 0)
        torch.save(load_file(folder / "uni.safetensors"), folder / "pytorch_model.bin")


def write(file: Path, state: dict, seed: int) -> None:  # type: ignore[type-arg]
    """Write float32 safetensors of these names and shapes; what has values keeps them."""
    import numpy as np

    random = np.random.default_rng(seed)
    header, end = {}, 0
    for name, tensor in state.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + 4 * tensor.numel()],
        }
        end += 4 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in state.values():
            if tensor.is_meta:
                out.write((random.standard_normal(tuple(tensor.shape), dtype=np.float32) * 0.02).tobytes())
            else:
                out.write(tensor.float().numpy().tobytes())


def shards(state: dict, folder: Path) -> None:  # type: ignore[type-arg]
    folder.mkdir()
    names = list(state)
    index = {}
    for part in range(5):
        file = f"diffusion_pytorch_model-{part + 1:05d}-of-00005.safetensors"
        held = names[part::5]
        write(folder / file, {name: state[name] for name in held}, part)
        index |= dict.fromkeys(held, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def pipeline(folder: Path) -> None:
    from diffusers import AutoencoderKL

    from pixcell.diffusion.schedulers import make_scheduler

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).save_pretrained(folder / "vae")
    make_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "PixCellPipeline",
        "transformer": ["pixcell_transformer_2d", "PixCellTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


# ── one case ─────────────────────────────────────────────────────────────────────────────────────────


def measure(case: str, folder: Path) -> None:
    import torch

    from pixcell.diffusion.pipelines import PixCellPipeline
    from pixcell.models.encoders import load_encoder
    from pixcell.models.published import load_published
    from pixcell.models.published_layouts import diffusers_from_original
    from pixcell.models.transformer import PixCellTransformer2DModel

    importlib.import_module("timm")  # what loading would import
    importlib.import_module("accelerate")
    before = peak()
    started = time.monotonic()
    if case == "pipeline":
        loaded = PixCellPipeline.from_pretrained(folder)
        modules = [loaded.transformer, loaded.vae]
    elif case == "uni2-h":
        modules = [load_encoder("uni2-h", weights=folder / "pytorch_model.bin").module]
    elif case == "plain":
        model = PixCellTransformer2DModel(interpolation_scale=0.5)
        state = torch.load(folder / "pixcell_256.ckpt", weights_only=True)["state_dict_ema"]
        model.load_state_dict(diffusers_from_original(state))
        modules = [model]
    else:
        source = {"pixcell-256-ckpt": "pixcell_256.ckpt", "pixcell-256-shards": "shards"}.get(
            case, "transformer"
        )
        dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
        modules = list(load_published(folder / source, dtype=dtype).values())
    seconds = time.monotonic() - started
    weights = sum(
        value.numel() * value.element_size() for module in modules for value in module.state_dict().values()
    )
    mib = 1 << 20
    print(
        json.dumps(
            {
                "weights_mib": weights / mib,
                "peak_mib": peak() / mib,
                "loading_mib": (peak() - before) / mib,
                "seconds": seconds,
            }
        )
    )


def peak() -> int:
    """Return the largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
