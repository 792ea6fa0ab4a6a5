"""What a run holds: the world, roles, engines, publishers, task and logs, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from genac_megatron import platform
from genac_megatron.cluster.placement import SUGGESTED, placement, publication_faults, tenants
from genac_megatron.critic.icc import IccState
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.models.families.base import Shape
from genac_megatron.models.hf_folder import HfFolder
from genac_megatron.models.hf_headers import begins_with_weights, check_weights
from genac_megatron.models.mapping import GetTensor, random_weights, with_head
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.models.specs import without_engine
from genac_megatron.observe.manifest import find_checkpoint
from genac_megatron.observe.metrics import MetricsLog, over_ranks
from genac_megatron.observe.profile import Profiler
from genac_megatron.observe.progress import Progress
from genac_megatron.observe.runinfo import RunFolder, run_path
from genac_megatron.publication.digest import know_base
from genac_megatron.publication.publisher import Publisher, RoleSink
from genac_megatron.recipe import memory
from genac_megatron.recipe.memory import colocated
from genac_megatron.recipe.schema import ModelConfig, Recipe, RoleConfig, StageConfig
from genac_megatron.recipe.servers import served_adapters, started_engines
from genac_megatron.recipe.share import Share
from genac_megatron.recipe.sharing import in_order, owner_of
from genac_megatron.serving.engine import Engine
from genac_megatron.serving.sglang.fleet import Endpoint, Fleet
from genac_megatron.stages.begun import begun_task, keep_told
from genac_megatron.stages.conversations import begun_environment
from genac_megatron.stages.progression import Progression
from genac_megatron.stages.room import fit_chats, fit_task
from genac_megatron.stages.served import BesideBase, Fleets, InRanks, OnServers, Served, nodes_of_ranks
from genac_megatron.stages.servers import CACHE, WEIGHTS, Servers
from genac_megatron.stages.serving import Serving
from genac_megatron.stages.sft_orders import fit_sources
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.stages.suites import Suites, begun_suites
from genac_megatron.tasks import Task
from genac_megatron.tasks.tokenizer import prints_date, role_tokenizer, stop_token_ids
from genac_megatron.training.agreement import agree, from_first, gathered
from genac_megatron.training.checkpoint import load_base, load_checkpoint
from genac_megatron.training.distributed_batch import DistributedBatch
from genac_megatron.training.finite import need_sound
from genac_megatron.training.first_load import load_once
from genac_megatron.training.layout import Layout, World
from genac_megatron.training.loading import load_peft
from genac_megatron.training.overlap import make_buffers
from genac_megatron.training.role import Role, Samples

T = TypeVar("T")
NOT_FINITE = "fetch the folder again; where it was trained, take a checkpoint from before it diverged"


class Run:
    """One rank's view of a run. Collective methods are called by every rank in the same order."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        log: MetricsLog | None,
        progress: Progress,
        stop: StopFlag,
        *,
        resuming: bool = False,
        trains: bool = True,
        unmade: Sequence[StageConfig] | None = None,
        folder: Path | None = None,
    ) -> None:
        """unmade: the stages whose SFT data are not made yet; None: all. folder: for what it writes; None:
        the recipe's run folder.
        """
        self.recipe, self.world, self.log, self.progress = recipe, world, log, progress
        self.folder = RunFolder(folder or run_path(recipe))
        self.profiler = Profiler(self.folder.path, recipe.observe.profile, world.rank)
        self.at = Progression()
        self.tokenizers = self.together(
            lambda: {name: role_tokenizer(name, role.model) for name, role in recipe.roles.items()}
        )
        for name, tokenizer in self.tokenizers.items():
            if prints_date(tokenizer):
                progress.note(
                    f"{name}: its chat template prints today's date: prompts are others tomorrow. To keep "
                    f"them, set what it reads (often date_string) in roles.{name}.model.chat_template_kwargs"
                )
        speaker = "actor" if "actor" in recipe.roles else next(iter(recipe.roles))
        self.task = self.together(lambda: begun_task(recipe, self.tokenizers[speaker]))
        self.more_tasks: dict[str, Task] = {}  # of SFT stages' sources, by their blocks (sft_orders.py)
        self.environment = self.together(
            lambda: begun_environment(recipe, self.task, self.tokenizers[speaker], progress.note)
        )
        self._need_same_prompts()
        if trains and recipe.evaluation.prompts > self.task.heldout_size:
            progress.note(
                f"evaluation.prompts is {recipe.evaluation.prompts}, and {self.task.heldout_size} are held "
                "out: evaluations are of those"
            )
        self._fit_data(trains, recipe.stages if unmade is None else unmade)
        self.roles: dict[str, Role] = {}
        self.icc: IccState | None = None
        self.heldout_cache: dict[str, Any] = {}
        self._spent: dict[str, float] = {}  # on this rank, for the next row: a sum over ranks
        self.told: set[str] = set()  # warnings that are said once
        self._noted: dict[str, float] = {}  # for the next row, the same on every rank
        # Told of every evaluation: its stage, step and figures (stages/best.py)
        self.evaluated: Callable[[StageConfig, int, Mapping[str, float]], None] = lambda *_: None
        self._stop = stop
        self._fleets = Fleets(self.folder, started_engines(recipe))
        try:
            self._build(resuming)
        except BaseException:
            self._fleets.close()
            self._close_tasks()
            raise

    def _need_same_prompts(self) -> None:
        """Raise InputError where the user's code makes other prompts on another rank. Collective."""
        if len(set(gathered(self.task.digest))) > 1:
            what = "the task gives other prompts on other ranks"
            way_out = "see that all nodes have the same files, and that it reads nothing that changes"
            raise on_all_ranks(InputError(what, where="task", way_out=way_out))

    def _fit_data(self, trains: bool, unmade: Sequence[StageConfig]) -> None:
        """Hold the data to the models' positions, before time is spent: of SFT what is still to be made."""
        roles = self.recipe.roles
        positions = self.together(
            lambda: {n: shape_of(c.model, len(self.tokenizers[n])).max_positions for n, c in roles.items()}
        )
        before = len(self.progress.notes)
        self.suites = begun_suites(self, positions) if trains else Suites([], [])
        fit_task(self, positions, ("train", "heldout") if trains else ("heldout",))
        if trains:
            fit_chats(self, positions, unmade)
            fit_sources(self, positions, unmade)
        keep_told(self.log, self.task, self.progress.notes[before:])

    def _build(self, resuming: bool) -> None:
        shares = self._shares()
        start = partial(self._start_fleets, resuming, shares)
        shapes, fleets = self.together(lambda: self._fleets.telling(start))
        servers: dict[str, Servers] = {}
        if shares and colocated(tenants(self.recipe)):
            # What a role takes before a server is healthy is lost to the server's KV cache.
            servers = {name: Servers(self.recipe.roles[name].engine, fleets.get(name)) for name in shares}
            for made in servers.values():
                made.release(CACHE, WEIGHTS)
        make_buffers([(self.recipe.roles[name], shape) for name, shape in shapes.items()])
        if told := without_engine(role.training.specs for role in self.recipe.roles.values()):
            self.progress.note(told)
        served: dict[str, Served] = {}
        for name in in_order(self.recipe):
            self._build_role(name, self.recipe.roles[name], shapes[name], served, resuming)
        self._load_bases()
        if not resuming:
            self._start_from_checkpoints()
        self._serve(servers, fleets, served)
        self.serving = Serving(self.roles, served, self.at, self.progress)

    def _serve(
        self, servers: dict[str, Servers], fleets: Mapping[str, Fleet], served: dict[str, Served]
    ) -> None:
        """The roles that SGLang serves, each on its own servers or on another's."""
        bases: dict[str, dict[Endpoint, str]] = {}  # by the servers' owner: the base that each holds
        for name, config in self.recipe.roles.items():
            if not (config.served and config.engine.kind == "sglang"):
                continue
            role, owner = self.roles[name], config.engine.share or name
            if owner not in servers:
                servers[owner] = Servers(config.engine, fleets.get(owner))
            if config.engine.enable_lora:
                self._need_same_base(role, self.roles[owner])
                held = bases.setdefault(owner, {})
                served[name] = BesideBase(role, servers[owner], self.folder, held)
            else:
                served[name] = OnServers(role, servers[owner], self.folder)

    @staticmethod
    def _need_same_base(role: Role, owner: Role) -> None:
        """Raise InputError where servers would hold a base that is not the role's. The same on every rank."""
        if role.base != owner.base:
            raise on_all_ranks(
                InputError(
                    f"{role.name} shares the servers of {owner.name}, and its adapter is beside another "
                    f"base: {role.base:.12}, not {owner.base:.12}",
                    where=f"roles.{role.name}.engine.share",
                    way_out="give both roles the same model, or each servers of its own",
                )
            )

    def _shares(self) -> dict[str, Share]:
        """What servers get of their GPUs; nothing on a CPU. Collective.

        Raises InputError where the recipe does not fit these GPUs.
        """
        if platform.device().type != "cuda" or not started_engines(self.recipe):
            return {}
        self._check_nodes()
        total, who = min(gathered(platform.gpu_bytes())), tenants(self.recipe)
        if reasons := publication_faults(self.recipe):
            what, way_out = "\n  ".join(reasons), SUGGESTED
            raise on_all_ranks(InputError(what, where=f"recipe {self.recipe.name}", way_out=way_out))
        if reasons := memory.faults(self.recipe, who, total, "GPU here"):
            what, way_out = "\n  ".join(reasons), "--dry-run shows who holds what (cluster.gpu names the GPU)"
            raise on_all_ranks(InputError(what, where=f"recipe {self.recipe.name}", way_out=way_out))
        return memory.shares(self.recipe, who, total)

    def _check_nodes(self) -> None:
        """The memory of servers goes by which ranks share their node. Collective."""
        found, wanted = nodes_of_ranks(), placement(self.recipe)
        if found != [wanted.node_of(rank) for rank in range(len(found))]:
            here = found.count(0)
            raise on_all_ranks(
                InputError(
                    f"the recipe puts {wanted.ranks_per_node} ranks on a node, the first one here has {here}",
                    where=f"recipe {self.recipe.name}, cluster.ranks_per_node",
                    way_out=f"cluster.ranks_per_node={here}, or start as many ranks on each node",
                )
            )

    def _start_fleets(
        self, resuming: bool, shares: Mapping[str, Share]
    ) -> tuple[dict[str, Shape], dict[str, Fleet]]:
        """The roles' shapes, and, on a node's first rank, its servers, which start up meanwhile."""
        roles = self.recipe.roles
        for config in roles.values():
            check_weights(config.model, resuming=resuming, adapter=config.training.adapter is not None)
        shapes = {name: shape_of(config.model, len(self.tokenizers[name])) for name, config in roles.items()}
        served = {
            n: c.engine
            for n, c in roles.items()
            if c.served and c.engine.kind == "sglang" and c.engine.share is None
        }
        started = {
            n: self._fleets.start(n, c, hf_config(shapes[n]), shares.get(n), served_adapters(self.recipe, n))
            for n, c in served.items()
        }
        return shapes, {name: fleet for name, fleet in started.items() if fleet is not None}

    def _build_role(
        self, name: str, config: RoleConfig, shape: Shape, served: dict[str, Served], resuming: bool
    ) -> None:
        layout = self.together(lambda: Layout.from_config(name, config.layout, self.world.size))
        groups = layout.groups()
        weights: list[GetTensor] = []  # that the role begins with, on a rank of its block

        def build() -> None:
            owner = owner_of(self.recipe, name)
            beside = None if owner is None else self.roles[owner]
            role = self.roles[name] = Role(name, config, shape, layout, groups, beside=beside)
            own = beside is None or config.model.head != "lm"
            adapter = config.training.adapter is not None
            if role.active and own and begins_with_weights(config.model, resuming=resuming, adapter=adapter):
                weights.append(_first_weights(config.model, shape))
            if config.served and config.engine.kind == "embedded":
                served[name] = InRanks(self.roles[name])

        def begin() -> None:
            for get_tensor in weights:
                load_once(self.roles[name], get_tensor)
                if config.model.hf is not None:
                    need_sound(Path(config.model.hf), {name: self.roles[name]}, NOT_FINITE)

        self.together(build)
        self.together(begin)
        if config.served and config.fp8:
            key, alarm = self.recipe.parity_alarm(name)
            self.progress.note(
                f"{name}: trained with fp8 {config.training.fp8}, served with quantization "
                f"{config.engine.quantization}: parity alarms at {alarm:g} (observe.{key})"
            )

    def _load_bases(self) -> None:
        """What adapters stand beside: a resumed run's too, as a checkpoint holds the adapters alone."""
        for name in in_order(self.recipe):
            config, owner = self.recipe.roles[name], owner_of(self.recipe, name)
            if config.training.adapter is None:
                continue
            role = self.roles[name]
            if config.model.base is not None and owner is None:
                path = from_first(partial(find_checkpoint, Path(config.model.base)))
                load_base(path, role, config.model.base_role or config.model.share or name)
            if owner is not None and role.shape == self.roles[owner].shape:
                role.base = self.roles[owner].base
            else:
                know_base(role)

    def _start_from_checkpoints(self) -> None:
        """Roles whose recipe names a checkpoint, or an adapter's folder, begin with the weights in it."""
        for name in in_order(self.recipe):
            config = self.recipe.roles[name]
            if config.model.checkpoint is not None:
                path = from_first(partial(find_checkpoint, Path(config.model.checkpoint)))
                load_checkpoint(path, {name: self.roles[name]})
            elif config.model.peft is not None:
                load_peft(Path(config.model.peft), self.roles[name])

    # --- the actor and the critic ----------------------------------------------------------------

    @property
    def actor(self) -> Role:
        return self.roles["actor"]

    @property
    def critic(self) -> Role:
        return self.roles["critic"]

    @property
    def engines(self) -> dict[str, Engine]:
        """What generates with each role's weights."""
        return self.serving.engines

    def stop_ids(self, role: str) -> tuple[int, ...]:
        """Token ids that end this role's generations."""
        return stop_token_ids(self.tokenizers[role], self.recipe.roles[role].model.hf)

    def publish(self, *names: str, advance: bool = True, step: int | None = None) -> dict[str, float]:
        """As Serving.publish. The next row of figures says so, but for engines that get theirs again."""
        figures = self.serving.publish(*names, advance=advance, step=step)
        if advance:
            self.note(figures)
        return figures

    def generating(self, act: Callable[[], T]) -> T:
        """As Serving.generating."""
        return self.serving.generating(act)

    def copy_weights(self, source: str, target: str) -> None:
        """Make `target` start from `source`'s weights. Raises InputError where the shapes differ.

        A scalar critic may start from a language model: its head is then the random one it began with.
        """
        if not self.roles[target].shape.may_start_from(self.roles[source].shape):
            what = f"{target} cannot start from {source}: their shapes differ"
            way_out = f"give {target} the model of {source}, or leave start_from out"
            raise on_all_ranks(InputError(what, where=f"roles.{target}.model", way_out=way_out))
        Publisher(self.roles[source], [RoleSink(self.roles[target])]).publish(0)

    # --- the world -------------------------------------------------------------------------------

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's share of `items`: every world.size-th."""
        return list(items[self.world.rank :: self.world.size])

    def places(self, count: int) -> range:
        """Where this rank's share of `count` items stands if ranks' shares follow one another."""
        whole, more = divmod(count, self.world.size)
        rank = self.world.rank
        return range(rank * whole + min(rank, more), (rank + 1) * whole + min(rank + 1, more))

    def gather(self, mine: Sequence[T]) -> list[T]:
        """The inverse of `share`, on every rank."""
        parts = gathered(list(mine))
        longest = max(len(part) for part in parts)
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def together(self, act: Callable[[], T]) -> T:
        """Run `act` on every rank; where it fails on one, raise the same error on all. Collective."""
        return agree(act)

    def even_share(self, count: int) -> int:
        """How many each rank gives so that all together give `count`, or a few more."""
        return -(-count // self.world.size)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time (and show) a phase."""
        return self.progress.phase(name)

    # --- logging ---------------------------------------------------------------------------------

    def spend(self, phase: str, role: str) -> float:
        """Count what a role's engine has generated since it was last asked, to `phase`; its seconds."""
        stats = self.engines[role].stats()
        self.count({f"tokens/{phase}": stats["tokens"], f"tokens/{phase}_prompt": stats["prompt_tokens"]})
        if phase != "evaluate":  # no part of a cost
            self.count({f"unique/{phase}_prompt": stats["unique_prompt_tokens"]})
        return stats["seconds"]

    def count(self, figures: dict[str, float]) -> None:
        """Add this rank's counts to the next row, which has their sum over ranks."""
        for key, value in figures.items():
            self._spent[key] = self._spent.get(key, 0.0) + value

    @property
    def spent(self) -> dict[str, float]:
        """What this rank has counted since the last row."""
        return dict(self._spent)

    def count_sequences(self, phase: str, samples: Samples) -> Callable[[float], None]:
        """Count the tokens of a forward pass over `samples`, a list that is the same on every rank or a batch
        of all ranks' samples, to `phase`.

        What is returned takes how many of them were computed (`Role.launch_logprobs`), for unique/: a
        beginning that several samples share counts once there.
        """
        if isinstance(samples, DistributedBatch):
            tokens = int(samples.lengths.sum())
        else:
            tokens = sum(len(sample.tokens) - 1 for sample in samples)
        self.count({f"tokens/{phase}": tokens / self.world.size})
        return lambda computed: self.count({f"unique/{phase}": computed})

    def note(self, figures: dict[str, float]) -> None:
        """Figures for the next row that has none of its own by these names. The same on every rank."""
        self._noted |= figures

    def log_step(
        self, stage: str, kind: str, step: int, metrics: dict[str, float], *, step_done: bool = True
    ) -> dict[str, float]:
        """One row of figures, with times, memory and what was counted and noted; these. Collective.

        Not `step_done`: what a stage spent after its last step.
        """
        memory = {"memory/rss_gib": platform.rss_gib(), "memory/peak_gib": platform.peak_rss_gib()}
        metrics = {**self._noted, **metrics, **over_ranks(self.gather([{**memory, **self._spent}]))}
        self._noted, self._spent = {}, {}
        row = {**metrics, **times_of(gathered(self.progress.timer.take()))}
        self.together(lambda: self.log.log(stage, kind, step, row) if self.log is not None else None)
        if step_done:
            self.progress.step(step, metrics)
        for role in self.roles:
            gap, (key, alarm) = metrics.get(f"parity/{role}_p99", 0.0), self.recipe.parity_alarm(role)
            if not gap <= alarm:  # NaN too
                self.progress.note(
                    f"[{stage}] warning: trainer and engine of {role} differ: p99 |delta log-prob| {gap:.3g} "
                    f"(observe.{key} {alarm:g})"
                )
        return row

    def append(self, log: str, row: dict[str, Any]) -> None:
        """A row of one of the run folder's other logs, by rank 0. Collective."""
        self.together(lambda: self.log.append(log, row) if self.log is not None else None)

    # --- stopping --------------------------------------------------------------------------------

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all. Collective."""
        return any(self.gather([self._stop.asked]))

    def close(self) -> None:
        """Release engines and logs."""
        self.serving.close()
        self._fleets.close()
        self._close_tasks()
        if self.log is not None:
            self.log.close()

    def _close_tasks(self) -> None:
        for one in (self.task, *self.more_tasks.values(), self.environment):
            if one is not None:
                one.close()
        self.suites.close()


def _first_weights(model: ModelConfig, shape: Shape) -> GetTensor:
    """What a role begins with: its folder's tensors, or random ones."""
    if model.hf is None:
        return random_weights(shape, model.init_seed)
    folder = HfFolder(model.hf)
    return with_head(folder.get, folder.names, shape, model.init_seed)


def mean(values: Iterable[float]) -> float:
    """The mean, NaN of nothing."""
    got = list(values)
    return sum(got) / len(got) if got else float("nan")


def largest(values: Iterable[float]) -> float:
    """The maximum, NaN where there is one among them (which `max` loses) or there is none."""
    got = list(values)
    return max(got, default=math.nan) if not any(map(math.isnan, got)) else math.nan


def times_of(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A step's times, of all ranks' in order: the first one's, but for passes, which have their longest
    rank's, and the wait for them, which has the shortest. Roles that train at once overlap.
    """
    times = dict(ranks[0])
    for key in dict.fromkeys(key for one in ranks for key in one):
        if key == "time/train_wait_s":
            times[key] = min(one.get(key, 0.0) for one in ranks)
        elif key.endswith("_train_s") or key == "time/reference_s":
            times[key] = max(one.get(key, 0.0) for one in ranks)
    return times
