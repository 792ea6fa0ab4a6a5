"""What each rank writes, reads and sends of a checkpoint, in every layout; and the form of before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.cases import make_role, published, repeats, role_config, train
from tests.distributed.test_checkpoint import same

WIDE = {"hidden": 64, "ffn": 192}  # most of its bytes are matrices, as in a real model


def role_in(layout: dict[str, Any], seed: int = 3, **overrides: Any) -> Any:
    role = make_role("actor", role_config(layout=layout, shape=WIDE, **overrides), 4, seed=seed)
    role.begin_stage(None, 10)
    return role


@contextmanager
def stock_form() -> Iterator[None]:
    """Megatron's own `fully_reshardable`, which this project used before: all states on every rank."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from genac_megatron.platform import optimizer_shards

    optimizer_shards.install()
    for name, method in optimizer_shards.REPLACED.items():
        setattr(DistributedOptimizer, name, method)
    try:
        yield
    finally:
        for name, method in optimizer_shards.OWN.items():
            setattr(DistributedOptimizer, name, method)


@contextmanager
def counted_sends() -> Iterator[Counter[str]]:
    """Numbers sent by collectives of tensors, by collective; objects go as bytes and are not counted."""
    counts: Counter[str] = Counter()
    names = ("all_gather", "gather", "all_gather_into_tensor", "broadcast", "all_reduce", "scatter")
    real = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [one for one in args if isinstance(one, torch.Tensor) and one.is_floating_point()]
            counts[name] += sum(one.numel() for one in tensors)
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name in names:
            setattr(dist, name, real[name])


@contextmanager
def counted_reads() -> Iterator[Counter[tuple[str, tuple[int, ...]]]]:
    """How often this rank reads each stored tensor piece."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    real = FileSystemReader.read_data

    def read(self: Any, plan: Any, planner: Any) -> Any:
        for item in plan.items:
            if item.storage_index.offset is not None:
                counts[item.storage_index.fqn, tuple(item.storage_index.offset)] += 1
        return real(self, plan, planner)

    FileSystemReader.read_data = read  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        FileSystemReader.read_data = real  # type: ignore[method-assign]


def traffic_case(rank: int, folder: str, layout: dict[str, Any]) -> Any:
    """Numbers sent while saving and loading, reads by stored piece, and the bytes that this rank wrote."""
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    role = role_in(layout)
    train(role, 1)
    with counted_sends() as saving:
        Checkpoints(Path(folder), 2, asynchronous=False).save("ppo-00001", {"actor": role}, {})
    with counted_sends() as loading, counted_reads() as reads:
        load_checkpoint(Path(folder) / "ppo-00001", {"actor": role})
        load_checkpoint(Path(folder) / "ppo-00001", {"actor": role}, optimizers=True)
    files = (Path(folder) / "ppo-00001/weights").glob(f"__{rank}_*.distcp")
    return sum(saving.values()), sum(loading.values()), reads, sum(file.stat().st_size for file in files)


def test_no_rank_gathers_and_all_write_and_read_their_share(pool: Any, tmp_path: Path) -> None:
    """dp 4: a stored piece is read once in all, weights are sent once, a rank writes a quarter."""
    from genac_megatron.models.sizes import parameters

    results = pool.run(traffic_case, str(tmp_path), {})
    reads: Counter[Any] = sum((reads for _, _, reads, _ in results), Counter())
    assert max(reads.values()) == 1, "each byte is read once, by one rank"
    assert any(name.startswith("optimizer.state.exp_avg_sq.actor.") for name, _ in reads)
    assert any(name.startswith("actor.") for name, _ in reads)
    assert [saved for saved, _, _, _ in results] == [0, 0, 0, 0]
    weights = parameters(role_shape())
    for _, loaded, _, _ in results:
        assert loaded == pytest.approx(weights, rel=0.01), "a weight is sent to the others, a state to none"
    wrote = [size for *_, size in results]
    assert max(wrote) < 1.25 * sum(wrote) / 4, wrote


def role_shape() -> Any:
    from genac_megatron.models.registry import shape_of

    return shape_of(role_config(shape=WIDE).model, 67)


def test_tensor_parallel_ranks_write_and_read_their_share(pool: Any, tmp_path: Path) -> None:
    """tp 2, dp 2: what both tensor-parallel ranks hold whole (norms) is read by both, all else once."""
    results = pool.run(traffic_case, str(tmp_path), {"tp": 2})
    reads: Counter[Any] = sum((reads for _, _, reads, _ in results), Counter())
    twice = {name for (name, _), count in reads.items() if count > 1}
    assert all("norm" in name for name in twice), twice
    assert [saved for saved, _, _, _ in results] == [0, 0, 0, 0]
    wrote = [size for *_, size in results]
    assert max(wrote) < 1.25 * sum(wrote) / 4, wrote


def stock_case(rank: int) -> int:
    from genac_megatron.training.sharding import role_state

    role = role_in({})
    with stock_form(), counted_sends() as sends:
        role_state(role, optimizer=True)
    return sum(sends.values())


def test_megatrons_own_form_still_gathers(pool: Any) -> None:
    """Once it does not, platform/optimizer_shards.py may go."""
    from genac_megatron.models.sizes import parameters

    for sent in pool.run(stock_case):
        assert sent >= 3 * parameters(role_shape()) / 4, "masters and two moments, each rank its quarter"


def form_case(rank: int, folder: str, layout: dict[str, Any], stock: bool, resumed: bool) -> Any:
    """Weights and the next steps' figures, after a save in one of the forms or a load in one of them."""
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    role = role_in(layout, seed=9 if resumed else 3, tie=False)
    train(role, 2, 50 if resumed else 0)
    if resumed:
        role.begin_stage(None, 10)
    path = Path(folder) / "ppo-00002"

    def act() -> None:
        if not resumed:
            Checkpoints(Path(folder), 2, asynchronous=False).save(path.name, {"actor": role}, {})
            return
        load_checkpoint(path, {"actor": role})
        load_checkpoint(path, {"actor": role}, optimizers=True)

    if stock:
        with stock_form():
            act()
    else:
        act()
    at = {"actor": published(role, 1 << 18)}
    return at, train(role, 2, 2), {"actor": published(role, 1 << 18)}


@pytest.mark.parametrize(
    "old_saves",
    [pytest.param(True, id="old-to-new"), pytest.param(False, id="new-to-old", marks=pytest.mark.extended)],
)
def test_either_form_loads_what_the_other_saved(pool: Any, tmp_path: Path, old_saves: bool) -> None:
    """Exactly: a run of an earlier version resumes, and an earlier version resumes a run of this one."""
    layout = {"tp": 2}
    saved, after, end = pool.run(form_case, str(tmp_path), layout, old_saves, False)[0]
    loaded, after_load, end_load = pool.run(form_case, str(tmp_path), layout, not old_saves, True)[0]
    same(loaded, saved, atol=0)
    assert after_load == after
    same(end_load, end, atol=0)


MOVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp4 to tp2-pp2": ({}, {"tp": 2, "pp": 2}),
    "one rank to dp4": ({"count": 1}, {}),
    "tp2-dp2 to dp4": ({"tp": 2}, {}),
    "dp3 to tp2": ({"count": 3}, {"count": 2, "tp": 2}),
    "pp2-vpp2-dp2 to dp2": ({"pp": 2, "vpp": 2}, {"first_rank": 2, "count": 2}),
}


def move_case(rank: int, folder: str, layout: dict[str, Any], resumed: bool) -> Any:
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    role = role_in(layout, seed=9 if resumed else 3)
    path = Path(folder) / "ppo-00002"
    if resumed:
        load_checkpoint(path, {"actor": role})
        load_checkpoint(path, {"actor": role}, optimizers=True)
    else:
        train(role, 2)
        Checkpoints(Path(folder), 2, asynchronous=False).save(path.name, {"actor": role}, {})
    at = {"actor": published(role, 1 << 18)}
    return at, states_of(folder, role, "again" if resumed else ""), train(role, 2, 2)


def states_of(folder: str, role: Any, name: str) -> dict[str, torch.Tensor]:
    """What is stored, tensor by tensor; of a resumed role, after it is saved once more."""
    import torch.distributed.checkpoint as dcp

    from genac_megatron.training.checkpoint import Checkpoints

    if name:
        Checkpoints(Path(folder), 9, asynchronous=False).save(name, {"actor": role}, {})
    reader = dcp.FileSystemReader(Path(folder) / (name or "ppo-00002") / "weights")
    metadata = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.mark.parametrize("move", repeats(MOVES, "one rank to dp4"))
def test_a_checkpoint_moves_between_layouts_exactly(pool: Any, tmp_path: Path, move: str) -> None:
    """Weights, masters and moments, bit by bit, read by torch alone; then steps like those without a move."""
    before, after = MOVES[move]
    weights, states, figures = pool.run(move_case, str(tmp_path), before, False)[0]
    weights2, states2, figures2 = pool.run(move_case, str(tmp_path), after, True)[0]
    same(weights2, weights, atol=0)
    assert states2.keys() == states.keys()
    assert len([key for key in states if key.startswith("optimizer.")]) > 20
    for key, tensor in states.items():
        rows = min(tensor.size(0), states2[key].size(0))  # a vocabulary is padded to a multiple of tp
        assert torch.equal(tensor[:rows], states2[key][:rows]), key
    for mine, theirs in zip(figures2, figures, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def damaged_case(rank: int, folder: str) -> str:
    from genac_megatron.errors import InputError
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    role = role_in({})
    path = Path(folder) / "ppo-00001"
    Checkpoints(Path(folder), 2, asynchronous=False).save(path.name, {"actor": role}, {})
    if rank == 0:
        for file in (path / "weights").glob("__2_*.distcp"):
            file.write_bytes(file.read_bytes()[:100])
    dist.barrier()
    try:
        load_checkpoint(path, {"actor": role}, optimizers=True)
    except InputError as error:
        return f"{error.agreed} {error}"
    return "loaded"


def test_what_one_rank_cannot_read_is_told_to_all(pool: Any, tmp_path: Path) -> None:
    """Each rank reads its own share: the others must not wait for the one that failed."""
    for message in pool.run(damaged_case, str(tmp_path)):
        assert message.startswith("True "), message
        assert "it cannot be read into this model" in message
        assert "remove this checkpoint to use the one before" in message
