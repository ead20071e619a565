"""What a step of each optimiser costs, against AdamW: milliseconds of processor time, and bytes of state.

    python benchmarks/optimizer_steps.py                # PixCell at the size of `mini`, 14 million weights

The optimisers take turns on one core, so that whatever else the machine does meets them alike.
"""

import argparse
import statistics
import time

import torch

from pixcell.errors import MissingExtra
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.training.optimizers import AdamW8bitConfig, AdamWConfig, CameConfig, make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = PixCellTransformer2DModel(
        num_layers=10,
        num_attention_heads=6,
        attention_head_dim=48,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        caption_channels=64,
        cross_attention_dim=None,
        sample_size=32,
        caption_num_tokens=4,
        interpolation_scale=0.5,
    )
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight) * 1e-3
    optimizers = {}
    for config in (AdamWConfig(), CameConfig(), AdamW8bitConfig()):
        try:
            optimizers[config.name] = make_optimizer(model, config)
        except MissingExtra as error:
            print(f"left out: {error}")
    spent: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(arguments.rounds + 2):
        for name, optimizer in optimizers.items():
            begun = time.process_time()
            optimizer.step()
            spent[name].append(time.process_time() - begun)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights")
    usual = statistics.median(spent["adamw"][2:])
    for name, optimizer in optimizers.items():
        median = statistics.median(spent[name][2:])  # the first two make the state
        tensors = {
            value.data_ptr(): value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if torch.is_tensor(value)
        }  # tables of codes are shared
        size = sum(tensors.values()) / 1e6
        print(f"{name:12} {1e3 * median:8.1f} ms  {median / usual:5.1f} x adamw  {size:8.1f} MB")


if __name__ == "__main__":
    main()
