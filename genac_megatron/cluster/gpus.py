"""GPUs that recipes may name, and how much of their memory a run can have."""

from __future__ import annotations

from dataclasses import dataclass

from genac_megatron.errors import InputError

# CUDA's context, NCCL's and cuBLAS's buffers and the allocator's waste: assumed, not measured.
RESERVED_GIB = 6.0


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi shows as memory.total, in GiB, and the FP8 recipes that the tensor cores have."""

    memory_gib: float
    fp8: tuple[str, ...] = ()

    @property
    def usable_gib(self) -> float:
        """What is left for weights, optimizer, activations and engines."""
        return self.memory_gib - RESERVED_GIB


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
