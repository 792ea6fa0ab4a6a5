"""Rules of Megatron's own overlap and optimizer memory: which of these keys go together. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.recipe.precision import Where
from genac_megatron.recipe.schema import ModelConfig, Recipe, RoleConfig

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
# One hardware queue, so that an exchange is begun before the product that it goes beside: what Megatron-LM
# asks for with tensor or context parallelism on GPUs before Blackwell.
ONE_QUEUE = "1"
OPTIMIZER = ("use_precision_aware_optimizer", "optimizer_cpu_offload")
MOMENTS = ("exp_avg_dtype", "exp_avg_sq_dtype")

Refuse = Callable[[str, str, str], InputError]


def check_megatron(name: str, role: RoleConfig, shape: Shape, where: Where) -> None:
    """Raise InputError at the first of a role's overlap and optimizer keys that cannot be or says nothing."""
    training, place = role.training, ("roles", name, "training")

    def refuse(key: str, what: str, way_out: str) -> InputError:
        return InputError(f"'{name}' {what}", where=where((*place, key)), way_out=way_out)

    if training.overlap_param_gather:
        _check_gather(role, refuse)
    for key in OPTIMIZER:
        if not getattr(training, key):
            continue
        if training.frozen or training.adapter is not None:
            why = "is frozen, without an optimizer" if training.frozen else "trains an adapter, whose are few"
            raise refuse(key, f"says where optimizer states lie, and {why}", f"take {key} out")
        if not training.distributed_optimizer or training.dtype == "fp32":
            raise refuse(
                key,
                "asks for what the distributed optimizer alone has, over bf16 weights",
                "set distributed_optimizer: true and dtype: bf16",
            )
    _check_optimizer(role, refuse)
    if training.tp_comm_overlap:
        _check_buffers(role, shape, refuse)


def _check_gather(role: RoleConfig, refuse: Refuse) -> None:
    """Megatron's own conditions, and adapters, whose parts no layer holds."""
    key, training = "overlap_param_gather", role.training
    for needed in ("distributed_optimizer", "overlap_grad_reduce"):
        if not getattr(training, needed):
            raise refuse(key, f"gathers weights meanwhile without {needed}", f"set {needed}: true")
    if training.frozen:
        raise refuse(key, "gathers updated weights, and is frozen", f"take {key} out")
    if training.adapter is not None:
        raise refuse(
            key,
            "trains an adapter, whose weights are few and no layer's own: no layer could wait for them",
            f"take {key} out",
        )


def _check_optimizer(role: RoleConfig, refuse: Refuse) -> None:
    training = role.training
    for key in MOMENTS:
        if getattr(training, key) == "fp32":
            continue
        if not training.use_precision_aware_optimizer:
            raise refuse(
                key, "has moments in bf16 without an optimizer that can", f"set {OPTIMIZER[0]}: true"
            )
        if training.optimizer_cpu_offload:
            raise refuse(
                key,
                "has moments in bf16 and in host memory, where Megatron's optimizer keeps fp32",
                f"set {key}: fp32, or optimizer_cpu_offload: false",
            )
    if not training.optimizer_cpu_offload:
        for key in ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"):
            if getattr(training, key) != type(training).model_fields[key].default:  # a dumped recipe has all
                raise refuse(
                    key,
                    "says how its optimizer is offloaded, and it is not",
                    "set optimizer_cpu_offload: true",
                )
        return
    if not training.use_precision_aware_optimizer:
        raise refuse(
            "optimizer_cpu_offload",
            "offloads its optimizer, which in Megatron is a form of the precision-aware one",
            f"set {OPTIMIZER[0]}: true",
        )
    if training.fp8_param and training.fp8 != "delayed":
        raise refuse(
            "optimizer_cpu_offload",
            f"offloads its optimizer and keeps its weights in FP8 ({training.fp8}), which Megatron cannot",
            "set fp8_param: false, or optimizer_cpu_offload: false",
        )


def _check_buffers(role: RoleConfig, shape: Shape, refuse: Refuse) -> None:
    key, layout, training = "tp_comm_overlap", role.layout, role.training
    if layout.tp == 1 or layout.sequence_parallel is False:
        raise refuse(
            key,
            "overlaps the exchanges of sequence parallelism, and has none",
            f"set layout.tp > 1 and leave layout.sequence_parallel out, or take {key} out",
        )
    if training.specs == "torch":
        raise refuse(key, "asks for Transformer Engine's buffers with torch's layers", "set specs: te")
    if training.fp8 != "off":
        raise refuse(key, f"has fp8 {training.fp8}, for which the buffers are not made here", "set fp8: off")
    step = 2 * layout.tp * layout.cp
    if training.tokens_per_microbatch % step:
        raise refuse(
            "tokens_per_microbatch",
            f"has tp_comm_overlap over packs of {training.tokens_per_microbatch} positions, which tp and cp "
            "cannot cut evenly",
            f"make it a multiple of {step}",
        )
    if shape.experts is not None:
        # Megatron switches it off without a word where a layer has another buffer than these four.
        raise refuse(key, "is a mixture of experts, whose layers have no such buffers", f"take {key} out")
    if training.adapter is not None:
        raise refuse(key, "trains an adapter beside layers that exchange within", f"take {key} out")
    if training.variable_seq_lengths:
        raise refuse(
            key,
            "has buffers of one size, and variable_seq_lengths",
            "take one of them out",
        )
    if layout.first_rank % layout.tp:
        raise refuse(
            key,
            f"has buffers over ranks {layout.tp} by {layout.tp} from rank 0, and begins at rank "
            f"{layout.first_rank}",
            f"set layout.first_rank to a multiple of {layout.tp}",
        )


def check_one_buffer(recipe: Recipe, shape_of: Callable[[ModelConfig], Shape], where: Where) -> None:
    """Raise InputError where roles would need several of what Transformer Engine has once in a process."""
    first: tuple[str, tuple[int, ...]] | None = None
    for name, role in recipe.roles.items():
        if not role.training.tp_comm_overlap:
            continue
        size = role.user_buffers(shape_of(role.model).hidden)
        place = ("roles", name, "training", "tp_comm_overlap")
        if recipe.world.ranks % role.layout.tp:
            raise InputError(
                f"'{name}' has buffers over all ranks {role.layout.tp} by {role.layout.tp}, and there are "
                f"{recipe.world.ranks}",
                where=where(place),
                way_out=f"make world.ranks a multiple of {role.layout.tp}, or take tp_comm_overlap out",
            )
        if first is not None and first[1] != size:
            raise InputError(
                f"'{name}' and '{first[0]}' have tp_comm_overlap, whose buffers a process has once, and "
                f"differ in (tp, cp, tokens, hidden): {size} and {first[1]}",
                where=where(place),
                way_out="make them alike, or take it out of one of them",
            )
        first = first or (name, size)


def queue_environment(recipe: Recipe, environ: Mapping[str, str]) -> dict[str, str]:
    """What ranks on GPUs need in their environment before CUDA begins: one queue where a role has tp or cp.

    What the user has set stays. Raises InputError where that cannot go with tp_comm_overlap.
    """
    given = environ.get(QUEUES)
    for name, role in recipe.roles.items():
        if given not in (None, ONE_QUEUE) and role.training.tp_comm_overlap:
            raise InputError(
                f"{QUEUES} is {given}, and tp_comm_overlap needs {ONE_QUEUE}",
                where=f"roles.{name}.training.tp_comm_overlap",
                way_out=f"unset {QUEUES}: it is then {ONE_QUEUE}",
            )
    cut = any(role.layout.tp * role.layout.cp > 1 for role in recipe.roles.values())
    return {QUEUES: ONE_QUEUE} if cut and given is None else {}
