"""An adapter merged into its base, in place, while it trains (ReLoRA, arXiv 2307.05695)."""

from __future__ import annotations

import math

from genac_megatron.models.mapping import param_rules
from genac_megatron.platform.optimizer_shards import begin_anew
from genac_megatron.training.agreement import agree, gathered
from genac_megatron.training.role import Role


def merge(role: Role, moved: str) -> float:
    """Put W + scale B A in the place of W, for all roles on that base; the role itself stays what it was, and
    its adapter begins anew: another A, B = 0, no moments. Collective over the world.

    moved: what the base is called from now on. The sum is made in fp32 and rounded to the base's dtype, as
    what is published merged is, so engines that have that have the new base. Returns how much of what was
    added rounding lost, as a part of its norm; 0 of nothing.
    """
    merges = role.memory.merges + 1
    sums = gathered(agree(lambda: _merge(role, merges)))
    role.serial += 1  # not refresh_master: a scalar head's masters know more than its weights
    role.memory.move(moved, merges, by=role)
    added, lost = (math.fsum(part[index] for part in sums) for index in (0, 1))
    return math.sqrt(lost / added) if added else 0.0


def _merge(role: Role, merges: int) -> tuple[float, float]:
    """This rank's part; of replicas one tells its sums."""
    added = lost = 0.0
    mine = []
    for index, model in enumerate(role.models if role.active else ()):
        offset = role.layout.chunk_layers(role.shape.layers, role.groups.pp.rank(), index).start
        for found in param_rules(model, offset, role.shape):
            part = model.adapters.of(found.rule.name, found.layer)
            if part is not None:
                sums = part.merge_into(found.parameter.data)
                added, lost = added + sums[0], lost + sums[1]
                part.initialize(role.config.model.init_seed, merges)
        mine += list(model.adapters.parameters())
    if not role.active:
        return 0.0, 0.0
    if role.optimizer is not None:
        begin_anew(role.optimizer, set(mine))
    first = role.groups.dp_cp.rank() == 0
    return (added, lost) if first else (0.0, 0.0)
