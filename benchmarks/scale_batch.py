"""What a batch costs a rank on its way from the engines to the trainer: as it stays where it was made, and as
it was, gathered whole on every rank as pickled objects.

Simulated (--ranks): what one rank of a world of so many does, with real records, samples, plans and messages
of its own share; what other ranks would tell are copies of what it tells itself, what they would send are
zeros of the same sizes. samples: advantages, baselines and weights, and how accurate values are over all.
told: the few numbers of each sample that all know. plan: the micro-batches. moved: messages made and read.
home: log-probs back to where samples were made, of one pass. Seconds are this process's processor's, plus
what is sent over a fabric of 35 GB/s (assumed, as in scale_model.py). Memory is the peak of Python's and
numpy's blocks, times the 8 ranks of a node. `gathered` is one rank's share, pickled, read back and made into
samples, times the ranks: too large to be done here, and linear.

Real (--real): the exchange itself on so many gloo ranks of this machine, either way.
Run: python -m benchmarks.scale_batch
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.machine import save, table
from benchmarks.scale_model import NODE, Assumed, place
from genac_megatron.models.families.base import Shape
from genac_megatron.platform.network import spare_ports
from genac_megatron.recipe.algorithms import AdvantageConfig, CriticLossConfig, LossConfig
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import TrainingConfig
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, Sample, State
from genac_megatron.stages import ranks as everyone
from genac_megatron.stages.batch import Batch, actor_samples, critic_samples
from genac_megatron.stages.regime import batch_accuracy
from genac_megatron.stages.rollouts import Group
from genac_megatron.training import distributed_batch, microbatches
from genac_megatron.training.agreement import gathered
from genac_megatron.training.distributed_batch import DistributedBatch, distributed
from genac_megatron.training.layout import Layout, close_world, init_world
from genac_megatron.training.microbatches import Planned, planned

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "cluster" / "ppo-qwen3-8b-2n8g-tp4.yaml"
VOCAB, PROMPT, INSTRUCTION = 150_000, 256, 128  # tokens; the instruction is every critic prompt's
STATES, TRAINED, JUDGEMENT, SAMPLES = 8, 4, 256, 8  # of a response; tokens; responses to a prompt
STEP_S = 62.0  # of scale_model.py at 1,024 GPUs, with responses to 2k; longer ones take longer
TP, MICROBATCH = 4, 16_384


def completion(rng: random.Random, length: int) -> Completion:
    ids = tuple(rng.randrange(VOCAB) for _ in range(length))
    return Completion(ids, tuple(-rng.random() for _ in ids), "stop", ((1, length),))


def groups_of(count: int, response: int, seed: int) -> list[Group]:
    """A rank's groups: responses of `response` tokens, a little more or less, judged at eight states."""
    rng = random.Random(seed)
    told, made = tuple(range(INSTRUCTION)), []
    for index in range(count):
        ids = tuple(rng.randrange(VOCAB) for _ in range(PROMPT))
        group = Group(
            Prompt(f"train/{index}", ({"role": "user", "content": "x" * 1000},), "x" * 1000, "1", ids)
        )
        shared: list[Judgement] = []
        for sample in range(SAMPLES):
            length = response - rng.randrange(response // 4)
            rollout = Rollout(group.prompt, sample, completion(rng, length), "y" * 4 * length, rng.random())
            judged = [*shared]
            for k in range(len(judged), STATES):
                state = State(rollout, k, k * length // STATES, (k + 1) * length // STATES)
                asked = (*told, *ids, *rollout.completion.ids[: state.cut])
                words = "z" * 4 * JUDGEMENT
                judged.append(Judgement(state, asked, completion(rng, JUDGEMENT), words, rng.random()))
            shared = judged[:1]
            group.rollouts.append(rollout)
            group.judgements.append(judged)
        made.append(group)
    return made


def samples_of(groups: list[Group], response: int, ranks: int | None = None) -> dict[str, list[Sample]]:
    """ranks: the groups are a part of so many's; None: all."""
    batch = Batch(groups, places=None if ranks is None else [k * ranks for k in range(len(groups))])
    if ranks is not None:
        batch_accuracy(batch)  # what lambda may go by
    return {
        "actor": actor_samples(batch, AdvantageConfig(), 0.95, LossConfig(), response),
        "critic": critic_samples(batch, TRAINED, "leave_one_out", CriticLossConfig()),
    }


class Clock:
    """Seconds of this process's processor by part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def __call__(self, part: str, act: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = act()
        self.spent[part] = self.spent.get(part, 0.0) + time.process_time() - began
        return found


class OneOf:
    """A process group in which this is the first of `size` ranks."""

    def __init__(self, size: int) -> None:
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size


@contextmanager
def one_of(ranks: int, layout: Layout) -> Iterator[Any]:
    """Stand-ins for the other ranks: the groups of this one, and collectives that need nobody."""
    dp, alone = OneOf(layout.dp), OneOf(1)
    groups = SimpleNamespace(dp=dp, cp=alone, pp=alone, mp=OneOf(layout.tp))
    world = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: ranks)

    def exchanged(parts: Any, sizes: Any, group: Any = None) -> list[Any]:
        return [np.zeros(size, np.uint8) for size in sizes]

    with (
        patch.object(distributed_batch, "gathered_rows", lambda mine, group=None: [mine] * ranks),
        patch.object(distributed_batch, "gathered", lambda value: [value] * ranks),
        patch.object(distributed_batch, "exchanged", exchanged),
        patch.object(distributed_batch, "spread_from", lambda source, array, group=None: array),
        patch.object(distributed_batch, "dist", world),
        patch.object(microbatches, "gathered_rows", lambda mine, group=None: [mine] * layout.dp),
        patch.object(everyone, "gathered_rows", lambda mine, group=None: [mine] * ranks),
    ):
        yield groups


def stays(ranks: int, groups: list[Group], response: int, shape: Shape) -> tuple[Clock, float, int]:
    """Everything that one of `ranks` does between its groups and its packs, and back; the bytes that it sends
    or gets, whichever is more; and how many samples the batch has.
    """
    clock, moved, count, layout = Clock(), 0.0, 0, Layout("role", 0, ranks, tp=TP)
    training = TrainingConfig(tokens_per_microbatch=MICROBATCH)
    with one_of(ranks, layout) as of_rank:
        every = clock("samples", lambda: samples_of(groups, response, ranks))
        for role, samples in every.items():
            batch: DistributedBatch = clock(f"{role} told", partial(distributed, samples))
            plan: Planned = clock(
                f"{role} plan",
                partial(
                    planned,
                    batch,
                    layout,
                    of_rank,
                    training=training,
                    shape=shape,
                    multiple=TP,
                    trees=True,
                ),
            )
            there = clock(f"{role} moved", partial(batch.brought, layout, of_rank, plan.owner))
            scores = {i: np.zeros(batch.known.trained[i], np.float32) for i in there.held}
            settled = clock(f"{role} home", partial(there.settled, scores, plan.owner, layout, of_rank))
            clock(f"{role} home", partial(there.returned, settled, layout))
            message = batch.known.nbytes(np.flatnonzero(plan.owner == 0))
            moved += message * 2 + len(batch) * 80  # from homes, to TP peers; and what all are told
            count += len(batch)
    return clock, moved, count


def gathered_whole(groups: list[Group], response: int) -> tuple[float, float, int]:
    """Of one share as every rank had all of them: seconds, resident bytes, bytes on the way."""
    clock = Clock()
    message = pickle.dumps(groups)
    tracemalloc.start()
    found = pickle.loads(message)
    made = samples_of(found, response)
    resident, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del found, made
    found = clock("all", lambda: pickle.loads(message))
    clock("all", lambda: samples_of(found, response))
    return clock.spent["all"], float(resident), len(message)


def simulated(options: argparse.Namespace) -> list[dict[str, Any]]:
    with place():
        shape = read_shape(load_recipe(RECIPE).roles["actor"].model)
    init_world()
    rows, fabric = [], Assumed().fabric
    for response in options.response:
        groups = groups_of(options.groups, response, 1)
        tokens = sum(len(r.completion.ids) for g in groups for r in g.rollouts)
        tokens += JUDGEMENT * len({id(j) for g in groups for js in g.judgements for j in js})
        seconds, resident, size = gathered_whole(groups, response)
        for ranks in options.ranks:
            clock, moved, count = stays(ranks, groups, response, shape)
            tracemalloc.start()
            own = groups_of(options.groups, response, 2)
            stays(ranks, own, response, shape)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            spent = sum(clock.spent.values()) + moved / fabric
            rows.append(
                {
                    "GPUs": ranks,
                    "response": response,
                    "samples": count,
                    "tokens": tokens * ranks,
                    **{f"{part}_s": round(value, 2) for part, value in clock.spent.items()},
                    "sent_s": round(moved / fabric, 2),
                    "stays_s": round(spent, 2),
                    "share of a step": f"{spent / STEP_S:.1%}",
                    "stays_gib_node": round(NODE * peak / 2**30, 2),
                    "gathered_s": round((seconds + size / fabric) * ranks, 1),
                    "gathered_gib_node": round(NODE * resident * ranks / 2**30, 1),
                }
            )
            print(rows[-1], flush=True)
    close_world()
    return rows


def worker(rank: int, ranks: int, port: int, options: argparse.Namespace, found: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    init_world(300.0)
    layout = Layout("role", 0, ranks)
    groups_ = layout.groups()
    response = min(options.response)
    groups = groups_of(options.groups, response, rank)
    mine = samples_of(groups, response)["actor"]
    for k, sample in enumerate(mine):
        sample.place = rank + ranks * k
    taken: dict[str, list[float]] = {"stays": [], "gathered": []}

    def moved() -> None:
        batch = distributed(mine)
        batch.brought(layout, groups_, np.arange(len(batch)) % ranks)

    for _ in range(3):
        for way, act in (("stays", moved), ("gathered", lambda: gathered(groups))):
            dist.barrier()
            began = time.perf_counter()
            act()
            dist.barrier()
            taken[way].append(time.perf_counter() - began)
    if rank == 0:
        found.append({"ranks": ranks, **{f"{way}_s": round(min(times), 3) for way, times in taken.items()}})
    close_world()


def real(options: argparse.Namespace) -> list[dict[str, Any]]:
    with torch.multiprocessing.Manager() as manager:
        found = manager.list()
        for ranks in options.real:
            torch.multiprocessing.spawn(worker, (ranks, spare_ports(1)[0], options, found), nprocs=ranks)
        return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 256, 1024])
    parser.add_argument("--real", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--response", type=int, nargs="*", default=[1024, 8192], help="tokens, the longest")
    parser.add_argument("--groups", type=int, default=12, help="prompts of a rank, of 8 responses each")
    options = parser.parse_args()
    ways = {"simulated": simulated(options), "real": real(options)}
    for rows in ways.values():
        if rows:
            print(table(rows))
    load = round(os.getloadavg()[0], 1)
    settings = {**vars(options), "load": load, "assumed": dataclasses.asdict(Assumed())}
    print(save("scale_batch", settings, [{"way": way, **row} for way, rows in ways.items() for row in rows]))


if __name__ == "__main__":
    main()
