"""Start and publication of a 235B-shaped model at 1,024 ranks: counts, by the code that does it.

No process group is made: one process plays a rank of such a world, and what would be a group, a connection, a
read or a message is counted. Of the start: groups that a rank makes, connections that gloo's keep open (a
file each), barriers that the whole world passes for groups of anybody, beside Megatron's and torch's own way;
bytes that are read from the model's folder, beside every rank reading whole tensors. Of a publication: who
takes part, exchanges of the whole world and of those few, bytes on the way to the sources and from them, and
seconds of Python for the plan. Of a checkpoint: benchmarks/scale_checkpoint.py.

Run: python -m benchmarks.scale_start
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

from benchmarks.machine import save, table
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import shape_of
from genac_megatron.models.sizes import parameters
from genac_megatron.platform.megatron import install
from genac_megatron.recipe.schema import ModelConfig, ModelShape

install()

import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from genac_megatron.publication.join import Joiner, source_of  # noqa: E402
from genac_megatron.publication.plan import Bucket, make_plan  # noqa: E402
from genac_megatron.training import layout as layouts  # noqa: E402
from genac_megatron.training.layout import Layout  # noqa: E402

SHAPE: dict[str, Any] = {  # Qwen3-235B-A22B's config.json
    "layers": 94, "hidden": 4096, "ffn": 12288, "heads": 64, "kv_heads": 4, "head_dim": 128,
    "vocab": 151_936, "experts": 128, "experts_per_token": 8, "expert_ffn": 1536, "norm_topk": True,
    "tie_embeddings": False,
}  # fmt: skip
STAGES = "Et*11|" + "t*12|" * 6 + "t*11L"
GIB = 2**30
OLD_EXCHANGES, NEW_EXCHANGES = 4, 1  # of the whole world, in a publication to servers, by its code
FEW = 4  # of those that carry it: ready, all sent, closed, figures (and checksums, where they are due)


@contextmanager
def a_world(ranks: int, rank: int) -> Iterator[None]:
    """This process as a rank of so many."""
    told = {"get_rank": lambda group=None: rank, "get_world_size": lambda group=None: ranks}
    with (
        mock.patch.multiple(dist, is_initialized=lambda: True, **told),
        mock.patch.dict(os.environ, {"WORLD_SIZE": str(ranks)}),
    ):
        yield


class Groups:
    """What making groups would take."""

    def __init__(self) -> None:
        self.mine: list[int] = []  # sizes of those that this rank is in
        self.barriers = 0  # that the whole world passes

    def torchs(self, ranks: Any = None, *_: Any, **__: Any) -> object:
        """`dist.new_group`: every rank calls it, and passes its barrier."""
        self.barriers += 1
        if dist.get_rank() in ranks:
            self.mine.append(len(ranks))
        return object()

    def ours(self, ranks: Any, *_: Any, **__: Any) -> object | None:
        if dist.get_rank() in ranks:
            self.mine.append(len(ranks))
        return object() if dist.get_rank() in ranks else None

    def row(self, way: str, seconds: float) -> dict[str, Any]:
        world = dist.get_world_size()
        return {
            "start": way,
            "groups": len(self.mine),
            "of the whole world": sum(size == world for size in self.mine),
            "connections": sum(size - 1 for size in self.mine),
            "barriers of the world": self.barriers,
            "python_s": round(seconds, 2),
        }


def timed(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def groups(layout: Layout) -> list[dict[str, Any]]:
    """Megatron's global state and a role's groups, either way; the world's own group is in both."""
    rows = []
    for way in ("torch's", "ours"):
        found = Groups()
        found.mine.append(dist.get_world_size())  # init_process_group
        grid = layouts._GridGroups(layout, "actor")
        if way == "torch's":
            grid.of = partial(_each, grid, found.torchs)  # type: ignore[method-assign]
        with (
            mock.patch.object(dist, "new_group", found.torchs),
            mock.patch.object(layouts, "new_group", found.ours),
            mock.patch.object(layouts, "_GridGroups", lambda *_, made=grid: made),
            mock.patch.object(parallel_state, "_set_global_memory_buffer"),
        ):
            own = way == "ours"
            seconds = timed(layouts._global_state if own else parallel_state.initialize_model_parallel)
            seconds += timed(partial(layouts._make_groups, layout, "actor"))
        parallel_state.destroy_model_parallel()
        rows.append(found.row(way, seconds))
    return rows


def _each(grid: Any, make: Callable[..., object], sets: Any) -> object:
    """`new_subgroups_by_enumeration`: each set is a group that every rank passes."""
    key = tuple(tuple(map(int, ranks)) for ranks in sets)
    if key not in grid.made:
        grid.made[key] = object()
        for ranks in key:
            make(list(ranks))
    return grid.made[key]


def reading(shape: Shape, layout: Layout, plan: list[Bucket]) -> list[dict[str, Any]]:
    """Bytes of the model's folder that ranks read when a role begins, in bf16."""
    once: Counter[int] = Counter()
    held: Counter[int] = Counter()  # by stage: of what one rank of it holds a part, whole tensors
    for bucket in plan:
        for item in bucket.items:
            once[bucket.stage] += 2 * item.numel
            held[bucket.stage] += 2 * item.numel // (1 if item.rule.expert is None else layout.ep)
    each = layout.count // layout.pp
    readers = layout.dp * layout.cp  # of a stage, taking turns: first tensor-parallel ranks
    whole = sum(held.values()) * each
    return [
        {"read": "every rank, whole tensors", "TB": round(whole / 1e12, 1),
         "of a rank, GiB": round(max(held.values()) / GIB, 1)},
        {"read": "once, by turns", "TB": round(sum(once.values()) / 1e12, 2),
         "of a rank, GiB": round(max(once.values()) / readers / GIB, 2)},
    ]  # fmt: skip


def publication(shape: Shape, layout: Layout, fp8: bool) -> dict[str, Any]:
    """To servers, by process group: from each stage's first rank."""
    made: list[list[Bucket]] = []
    seconds = timed(lambda: made.append(make_plan(shape, layout, 2, fp8=fp8)))
    plan = made[0]
    joiner = mock.Mock(spec=Joiner, role=mock.Mock(layout=layout, shape=shape))
    circle = Joiner.ranks(joiner, plan)
    seconds += timed(lambda: [bucket.places for bucket in plan])
    to_sources = plain = 0
    quantized: Counter[tuple[int, int]] = Counter()  # elements, by stage and rank from its source on
    for bucket in plan:
        for item in bucket.items:
            expert = item.rule.expert
            if expert is None and item.rule.tp_axis is None:
                continue  # whole on every rank
            parts = layout.tp if expert is None else layout.ep  # a source has one of them
            by_holder = Joiner.travels_in_blocks(joiner, item, bucket)
            plain += 2 * item.numel * (parts - 1) // parts
            to_sources += item.nbytes(2, by_holder) * (parts - 1) // parts
            if by_holder and expert is not None:
                quantized[bucket.stage, expert // ((shape.experts or 0) // parts)] += item.numel
            elif by_holder:
                quantized.update({(bucket.stage, rank): item.numel // parts for rank in range(parts)})
            elif fp8 and item.in_blocks:
                quantized[bucket.stage, 0] += item.numel
    sources = {source_of(bucket, layout) for bucket in plan}
    return {
        "publication": "FP8" if fp8 else "bf16",
        "buckets": len(plan),
        "sources": len(sources),
        "take part": len(circle),
        "world exchanges": f"{NEW_EXCHANGES} (were {OLD_EXCHANGES})",
        "exchanges of those few": FEW,
        "GiB sent": round(sum(bucket.nbytes(2) for bucket in plan) / GIB, 1),
        "GiB to sources": f"{to_sources / GIB:.1f} (were {plain / GIB:.1f})",
        "10^9 numbers quantized": round(quantized.total() / 1e9, 1),
        "by one rank at most": round(max(quantized.values(), default=0) / 1e9, 2),
        "python_s": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    options = parser.parse_args()
    model = ModelConfig(family="qwen3_moe", shape=ModelShape(**SHAPE))
    shape = shape_of(model, SHAPE["vocab"])
    layout = Layout(
        "actor", 0, options.ranks, tp=4, pp=8, ep=16, sequence_parallel=True,
        pipeline_model_parallel_layout=STAGES,
    )  # fmt: skip
    plan = make_plan(shape, layout, 2)
    with a_world(options.ranks, 0):
        parts = [
            groups(layout),
            reading(shape, layout, plan),
            [publication(shape, layout, fp8) for fp8 in (False, True)],
        ]
    for rows in parts:
        print(table(rows), end="\n\n")
    settings = {**vars(options), "shape": SHAPE, "layout": "tp4 pp8 ep16", "parameters": parameters(shape)}
    print(save("scale_start", settings, [row for rows in parts for row in rows]))


if __name__ == "__main__":
    main()
