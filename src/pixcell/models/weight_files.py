"""Named tensors on disk: recognised by their names and shapes, read when their values are needed.

A file is opened by mapping it into memory: names, shapes and number formats are known at once, and a
checkpoint that also holds an optimiser costs no more than the tensors that are taken from it. Values are then
copied, some at a time, and the file is opened anew for the next ones, which gives the mapped pages back. So a
model is loaded in little more memory than it occupies; and its tensors lie in memory of their own, because
processors may use another kernel, with other last bits, for the odd addresses inside a file.

A file is data. Safetensors can hold nothing else; of a pickle (``.bin``, ``.pth``, ``.ckpt``) only what
``torch.load(weights_only=True)`` accepts is read.
"""

import io
import json
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixcell.errors import MissingWeights, ModelError, WrongWeights

__all__ = ["PICKLE_SUFFIXES", "StoredWeights", "Which", "open_weights", "weight_files_in"]

PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
"""Endings under which torch writes pickles."""

Which = Literal["auto", "ema", "raw"]
"""Of a training checkpoint: averaged weights, those of the optimiser, or averaged ones if there are any."""

_ROUND_BYTES = 64 << 20
_POINTER = b"version https://git-lfs"  # what a repository holds in the place of a large file
# No training saves these; a pickle that asks for them is a program.
_ATTACKS = (
    *("os.", "posix.", "nt.", "sys.", "subprocess.", "shutil.", "socket.", "pty.", "ctypes."),
    *("runpy.", "importlib.", "webbrowser."),
    *(f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__")),
)
_PICKLES = 5  # in a file of torch before 1.6, one after the other
_AVERAGED, _AVERAGED_INSIDE = "state_dict_ema", "model_ema."
_TRAINED = ("state_dict", "model")
# Buffers of the published training; see _trained_constants.
_CONSTANTS = ("y_embedder.y_embedding", "y_pos_embed")
# What readers of damaged or foreign files raise, beside errors of the disk.
_UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError),
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError, zipfile.BadZipFile),
)


class StoredWeights:
    """Named tensors on disk.

    Args:
        open_: Returns the tensors by name, mapped or in memory; called again for every part that is read.
        source: What messages call it.
        notes: What was chosen when it was opened, for people.
    """

    def __init__(
        self, open_: Callable[[], Mapping[str, Tensor]], source: str, notes: Sequence[str] = ()
    ) -> None:
        self._open = open_
        self.source = source
        self.notes = tuple(notes)
        mapped = open_()
        odd = [name for name, tensor in mapped.items() if not _is_plain(tensor)]
        if odd:
            raise WrongWeights(
                f"{source} holds {len(odd)} tensors that are sparse, quantised or without values "
                f"({', '.join(odd[:3])}). Weights are dense tensors; save them as such."
            )
        self.shapes = {name: tuple(tensor.shape) for name, tensor in mapped.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in mapped.items()}
        self._sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in mapped.items()}

    @property
    def num_bytes(self) -> int:
        """What all tensors occupy."""
        return sum(self._sizes.values())

    @property
    def floating_dtypes(self) -> tuple[torch.dtype, ...]:
        """The floating point formats that occur, most elements first."""
        counted: dict[torch.dtype, int] = {}
        for name, dtype in self.dtypes.items():
            if dtype.is_floating_point:
                counted[dtype] = counted.get(dtype, 0) + self._sizes[name] // dtype.itemsize
        return tuple(sorted(counted, key=lambda dtype: -counted[dtype]))

    def mapped(self) -> Mapping[str, Tensor]:
        """Return the tensors where they lie. What is touched stays in memory as long as one of them lives."""
        return self._open()

    def converted(
        self, layout: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], notes: Sequence[str] = ()
    ) -> "StoredWeights":
        """Return the same weights under other names.

        Args:
            layout: From tensors by name to tensors by name. It may rename, split, reshape and leave out; it
                is called again for every part that is read, so it should make views.
            notes: What was chosen, for people.
        """
        return StoredWeights(lambda: layout(self._open()), self.source, (*self.notes, *notes))

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield every name with its tensor, contiguous, in memory of its own.

        Args:
            dtype: Format of floating point tensors; None: as stored.
        """
        for names in self._rounds():
            mapped = self._open()
            for name in names:
                tensor = mapped[name]
                yield (
                    name,
                    tensor.to(
                        dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype,
                        memory_format=torch.contiguous_format,
                        copy=True,
                    ),
                )
            del mapped, tensor  # closes the files

    def _rounds(self) -> Iterator[list[str]]:
        names: list[str] = []
        size = 0
        for name, num_bytes in self._sizes.items():
            if names and size + num_bytes > _ROUND_BYTES:
                yield names
                names, size = [], 0
            names.append(name)
            size += num_bytes
        if names:
            yield names


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized


def open_weights(
    place: Path, *, which: Which = "auto", skip_objects: bool = False, variant: str | None = None
) -> StoredWeights:
    """Open a weight file, or the weights of a model folder: one file, or shards with their index.

    Args:
        place: ``.safetensors``, a pickle, an index of shards (``….safetensors.index.json``), or a folder.
        which: Of a training checkpoint with averaged and trained weights.
        skip_objects: Of a pickle, leave out what is not a tensor or a plain value instead of refusing the
            file. Nothing of it is run: empty placeholders stand for the objects.
        variant: Of a folder with several sets, such as ``fp16``.

    Raises:
        MissingWeights: If there is no such file, or a shard is missing.
        WrongWeights: If a file is damaged, holds no named tensors, or would have to run code to be read.
        ModelError: If it is not clear which file is meant.
    """
    files = weight_files_in(place, variant) if place.is_dir() else (place,)
    if len(files) == 1 and files[0].name.endswith(".index.json"):
        files = _shards(files[0])
    for file in files:
        if not file.is_file():
            raise MissingWeights(f"there is no weight file {file}.")
    if len(files) == 1 and files[0].suffix != ".safetensors":
        return _open_pickle(files[0], which, skip_objects)

    def open_all() -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _load_safetensors(file).items():
                if name in state:
                    raise WrongWeights(f"{name} is in two shards of {place}; they are not one model's.")
                state[name] = tensor
        return state

    stored = StoredWeights(open_all, str(place))
    if not stored.shapes:
        raise WrongWeights(f"{place} holds no tensors.")
    return stored


def weight_files_in(folder: Path, variant: str | None = None) -> tuple[Path, ...]:
    """Return the weight file of a model folder, or its shards.

    Safetensors come before pickles, and of several files the one with a usual name.

    Raises:
        MissingWeights: If there is none, or a shard is missing.
        ModelError: If there are several and none has a usual name.
    """
    middle = f".{variant}" if variant else ""
    usual = ("diffusion_pytorch_model", "model", "pytorch_model")
    for stem in usual:
        for index in (f"{stem}.safetensors.index{middle}.json", f"{stem}{middle}.safetensors.index.json"):
            if (folder / index).is_file():
                return _shards(folder / index)
    for suffix in (".safetensors", ".bin"):
        for stem in usual:
            if (folder / f"{stem}{middle}{suffix}").is_file():
                return (folder / f"{stem}{middle}{suffix}",)
    for suffixes in ((".safetensors",), PICKLE_SUFFIXES):
        found = sorted(path for path in folder.glob("*") if path.suffix in suffixes and path.is_file())
        if variant:
            found = [path for path in found if f".{variant}." in path.name]
        if len(found) > 1:
            raise ModelError(
                f"{folder} holds {len(found)} weight files ({', '.join(path.name for path in found[:4])}). "
                "Give the path of the one that is meant."
            )
        if found:
            return tuple(found)
    raise MissingWeights(
        f"{folder} holds no weights{f' of the variant {variant}' if variant else ''}: "
        f"no .safetensors, no {', '.join(PICKLE_SUFFIXES)}."
    )


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = tuple(index.parent / file for file in sorted(set(named.values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WrongWeights(f"{index} is no index of shards ({error}); copy the folder again.") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise MissingWeights(
            f"{len(missing)} of the {len(files)} shards that {index.name} names are not in {index.parent} "
            f"({', '.join(missing[:3])}); copy the folder again as a whole."
        )
    present = {name for file in files for name in _load_safetensors(file)}
    if present != set(named):
        different = sorted(present ^ set(named))
        raise WrongWeights(
            f"{index} does not name the tensors that its shards hold: {len(different)} differ "
            f"({', '.join(different[:3])}). Files of two models were mixed; copy the folder again."
        )
    return files


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception | str) -> WrongWeights:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return WrongWeights(
                f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` in its folder, or "
                "download the file itself."
            )
    return WrongWeights(
        f"{path} cannot be read as weights ({' '.join(str(error).split())[:200]}). "
        "If it was copied or downloaded, it may be cut off: copy it again. Weights are a .safetensors file, "
        "or a .bin/.pth/.ckpt that holds a plain dictionary of tensors."
    )


# ── pickles ──────────────────────────────────────────────────────────────────────────────────────────


def _open_pickle(path: Path, which: Which, skip_objects: bool) -> StoredWeights:
    content, skipped = _unpickled(path, skip_objects)
    keys, notes = _where_weights_are(content, which, path)
    if skipped:
        notes.append(f"left out of {path.name}, and not run: {', '.join(skipped)}")
    if not zipfile.is_zipfile(path):  # torch before 1.6: no mapping; it is in memory now, so it stays there
        in_memory = _at(content, keys, path)
        return StoredWeights(lambda: in_memory, str(path), notes)
    del content
    return StoredWeights(lambda: _at(_unpickled(path, skip_objects)[0], keys, path), str(path), notes)


class _Placeholder:
    """Stands for an object of a pickle that is left out: takes any arguments and any state."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


class _DictionaryPlaceholder:
    """The same for objects that are filled item by item, which only plain dictionaries may be."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def _unpickled(path: Path, skip_objects: bool) -> tuple[Any, list[str]]:
    """Return what a pickle holds, and the names of what was left out of it."""
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": zipfile.is_zipfile(path)}
    try:
        return torch.load(path, **options), []
    except pickle.UnpicklingError as error:
        names = _objects_in(path)
        attacks = [name for name in (*names, *_names_in(path)) if name.startswith(_ATTACKS)]
        if attacks:
            raise _attacks(path, attacks) from error
        if not (skip_objects and names):
            raise _needs_code(path, names) from error
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    refused: Exception | None = None
    for placeholder in (_Placeholder, _DictionaryPlaceholder):
        try:
            with torch.serialization.safe_globals([(placeholder, name) for name in names]):
                return torch.load(path, **options), names
        except _UNREADABLE as error:  # such as a placeholder of the wrong kind
            refused = error
    raise _needs_code(path, names, skipped=True) from refused


def _objects_in(path: Path) -> list[str]:
    """Return the classes and functions that a pickle asks for, read off its text; none of them is called."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except _UNREADABLE:  # an old or foreign pickle, whose text torch does not take apart
        return []


def _names_in(path: Path) -> set[str]:
    """Return all classes and functions that a pickle names; nothing is called.

    Raises:
        WrongWeights: If the file is no pickle at all.
    """
    names: set[str] = set()
    number = 0
    try:
        with _pickle_in(path) as file:
            for number in range(_PICKLES):  # noqa: B007  (it tells below how far it came)
                names |= _names_of_next(file)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        if not number:
            raise _unreadable(path, "it is no pickle, or was damaged") from error
    return names  # what is no pickle after the first one is numbers


def _names_of_next(file: io.BufferedIOBase) -> set[str]:
    names: set[str] = set()
    texts: list[str] = []
    memo: list[str] = []
    for operation, value, _ in pickletools.genops(file):  # type: ignore[arg-type]
        if operation.name in ("GLOBAL", "INST"):
            names.add(str(value).replace(" ", ".").replace("__builtin__.", "builtins."))
        elif operation.name == "STACK_GLOBAL":
            names.add(".".join(texts[-2:]))
        elif operation.name == "MEMOIZE":
            memo.append(texts[-1] if texts else "")
        elif operation.name in ("BINGET", "LONG_BINGET"):
            texts.append(memo[value] if isinstance(value, int) and value < len(memo) else "")
        elif isinstance(value, str):
            texts.append(value)
    return names


def _pickle_in(path: Path) -> io.BufferedIOBase:
    """Return the program of a pickle; of torch's newer layout, without the numbers that lie beside it."""
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith("data.pkl")), "data.pkl")
        return io.BytesIO(archive.read(name))


def _attacks(path: Path, names: Sequence[str]) -> WrongWeights:
    return WrongWeights(
        f"{path} is not a file of tensors only: opening it would run {', '.join(sorted(set(names)))}. "
        "That is how pickles attack a machine. Do not open it; ask its source for safetensors."
    )


def _needs_code(path: Path, names: Sequence[str], *, skipped: bool = False) -> WrongWeights:
    asked = f" (it asks for {', '.join(names[:5])})" if names else ""
    skip = "`pixcell convert FILE DEST --skip-objects` takes the tensors and leaves the rest out "
    ways = [skip + "without running it"] if names and not skipped else []
    ways += [
        "ask its source for safetensors",
        'if you trust the source, in a container without network: python -c "import torch; '
        "torch.save(torch.load('FILE', weights_only=False)['state_dict'], 'tensors.pth')\"",
    ]
    return WrongWeights(
        f"{path} is not a file of tensors only: opening it would run code{asked}, so it was not opened. "
        f"Ways out: {'; or '.join(ways)}."
    )


def _where_weights_are(content: Any, which: Which, path: Path) -> tuple[tuple[str, ...], list[str]]:
    """Return the keys that lead to the named tensors, and what was chosen if there was a choice."""
    if not isinstance(content, dict):
        raise WrongWeights(
            f"{path} holds a {type(content).__name__}, not a dictionary of named tensors. "
            "Save model.state_dict() instead of the model."
        )
    trained = next((key for key in _TRAINED if isinstance(content.get(key), dict) and content[key]), None)
    if isinstance(content.get(_AVERAGED), dict) and content[_AVERAGED] and which != "raw":
        if trained is None:
            return (_AVERAGED,), []
        notes = [f"the averaged weights ({_AVERAGED}); the trained ones ({trained}) with --weights raw"]
        if any(
            not torch.equal(value, content[_AVERAGED][name])
            for name, value in _trained_constants(content, content[_AVERAGED]).items()
        ):
            notes.append('with the "no condition" vector of the trained ones: the averaged copy has another')
        return (_AVERAGED,), notes
    # Checkpoints in the ldm layout keep averages among the other tensors; see models.pathldm_layout.
    inside = trained is not None and any(str(name).startswith(_AVERAGED_INSIDE) for name in content[trained])
    if which == "ema" and not inside:
        raise MissingWeights(
            f"{path} holds no averaged weights ({_AVERAGED}); its keys are "
            f"{', '.join(list(map(str, content))[:6])}. Take the trained ones: --weights raw."
        )
    if trained is None:
        return (), []
    # Training frameworks wrap the dictionary once or twice.
    nested = [key for key in _TRAINED if isinstance(content[trained].get(key), dict)]
    notes = [f"the trained weights ({trained}), not the averaged ones"] if content.get(_AVERAGED) else []
    return (trained, *nested[:1]), notes


def _at(content: Any, keys: Sequence[str], path: Path) -> dict[str, Tensor]:
    state = content
    for key in keys:
        state = state[key]
    other = [str(key) for key, value in state.items() if not isinstance(value, Tensor) or value.is_meta][:3]
    if other or not state:
        raise WrongWeights(
            f"{path} does not hold a dictionary of named tensors"
            + (f" ({', '.join(other)}: something else)." if other else ".")
        )
    named = {str(name): value for name, value in state.items()}
    if keys == (_AVERAGED,):
        named |= _trained_constants(content, named)
    return _without_wrappers(named)


def _trained_constants(content: Mapping[str, Any], averaged: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the constants that the trained weights were trained with.

    The published training averages parameters only. After a warm start the averaged copy keeps the constants
    of its own random start, above all another "no condition" vector, which the model never saw.
    """
    trained = content.get("state_dict")
    return {
        name: value
        for name, value in (trained.items() if isinstance(trained, dict) else ())
        if str(name).removeprefix("module.") in _CONSTANTS
        and name in averaged
        and isinstance(value, Tensor)
        and isinstance(averaged[name], Tensor)
        and value.shape == averaged[name].shape
    }


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off what distributed training and compiling put before every name."""
    while state:
        prefix = next(iter(state)).partition(".")[0] + "."
        if prefix not in ("module.", "_orig_mod.") or not all(name.startswith(prefix) for name in state):
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
