"""Model cards: what a folder of converted weights is, where it came from, and how to open it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixcell.models.published_openers import read_json

__all__ = ["model_card"]

_CAUTION = (
    "Research use only. What it generates is synthetic tissue: not a patient's, not for diagnosis, and to be "
    "labelled as synthetic wherever it goes."
)
_OPENING = {
    "lora": ("pixcell.models.adapters", 'load_lora(transformer, "FOLDER/pytorch_lora_weights.safetensors")'),
    "uni2-h": ("pixcell.models.encoders", 'load_encoder("FOLDER")'),
}
_HOMES = {
    "PixCellPipeline": "pixcell.diffusion.pipelines",
    "VirtualStainingPipeline": "pixcell.diffusion.staining",
    "TextPipeline": "pixcell.diffusion.text_pipeline",
    "PixCellTransformer2DModel": "pixcell.models.transformer",
    "PixCellControlNetModel": "pixcell.models.controlnet",
    "EmbeddingTranslator": "pixcell.models.translator",
    "TissueAutoencoder": "pixcell.models.autoencoder",
    "ClassEmbedder": "pixcell.models.pathldm",
    "CLIPTextModel": "transformers",
}
_SHOWN = (
    "sample_size",
    "in_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "caption_channels",
    "caption_num_tokens",
    "n_controlnet_blocks",
    "model_channels",
    "num_res_blocks",
    "latent_channels",
    "scaling_factor",
    "shift_factor",
    "interpolation_scale",
)


def model_card(folder: Path, origin: Mapping[str, Any], parameters: Mapping[str, int]) -> str:
    """Return the text of ``README.md``; it depends on nothing but the arguments.

    Args:
        folder: With everything but the card.
        origin: What ``origin.json`` says.
        parameters: Of each part.
    """
    licence = origin["licence"] or "not known"
    lines = [
        "---",
        f"license: {_tag(licence)}",
        *([f"license_name: {licence!r}"] if _tag(licence) == "other" else []),
        "library_name: pixcell",
        "tags: [histopathology, diffusion]",
        "---",
        "",
        f"# {origin['name']}",
        "",
        f"{_sentence(origin['what'])} Converted to safetensors by `pixcell convert`, "
        + (
            "without a change to any number."
            if origin["precision"] == "stored"
            else f"rounded to {origin['precision']}."
        ),
        "",
        f"> {_CAUTION}",
        "",
        "## Open it",
        "",
        "```python",
        *_opening(folder, origin["kind"]),
        "```",
        "",
        "## Where it came from",
        "",
        f"- source: {origin['name']}" + (f", {_page(origin['repository'])}" if origin["repository"] else ""),
        f"- licence: {licence} ({_LICENCE_FROM[origin['licence_from']]})",
        *(f"- SHA-256 of `{name}`: `{value}`" for name, value in origin["files_sha256"].items()),
        *(f"- {note}" for note in origin["notes"]),
        "",
        "## What is in it",
        "",
        "| part | parameters | SHA-256 of its values |",
        "|---|---|---|",
        *(
            f"| {name} | {count:,} | `{origin['weights_sha256'][name]}` |"
            for name, count in parameters.items()
        ),
        "",
        *_configuration(folder),
    ]
    return "\n".join(lines).rstrip() + "\n"


_LICENCE_FROM = {
    "given": "as given at the conversion",
    "public pages": "as public pages state it; the one that came with your download holds",
    "not known": "the file does not say; see where you got it",
}


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _page(repository: str) -> str:
    return f"[{repository}](https://huggingface.co/{repository})"


def _tag(licence: str) -> str:
    """Return what the hub calls a licence."""
    return {"Apache-2.0": "apache-2.0", "MIT": "mit", "CC BY-NC-ND 4.0": "cc-by-nc-nd-4.0"}.get(
        licence, "other"
    )


def _opening(folder: Path, kind: str) -> list[str]:
    """Return the lines that open the folder, called FOLDER in them."""
    if kind in ("lora", "lora-adapter"):
        home, call = _OPENING["lora"]
    elif kind == "uni2-h":
        home, call = _OPENING["uni2-h"]
    else:
        index = folder / "model_index.json"
        stated = read_json(index if index.is_file() else folder / "config.json")
        name = stated.get("_class_name") or stated["architectures"][0]
        return [
            f"from {_HOMES.get(name, 'diffusers')} import {name}",
            "",
            f'model = {name}.from_pretrained("FOLDER")',
        ]
    return [f"from {home} import {call.split('(')[0]}", "", call]


def _configuration(folder: Path) -> list[str]:
    files = [folder / "config.json", *sorted(folder.glob("*/config.json"))]
    lines = []
    for file in files:
        if file.is_file():
            stated = {
                key: value for key, value in read_json(file).items() if key in _SHOWN and value is not None
            }
            name = file.parent.name if file.parent != folder else "configuration"
            values = ", ".join(f"{key} {stated[key]}" for key in _SHOWN if key in stated)
            lines += [f"- {name}: {values}"] if values else []
    return lines
