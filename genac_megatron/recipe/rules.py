"""Rules that a recipe keeps over more than one block: layouts, models, stages, task, files. No torch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import shape_of
from genac_megatron.recipe.adapter_rules import check_adapter, check_begins, check_moving, check_share
from genac_megatron.recipe.algorithm_rules import check_algorithm, check_role
from genac_megatron.recipe.algorithms import WithScalarCritic
from genac_megatron.recipe.environment_rules import check_environment
from genac_megatron.recipe.joint_rules import (
    check_certain,
    check_final_state,
    check_joint,
    check_judging_teacher,
)
from genac_megatron.recipe.judged_rules import check_judged
from genac_megatron.recipe.lora_rules import check_lora
from genac_megatron.recipe.megatron_rules import check_megatron, check_one_buffer
from genac_megatron.recipe.names import check_names
from genac_megatron.recipe.overlap_rules import check_overlap
from genac_megatron.recipe.own_rules import check_privileged
from genac_megatron.recipe.pipeline import chunk_layers
from genac_megatron.recipe.precision import Where, check_precision, check_quantization
from genac_megatron.recipe.schema import (
    LayoutConfig,
    ModelConfig,
    PolicyStage,
    PpoStage,
    Recipe,
    ReinforceStage,
    RoleConfig,
    SftStage,
    StageConfig,
    ValueStage,
)
from genac_megatron.recipe.server_rules import check_embedded, check_servers, check_unread
from genac_megatron.recipe.size_rules import check_sizes
from genac_megatron.recipe.source_rules import (
    check_replay,
    check_sources,
    check_teacher,
    has_teacher,
)
from genac_megatron.recipe.stages import sources_of
from genac_megatron.recipe.task_rules import check_file, check_task
from genac_megatron.tasks.tokenizer import check_rows, tokenizer_size

SERVER_LIMITS = {
    "engine": ("request_timeout_s", "start_timeout_s"),
    "publication": ("drain_s", "control_s", "send_s", "verify_s"),
}
TEMPLATES = ("standard", "brief")


def ranks_of(layout: LayoutConfig, world: int) -> int:
    """How many ranks a layout has in a world."""
    return layout.count if layout.count is not None else world - layout.first_rank


def nowhere(location: Sequence[str | int]) -> str:
    """For a recipe that was not read from a file."""
    return ""


def read_shape(model: ModelConfig, where: Callable[[str], str] = lambda key: "") -> Shape:
    """The Shape of a recipe's model, from the recipe and, of folders, config.json and tokenizer.json alone.

    `where` says where in the user's files a key of the model's block stands. Raises InputError.
    """
    vocab = None if model.tokenizer is None else tokenizer_size(model.tokenizer, where("tokenizer"))
    shape = shape_of(model, vocab, where)
    if model.tokenizer is None and model.hf is not None:
        folder = Path(model.hf).expanduser()
        if (folder / "tokenizer.json").exists():  # others are converted as they are loaded
            check_rows(str(folder), shape.vocab, str(folder))
    return shape


def check(recipe: Recipe, where: Where = nowhere) -> None:
    """All rules in order. Raises InputError at the first that is broken.

    `where` says where in the user's files a key stands, for the message.
    """
    check_names(recipe, where)
    if not recipe.roles:
        raise InputError("there are no roles", where=where(["roles"]), way_out="name at least one")
    for name, role in recipe.roles.items():
        check_share(recipe, name, where)
        check_moving(recipe, name, where)
        _check_layout(recipe, name, role.layout, where)
        _check_model(name, role, where)
        _check_limits(recipe, name, role, where)
        check_servers(name, role, where)
        check_lora(recipe, name, role, where)
        check_embedded(name, role, where)
        check_unread(name, role, where)
    check_one_buffer(recipe, read_shape, where)
    check_task(recipe.task, ("task",), where)
    check_environment(recipe, where)
    _check_judging(recipe, where)
    _check_stages(recipe, where)
    check_judged(recipe, where)
    check_sizes(recipe, where)


def _check_layout(recipe: Recipe, name: str, layout: LayoutConfig, where: Where) -> None:
    world, count = recipe.world.ranks, ranks_of(layout, recipe.world.ranks)
    place = ("roles", name, "layout")
    if count < 1 or layout.first_rank + count > world:
        last = layout.first_rank + max(count, 1) - 1
        raise InputError(
            f"the layout of '{name}' takes ranks {layout.first_rank} to {last} of a world of {world}",
            where=where(place),
            way_out="raise world.ranks, or lower first_rank or count",
        )
    block = layout.tp * layout.pp * layout.cp
    if count % block:
        raise InputError(
            f"the layout of '{name}' has {count} ranks, no multiple of tp * pp * cp = "
            f"{layout.tp} * {layout.pp} * {layout.cp} = {block}",
            where=where(place),
            way_out=f"change world.ranks or count to a multiple of {block}, or lower tp, pp or cp",
        )
    if layout.vpp > 1 and layout.pp == 1:
        raise InputError(
            f"the layout of '{name}' has vpp {layout.vpp} without pipeline stages",
            where=where((*place, "vpp")),
            way_out="set pp > 1, or vpp: 1",
        )
    if layout.sequence_parallel and layout.tp == 1:
        raise InputError(
            f"the layout of '{name}' has sequence_parallel with tp 1",
            where=where((*place, "sequence_parallel")),
            way_out="set tp > 1, or leave sequence_parallel out",
        )


def _check_model(name: str, role: RoleConfig, where: Where) -> None:
    shape = read_shape(role.model, lambda key: where(("roles", name, "model", *([key] if key else []))))
    _check_split(name, shape, role.layout, where)
    _check_context(name, shape, role, where)
    _check_lengths(name, shape, role, where)
    check_precision(name, role, shape, where)
    check_megatron(name, role, shape, where)
    check_quantization(name, role, shape, where)
    check_adapter(name, role, shape, where)
    if role.engine.routing_replay and shape.experts is None:
        raise InputError(
            f"the engine of '{name}' is to have its experts replayed, and its model has none",
            where=where(("roles", name, "engine", "routing_replay")),
            way_out="take routing_replay out",
        )


def _check_split(name: str, shape: Shape, layout: LayoutConfig, where: Where) -> None:
    place = ("roles", name, "layout")
    _check_experts(name, shape, layout, where)
    # Experts are not cut by tp: their model's ffn is nobody's.
    sizes = (("heads", shape.heads), ("ffn", shape.ffn))
    for what, size in sizes[:1] if shape.experts else sizes:
        if size % layout.tp:
            raise InputError(
                f"tp {layout.tp} of '{name}' does not divide its model's {what} {size}",
                where=where((*place, "tp")),
                way_out=f"tp must divide heads {shape.heads} and ffn {shape.ffn}",
            )
    if shape.kv_heads % layout.tp and layout.tp % shape.kv_heads:
        raise InputError(
            f"tp {layout.tp} of '{name}' neither divides its model's kv_heads {shape.kv_heads} nor is a "
            "multiple of them",
            where=where((*place, "tp")),
            way_out=f"choose tp that divides {shape.kv_heads}, or a multiple of it",
        )
    try:
        chunk_layers(shape.layers, layout.pp, layout.vpp, layout.pipeline_model_parallel_layout)
    except InputError as error:
        raise InputError(
            f"'{name}': {error.what}", where=where((*place, error.where)), way_out=error.way_out
        ) from None


def _check_lengths(name: str, shape: Shape, role: RoleConfig, where: Where) -> None:
    training = role.training
    if shape.experts and training.variable_seq_lengths and training.moe_dispatcher == "allgather":
        raise InputError(
            f"'{name}' has variable_seq_lengths, and the allgather dispatcher of experts wants one length",
            where=where(("roles", name, "training", "variable_seq_lengths")),
            way_out="set moe_dispatcher: alltoall, or leave variable_seq_lengths out",
        )


def _check_context(name: str, shape: Shape, role: RoleConfig, where: Where) -> None:
    """Torch's layers attend with a share of the heads; Transformer Engine's ring has no such limit."""
    layout = role.layout
    if role.training.specs == "torch" and shape.heads // layout.tp % layout.cp:
        raise InputError(
            f"cp {layout.cp} of '{name}' does not divide its {shape.heads} heads / tp {layout.tp}",
            where=where(("roles", name, "layout", "cp")),
            way_out=f"choose tp and cp whose product divides {shape.heads}",
        )


def _check_experts(name: str, shape: Shape, layout: LayoutConfig, where: Where) -> None:
    place = ("roles", name, "layout")
    if layout.ep > 1 and shape.experts is None:
        raise InputError(
            f"the layout of '{name}' has ep {layout.ep}, and its model has no experts",
            where=where((*place, "ep")),
            way_out="set ep: 1",
        )
    if shape.experts and shape.experts % layout.ep:
        raise InputError(
            f"ep {layout.ep} of '{name}' does not divide its model's {shape.experts} experts",
            where=where((*place, "ep")),
            way_out=f"choose ep that divides {shape.experts}",
        )
    if shape.experts and layout.tp > 1 and layout.sequence_parallel is False:
        raise InputError(
            f"'{name}' has experts and tp {layout.tp}, which needs sequence_parallel",
            where=where((*place, "sequence_parallel")),
            way_out="leave sequence_parallel out",
        )


def _check_limits(recipe: Recipe, name: str, role: RoleConfig, where: Where) -> None:
    """While a rank waits for a server, the others wait for it in a collective: that limit is the longer."""
    if role.engine.kind != "sglang":
        return
    collective = recipe.world.timeout_s
    for block, keys in SERVER_LIMITS.items():
        for key in keys:
            limit = getattr(getattr(role, block), key)
            if limit >= collective:
                raise InputError(
                    f"roles.{name}.{block}.{key} is {limit:g} s and world.timeout_s {collective:g} s: ranks "
                    "would give up on one that still waits for a server",
                    where=where(("roles", name, block, key)),
                    way_out=f"lower {key}, or raise world.timeout_s above it",
                )


def _check_judging(recipe: Recipe, where: Where) -> None:
    check_judging_teacher(recipe, has_teacher(recipe.task), where)
    check_final_state(recipe, where)
    check_certain(recipe, where)
    budget, longest = recipe.judging.budget, recipe.judging.max_new_tokens
    if budget is not None and budget // recipe.world.ranks < longest:
        raise InputError(
            f"a budget of {budget} critic tokens over {recipe.world.ranks} ranks is less than one judgement "
            f"of {longest} each",
            where=where(("judging", "budget")),
            way_out=f"give it at least {longest * recipe.world.ranks}, or leave it out",
        )
    if recipe.judging.template not in TEMPLATES:
        check_file(recipe.judging.template, ("judging", "template"), where)
        check_privileged(recipe.judging, where)


def _check_stages(recipe: Recipe, where: Where) -> None:
    for name, times in Counter(stage.name for stage in recipe.stages).items():
        if times > 1:
            raise InputError(
                f"{times} stages are called '{name}'",
                where=where(("stages",)),
                way_out="give each a name of its own",
            )
    for index, stage in enumerate(recipe.stages):
        place = ("stages", index)
        if isinstance(stage, SftStage):
            _check_sft(recipe, stage, place, where)
            continue
        _check_heads(recipe, stage, place, where)
        check_algorithm(recipe, stage, place, where, exact=has_teacher(recipe.task))
        if isinstance(stage, ReinforceStage):
            check_replay(recipe, stage, place, where)
        check_joint(recipe, stage, place, where)
        if "reference" in recipe.roles and _kl_coef(stage):
            who = f"kl_coef of the stage '{stage.name}'"
            _check_copy(recipe, "actor", "reference", who, ("roles", "reference", "model"), where)
        if isinstance(stage, PpoStage | PolicyStage):
            check_overlap(recipe, stage, place, where)
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, SftStage) or stage.data == "traces":
            new = stage.rollout.max_new_tokens
            _check_room(recipe, "actor", new, ("stages", index, "rollout", "max_new_tokens"), where)
        for own, source in sources_of(stage):
            if source.rollout is not None:
                new, at = source.rollout.max_new_tokens, ("stages", index, *own, "rollout", "max_new_tokens")
                _check_room(recipe, "actor", new, at, where)
    if "critic" in recipe.roles and recipe.roles["critic"].served:
        new = recipe.judging.max_new_tokens
        _check_room(recipe, "critic", new, ("judging", "max_new_tokens"), where)


def _check_room(recipe: Recipe, role: str, new: int, place: Sequence[str | int], where: Where) -> None:
    """New tokens must leave room for a prompt; how long prompts are shows only when they are made."""
    positions = read_shape(recipe.roles[role].model).max_positions
    if new >= positions:
        raise InputError(
            f"max_new_tokens {new} leaves no room for a prompt in the {positions} positions of "
            f"{role}'s model",
            where=where(place),
            way_out="lower max_new_tokens, or use a model with more positions (max_positions)",
        )


def _check_heads(recipe: Recipe, stage: StageConfig, place: tuple[str | int, ...], where: Where) -> None:
    """The roles that a stage needs, each with the head that it needs."""
    who = f"the stage '{stage.name}' ({stage.kind})"
    scalar = isinstance(stage, ValueStage) or (
        isinstance(stage, PolicyStage) and isinstance(stage.algorithm, WithScalarCritic)
    )
    needed = {"actor": "lm"}
    if scalar or not (isinstance(stage, PolicyStage) or recipe.judging.teacher):
        needed["critic"] = "value" if scalar else "lm"
    if isinstance(stage, ValueStage | PolicyStage) and stage.start_from is not None:
        check_role(recipe, stage.start_from, who, (*place, "start_from"), where)
        if not scalar or stage.start_from == "critic":
            raise InputError(
                f"{who} has a start_from, which is for a scalar critic that begins as another role",
                where=where((*place, "start_from")),
                way_out="leave start_from out",
            )
        _check_copy(recipe, stage.start_from, "critic", who, (*place, "start_from"), where)
    for role, head in needed.items():
        check_role(recipe, role, who, place, where)
        has = recipe.roles[role].model.head
        if has != head and not (head == "value" and has == "logit"):
            kind = {"lm": "a language model", "value": "a scalar critic"}[head]
            raise InputError(
                f"{who} needs {kind} as its {role}",
                where=where(("roles", role, "model", "head")),
                way_out=f"set roles.{role}.model.head: {head}, or choose another kind of stage",
            )


def _kl_coef(stage: StageConfig) -> float:
    if isinstance(stage, PpoStage):
        return stage.actor_loss.kl_coef
    return stage.algorithm.loss.kl_coef if isinstance(stage, PolicyStage) else 0.0


def _check_copy(
    recipe: Recipe, source: str, target: str, who: str, place: Sequence[str | int], where: Where
) -> None:
    """A role that starts as a copy of another has its shape, and weights of its own."""
    check_begins(target, recipe.roles[target], who, place, where)
    shapes = [read_shape(recipe.roles[name].model) for name in (source, target)]
    if not shapes[1].may_start_from(shapes[0]):
        was, is_ = (dataclasses.asdict(shape) for shape in shapes)
        different = [f"{key} {was[key]} and {is_[key]}" for key in was if was[key] != is_[key]]
        raise InputError(
            f"{who} has '{target}' start from '{source}', and their shapes differ: {', '.join(different)}",
            where=where(place),
            way_out=f"give roles.{target}.model the shape of roles.{source}.model",
        )


def _check_sft(recipe: Recipe, stage: SftStage, place: tuple[str | int, ...], where: Where) -> None:
    who = f"the stage '{stage.name}' (sft)"
    check_role(recipe, stage.role, who, (*place, "role"), where)
    if stage.start_from is not None:
        check_role(recipe, stage.start_from, who, (*place, "start_from"), where)
        if stage.start_from == stage.role:
            raise InputError(
                f"{who} starts '{stage.role}' from itself",
                where=where((*place, "start_from")),
                way_out="leave start_from out",
            )
        _check_copy(recipe, stage.start_from, stage.role, who, (*place, "start_from"), where)
    _check_heldout(stage, who, (*place, "heldout"), where)
    check_sources(recipe, stage, place, where)
    if stage.data == "jsonl":
        if stage.path is None:
            raise InputError(f"{who} reads jsonl and has no path", where=where(place), way_out="add path:")
        check_file(stage.path, (*place, "path"), where)
        return
    _check_no_chats(stage, who, place, where)
    if stage.path is not None:
        raise InputError(
            f"{who} makes its {stage.data} and reads no path",
            where=where((*place, "path")),
            way_out="take path out, or set data: jsonl",
        )
    if stage.data == "demonstrations" and not stage.sources and not has_teacher(recipe.task):
        raise InputError(
            f"{who} wants demonstrations; the task '{recipe.task.kind}' has no teacher",
            where=where((*place, "data")),
            way_out="set data: jsonl and a path, or start from a model that can answer",
        )
    if stage.data == "traces":
        _check_traces(recipe, stage, place, where)


def _check_no_chats(stage: SftStage, who: str, place: tuple[str | int, ...], where: Where) -> None:
    for key in ("turns", "system", "overlong"):
        if getattr(stage, key) != SftStage.model_fields[key].default:
            raise InputError(
                f"{who} makes its {stage.data}, and {key} is about conversations that are read",
                where=where((*place, key)),
                way_out=f"take {key} out, or set data: jsonl",
            )


def _check_heldout(stage: SftStage, who: str, place: tuple[str | int, ...], where: Where) -> None:
    heldout = stage.heldout
    if heldout is None:
        return
    if heldout.metric == "exact_match" and heldout.target is not None and heldout.target > 1:
        raise InputError(
            f"{who} waits for an exact_match of {heldout.target:g}, which is a chance of at most 1",
            where=where((*place, "target")),
            way_out="set a target between 0 and 1, or metric: loss",
        )
    if heldout.min_delta and heldout.patience is None:
        raise InputError(
            f"{who} has heldout.min_delta, which only patience reads",
            where=where((*place, "min_delta")),
            way_out="add patience, or take min_delta out",
        )


def _check_traces(recipe: Recipe, stage: SftStage, place: tuple[str | int, ...], where: Where) -> None:
    who = f"the stage '{stage.name}' (sft on traces)"
    check_role(recipe, "actor", who, place, where)
    if not stage.sources:  # which have teachers of their own
        check_teacher(stage.teacher, recipe.task, who, (*place, "teacher"), where)
