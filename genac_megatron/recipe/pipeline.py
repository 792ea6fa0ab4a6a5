"""Which layers are in which pipeline stage: evenly, or as `layout.pipeline_model_parallel_layout` says.

Megatron-core's words for it: a stage after the other, `|` between, E the embedding, t a transformer layer, L
the loss; `t*3` and `(tt|)*2` repeat. With vpp > 1 they are model chunks: chunk 0 of each stage, then chunk 1.
"""

from __future__ import annotations

import re
from functools import cache

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import LayoutConfig

KEY = "pipeline_model_parallel_layout"
_REPEATED = (re.compile(r"\(([^()]+)\)\*(\d+)"), re.compile(r"([EtL|])\*(\d+)"))


@cache
def chunk_layers(layers: int, pp: int, vpp: int, text: str | None) -> tuple[range, ...]:
    """Global layers of each of the pp x vpp model chunks, in the layers' order. Raises InputError.

    Chunk c of stage s is number c * pp + s.
    """
    chunks = pp * vpp
    counts = [layers // chunks] * chunks
    if text is not None:
        counts = _counts(text, chunks)
        if sum(counts) != layers:
            raise InputError(
                f"{text!r} has {sum(counts)} layers, the model {layers}",
                where=KEY,
                way_out=f"for example {_example(layers, chunks)!r}",
            )
    elif layers % chunks:
        raise InputError(
            f"pp * vpp = {pp} * {vpp} = {chunks} does not divide the model's {layers} layers",
            where="pp",
            way_out=f"say which stage has how many: {KEY}, for example {_example(layers, chunks)!r}",
        )
    ends = [sum(counts[: i + 1]) for i in range(chunks)]
    return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))


def _counts(text: str, chunks: int) -> list[int]:
    spelt = re.sub(r"[,\s]", "", text)
    for repeated in _REPEATED:
        spelt = repeated.sub(lambda found: found[1] * int(found[2]), spelt)
    stages = spelt.split("|")
    wrong = ""
    if not re.fullmatch(r"E[t|]*L", spelt):
        wrong = "is not an E, layers t and stages |, and an L at the end"
    elif len(stages) != chunks:
        wrong = f"has {len(stages)} stages, and pp * vpp = {chunks}"
    elif not all("t" in stage for stage in stages):
        wrong = "has a stage without a layer"
    if wrong:
        raise InputError(f"{text!r} {wrong}", where=KEY, way_out="such as 'Et*3|t*4|t*3L' of three stages")
    return [stage.count("t") for stage in stages]


def _example(layers: int, chunks: int) -> str:
    """A layout of as many chunks whose first and last are the short ones: they have embedding and loss."""
    more = layers % chunks
    first = -(-(chunks - more) // 2)  # chunks with a layer less before those with one more
    counts = [layers // chunks + (first <= i < first + more) for i in range(chunks)]
    return "E" + "|".join(f"t*{count}" for count in counts) + "L"


def stage_layers(layout: LayoutConfig, layers: int, stage: int) -> int:
    """How many layers a rank of pipeline stage `stage` has."""
    chunks = chunk_layers(layers, layout.pp, layout.vpp, layout.pipeline_model_parallel_layout)
    return sum(len(chunk) for chunk in chunks[stage :: layout.pp])
