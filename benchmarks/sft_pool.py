"""Host memory of the samples that an SFT stage draws its steps from, on ranks of one node.

Each rank makes a part of them, as stages do, and all have all of them in the end. gathered: objects of every
rank to every rank, then 4 bytes a token on each, as until 11/2026; held once: stages/sft_pool.py, tokens in
a file that ranks map. Held is what ranks have in proportion (smaps' Pss: a page that several have counts once
among them) after every token was read; peak is the most resident memory of a rank meanwhile, beside its own
samples as lists, pages of the file counted on each. Run: python -m benchmarks.sft_pool
"""

from __future__ import annotations

import argparse
import os
import random
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.checkpoint_memory import LIMIT_S, memory, on_ranks, peak_reset
from benchmarks.machine import save, table
from genac_megatron.platform.megatron import install

WAYS = ("held once", "gathered")  # the first leaves nothing behind
VOCABULARY = 150_000


def proportional() -> int:
    """Bytes of this process's share of what it has in memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


def samples_of(rank: int, ranks: int, count: int, tokens: int) -> list[Any]:
    from genac_megatron.records import Sample

    rng = random.Random(rank)
    return [
        Sample(
            rng.choices(range(VOCABULARY), k=tokens),
            tokens // 2,
            source=f"train/{n // 8}",
            problem=f"{n // 8:064x}",
        )
        for n in range(rank * count // ranks, (rank + 1) * count // ranks)
    ]


def figures(count: int, tokens: int, rank: int, ranks: int, folder: Path) -> list[dict[str, float]]:
    """Of each way, on this rank."""
    import numpy as np
    import torch.distributed as dist

    from genac_megatron.stages.sft_pool import compacted, held_once
    from genac_megatron.training.agreement import agree, gathered
    from genac_megatron.training.layout import init_world

    init_world(LIMIT_S)
    world = SimpleNamespace(rank=rank, size=ranks)
    run: Any = SimpleNamespace(world=world, folder=SimpleNamespace(path=folder), together=agree)
    found = []
    for way in WAYS:
        peak_reset()
        held = proportional()
        mine = samples_of(rank, ranks, count, tokens)
        dist.barrier()
        peak_reset()
        before, began = memory("VmRSS"), time.process_time()
        if way == "gathered":
            pool = compacted([one for part in gathered(mine) for one in part])
        else:
            pool = held_once(run, mine, "pool")
        seconds, peak = time.process_time() - began, memory("VmHWM") - before
        assert sum(int(np.asarray(one.tokens).sum() > 0) for one in pool) == count
        del mine
        peak_reset()  # what was freed goes back
        dist.barrier()
        found.append({"held": proportional() - held, "peak": peak, "s": seconds})
        del pool
        dist.barrier()
    return found


def rows_of(count: int, tokens: int, found: list[list[dict[str, float]]]) -> list[dict[str, Any]]:
    return [
        {
            "way": way,
            "ranks": len(found),
            "samples": count,
            "tokens each": tokens,
            "held by all, bytes a token": round(sum(one[k]["held"] for one in found) / count / tokens, 2),
            "peak of a rank, bytes a token": round(max(one[k]["peak"] for one in found) / count / tokens, 2),
            "s of a rank": round(max(one[k]["s"] for one in found), 2),
        }
        for k, way in enumerate(WAYS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=1000)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    install()
    count, tokens = options.samples, options.tokens
    rows = [
        row
        for ranks in options.ranks
        for row in rows_of(count, tokens, on_ranks(partial(figures, count, tokens), ranks))
    ]
    print(table(rows))
    print(save("sft_pool", vars(options), rows))


if __name__ == "__main__":
    main()
