"""A prior over embeddings: where the embeddings of real tissue lie, so that new ones can be drawn.

A model that is told nothing makes what it has seen most. Drawn embeddings make it vary as tissue does,
without a reference picture. A prior is a mixture of Gaussians along the leading directions of the embeddings,
plus noise of its own size in each dimension for what these directions leave out:

    x = mean + basis^T (center_k + factor_k z) + residual_std * e        k with probability weight_k

with z and e standard normal. One component is a Gaussian, a short basis a low-rank one. Components may carry
a label; then a label can be asked for. ``x`` is a whole grid of fields, so neighbours in it fit each other.

    PRIOR/prior.json            encoder, field size, resolution, what it was fitted to, hash of the numbers
    PRIOR/prior.safetensors     the numbers

A draw depends on the seed and its index only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pixcell.diffusion.conditioning import Conditioning
from pixcell.diffusion.described import read_described, read_description, write_described
from pixcell.diffusion.model_facts import check_encoder
from pixcell.errors import ModelError, WrongWeights, listed
from pixcell.geometry import scale_between
from pixcell.models.weights import weights_sha256

__all__ = ["PRIOR_FILE", "EmbeddingPrior", "read_prior_facts"]

PRIOR_FILE = "prior.json"
_NAME, _ADVICE = "prior", "Fit one with `pixcell prior STORE FOLDER`."
_FORMAT = "pixcell-prior-1"
_TENSORS = ("mean", "basis", "residual_std", "weights", "centers", "factors")
_STREAM = 7
"""Sets the chance of embeddings apart from that of noise: picture i must not start from its own embedding."""


@dataclass(frozen=True)
class EmbeddingPrior:
    """A mixture of Gaussians over grids of embeddings; see the top of the module.

    Args:
        mean: Of a whole grid, flattened: ``size`` is rows * columns * dim.
        basis: Leading directions, orthonormal.
        residual_std: What varies outside the basis, per dimension.
        weights: Probability of each component; they add up to 1.
        centers: Of the components, along the basis.
        factors: Lower triangular; ``factor @ factor.T`` is the covariance of a component, along the basis.
        labels: Of the components. None: without.
        facts: ``encoder`` (name, sha256, dim), ``rows``, ``columns``, ``field_size`` in pixels, ``mpp``, and
            what it was fitted to.
    """

    mean: Float[Tensor, " size"]
    basis: Float[Tensor, "rank size"]
    residual_std: Float[Tensor, " size"]
    weights: Float[Tensor, " components"]
    centers: Float[Tensor, "components rank"]
    factors: Float[Tensor, "components rank rank"]
    labels: tuple[str | None, ...]
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        rows, columns, dim = self.grid_shape
        if rows * columns * dim != len(self.mean) or len(self.labels) != len(self.weights):
            raise ValueError(
                f"{rows} x {columns} embeddings {dim} wide and {len(self.labels)} labels do not fit "
                f"{len(self.mean)} means and {len(self.weights)} components"
            )
        for name in _TENSORS:
            # Matrix kernels are chosen by layout and alignment, and differ in the last bit: a draw must not
            # depend on whether the prior was just fitted or read from a file.
            aligned = getattr(self, name).clone(memory_format=torch.contiguous_format)
            object.__setattr__(self, name, aligned)

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """Rows and columns of fields, and the width of an embedding."""
        return int(self.facts["rows"]), int(self.facts["columns"]), int(self.facts["encoder"]["dim"])

    @property
    def names(self) -> list[str]:
        """The labels that can be asked for, sorted."""
        return sorted({label for label in self.labels if label is not None})

    @property
    def sha256(self) -> str:
        """Of the numbers, whichever file they were stored in."""
        return weights_sha256(self._tensors())

    def sample(
        self, seed: int, index: int, *, label: str | None = None, temperature: float = 1.0
    ) -> Float[Tensor, "rows columns dim"]:
        """Draw an embedding grid, float32, on the CPU.

        Args:
            seed: Of the whole set, 0 or larger.
            index: Of the draw in it, 0 or larger. Other draws do not matter.
            label: Which tissue. None: any, as often as it was seen.
            temperature: Scales how far a draw lies from the centre of its component: 0 is the centre itself.

        Raises:
            ModelError: If there is no such label, or the temperature is negative.
        """
        self.check_draw(label, temperature)
        # Mixed with a number of its own, as ``sampling.generator_for`` mixes seed and index.
        mixed = np.random.SeedSequence((seed, index), spawn_key=(_STREAM,)).generate_state(1, np.uint64)[0]
        generator = torch.Generator("cpu").manual_seed(int(mixed))
        chosen = [place for place, own in enumerate(self.labels) if label is None or own == label]
        reached = self.weights[chosen].double().cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * reached[-1]
        component = chosen[min(int((reached <= drawn).sum()), len(chosen) - 1)]
        along = self.factors[component] @ torch.randn(self.centers.shape[1], generator=generator)
        aside = self.residual_std * torch.randn(len(self.mean), generator=generator)
        coefficients = self.centers[component] + temperature * along
        return (self.mean + coefficients @ self.basis + temperature * aside).reshape(self.grid_shape)

    def conditioning(
        self, seed: int, indices: Sequence[int], *, label: str | None = None, temperature: float = 1.0
    ) -> Conditioning:
        """Draw several, as conditions that know their encoder; see :meth:`sample`."""
        grids = [self.sample(seed, index, label=label, temperature=temperature) for index in indices]
        return Conditioning(torch.stack(grids), encoder=self.facts["encoder"])

    def check_draw(self, label: str | None, temperature: float) -> None:
        """Refuse what cannot be drawn; see :meth:`sample`."""
        if label is not None and label not in self.labels:
            there = listed(self.names, 20) if self.names else "none: it was fitted without --by"
            raise ModelError(f"the prior has no label {label!r}. Labels: {there}.")
        if not (np.isfinite(temperature) and temperature >= 0):
            raise ModelError(f"temperature {temperature} must be 0 or more (1 is as measured).")

    def check_fits(
        self, model_facts: Mapping[str, Any], *, grid_size: int, dim: int, encoder: str | None = None
    ) -> None:
        """Refuse a model to which these embeddings would mean nothing.

        Args:
            model_facts: Of the pipeline (``pipeline.facts``); published ones may have none.
            grid_size: Rows and columns of fields in a picture of the model.
            dim: Width of its embeddings.
            encoder: Name of the model's encoder, where the model does not tell.

        Raises:
            ModelError: If encoder, width, grid, field size or resolution differ; or if nobody knows the
                encoder. Says what to do.
        """
        own, known = self.facts["encoder"], model_facts.get("encoder") or {}
        if not known and encoder is None:
            raise ModelError(
                "the model does not say which encoder it was trained with (it has no pixcell.json). "
                f"Name it, for example --set encoder=uni2-h; this prior is of {own['name']}."
            )
        if encoder is not None and encoder != own["name"]:
            raise ModelError(f"the prior is of embeddings by {own['name']}, and encoder={encoder} was named.")
        check_encoder(known, own)
        if own["dim"] != dim:
            raise ModelError(f"the prior is of embeddings {own['dim']} wide; the model takes {dim}.")
        rows, columns, _ = self.grid_shape
        field_size = model_facts.get("field_size", self.facts["field_size"])
        if field_size != self.facts["field_size"]:
            raise ModelError(
                f"the prior is of fields of {self.facts['field_size']} px; the model's have {field_size} px. "
                f"Encode with --field-size {field_size}, and fit it again."
            )
        if (rows, columns) != (grid_size, grid_size):
            raise ModelError(
                f"the prior is of {rows} x {columns} fields; a picture of the model has {grid_size} x "
                f"{grid_size}. Fit one to whole pictures: --size {grid_size * field_size}."
            )
        mpp = model_facts.get("mpp")
        if mpp is not None and scale_between(self.facts["mpp"], mpp) != 1.0:
            raise ModelError(
                f"the prior was fitted at {self.facts['mpp']:g} microns per pixel; the model's pictures are "
                f"at {mpp:g}. Fit one to a store of that resolution."
            )

    def save(self, folder: Path, *, replace: bool = False) -> None:
        """Write ``prior.safetensors`` and ``prior.json``.

        Raises:
            OutputError: If there is a prior already, unless it is to be replaced, or the place cannot be
                written.
        """
        facts = {**self.facts, "component_labels": list(self.labels)}
        write_described(Path(folder), _NAME, _FORMAT, self._tensors(), facts, replace)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a prior.

        Raises:
            MissingWeights: If there is none.
            WrongWeights: If it is damaged, or its files are of two priors.
        """
        tensors, facts = read_described(Path(folder), _NAME, _FORMAT, _ADVICE)
        try:
            return cls(**tensors, labels=tuple(facts.pop("component_labels")), facts=facts)
        except (KeyError, TypeError, ValueError) as error:
            raise WrongWeights(f"{folder} holds no whole prior ({error}). Fit it again.") from error

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}


def read_prior_facts(folder: Path) -> dict[str, Any]:
    """Return what a prior says about itself, without its numbers.

    Raises:
        MissingWeights: If there is none.
        WrongWeights: If the description is damaged or of another format.
    """
    return read_description(Path(folder), _NAME, _FORMAT, _ADVICE)
