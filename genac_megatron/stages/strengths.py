"""Several actors in the place of one: a critic that meets them learns what it is told of them (ICC).

A frozen actor's success rate is one number all along, of which nothing can be learnt. Earlier checkpoints of
it are other actors, whose names and rates the critic's prompts then tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from genac_megatron.critic.icc import IccState
from genac_megatron.errors import InputError
from genac_megatron.observe.manifest import find_checkpoint, read_manifest
from genac_megatron.recipe.schema import StageConfig
from genac_megatron.recipe.stages import ActorConfig
from genac_megatron.stages.heldout import held_out_targets, told_step, told_step_of
from genac_megatron.training.agreement import from_first
from genac_megatron.training.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from genac_megatron.stages.runtime import Run

ACTOR = "actor"


class Cast:
    """A stage's actors, played one at a time; the run's own is back afterwards. Every method is collective.

    Their weights are kept in host memory once they were read.
    """

    def __init__(self, run: Run, stage: StageConfig, actors: Sequence[ActorConfig]) -> None:
        self.run, self.stage, self.actors = run, stage, list(actors)
        self._kept: dict[str, list[Tensor]] = {}

    @contextmanager
    def playing(self, actor: ActorConfig) -> Iterator[IccState]:
        """The actor in trainer and engines, and what the critic is told of it; `run.icc` is that meanwhile.

        Nothing is put back where an error ends it.
        """
        run = self.run
        if actor.checkpoint is None:
            run.publish(ACTOR)
            run.icc = run.icc or self._met(actor)
            yield run.icc
            return
        own, own_icc, cached = self._weights(), run.icc, run.heldout_cache.pop(ACTOR, None)
        self._take(actor)
        run.publish(ACTOR)
        run.icc = self._met(actor)
        yield run.icc
        self.remember(actor, run.icc)
        run.icc = own_icc
        self._put(own)
        run.publish(ACTOR)  # a checkpoint, and an evaluation, find engines and trainer as they were
        if cached is not None:  # the same weights under another version: their rollouts are the same
            cached.key = (run.at.versions[ACTOR], cached.key[1])
            run.heldout_cache[ACTOR] = cached

    def _key(self, actor: ActorConfig) -> str:
        return f"{self.stage.name}/{actor.name}"

    def _met(self, actor: ActorConfig) -> IccState:
        """What the critic is told: its success rate, at first on held-out prompts, and its step."""
        run, known = self.run, self.run.at.told.get(self._key(actor))
        if known is not None:
            told = IccState(0.0, actor=actor.name)
            told.load_state_dict(known)
            return told
        targets = held_out_targets(run, self.stage)
        judging, seed = run.recipe.judging, run.recipe.seed
        told = IccState.from_evaluation(
            targets, judging.icc_momentum, seed, from_first(partial(self._step, actor))
        )
        told.actor = actor.name
        self.remember(actor, told)
        run.progress.note(
            f"[{self.stage.name}] {actor.name}: success rate {told.p_bar:.3f} on held-out prompts"
        )
        return told

    def remember(self, actor: ActorConfig, told: IccState) -> None:
        """Keep what the critic is told of the actor, for its next turn and for checkpoints."""
        self.run.at.told[self._key(actor)] = told.state_dict()

    def _step(self, actor: ActorConfig) -> int:
        if actor.checkpoint is None:
            return told_step(self.run.recipe)
        return told_step_of(read_manifest(find_checkpoint(Path(actor.checkpoint))))

    def _take(self, actor: ActorConfig) -> None:
        assert actor.checkpoint is not None
        if actor.name in self._kept:
            self._put(self._kept[actor.name])
            return
        self.run.serving.turns.train()
        path = from_first(partial(find_checkpoint, Path(actor.checkpoint)))
        self.run.together(lambda: _need_still_base(path))
        load_checkpoint(path, {ACTOR: self.run.actor})
        self._kept[actor.name] = self._weights()

    def _weights(self) -> list[Tensor]:
        """Copies in host memory of what this rank has of the actor."""
        self.run.serving.turns.train()
        return [p.detach().cpu().clone() for model in self.run.actor.models for p in model.parameters()]

    def _put(self, weights: Sequence[Tensor]) -> None:
        run = self.run
        run.serving.turns.train()
        own = [p for model in run.actor.models for p in model.parameters()]
        for parameter, kept in zip(own, weights, strict=True):
            parameter.data.copy_(kept)
        run.actor.refresh_master()


def _need_still_base(path: Path) -> None:
    """Raise InputError for an actor whose base has moved: it would move what the critic stands on, too."""
    said = read_manifest(path).get("adapters", {}).get(ACTOR) or {}
    if said.get("moved"):
        raise InputError(
            f"its actor is an adapter beside a base that has moved {said['merges']} times, and is played "
            "beside the present one's",
            where=str(path),
            way_out="take it out of actors, or name a checkpoint from before its base moved",
        )
