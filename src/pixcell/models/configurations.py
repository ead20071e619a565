"""Configurations and weights of models: read strictly, and written without the paths of this machine."""

import json
import math
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin

from pixcell.errors import MissingWeights, ModelError, WrongWeights

__all__ = ["PlainConfig", "StrictModel", "check_architecture", "config_in", "read_json"]

_LISTED = 12


class PlainConfig(ConfigMixin):
    """A configuration that does not remember the folder it was loaded from.

    diffusers writes that folder into the file when a model is saved again. Without it a model that is loaded
    and saved gives the same bytes, and no file tells paths of the machine it was made on.
    """

    def to_json_string(self) -> str:
        """Return what ``config.json`` holds."""
        content = json.loads(super().to_json_string())
        content.pop("_name_or_path", None)
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


class StrictModel(ModelMixin, PlainConfig):
    """A model of diffusers whose ``from_pretrained`` wants every tensor, and no other.

    diffusers' own fills gaps with random numbers and warns.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a model from a folder or the hub, with the arguments of diffusers' method of this name.

        Args:
            pretrained_model_name_or_path: As in diffusers.
            kwargs: As in diffusers. With ``output_loading_info=True`` nothing is raised for names, and the
                report of them is returned beside the model.

        Raises:
            WrongWeights: Names the tensors that are missing or left over, or the first of another shape.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path, output_loading_info=True, **kwargs
            )
        except (ValueError, RuntimeError) as error:
            if "expected shape" not in str(error) and "size mismatch" not in str(error):
                raise
            raise WrongWeights(
                f"{pretrained_model_name_or_path} does not fit {cls.__name__}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
        if wants_report:
            return model, report
        wrong = [
            f"{len(report[key])} tensors {what} ({', '.join(map(str, sorted(report[key])[:_LISTED]))})"
            for key, what in (("missing_keys", "missing"), ("unexpected_keys", "unexpected"))
            if report[key]
        ]
        if wrong:
            raise WrongWeights(
                f"{pretrained_model_name_or_path} does not fit {cls.__name__}: {'; '.join(wrong)}."
            )
        return model


def config_in(folder: Path, kind: type[ModelMixin]) -> dict[str, Any]:
    """Return the arguments of a class that a folder states.

    Keys that the class does not have are refused where they are set to something: they might change what the
    weights compute. (Published configurations carry four such keys, all false or null.)
    """
    stated = {
        key: value for key, value in read_json(folder / "config.json").items() if not key.startswith("_")
    }
    known = kind._get_init_keys(kind)
    unknown = {key: value for key, value in stated.items() if key not in known and value not in (None, False)}
    if unknown:
        listed = ", ".join(f"{key} to {value}" for key, value in unknown.items())
        raise ModelError(
            f"{folder / 'config.json'} sets {listed}, which {kind.__name__} does not know. It is the "
            "configuration of another model, or of a newer pixcell; if you know that an entry changes "
            "nothing, delete it from the file."
        )
    return {key: value for key, value in stated.items() if key in known}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        MissingWeights: If there is no such file.
        ModelError: If it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingWeights(f"there is no {path}; copy the folder again as a whole.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); copy the folder again as a whole.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return content


def check_architecture(
    width: int,
    cross_attention_dim: int,
    sample_size: int,
    patch_size: int,
    norm_type: str,
    attention_type: str | None,
    num_tokens: int,
) -> None:
    """Refuse values that cannot make a denoiser.

    Raises:
        ModelError: Names the first that cannot.
    """
    if norm_type != "ada_norm_single" or attention_type not in ("default", None):
        raise ModelError(
            f"norm_type {norm_type!r} with attention_type {attention_type!r} is not this model; "
            "it has 'ada_norm_single' and 'default'."
        )
    if cross_attention_dim != width:
        raise ModelError(
            f"cross_attention_dim is {cross_attention_dim} and the model is {width} wide "
            "(num_attention_heads x attention_head_dim); they must be equal."
        )
    if width < 1 or width % 4:
        raise ModelError(
            f"the model is {width} wide (num_attention_heads x attention_head_dim); its positions are sines "
            "and cosines of rows and columns, which need a multiple of 4."
        )
    if sample_size <= 0 or sample_size % patch_size:
        raise ModelError(f"sample_size {sample_size} must be a positive multiple of patch_size {patch_size}.")
    if num_tokens < 1 or math.isqrt(num_tokens) ** 2 != num_tokens:
        raise ModelError(
            f"caption_num_tokens {num_tokens} is not a square number: "
            "the tokens are a grid of fields (1, 4, 16, ...)."
        )
