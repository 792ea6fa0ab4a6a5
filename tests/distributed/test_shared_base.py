"""Two roles' adapters over one frozen base: bit for bit two models of the same seeds, in one's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import live_bytes, make_role, make_samples, published, train
from tests.distributed.test_adapter_layouts import ADAPTER, SOME, adapted, base_of

OTHER = {**SOME, "rank": 8}  # of the critic: another rank, a part of the projections


def roles_of(layout: Any, shared: bool, **training: Any) -> dict[str, Any]:
    """Collective: an actor and a critic, of one base or each of its own, whose weights are equal."""
    from genac_megatron.publication.digest import know_base
    from genac_megatron.training.layout import Layout
    from genac_megatron.training.role import Role

    configs = {
        "actor": adapted(layout, ADAPTER, training=training),
        "critic": adapted(layout, OTHER, optimizer={"lr": 1e-2}, training=training),
    }
    actor = make_role("actor", configs["actor"], torch.distributed.get_world_size())
    know_base(actor)
    if not shared:
        critic = make_role("critic", configs["critic"], torch.distributed.get_world_size())
        know_base(critic)
        return {"actor": actor, "critic": critic}
    place = Layout.from_config("critic", configs["critic"].layout, torch.distributed.get_world_size())
    critic = Role("critic", configs["critic"], actor.shape, place, place.groups(), beside=actor)
    critic.base = actor.base
    return {"actor": actor, "critic": critic}


def course(roles: dict[str, Any], first: int) -> Any:
    """Figures of steps of both roles in turn, and log-probs in between."""
    found: list[Any] = []
    for step in range(first, first + 2):
        found += [train(role, 1, step + at) for at, role in enumerate(roles.values())]
        found += [role.logprobs(make_samples(5, 7)) for role in roles.values()]
    return found


def shared_case(rank: int, folder: str, layout: Any, shared: bool, training: Any) -> Any:
    """Two steps, a checkpoint, a rest, two more; then the checkpoint in roles made anew, and two steps."""
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    before = live_bytes()
    roles = roles_of(layout, shared, **training)
    held = live_bytes() - before
    for role in roles.values():
        role.begin_stage(None, 10)
    base = base_of(roles["actor"])
    found = [course(roles, 0)]
    Checkpoints(Path(folder), 2, False).save("ppo-00002", roles, {})
    rested = [rest_and_wake(roles, order) for order in (("actor", "critic"), ("critic", "actor"))]
    found += [course(roles, 2)]
    ended = {name: published(role) for name, role in roles.items()}
    after = base_of(roles["actor"])
    same = same_parameters(roles)
    untouched = all(torch.equal(after[name], weight) for name, weight in base.items())
    roles = roles_of(layout, shared, **training)
    load_checkpoint(Path(folder) / "ppo-00002", roles)
    for role in roles.values():
        role.begin_stage(None, 10)
    load_checkpoint(Path(folder) / "ppo-00002", roles, optimizers=True)
    again = course(roles, 2)
    resumed = {name: published(role) for name, role in roles.items()}
    plain = roles["actor"].launch_logprobs(make_samples(5, 7), base=True).result()
    return {"found": found, "ended": ended, "again": again, "resumed": resumed, "plain": plain, "held": held,
            "same": same, "untouched": untouched, "rested": rested}  # fmt: skip


def rest_and_wake(roles: dict[str, Any], order: tuple[str, str]) -> list[bool]:
    """Whether the base is on the device as the roles rest and wake, one after the other."""
    if not roles["actor"].active:
        return []
    weight = roles["actor"].models[0].decoder.layers[0].mlp.linear_fc1.weight
    there = []
    for act in ("rest", "wake"):
        for name in order:
            getattr(roles[name], act)()
            there.append(bool(weight.untyped_storage().nbytes()))
    return there


def same_parameters(roles: dict[str, Any]) -> tuple[int, int]:
    """How many parameters are the very same of both roles, and how many are not."""
    pairs = [
        (mine, dict(other.named_parameters()).get(name))
        for model, other in zip(roles["critic"].models, roles["actor"].models, strict=True)
        for name, mine in model.named_parameters()
    ]
    return sum(a is b for a, b in pairs), sum(a is not b for a, b in pairs)


@pytest.mark.parametrize(
    ("layout", "training"),
    [
        ({"count": 2, "tp": 2}, {"dtype": "bf16"}),
        ({"count": 2, "pp": 2, "vpp": 2}, {"recompute": "full"}),
    ],
    ids=["tp2-sp bf16", "pp2-vpp2 recompute"],
)
def test_roles_on_one_base_are_two_models_bit_for_bit(
    pool: Any, tmp_path: Path, layout: Any, training: Any
) -> None:
    one = pool.run(shared_case, str(tmp_path / "one"), layout, True, training)
    two = pool.run(shared_case, str(tmp_path / "two"), layout, False, training)
    for got, wanted in zip(one[:2], two[:2], strict=True):
        assert got["found"] == wanted["found"]
        assert got["again"] == got["found"][1] == wanted["again"]
        for key in ("ended", "resumed"):
            for name, weights in wanted[key].items():
                assert all(torch.equal(got[key][name][part], weight) for part, weight in weights.items())
        assert got["untouched"]
        assert got["plain"] == wanted["plain"] != got["again"][-2]  # its base, without what was trained
        same, own = got["same"]
        assert same > 0
        assert own > 0
        assert wanted["same"][0] == 0
        assert got["held"] < 0.7 * wanted["held"]
        # It leaves the device once both rest, and is back with the first that wakes.
        assert got["rested"] == [[True, False, True, True]] * 2
        assert wanted["rested"] == [[False, False, True, True], [True, False, False, True]]


# --- a base that moves ---------------------------------------------------------------------------


def moving_case(rank: int, folder: str, layout: Any) -> Any:
    """Two steps of both roles, a merge of the actor's adapter, a checkpoint, two more; these again in roles
    made anew.
    """
    from genac_megatron.publication.digest import moved_by
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint
    from genac_megatron.training.merging import merge

    roles = roles_of(layout, True)
    for role in roles.values():
        role.begin_stage(None, 10)
    found = [course(roles, 0)]
    sent = published(roles["actor"])
    before = roles["actor"].logprobs(make_samples(5, 7))
    lost = merge(roles["actor"], moved_by(roles["actor"]))
    after = [role.logprobs(make_samples(5, 7)) for role in roles.values()]
    base = base_of(roles["actor"])
    exact = all(torch.equal(base[name], weight) for name, weight in sent.items())
    Checkpoints(Path(folder), 2, False).save("ppo-00002", roles, {})
    found += [course(roles, 2)]
    ended = {name: published(role) for name, role in roles.items()}
    memory = roles["critic"].memory
    roles = roles_of(layout, True)
    load_checkpoint(Path(folder) / "ppo-00002", roles)
    for role in roles.values():
        role.begin_stage(None, 10)
    load_checkpoint(Path(folder) / "ppo-00002", roles, optimizers=True)
    again = course(roles, 2)
    return {"found": found, "ended": ended, "again": again, "before": before, "after": after, "lost": lost,
            "exact": exact, "base": base, "moved": memory.moved,
            "resumed": roles["critic"].memory.moved}  # fmt: skip


def test_a_base_moves_alike_in_every_layout(pool: Any, tmp_path: Path) -> None:
    """Cut over tensors and pipeline stages and not at all; both resume to the same bytes."""
    layouts = {"one": {"count": 1}, "cut": {"count": 4, "tp": 2, "pp": 2}, "dp2": {"count": 2}}
    whole = {name: pool.run(moving_case, str(tmp_path / name), layout) for name, layout in layouts.items()}
    wanted = whole["one"][0]
    for name, layout in layouts.items():
        for got in whole[name][: layout["count"]]:
            assert got["exact"]  # engines with the merged weights have the new base
            assert got["again"] == got["found"][1]
            assert got["moved"] == got["resumed"] != ""
            assert 0 < got["lost"] < 1e-5
            for mine, theirs in zip(got["after"][0], got["before"], strict=True):
                assert mine == pytest.approx(theirs, abs=5e-6)
            assert got["after"][1] != got["found"][0][-1]  # the critic stands on another base now
            for part in ("base", "ended"):
                pairs = got[part].items() if part == "base" else got[part]["critic"].items()
                theirs = wanted[part] if part == "base" else wanted[part]["critic"]
                for key, weight in pairs:
                    torch.testing.assert_close(weight, theirs[key], atol=2e-4, rtol=0, msg=key)
