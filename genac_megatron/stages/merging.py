"""When adapters are merged into their bases (`training.adapter.merge_every`)."""

from __future__ import annotations

from genac_megatron.publication.digest import moved_by
from genac_megatron.stages.runtime import Run
from genac_megatron.training.merging import merge

LOSES = 0.1  # of what is merged: more than that is said


def merge_due(run: Run, *trained: str, step: int) -> dict[str, float]:
    """Merge the adapters of the roles that a step has trained, where the recipe has it: the next publication
    brings the moved base, of all roles on it, to their engines. Its figures. Collective.
    """
    figures: dict[str, float] = {}
    for name in trained:
        role = run.roles[name]
        adapter = role.config.training.adapter
        if adapter is None or adapter.merge_every is None or step % adapter.merge_every:
            continue
        with run.phase("merge"):
            lost = merge(role, moved_by(role))
        figures |= {f"{name}/merge_lost": lost, f"{name}/merges": float(role.memory.merges)}
        if lost > LOSES and f"{name} lost" not in run.told:
            run.told.add(f"{name} lost")
            run.progress.note(
                f"warning: {lost:.0%} of what {name}'s adapter adds was lost in the rounding of its base to "
                f"{role.config.training.dtype} ({name}/merge_lost): raise "
                f"roles.{name}.training.adapter.merge_every, or train in fp32"
            )
    return figures
