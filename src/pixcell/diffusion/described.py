"""Numbers with a description beside them: ``NAME.safetensors`` and ``NAME.json``.

The description is written last and states the hash of the numbers. So it is there when everything is, and
files of two writers are told apart.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pixcell.errors import MissingWeights, OutputError, WrongWeights
from pixcell.files import write_json, write_whole, writing_to
from pixcell.models.weights import read_weights, weights_sha256

__all__ = ["read_described", "read_description", "write_described"]


def write_described(
    folder: Path,
    name: str,
    form: str,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    replace: bool = False,
) -> None:
    """Write both files.

    Args:
        folder: Where; made if it is not there.
        name: Of the files, without ending; also what messages call it.
        form: Name and version of the format.
        tensors: The numbers.
        facts: The description, as JSON values.
        replace: Whether files of that name are replaced.

    Raises:
        OutputError: If there are such files already, or the place cannot be written.
    """
    if not replace and (folder / f"{name}.json").exists():
        raise OutputError(f"{folder} holds a {name}.json already. Choose another folder, or remove it.")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Numbers of one writer must not stand beside the description of another, not even for a moment.
        (folder / f"{name}.json").unlink(missing_ok=True)
    kept = {key: value.contiguous() for key, value in tensors.items()}
    with write_whole(folder / f"{name}.safetensors") as temporary:
        save_file(kept, temporary)
    write_json(folder / f"{name}.json", {"format": form, "sha256": weights_sha256(kept), **facts})


def read_description(folder: Path, name: str, form: str, advice: str = "") -> dict[str, Any]:
    """Return what the numbers are said to be, without reading them.

    Args:
        folder: Where they are.
        name: Of the files, without ending.
        form: Name and version of the format.
        advice: How to make one, appended to the error where there is none.

    Raises:
        MissingWeights: If there are none.
        WrongWeights: If the file is damaged or of another format.
    """
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        raise MissingWeights(f"{folder} holds no {name}: there is no {path.name}. {advice}".rstrip())
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found, digest = facts["format"], facts["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise WrongWeights(f"{path} does not describe anything ({error!r}). Make it again.") from error
    if found != form or not isinstance(digest, str):
        raise WrongWeights(f"{path} is of the format {found!r}; this pixcell reads {form!r}.")
    return dict(facts)


def read_described(
    folder: Path, name: str, form: str, advice: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read both files, and compare the numbers with their hash; see :func:`read_description`.

    Raises:
        MissingWeights: If one of the files is not there.
        WrongWeights: If one is damaged, or they do not belong together.
    """
    facts = read_description(folder, name, form, advice)
    path = Path(folder) / f"{name}.safetensors"
    tensors = read_weights(path)
    if weights_sha256(tensors) != facts["sha256"]:
        raise WrongWeights(
            f"{path} is not what {name}.json beside it was written with: the hash of its numbers differs. "
            "Copy the folder again as a whole."
        )
    return tensors, {key: value for key, value in facts.items() if key not in ("format", "sha256")}
