"""SFT samples in the steps of REINFORCE: what RL on one kind of texts would drive out is taught on.

They are made when the stage begins and kept in the run folder; which of them a step has is a function of the
seed and the step, so a resumed run has the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from genac_megatron.algorithms.replay import with_replay
from genac_megatron.recipe.source_rules import replayed
from genac_megatron.records import Sample
from genac_megatron.stages.dealt import placed
from genac_megatron.stages.ranks import Ranks
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.sft import part_figures
from genac_megatron.stages.sft_data import check_room, kept_data, with_room

if TYPE_CHECKING:
    from genac_megatron.algorithms.losses import Loss
    from genac_megatron.recipe.schema import ReinforceStage
    from genac_megatron.stages.batch import Batch
    from genac_megatron.stages.runtime import Run

BEHIND = 1 << 40  # the first place of what is replayed: behind every judgement's


class Replay:
    """A stage's replay. Collective to make; then the same on every rank."""

    def __init__(self, run: Run, stage: ReinforceStage, *, fresh: bool) -> None:
        assert stage.replay is not None
        self.run = run
        self.config, self.seed = stage.replay, (run.recipe.seed, stage.name, "replay")
        made = replayed(stage)
        with run.phase("data"):
            self.pool = kept_data(run, made, fresh=fresh)
        positions = run.critic.shape.max_positions
        self.pool = with_room(run, made, self.pool, positions)
        check_room(made, self.pool, positions)

    def loss(self, loss: Loss) -> Loss:
        """The stage's, with the replay's added."""
        return with_replay(loss, self.config.weight)

    def joined(self, batch: Batch, samples: Sequence[Sample], step: int) -> tuple[list[Sample], list[Sample]]:
        """(a step's samples, what is replayed in it), with the fields of both, this rank's part of each where
        ranks have parts of the batch. Every step draws anew; a pool that is smaller than the share goes in
        whole. Collective.
        """
        (tokens,) = batch.ranks.totals(sum(sample.trained for sample in samples))
        drawn = replay_samples(self.pool, int(tokens), self.config.share, seed_for(*self.seed, step))
        drawn = placed(drawn, range(BEHIND, BEHIND + len(drawn)))
        if batch.places is not None:
            drawn = self.run.share(drawn)
        return [_beside(sample) for sample in samples], drawn

    def figures(
        self, replayed: Sequence[Sample], logprobs: Sequence[Sequence[float]], ranks: Ranks
    ) -> dict[str, float]:
        """Apart from the critic's: by source, nats a token and tokens. Of what all `ranks` replayed."""
        carrying = [replace(one, fields={"weights": one.fields["nll_weights"]}) for one in replayed]
        return part_figures("replay", carrying, logprobs, ranks)


def replay_samples(pool: Sequence[Sample], tokens: int, share: float, seed: int) -> list[Sample]:
    """Samples of the pool that carry `share` of all loss tokens, `tokens` of which are another loss's: one at
    least. Their nll_weights sum to 1, a token's in proportion to the weight it has in the pool.
    """
    wanted, carried = tokens * share / (1.0 - share), 0.0
    chosen: list[tuple[Sample, Sequence[float]]] = []
    for sample in random.Random(seed).sample(list(pool), len(pool)):
        if chosen and carried >= wanted:
            break
        weights = sample.fields.get("weights") or [1.0] * sample.trained
        chosen.append((sample, weights))
        carried += sum(weights)
    nothing = max(carried, 1.0)
    return [
        replace(sample, fields={**_zeros(sample), "nll_weights": [weight / nothing for weight in weights]})
        for sample, weights in chosen
    ]


def _beside(sample: Sample) -> Sample:
    sample.fields["nll_weights"] = [0.0] * sample.trained
    return sample


def _zeros(sample: Sample) -> dict[str, list[float]]:
    return {name: [0.0] * sample.trained for name in ("weights", "advantages", "behaviour")}
