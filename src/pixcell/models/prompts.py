"""Prompts of PathLDM: how much tumour, how many lymphocytes (TIL), then what the report says.

    fused_prompt("invasive ductal carcinoma", p_tumor=0.9, p_til=0.1)
    -> "high tumor; low til; invasive ductal carcinoma"

Probabilities belong to a tile, the summary to its slide. A probability falls into one of ``num_levels`` equal
parts of [0, 1], each closed below: with two levels 0.5 is high. The class-conditional variant knows four
classes, ``2 * tumour + TIL``, and 4 for "no class".

Where the published code is at fault we differ, and ``reference=True`` gives its behaviour, for comparisons
and for weights trained with it:

    p = 1.0          it fails (the level would be one past the last); here 1.0 is the last level
    0.5 as class     it counts as low, though as a word it counts as high; here it is high in both
    four levels      its class for single summaries takes 4 and uses 3; here 4 are 4
    dropped text     it never drops prompts of many TIL, so "no condition" never saw such tissue; here every
                     prompt is dropped with the probability stated
    dropped class    it never drops a class that is known; here as stated

Source: PathLDM (https://arxiv.org/abs/2309.00748), section 3.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from pixcell.errors import ModelError

__all__ = [
    "LEVELS",
    "UNCONDITIONAL_CLASS",
    "class_label",
    "class_name",
    "fused_prompt",
    "level_of",
    "rows_to_drop",
]

LEVELS = {2: ("low", "high"), 3: ("low", "mid", "high"), 4: ("low", "mid", "high", "very high")}
"""Words for the levels, by their number. Published models use two."""

UNCONDITIONAL_CLASS = 4
"""The label of "no class"."""


def level_of(probability: float, num_levels: int = 2) -> int:
    """Return the level of a probability: ``floor(p * num_levels)``, and the last one for 1.0.

    Raises:
        ModelError: If it is no probability, or there are no words for so many levels.

    >>> [level_of(p) for p in (0.0, 0.49, 0.5, 1.0)]
    [0, 0, 1, 1]
    """
    _words(num_levels)
    if not 0 <= probability <= 1:  # not true of NaN either
        raise ModelError(
            f"a probability of {probability} was given; it must lie in [0, 1]. Leave it out if it is unknown."
        )
    return min(math.floor(probability * num_levels), num_levels - 1)


def _words(num_levels: int) -> tuple[str, ...]:
    if num_levels not in LEVELS:
        raise ModelError(f"{num_levels} levels have no words; choose {', '.join(map(str, LEVELS))}.")
    return LEVELS[num_levels]


def fused_prompt(
    summary: str, p_tumor: float | None = None, p_til: float | None = None, num_levels: int = 2
) -> str:
    """Return the prompt of a tile: its levels in words, then the summary of its slide.

    Args:
        summary: Of the pathology report; may be empty.
        p_tumor: Probability of tumour in the tile. None: not known, the clause is left out.
        p_til: Probability of tumour-infiltrating lymphocytes in the tile. None: as above.
        num_levels: Two for published models.

    Raises:
        ModelError: If a probability lies outside [0, 1].

    >>> fused_prompt("grade 2", p_tumor=1.0, p_til=None)
    'high tumor; grade 2'
    """
    words = _words(num_levels)
    clauses = [
        f"{words[level_of(probability, num_levels)]} {what}"
        for what, probability in (("tumor", p_tumor), ("til", p_til))
        if probability is not None
    ]
    return "; ".join([*clauses, summary])


def class_label(p_tumor: float | None, p_til: float | None, *, reference: bool = False) -> int:
    """Return the class of a tile: ``2 * tumour + TIL``, or :data:`UNCONDITIONAL_CLASS` if one is not known.

    Args:
        p_tumor: Probability of tumour.
        p_til: Probability of tumour-infiltrating lymphocytes.
        reference: Count exactly 0.5 as low, as the published code does for classes.

    Raises:
        ModelError: If a probability lies outside [0, 1].

    >>> class_label(0.9, 0.5), class_label(0.9, 0.5, reference=True)
    (3, 2)
    """
    if p_tumor is None or p_til is None:
        return UNCONDITIONAL_CLASS
    tumor, til = level_of(p_tumor), level_of(p_til)
    if reference:
        tumor, til = int(p_tumor > 0.5), int(p_til > 0.5)
    return 2 * tumor + til


def class_name(label: int) -> str:
    """Return a class in words.

    Raises:
        ModelError: If there is no such class.
    """
    if label == UNCONDITIONAL_CLASS:
        return "unconditional"
    if not 0 <= label < UNCONDITIONAL_CLASS:
        raise ModelError(f"there is no class {label}; classes are 0 to {UNCONDITIONAL_CLASS}.")
    tumor, til = divmod(label, 2)
    return f"{'tumor' if tumor else 'no tumor'}, {'til' if til else 'no til'}"


def rows_to_drop(
    p_til: Sequence[float | None],
    probability: float = 0.1,
    *,
    generator: torch.Generator | None = None,
    num_levels: int = 2,
    reference: bool = False,
) -> Bool[Tensor, " batch"]:
    """Draw which tiles of a batch are trained without their prompt (classifier-free guidance).

    Args:
        p_til: Probability of tumour-infiltrating lymphocytes of each tile; only its number counts, unless
            ``reference``.
        probability: Of being dropped.
        generator: Where the draw comes from.
        num_levels: Of the prompts, for ``reference``.
        reference: Never drop where the level of TIL is known and not the lowest, as the published code does.

    Raises:
        ModelError: If a probability lies outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ModelError(f"prompts cannot be dropped with probability {probability}; it must lie in [0, 1].")
    drawn = torch.rand(len(p_til), generator=generator) < probability
    if not reference:
        return drawn
    spared = [til is not None and level_of(til, num_levels) > 0 for til in p_til]
    return drawn & ~torch.tensor(spared, dtype=torch.bool)
