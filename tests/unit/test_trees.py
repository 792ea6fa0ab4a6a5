"""Trees of samples that begin alike: no token lost, doubled or seeing a sibling; figures as when flat."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genac_megatron import platform
from genac_megatron.errors import InputError
from genac_megatron.models.build import check
from genac_megatron.models.packed_attention import PackPlan, make_tree_plan, packed_sdpa
from genac_megatron.models.registry import shape_of
from genac_megatron.models.specs import tree_way
from genac_megatron.recipe.schema import TrainingConfig
from genac_megatron.records import Sample
from genac_megatron.training import trees
from genac_megatron.training.layout import Layout
from genac_megatron.training.microbatches import shares_prefixes
from genac_megatron.training.packing import Pack, build_pack, unpack
from genac_megatron.training.plans import Row, Rows, plan_packs
from genac_megatron.training.tree_packs import build_tree_pack
from genac_megatron.training.trees import Order, forest_of, order_of, plan_trees
from tests.distributed.cases import role_config


@st.composite
def batches(draw: st.DrawFn) -> list[Sample]:
    """Samples that grow from few beginnings over a tiny alphabet, some of them whole beginnings of others."""
    made: list[list[int]] = []
    for _ in range(draw(st.integers(1, 10))):
        stem = draw(st.sampled_from(made)) if made and draw(st.booleans()) else []
        kept = draw(st.integers(0, len(stem)))
        more = draw(st.lists(st.integers(0, 2), min_size=0 if kept > 1 else 2, max_size=12))
        made.append([*stem[:kept], *more])
    samples = []
    for ids in made:
        sample = Sample(ids, draw(st.integers(1, len(ids))))
        sample.fields = {"advantages": [float(len(samples) * 100 + t) for t in range(sample.trained)]}
        samples.append(sample)
    return samples


def tree_rows(order: Order, *, dp: int, **how: Any) -> list[Row] | None:
    """The plan of all data-parallel ranks."""
    plan = plan_trees(order, rows=Rows.whole(dp), **how)
    return None if plan is None else plan.rows


def tree_pack(samples: list[Sample], shortest: int = 1, **how: Any) -> Pack:
    order = order_of(samples, shortest)
    indices = list(range(len(samples)))
    return build_tree_pack(samples, indices, forest_of(order, indices), field_names=["advantages"], **how)


def seen(pack: Pack) -> Tensor:
    """[T, T] bool: which positions each one sees, from the pack's chains and cuts."""
    assert pack.tree is not None
    mask = torch.zeros(len(pack.tokens_T), len(pack.tokens_T), dtype=torch.bool)
    for a, b in itertools.pairwise(pack.tree.bounds):
        mask[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
    for a, b, c, d in pack.tree.cuts:
        assert not mask[a:b, c:d].any(), "a key is seen twice"
        mask[a:b, c:d] = True
    return mask


def prefixes(samples: list[Sample]) -> set[tuple[int, ...]]:
    return {tuple(s.tokens[: n + 1]) for s in samples for n in range(len(s.tokens) - 1)}


@given(batches(), st.integers(1, 4))
def test_each_distinct_beginning_is_computed_once_and_sees_itself_alone(
    samples: list[Sample], multiple: int
) -> None:
    pack = tree_pack(samples, multiple=multiple)
    mask = seen(pack)
    paths = [tuple(pack.tokens_T[mask[t]].tolist()) for t in range(pack.used)]
    assert sorted(paths) == sorted(prefixes(samples)), "a path is a beginning, and each is there once"
    for t in range(pack.used):
        positions = pack.positions_T[mask[t]].tolist()
        assert sorted(positions) == list(range(len(positions)))
        assert pack.positions_T[t] == len(positions) - 1
        assert pack.tokens_T[mask[t]][torch.tensor(positions).argsort()].tolist() == list(paths[t])
    assert not mask[: pack.used, pack.used :].any()
    assert not mask[pack.used :, : pack.used].any(), "padding is by itself"
    assert len(pack.tokens_T) % multiple == 0


@given(batches(), st.sampled_from([1, 3, 6]))
def test_each_sample_finds_its_own_labels_rows_and_fields(samples: list[Sample], shortest: int) -> None:
    pack = tree_pack(samples, shortest)
    flat = build_pack(samples, range(len(samples)), field_names=["advantages"])
    mask = seen(pack)
    assert pack.rows_E is not None
    rows, labels = unpack(pack, pack.rows_E), unpack(pack, pack.labels_T)
    fields, flat_fields = unpack(pack, pack.fields["advantages"]), unpack(flat, flat.fields["advantages"])
    for i, sample in enumerate(samples):
        assert labels[i].tolist() == sample.tokens[sample.start :]
        assert torch.equal(fields[i], flat_fields[i])
        for t, row in zip(range(sample.start, len(sample.tokens)), rows[i].tolist(), strict=True):
            path = mask[row].nonzero().flatten()
            path = path[pack.positions_T[path].argsort()]
            assert pack.tokens_T[path].tolist() == sample.tokens[:t]


@given(batches(), st.sampled_from([1, 3, 6]))
def test_sizes_are_counted_without_building(samples: list[Sample], shortest: int) -> None:
    order, members = order_of(samples, shortest), range(0, len(samples), 2)
    forest = forest_of(order, members)
    assert forest.size == order.size(members)
    assert order.pairs(members) == sum(
        c.length * c.first + c.length * (c.length + 1) // 2 for c in forest.chains
    )
    assert forest.deepest == max(len(samples[i].tokens) - 1 for i in members)


setup_st = st.fixed_dictionaries(
    {
        "dp": st.integers(1, 3),
        "tokens_per_microbatch": st.integers(12, 60),
        "multiple": st.sampled_from([1, 4]),
        "microbatch_multiple": st.integers(1, 2),
        "pair_cost": st.sampled_from([0.0, 0.1]),
    }
)


@given(batches(), setup_st)
def test_a_plan_keeps_each_sample_once_and_its_limits(samples: list[Sample], setup: dict[str, Any]) -> None:
    order = order_of(samples, 2)
    plan = tree_rows(order, **setup)
    if plan is None:
        return
    assert plan == tree_rows(order, **setup)
    assert sorted(i for row in plan for pack in row for i in pack) == list(range(len(samples)))
    assert len(plan) == setup["dp"]
    assert len({len(row) for row in plan}) == 1
    assert len(plan[0]) % setup["microbatch_multiple"] == 0
    capacity = setup["tokens_per_microbatch"] // setup["multiple"] * setup["multiple"]
    for row in plan:
        loads = [order.size(pack) for pack in row]
        assert loads == sorted(loads, reverse=True)
        for pack, load in zip(row, loads, strict=True):
            assert len(pack) <= 1 or load <= capacity
            assert load == (forest_of(order, pack).size if pack else 0)
    computed = sum(order.size(pack) for row in plan for pack in row)
    assert computed <= sum(order.lengths)


def nested(trunk: int, cuts: list[int], branch: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    body = rng.integers(10, 1000, trunk).tolist()
    return [
        Sample([*body[:cut], *rng.integers(1000, 2000, branch + 1).tolist()], cut + branch // 2)
        for cut in cuts
    ]


def test_nested_states_cost_the_trunk_once() -> None:
    samples = nested(1000, [250, 500, 750, 1000], 100)
    order = order_of(samples)
    assert tree_rows(order, dp=1, tokens_per_microbatch=8192) == [[[0, 1, 2, 3]]]
    forest = forest_of(order, range(4))
    assert (forest.size, forest.deepest) == (1400, 1100)
    assert forest.cuts() == [(1100, 1200, 0, 250), (1200, 1300, 0, 500), (1300, 1400, 0, 750)]


def test_a_tree_that_does_not_fit_is_cut_and_its_trunk_repeated() -> None:
    samples = nested(1000, [250, 500, 750, 1000], 100)
    order = order_of(samples)
    plan = tree_rows(order, dp=1, tokens_per_microbatch=1250)
    assert plan is not None
    sizes = [order.size(pack) for pack in plan[0]]
    assert max(sizes) <= 1250
    assert sum(sizes) < sum(order.lengths)


def test_ranks_are_levelled_by_computed_tokens() -> None:
    """Two trees of six states: each rank has one, though the samples' own lengths would level them too."""
    samples = [*nested(600, [100, 200, 300, 400, 500, 600], 50, 1), *nested(600, [600] * 6, 50, 2)]
    order = order_of(samples)
    plan = tree_rows(order, dp=2, tokens_per_microbatch=4096)
    assert plan is not None
    assert sorted(order.size(row[0]) for row in plan) == [900, 900]


def test_what_shares_too_little_stays_flat() -> None:
    lonely = [Sample([i * 100 + t for t in range(50)], 1) for i in range(6)]
    assert tree_rows(order_of(lonely), dp=2, tokens_per_microbatch=120) is None
    short = [Sample([*range(15), 100 + i, *range(30)], 1) for i in range(4)]
    assert order_of(short).shared.tolist() == [0, 0, 0], "15 tokens are not worth a branch"
    assert order_of(short, 15).shared.tolist() == [15, 15, 15]


def test_only_tokens_that_go_to_the_same_experts_are_shared() -> None:
    def sample(last: int, experts: np.ndarray[Any, Any] | None) -> Sample:
        return Sample([*range(20), last, 1], 20, experts=experts)

    same = np.zeros((21, 2, 2), np.uint8)
    other = same.copy()
    other[17, 1, 0] = 3
    assert order_of([sample(5, same), sample(6, same.copy())], 1).shared.tolist() == [20]
    assert order_of([sample(5, same), sample(6, other)], 1).shared.tolist() == [17]
    assert order_of([sample(5, same), sample(6, None)], 1).shared.tolist() == [0]
    pack_of = [sample(5, same), sample(6, other)]
    order = order_of(pack_of, 1)
    pack = build_tree_pack(pack_of, [0, 1], forest_of(order, [0, 1]), multiple=8)
    assert pack.experts_TLK is not None
    assert (pack.experts_TLK[pack.used :] == -1).all()
    for i, each in enumerate(pack_of):
        rows = torch.from_numpy(forest_of(order, [0, 1]).rows(i))
        assert torch.equal(pack.experts_TLK[rows], torch.from_numpy(each.experts.astype("int16")))  # type: ignore[union-attr]


# --- attention -----------------------------------------------------------------------------------


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(-1) ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@given(batches(), st.sampled_from([(1, 1), (4, 2)]), st.integers(1, 5))
@settings(max_examples=60)
def test_attention_over_a_tree_is_masked_attention(
    samples: list[Sample], heads: tuple[int, int], multiple: int
) -> None:
    pack = tree_pack(samples, multiple=multiple)
    assert pack.tree is not None
    g = torch.Generator().manual_seed(0)
    T = len(pack.tokens_T)
    q, k, v = (
        torch.randn(T, h, 8, generator=g, dtype=torch.float64).mul_(2).requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    )
    upstream = torch.randn(q.shape, generator=g, dtype=torch.float64)
    got = packed_sdpa(q, k, v, make_tree_plan(pack.tree))
    wanted = dense(q, k, v, seen(pack))
    torch.testing.assert_close(got, wanted)
    grads = [torch.autograd.grad((x * upstream).sum(), (q, k, v)) for x in (got, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_size_stay_finite(dtype: torch.dtype) -> None:
    """Scores of some thousands: a padding row with another row's log-sum-exp would overflow."""
    samples = nested(60, [20, 40, 60], 30) + nested(50, [30, 50], 10, 3)
    pack = tree_pack([Sample(s.tokens, s.start, {"advantages": [0.0] * s.trained}) for s in samples], 16)
    assert pack.tree is not None
    plan: PackPlan = make_tree_plan(pack.tree)
    assert any(len(group.gather) > len(group.slots) for group in plan.groups), "some rows are padding"
    q, k, v = (
        torch.randn(pack.used, h, 8, generator=torch.Generator().manual_seed(h)).mul(60).to(dtype)
        for h in (4, 2, 2)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = packed_sdpa(*inputs, plan)
    grads = torch.autograd.grad(out.float().sum(), inputs)
    assert all(x.isfinite().all() for x in (out, *grads))
    tolerance = 1e-3 if dtype == torch.float32 else 0.05  # a score of 10^4 is known to 1e-3 in fp32
    wanted = dense(*(x.detach().double() for x in inputs), seen(pack))
    assert (out.double() - wanted).abs().max() / wanted.abs().max() < tolerance


def test_costs_level_ranks_and_sizes_fill_packs() -> None:
    costs = np.array([30, 10, 10, 10])
    plan = plan_packs([10, 10, 10, 10], rows=Rows.whole(2), tokens_per_microbatch=40, costs=costs)
    assert sorted(sorted(row[0]) for row in plan.rows) == [[0], [1, 2, 3]]


def test_order_is_by_ids_not_by_their_bytes() -> None:
    """255 < 256, whose low byte is smaller."""
    samples = [Sample([256, *range(20), 1], 1), Sample([255, *range(20), 1], 1)]
    order: Order = order_of(samples)
    assert order.order.tolist() == [1, 0]


def test_what_computes_attention_over_trees_with_a_mock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = TrainingConfig(specs="torch")
    assert tree_way(auto) == "cpu"
    assert tree_way(TrainingConfig(specs="torch", tree_attention="merged")) == "merged"
    assert tree_way(TrainingConfig(share_prefixes=False)) is None
    assert tree_way(TrainingConfig(tree_attention="flat")) is None
    monkeypatch.setattr(platform, "device", lambda: torch.device("cuda", 0))
    assert tree_way(auto) == "flex"
    fp32 = TrainingConfig(specs="torch", tree_attention="merged", dtype="fp32")
    shape, layout = shape_of(role_config().model, 67), Layout("a", 0, 1)
    with pytest.raises(InputError, match="take half precision, and the dtype is fp32"):
        check(shape, layout, fp32, "torch")
    check(shape, layout, TrainingConfig(tree_attention="merged", dtype="bf16"), "torch")
    with pytest.raises(ValueError, match="and share_prefixes is false"):
        TrainingConfig(share_prefixes=False, tree_attention="flex")


def test_where_packs_stay_flat_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    shape, training = shape_of(role_config().model, 67), TrainingConfig(specs="torch")
    assert shares_prefixes("a", training, shape, tell=True)
    assert not shares_prefixes("a", TrainingConfig(share_prefixes=False), shape, tell=True)
    for tell in (False, True, True):
        assert not shares_prefixes("a", training, shape, cp=2, tell=tell)
    assert [r.getMessage() for r in caplog.records] == [
        "genac: a trains on flat packs: context parallelism cuts each sample by itself"
    ]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=200), st.data())
def test_what_members_far_apart_share_is_the_least_between(shared: list[int], data: st.DataObject) -> None:
    count = len(shared) + 1
    order = Order(np.array([60] * count), np.arange(count), np.array(shared))
    members = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=6)))
    assert order.between(np.array(members)).tolist() == [
        min(shared[a:b]) for a, b in itertools.pairwise(members)
    ]


def test_a_plan_of_many_samples_stops_where_ranks_are_level(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = [8 if k % 4 == 3 else 40 for k in range(255)]
    order = Order(np.array([60] * 256), np.arange(256), np.array(shared))
    tried: list[int] = []
    real = trees._clumps
    monkeypatch.setattr(trees, "_clumps", lambda order, limit: tried.append(limit) or real(order, limit))
    setup = {"dp": 4, "tokens_per_microbatch": 480}
    tree_rows(order, **setup)
    assert len(tried) == 3
    monkeypatch.setattr(trees, "MANY", 256)
    plan = tree_rows(order, **setup)
    assert len(tried) == 4
    assert plan is not None
    assert sorted(i for row in plan for pack in row for i in pack) == list(range(256))
    costs = [sum(order.size(pack) for pack in row) for row in plan]
    assert max(costs) <= trees.LEVEL * sum(costs) / 4
