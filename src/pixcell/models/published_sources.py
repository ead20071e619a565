"""Where published weights are: names for the repositories and files that one may ask for.

Licences are what public pages state about them; none was read off the model's own page for this table. The
one that comes with your download is the one that holds.
"""

from dataclasses import dataclass
from pathlib import Path

from pixcell.errors import MissingWeights
from pixcell.models.weight_files import PICKLE_SUFFIXES
from pixcell.models.weights import fetch

__all__ = ["PUBLISHED_WEIGHTS", "PublishedSource", "find_source"]

_FOLDER = ("*.json", "*.safetensors")
_WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


@dataclass(frozen=True)
class PublishedSource:
    """Published weights that can be asked for by name."""

    name: str
    """What commands call it."""
    repository: str
    """On the Hugging Face hub."""
    inside: str = ""
    """File or folder in the repository; empty: all of it."""
    licence: str = "not known: read the model's page"
    """Of the weights, as public pages state it."""
    gated: bool = False
    """Whether the hub asks to accept terms and log in."""


def _staining(target: str) -> tuple[PublishedSource, PublishedSource]:
    repository = "StonyBrook-CVLab/pixcell-virtual-staining"
    name = target.replace("_", "-")
    return (
        PublishedSource(f"pixcell-{name}-lora", repository, f"ckpts/lora/{target}_lora.pth"),
        PublishedSource(f"pixcell-{name}-translator", repository, f"ckpts/mlp/{target}_mlp.pth"),
    )


_NON_COMMERCIAL = "CC BY-NC-ND 4.0"
_APACHE = "Apache-2.0"
_STABILITY = "Stability AI Community License"
_ROWS = (
    PublishedSource("pixcell-256", "StonyBrook-CVLab/PixCell-256", licence=_APACHE),
    PublishedSource("pixcell-1024", "StonyBrook-CVLab/PixCell-1024", licence=_NON_COMMERCIAL),
    PublishedSource(
        "pixcell-256-cell-controlnet", "StonyBrook-CVLab/PixCell-256-Cell-ControlNet", licence=_APACHE
    ),
    PublishedSource("pixcell-256-original", "StonyBrook-CVLab/PixCell-original-weights", "pixcell_256.ckpt"),
    PublishedSource(
        "pixcell-1024-original", "StonyBrook-CVLab/PixCell-original-weights", "pixcell_1024.ckpt"
    ),
    *_staining("mist_her2"),
    *_staining("mist_er"),
    *_staining("mist_pr"),
    *_staining("mist_ki67"),
    *_staining("her2match"),
    PublishedSource("uni2-h", "MahmoodLab/UNI2-h", "pytorch_model.bin", licence=_NON_COMMERCIAL, gated=True),
    PublishedSource(
        "sd3.5-vae", "stabilityai/stable-diffusion-3.5-large", "vae", licence=_STABILITY, gated=True
    ),
    PublishedSource(
        "sd3-vae", "stabilityai/stable-diffusion-3-medium-diffusers", "vae", licence=_STABILITY, gated=True
    ),
)

PUBLISHED_WEIGHTS: dict[str, PublishedSource] = {row.name: row for row in _ROWS}
"""Published weights by name. Not pinned: they are those of ``main`` at the time of your download."""


def find_source(source: str | Path, *, download: bool = False) -> tuple[Path, PublishedSource | None]:
    """Return where weights are on this machine, and which published ones they are if they were named.

    Args:
        source: A file or folder; one of :data:`PUBLISHED_WEIGHTS`; or ``owner/name`` on the Hugging Face hub,
            with the file or folder in it behind a further slash, and ``@revision`` at the end.
        download: Whether what is not on this machine may be downloaded. Python files never are.

    Raises:
        MissingWeights: If it is neither, or not on this machine and may not be downloaded, or is gated.
    """
    if Path(source).exists():
        return Path(source), None
    known = PUBLISHED_WEIGHTS.get(str(source))
    named, _, revision = str(source).partition("@")
    owner, _, rest = named.partition("/")
    name, _, inside = rest.partition("/")
    is_path = owner in ("", ".", "..", "~") or (not inside and Path(name).suffix in _WEIGHT_SUFFIXES)
    if known is None and (is_path or not name):
        raise MissingWeights(
            f"there is no {source}: it is neither a file, a folder, owner/name on the hub, nor one of "
            f"{', '.join(PUBLISHED_WEIGHTS)}."
        )
    origin = known or PublishedSource(named, f"{owner}/{name}", inside)
    is_file = bool(Path(origin.inside).suffix)
    patterns = (
        (origin.inside,)
        if is_file
        else tuple(f"{origin.inside}/{pattern}" if origin.inside else pattern for pattern in _FOLDER)
    )
    folder = fetch(
        origin.repository,
        patterns,
        revision=revision or None,
        download=download,
        advice="Or give the file or folder, if you have it.",
    )
    return folder / origin.inside, origin
