"""Checkpoints: exact in the same layout, layout-free otherwise, atomic, refused where they don't fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import live_bytes, make_role, published, role_config, train

STATE = {"at": {"step": 2}, "position": ["ppo", 2]}


def roles_of(actor: dict[str, Any], critic: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    roles = {
        "actor": make_role("actor", role_config(layout=actor, **overrides), 4),
        "critic": make_role("critic", role_config(layout=critic, **overrides), 4, seed=9),
    }
    for role in roles.values():
        role.begin_stage(None, 10)
    return roles


def step_all(roles: dict[str, Any], steps: int, first: int) -> Any:
    return {name: train(role, steps, first) for name, role in roles.items()}


def save_case(rank: int, folder: str, layouts: Any, asynchronous: bool, overrides: Any) -> Any:
    """Two steps, a checkpoint, two more: what a run without interruption does."""
    from genac_megatron.training.checkpoint import Checkpoints

    roles = roles_of(*layouts, **overrides)
    checkpoints = Checkpoints(Path(folder), keep=2, asynchronous=asynchronous)
    step_all(roles, 2, 0)
    checkpoints.save("ppo-00002", roles, STATE)
    at_save = {name: published(role) for name, role in roles.items()}
    after = step_all(roles, 2, 2)
    checkpoints.wait()
    return at_save, after, {name: published(role) for name, role in roles.items()}


def load_case(rank: int, folder: str, layouts: Any, overrides: Any) -> Any:
    """Other weights to begin with, all replaced by the checkpoint; then the two steps."""
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    roles = roles_of(*layouts, **overrides)
    step_all(roles, 1, 77)
    for role in roles.values():
        role.begin_stage(None, 10)
    checkpoints = Checkpoints(Path(folder), keep=2, asynchronous=False)
    path, manifest = checkpoints.newest()
    assert manifest["state"] == STATE
    load_checkpoint(path, roles)
    load_checkpoint(path, roles, optimizers=True)
    at_load = {name: published(role) for name, role in roles.items()}
    after = step_all(roles, 2, 2)
    return at_load, after, {name: published(role) for name, role in roles.items()}


def same(
    got: dict[str, dict[str, torch.Tensor]], wanted: dict[str, dict[str, torch.Tensor]], atol: float
) -> None:
    for role, weights in wanted.items():
        for name, weight in weights.items():
            torch.testing.assert_close(got[role][name], weight, atol=atol, rtol=0, msg=f"{role} {name}")


TP2_PP2 = ({"tp": 2}, {"pp": 2})


@pytest.mark.parametrize(
    ("layouts", "asynchronous", "overrides"),
    [
        pytest.param(TP2_PP2, False, {}, marks=pytest.mark.extended),  # "split" saves so too
        (TP2_PP2, True, {}),
        (TP2_PP2, True, {"training": {"distributed_optimizer": False}}),  # Adam counts steps in place
        (({"count": 2, "tp": 2}, {"first_rank": 2, "count": 2, "pp": 2, "vpp": 2}), False, {}),
        (TP2_PP2, False, {"training": {"dtype": "bf16"}}),
        (({"first_rank": 1, "count": 1}, {"first_rank": 2, "count": 2}), False, {"tie": False}),
    ],
    ids=["sync", "async", "async-replicated", "split", "bf16", "rank0-idle"],
)
def test_resume_is_exact(pool: Any, tmp_path: Path, layouts: Any, asynchronous: bool, overrides: Any) -> None:
    saved, after, end = pool.run(save_case, str(tmp_path), layouts, asynchronous, overrides)[0]
    loaded, after_load, end_load = pool.run(load_case, str(tmp_path), layouts, overrides)[0]
    same(loaded, saved, atol=0)
    assert after_load == after
    same(end_load, end, atol=0)


def pending_case(rank: int, folder: str) -> Any:
    """Bytes of tensors before a save in the background and while it is not completed, and of the weights."""
    from genac_megatron.training.checkpoint import Checkpoints

    role = make_role("actor", role_config(layout={"tp": 2}, shape={"hidden": 128, "ffn": 512}), 4)
    role.begin_stage(None, 10)
    train(role, 1, 0)
    checkpoints = Checkpoints(Path(folder), keep=2, asynchronous=True)
    before = live_bytes()
    checkpoints.save("ppo-00001", {"actor": role}, STATE)
    pending = live_bytes()
    checkpoints.wait()
    weights = sum(p.numel() * p.itemsize for p in role.models[0].parameters())
    return before, pending, weights


def test_a_save_under_way_holds_none_of_the_tensors_that_were_copied(pool: Any, tmp_path: Path) -> None:
    """On a GPU they are the device's: what a role lets go meanwhile has to come free."""
    from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

    if hasattr(TemporalAsyncCaller(), "preloaded_holder"):
        pytest.skip("this Megatron keeps the host's copies, which on a CPU are the tensors themselves")
    for before, pending, weights in pool.run(pending_case, str(tmp_path)):
        assert pending - before < 0.05 * weights


def faster_case(rank: int, folder: str) -> Any:
    """A step of a resumed run whose recipe has another rate. The critic's optimizer is not sharded."""
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    def both(**optimizer: Any) -> dict[str, Any]:
        whole = {"distributed_optimizer": False}
        actor = role_config(layout={"tp": 2}, optimizer=optimizer)
        critic = role_config(layout={"pp": 2}, optimizer=optimizer, training=whole)
        roles = {"actor": make_role("actor", actor, 4), "critic": make_role("critic", critic, 4, seed=9)}
        for role in roles.values():
            role.begin_stage(None, 10)
        return roles

    checkpoints = Checkpoints(Path(folder), keep=2, asynchronous=False)
    before = both()
    step_all(before, 2, 0)
    checkpoints.save("ppo-00002", before, STATE)
    path, _ = checkpoints.newest()
    found = {}
    for lr in (1e-3, 7e-3):
        roles = both(lr=lr, schedule="constant", beta2=0.91)
        load_checkpoint(path, roles)
        load_checkpoint(path, roles, optimizers=True)
        step_all(roles, 1, 2)
        groups = [group for role in roles.values() for group in role.optimizer.param_groups]
        found[lr] = {(group["lr"], group["max_lr"], tuple(group["betas"])) for group in groups}
    return found


def test_a_resumed_run_goes_by_its_own_learning_rate(pool: Any, tmp_path: Path) -> None:
    """What a checkpoint keeps of the optimizer is its state: "lower the learning rate" must be a way out."""
    for found in pool.run(faster_case, str(tmp_path)):
        assert found == {lr: {(lr, lr, (0.9, 0.91))} for lr in (1e-3, 7e-3)}


@pytest.mark.extended
def test_heads_of_keys_that_ranks_share_move_between_layouts(pool: Any, tmp_path: Path) -> None:
    shape = {"shape": {"kv_heads": 2}}
    saved, _, end = pool.run(save_case, str(tmp_path), ({"tp": 4}, {"count": 1}), False, shape)[0]
    other = ({"pp": 2, "pipeline_model_parallel_layout": "Et|tttL"}, {"tp": 2})
    loaded, _, end_load = pool.run(load_case, str(tmp_path), other, shape)[0]
    same(loaded, saved, atol=0)
    same(end_load, end, atol=2e-5)


@pytest.mark.extended  # moves of one role, tensor by tensor: test_checkpoint_shards.py
def test_saved_at_tp2_resumed_at_pp2(pool: Any, tmp_path: Path) -> None:
    layouts = ({"tp": 2}, {"tp": 2, "count": 2})
    other = ({"pp": 2}, {"pp": 2, "first_rank": 2, "count": 2})
    saved, after, end = pool.run(save_case, str(tmp_path), layouts, False, {})[0]
    loaded, after_load, end_load = pool.run(load_case, str(tmp_path), other, {})[0]
    same(loaded, saved, atol=0)
    for role, figures in after.items():
        for mine, theirs in zip(after_load[role], figures, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)  # test_role.py: fp32 in another order
    same(end_load, end, atol=2e-5)


def fail_case(rank: int, folder: str, what: str) -> str:
    from genac_megatron.errors import GenacError
    from genac_megatron.training import checkpoint

    roles = roles_of({"tp": 2}, {"pp": 2})
    checkpoints = checkpoint.Checkpoints(Path(folder), keep=2, asynchronous=False)
    checkpoints.save("ppo-00002", roles, STATE)
    try:
        if what == "full":
            checkpoint.SPARE_BYTES = 1 << 60
            checkpoints.save("ppo-00004", roles, STATE)
        else:
            other = {"actor": make_role("actor", role_config(family="llama", tie=False), 4)}
            other["actor"].begin_stage(None, 10)
            checkpoint.load_checkpoint(Path(folder) / "ppo-00002", other)
    except GenacError as error:
        return f"{error.exit_code} {error}"
    finally:
        checkpoint.SPARE_BYTES = 64 << 20
    return "nothing was raised"


def test_no_space_left_keeps_the_checkpoint_before(pool: Any, tmp_path: Path) -> None:
    for message in pool.run(fail_case, str(tmp_path), "full"):
        assert "no space left" in message
        assert "--resume" in message
    assert [p.name for p in tmp_path.iterdir()] == ["ppo-00002"]


def test_a_checkpoint_of_another_model_is_refused(pool: Any, tmp_path: Path) -> None:
    for message in pool.run(fail_case, str(tmp_path), "other"):
        assert message.startswith("2 "), message
        assert "ppo-00002" in message
        assert "family qwen3 (the recipe: llama)" in message


def prune_case(rank: int, folder: str) -> None:
    from genac_megatron.training.checkpoint import Checkpoints

    roles = {"actor": make_role("actor", role_config(), 4)}
    checkpoints = Checkpoints(Path(folder), keep=2, asynchronous=False)
    for step in (2, 4, 6):
        checkpoints.save(f"ppo-{step:05d}", roles, STATE)


def test_old_and_partial_checkpoints(pool: Any, tmp_path: Path) -> None:
    from genac_megatron.training.checkpoint import complete

    pool.run(prune_case, str(tmp_path))
    assert [path.name for path in complete(tmp_path)] == ["ppo-00004", "ppo-00006"]
    (tmp_path / "ppo-00006" / "manifest.json").unlink()  # as if it had not been finished
    assert [path.name for path in complete(tmp_path)] == ["ppo-00004"]
    manifest = json.loads((tmp_path / "ppo-00004" / "manifest.json").read_text())
    assert manifest["trained"] == []
    assert set(manifest["roles"]) == {"actor"}


def spoilt_case(rank: int, folder: str, asynchronous: bool) -> Any:
    """A finite loss with a gradient that is none; then NaN on one rank, in a state of its optimizer alone."""
    from genac_megatron.errors import NotFinite
    from genac_megatron.training.checkpoint import Checkpoints
    from tests.distributed.cases import make_samples

    def loss(logp: torch.Tensor, entropy: Any, fields: Any) -> Any:
        return ((logp - logp.detach()).abs().sqrt() * 0.0).sum(), {}

    roles = roles_of(*TP2_PP2)
    checkpoints = Checkpoints(Path(folder), keep=3, asynchronous=asynchronous)
    step_all(roles, 1, 0)
    checkpoints.save("ppo-00001", roles, STATE)
    told = []
    states = [one.optimizer.state for one in roles["actor"].optimizer.chained_optimizers]
    moment = next(iter(states[0].values()))["exp_avg"]
    kept = moment.clone()
    if rank == 2:
        moment[0] = float("inf")
    try:
        checkpoints.save("ppo-00002", roles, STATE)
    except NotFinite as error:
        told.append((str(error), error.agreed))
    moment.copy_(kept)
    checkpoints.save("ppo-00003", roles, STATE)
    try:
        roles["critic"].train_step(make_samples(5, 1), loss)
    except NotFinite as error:
        told.append((str(error), error.agreed))
    try:
        checkpoints.save("ppo-00004", roles, STATE)
    except NotFinite as error:
        told.append((str(error), error.agreed))
    checkpoints.wait()
    return told, sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_not_finite_is_never_saved(pool: Any, tmp_path: Path, asynchronous: bool) -> None:
    for told, there in pool.run(spoilt_case, str(tmp_path), asynchronous):
        state, gradient, weights = told
        assert state[0].startswith("optimizer.")
        assert "not finite" in state[0]
        assert gradient[0] == "critic/grad_norm is nan"
        assert weights[0].startswith("critic.")
        assert all(agreed for _, agreed in told)
        assert there == ["ppo-00001", "ppo-00003"]


def test_a_checkpoint_that_holds_nan_is_refused(pool: Any, tmp_path: Path) -> None:
    """Of an earlier version, which wrote such ones."""
    for message in pool.run(load_spoilt_case, str(tmp_path)):
        assert "its actor holds numbers that are not finite: " in message
        assert "remove this checkpoint to use the one before" in message


def load_spoilt_case(rank: int, folder: str) -> Any:
    from genac_megatron.errors import InputError
    from genac_megatron.training import checkpoint

    roles = roles_of(*TP2_PP2)
    for parameter in roles["actor"].models[0].parameters():
        parameter.data.fill_(float("nan"))
    checkpoint.need_finite, kept = lambda sharded: None, checkpoint.need_finite
    try:
        checkpoints = checkpoint.Checkpoints(Path(folder), keep=2, asynchronous=False)
        checkpoints.save("ppo-00001", roles, STATE)
    finally:
        checkpoint.need_finite = kept
    try:
        checkpoint.load_checkpoint(Path(folder) / "ppo-00001", roles)
    except InputError as error:
        return str(error)
    return "loaded"


def ended_case(rank: int, folder: str) -> list[str]:
    """A run that ends with an error of all ranks while a save is under way; what is whole at its end."""
    from genac_megatron.errors import PeerLost, on_all_ranks
    from genac_megatron.stages.pipeline import saves_completed
    from genac_megatron.training.checkpoint import Checkpoints, complete

    roles = {"actor": make_role("actor", role_config(), 4)}
    checkpoints = Checkpoints(Path(folder), keep=2, asynchronous=True)
    try:
        with saves_completed(checkpoints):
            checkpoints.save("ppo-00002", roles, STATE)
            assert not complete(Path(folder)), "it is under way"
            raise on_all_ranks(PeerLost("a server was lost beyond its budget"))
    except PeerLost:
        return [path.name for path in complete(Path(folder))]


def test_a_run_that_ends_completes_the_save_under_way(pool: Any, tmp_path: Path) -> None:
    for there in pool.run(ended_case, str(tmp_path)):
        assert there == ["ppo-00002"]
