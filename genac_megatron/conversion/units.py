"""What a conversion moves at a time: one Megatron parameter and the Hugging Face tensors it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from genac_megatron.models.families.base import Rule, Shape
from genac_megatron.models.registry import rules
from genac_megatron.models.sizes import Size, hf_size, local_size


@dataclass(frozen=True)
class Unit:
    """A parameter of one layer (or of none), whole: as on a single rank."""

    rule: Rule
    layer: int | None
    size: Size  # of the parameter
    hf: tuple[tuple[str, Size], ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def at(self) -> tuple[int, ...]:
        """Its place on the leading axes of the stored tensor, which holds all layers."""
        return tuple(i for i in (self.layer, self.rule.expert) if i is not None)


@dataclass(frozen=True)
class Shard:
    """Units that are written to one file."""

    index: int
    units: tuple[Unit, ...]
    numel: int


def units(shape: Shape) -> list[Unit]:
    """Every parameter of a model once (a tied output layer not at all), in the order of its layers."""
    whole = [rule for rule in rules(shape) if not rule.per_layer]
    first = [rule for rule in whole if rule.room == "embedding"]
    last = [r for r in whole if r.room == "decoder" or (r.room == "output_layer" and not shape.tie)]
    made = [_unit(rule, None, shape) for rule in first]
    for layer in range(shape.layers):
        made += [_unit(rule, layer, shape) for rule in rules(shape) if rule.per_layer]
    return made + [_unit(rule, None, shape) for rule in last]


def _unit(rule: Rule, layer: int | None, shape: Shape) -> Unit:
    names = rule.hf_names(layer)
    return Unit(
        rule, layer, local_size(rule, shape, 1), tuple((name, hf_size(name, shape)) for name in names)
    )


def shards(parts: Iterable[Unit], itemsize: int, most_bytes: int) -> tuple[Shard, ...]:
    """Units in order, in files of at most `most_bytes`; a unit that is larger has a file of its own."""
    made: list[Shard] = []
    held: list[Unit] = []
    for unit in parts:
        if held and (sum(x.numel for x in held) + unit.numel) * itemsize > most_bytes:
            made.append(_shard(len(made), held))
            held = []
        held.append(unit)
    return (*made, _shard(len(made), held))


def _shard(index: int, held: list[Unit]) -> Shard:
    return Shard(index, tuple(held), sum(unit.numel for unit in held))


def stored_size(unit: Unit, shape: Shape) -> Size:
    """Size of the stored tensor that the unit is a part of: layers and experts are its leading axes."""
    leading = [shape.layers] if unit.layer is not None else []
    if unit.rule.expert is not None:
        leading.append(shape.experts or 0)
    return (*leading, *unit.size)
