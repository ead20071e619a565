"""LoRA adapters: four megabytes that turn a denoiser of 2.4 GB to another stain.

An adapted projection computes ``W x + b + (alpha / rank) B A x``; only A and B are trained. The layers are
PEFT's, and what its users expect works: ``transformer.set_adapters("default", weights=0.5)``,
``disable_adapters()``, ``enable_adapters()``, ``unload_lora()``. Here is what they leave to chance: which
projections are adapted, which file belongs to which denoiser, and that every tensor of a file is used.

Three ways to write the same adapter are read, told apart by their names:

    full adapted state   ``…to_q.base_layer.weight``, ``…to_q.lora_A.default.weight``, and all the rest of the
                         denoiser: 829 tensors for PixCell-1024. The published staining weights are such.
    adapter-only         ``…to_q.lora_A.default.weight`` alone: 224 tensors.
    PEFT and diffusers   ``…to_q.lora_A.weight``, as :func:`save_lora` writes them.

Published adapters have rank 4 and alpha 4, so a scale of 1; a file without settings is taken to have that.
With a single condition token attention has nothing to choose (see ``models.transformer``): there, adapters of
``to_q`` and ``to_k`` change nothing.

Source: Hu et al. 2021, "LoRA" (https://arxiv.org/abs/2106.09685), section 4.1.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pixcell.errors import ModelError, WrongWeights
from pixcell.files import write_whole
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.models.weight_files import open_weights
from pixcell.models.weights import Precision, dtype_of, weights_sha256

__all__ = [
    "LORA_TARGETS",
    "LoraWeights",
    "add_lora",
    "base_state",
    "load_lora",
    "lora_state",
    "merge_lora",
    "read_lora",
    "save_lora",
    "saved_without_adapters",
]

LORA_TARGETS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
"""The projections that published adapters change: cross-attention in every block."""

_TENSOR = re.compile(
    r"(?:base_model\.model\.|transformer\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.weight"
)
_BLOCK = re.compile(r"^transformer_blocks\.\d+\.")
# diffusers reads rank and alpha from here.
_SETTINGS = "lora_adapter_metadata"
_BASE = "base_sha256"
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class LoraWeights:
    """An adapter as a file holds it."""

    state: Mapping[str, Tensor]
    """``<module>.lora_A.weight`` (rank, in) and ``<module>.lora_B.weight`` (out, rank)."""
    alpha: float
    """The adapter counts ``alpha / rank``."""
    base: Mapping[str, Tensor] | None = None
    """The denoiser it was trained on, under its plain names; None: the file does not hold it."""
    base_sha256: Mapping[str, str] = field(default_factory=dict)
    """Hash of that denoiser in each number format, where the file states it."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return next(value.shape[0] for name, value in self.state.items() if ".lora_A." in name)

    @property
    def modules(self) -> list[str]:
        """Names of the adapted projections."""
        return [name.removesuffix(".lora_A.weight") for name in self.state if ".lora_A." in name]

    @property
    def targets(self) -> list[str]:
        """The same without the number of the block: ``attn2.to_q`` for that of every block."""
        return sorted({_BLOCK.sub("", module) for module in self.modules})


def add_lora(
    transformer: PixCellTransformer2DModel,
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = LORA_TARGETS,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> None:
    """Put a fresh adapter into a denoiser, in place; it changes nothing until it is trained.

    A is drawn from N(0, 1 / rank^2), B is zero. With the first adapter all weights of the denoiser are
    frozen: A and B alone learn.

    Args:
        transformer: The denoiser.
        rank: Of the change to each projection.
        alpha: The change counts ``alpha / rank``; None: as much as ``rank``, so 1.
        targets: Which projections, by the end of their names.
        name: Of the adapter; a denoiser may hold several.
        generator: For A; on the CPU. None: the global one.

    Raises:
        ModelError: If the name is taken, a target does not exist, or the rank is not positive.
    """
    if rank < 1:
        raise ModelError(f"an adapter of rank {rank} is none; choose 1 or more (published: 4).")
    modules = [path for path, _ in transformer.named_modules()]
    unknown = [target for target in targets if not any(path.endswith(f".{target}") for path in modules)]
    if unknown or not targets:
        raise ModelError(
            f"the denoiser has no projections {', '.join(unknown) or '(none were named)'}; "
            f"adapters usually change {', '.join(LORA_TARGETS)}."
        )
    _inject(transformer, list(targets), rank, rank if alpha is None else alpha, name)
    if generator is not None:
        with torch.no_grad():
            for path, value in transformer.named_parameters():
                if path.endswith(f".lora_A.{name}.weight"):
                    value.copy_(torch.randn(value.shape, generator=generator) / rank)


def read_lora(source: str | Path | Mapping[str, Tensor], *, alpha: float | None = None) -> LoraWeights:
    """Read an adapter in any of the three ways to write it.

    Args:
        source: A file (safetensors, or a pickle of tensors only), or a state dictionary.
        alpha: Instead of what the file says; needed only where a file without settings was trained with an
            alpha other than its rank.

    Raises:
        MissingWeights: If there is no such file.
        WrongWeights: If it holds no adapter, or half of one, or several.
    """
    if isinstance(source, Mapping):
        what, tensors, notes = "the state given", source, {}
    else:
        path = Path(source)
        # Mapped: of a whole adapted denoiser only what is looked at is read.
        what, tensors, notes = str(path), open_weights(path, which="raw").mapped(), _notes(path)
    state: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    names = set()
    for name, value in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found:
            state[f"{found['module']}.lora_{found['side']}.weight"] = value.clone()
            names.add(found["name"])
        else:
            base[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = value
    if not state:
        raise WrongWeights(
            f"{what} holds no adapter: none of its {len(tensors)} tensors is called …lora_A… or …lora_B…."
        )
    if len(names) > 1:
        raise WrongWeights(
            f"{what} holds {len(names)} adapters ({', '.join(sorted(map(str, names)))}); "
            "give a file with one."
        )
    _check_pairs(what, state)
    lora = LoraWeights(state, 0.0, base or None, _json_of(notes, _BASE))
    settings = _json_of(notes, _SETTINGS)
    if settings.get("r", lora.rank) != lora.rank:
        raise WrongWeights(f"{what} says it has rank {settings['r']}; its tensors have {lora.rank}.")
    stated = float(settings.get("lora_alpha", lora.rank))
    return LoraWeights(state, stated if alpha is None else alpha, lora.base, lora.base_sha256)


def load_lora(
    transformer: PixCellTransformer2DModel,
    source: str | Path | Mapping[str, Tensor] | LoraWeights,
    *,
    name: str = "default",
    alpha: float | None = None,
    check_base: bool = True,
) -> None:
    """Put a trained adapter into a denoiser, in place, and switch it on.

    Where the file says which denoiser it was trained on (it holds the weights, or their hash), this must be
    that one, in whatever number format it was loaded: an adapter corrects one denoiser and spoils others.

    Args:
        transformer: The denoiser, without this adapter.
        source: What :func:`read_lora` takes or returns.
        name: What the adapter is called from now on.
        alpha: Instead of what the source says; see :func:`read_lora`.
        check_base: Whether another denoiser is an error.

    Raises:
        MissingWeights: If there is no such file.
        WrongWeights: If it does not fit the denoiser, or was trained on another one. The denoiser is as it
            was.
        ModelError: If the name is taken.
    """
    lora = source if isinstance(source, LoraWeights) else read_lora(source)
    if alpha is not None:
        lora = replace(lora, alpha=alpha)
    _check_fit(lora, transformer)
    if check_base:
        _check_base(lora, transformer)
    _inject(transformer, lora.targets, lora.rank, lora.alpha, name)
    with torch.no_grad():
        for key, own in lora_state(transformer, name).items():
            own.copy_(lora.state[key.replace(f".{name}.weight", ".weight")])


def save_lora(transformer: PixCellTransformer2DModel, path: Path, *, name: str = "default") -> None:
    """Write an adapter alone, as safetensors, whole or not at all.

    Names and settings are PEFT's and diffusers', so ``load_lora_adapter(folder, weight_name=path.name,
    prefix=None)`` opens it too. Beside them stands the hash of the denoiser it belongs to.

    Raises:
        ModelError: If there is no adapter of that name.
        OutputError: If the place cannot be written.
    """
    state = {
        key.replace(f".{name}.weight", ".weight"): value.detach().cpu().contiguous()
        for key, value in lora_state(transformer, name).items()
    }
    settings = {
        # A set has no order, and a file should be the same each time.
        key: sorted(value) if isinstance(value, set) else value
        for key, value in transformer.peft_config[name].to_dict().items()
    }
    notes = {
        "format": "pt",
        _SETTINGS: json.dumps(settings, sort_keys=True),
        _BASE: json.dumps(_base_hashes(transformer), sort_keys=True),
    }
    with write_whole(path) as temporary:
        temporary.write_bytes(_in_order(save(state, metadata=notes)))


def merge_lora(transformer: PixCellTransformer2DModel) -> None:
    """Add the active adapters to the weights, in place, and take their layers out.

    The denoiser computes the same, as fast as without adapters, under its plain names; what it was before is
    gone. In half precision the sum is rounded, as any weight is.

    Raises:
        ModelError: If there is no adapter, or they are switched off.
    """
    _adapter_names(transformer)
    if any(getattr(module, "disable_adapters", False) is True for module in transformer.modules()):
        raise ModelError(
            "the adapters are switched off; merged, they would count. Call enable_adapters() first, or "
            "unload_lora() to be rid of them."
        )
    transformer.fuse_lora()
    transformer.unload_lora()


def lora_state(transformer: PixCellTransformer2DModel, name: str = "default") -> dict[str, Tensor]:
    """Return the tensors of an adapter under the names they have in the denoiser (not copied).

    Raises:
        ModelError: If there is no adapter of that name.
    """
    names = _adapter_names(transformer)
    if name not in names:
        raise ModelError(f"the denoiser has no adapter {name!r}; it has {', '.join(names)}.")
    ends = (f".lora_A.{name}.weight", f".lora_B.{name}.weight")
    return {key: value for key, value in transformer.state_dict().items() if key.endswith(ends)}


def base_state(transformer: PixCellTransformer2DModel) -> dict[str, Tensor]:
    """Return the tensors of a denoiser as if it had no adapters: plain names, values not copied."""
    return _plain(transformer.state_dict())


@contextmanager
def saved_without_adapters(transformer: PixCellTransformer2DModel) -> Iterator[None]:
    """Let ``save_pretrained`` write a denoiser as if it had no adapters, within the block.

    diffusers would write the names of adapted layers, which no plain denoiser opens.
    """

    def as_plain(_: Any, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        plain = _plain(state)
        state.clear()
        state.update(plain)

    hook = transformer.register_state_dict_post_hook(as_plain)
    try:
        yield
    finally:
        hook.remove()


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_A." not in name and ".lora_B." not in name
    }


def _inject(
    transformer: PixCellTransformer2DModel, targets: list[str], rank: int, alpha: float, name: str
) -> None:
    from peft import LoraConfig  # slow to import

    taken = getattr(transformer, "peft_config", {})
    if name in taken:
        raise ModelError(
            f"the denoiser has an adapter {name!r} already; choose another name, or unload_lora() first."
        )
    # PEFT makes names into module attributes.
    if not name or "." in name:
        raise ModelError(f"an adapter cannot be called {name!r}: a name has no dots.")
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=0.0,
        init_lora_weights="gaussian",
        target_modules=targets,
    )
    transformer.add_adapter(config, adapter_name=name)


def _adapter_names(transformer: PixCellTransformer2DModel) -> list[str]:
    names = list(getattr(transformer, "peft_config", {}))
    if not names:
        raise ModelError("the denoiser has no adapter; load one with load_lora, or make one with add_lora.")
    return names


def _check_pairs(what: str, state: Mapping[str, Tensor]) -> None:
    """Refuse half an adapter: each A has its B, all of one rank, all finite."""
    problems = []
    ranks = set()
    for name, value in state.items():
        other = state.get(
            name.replace(".lora_A.", ".lora_B.")
            if ".lora_A." in name
            else name.replace(".lora_B.", ".lora_A.")
        )
        if other is None:
            problems.append(f"{name} has no other half")
        elif value.ndim != 2:
            problems.append(f"{name} is {tuple(value.shape)}, not a matrix")
        elif not torch.isfinite(value).all():
            problems.append(f"{name} holds NaN or infinity")
        else:
            ranks.add(value.shape[0] if ".lora_A." in name else value.shape[1])
    if len(ranks) > 1:
        problems.append(f"its tensors have several ranks ({', '.join(map(str, sorted(ranks)))})")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WrongWeights(
            f"{what} is not a whole adapter: {'; '.join(problems[:3])}{more}. Copy or convert it again."
        )


def _check_fit(lora: LoraWeights, transformer: PixCellTransformer2DModel) -> None:
    """Both ways: each tensor has its projection; a projection adapted in one block is so in every block."""
    own = base_state(transformer)
    problems = []
    for name, value in lora.state.items():
        weight = own.get(f"{name.rsplit('.lora_', 1)[0]}.weight")
        side = 1 if ".lora_A." in name else 0
        if weight is None or weight.ndim != 2:
            problems.append(f"{name} has no projection")
        elif value.shape[side] != weight.shape[side]:
            problems.append(f"{name} is {tuple(value.shape)} for a projection {tuple(weight.shape)}")
    adapted = set(lora.modules)
    in_blocks = {target for target in lora.targets if target not in adapted}
    blocks = range(transformer.config.num_layers)
    expected = {f"transformer_blocks.{block}.{target}" for block in blocks for target in in_blocks}
    problems += [f"{module} is not adapted" for module in sorted(expected - adapted)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WrongWeights(
            f"the adapter does not fit this denoiser ({transformer.config.num_layers} blocks, "
            f"{transformer.inner_dim} wide): {'; '.join(problems[:3])}{more}."
        )


def _check_base(lora: LoraWeights, transformer: PixCellTransformer2DModel) -> None:
    advice = (
        "An adapter corrects the denoiser it was trained on and spoils others: load that one, "
        "or pass check_base=False if you know why."
    )
    own = base_state(transformer)
    if lora.base is not None:
        absent = [name for name in own if name not in lora.base]
        foreign = [name for name in lora.base if name not in own]
        other = [
            name
            for name, value in own.items()
            if name in lora.base
            and (
                lora.base[name].shape != value.shape
                or not torch.equal(lora.base[name].to(value.device, value.dtype), value)
            )
        ]
        if absent or foreign or other:
            named = (absent + foreign + other)[:3]
            raise WrongWeights(
                f"the adapter was trained on another denoiser: {len(absent)} tensors missing, {len(foreign)} "
                f"unexpected, {len(other)} different ({', '.join(named)}). {advice}"
            )
    stated = {dtype_of(name): value for name, value in lora.base_sha256.items() if name in _PRECISIONS}
    if transformer.dtype in stated:
        own_hash = weights_sha256(_Rounded(own, transformer.dtype))
        if own_hash != stated[transformer.dtype]:
            raise WrongWeights(
                f"the adapter was trained on the denoiser with sha256 {stated[transformer.dtype][:12]}…, "
                f"this one has {own_hash[:12]}…. {advice}"
            )


def _base_hashes(transformer: PixCellTransformer2DModel) -> dict[str, str]:
    """Return the hash of the denoiser in every number format it may be loaded in.

    From a denoiser in half precision the others cannot be told.
    """
    own = base_state(transformer)
    formats = _PRECISIONS if transformer.dtype is torch.float32 else ()
    formats = formats or tuple(name for name in _PRECISIONS if dtype_of(name) is transformer.dtype)
    return {name: weights_sha256(_Rounded(own, dtype_of(name))) for name in formats}


class _Rounded(Mapping[str, Tensor]):
    """Tensors rounded to a number format, one at a time: a copy of all would double the memory."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensors[name]
        return value.to(self._dtype) if value.is_floating_point() else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _in_order(file: bytes) -> bytes:
    """Sort the header of a safetensors file: the library writes its notes in another order each time."""
    size = int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + size :]


def _notes(path: Path) -> dict[str, str]:
    """Return what a safetensors file says about itself."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise WrongWeights(f"{path} cannot be read as weights ({error}).") from error


def _json_of(notes: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        content = json.loads(notes.get(key, "{}"))
    except ValueError as error:
        raise WrongWeights(f"the note {key} in the adapter's file is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise WrongWeights(f"the note {key} in the adapter's file is not a JSON object.")
    return content
