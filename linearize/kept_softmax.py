"""What of a converted model could stay softmax, and how a choice of it is written down.

A unit is what `attention.keep_softmax.count` counts: a whole layer, or one kv head of a layer with its query heads.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .modeling_linearized import attention_modules, linear_attentions


@dataclass(frozen=True)
class Unit:
    """A layer (`head` is None) or one of its kv heads; `heads` are the kv heads it brings back to softmax."""

    layer: int
    head: int | None
    heads: tuple[int, ...]

    def __str__(self) -> str:
        return str(self.layer) if self.head is None else f"{self.layer}.{self.head}"


def has_softmax(model) -> bool:
    """Whether any layer or kv head is softmax, so that memory grows with the text; true of an unconverted model."""
    linear = linear_attentions(model)
    return set(attention_modules(model)) != set(linear) or any(x.heads.kept for x in linear.values())


def units_of(model, unit: str) -> list[Unit]:
    """Every layer, or every kv head, of the model that is linear, in order. unit: layer or kv_head."""
    found = []
    for layer, linear in linear_attentions(model).items():
        free = linear.heads.linear
        found += [Unit(layer, None, free)] if unit == "layer" else [Unit(layer, g, (g,)) for g in free]
    return found


def evenly_spaced(units: list[Unit], count: int) -> list[Unit]:
    """`count` of the units at equal distances, as far from both ends as from one another."""
    return [units[(2 * i + 1) * len(units) // (2 * count)] for i in range(count)]


def heads_by_layer(units: Iterable[Unit]) -> dict[int, list[int]]:
    """{layer: kv heads} of a set of units."""
    heads = {}
    for unit in units:
        heads.setdefault(unit.layer, []).extend(unit.heads)
    return {layer: sorted(heads[layer]) for layer in sorted(heads)}


def written_down(keep, units: Iterable[Unit]):
    """The recipe's `attention.keep_softmax` with the chosen units named, and nothing left to choose."""
    units = list(units)
    layers = sorted({*keep.layers, *(u.layer for u in units if u.head is None)})
    pairs = [*map(tuple, keep.heads), *((u.layer, u.head) for u in units if u.head is not None)]
    heads = [list(pair) for pair in sorted(pairs) if pair[0] not in layers]
    return replace(keep, layers=layers, heads=heads, count=0)


def with_choice(recipe, units: Iterable[Unit]):
    """The recipe with the chosen units named, and nothing left to choose."""
    keep = written_down(recipe.attention.keep_softmax, units)
    return replace(recipe, attention=replace(recipe.attention, keep_softmax=keep))
