"""Fields that are trained on, and in which order: all alike, by block, or mixed by weight.

    data: {store: [stores/tcga, stores/gtex], mix: {by: store, weights: {tcga: 2, gtex: 1}}}
    data: {store: stores/brca, mix: {by: organ, weights: {lung: 2, breast: 1}, others: 0.5}}
    data: {store: stores/brca, mix: {by: stain, weights: equal}}

A weight is a group's share of what is drawn, whatever its size, and exact in every period of the order
(:class:`pixcell.training.order.MixedOrder`). Without a mix every field comes once an epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from pixcell.config import Config
from pixcell.data.datasets import FieldDataset
from pixcell.errors import RecipeError, listed
from pixcell.training.determinism import Order, Without
from pixcell.training.order import BlockOrder, Group, MixedOrder, Ranges, SampleOrder, seed_of

__all__ = ["FieldPlan", "FieldSamples", "MixConfig", "fields_to_show"]

_OTHERS = "(others)"


class MixConfig(Config):
    """How much is drawn of each group of fields."""

    by: str = Field(min_length=1)
    """What makes a group: ``store``, or an attribute of tiles such as organ, stain, source, slide_id."""
    weights: Literal["equal"] | dict[str, Annotated[float, Field(gt=0)]]
    """Share of each group, in any unit: {lung: 2, breast: 1}. A store goes by the name of its folder.
    ``equal``: the same for every value there is."""
    others: float | None = Field(None, gt=0)
    """Share of all tiles together whose value has no weight, or that have no value. None: there are none."""

    @field_validator("weights", mode="before")
    @classmethod
    def _scores_are_names(cls, weights: Any) -> Any:
        """YAML reads the key of ``{3: 1}``, a grade or a score, as a number."""
        if isinstance(weights, Mapping):
            if not weights:
                raise ValueError("a mix needs at least one weight")
            return {str(name) if type(name) is int else name: value for name, value in weights.items()}
        return weights


@dataclass(frozen=True)
class FieldPlan:
    """What a recipe says about which of its fields come when."""

    mix: MixConfig | None = None
    stores: Sequence[str] = ()
    """Names of the sources of the dataset, in their order."""
    shuffle_blocks: int | None = None
    """Blocks that are shuffled together. None: all fields are, unless a source is read in blocks."""
    skip_unreadable: bool = False
    """Whether held-out and measured fields that cannot be read are gone without, as those trained on are."""

    @property
    def group_by(self) -> str | None:
        """The attribute by which a dataset must be grouped for this order."""
        return self.mix.by if self.mix and self.mix.by != "store" else None


class FieldSamples:
    """The fields of a dataset without those held out, numbered anew, and their order.

    The samples of an objective on fields are a class on top of it that adds ``draw``.

    Args:
        fields: Grouped by ``plan.group_by``.
        held_out: Indices that are kept out of training.
        plan: What the recipe says.

    Raises:
        RecipeError: If the weights of a mix do not fit the groups that there are.
    """

    def __init__(self, fields: FieldDataset, held_out: Sequence[int], plan: FieldPlan | None = None) -> None:
        self.fields, self.plan = fields, plan or FieldPlan()
        self._held_out = np.sort(np.asarray(held_out, np.int64))
        self._kept, self._count = Without(held_out), len(fields) - len(held_out)
        if self.plan.mix is not None:
            self._groups = self._weighed(self.plan.mix)

    def __len__(self) -> int:
        return self._count

    def order(self, seed: int) -> Order:
        """Return the order of the samples of a run."""
        blocks = self._blocks()
        if self.plan.mix is None:
            if blocks is None:
                return SampleOrder(len(self), seed)
            return BlockOrder(*blocks, seed=seed, at_once=self._at_once)
        if blocks is None:
            return MixedOrder(self._groups, seed)
        inner = [self._order_of(group, blocks, seed) for group in self._groups]
        return MixedOrder(self._groups, seed, inner)

    @property
    def _at_once(self) -> int:
        return self.plan.shuffle_blocks or self.fields.blocks_at_once

    def _blocks(self) -> tuple[np.ndarray, np.ndarray] | None:
        """First sample and number of samples of each block; None where all are shuffled at once."""
        if self.plan.shuffle_blocks is None and not self.fields.is_read_in_blocks:
            return None
        # Each group of a mix has blocks of its own at work.
        self.fields.prepare(self._at_once * (len(self._groups) if self.plan.mix else 1))
        starts, sizes = self.fields.blocks()
        borders = np.append(starts, len(self.fields))
        borders -= np.searchsorted(self._held_out, borders)  # as many are kept before as Without numbers
        sizes = np.diff(borders)
        return borders[:-1][sizes > 0], sizes[sizes > 0]

    def _order_of(self, group: Group, blocks: tuple[np.ndarray, np.ndarray], seed: int) -> Order:
        """The order of a group's own blocks. A block never belongs to two groups."""
        starts, sizes = blocks
        mine = np.zeros(len(starts), bool)
        for samples in group.samples.ranges:
            mine |= (starts >= samples.start) & (starts < samples.stop)
        return BlockOrder(starts[mine], sizes[mine], seed_of(seed, group.name), self._at_once)

    def _weighed(self, mix: MixConfig) -> list[Group]:
        """Give the groups that there are the weights of the recipe."""
        there = self._there(mix)
        named = {name for name in there if name is not None}
        if isinstance(mix.weights, str):
            weights = dict.fromkeys(sorted(named), 1.0)
        else:
            weights = {self._meant(name, mix): weight for name, weight in mix.weights.items()}
            _must_be_there(weights, named, mix.by)
        rest = [name for name in there if name not in weights]
        if rest and mix.others is None:
            raise RecipeError(
                f"data.mix gives no weight to {_counted(rest, there, mix.by)}. Give each a weight, give all "
                "of them together one as data.mix.others, or leave them out with data.where."
            )
        if mix.others is not None and not rest:
            raise RecipeError(
                f"data.mix.others {mix.others:g} has no effect: every field has a {mix.by} with a weight. "
                "Take it out."
            )
        chosen = [(name, there[name], weight) for name, weight in weights.items()]
        if mix.others is not None:
            chosen.append((_OTHERS, [one for name in rest for one in there[name]], mix.others))
        return [self._group(name, ranges, weight, mix.by) for name, ranges, weight in chosen]

    def _there(self, mix: MixConfig) -> dict[str | None, list[range]]:
        """The groups of the dataset, by value: ranges of indices."""
        if mix.by != "store":
            return dict(self.fields.groups)
        return {name: [part] for name, part in zip(self._store_names(), self.fields.parts, strict=True)}

    def _store_names(self) -> list[str]:
        """Stores by the last part of their place, or by the whole of it where two would be alike."""
        places = [place.rstrip("/") for place in self.plan.stores]
        short = [place.rpartition("/")[2] for place in places]
        return short if len(set(short)) == len(short) else places

    def _meant(self, name: str, mix: MixConfig) -> str:
        """A store may also be named as the recipe names it in ``data.store``."""
        if mix.by == "store":
            for place, known in zip(self.plan.stores, self._store_names(), strict=True):
                if name.rstrip("/") == place.rstrip("/"):
                    return known
        return name

    def _group(self, name: str, ranges: Sequence[range], weight: float, by: str) -> Group:
        kept = [range(self._kept.before(one.start), self._kept.before(one.stop)) for one in ranges]
        samples = Ranges(sorted(kept, key=lambda one: one.start))
        if not len(samples):
            raise RecipeError(
                f"all {sum(map(len, ranges))} field(s) of {by} {name!r} are held out for previews: lower "
                "data.held_out, or take it out of data.mix.weights and data.where."
            )
        return Group(name, samples, weight)


def fields_to_show(indices: Sequence[int], plan: FieldPlan | None, *datasets: FieldDataset) -> list[int]:
    """Return the held-out or measured fields that are looked at: all, or those that all datasets can read.

    Args:
        indices: Of the fields.
        plan: Whether to go without those that cannot be read.
        datasets: The same fields, with what is looked at.

    Raises:
        UnreadableTile: Later, when they are read, if none is to be gone without.
        RecipeError: If no field remains.
    """
    shown = list(indices)
    if plan is None or not plan.skip_unreadable:
        return shown
    for dataset in datasets:
        shown = dataset.readable(shown)
    if not shown:
        raise RecipeError(
            f"none of {len(indices)} held-out fields can be read ({datasets[0].key(indices[0])}, ...). "
            "Is the disk or the network gone? See what can be read: pixcell inspect STORE --verify."
        )
    return shown


def _must_be_there(weights: Mapping[str, float], named: set[str], by: str) -> None:
    for name in weights:
        if name not in named:
            near = get_close_matches(name, sorted(named), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There is: {listed(sorted(named))}."
            raise RecipeError(f"data.mix.weights names {name!r}, but no field has it as {by}.{hint}")


def _counted(names: Sequence[str | None], there: Mapping[str | None, Sequence[range]], by: str) -> str:
    """Name groups with the number of their fields; those without a value come last."""
    texts = [
        f"{name} ({sum(map(len, there[name]))} fields)" if name is not None
        else f"fields without {by} ({sum(map(len, there[name]))})"
        for name in sorted(names, key=lambda name: (name is None, name or ""))
    ]  # fmt: skip
    return listed(texts, most=8)
