"""The layout changes no result: losses, gradient norms and weights agree over every axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.cases import Collected, make_role, published, role_config, train, train_case

# fp32 sums in another order: measured differences are below 2e-6 (losses of about 1). Adam divides by the
# root of the second moment, which lifts rounding of small gradients to under 1e-2 of a step of 5e-3.
LOSS, NORM, WEIGHT = 1e-5, 1e-5, 2e-5

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"count": 2},
    "dp4": {"count": 4},
    "tp2": {"count": 2, "tp": 2, "sequence_parallel": False},
    "tp2-sp": {"count": 2, "tp": 2},
    "pp2": {"count": 2, "pp": 2},
    "pp2-vpp2": {"count": 2, "pp": 2, "vpp": 2},
    "pp4": {"count": 4, "pp": 4},
    "tp2-pp2": {"count": 4, "tp": 2, "pp": 2},
    "tp2-dp2": {"count": 4, "tp": 2},
    "pp2-dp2": {"count": 4, "pp": 2},
    "tp2-offset": {"first_rank": 2, "count": 2, "tp": 2},
}
GATHERED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# So that four ranks too accumulate over micro-batches, and four stages have more of them than stages.
SMALL = {"dp4": 48, "pp4": 48}


@pytest.fixture(scope="module")
def reference(pool: Any) -> dict[tuple[str, bool], Any]:
    """One rank, no parallelism."""
    return {
        (family, tie): pool.run(train_case, role_config(family=family, tie=tie, layout={"count": 1}))[0]
        for family, tie in (("qwen3", True), ("llama", False))
    }


def check(got: Any, wanted: Any) -> None:
    for mine, theirs in zip(got["before"], wanted["before"], strict=True):
        assert mine == pytest.approx(theirs, abs=LOSS)
    for (loss, norm), (loss_ref, norm_ref) in zip(got["figures"], wanted["figures"], strict=True):
        assert loss == pytest.approx(loss_ref, abs=LOSS)
        assert norm == pytest.approx(norm_ref, rel=NORM)
    assert got["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, atol=WEIGHT, rtol=0, msg=name)


# The untied head lies on the last stage and is cut by tensor parallelism: its layouts have both, or neither.
UNTIED = ("dp2", "tp2-sp", "pp2-vpp2", "tp2-pp2")
EXTENDED = [
    pytest.param("llama", False, layout, marks=pytest.mark.extended)
    for layout in LAYOUTS
    if layout not in UNTIED
]


@pytest.mark.parametrize(
    ("family", "tie", "layout"),
    [
        *(("qwen3", True, layout) for layout in LAYOUTS),
        *(("llama", False, layout) for layout in UNTIED),
        *EXTENDED,
    ],
)
def test_a_layout_trains_like_one_rank(
    pool: Any, reference: Any, family: str, tie: bool, layout: str
) -> None:
    training = {"tokens_per_microbatch": SMALL[layout]} if layout in SMALL else {}
    config = role_config(family=family, tie=tie, layout=LAYOUTS[layout], training=training)
    for result in pool.run(train_case, config):
        check(result, reference[family, tie])


@pytest.mark.parametrize(
    "training",
    [{"recompute": "full"}, {"overlap_grad_reduce": True}, {"distributed_optimizer": False}, GATHERED],
    ids=["recompute", "overlap", "replicated-optimizer", "overlap-gather"],
)
def test_a_training_option_changes_no_result(pool: Any, reference: Any, training: dict[str, Any]) -> None:
    config = role_config(layout={"count": 4, "tp": 2}, training=training)
    check(pool.run(train_case, config)[0], reference["qwen3", True])


GATHER_LAYOUTS = {
    "pp2-vpp2-dp2": ("llama", False, {"pp": 2, "vpp": 2}),
    "pp2-dp2": ("llama", False, {"pp": 2}),
    "dp4": ("qwen3", True, {}),
}


@pytest.mark.parametrize("name", GATHER_LAYOUTS)
def test_weights_gathered_meanwhile_are_those_gathered_at_once(pool: Any, name: str) -> None:
    """Bit for bit. The head of an untied model is read on the last stage without a call of its module."""
    family, tie, layout = GATHER_LAYOUTS[name]
    training = {"tokens_per_microbatch": 48}
    given = {"family": family, "tie": tie, "layout": {"count": 4, **layout}}
    plain = pool.run(train_case, role_config(**given, training={**training, "overlap_grad_reduce": True}))
    found = pool.run(train_case, role_config(**given, training={**training, **GATHERED}))
    for got, wanted in zip(found, plain, strict=True):
        assert (got["before"], got["figures"]) == (wanted["before"], wanted["figures"])
        assert all(torch.equal(got["weights"][key], weight) for key, weight in wanted["weights"].items())


def under_way_case(rank: int) -> Any:
    """After an update weights are on their way; one rank alone may read them, and then they are here. So does
    a publisher that was made before.
    """
    from genac_megatron.publication.publisher import Publisher

    role = make_role("actor", role_config(layout={"count": 4}, training=GATHERED), 4)
    role.begin_stage(None, 10)
    train(role, 1)
    groups = [group for chunk in role.chunks for group in chunk.bucket_groups]
    begun = [group.param_gather_handle is not None for group in groups]
    mine = None
    if rank in (0, 2):
        mine = [parameter.detach().clone() for parameter in role.models[0].parameters()]
    ended = [group.param_gather_handle is None for group in groups]
    sink = Collected()
    publisher = Publisher(role, [sink], 1 << 14)
    train(role, 1)  # nobody is left waiting
    publisher.publish(1)
    fresh = published(role)
    same = all(torch.equal(sink.tensors[name], tensor) for name, tensor in fresh.items())
    role.end_stage()
    return begun, ended, mine, same


def test_what_reads_weights_waits_by_itself(pool: Any) -> None:
    found = pool.run(under_way_case)
    for rank, (begun, ended, _, same) in enumerate(found):
        assert same
        assert begun
        assert all(begun)
        assert all(ended) == (rank in (0, 2))
    for first, second in zip(found[0][2], found[2][2], strict=True):
        assert torch.equal(first, second)


def two_roles(rank: int, actor_layout: dict[str, Any], critic_layout: dict[str, Any]) -> Any:
    actor = make_role("actor", role_config(layout=actor_layout), 4)
    critic = make_role("critic", role_config(layout=critic_layout), 4, seed=9)
    figures = []
    for role in (actor, critic):
        role.begin_stage(None, 10)
    for step in range(3):
        figures.append((train(actor, 1, step)[0], train(critic, 1, step + 50)[0]))
    return figures, published(actor), published(critic)


def alone(rank: int, seed: int, first: int) -> Any:
    role = make_role("actor", role_config(layout={"count": 1}), 4, seed=seed)
    role.begin_stage(None, 10)
    return train(role, 3, first), published(role)


@pytest.fixture(scope="module")
def apart(pool: Any) -> Any:
    """Of actor and critic, each by itself."""
    return pool.run(alone, 3, 0)[0], pool.run(alone, 9, 50)[0]


@pytest.mark.parametrize(
    ("actor", "critic"),
    [
        ({"tp": 2}, {"pp": 2}),
        ({"count": 2, "tp": 2}, {"first_rank": 2, "count": 2, "pp": 2}),
        ({"count": 2, "tp": 2}, {"first_rank": 1, "count": 2, "pp": 2}),
    ],
    ids=["colocated", "split", "overlapping"],
)
def test_actor_tp2_with_critic_pp2(
    pool: Any, apart: Any, actor: dict[str, Any], critic: dict[str, Any]
) -> None:
    want_actor, want_critic = apart
    for figures, actor_weights, critic_weights in pool.run(two_roles, actor, critic):
        for step, (mine, theirs) in enumerate(figures):
            assert mine == pytest.approx(want_actor[0][step], rel=NORM, abs=LOSS)
            assert theirs == pytest.approx(want_critic[0][step], rel=NORM, abs=LOSS)
        for got, wanted in ((actor_weights, want_actor[1]), (critic_weights, want_critic[1])):
            for name, weight in wanted.items():
                torch.testing.assert_close(got[name], weight, atol=WEIGHT, rtol=0, msg=name)


def bf16_case(rank: int, layout: dict[str, Any]) -> Any:
    role = make_role("actor", role_config(layout=layout, training={"dtype": "bf16"}), 4)
    role.begin_stage(None, 10)
    masters = role.optimizer.get_parameters() if role.active else []
    return train(role, 3), {parameter.dtype for parameter in masters}, published(role)


def test_bf16_weights_have_fp32_masters_and_agree_over_layouts(pool: Any) -> None:
    """bf16 keeps 8 bits: losses agree to about 2^-8, master weights are fp32 everywhere."""
    wanted = pool.run(bf16_case, {"count": 1})[0]
    results = pool.run(bf16_case, {"count": 4, "tp": 2})
    for figures, dtypes, weights in results:
        assert dtypes == {torch.float32}
        assert all(w.dtype == torch.bfloat16 for w in weights.values())
        for (loss, _), (loss_ref, _) in zip(figures, wanted[0], strict=True):
            assert loss == pytest.approx(loss_ref, abs=0.02)


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "replicated"])
def test_without_clipping_the_gradient_norm_is_still_measured(pool: Any, distributed: bool) -> None:
    """clip_grad 0 trains like a limit that nothing reaches, and logs the same norm."""
    results = {}
    for clip in (0.0, 1e9, 0.5):
        config = role_config(
            layout={"count": 2},
            optimizer={"clip_grad": clip},
            training={"distributed_optimizer": distributed},
        )
        results[clip] = pool.run(train_case, config)[0]
    norms = {clip: [norm for _, norm in result["figures"]] for clip, result in results.items()}
    assert norms[0.0] == norms[1e9]
    assert min(norms[0.0]) > 0.5, "so that 0.5 clips"
    assert norms[0.5][0] == norms[0.0][0], "the norm is that before clipping"
    for name, weight in results[1e9]["weights"].items():
        assert torch.equal(results[0.0]["weights"][name], weight), name
    assert any(not torch.equal(results[0.5]["weights"][n], w) for n, w in results[0.0]["weights"].items())


UNEVEN: dict[str, dict[str, Any]] = {
    "pp2": {"count": 2, "pp": 2, "pipeline_model_parallel_layout": "Et|t*3L"},
    "tp2-pp2": {"count": 4, "tp": 2, "pp": 2, "pipeline_model_parallel_layout": "Ettt|tL"},
    "pp3": {"count": 3, "pp": 3, "pipeline_model_parallel_layout": "Et|tt|tL"},
}


@pytest.mark.parametrize("layout", UNEVEN)
def test_stages_of_unlike_length_train_like_one_rank(pool: Any, reference: Any, layout: str) -> None:
    for result in pool.run(train_case, role_config(layout=UNEVEN[layout])):
        check(result, reference["qwen3", True])


def test_chunks_of_unlike_length_train_like_one_rank(pool: Any) -> None:
    wanted = pool.run(train_case, role_config(shape={"layers": 6}, layout={"count": 1}))[0]
    layout = {"count": 2, "pp": 2, "vpp": 2, "pipeline_model_parallel_layout": "Et|tt|tt|tL"}
    check(pool.run(train_case, role_config(shape={"layers": 6}, layout=layout))[0], wanted)


REPEATED = [("qwen3", {"tp": 2}, 1), ("qwen2", {"count": 2, "tp": 2}, 1), ("qwen3", {"tp": 4}, 2)]


@pytest.mark.parametrize(("family", "layout", "kv_heads"), REPEATED, ids=["dp2", "biases", "half"])
def test_ranks_that_share_a_head_of_keys_train_like_one_rank(
    pool: Any, family: str, layout: dict[str, Any], kv_heads: int
) -> None:
    shape = {"kv_heads": kv_heads}
    wanted = pool.run(train_case, role_config(family=family, shape=shape, layout={"count": 1}))[0]
    for result in pool.run(train_case, role_config(family=family, shape=shape, layout=layout)):
        check(result, wanted)


@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2", "tp2-pp2"])
def test_micro_batches_of_unlike_length_train_like_one_rank(pool: Any, reference: Any, layout: str) -> None:
    config = role_config(layout=LAYOUTS[layout], training={"variable_seq_lengths": True})
    for result in pool.run(train_case, config):
        check(result, reference["qwen3", True])
