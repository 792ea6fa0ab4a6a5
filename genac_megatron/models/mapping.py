"""The one weight mapping between Hugging Face tensors and Megatron parameters.

Loading, saving, publication and the tools all go through it. A family's `Rule`s say which tensors make
which parameter (families/base.py); here are the only functions that fuse, cut, join and split them. They are
pure and copy values bit for bit. To be cut by tensor parallelism a fused tensor is laid out so that a rank's
share is one slice of one axis:

    copy      the tensor itself; axis `tp_axis`
    qkv       [kv_heads, (heads / kv_heads + 2) head_dim, ...]: a group's queries, its key, its value; axis 0,
              which for more ranks than kv_heads is that of as many equal runs of rows
    gate_up   [2, ffn, ...]: gate, up; axis 1
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import VALUE_HEAD, Rule, Shape
from genac_megatron.models.registry import rules
from genac_megatron.models.sizes import hf_names, hf_size, local_size, padded_vocab
from genac_megatron.platform.fp8 import remember

GetTensor = Callable[[str], Tensor]
ADAPTERS = "adapters."  # before the names of a model's adapters (models/adapters.py), which are no rule's


class ChunkLayout(Protocol):
    """What loading needs of a `training.layout.Layout`."""

    @property
    def tp(self) -> int: ...

    def chunk_layers(self, layers: int, pp: int, chunk: int) -> range: ...


class ParamRule(NamedTuple):
    """A parameter of a model chunk and what it is made of."""

    name: str  # in the chunk
    parameter: nn.Parameter
    rule: Rule
    layer: int | None  # global; None for embedding, final norm and output layer

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors, in the order `fuse` takes them."""
        return self.rule.hf_names(self.layer)


# --- fuse and cut, join and split ----------------------------------------------------------------


def fuse(rule: Rule, hf: Sequence[Tensor], shape: Shape) -> Tensor:
    """The whole parameter in the layout of the module's docstring (padding of the vocabulary left out)."""
    if rule.fuse == "copy":
        return hf[0]
    if rule.fuse == "gate_up":
        return torch.stack(tuple(hf))
    groups = [x.reshape(shape.kv_heads, -1, *x.shape[1:]) for x in hf]
    return torch.cat(groups, dim=1)


def split(rule: Rule, whole: Tensor, shape: Shape) -> tuple[Tensor, ...]:
    """The inverse of `fuse`: the Hugging Face tensors, in the rule's order."""
    if rule.fuse == "copy":
        return (whole.contiguous(),)
    if rule.fuse == "gate_up":
        return tuple(x.contiguous() for x in whole)
    rows = [shape.heads // shape.kv_heads * shape.head_dim, shape.head_dim, shape.head_dim]
    return tuple(x.reshape(-1, *x.shape[2:]) for x in whole.split(rows, dim=1))


def shard(rule: Rule, hf: Sequence[Tensor], shape: Shape, tp_rank: int, tp: int) -> Tensor:
    """The parameter as rank `tp_rank` of `tp` holds it, contiguous.

    hf: the rule's Hugging Face tensors, in its order. Rows that only pad the vocabulary are 0.
    """
    whole = fuse(rule, hf, shape)
    if rule.padded:
        whole = nn.functional.pad(whole, (0, 0, 0, padded_vocab(shape, tp) - shape.vocab))
    axis = _axis(rule)
    if rule.fuse == "qkv" and tp > shape.kv_heads:
        whole = whole.reshape(tp, -1, *whole.shape[2:])
    if axis is not None:
        each = whole.size(axis) // tp
        whole = whole.narrow(axis, tp_rank * each, each)
    return (whole if rule.fuse == "copy" else whole.flatten(0, 1)).contiguous()


def unshard(
    rule: Rule, shards: Sequence[Tensor], shape: Shape, layer: int | None = None
) -> dict[str, Tensor]:
    """The exact inverse of `shard`: Hugging Face name -> tensor, from the shards of all tp ranks in order.

    layer: the global layer of a per-layer rule. A parameter that is not cut takes the first shard.
    """
    axis = _axis(rule)
    if rule.fuse == "qkv" and len(shards) > shape.kv_heads:
        shards = [torch.cat(tuple(shards))]
    parts = [_unflatten(rule, x, shape) for x in (shards if axis is not None else shards[:1])]
    whole = parts[0] if len(parts) == 1 or axis is None else torch.cat(parts, dim=axis)
    if rule.padded:
        whole = whole[: shape.vocab]
    return dict(zip(rule.hf_names(layer), split(rule, whole, shape), strict=True))


def _axis(rule: Rule) -> int | None:
    """The axis of `fuse`'s result that tensor parallelism cuts."""
    return 1 if rule.fuse == "gate_up" and rule.tp_axis is not None else rule.tp_axis


def _unflatten(rule: Rule, x: Tensor, shape: Shape) -> Tensor:
    if rule.fuse == "copy":
        return x
    rows = (shape.heads // shape.kv_heads + 2) * shape.head_dim  # of one key-value group
    return x.reshape(-1, rows, *x.shape[1:]) if rule.fuse == "qkv" else x.reshape(2, -1, *x.shape[1:])


# --- a model's parameters ------------------------------------------------------------------------


def param_rules(chunk: nn.Module, layer_offset: int, shape: Shape) -> list[ParamRule]:
    """The rule of every parameter of a model chunk (wrapped or not) but its adapters', in the chunk's order.

    layer_offset: global index of the chunk's first layer. Raises InputError naming every parameter that is
    missing, surplus or misshapen.
    """
    model = unwrap(chunk)
    expected: dict[str, tuple[Rule, int | None]] = {}
    names: dict[str, str] = {}  # from any name that a parameter may have to its first
    for known, rule, layer in _expected(model, layer_offset, shape):
        expected[known[0]] = rule, layer
        names |= dict.fromkeys(known, known[0])
    tp = int(model.config.tensor_model_parallel_size)
    found: list[ParamRule] = []
    faults: list[str] = []
    for name, parameter in model.named_parameters():
        if name.startswith(ADAPTERS):
            continue
        found_rule = expected.pop(names.get(name, name), None)
        if found_rule is None:
            faults.append(f"surplus parameter {name}")
            continue
        rule, layer = found_rule
        if parameter.shape != local_size(rule, shape, tp):
            wanted = local_size(rule, shape, tp)
            faults.append(f"{name} has shape {tuple(parameter.shape)}, expected {wanted}")
        else:
            found.append(ParamRule(name, parameter, rule, layer))
    faults += [f"missing parameter {name}" for name in expected]
    if faults:
        raise InputError("; ".join(faults), where=f"{shape.family} model chunk from layer {layer_offset}")
    return found


def beside_base(name: str, shape: Shape) -> bool:
    """Whether a parameter is no part of an adapter's base: the adapters, and a scalar head."""
    dotted = f".{name}"
    return f".{ADAPTERS}" in dotted or (shape.value and ".output_layer." in dotted)


def _expected(
    model: Any, layer_offset: int, shape: Shape
) -> Iterator[tuple[tuple[str, ...], Rule, int | None]]:
    """(names it may have, rule, global layer) of the parameters that the chunk must have."""
    head = model.post_process and not (shape.tie and model.pre_process)
    present = {"embedding": model.pre_process, "decoder": model.post_process, "output_layer": head}
    experts = local_experts(model, shape)
    for rule in rules(shape):
        if rule.expert is not None and rule.expert not in experts:
            continue
        if rule.per_layer:
            for local in range(len(model.decoder.layers)):
                yield rule.in_chunk(local, experts.start), rule, layer_offset + local
        elif present[rule.room]:
            yield rule.in_chunk(), rule, None


def local_experts(model: Any, shape: Shape) -> range:
    """Global indices of the experts that this rank's part of a model holds."""
    ep = int(model.config.expert_model_parallel_size)
    each = (shape.experts or 0) // ep
    first = model.pg_collection.ep.rank() * each if ep > 1 else 0
    return range(first, first + each)


def unwrap(model: nn.Module) -> Any:
    """The model inside Float16Module, DistributedDataParallel and the like."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return inner


@torch.no_grad()
def load_hf_into(
    chunks: Sequence[nn.Module], layout: ChunkLayout, shape: Shape, get_tensor: GetTensor
) -> None:
    """Set this rank's parameters from Hugging Face tensors; nothing is communicated.

    chunks: this rank's model chunks, in order. get_tensor(name) gives a whole tensor. With tied embeddings
    and pp > 1 the last stage loads its copy of the embedding too. Raises InputError by name on a tensor whose
    size is not the shape's, and as `param_rules` does.
    """
    for item in role_rules(chunks, layout, shape):
        set_parameter(item, [get_tensor(name) for name in item.hf_names], chunks, layout, shape)


def role_rules(chunks: Sequence[nn.Module], layout: ChunkLayout, shape: Shape) -> Iterator[ParamRule]:
    """The rules of this rank's parameters. chunks: its model chunks, in order. Raises as `param_rules`."""
    for index, chunk in enumerate(chunks):
        pp_rank = unwrap(chunk).pg_collection.pp.rank()
        yield from param_rules(chunk, layout.chunk_layers(shape.layers, pp_rank, index).start, shape)


@torch.no_grad()
def set_parameter(
    item: ParamRule, hf: Sequence[Tensor], chunks: Sequence[nn.Module], layout: ChunkLayout, shape: Shape
) -> None:
    """Set one of this rank's parameters from whole Hugging Face tensors, `item.hf_names`."""
    tensors = [checked(tensor, name, shape) for name, tensor in zip(item.hf_names, hf, strict=True)]
    keep(item, shard(item.rule, tensors, shape, unwrap(chunks[0]).pg_collection.tp.rank(), layout.tp))


@torch.no_grad()
def keep(item: ParamRule, value: Tensor) -> None:
    """Set one of this rank's parameters from its shard."""
    item.parameter.copy_(value)
    remember(item.parameter, value)


def checked(tensor: Tensor, name: str, shape: Shape) -> Tensor:
    """The tensor. Raises InputError where its size is not the shape's."""
    if tensor.shape != hf_size(name, shape):
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, expected {hf_size(name, shape)}", where="weights"
        )
    return tensor


# --- random weights ------------------------------------------------------------------------------


def init_tensor(
    name: str, size: Sequence[int], shape: Shape, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """A Hugging Face tensor's random initial value, fp32; it depends on name and seed alone, never on layout.

    Weights are normal(0, init_std), the two projections that write to the residual stream scaled by
    1 / sqrt(2 layers) (GPT-2); norms are 1, biases 0. Drawn on a GPU, numbers are others than a CPU's.
    """
    if name.endswith("norm.weight"):
        return torch.ones(*size, device=device)
    if name.endswith(".bias"):
        return torch.zeros(*size, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = shape.init_std / math.sqrt(2 * shape.layers) if residual else shape.init_std
    return torch.randn(*size, generator=generator, device=device).mul_(std)


def random_weights(shape: Shape, seed: int, device: torch.device | str = "cpu") -> GetTensor:
    """`get_tensor` of a randomly initialised model; drawn on `device`, as a core takes 15 s for a billion."""
    sizes = hf_names(shape)
    return lambda name: init_tensor(name, sizes[name], shape, seed, device)


def with_head(get_tensor: GetTensor, names: Collection[str], shape: Shape, seed: int) -> GetTensor:
    """`get_tensor` of a model that starts from another's tensors: a scalar head that it lacks is random.

    names: of the tensors that `get_tensor` has.
    """
    new = random_weights(shape, seed)
    missing = {name for rule in VALUE_HEAD for name in rule.hf} - set(names) if shape.value else set()
    return lambda name: new(name) if name in missing else get_tensor(name)
