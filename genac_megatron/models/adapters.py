"""Low-rank adapters beside a frozen model: y = W x + scale B A x for the projections that are targets.

Which projections there are, what a linear layer fuses and how tensor parallelism cuts it is the one
mapping's to say (models/mapping.py). Each Hugging Face projection has an A and a B of its own, as PEFT's
have; of projections that one layer fuses the As lie above each other, so that x is read once.

Tensor parallelism, after megatron-core's own layers. A column-parallel layer has A whole on every rank, on
its share of the tokens under sequence parallelism, so that only its `rank` activations are gathered, and B
cut like the weight's rows. A row-parallel layer has A cut like the weight's columns and B whole. What is
whole is marked `sequence_parallel` where that is on: each rank then sees a part of the tokens, and Megatron
sums the marked ones' gradients over the tensor-parallel group.

No module of the model is replaced and no parameter renamed: forward hooks on its linear layers add what the
adapters give. `RoleModel.adapters` holds them all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from genac_megatron.errors import InputError
from genac_megatron.models.dropout import Dropout, install
from genac_megatron.models.families.base import Rule, Shape
from genac_megatron.models.mapping import beside_base, shard
from genac_megatron.models.registry import rules
from genac_megatron.models.sizes import hf_size
from genac_megatron.recipe.schema import AdapterConfig


@dataclass(frozen=True)
class Place:
    """A linear layer that has an adapter: its weight's rule, its layer, and which of its projections do."""

    rule: Rule
    layer: int  # global
    targets: tuple[int, ...]  # which of the rule's Hugging Face tensors

    @property
    def column(self) -> bool:
        """Whether tensor parallelism cuts what it gives."""
        return self.rule.tp_axis == 0

    @property
    def projections(self) -> tuple[str, ...]:
        """The Hugging Face modules that have an adapter, such as model.layers.0.self_attn.q_proj."""
        names = self.rule.hf_names(self.layer)
        return tuple(names[index].removesuffix(".weight") for index in self.targets)

    @property
    def key(self) -> str:
        """Its name among a model's adapters, in checkpoints too."""
        return f"{self.layer}_{self.rule.name.split('.')[-2]}"


def places(shape: Shape, adapter: AdapterConfig, layers: Sequence[int]) -> Iterator[Place]:
    """The linear layers of these (global) layers that have an adapter, in the order of the mapping."""
    for layer in layers:
        for rule in rules(shape):
            targets = tuple(i for i, name in enumerate(rule.hf) if name.split(".")[-2] in adapter.targets)
            if rule.per_layer and targets and rule.name.endswith(".weight"):
                yield Place(rule, layer, targets)


class LowRank(nn.Module):
    """scale B A x beside one linear layer, cut as that one is."""

    def __init__(self, place: Place, shape: Shape, adapter: AdapterConfig, config: Any, group: Any) -> None:
        super().__init__()
        self.place, self.group, self.rank, self.scale = place, group, adapter.rank, adapter.scale
        self.sequence_parallel = bool(config.sequence_parallel)
        self.on = True  # off: the base alone
        tp = group.size()
        self.dropout = _dropout(place, shape, adapter, group, self.sequence_parallel)
        # Of this rank's part of the layer, which fuses whole key-value groups.
        self.shape = replace(shape, heads=shape.heads // tp, kv_heads=shape.kv_heads // tp)
        self.rows = [hf_size(name, shape)[0] // (tp if place.column else 1) for name in place.rule.hf]
        columns = hf_size(place.rule.hf[0], shape)[1] // (1 if place.column else tp)
        self.A = nn.Parameter(torch.zeros(len(place.targets) * self.rank, columns, dtype=config.params_dtype))
        self.B = nn.ParameterList(
            nn.Parameter(torch.zeros(self.rows[index], self.rank, dtype=config.params_dtype))
            for index in place.targets
        )
        for parameter, cut, axis in ((self.A, not place.column, 1), *((b, place.column, 0) for b in self.B)):
            if cut:
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            else:
                parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    @property
    def cut(self) -> dict[str, int]:
        """The axis along which tensor parallelism cuts a parameter, by its name."""
        return {f"B.{index}": 0 for index in range(len(self.B))} if self.place.column else {"A": 1}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] as the layer is given it -> what is added to its output."""
        if self.dropout is not None and self.training:
            x = self.dropout(x)
        z = F.linear(x, self.A) * self.scale
        if self.place.column and self.sequence_parallel:
            z = gather_from_sequence_parallel_region(z, tensor_parallel_output_grad=True, group=self.group)
        elif self.place.column:
            z = copy_to_tensor_model_parallel_region(z, group=self.group)
        elif self.sequence_parallel:
            z = reduce_scatter_to_sequence_parallel_region(z, group=self.group)
        else:
            z = reduce_from_tensor_model_parallel_region(z, group=self.group)
        given = zip(z.split(self.rank, dim=-1), self.B, strict=True)
        return self._fused([F.linear(part, b) for part, b in given])

    def _fused(self, given: list[Tensor]) -> Tensor:
        """The targets' outputs where the layer has them, as `mapping.fuse` lays out its rows; 0 elsewhere."""
        if self.place.rule.fuse == "copy":
            return given[0]
        made = dict(zip(self.place.targets, given, strict=True))
        lead = given[0].shape[:-1]
        parts = [made[i] if i in made else given[0].new_zeros(*lead, n) for i, n in enumerate(self.rows)]
        if self.place.rule.fuse == "gate_up":
            return torch.cat(parts, dim=-1)
        groups = [part.unflatten(-1, (self.shape.kv_heads, -1)) for part in parts]
        return torch.cat(groups, dim=-1).flatten(-2)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """This rank's part of W + scale B A, from its part of W: no rank needs another's. In W's dtype."""
        return (weight.float() + self._added()).to(weight.dtype)

    @torch.no_grad()
    def merge_into(self, weight: Tensor) -> tuple[float, float]:
        """Put `merged` in the place of this rank's part of W. The squared norms of scale B A, and of what the
        rounding of the sum to W's dtype loses of it.
        """
        added = self._added()
        new = (weight.float() + added).to(weight.dtype)
        lost = added - (new.float() - weight.float())
        weight.copy_(new)
        return float(added.square().sum()), float(lost.square().sum())

    def _added(self) -> Tensor:
        """This rank's part of scale B A, in fp32."""
        parts = dict(zip(self.place.targets, self.A.split(self.rank), strict=True))
        bs = dict(zip(self.place.targets, self.B, strict=True))
        deltas = [
            bs[i].float() @ parts[i].float() if i in bs else self.A.new_zeros(n, self.A.size(1)).float()
            for i, n in enumerate(self.rows)
        ]
        return self.scale * shard(self.place.rule, deltas, self.shape, 0, 1)

    @torch.no_grad()
    def take(self, get: Callable[[str], tuple[Tensor, Tensor]]) -> None:
        """Begin with given weights. get(projection): its whole A [rank, in] and B [out, rank]."""
        tp, at = self.group.size(), self.group.rank()
        parts = zip(self.place.projections, self.A.split(self.rank), self.B, strict=True)
        for name, part, mine in parts:
            a, b = get(name)
            part.copy_(a if self.place.column else a.chunk(tp, dim=1)[at])
            mine.copy_(b.chunk(tp)[at] if self.place.column else b)

    @torch.no_grad()
    def initialize(self, seed: int, merges: int = 0) -> None:
        """B is 0, so the model begins as its base; A as PEFT's, uniform in +-1 / sqrt(columns).

        A function of the projection's name, the seed and how often it was merged alone, whatever the layout.
        """
        for b in self.B:
            b.zero_()
        again = f"/{merges}" if merges else ""
        tp, at = self.group.size(), self.group.rank()
        columns = self.A.size(1) * (1 if self.place.column else tp)
        for name, part in zip(self.place.projections, self.A.split(self.rank), strict=True):
            digest = hashlib.sha256(f"{seed}/{name}.lora_A{again}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            whole = torch.rand(self.rank, columns, generator=generator).mul_(2).sub_(1)
            whole.div_(math.sqrt(columns))
            part.copy_(whole if self.place.column else whole.chunk(tp, dim=1)[at])


def _dropout(
    place: Place, shape: Shape, adapter: AdapterConfig, group: Any, sequence_parallel: bool
) -> Dropout | None:
    """Of a layer's input, once for all projections that it fuses, as they read it once."""
    if not adapter.dropout:
        return None
    columns = hf_size(place.rule.hf[0], shape)[1]
    first = 0 if place.column else columns // group.size() * group.rank()
    share = (group.rank(), group.size()) if place.column and sequence_parallel else (0, 1)
    return Dropout(adapter.dropout, place.key, first, share)


class Adapters(nn.Module):
    """All adapters of a model chunk, by `Place.key`."""

    def __init__(self, parts: Sequence[LowRank], config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        for part in parts:
            self.add_module(part.place.key, part)

    @property
    def parts(self) -> list[LowRank]:
        return [part for part in self.children() if isinstance(part, LowRank)]

    def switch(self, on: bool) -> None:
        """Add what they give, or leave the model as its base."""
        for part in self.parts:
            part.on = on

    def of(self, name: str, layer: int | None) -> LowRank | None:
        """The adapter beside a weight, by its rule's name and global layer; None where it has none."""
        return next((p for p in self.parts if (p.place.rule.name, p.place.layer) == (name, layer)), None)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron asks modules for their state: layers are told apart by their global number."""
        found: dict[str, Any] = {}
        for part in self.parts:
            found |= make_sharded_tensors_for_checkpoint(
                part.state_dict(prefix="", keep_vars=True),  # the optimizer goes by the parameters themselves
                f"{prefix}{part.place.key}.",
                part.cut,
                sharded_offsets,
                tp_group=part.group,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
        return found


def attach(model: Any, layers: Sequence[int], shape: Shape, adapter: AdapterConfig, seed: int) -> None:
    """Give a model chunk, which holds these (global) layers, its adapters. Raises InputError for experts."""
    if shape.experts is not None:
        raise InputError(
            f"{shape.family} is a mixture of experts, whose layers have no adapters here",
            where="training.adapter",
            way_out="take adapter out, or use a dense model",
        )
    made = []
    for place in places(shape, adapter, layers):
        name = place.rule.name.format(layer=place.layer - layers[0]).removesuffix(".weight")
        linear = model.get_submodule(name)
        part = LowRank(place, shape, adapter, model.config, model.pg_collection.tp)
        part.initialize(seed)
        linear.register_forward_hook(_adding(part))
        made.append(part)
    model.adapters = Adapters(made, adapter)
    for local, layer in enumerate(layers):
        drops = [part.dropout for part in made if part.place.layer == layer and part.dropout is not None]
        if drops:
            install(model.decoder.layers[local], drops)
    if model.pre_process and model.config.recompute_granularity == "full":
        model.embedding.register_forward_hook(_asking)


def stand_on(model: Any, other: Any, shape: Shape) -> None:
    """Give a model chunk another's base in the place of its own: the very same parameters.

    Each chunk has its own layers around them, and so its own groups, hooks, adapters and head. Raises
    InputError naming a parameter that the other lacks, or has in another size.
    """
    theirs = dict(other.named_parameters())
    for name, own in list(model.named_parameters()):
        if beside_base(name, shape):
            continue
        found = theirs.get(name)
        if found is None or (found.shape, found.dtype) != (own.shape, own.dtype):
            has = "none" if found is None else f"{tuple(found.shape)} in {found.dtype}"
            raise InputError(
                f"it has {name} of {tuple(own.shape)} in {own.dtype}, the base that it is to share {has}",
                where="model.share",
                way_out="give both roles one model, layout and training.dtype",
            )
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, found)


def _adding(part: LowRank) -> Any:
    def add(linear: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not part.on:
            return output
        given, *rest = output  # Megatron's layers give (output, bias)
        return given + part(_input(linear, args[0])), *rest

    return add


def _asking(embedding: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor:
    """A frozen embedding's output asks for its gradient: a layer that is computed again for the backward pass
    has no gradients, without an error, where nothing that went into it asks for one.
    """
    return hidden.requires_grad_() if torch.is_grad_enabled() else hidden


def _input(linear: Any, x: Tensor) -> Tensor:
    """What a linear layer multiplies: Transformer Engine's may hold the norm before it. Not run on a GPU."""
    weight = getattr(linear, "layer_norm_weight", None)
    return x if weight is None else F.rms_norm(x, weight.shape, weight, linear.eps)
