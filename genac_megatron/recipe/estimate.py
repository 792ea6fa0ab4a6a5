"""What a recipe will take, told before it runs: who is on which rank, memory, tokens. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from genac_megatron.models.blockwise import BLOCK, SCALE_BYTES, in_blocks, scale_size
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import rules
from genac_megatron.models.sizes import (
    adapter_parameters,
    attention_parameters,
    hf_names,
    local_size,
    parameters,
    stage_parameters,
)
from genac_megatron.recipe import flops
from genac_megatron.recipe.algorithms import WithScalarCritic
from genac_megatron.recipe.pipeline import stage_layers
from genac_megatron.recipe.rules import ranks_of, read_shape
from genac_megatron.recipe.schema import (
    AdapterConfig,
    Band,
    EngineConfig,
    JudgingConfig,
    LayoutConfig,
    PolicyStage,
    PpoStage,
    Recipe,
    ReinforceStage,
    RoleConfig,
    SftStage,
    StageConfig,
    ValueStage,
)
from genac_megatron.recipe.servers import lora_slots, served_adapters, widest
from genac_megatron.recipe.sharing import owner_of
from genac_megatron.recipe.training import TrainingConfig

BYTES = {"fp32": 4, "bf16": 2}
# Of the scales, per element of a copy: blocks of 128 x 128 with 4 bytes, of 32 with one.
FP8_SCALE_BYTES = {"blockwise": SCALE_BYTES / BLOCK**2, "mxfp8": 1 / 32}
# What a projection reads: those of one layer share it.
READS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "gate_proj": "up", "up_proj": "up",
         "down_proj": "down"}  # fmt: skip
SHOWN_RANKS = 16  # more ranks than this are shown by their first and their heaviest
OTHER_FILES = 512  # of a rank: libraries, logs, checkpoints, requests under way


class Place(NamedTuple):
    """A rank's coordinates in a role's layout."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one role on one rank; a rank outside its layout has only its engine."""

    engine: float
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.engine


def place_of(layout: LayoutConfig, rank: int, world: int) -> Place | None:
    """A global rank's coordinates, tp fastest, then cp, dp, pp; None outside the layout's block."""
    count = ranks_of(layout, world)
    rest = rank - layout.first_rank
    if not 0 <= rest < count:
        return None
    rest, tp = divmod(rest, layout.tp)
    rest, cp = divmod(rest, layout.cp)
    pp, dp = divmod(rest, count // (layout.tp * layout.cp * layout.pp))
    return Place(tp, cp, dp, pp)


def activation_bytes(role: RoleConfig, shape: Shape, pp: int) -> float:
    """Activations kept for the backward pass on a rank of stage `pp`, in bytes.

    Per token and layer, in elements of the training dtype, with attention that keeps no scores:
    residual stream and norm inputs and outputs 4h, divided by tp under sequence parallelism;
    queries, keys, values and the attention's output (2 heads + 2 kv_heads) head_dim / tp, of keys a head at
    least;
    gate, up and their product 3 ffn / tp. (After Korthikanti et al. 2022, arXiv 2205.05198, section 4, less
    dropout and scores, with a gated MLP.) Full recomputation keeps h per layer, and one layer's worth once;
    selective recomputation redoes attention's core alone, which keeps nothing here.
    Under 1F1B stage i of p holds p - i micro-batches; interleaving v chunks multiplies by 1 + (p-1)/(p v).
    The last stage adds three fp32 copies of a chunk's logits shard. With dropout an adapter's input is there
    twice, and a byte for each element says what was dropped.
    """
    layout, training = role.layout, role.training
    sequence_parallel = layout.tp > 1 if layout.sequence_parallel is None else layout.sequence_parallel
    stream = shape.hidden / (layout.tp if sequence_parallel else 1)
    attention = 2 * (shape.q_size / layout.tp + shape.kv_size / min(layout.tp, shape.kv_heads))
    per_layer = 4 * stream + attention + 3 * shape.ffn / layout.tp
    if training.adapter is not None and training.adapter.dropout:
        inputs = {"qkv": stream, "o": shape.q_size / layout.tp, "up": stream, "down": shape.ffn / layout.tp}
        read = {READS[target] for target in training.adapter.targets}
        per_layer += sum(inputs[key] for key in read) * (1 + 1 / BYTES[training.dtype])
    layers = stage_layers(layout, shape.layers, pp)
    in_flight = (layout.pp - pp) * (1 + (layout.pp - 1) / (layout.pp * layout.vpp) if layout.vpp > 1 else 1)
    if training.recompute == "full":
        held = layers * stream * in_flight + per_layer
    else:
        held = layers * per_layer * in_flight
    total = held * training.tokens_per_microbatch / layout.cp * BYTES[training.dtype]
    if pp == layout.pp - 1 and not shape.value:
        total += 3 * 4 * training.logprob_chunk * shape.vocab / layout.tp
    return total


def expert_parameters(shape: Shape, layers: int, ep: int) -> int:
    """Parameters of the experts on one rank with `layers` layers: gate, up and down projection of each."""
    each = 3 * shape.hidden * (shape.expert_ffn or 0)
    return each * (shape.experts or 0) // ep * layers


def fp8_parameters(role: RoleConfig, shape: Shape, pp: int) -> int:
    """Parameters on a rank of stage `pp` that are multiplied in FP8: its layers' projections, those apart of
    the first and last layers that stay in BF16."""
    layout, training = role.layout, role.training
    if training.fp8 == "off":
        return 0
    layers = stage_layers(layout, shape.layers, pp)
    if pp == 0:
        layers -= training.bf16_first_layers
    if pp == layout.pp - 1:
        layers -= training.bf16_last_layers
    each = (shape.experts or 0) // layout.ep
    held = [rule for rule in rules(shape) if in_blocks(rule.hf[0]) and (rule.expert or 0) < max(each, 1)]
    return max(layers, 0) * sum(math.prod(local_size(rule, shape, layout.tp)) for rule in held)


def weight_bytes(role: RoleConfig, shape: Shape, pp: int, *, shared: bool = False) -> float:
    """A role's weights on a rank of stage `pp`, but for adapters. shared: it stands on another role's.

    Under FP8 Transformer Engine (2.12) keeps of each weight what the forward pass reads row by row and, where
    it is trained, what the backward pass reads column by column: a second copy of one byte each, as Hopper's
    FP8 products take one layout alone (`Float8Tensor._transpose`, `Float8BlockwiseQTensor._columnwise_data`;
    on Blackwell delayed and tensorwise scaling need none), with the blocks' scales. They are all that there
    is of a weight with fp8_param; else they are kept beside it, from one micro-batch to the next
    (`TransformerEngineBaseModule.get_weight_workspace`). fp32 masters are the optimizer's, as ever.
    """
    layout, training = role.layout, role.training
    layers = stage_layers(layout, shape.layers, pp)
    count = stage_parameters(shape, layout.tp, layout.pp, pp, layout.ep, layers)
    fp8 = fp8_parameters(role, shape, pp)
    copies = (1 if training.frozen else 2) * (1 + FP8_SCALE_BYTES.get(training.fp8, 0.0))
    if shared:  # its layers have FP8 copies of their own, unless the weights lie in FP8 themselves
        return 0.0 if training.fp8_param else fp8 * copies
    kept = count - fp8 if training.fp8_param else count
    return kept * BYTES[training.dtype] + fp8 * copies


def served_bytes(role: RoleConfig, shape: Shape) -> float:
    """Weights on each rank of an SGLang server, vocabulary's padding and repeated heads apart."""
    fp8, scales = _fp8_served(shape) if role.engine.quantization == "fp8" else (0, 0)
    plain = (parameters(shape) - fp8) * BYTES[role.engine.dtype]
    return float(plain + fp8 + scales * SCALE_BYTES) / role.engine.tp


def slot_bytes(adapters: Sequence[AdapterConfig], shape: Shape, engine: EngineConfig) -> float:
    """What a server rank holds for adapters to decode with; nothing where it loads none."""
    if not adapters:
        return 0.0
    each = adapter_parameters(shape, widest(adapters), engine.tp, shape.layers)
    return float(lora_slots(adapters) * each * BYTES[engine.dtype])


@cache
def _fp8_served(shape: Shape) -> tuple[int, int]:
    """Weights that an FP8 server holds in blocks, and their scales."""
    blocks = [size for name, size in hf_names(shape).items() if in_blocks(name)]
    return sum(math.prod(size) for size in blocks), sum(math.prod(scale_size(size)) for size in blocks)


def engine_bytes(role: RoleConfig, shape: Shape) -> float:
    """An embedded engine: the whole model in the engine's dtype, and a KV cache of max_batch_tokens.

    What is published to it in FP8 it holds dequantized. SGLang's servers are processes of their own, on the
    GPUs that the recipe names: nothing here.
    """
    if not role.served or role.engine.kind == "sglang":
        return 0.0
    cache = role.engine.batch_tokens * 2 * shape.layers * shape.kv_size
    return float((parameters(shape) + cache) * BYTES[role.engine.dtype])


def _state_bytes(training: TrainingConfig) -> float:
    """Of a parameter, on the GPU: Adam's moments and, under bf16, the fp32 master."""
    moments = BYTES[training.exp_avg_dtype] + BYTES[training.exp_avg_sq_dtype]
    here = 1 - training.optimizer_offload_fraction if training.optimizer_cpu_offload else 1
    return here * (moments + (4 if training.dtype == "bf16" else 0))


def memory_of(
    role: RoleConfig, shape: Shape, place: Place | None, world: int, *, shared: bool = False
) -> Memory:
    """The parts of one role's memory on one rank, in bytes; `place` is None outside the role's layout.
    shared: it stands on another role's base, which is counted there.

    Weights as `weight_bytes` says; gradients accumulate in fp32; the optimizer's states (`_state_bytes`) are
    divided over the data- and context-parallel ranks where the optimizer
    is distributed, an expert's over the ranks that hold the same experts. Every rank of the world generates
    with every role, and so holds an embedded engine of each.
    """
    engine = engine_bytes(role, shape)
    if place is None:
        return Memory(engine)
    layout, training = role.layout, role.training
    layers = stage_layers(layout, shape.layers, place.pp)
    count = stage_parameters(shape, layout.tp, layout.pp, place.pp, layout.ep, layers)
    if training.adapter is not None:
        count = adapter_parameters(shape, training.adapter, layout.tp, layers)
    if training.frozen_attention:
        count -= attention_parameters(shape, layout.tp, layers)
    stage_ranks = ranks_of(layout, world) // layout.pp if training.distributed_optimizer else 0
    experts = expert_parameters(shape, layers, layout.ep)
    shares = (count - experts) / max(1, stage_ranks // layout.tp) + experts / max(1, stage_ranks // layout.ep)
    weights = weight_bytes(role, shape, place.pp, shared=shared)
    if training.adapter is not None:
        weights += count * BYTES[training.dtype]
    if training.frozen:
        return Memory(engine, weights=weights)
    return Memory(
        engine,
        weights=weights,
        gradients=count * 4,
        optimizer=shares * _state_bytes(training),
        activations=activation_bytes(role, shape, place.pp),
    )


def open_files(recipe: Recipe) -> int:
    """Files that a rank may have open at most, connections among them: gloo's groups keep one to each of
    their ranks, which are the world's and, on CPUs, each role's.
    """
    return recipe.world.ranks * (1 + len(recipe.roles)) + OTHER_FILES


def describe(recipe: Recipe) -> str:
    """Layouts, memory per rank and tokens per step of a checked recipe, as text for --dry-run.

    Raises InputError where a model's folder cannot be read.
    """
    shapes = {name: read_shape(role.model) for name, role in recipe.roles.items()}
    blocks = [
        _describe_roles(recipe, shapes),
        _describe_ranks(recipe, shapes),
        _describe_stages(recipe, shapes),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks) + "\n"


def _describe_roles(recipe: Recipe, shapes: dict[str, Shape]) -> list[str]:
    world = recipe.world.ranks
    lines = [f"{recipe.name}: {world} {'rank' if world == 1 else 'ranks'}"]
    for name, role in recipe.roles.items():
        at, shape, count = role.layout, shapes[name], ranks_of(role.layout, world)
        last = at.first_rank + count - 1
        dp = count // (at.tp * at.pp * at.cp)
        lines.append(
            f"  {name}: {shape.family}, {count_told(parameters(shape))} parameters ({shape.layers} layers, "
            f"hidden {shape.hidden}, {shape.heads}/{shape.kv_heads} heads, vocabulary {shape.vocab:,}"
            f"{', tied' if shape.tie else ''})"
        )
        lines.append(
            f"    ranks {at.first_rank} to {last}: tp {at.tp}, pp {at.pp}, vpp {at.vpp}, "
            f"cp {at.cp}, dp {dp}; {role.training.dtype}, fp8 {role.training.fp8}, "
            f"recompute {role.training.recompute}"
        )
        if (adapter := role.training.adapter) is not None:
            owner = owner_of(recipe, name)
            base = recipe.roles[owner].training.adapter if owner is not None else adapter
            moves = base.merge_every if base is not None else None
            lines.append(f"    {adapter_told(adapter, shape, owner, moves)}")
        if role.starts_servers:
            lines.append(
                f"    {role.engine.engines} SGLang server{'s' if role.engine.engines > 1 else ''} of "
                f"{role.engine.tp} rank{'s' if role.engine.tp > 1 else ''}, quantization "
                f"{role.engine.quantization}: weights {_size(served_bytes(role, shape))} on each, "
                f"{_limits(recipe, role)}"
            )
        if role.engine.enable_lora:
            lines.append(f"    {_served_told(recipe, name, shape)}")
    return lines


def _served_told(recipe: Recipe, name: str, shape: Shape) -> str:
    """What of a role reaches its servers."""
    engine = recipe.roles[name].engine
    if engine.share is not None:
        return f"served by the servers of '{engine.share}', which load its adapters"
    adapters = served_adapters(recipe, name)
    room = _size(slot_bytes(adapters, shape, engine))
    plural = "s" if len(adapters) > 1 else ""
    return f"servers hold the base and load adapters of {len(adapters)} role{plural} beside it ({room})"


def adapter_told(adapter: AdapterConfig, shape: Shape | None, owner: str | None, moves: int | None) -> str:
    """What of a role trains; without figures where its shape is not known. owner: whose base it shares.
    moves: the steps after which an adapter is merged into that.
    """
    text = f"adapters of rank {adapter.rank} on {len(adapter.targets)} projections"
    if shape is not None:
        trained, whole = adapter_parameters(shape, adapter, 1, shape.layers), parameters(shape)
        share = f"{100 * trained / whole:.2g} % of its {count_told(whole)}"
        text += f": {count_told(trained)} parameters train ({share})"
    often = "" if moves is None else "every step" if moves == 1 else f"every {moves} steps"
    if owner is None:
        return f"{text}, {f'merged into its model {often}' if often else 'its model is frozen'}"
    model = f"on the {'' if often else 'frozen '}model of '{owner}', held once"
    return f"{text}, {model}" + (f", which moves {often}" if often else "")


def _limits(recipe: Recipe, role: RoleConfig) -> str:
    """What a server decodes at a time, by the keys that it is started with."""
    engine, gpu = role.engine, recipe.cluster.gpu is not None
    together = engine.max_batch if gpu else engine.batch
    tokens = engine.max_batch_tokens if gpu else engine.batch_tokens
    if together is None and tokens is None:
        return "requests as its memory holds"
    parts = [f"{together} requests"] if together is not None else []
    return (
        f"at most {' of '.join([*parts, *([f'{tokens:,} tokens'] if tokens is not None else [])])} at a time"
    )


def _describe_ranks(recipe: Recipe, shapes: dict[str, Shape]) -> list[str]:
    totals, rows = [], []
    for rank in range(recipe.world.ranks):
        total, lines = 0.0, []
        for name, role in recipe.roles.items():
            place = place_of(role.layout, rank, recipe.world.ranks)
            shared = owner_of(recipe, name) is not None
            memory = memory_of(role, shapes[name], place, recipe.world.ranks, shared=shared)
            total += memory.total
            lines.append(f"{name:<10} {_describe_place(place, memory)}, engine {_size(memory.engine)}")
        totals.append(total)
        rows.append([f"  rank {rank}: {_size(total)}", *(f"    {line}" for line in lines)])
    heaviest = max(range(len(totals)), key=totals.__getitem__)
    shown = range(len(rows)) if len(rows) <= SHOWN_RANKS else sorted({*range(SHOWN_RANKS), heaviest})
    head = f"Memory, estimated (without the libraries' own): all ranks {_size(sum(totals))}, most on rank "
    lines = [f"{head}{heaviest} ({_size(totals[heaviest])})"]
    lines += [line for rank in shown for line in rows[rank]]
    if len(shown) < len(rows):
        lines.append(f"  {len(rows) - len(shown)} more ranks are placed alike")
    return lines


def _describe_place(place: Place | None, memory: Memory) -> str:
    if place is None:
        return "not trained here"
    return (
        f"tp {place.tp} cp {place.cp} dp {place.dp} pp {place.pp}   weights {_size(memory.weights)}, "
        f"gradients {_size(memory.gradients)}, optimizer {_size(memory.optimizer)}, activations "
        f"{_size(memory.activations)}"
    )


def _describe_stages(recipe: Recipe, shapes: dict[str, Shape]) -> list[str]:
    lines = ["Tokens, at most (prompts not counted)"]
    for stage in recipe.stages:
        lines.append(f"  {stage.name} ({stage.kind}): {_stage_tokens(recipe, stage)}")
        if isinstance(stage, PpoStage):
            lines += [f"    {line}" for line in flops.told(recipe, stage, shapes)]
        lines += [f"    expects {_band_told(band, stage)}" for band in stage.expect]
    return lines


def _band_told(band: Band, stage: StageConfig) -> str:
    bounds = [f"at least {band.low:g}"] if band.low is not None else []
    bounds += [f"at most {band.high:g}"] if band.high is not None else []
    steps = f"after step {band.step}" + (f" to {band.until}" if band.until is not None else "")
    ends = ", or ends" if band.action == "stop" else ""
    has = getattr(stage, "steps", band.step)
    never = f" (never looked at: the stage has {has} steps)" if has < band.step else ""
    return f"{band.figure} {' and '.join(bounds)} {steps}{ends}{never}"


def _stage_tokens(recipe: Recipe, stage: StageConfig) -> str:
    """What a stage generates and trains per step, if every completion ran to its limit."""
    judging = recipe.judging
    if isinstance(stage, SftStage):
        early = stage.heldout is not None and (stage.heldout.target or stage.heldout.patience)
        most = "at most " if early else ""
        text = f"{stage.batch} sequences a step, {most}{stage.epochs} epochs"
        if stage.data == "jsonl":
            return text
        text += f" over {stage.made:,} {stage.data}"
        if len(stage.sources) > 1:
            text += f" from {len(stage.sources)} sources"
        if stage.data == "traces":
            text += f" of at most {judging.max_new_tokens:,} tokens"
        return text
    if isinstance(stage, ValueStage) and stage.distil is not None:
        return f"{stage.steps} steps; a step trains on {stage.distil.batch:,} judged states"
    found = step_tokens(judging, stage)
    responses, generated = stage.rollout.prompts * stage.rollout.samples, count_told(found.actor)
    text = f"{stage.steps} steps; a step generates {generated} actor tokens ({responses:,} responses)"
    if isinstance(stage, ValueStage | PolicyStage):
        return text
    text += f" and {count_told(found.critic)} critic tokens ({found.states:,} states)"
    if not isinstance(stage, PpoStage) or stage.train_critic:
        text += f", trains {count_told(found.critic_trained)} critic tokens"
    if isinstance(stage, PpoStage):
        text += f" and {count_told(found.actor_trained)} actor tokens"
    return text


class StepTokens(NamedTuple):
    """What a step generates and trains if every completion runs to its limit; prompts are not counted."""

    actor: int
    critic: int
    states: int  # that the critic is asked about
    actor_trained: int
    critic_trained: int

    @property
    def total(self) -> int:
        return self.actor + self.critic + self.actor_trained + self.critic_trained


def step_tokens(
    judging: JudgingConfig, stage: ReinforceStage | PpoStage | ValueStage | PolicyStage
) -> StepTokens:
    """Of a stage that rolls the actor out; nothing of a value stage that learns from kept states."""
    if isinstance(stage, ValueStage) and stage.distil is not None:
        return StepTokens(0, 0, 0, 0, 0)
    rollout = stage.rollout
    responses = rollout.prompts * rollout.samples
    generated = responses * rollout.max_new_tokens
    if isinstance(stage, ValueStage | PolicyStage):
        scalar = isinstance(stage, ValueStage) or isinstance(stage.algorithm, WithScalarCritic)
        acts = generated * stage.epochs if isinstance(stage, PolicyStage) else 0
        return StepTokens(generated, 0, 0, acts, generated if scalar else 0)
    # The prompt state is judged once for its whole group of samples.
    trains = not isinstance(stage, PpoStage) or stage.train_critic
    states = rollout.prompts + responses * (judging.states.max_states - 1)
    learnt = math.ceil(responses * stage.train_share)
    trained = min(states, learnt * stage.train_states)
    if judging.states.final and trains:
        states, trained = states + responses, trained + learnt
    times = stage.critic_updates if isinstance(stage, PpoStage) else 1
    return StepTokens(
        generated,
        0 if judging.teacher else states * judging.max_new_tokens,
        states,
        generated * stage.epochs if isinstance(stage, PpoStage) else 0,
        trained * judging.max_new_tokens * times if trains else 0,
    )


def count_told(number: float) -> str:
    """A number with three digits and a unit."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _size(number: float) -> str:
    gib = number / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{number / 2**20:.1f} MiB"
