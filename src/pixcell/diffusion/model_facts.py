"""What the numbers of a saved model mean: ``pixcell.json``, a file more than diffusers have.

    encoder          what made the embeddings it was trained on: name, sha256, dim, preprocessing
    field_size       side of the field that has one embedding, in pixels
    mpp              microns per pixel of its pictures
    codec            what made the latents: name, sha256, latent_channels
    target           what the transformer predicts: noise, velocity or flow
    guidance_scale   the scale that suits it

Any may be absent. Published pipelines have no such file.
"""

from collections.abc import Mapping
from typing import Any

from pixcell.diffusion.conditioning import encoder_difference
from pixcell.diffusion.pipeline_parts import FACTS_FILE
from pixcell.errors import ModelError
from pixcell.models.transformer import PixCellTransformer2DModel

__all__ = ["check_encoder", "check_facts"]


def check_facts(facts: Mapping[str, Any], transformer: PixCellTransformer2DModel, sample_size: int) -> None:
    """Refuse facts that contradict the weights.

    Args:
        facts: Of the pipeline.
        transformer: Its denoiser.
        sample_size: Side of the pictures it was trained on, in pixels.

    Raises:
        ModelError: Names every contradiction.
    """
    config, wrong = transformer.config, []
    dim = facts.get("encoder", {}).get("dim")
    if dim is not None and dim != config.caption_channels:
        wrong.append(
            f"its encoder makes embeddings {dim} wide, its transformer takes {config.caption_channels}"
        )
    channels = facts.get("codec", {}).get("latent_channels")
    if channels is not None and channels != config.in_channels:
        wrong.append(f"its codec makes {channels} channels, its transformer takes {config.in_channels}")
    field_size, side = facts.get("field_size"), transformer.grid_size
    if field_size is not None and field_size * side != sample_size:
        wrong.append(f"{side} x {side} fields of {field_size} px are not a picture of {sample_size} px")
    mpp = facts.get("mpp")
    if mpp is not None and not mpp > 0:
        wrong.append(f"mpp is {mpp}")
    if wrong:
        raise ModelError(
            f"the facts of the pipeline ({FACTS_FILE}) contradict its weights: {'; '.join(wrong)}. "
            "Files of two models were mixed; copy the folder again as a whole."
        )


def check_encoder(known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse embeddings of another encoder than the one a model was trained with, where both are known.

    What counts is told by :func:`~pixcell.diffusion.conditioning.encoder_difference`.

    Args:
        known: What the model says of its encoder (``facts["encoder"]``).
        given: What made the embeddings (``Encoder.made_by()``).

    Raises:
        ModelError: Names both.
    """
    key = encoder_difference(known, given)
    if key is not None:
        raise ModelError(
            f"the embeddings were made by {_named(given)}, and the model was trained with "
            f"{_named(known)}: the {key} is another. They would mean nothing to it; encode with the "
            "model's encoder."
        )


def _named(encoder: Mapping[str, Any]) -> str:
    sha256 = f" ({str(encoder['sha256'])[:12]})" if encoder.get("sha256") else ""
    return str(encoder.get("name", "an encoder")) + sha256
