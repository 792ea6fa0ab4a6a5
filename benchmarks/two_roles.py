"""An actor's and a critic's training step on disjoint ranks: one after the other, and both at once.

One rank each, in turns, the median of each. "computing": the processor works, so that a machine without two
idle cores shows less than it could. "waiting": each step also sleeps, as a rank does while its GPU computes:
what is left is the order of the steps, whatever else runs here. ratio: at once / one after the other; 0.5 is
what two steps of one length can reach, 1 what two roles reach that wait for each other. ends_agree: weights
after both ways are the same, bit for bit. Run: python -m benchmarks.two_roles
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.machine import save, table
from genac_megatron.models.build import build_model  # noqa: F401  (megatron's CPU hook before its first import)
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import shape_of
from genac_megatron.platform.network import spare_ports
from genac_megatron.recipe.schema import RoleConfig
from genac_megatron.records import Sample
from genac_megatron.training.agreement import gathered
from genac_megatron.training.layout import Layout, close_world, init_world
from genac_megatron.training.role import Role

ROLES = ("actor", "critic")
SIZES: dict[str, Any] = {
    "layers": 4, "hidden": 128, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocab": 512,
}  # fmt: skip


def make_role(name: str) -> Role:
    """A role of one rank: the actor of the first, the critic of the second."""
    config = RoleConfig.model_validate(
        {
            "model": {"family": "qwen3", "shape": SIZES, "tokenizer": "builtin:tiny"},
            "layout": {"first_rank": ROLES.index(name), "count": 1},
            "training": {"dtype": "fp32", "tokens_per_microbatch": 1024},
        }
    )
    layout = Layout.from_config(name, config.layout, len(ROLES))
    shape = shape_of(config.model, SIZES["vocab"])
    role = Role(name, config, shape, layout, layout.groups())
    if role.active:
        load_hf_into(role.models, layout, shape, random_weights(shape, 0))
    role.begin_stage(None, 1000)
    return role


def step_loss(sleep_s: float) -> Callable[..., Any]:
    """The mean negative log-prob; it sleeps where it is trained."""

    def loss(logp_T: torch.Tensor, entropy_T: torch.Tensor | None, fields: Any) -> Any:
        time.sleep(sleep_s)
        return -(logp_T * fields["weights"]).sum(), {}

    return loss


def samples(tokens: int) -> list[Sample]:
    rows = [[(7 * row + 3 * t) % SIZES["vocab"] for t in range(256)] for row in range(max(1, tokens // 255))]
    share = 1 / (255 * len(rows))
    return [Sample(row, 1, {"weights": [share] * 255}) for row in rows]


def work(rank: int, port: int, options: argparse.Namespace, found: Any) -> None:
    """A rank: its share of every measurement; the first one hands the rows over."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(ROLES))}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    init_world(300.0)
    rows = [
        measure("computing", options, tokens=options.tokens, sleep_s=0.0),
        measure("waiting", options, tokens=255, sleep_s=options.sleep),
    ]
    if rank == 0:
        found.extend(rows)
    close_world()


def measure(kind: str, options: argparse.Namespace, *, tokens: int, sleep_s: float) -> dict[str, Any]:
    """Median seconds of a pair of steps, either way."""
    batch, loss = samples(tokens), step_loss(sleep_s)
    pairs = {way: [make_role(name) for name in ROLES] for way in ("in turn", "at once")}

    def one_after_the_other(roles: list[Role]) -> None:
        for role in roles:
            role.train_step(batch, loss)

    def at_once(roles: list[Role]) -> None:
        for launched in [role.launch_step(batch, loss) for role in roles]:
            launched.result()

    seconds: dict[str, list[float]] = {way: [] for way in pairs}
    for turn in range(options.steps + 1):
        for way, act in (("in turn", one_after_the_other), ("at once", at_once)):
            dist.barrier()
            began = time.perf_counter()
            act(pairs[way])
            dist.barrier()
            if turn:  # the first one of each warms up
                seconds[way].append(time.perf_counter() - began)
    in_turn, together = (statistics.median(seconds[way]) for way in pairs)
    mine = [
        [p.detach() for role in roles for m in role.models for p in m.parameters()]
        for roles in pairs.values()
    ]
    same = all(torch.equal(x, y) for x, y in zip(*mine, strict=True))
    return {
        "step": kind,
        "in_turn_s": round(in_turn, 3),
        "at_once_s": round(together, 3),
        "ratio": round(together / in_turn, 2),
        "ends_agree": all(gathered(same)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="measured pairs of each")
    parser.add_argument("--tokens", type=int, default=4096, help="a batch's, of a step that computes")
    parser.add_argument("--sleep", type=float, default=0.5, help="seconds, of a step that waits")
    options = parser.parse_args()
    with torch.multiprocessing.Manager() as manager:
        found = manager.list()
        torch.multiprocessing.spawn(work, (spare_ports(1)[0], options, found), nprocs=len(ROLES))
        rows = list(found)
    print(table(rows))
    load = round(os.getloadavg()[0], 1)
    print(f"load {load}; {save('two_roles', {**vars(options), 'load': load}, rows)}")


if __name__ == "__main__":
    main()
