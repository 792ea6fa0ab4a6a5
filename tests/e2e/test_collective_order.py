"""Every rank launches every group's collectives in one order, over real ranks of a joint run (gloo).

NCCL, which would wait for ever where two ranks launch two groups' collectives the other way round, is not
here: the order is what is written down (tests/e2e/collectives.py), and the rule is NCCL's.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.collectives import Launch, circle, read, unlike
from tests.faults.faulty import RECIPE
from tests.warm import Popen, environment

LIMIT_S = 900.0
HALVES_16 = ({"count": 8, "tp": 2, "pp": 2}, {"first_rank": 8, "count": 8, "tp": 2})
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "4 ranks, shared": (4, {"tp": 2}, {"pp": 2}),
    "4 ranks, apart": (4, {"count": 2, "tp": 2}, {"first_rank": 2, "count": 2}),
    "16 ranks, apart": (16, *HALVES_16),
    "16 ranks, shared": (16, {"tp": 2, "pp": 2}, {"tp": 4}),
}


def recipe(ranks: int, actor: dict[str, Any], critic: dict[str, Any]) -> dict[str, Any]:
    rollout = {"prompts": ranks, "samples": 2, "max_new_tokens": 12}
    roles = {
        name: {**RECIPE["roles"][name], "layout": layout}
        for name, layout in (("actor", actor), ("critic", critic))
    }
    for role in roles.values():  # four heads, for tp 4
        shape = {**role["model"]["shape"], "heads": 4, "kv_heads": 4, "hidden": 32, "ffn": 64}
        role["model"] = {**role["model"], "shape": shape}
    return {
        **RECIPE,
        "world": {"ranks": ranks, "timeout_s": 600},
        "roles": roles,
        "judging": {**RECIPE["judging"], "max_new_tokens": 12},
        "stages": [
            {"kind": "ppo", "steps": 2, "minibatches": 2, "rollout": rollout, "gate": {"action": "off"}}
        ],
        "observe": {"tensorboard": False, "plots": False},
    }


def run_of(folder: Path, ranks: int, *layouts: dict[str, Any]) -> list[list[Launch]]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(ranks, *layouts)))
    notes = folder / "order"
    notes.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = f"from tests.e2e.collectives import recorded; recorded({str(notes)!r})"
    processes = [
        Popen(
            [sys.executable, "-c", program, "run", "recipe.yaml"],
            cwd=folder,
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            ),
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{rank}.err").open("w"),
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        codes = [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, (folder / "0.err").read_text()[-3000:]
    return read(notes)


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.extended] if "16" in name else []) for name in LAYOUTS],
)
def test_no_two_ranks_launch_collectives_the_other_way_round(case: str, tmp_path: Path) -> None:
    ranks, *layouts = LAYOUTS[case]
    found = run_of(tmp_path, ranks, *layouts)  # type: ignore[arg-type]
    assert len(found) == ranks
    tensors = [sum(not launch.objects for launch in launches) for launches in found]
    assert min(tensors) >= 8, tensors  # gradients, norms and weights of two steps of two parts, at the least
    assert unlike(found) == []
    assert circle(found) == []


def test_a_circle_is_seen_over_groups_and_over_threads_but_not_between_objects() -> None:
    def launches(*orders: str, main: bool = True, objects: bool = False) -> list[Launch]:
        return [Launch(f"{name} [0, 1]", 0, "allreduce", main, objects) for name in orders]

    assert circle([launches("a", "b"), launches("a", "b")]) == []
    assert circle([launches("a", "b"), launches("b", "a")]) == [("a [0, 1]", 0), ("b [0, 1]", 0)]
    threads = [launches("a") + launches("b", main=False), launches("b", main=False) + launches("a")]
    assert len(circle(threads)) == 2
    apart = [
        launches("a") + launches("b", main=False, objects=True),
        launches("b", main=False, objects=True) + launches("a"),
    ]
    assert circle(apart) == []
    assert unlike([launches("a"), launches("a", "a")]) == ["a [0, 1]"]
    assert unlike([launches("a"), []]) == ["a [0, 1]"]
