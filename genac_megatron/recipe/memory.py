"""Who holds a GPU's memory in which phase of a run, in bytes, and what that leaves for its servers.

The one model that --dry-run, `genac slurm`, preflight, and a server's start and restart go by. No torch.

Phases, in the order of a run (stages/turns.py keeps to it):

  start     servers come up, before any role is built on a GPU of theirs
  generate  servers hold weights and KV cache; roles with `training.offload` rest in host memory
  train     all roles are there; servers with `engine.release` have given back their KV cache, or all
  publish   all roles, the buckets on their way, and the servers' weights; a KV cache that was given back
            comes after it
  restart   as generate, with a lost server that comes up again

The role's parts are recipe/estimate.py's. Assumed, not measured: RANK_GIB, SERVER_GIB, FILLED,
and recipe/share.py's CONTEXT_GIB.
`tools/gpu_minutes.sh facts server memory` says on a GPU what the first three are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import largest_parameter
from genac_megatron.recipe.estimate import BYTES, Memory, Place, memory_of, served_bytes, slot_bytes
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import EngineConfig, Recipe, RoleConfig, SftStage
from genac_megatron.recipe.servers import served_adapters
from genac_megatron.recipe.share import GIB, Share, gib
from genac_megatron.recipe.sharing import owner_of

# A rank's CUDA context, NCCL's and cuBLAS's buffers, and the allocator's waste.
RANK_GIB = 6.0
# A server's context, NCCL and all-reduce buffers, the attention kernels' workspace and the CUDA graphs.
SERVER_GIB = 2.5
# Of SGLang 0.5.23, where a recipe has no limits: tokens computed at once (chunked_prefill_size, from 60 and
# from 160 GiB on), and requests that its table has room for (512 times the contexts in the cache, within
# these).
PREFILL, LARGE_PREFILL, LARGE_GPU_GIB = 8192, 16_384, 160.0
SLOTS = (2048, 4096)
DECODED = 256  # requests that a server decodes together at the least: so many its CUDA graphs are made for
RESERVED = 0.7  # of a request's length that SGLang's scheduler sets aside before it lets it in
BUCKET = 512 << 20  # publication/plan.py: BUCKET_BYTES
ALIVE = 2  # buckets of a publication at a time
FILLED = 0.98  # of a GPU, by KV caches that take what is left: the rest of it is an estimate. Assumed


class Phase(StrEnum):
    """What a run does."""

    START = "start"
    GENERATE = "generate"
    TRAIN = "train"
    PUBLISH = "publish"
    RESTART = "restart"


SERVED_IN = (Phase.START, Phase.GENERATE, Phase.RESTART)  # whatever engine.release says


@dataclass(frozen=True)
class Tenants:
    """Who shares one GPU. Others may be alike: `gpus` are all of them, as (node, GPU on it)."""

    gpus: tuple[tuple[int, int], ...]
    rank: int | None  # the first one's
    places: Mapping[str, Place | None] = field(default_factory=dict)  # of the rank, in each role's layout
    servers: tuple[str, ...] = ()  # roles that have one there


def kv_pool(free_at_start: float, free_before_pool: float, fraction: float) -> float:
    """SGLang's KV cache in bytes, of which less than nothing ends the server.

    As of 0.5.23 (and 0.5.17): srt/distributed/bootstrap.py `measure_pre_model_load_memory` takes what is free
    once its processes have contexts and NCCL, the least of its ranks; after loading the weights
    srt/mem_cache/kv_cache_configurator.py `_profile_available_bytes` gives the pool what is free then less
    (1 - fraction) of that. So whatever anybody allocates in between is taken from the pool. (Sizing after
    the graphs are captured, SGLANG_ENABLE_POST_CAPTURE_KV_SIZING, is off by default.)
    """
    return free_before_pool - free_at_start * (1 - fraction)


@dataclass(frozen=True)
class Timeline:
    """Bytes of every party on one GPU (and those like it) by phase."""

    tenants: Tenants
    total: float  # of the GPU
    phases: Mapping[Phase, Mapping[str, float]]

    def used(self, phase: Phase) -> float:
        """Bytes of all parties."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> Phase:
        """The phase in which most is held; the first of those alike."""
        return max(self.phases, key=self.used)


def colocated(tenants: Sequence[Tenants]) -> bool:
    """Whether some GPU has both a server and a part of a role."""
    return any(one.servers and any(one.places.values()) for one in tenants)


def timelines(
    recipe: Recipe, tenants: Sequence[Tenants], total: float, *, least: bool = False
) -> list[Timeline]:
    """One for each of `tenants`, on GPUs of `total` bytes. Raises InputError where a model cannot be read.

    least: servers without `mem_fraction` have a KV cache of one response, not of all that is left.
    """
    parts = _Parts(recipe, total)
    given = _shares(parts, tenants, total)
    if least:
        bounded = {n for n, role in recipe.roles.items() if role.engine.mem_fraction is not None}
        given = {n: s if n in bounded else replace(s, cache=s.least) for n, s in given.items()}
    found = []
    for one in tenants:
        phases = {
            phase: {
                party: size
                for party, size in (*parts.trainer(one, phase), *parts.servers(one, phase, given))
                if size
            }
            for phase in Phase
        }
        found.append(Timeline(one, total, phases))
    return found


def shares(recipe: Recipe, tenants: Sequence[Tenants], total: float) -> dict[str, Share]:
    """What the servers of each role get on GPUs of `total` bytes: `mem_fraction` of it where the recipe says,
    else what the others leave in the phases in which the servers hold their KV cache, in equal parts.
    """
    return _shares(_Parts(recipe, total), tenants, total)


class _Parts:
    """The parties' sizes."""

    def __init__(self, recipe: Recipe, total: float) -> None:
        self.recipe, self.total = recipe, total
        self.tokens: dict[str, float] = {}  # that a role's server has room for, at the most
        self._known: dict[tuple[tuple[int, int], Phase], list[tuple[str, float]]] = {}
        self.shapes = {name: read_shape(role.model) for name, role in recipe.roles.items()}
        self.world = recipe.world.ranks

    def trainer(self, tenants: Tenants, phase: Phase) -> list[tuple[str, float]]:
        """What the rank holds. Kept: it is asked again for every pass over the servers' shares."""
        key = (tenants.gpus[0], phase)
        if key not in self._known:
            self._known[key] = list(self._trainer(tenants, phase))
        return self._known[key]

    def _trainer(self, tenants: Tenants, phase: Phase) -> Iterator[tuple[str, float]]:
        if tenants.rank is None:
            return
        yield "rank's libraries", RANK_GIB * GIB
        activations = staging = 0.0
        for name, role in self.recipe.roles.items():
            place = tenants.places.get(name)
            shared = owner_of(self.recipe, name) is not None
            memory = memory_of(role, self.shapes[name], place, self.world, shared=shared)
            if phase != Phase.START:
                yield f"{name} engine", memory.engine
                yield from _held(name, role, memory, phase)
            activations = max(activations, memory.activations)  # one role after the other
            if role.served:
                staging = max(staging, _staging(role, self.shapes[name], place))
        if phase == Phase.TRAIN:
            yield "activations", activations
        if phase == Phase.PUBLISH:
            yield "buckets", staging

    def servers(
        self, tenants: Tenants, phase: Phase, given: Mapping[str, Share]
    ) -> Iterator[tuple[str, float]]:
        """What the servers hold."""
        for name in tenants.servers:
            role, share = self.recipe.roles[name], given[name]
            resting = not _cache_there(role.engine, phase)
            if _weights_there(role.engine, phase):
                yield f"{name} server's weights", share.weights
            if not resting:
                yield f"{name} server's KV cache", max(0.0, share.cache)
            yield f"{name} server's libraries", SERVER_GIB * GIB if resting else share.runtime
            if phase == Phase.PUBLISH and role.publication.transport in ("group", "disk"):
                yield f"{name} server's bucket", _bucket(role, self.shapes[name])

    def share(self, name: str, cache: float) -> Share:
        """A role's share with a KV cache of so many bytes."""
        role, shape = self.recipe.roles[name], self.shapes[name]
        engine = role.engine
        heads = max(1.0, engine.tp / shape.kv_heads)  # more ranks than heads hold copies
        token = 2 * shape.layers * shape.kv_size * heads / engine.tp * BYTES[engine.dtype]
        if engine.max_batch_tokens is not None:
            cache = min(cache, engine.max_batch_tokens * token)
        least = token * longest(self.recipe, name)
        runtime = self._runtime(name, least / token)
        weights = served_bytes(role, shape) + slot_bytes(served_adapters(self.recipe, name), shape, engine)
        return Share(name, weights, cache, least, token, runtime)

    def _runtime(self, name: str, length: float) -> float:
        """What a server's rank holds beside weights and KV cache: its libraries, one layer of a prefill, the
        logits of a decoding step three times in fp32 (as they are, as log-probs, and while it samples), and
        the table of each request's places in the cache.

        length: tokens of a response. Requests that run together are bounded by the recipe, by what the ranks
        ask for, and by the cache (`tokens`), which lets in no more than it has room for.
        """
        engine, shape = self.recipe.roles[name].engine, self.shapes[name]
        tokens = self.tokens.get(name, 0.0)
        slots = engine.max_batch or min(SLOTS[1], max(SLOTS[0], 512 * tokens / shape.max_positions))
        let_in = max(DECODED, tokens / (RESERVED * length))
        rows = min(slots, engine.max_in_flight * self.world, let_in)
        stream = 4 * shape.hidden
        split = 2 * (shape.q_size + shape.kv_size) + 3 * shape.ffn
        chunk = PREFILL if self.total < LARGE_GPU_GIB * GIB else LARGE_PREFILL
        prefill = chunk * (stream + split / engine.tp) * BYTES[engine.dtype]
        return SERVER_GIB * GIB + prefill + 3 * 4 * rows * shape.vocab + 4 * (slots + 1) * shape.max_positions


def _held(name: str, role: RoleConfig, memory: Memory, phase: Phase) -> Iterator[tuple[str, float]]:
    """A role's own, but for its activations."""
    if role.training.offload and phase in SERVED_IN:
        return
    yield f"{name} weights", memory.weights
    yield f"{name} gradients", memory.gradients
    yield f"{name} optimizer", memory.optimizer


def _cache_there(engine: EngineConfig, phase: Phase) -> bool:
    return engine.release == "off" or phase in SERVED_IN


def _weights_there(engine: EngineConfig, phase: Phase) -> bool:
    return engine.release != "all" or phase != Phase.TRAIN


def _shares(parts: _Parts, tenants: Sequence[Tenants], total: float) -> dict[str, Share]:
    """Twice: how many requests a server runs, for which it holds more, depends on its cache."""
    few = _dealt(parts, tenants, total)
    parts.tokens = {name: max(0.0, share.cache) / share.token for name, share in few.items()}
    return _dealt(parts, tenants, total)


def _dealt(parts: _Parts, tenants: Sequence[Tenants], total: float) -> dict[str, Share]:
    roles = parts.recipe.roles
    caches: dict[str, float] = {}
    nothing = {name: parts.share(name, 0.0) for name, role in roles.items() if role.starts_servers}
    fixed: dict[str, float] = {}
    for name, share in nothing.items():
        fraction = roles[name].engine.mem_fraction
        if fraction is not None:
            fixed[name] = fraction * total - share.weights
    for one in tenants:
        for phase in Phase:
            held = (*parts.trainer(one, phase), *parts.servers(one, phase, nothing))
            slack = FILLED * total - sum(size for _, size in held)
            there = [name for name in one.servers if _cache_there(roles[name].engine, phase)]
            slack -= sum(fixed.get(name, 0.0) for name in there)
            free = [name for name in there if name not in fixed]
            for name in free:
                caches[name] = min(caches.get(name, math.inf), slack / len(free))
    caches |= fixed
    return {name: parts.share(name, caches.get(name, 0.0)) for name in nothing}


def longest(recipe: Recipe, name: str) -> int:
    """Tokens of a role's longest completion and of what it is shown of a response; prompts not counted."""
    new = max((stage.rollout.max_new_tokens for stage in recipe.stages), default=1)
    judges = name == "critic" and any(not isinstance(stage, SftStage) for stage in recipe.stages)
    return new + (recipe.judging.max_new_tokens if judges else 0)


def _bucket(role: RoleConfig, shape: Shape) -> float:
    """Bytes of a publication's largest bucket: publication/plan.py's rule."""
    mib = role.publication.bucket_mib
    return max(float(BUCKET), _largest(role, shape)) if mib is None else float(mib << 20)


def _largest(role: RoleConfig, shape: Shape) -> float:
    """Bytes of the largest parameter, its Hugging Face tensors together."""
    return float(largest_parameter(shape) * min(BYTES[role.training.dtype], BYTES[role.engine.dtype]))


def _staging(role: RoleConfig, shape: Shape, place: Place | None) -> float:
    """A publication's buckets on a rank; where a bucket is joined, its largest parameter's shards too."""
    joined = _largest(role, shape) if place is not None else 0.0
    return ALIVE * _bucket(role, shape) + joined


# --- what does not fit, and what would help ----------------------------------------------------------


def faults(recipe: Recipe, tenants: Sequence[Tenants], total: float, gpu: str) -> list[str]:
    """Why the recipe does not fit GPUs of `total` bytes, called `gpu`; nothing where it does."""
    given, lines = shares(recipe, tenants, total), timelines(recipe, tenants, total)
    found = [_small(recipe, share, lines) for share in given.values() if share.cache < share.least]
    if found:
        return found
    worst = max(lines, key=lambda line: line.used(line.peak), default=None)
    if worst is None or worst.used(worst.peak) <= total * (1 + 1e-9):
        return []
    phase = worst.peak
    return [
        f"{_where(worst.tenants)} needs about {gib(worst.used(phase))} GiB in phase '{phase}' "
        f"({told(worst.phases[phase])}), and a {gpu} has {gib(total)}: {_help(recipe, worst, phase)}"
    ]


def _small(recipe: Recipe, share: Share, lines: Sequence[Timeline]) -> str:
    """A server whose share holds no response."""
    role = recipe.roles[share.role]
    text = (
        f"a server of '{share.role}' has {gib(max(0.0, share.static))} GiB per GPU, its weights take "
        f"{gib(share.weights)} and the KV cache of one response of {longest(recipe, share.role):,} tokens "
        f"{gib(share.least)}: raise roles.{share.role}.engine.tp"
    )
    if role.engine.mem_fraction is not None:
        return text + " or mem_fraction (or leave it out: it is then what the others leave)"
    near = [line for line in lines if share.role in line.tenants.servers]
    there = [phase for phase in Phase if _cache_there(role.engine, phase)]

    def others(line: Timeline, phase: Phase) -> dict[str, float]:
        own = (f"{share.role} server's weights", f"{share.role} server's KV cache")
        return {party: size for party, size in line.phases[phase].items() if party not in own}

    line, phase = max(
        ((line, phase) for line in near for phase in there), key=lambda pair: sum(others(*pair).values())
    )
    return (
        f"{text}, or make room on {_where(line.tenants)} in phase '{phase}', which others hold "
        f"({told(others(line, phase))}): {_help(recipe, line, phase)}"
    )


def _help(recipe: Recipe, line: Timeline, phase: Phase) -> str:
    """The keys that would make room."""
    ways = []
    for name in line.tenants.servers:
        engine = recipe.roles[name].engine
        if engine.mem_fraction is not None:
            ways.append(f"a smaller roles.{name}.engine.mem_fraction, or none")
        if phase not in SERVED_IN and engine.release == "off":
            ways.append(f"roles.{name}.engine.release: kv_cache or all")
        elif phase == Phase.TRAIN and engine.release == "kv_cache":
            ways.append(f"roles.{name}.engine.release: all")
    for name, role in recipe.roles.items():
        if line.tenants.servers and line.tenants.places.get(name) and not role.training.offload:
            ways.append(f"roles.{name}.training.offload: true")
    if any(line.tenants.places.values()):
        ways.append("a larger tp, pp or number of ranks")
    if phase == Phase.TRAIN:
        ways.append("recompute: full, or a smaller tokens_per_microbatch")
    if any(party.endswith(" engine") for party in line.phases[phase]):
        ways.append("a smaller engine.max_batch_tokens")
    return "; ".join(ways) or "fewer servers on it"


# --- as text -----------------------------------------------------------------------------------------


def describe(recipe: Recipe, tenants: Sequence[Tenants], total: float, gpu: str) -> str:
    """The table of --dry-run: every party of every kind of GPU, in GiB by phase."""
    given, lines = shares(recipe, tenants, total), timelines(recipe, tenants, total)
    text = [f"Memory of each GPU by phase, estimated, in GiB of a {gpu}'s {gib(total)}"]
    for line in lines:
        text.append(f"  {_where(line.tenants, everyone=True)}")
        text.append(f"    {'':<26}" + "".join(f"{phase:>10}" for phase in Phase))
        parties = dict.fromkeys(party for phase in Phase for party in line.phases[phase])
        for party in parties:
            sizes = (line.phases[phase].get(party, 0.0) for phase in Phase)
            text.append(f"    {party:<26}" + "".join(f"{gib(size) if size else '-':>10}" for size in sizes))
        text.append(f"    {'all':<26}" + "".join(f"{gib(line.used(phase)):>10}" for phase in Phase))
    for name, share in given.items():
        text.append(
            f"  {name}'s servers: {gib(share.static)} GiB of each GPU for weights and a KV cache of "
            f"{max(0, int(share.cache / share.token)):,} tokens"
        )
    return "\n".join(text)


def told(parties: Mapping[str, float]) -> str:
    """Parties and their GiB in one line, the largest first."""
    most = sorted(parties.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{party} {gib(size)}" for party, size in most if abs(size) >= 0.05 * GIB)


def _where(tenants: Tenants, *, everyone: bool = False) -> str:
    node, gpu = tenants.gpus[0]
    rank = "" if tenants.rank is None else f" (rank {tenants.rank})"
    more = len(tenants.gpus) - 1
    alike = f" and {more} alike" if everyone and more else ""
    return f"GPU {gpu} of node {node}{rank}{alike}"
