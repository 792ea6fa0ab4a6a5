"""What a run holds: the world, roles, engines, publishers, task and logs, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from genac_megatron import platform
from genac_megatron.critic.icc import IccState
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.models.hf_folder import HfFolder
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.observe.metrics import MetricsLog
from genac_megatron.observe.progress import Progress
from genac_megatron.observe.runinfo import RunFolder
from genac_megatron.publication.publisher import Publisher, RoleSink
from genac_megatron.recipe.schema import Recipe, RoleConfig
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.serving.engine import Engine
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer, stop_token_ids
from genac_megatron.training.agreement import agree, from_first
from genac_megatron.training.checkpoint import find_checkpoint, load_checkpoint
from genac_megatron.training.layout import Layout, World
from genac_megatron.training.role import Role

T = TypeVar("T")


@dataclass
class Progression:
    """How far a run is: everything small that a checkpoint must bring back."""

    stage: int = 0  # index of the stage to work on
    step: int = 0  # its steps that are done
    cursor: int = 0  # training prompts consumed
    versions: dict[str, int] = field(default_factory=dict)  # of each role's published weights
    published: dict[str, int] = field(default_factory=dict)  # Role.serial at that publication
    serials: dict[str, int] = field(default_factory=dict)  # Role.serial, when saved
    icc: dict[str, Any] | None = None
    explained_variance: float | None = None  # the critic's, held-out, best so far


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
    ) -> None:
        self.recipe, self.world, self.log, self.progress = recipe, world, log, progress
        self.folder = RunFolder(Path(recipe.runs) / recipe.name)
        self.at = Progression()
        self.tokenizers = self.together(
            lambda: {n: load_tokenizer(_tokenizer_spec(n, r)) for n, r in recipe.roles.items()}
        )
        speaker = "actor" if "actor" in recipe.roles else next(iter(recipe.roles))
        self.task = self.together(lambda: make_task(recipe.task, self.tokenizers[speaker], recipe.seed))
        self.roles: dict[str, Role] = {}
        self.engines: dict[str, Engine] = {}
        self.publishers: dict[str, Publisher] = {}
        for name, config in recipe.roles.items():
            self._build_role(name, config)
        if not resuming:
            self._start_from_checkpoints()
        self.icc: IccState | None = None
        self.heldout_cache: dict[str, Any] = {}
        self._stop = stop

    def _build_role(self, name: str, config: RoleConfig) -> None:
        layout = self.together(lambda: Layout.from_config(name, config.layout, self.world.size))
        groups = layout.groups()

        def build() -> None:
            shape = shape_of(config.model, len(self.tokenizers[name]))
            role = Role(name, config, shape, layout, groups)
            if role.active:
                seed = config.model.init_seed
                weights = HfFolder(config.model.hf).get if config.model.hf else random_weights(shape, seed)
                load_hf_into(role.models, layout, shape, weights)
            self.roles[name] = role
            self.engines[name] = EmbeddedEngine(hf_config(shape), config.engine, platform.device())
            self.publishers[name] = Publisher(role, [self.engines[name]])

        self.together(build)

    def _start_from_checkpoints(self) -> None:
        """Roles whose recipe names a checkpoint begin with the weights they have in it."""
        for name, config in self.recipe.roles.items():
            if config.model.checkpoint is not None:
                path = from_first(partial(find_checkpoint, Path(config.model.checkpoint)))
                load_checkpoint(path, {name: self.roles[name]})

    # --- the actor and the critic ----------------------------------------------------------------

    @property
    def actor(self) -> Role:
        return self.roles["actor"]

    @property
    def critic(self) -> Role:
        return self.roles["critic"]

    def stop_ids(self, role: str) -> tuple[int, ...]:
        """Token ids that end this role's generations."""
        return stop_token_ids(self.tokenizers[role])

    def publish(self, *names: str, advance: bool = True) -> dict[str, float]:
        """Bring the roles' current weights to their engines under the next version, where they changed.

        Without `advance` the version stays: engines that lost their weights get them again.
        """
        figures: dict[str, float] = {}
        with self.phase("publish"):
            for name in names:
                unchanged = self.at.published.get(name) == self.roles[name].serial
                if advance and unchanged and self.engines[name].version == self.at.versions[name]:
                    continue
                version = self.at.versions.get(name, 0) + int(advance)
                if advance:
                    self.at.published[name] = self.roles[name].serial
                self.at.versions[name] = version
                stats = self.publishers[name].publish(version)
                figures[f"publish/{name}_version"] = float(version)
                figures[f"publish/{name}_bytes"] = stats["bytes"]
                figures[f"publish/{name}_s"] = stats["seconds"]
        return figures

    def copy_weights(self, source: str, target: str) -> None:
        """Make `target` start from `source`'s weights. Raises InputError where the shapes differ."""
        if self.roles[source].shape != self.roles[target].shape:
            what = f"{target} cannot start from {source}: their shapes differ"
            raise on_all_ranks(InputError(what, where=f"roles.{target}.model"))
        Publisher(self.roles[source], [RoleSink(self.roles[target])]).publish(0)

    # --- the world -------------------------------------------------------------------------------

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's share of `items`: every world.size-th."""
        return list(items[self.world.rank :: self.world.size])

    def gather(self, mine: Sequence[T]) -> list[T]:
        """The inverse of `share`, on every rank."""
        if self.world.size == 1:
            return list(mine)
        parts: list[Any] = [None] * self.world.size
        dist.all_gather_object(parts, list(mine))
        longest = max(len(part) for part in parts)
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def together(self, act: Callable[[], T]) -> T:
        """Run `act` on every rank; where it fails on one, raise the same error on all. Collective."""
        return agree(act)

    def sum_figures(self, figures: dict[str, float]) -> dict[str, float]:
        """Each figure summed over ranks."""
        parts = self.gather([figures])
        return {key: sum(part.get(key, 0.0) for part in parts) for key in sorted(set().union(*parts))}

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time (and show) a phase."""
        return self.progress.phase(name)

    # --- logging ---------------------------------------------------------------------------------

    def log_step(
        self, stage: str, kind: str, step: int, metrics: dict[str, float], *, step_done: bool = True
    ) -> None:
        """One row of figures, with times and memory added. Collective (memory is summed over ranks).

        Not `step_done`: what a stage spent after its last step.
        """
        memory = self.sum_figures(
            {"memory/rss_gib": platform.rss_gib(), "memory/peak_gib": platform.peak_rss_gib()}
        )
        times = self.progress.timer.take()
        row = {**metrics, **memory, **times}
        self.together(lambda: self.log.log(stage, kind, step, row) if self.log is not None else None)
        if step_done:
            self.progress.step(step, metrics)
        for role in self.roles:
            gap = metrics.get(f"parity/{role}_p99", 0.0)
            if gap > self.recipe.observe.parity_alarm:
                self.progress.note(
                    f"[{stage}] warning: trainer and engine of {role} differ: p99 |delta log-prob| {gap:.3g}"
                )

    def append(self, log: str, row: dict[str, Any]) -> None:
        """A row of one of the run folder's other logs, by rank 0. Collective."""
        self.together(lambda: self.folder.append(log, row) if self.log is not None else None)

    # --- stopping --------------------------------------------------------------------------------

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all. Collective."""
        return any(self.gather([self._stop.asked]))

    def close(self) -> None:
        """Release engines and logs."""
        for engine in self.engines.values():
            engine.close()
        if self.log is not None:
            self.log.close()


def _tokenizer_spec(name: str, config: RoleConfig) -> str:
    spec = config.model.tokenizer or config.model.hf
    if spec is None:
        raise InputError(
            "a role without an hf folder needs a tokenizer",
            where=f"roles.{name}.model.tokenizer",
            way_out="name a tokenizer folder, or builtin:tiny",
        )
    return spec


def mean(values: Iterable[float]) -> float:
    """The mean, NaN of nothing."""
    got = list(values)
    return sum(got) / len(got) if got else float("nan")
