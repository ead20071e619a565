"""A training step of ours against the plainest loop, and what each saving is worth.

    python benchmarks/training_speed.py                        drawn fields of 128 px, the model of mini-128
    python benchmarks/training_speed.py --recipe mini-128      the same on the store of that recipe
    python benchmarks/training_speed.py --compile              torch.compile too: a minute more
    python benchmarks/training_speed.py autoencoder            the autoencoder: bf16, channels last

The plain loop is what one would write first: diffusers' own blocks (no condition shortcut, modulation and
gates one by one), float32, torch's AdamW as it comes, gradients clipped by torch's function, the running
average weight by weight. Ours is the step that ``pixcell train`` takes, by its own parts. All start from the
same weights and see the same batches, from the same loader: the table compares loss curves as well as speed.
Variants take turns, step by step, in one process, so that other work on the machine meets all of them; ratios
come from the same round, figures are medians.
"""

import argparse
import contextlib
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from drawn_fields import draw_store, recipe_for
from sampling_speed import PlainTransformer
from torch import Tensor, nn

from pixcell.config import load_recipe
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.training.determinism import BatchPlan
from pixcell.training.flops import matmul_precision, peak_of, training_flops
from pixcell.training.loading import load_batches
from pixcell.training.objectives import Objective
from pixcell.training.optimizers import learning_rate
from pixcell.training.order import SampleOrder
from pixcell.training.probe import Rehearsal
from pixcell.training.recipe import TrainRecipe, build_objective


@dataclass
class Variant:
    """A way to take a step."""

    name: str
    step: Callable[[], float]
    """Takes one; returns the mean loss of its batch."""
    rounding: str = "highest"
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def take(self, clock: Callable[[], float]) -> None:
        with matmul_precision(self.rounding):
            started = clock()
            self.losses.append(self.step())
            self.seconds.append(clock() - started)


class PlainLoop:
    """The plainest loop on the flow of latents; each option replaces one part of it by ours.

    Args:
        recipe: Whose batches, rate and clipping.
        objective: Whose weights it starts from, and whose samples it draws.
        our_blocks: Our transformer instead of diffusers' blocks.
        fused: AdamW in one pass over memory.
        together: Running average over all weights in one call.
        autocast: Number format of products inside the model.
        compiled: torch.compile, block by block.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        objective: Objective,
        our_blocks: bool = False,
        fused: bool = False,
        together: bool = False,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        config, ours = recipe.trainer, objective.trainable
        self.recipe, self.together, self.autocast = recipe, together, autocast
        if our_blocks:
            self.model: nn.Module = copy.deepcopy(ours)
        else:
            self.model = PlainTransformer(ours.config)
            self.model.load_state_dict(ours.state_dict(), strict=True)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.null = self.model.caption_projection.uncond_embedding
        rates = recipe.optimizer
        betas = {"betas": (rates.beta1, rates.beta2), "eps": rates.eps, "weight_decay": rates.weight_decay}
        self.optimizer = torch.optim.AdamW(self.weights, lr=rates.lr, fused=fused or None, **betas)
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.call = self.model
        if compiled:
            self.call = torch.compile(self.model, dynamic=False)
        self.batches = batches_of(recipe, objective, config.batch_size)
        self.number = 0

    def step(self) -> float:
        batch = next(self.batches)
        latents, noise, timestep = batch["latents"], batch["noise"], batch["timestep"]
        sigma = (timestep.float() / 1000)[:, None, None, None]
        noisy = (1 - sigma) * latents + sigma * noise
        condition = torch.where(
            batch["dropped"][:, None, None], self.null, batch["embedding_grid"].flatten(1, 2)
        )
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            output = self.call(noisy, timestep, condition)
        prediction = output if isinstance(output, Tensor) else output.sample
        loss = F.mse_loss(prediction.float(), noise - latents)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimizer, self.number, self.recipe.trainer.steps)
        torch.nn.utils.clip_grad_norm_(self.weights, self.recipe.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average()
        self.number += 1
        return loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.recipe.trainer.ema_decays[0], (1 + self.number) / (10 + self.number))
        if self.together:
            torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
            return
        for average, weight in zip(self.averages, self.weights, strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)


def batches_of(recipe: TrainRecipe, objective: Objective, size: int) -> Iterator[dict[str, Any]]:
    config = recipe.trainer
    plan = BatchPlan(
        SampleOrder(len(objective.samples), config.seed),
        batch_size=size,
        micro_batch_size=size,
        first_step=0,
        last_step=10**6,
    )
    for batch in load_batches(objective.samples, plan, seed=config.seed):
        yield dict(batch.samples)


def our_step(recipe: TrainRecipe, **changes: Any) -> Callable[[], float]:
    """The step of ``pixcell train``, on a model of its own that starts from the recipe's seed."""
    config = recipe.trainer.with_changes(**changes)
    rehearsal = Rehearsal(build_objective(recipe), recipe.optimizer, config)
    return lambda: rehearsal.take_step().loss


def variants_of(recipe: TrainRecipe, with_compile: bool) -> list[Variant]:
    bf16 = torch.bfloat16
    exact = {"precision": "fp32", "matmul_precision": "highest", "compile": False}
    medium = {"matmul_precision": "medium"}

    def plain(**parts: Any) -> Callable[[], float]:
        return PlainLoop(recipe, build_objective(recipe), **parts).step

    variants = [
        Variant("plain loop", plain()),
        Variant("plain loop, our blocks", plain(our_blocks=True)),
        Variant("plain loop, fused AdamW", plain(fused=True)),
        Variant("plain loop, average over all weights at once", plain(together=True)),
        Variant('plain loop, matmul precision "medium"', plain(), rounding="medium"),
        Variant("plain loop, bf16", plain(autocast=bf16)),
        Variant("ours, exact savings only", our_step(recipe, **exact)),
        Variant('ours, matmul precision "medium"', our_step(recipe, **{**exact, **medium})),
        Variant("ours, bf16", our_step(recipe, **{**exact, "precision": "bf16"})),
        Variant(
            'ours, bf16, matmul precision "medium"',
            our_step(recipe, **{**exact, **medium, "precision": "bf16"}),
        ),
    ]
    if with_compile:
        variants += [
            Variant("plain loop, compiled", plain(compiled=True)),
            Variant("ours, compiled", our_step(recipe, **{**exact, "compile": True})),
            Variant(
                "ours, bf16, compiled",
                our_step(recipe, precision="bf16", matmul_precision="highest", compile=True),
            ),
        ]
    return variants


def measure_steps(options: argparse.Namespace) -> None:
    with recipe_of(options) as recipe:
        variants = variants_of(recipe, options.compile)
        take_turns(variants, options)
        objective = build_objective(recipe)
        batch = {**next(batches_of(recipe, objective, 1)), "step": 0}
        flops = training_flops(objective, batch)
    size = recipe.trainer.batch_size
    weights = sum(weight.numel() for weight in objective.trainable.parameters())
    print(
        f"{weights / 1e6:.1f} M weights, fields of {recipe.data.size} px, batches of {size}, "
        f"{torch.get_num_threads()} threads, {options.rounds} steps each\n"
    )
    print("| | images/s | gain | loss of the last quarter | largest difference of losses |")
    print("|---|---|---|---|---|")
    first = variants[0]
    for variant in variants:
        ratios = [one / other for one, other in zip(first.seconds[1:], variant.seconds[1:], strict=True)]
        tail = variant.losses[-max(1, options.rounds // 4) :]
        apart = max(abs(one - other) / one for one, other in zip(first.losses, variant.losses, strict=True))
        print(
            f"| {variant.name} | {size / statistics.median(variant.seconds[1:]):.1f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {statistics.mean(tail):.4f} | {apart:.1e} |"
        )
    if flops is not None:
        for precision in ("fp32", "bf16"):
            peak = peak_of(torch.device("cpu"), precision)
            print(f"\n{flops / 1e9:.2f} GFLOP an image; peak {peak}", end="")
        print()


def take_turns(variants: list[Variant], options: argparse.Namespace) -> None:
    clock = time.process_time if options.processor_time else time.perf_counter
    for number in range(options.rounds):
        for variant in variants if number % 2 == 0 else variants[::-1]:
            variant.take(clock)


@contextlib.contextmanager
def recipe_of(options: argparse.Namespace) -> Iterator[TrainRecipe]:
    if options.recipe:
        yield load_recipe(TrainRecipe, options.recipe, options.set)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_store(Path(folder), num_tiles=64)
        short = ["optimizer.warmup_steps=5"]  # else weights would hardly move in the steps that are compared
        yield recipe_for(Path(folder), "mini-128", options.size, [*short, *options.set])


def measure_autoencoder(options: argparse.Namespace) -> None:
    """Convolutions: number formats and memory layouts, on crops of noise; weights of mini-codec."""
    torch.manual_seed(0)
    images = torch.rand(16, 3, 64, 64) * 2 - 1

    def step_of(dtype: torch.dtype | None, layout: torch.memory_format) -> Callable[[], float]:
        torch.manual_seed(1)
        model = TissueAutoencoder(4, (64, 128), 3).to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
        given = images.to(memory_format=layout)

        def step() -> float:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                latents = model.encode(given).latent_dist.mode()
                loss = F.l1_loss(model.decode(latents).sample.float(), given)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    usual, last = torch.contiguous_format, torch.channels_last
    variants = [
        Variant("float32", step_of(None, usual)),
        Variant("float32, channels last", step_of(None, last)),
        Variant('float32, matmul precision "medium"', step_of(None, usual), rounding="medium"),
        Variant("bf16", step_of(torch.bfloat16, usual)),
        Variant("bf16, channels last", step_of(torch.bfloat16, last)),
    ]
    take_turns(variants, options)
    print(f"autoencoder of mini-codec, 16 crops of 64 px, {torch.get_num_threads()} threads")
    print("| | crops/s | gain | last loss |")
    print("|---|---|---|---|")
    for variant in variants:
        ratios = [
            one / other for one, other in zip(variants[0].seconds[1:], variant.seconds[1:], strict=True)
        ]
        print(
            f"| {variant.name} | {16 / statistics.median(variant.seconds[1:]):.1f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {variant.losses[-1]:.4f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["steps", "autoencoder"], nargs="?", default="steps")
    parser.add_argument("--rounds", type=int, default=24, help="Steps of each variant; the first warms up.")
    parser.add_argument(
        "--size",
        type=int,
        default=128,
        help="Side of a field, in pixels; it has one embedding.",
    )
    parser.add_argument("--recipe", help="A recipe whose store is there, instead of drawn fields.")
    parser.add_argument("--set", action="append", default=[], help="Override one value of the recipe.")
    parser.add_argument("--compile", action="store_true", help="Measure torch.compile too.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="Time of the processor instead of the clock: for a busy machine, with --threads 1.",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    {"steps": measure_steps, "autoencoder": measure_autoencoder}[options.what](options)


if __name__ == "__main__":
    main()
