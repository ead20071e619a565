"""Turn published weights, or those of a run, into safetensors in the diffusers layout, with a model card.

    DEST/                            one model                    several models (a pipeline)
    ├── README.md                    model card: source, licence, hashes, how to open it
    ├── origin.json                  the same for programs
    ├── config.json                  of the model                 model_index.json, pixcell.json
    └── diffusion_pytorch_model.…    its tensors                  transformer/  vae/  scheduler/  …

The same source gives the same bytes; converting the result again gives them once more. ``DEST`` appears whole
or not at all.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from pixcell.console import console, facts
from pixcell.diffusion.guidance import usual_guidance_scale
from pixcell.diffusion.pipelines import PixCellPipeline
from pixcell.diffusion.schedulers import make_scheduler, pathldm_scheduler
from pixcell.diffusion.staining import VirtualStainingPipeline
from pixcell.diffusion.text_pipeline import TextPipeline
from pixcell.errors import MissingWeights, ModelError
from pixcell.files import sha256_of, write_json, write_text, write_whole_folder
from pixcell.models.adapters import lora_state, save_lora, saved_without_adapters
from pixcell.models.codec import PUBLISHED_CODECS, LatentCodec
from pixcell.models.encoders import ENCODERS
from pixcell.models.published import KINDS, Published, open_published
from pixcell.models.published_configs import uni_arguments
from pixcell.models.published_openers import read_json
from pixcell.models.text import PUBLISHED_TEXT_ENCODERS, load_tokenizer
from pixcell.models.transformer import PixCellTransformer2DModel
from pixcell.models.weight_files import Which, open_weights, weight_files_in
from pixcell.models.weights import Precision, dtype_of, fetch, weights_sha256
from pixcell.tasks.facts import size_of, size_text
from pixcell.tasks.model_cards import model_card
from pixcell.tasks.run_export import RunExport, run_export

__all__ = ["ORIGIN_FILE", "ConvertResult", "convert"]

ORIGIN_FILE = "origin.json"
"""Where a converted folder says what it was made from."""

_PIPELINES: dict[str, Any] = {
    "PixCellPipeline": PixCellPipeline,
    "PixCellControlNetPipeline": PixCellPipeline,
    "VirtualStainingPipeline": VirtualStainingPipeline,
    "TextPipeline": TextPipeline,
}
_LORA_FILE = "pytorch_lora_weights.safetensors"
_PUBLISHED_WIDTH = ENCODERS["uni2-h"].dim
_SCRATCH = ".run"
_OUR_NAMES = {"ema": "averaged", "raw": "trained"}
_WHICH: dict[str, Which] = {"auto": "auto", "averaged": "ema", "trained": "raw"}


@dataclass(frozen=True)
class ConvertResult:
    """What was converted."""

    dest: Path
    kind: str
    what: str
    parameters: Mapping[str, int]
    """Of each part."""
    notes: tuple[str, ...]
    """What was derived, chosen or left out."""

    def __rich__(self) -> Table:
        """Lay the result out for a terminal."""
        parts = {name: f"{count:,} parameters" for name, count in self.parameters.items()}
        notes = {"note" if len(self.notes) == 1 else "notes": "\n".join(self.notes)} if self.notes else {}
        entries = {"recognised as": f"{self.what} ({self.kind})", **parts, **notes}
        return facts(f"Converted to {self.dest}", {**entries, "on disk": size_text(size_of(self.dest))})


def convert(
    source: str,
    dest: Path,
    *,
    kind: str | None = None,
    weights: str = "auto",
    precision: Precision | Literal["stored"] = "stored",
    vae: str | None = None,
    base: str | None = None,
    with_base: bool = False,
    tokenizer: str | None = None,
    heads: int | None = None,
    config: dict[str, Any] | None = None,
    licence: str | None = None,
    skip_objects: bool = False,
    download: bool = False,
) -> ConvertResult:
    """Convert published weights, or those of a training run.

    Args:
        source: A run or checkpoint of ours; a file or folder, a published name, or ``owner/name`` on the hub,
            see :func:`~pixcell.models.published_sources.find_source`.
        dest: The folder to write. It must not exist.
        kind: One of :data:`~pixcell.models.published.KINDS`, where tensor names should not decide.
        weights: Of a run, or of a training checkpoint of others: "averaged" (or "ema"), "trained" (or "raw"),
            or "auto": averaged if there are any. Of a run also "averaged-0.999": of that decay.
        precision: Number format to write. "stored": as it is. The autoencoder of a pipeline is
            always written in fp32.
        vae: Autoencoder to go with a denoiser: a folder or a name, such as "sd3.5". With it a denoiser
            becomes a whole pipeline, and the published PixCell-256, which has none, a complete one.
        base: The denoiser that adapters alone belong to: what ``source`` may be, too.
        with_base: Of a denoiser with adapters in it, also write the denoiser.
        tokenizer: For a PathLDM checkpoint, which has none: a folder that holds one, or "clip" or "plip".
        heads: Number of attention heads, where nothing tells it.
        config: Entries of the configuration to replace.
        licence: For the model card. None: what public pages state, if the source was asked for by name.
        skip_objects: Of a pickle, leave out what is no tensor instead of refusing the file.
        download: Whether what is not on this machine may be downloaded.

    Raises:
        OutputError: If ``dest`` exists or cannot be written.
        MissingWeights: If something is not there.
        WrongWeights: If a file is damaged, would have to run code, or does not fit its model.
        ModelError: If something is not known that must be; the message says how to give it.
    """
    adapted = None
    named = _OUR_NAMES.get(weights, weights)
    with (
        write_whole_folder(Path(dest)) as folder,  # refuses what exists before anything is read
        run_export(source, named, folder / _SCRATCH) as run,
    ):
        which = _which(named, run, source)
        if base is not None:
            adapted = _only_transformer(base, which, heads, download)
        published = open_published(
            run.place if run else source,
            kind=kind,
            which=which,
            num_attention_heads=heads,
            config=config,
            base=adapted,
            skip_objects=skip_objects,
            download=download,
        )
        if run:
            published = replace(published, notes=(*run.notes, *published.notes))
        shown = run.name if run else published.place
        console.print(f"{shown} is: {published.what}", markup=False, soft_wrap=True)
        _check_used(published, base, with_base, tokenizer)
        dtype = None if precision == "stored" else dtype_of(precision)
        options = _Options(dtype, vae, with_base, tokenizer, heads, download)
        parts, notes = _WRITERS.get(published.kind, _write_model)(published, folder, options)
        _forget_places(folder)
        hashes = {name: weights_sha256(part) for name, part in sorted(parts.items())}
        origin = _origin(published, hashes, licence, precision, (*published.notes, *notes), vae, run)
        write_json(folder / ORIGIN_FILE, origin)
        counts = {name: _count(part) for name, part in sorted(parts.items())}
        write_text(folder / "README.md", model_card(folder, origin, counts))
    return ConvertResult(Path(dest), published.kind, published.what, counts, (*published.notes, *notes))


def _which(weights: str, run: RunExport | None, source: str) -> Which:
    """Return what to take of a file; of a run, the choice is made already."""
    if run:
        return "auto"
    if weights not in _WHICH:
        raise ModelError(
            f"{source} has no weights {weights!r}: choose auto, averaged or trained. Averages of several "
            "decays (averaged-0.999) are kept by runs of pixcell."
        )
    return _WHICH[weights]


def _check_used(published: Published, base: str | None, with_base: bool, tokenizer: str | None) -> None:
    """Refuse what would have no effect: who gives it believes that it has one."""
    for option, given, kind in (
        ("--base", base is not None, "lora-adapter"),
        ("with_base", with_base, "lora"),
        ("tokenizer", tokenizer is not None, "pathldm"),
    ):
        if given and published.kind != kind:
            raise ModelError(
                f"{option} is for {KINDS[kind]}, and {published.place} is: {published.what}. Leave it out."
            )


@dataclass(frozen=True)
class _Options:
    dtype: torch.dtype | None
    vae: str | None
    with_base: bool
    tokenizer: str | None
    heads: int | None
    download: bool


_Weights = nn.Module | Mapping[str, Tensor]
_Written = tuple[Mapping[str, _Weights], list[str]]


def _count(part: _Weights) -> int:
    return sum(
        value.numel() for value in (part.parameters() if isinstance(part, nn.Module) else part.values())
    )


def _only_transformer(source: str, weights: Which, heads: int | None, download: bool) -> nn.Module:
    published = open_published(source, which=weights, num_attention_heads=heads, download=download)
    if "transformer" not in published.parts:
        raise ModelError(f"--base {source} is {published.what}; adapters belong to a denoiser.")
    return published.parts["transformer"](torch.float32).eval()


# ── one writer per kind; most models write themselves ────────────────────────────────────────────────


def _write_model(published: Published, folder: Path, options: _Options) -> _Written:
    parts = published.load(options.dtype)
    ((_, model),) = parts.items()
    if options.vae is not None:
        if not isinstance(model, PixCellTransformer2DModel) or published.kind == "controlnet":
            raise ModelError(f"--vae goes with a denoiser; {published.place} is: {published.what}.")
        return _write_denoiser_with_vae(model, folder, options)
    model.save_pretrained(str(folder))  # type: ignore[operator]
    return parts, []


def _write_denoiser_with_vae(
    transformer: PixCellTransformer2DModel, folder: Path, options: _Options
) -> _Written:
    codec = LatentCodec.from_pretrained(str(options.vae), download=options.download)
    pipeline = PixCellPipeline(transformer, codec.vae, make_scheduler())
    pipeline.facts = {**_published_facts(pipeline), "codec": _codec_facts(codec)}
    pipeline.save_pretrained(folder)
    return {"transformer": transformer, "vae": codec.vae}, _facts_notes(pipeline.facts)


def _published_facts(pipeline: PixCellPipeline) -> dict[str, Any]:
    """Return what the published models were trained with, if this is one of them by its sizes."""
    transformer = pipeline.transformer
    field_size = pipeline.sample_size // transformer.grid_size
    if transformer.config.caption_channels != _PUBLISHED_WIDTH or field_size != 256:
        return {}
    return {
        "encoder": {"name": "uni2-h", "dim": _PUBLISHED_WIDTH},
        "field_size": field_size,
        "mpp": 0.5,
        "guidance_scale": usual_guidance_scale(transformer.grid_size),
    }


def _codec_facts(codec: LatentCodec) -> dict[str, Any]:
    return {"name": codec.name, "sha256": codec.sha256, "latent_channels": codec.latent_channels}


def _facts_notes(stated: Mapping[str, Any]) -> list[str]:
    if "encoder" not in stated:
        return ["the encoder is not known; `pixcell sample` will ask for it"]
    return [f"taken to be conditioned on {stated['encoder']['name']}, at {stated['mpp']} microns per pixel"]


def _write_pipeline(published: Published, folder: Path, options: _Options) -> _Written:
    index = read_json(published.place / "model_index.json")
    kind = _PIPELINES.get(str(index.get("_class_name")))
    if kind is None:
        raise ModelError(
            f"{published.place} is a {index.get('_class_name')}; pixcell has {', '.join(_PIPELINES)}. "
            "Convert the folders of its models one by one."
        )
    given: dict[str, Any] = {}
    if options.vae is not None:
        if kind is TextPipeline:
            raise ModelError("--vae is for PixCell pipelines; a text pipeline brings its own autoencoder.")
        given["vae"] = options.vae
        given["download"] = options.download
    elif "vae" not in published.parts:
        raise MissingWeights(
            f"{published.place / 'vae'} has a configuration and no weights, as the published PixCell-256: "
            "they are Stability's. Name the autoencoder with --vae (a folder; or sd3.5, gated, with "
            f"--download), or convert the denoiser alone: {published.place / 'transformer'}."
        )
    dtype = options.dtype or _stored_dtype(published)
    pipeline = kind.from_pretrained(published.place, torch_dtype=dtype, **given)
    notes = []
    if kind is PixCellPipeline and not pipeline.facts:
        pipeline.facts = {**_published_facts(pipeline), "codec": _codec_facts(pipeline.codec)}
        notes = _facts_notes(pipeline.facts)
    pipeline.save_pretrained(folder)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return parts, notes


def _stored_dtype(published: Published) -> torch.dtype:
    """Return the format of the part that a number format is chosen for."""
    for name in ("transformer", "unet"):
        if (published.place / name).is_dir():
            return open_weights(published.place / name).floating_dtypes[0]
    return torch.float32


def _write_adapters(published: Published, folder: Path, options: _Options) -> _Written:
    """Write adapters alone: four megabytes, and the hash of the denoiser they belong to."""
    model = published.load(options.dtype)["transformer"]
    assert isinstance(model, PixCellTransformer2DModel)
    save_lora(model, folder / _LORA_FILE)
    notes = []
    if options.with_base:
        with saved_without_adapters(model):
            model.save_pretrained(str(folder / "transformer"))
    elif published.kind == "lora":
        notes.append("the denoiser in the file is not written; with --set with_base=true it is")
    return {"lora": lora_state(model)}, notes


def _write_encoder(published: Published, folder: Path, options: _Options) -> _Written:
    """Write a folder as timm lays it out, which ``load_encoder(folder)`` opens."""
    module = published.load(options.dtype)["encoder"]
    spec = ENCODERS["uni2-h"]
    arguments, _ = uni_arguments(module.state_dict(), spec.arguments, options.heads)
    size = arguments["img_size"]
    config = {
        "architecture": spec.architecture,
        "num_classes": 0,
        "num_features": arguments["embed_dim"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "interpolation": spec.interpolation,
            "crop_pct": 1.0,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": 0,
            "license": spec.licence,
        },
    }
    write_json(folder / "config.json", config)
    save_file(module.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return {"encoder": module}, []


def _write_pathldm(published: Published, folder: Path, options: _Options) -> _Written:
    if "text_encoder" in published.parts and len(published.parts) > 1 and options.tokenizer is None:
        raise MissingWeights(
            f"{published.place} holds a text tower and no tokenizer. Give the one it was trained with: "
            f"--set tokenizer={' or '.join(PUBLISHED_TEXT_ENCODERS)}, or a folder that holds it."
        )
    parts: dict[str, Any] = {**published.load(options.dtype)}
    if set(parts) in ({"unet"}, {"vae"}, {"text_encoder"}):
        ((_, model),) = parts.items()
        model.save_pretrained(str(folder))
        return parts, []
    if missing := {"unet", "vae"} - set(parts):
        raise MissingWeights(
            f"{published.place} holds {', '.join(parts)} and lacks {', '.join(missing)}; "
            "a text pipeline needs both."
        )
    stated: dict[str, Any] = {"mpp": 1.0, "guidance_scale": 1.5}
    given: dict[str, Any] = {}
    if "text_encoder" in parts:
        given["tokenizer"] = load_tokenizer(_tokenizer_folder(str(options.tokenizer), options.download))
        stated["text"] = {"policy": "windows"}
    pipeline = TextPipeline(**parts, **given, scheduler=pathldm_scheduler(), facts=stated)
    pipeline.save_pretrained(folder)
    return parts, ["taken to be trained on 10x (1 micron per pixel), prompts in two windows, as PathLDM"]


def _tokenizer_folder(name: str, download: bool) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if name not in PUBLISHED_TEXT_ENCODERS:
        raise MissingWeights(
            f"tokenizer {name!r} is neither a folder nor one of {', '.join(PUBLISHED_TEXT_ENCODERS)}."
        )
    repository = PUBLISHED_TEXT_ENCODERS[name].repository
    return fetch(repository, ("tokenizer*.json", "vocab.json", "merges.txt"), download=download)


_WRITERS: dict[str, Callable[[Published, Path, _Options], _Written]] = {
    "pipeline": _write_pipeline,
    "lora": _write_adapters,
    "lora-adapter": _write_adapters,
    "uni2-h": _write_encoder,
    "pathldm": _write_pathldm,
}


# ── where it came from ───────────────────────────────────────────────────────────────────────────────


def _forget_places(folder: Path) -> None:
    """Take the paths of this machine out of the configurations; diffusers writes them in."""
    for file in sorted(folder.rglob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "_name_or_path" in content:
            del content["_name_or_path"]
            write_text(file, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _origin(
    published: Published,
    hashes: Mapping[str, str],
    licence: str | None,
    precision: str,
    notes: tuple[str, ...],
    vae: str | None,
    run: RunExport | None,
) -> dict[str, Any]:
    """Say what was converted. A folder that was converted before, and is as it was then, keeps its origin."""
    before = published.place / ORIGIN_FILE
    if before.is_file():
        origin = read_json(before)
        if origin.get("weights_sha256") == dict(hashes):
            return origin if licence is None else {**origin, "licence": licence, "licence_from": "given"}
    source = published.origin
    stated = source.licence if source else None
    if vae is not None:
        known = PUBLISHED_CODECS.get(vae)
        where = f"{vae} ({known.repository})" if known else Path(vae).name
        notes = (*notes, f"the autoencoder in vae/ is from {where}, under a licence of its own")
        stated = f"{stated or 'not known'}; of vae/: {known.licence if known else 'not known'}"
    return {
        "kind": published.kind,
        "what": KINDS[published.kind],
        "name": run.name if run else source.name if source else published.place.name,
        "repository": source.repository if source else None,
        "licence": licence or stated,
        "licence_from": "given" if licence else ("public pages" if source else "not known"),
        "files_sha256": _file_hashes(published.place),
        "weights_sha256": dict(hashes),
        "precision": precision,
        "notes": list(notes),
    }


def _file_hashes(place: Path) -> dict[str, str]:
    if place.is_file():
        return {place.name: sha256_of(place)}
    folders = [place, *sorted(path for path in place.iterdir() if path.is_dir())]
    found: dict[str, str] = {}
    for folder in folders:
        if any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
            for file in weight_files_in(folder):
                found[file.relative_to(place).as_posix()] = sha256_of(file)
    return found
