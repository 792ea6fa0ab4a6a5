"""Worlds over NCCL, as torchrun and srun make them: two roles on one GPU, and layouts over several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from genac_megatron.platform.fp8 import refusal_here
from tests.gpu.gpu_cases import curve, mean, run_world
from tests.gpu.test_precision import BF16, BF16_TORCH, LOSS_BF16, LOSS_FP8, NORM_BF16, NORM_FP8

START = """
from genac_megatron.platform.megatron import install
install()
import json
import torch.distributed as dist
from genac_megatron.training.layout import close_world, init_world
world = init_world(60.0)
"""
TWO_ROLES = (
    START
    + """
assert (world.rank, world.size) == (0, 1)
assert "nccl" in str(dist.get_backend_config()), dist.get_backend_config()
from genac_megatron.algorithms.losses import make_sft_loss
from tests.gpu.gpu_cases import make_role, make_samples
roles = {name: make_role(name=name, dtype="bf16") for name in ("actor", "critic")}
for role in roles.values():
    role.begin_stage(None, 4)
    first, *_, last = [role.train_step(make_samples(8, 0), make_sft_loss()).stats["loss"] for _ in range(4)]
    assert last < first, (first, last)
    assert dist.get_backend(role.groups.dp) == "nccl"
box = [{"an": "object"}]
dist.broadcast_object_list(box, src=0)  # over gloo, beside NCCL
close_world()
print("done")
"""
)
CURVE = (
    START
    + """
from tests.gpu.gpu_cases import curve
print(json.dumps(curve(STEPS, **TRAINING)))
close_world()
"""
)
RESUME = (
    START
    + """
from pathlib import Path
from genac_megatron.algorithms.losses import make_sft_loss
from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint
from tests.gpu.gpu_cases import flat_logprobs, make_role, make_samples
def step(role, number):
    return role.train_step(make_samples(24, number), make_sft_loss()).stats["loss"]
def begun(seed):
    role = make_role(seed=seed, dtype="bf16", layout=LAYOUT)
    role.begin_stage(None, 8)
    return role
role, checkpoints = begun(1), Checkpoints(Path(FOLDER), 2, asynchronous=True)
for number in range(2):
    step(role, number)
checkpoints.save("sft-2", {"actor": role}, {})
at, later = flat_logprobs(role), [step(role, number) for number in (2, 3)]
checkpoints.wait()
resumed = begun(9)
load_checkpoint(Path(FOLDER) / "sft-2", {"actor": resumed})
load_checkpoint(Path(FOLDER) / "sft-2", {"actor": resumed}, optimizers=True)
print(json.dumps([at, later, flat_logprobs(resumed), [step(resumed, number) for number in (2, 3)]]))
close_world()
"""
)
STEPS = 6
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-dp2": {"tp": 2},
}


@pytest.mark.timeout(300)
def test_two_roles_train_in_a_world_over_nccl() -> None:
    assert run_world(TWO_ROLES, 1)[0].strip().endswith("done")


def training(precision: str) -> dict[str, Any]:
    if precision == "bf16-torch":
        return BF16_TORCH
    if precision == "bf16":
        return BF16
    if reason := refusal_here(precision):
        pytest.skip(reason)
    return {**BF16, "fp8": precision}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "precision",
    [
        "bf16-torch",
        *(pytest.param(name, marks=pytest.mark.te) for name in ("bf16", "tensorwise", "blockwise")),
    ],
)
def test_a_layout_over_several_gpus_trains_as_one_gpu_does(layout: str, precision: str) -> None:
    """Sums in another order, and under FP8 another rank's largest number: the bands of the precision."""
    size = 4 if layout.endswith(("-pp2", "-dp2")) else 2
    if torch.cuda.device_count() < size:
        pytest.skip(f"{size} GPUs are needed, here are {torch.cuda.device_count()}")
    given = training(precision)
    losses, norms = compare(layout, size, given)
    assert losses < (LOSS_BF16 if "bf16" in precision else LOSS_FP8)
    assert norms < (NORM_BF16 if "bf16" in precision else NORM_FP8)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["dp2", "tp2-dp2"])
def test_ranks_share_a_checkpoint_and_resume_from_it(layout: str, tmp_path: Path) -> None:
    """Written in the background, each rank its part; weights are read in parts and sent over NCCL."""
    size = 4 if layout == "tp2-dp2" else 2
    if torch.cuda.device_count() < size:
        pytest.skip(f"{size} GPUs are needed, here are {torch.cuda.device_count()}")
    program = f"LAYOUT = {LAYOUTS[layout]!r}\nFOLDER = {str(tmp_path)!r}\n" + RESUME
    at, later, at_load, after_load = json.loads(run_world(program, size)[0].splitlines()[-1])
    assert at_load == at
    assert after_load == pytest.approx(later, rel=1e-3)  # kernels may sum in another order


def compare(layout: str, size: int, given: dict[str, Any]) -> tuple[float, float]:
    """Mean differences from one rank: of losses (of the first) and of gradient norms (of their mean)."""
    wanted = curve(STEPS, **given)
    program = f"STEPS = {STEPS}\nTRAINING = {given | {'layout': LAYOUTS[layout]}!r}\n" + CURVE
    found = json.loads(run_world(program, size)[0].splitlines()[-1])
    norm = sum(wanted[1]) / STEPS
    return mean(found[0], wanted[0]) / wanted[0][0], mean(found[1], wanted[1]) / norm
