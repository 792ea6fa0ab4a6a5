"""The cut of packs over context-parallel ranks: nothing lost or doubled, work even, labels kept."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.models.context_parallel import share_of, whole_of
from genac_megatron.records import Sample
from genac_megatron.training.packing import Pack, build_pack, multiple_for, sample_multiple_for, unpack

cp_st = st.sampled_from([2, 3, 4, 8])


def transcribed(bounds: list[int], cp: int, rank: int) -> list[int]:
    """What Transformer Engine's thd_partition_src_index gives, position by position."""
    cut = [b // cp for b in bounds]
    found = []
    for token in range(cut[-1]):
        sequence = max(i for i, b in enumerate(cut) if b <= token)
        half = (cut[sequence + 1] - cut[sequence]) // 2
        index = token - cut[sequence]
        offset = cut[sequence] * cp
        found.append(offset + index + (half * rank if index < half else half * (2 * cp - rank - 2)))
    return found


@given(cp_st, st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_the_cut_is_transformer_engines(cp: int, chunks: list[int]) -> None:
    bounds = [0, *accumulate(2 * cp * n for n in chunks)]
    shares = [share_of(bounds, cp, rank).tolist() for rank in range(cp)]
    assert sorted(i for share in shares for i in share) == list(range(bounds[-1]))
    for rank, share in enumerate(shares):
        assert share == transcribed(bounds, cp, rank)
        assert len(share) == bounds[-1] // cp


@given(cp_st, st.integers(1, 40))
def test_causal_attention_costs_all_ranks_the_same(cp: int, chunks: int) -> None:
    shares = [share_of([0, 2 * cp * chunks], cp, rank) for rank in range(cp)]
    assert len({int(share.sum()) for share in shares}) == 1


def packed(seed: int, cp: int) -> tuple[Pack, list[Sample]]:
    rng = random.Random(seed)
    samples = []
    for _ in range(rng.randint(0, 5)):
        tokens = [rng.randrange(9) for _ in range(rng.randint(2, 30))]
        start = rng.randint(1, len(tokens) - 1)
        samples.append(Sample(tokens, start, {"weights": [rng.random() for _ in tokens[start:]]}))
    multiple = multiple_for(tp=2, cp=cp, fp8="off")
    pack = build_pack(
        samples,
        range(len(samples)),
        multiple=multiple,
        field_names=["weights"],
        sample_multiple=sample_multiple_for(cp),
    )
    return pack, samples


@given(st.integers(0, 10**6), cp_st)
def test_the_parts_are_the_whole(seed: int, cp: int) -> None:
    pack, samples = packed(seed, cp)
    parts = [pack.cut(cp, rank) for rank in range(cp)]
    for name in ("tokens_T", "labels_T", "positions_T", "loss_mask_T"):
        whole = getattr(pack, name)
        back = torch.empty_like(whole)
        for part in parts:
            assert part.share is not None
            assert len(getattr(part, name)) == len(whole) // cp
            back[part.share] = getattr(part, name)
        assert torch.equal(back, whole)
    sums = sum(float((part.fields["weights"] * part.labels_T).sum()) for part in parts)
    wanted = sum(
        w * t for s in samples for w, t in zip(s.fields["weights"], s.tokens[s.start :], strict=True)
    )
    assert sums == pytest.approx(wanted, rel=1e-5)
    got = unpack(parts[0], torch.arange(len(pack.tokens_T)))
    assert {i: v.tolist() for i, v in got.items()} == {
        i: v.tolist() for i, v in unpack(pack, torch.arange(len(pack.tokens_T))).items()
    }


def test_without_context_parallelism_a_pack_is_itself() -> None:
    pack, _ = packed(3, 2)
    assert pack.cut(1, 0) is pack
    values = torch.ones(4)
    assert whole_of(values, pack.share, 4, None) is values  # type: ignore[arg-type]
