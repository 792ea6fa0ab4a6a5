"""GPUs that recipes may name."""

from __future__ import annotations

from dataclasses import dataclass

from genac_megatron.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi shows as memory.total, in GiB, and the FP8 recipes that the tensor cores have."""

    memory_gib: float
    fp8: tuple[str, ...] = ()


HOPPER = ("delayed", "tensorwise", "blockwise")
GPUS = {
    "a100-40g": Gpu(40.0),
    "a100-80g": Gpu(80.0),
    "h100-80g": Gpu(79.6, HOPPER),
    "h200-141g": Gpu(140.4, HOPPER),
    "b200-180g": Gpu(178.4, (*HOPPER, "mxfp8")),
}


def gpu(name: str) -> Gpu:
    """The row called `name`. Raises InputError where there is none."""
    if name not in GPUS:
        raise InputError(
            f"no GPU called '{name}' is known",
            where="cluster.gpu",
            way_out=f"known are {', '.join(GPUS)}; a new one is a row of genac_megatron/cluster/gpus.py",
        )
    return GPUS[name]
