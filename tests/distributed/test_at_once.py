"""Roles on disjoint ranks train at once: each one's step waits until the other's has begun.

The stages' own functions on real roles; only the run around them is a stand-in.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.cases import make_role, make_samples, published, role_config
from tests.distributed.test_value import value_config

LIMIT_S = 100.0  # for the other role's step to begin
RUN_S = 400.0
SPLIT: tuple[dict[str, Any], ...] = ({"count": 2, "tp": 2}, {"first_rank": 2, "count": 2})
PIPED: tuple[dict[str, Any], ...] = ({"count": 2, "pp": 2}, {"first_rank": 2, "count": 2, "tp": 2})
PAIRED: tuple[dict[str, Any], ...] = ({"count": 2}, {"first_rank": 2, "count": 2})
SHARED: tuple[dict[str, Any], ...] = ({"count": 2, "tp": 2}, {"first_rank": 1, "count": 2, "pp": 2})


@contextmanager
def met(rank: int, folder: str | None) -> Iterator[None]:
    """A rank's first loss that is trained waits until one has begun on a rank of the other half."""
    from genac_megatron.training import role

    real, waited = role._apply_loss, []

    def waiting(loss: Any, pack: Any, scale: float, output: torch.Tensor) -> Any:
        if folder is not None and output.requires_grad and not waited:
            waited.append(True)
            (Path(folder) / f"began-{rank}").touch()
            until = time.monotonic() + LIMIT_S
            others = [Path(folder) / f"began-{other}" for other in range(4) if other // 2 != rank // 2]
            while not any(other.exists() for other in others):
                if time.monotonic() > until:
                    raise TimeoutError(
                        "the other role has not begun to train: they are not under way at once"
                    )
                time.sleep(0.01)
        return real(loss, pack, scale, output)

    role._apply_loss = waiting
    try:
        yield
    finally:
        role._apply_loss = real


def make_batch() -> Any:
    """Three groups of two responses of uneven length, each judged at two states."""
    from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
    from genac_megatron.stages.batch import Batch
    from genac_megatron.stages.rollouts import Group

    rng = random.Random(1)

    def completion(length: int) -> Completion:
        logprobs = tuple(-4.0 + rng.gauss(0, 0.3) for _ in range(length))
        return Completion(tuple(rng.randrange(67) for _ in range(length)), logprobs, "stop")

    groups = []
    for index in range(3):
        group = Group(Prompt(f"train/{index}", (), "problem", "", (1, 2, 3, 4)))
        for sample in range(2):
            length = rng.randint(4, 20)
            rollout = Rollout(group.prompt, sample, completion(length), "", float(rng.random() < 0.5))
            states = [State(rollout, 0, 0, 3), State(rollout, 1, 3, length)]
            judged = [
                Judgement(state, (5, 6, 7), completion(rng.randint(2, 9)), "", 0.5, used=rng.random())
                for state in states
            ]
            group.rollouts.append(rollout)
            group.judgements.append(judged)
        groups.append(group)
    return Batch(groups)


def stand_in_run(actor: dict[str, Any], critic: dict[str, Any], scalar: bool) -> Any:
    """What updates ask of a run, over real roles: actor, critic, and the actor's frozen reference."""
    frozen = role_config(layout=actor, training={"frozen": True})
    make = value_config if scalar else role_config
    roles = {
        "actor": make_role("actor", role_config(layout=actor), 4),
        "reference": make_role("reference", frozen, 4, seed=5),
        "critic": make_role("critic", make(layout=critic), 4, seed=9),
    }
    for name in ("actor", "critic"):
        roles[name].begin_stage(None, 10)
    return SimpleNamespace(
        roles=roles,
        actor=roles["actor"],
        critic=roles["critic"],
        at=SimpleNamespace(explained_variance=None),
        icc=None,
        recipe=SimpleNamespace(seed=1, judging=SimpleNamespace(temperature=1.0)),
        phase=lambda name: nullcontext(),
        count_sequences=lambda phase, samples: None,
    )


def part_of(batch: Any, rank: int) -> Any:
    """The batch as a run has it: this rank's groups alone. One of four ranks has none."""
    from genac_megatron.stages.batch import Batch

    places = list(range(len(batch.groups)))[rank::4]
    return Batch([batch.groups[place] for place in places], places=places)


def update_case(
    rank: int, layouts: Any, given: dict[str, Any], folder: str | None, spread: bool = False
) -> Any:
    """One update by the stage's own `train`."""
    from pydantic import TypeAdapter

    from genac_megatron.recipe.schema import StageConfig
    from genac_megatron.stages import policy, ppo

    stage: Any = TypeAdapter(StageConfig).validate_python(given)
    run = stand_in_run(*layouts, scalar=stage.kind == "policy")
    train = policy.train if stage.kind == "policy" else ppo.train
    with met(rank, folder):
        figures = train(run, stage, part_of(make_batch(), rank) if spread else make_batch(), 1)
    return figures, {name: published(run.roles[name]) for name in ("actor", "critic")}


PPO: dict[str, Any] = {"kind": "ppo"}
PARTS: dict[str, Any] = {"minibatches": 2, "actor_loss": {"kl_coef": 0.1}}
SEQUENCES: dict[str, Any] = {
    "kind": "ppo",
    "critic_updates": 2,
    "minibatches": 2,
    "actor_loss": {"aggregate": "sequence", "nll_coef": 0.1, "nll_from": 1.0},
}
VALUES: dict[str, Any] = {"kind": "policy", "algorithm": {"kind": "vc_ppo"}, "minibatches": 2}


def same(found: Any, wanted: Any) -> None:
    """To rounding: sums of one layout in the order of another."""
    for (figures, weights), (figures_ref, weights_ref) in zip(found, wanted, strict=True):
        assert figures == pytest.approx(figures_ref, abs=1e-4, rel=1e-4, nan_ok=True)
        for role, tensors in weights_ref.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(weights[role][name], tensor, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("layouts", "stage"),
    [(SPLIT, PPO), (PIPED, PPO | PARTS), (SPLIT, VALUES), (PAIRED, SEQUENCES)],
    ids=["ppo", "ppo in parts, with a reference", "a scalar critic", "updates after the actor's"],
)
def test_roles_on_disjoint_ranks_train_at_once(
    pool: Any, layouts: Any, stage: dict[str, Any], tmp_path: Path
) -> None:
    """A batch that lies where it was made; to the figures and weights of roles that share ranks, where one
    trains after the other, on a batch that every rank has whole.
    """
    folder = str(tmp_path) if stage is not SEQUENCES else None
    found = pool.run(update_case, layouts, stage, folder, True, timeout=RUN_S)
    assert {int(path.name[-1]) // 2 for path in tmp_path.iterdir()} == ({0, 1} if folder else set())
    assert len({repr(figures) for figures, _ in found}) == 1, "the same on every rank"
    same(found, pool.run(update_case, SHARED, stage, None, timeout=RUN_S))


def object_case(rank: int, times: int) -> list[int]:
    """Bytes of each collective of objects in one update, its batch `times` as many and as long responses."""
    import pickle

    import torch.distributed as dist
    from pydantic import TypeAdapter

    from genac_megatron.recipe.schema import StageConfig
    from genac_megatron.records import Completion
    from genac_megatron.stages import ppo
    from genac_megatron.stages.batch import Batch

    stage: Any = TypeAdapter(StageConfig).validate_python(PPO | PARTS)
    run = stand_in_run(*SPLIT, scalar=False)
    made = [group for _ in range(times) for group in make_batch().groups]
    for group in made:
        for rollout in group.rollouts:
            one = rollout.completion
            ids, logprobs = list(one.ids) * times, list(one.logprobs) * times
            rollout.completion = Completion(ids, logprobs, one.finish)
    sizes: list[int] = []
    real = dist.all_gather_object, dist.broadcast_object_list

    def gathering(found: Any, mine: Any, group: Any = None) -> None:
        sizes.append(len(pickle.dumps(mine)))
        real[0](found, mine, group)

    def broadcasting(box: Any, src: int = 0, group: Any = None, **more: Any) -> None:
        real[1](box, src, group, **more)
        sizes.append(len(pickle.dumps(box)))

    dist.all_gather_object, dist.broadcast_object_list = gathering, broadcasting
    try:
        places = list(range(len(made)))[rank::4]
        ppo.train(run, stage, Batch([made[place] for place in places], places=places), 1)
    finally:
        dist.all_gather_object, dist.broadcast_object_list = real
    return sizes


def test_no_collective_of_objects_grows_with_the_batch(pool: Any) -> None:
    """Four times the groups, of four times the tokens: what is pickled is of the same size."""
    small, large = pool.run(object_case, 1, timeout=RUN_S), pool.run(object_case, 4, timeout=RUN_S)
    for ours, theirs in zip(small, large, strict=True):
        assert 0 < len(ours) == len(theirs)
        assert all(abs(a - b) < 300 for a, b in zip(ours, theirs, strict=True)), (
            "a rank had no group at first"
        )


def broken(rank: int, bad: list[str]) -> list[tuple[str, bool]]:
    """Both roles' steps, with NaN out of the losses of some: the errors of either result."""
    from genac_megatron.algorithms.losses import make_ppo_loss
    from genac_megatron.errors import NotFinite
    from genac_megatron.recipe.schema import LossConfig

    loss = make_ppo_loss(LossConfig())

    def nan(*given: Any) -> Any:
        value, stats = loss(*given)
        return value * float("nan"), stats

    roles = [
        make_role(name, role_config(layout=at), 4)
        for name, at in zip(("actor", "critic"), SPLIT, strict=True)
    ]
    for role in roles:
        role.begin_stage(None, 10)
    launched = [role.launch_step(make_samples(5, 1), nan if role.name in bad else loss) for role in roles]
    errors = []
    for one in launched:
        try:
            one.result()
        except NotFinite as error:
            errors.append((str(error), error.agreed))
    return errors


@pytest.mark.parametrize("bad", [["actor"], ["critic"], ["actor", "critic"]])
def test_what_is_not_finite_is_raised_on_every_rank(pool: Any, bad: list[str]) -> None:
    assert pool.run(broken, bad, timeout=RUN_S) == [[(f"{name}/loss is nan", True) for name in bad]] * 4


def stopped(rank: int, layouts: Any, norm: float) -> Any:
    """An actor's three updates, the first with a loss that is not finite, beside a critic's step: how many
    passes this rank has made of each, and what the collected results raise.
    """
    from genac_megatron.algorithms.losses import make_ppo_loss
    from genac_megatron.errors import NotFinite
    from genac_megatron.recipe.schema import LossConfig
    from genac_megatron.stages.minibatches import launch_parts
    from genac_megatron.stages.under_way import Update, collected

    loss = make_ppo_loss(LossConfig())
    roles, passes = {}, dict.fromkeys(("actor", "critic"), 0)
    for name, layout in zip(passes, layouts, strict=True):
        config = role_config(layout=layout, optimizer={"clip_grad": norm})
        role = roles[name] = make_role(name, config, 4)
        role.begin_stage(None, 10)

    def counting(name: str, factor: float) -> Any:
        def call(*given: Any) -> Any:
            passes[name] += 1
            value, stats = loss(*given)
            return value * (factor if passes[name] == 1 else 1.0), stats

        return call

    parts = [make_samples(1, seed) for seed in (1, 2, 3)]
    actor = launch_parts(roles["actor"], parts, counting("actor", float("nan")), 3)
    critic = launch_parts(roles["critic"], parts[:2], counting("critic", 1.0), 2)
    run: Any = SimpleNamespace(phase=lambda name: nullcontext())
    try:
        collected(run, [Update(actor, dict), Update(critic, dict)])
    except NotFinite as error:
        return passes, str(error), error.agreed
    return passes, "", False


ONE_EACH: tuple[dict[str, Any], ...] = ({"count": 2, "tp": 2}, {"first_rank": 2, "count": 2, "tp": 2})
STAGED: tuple[dict[str, Any], ...] = ({"count": 2, "pp": 2}, {"first_rank": 1, "count": 2, "pp": 2})


@pytest.mark.parametrize(
    ("layouts", "norm"), [(ONE_EACH, 1.0), (STAGED, 1.0), (STAGED, 0.0)], ids=["tp", "pp", "no clipping"]
)
def test_an_update_that_is_not_finite_is_the_last_of_its_step(pool: Any, layouts: Any, norm: float) -> None:
    """Without clipping no gradient norm is known: the last pipeline stage alone sees the loss."""
    found = pool.run(stopped, layouts, norm, timeout=RUN_S)
    assert {(text, agreed) for _, text, agreed in found} == {("actor/loss is nan", True)}
    assert max(passes["actor"] for passes, *_ in found) == 1, "of three"
    assert max(passes["critic"] for passes, *_ in found) == 2, "another role's go on"
