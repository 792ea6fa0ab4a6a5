"""Which responses of a batch the actor is trained on."""

from __future__ import annotations

from genac_megatron.stages.batch import Batch
from genac_megatron.stages.rollouts import Group


def untruncated(batch: Batch) -> Batch:
    """The batch without cut-off responses and their judgements, for the actor alone (EasyPPO, 2609.36802).

    A critic that does not see them either would say what a response is worth that ends in time. Groups of
    which nothing is left are not among its groups.
    """
    groups = []
    for group in batch.groups:
        kept = [i for i, rollout in enumerate(group.rollouts) if not rollout.truncated]
        if kept:
            judgements = [group.judgements[i] for i in kept] if group.judgements else []
            groups.append(Group(group.prompt, [group.rollouts[i] for i in kept], judgements))
    return Batch(groups, batch.fresh)
