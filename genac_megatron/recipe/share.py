"""What a role's servers get of each of their GPUs, and the fraction that SGLang is told. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from genac_megatron.errors import InputError

GIB = 2.0**30
CONTEXT_GIB = 1.0  # of a server's own memory, taken before SGLang looks at what is free
DIGITS = 4  # of a fraction; rounded down


@dataclass(frozen=True)
class Share:
    """What a role's servers get of each of their GPUs, in bytes."""

    role: str
    weights: float
    cache: float  # KV; negative where the weights alone are more than the share
    least: float  # a KV cache below this holds no response of the recipe's length
    token: float  # of the KV cache, for one token
    runtime: float  # beside weights and cache: SGLang does not count it in its fraction

    @property
    def static(self) -> float:
        """Weights and KV cache: what SGLang's --mem-fraction-static is about."""
        return self.weights + self.cache

    def fraction(self, free: float) -> float:
        """--mem-fraction-static of a server that starts where `free` bytes are free on each of its GPUs.

        It gets its share or, where less is free, what is there. Raises InputError where that holds no
        response.
        """
        static = min(self.static, free - self.runtime)
        if static < self.weights + self.least:
            raise InputError(
                f"a server needs {gib(self.weights)} GiB for weights, {gib(self.least)} for the cache of "
                f"a response and {gib(self.runtime)} beside them; its share for weights and cache is "
                f"{gib(self.static)}, and {gib(free)} GiB of its GPU are free",
                where=f"roles.{self.role}.engine",
                way_out="see with nvidia-smi who holds the rest, and with genac run --dry-run who is to; "
                "a larger engine.tp or mem_fraction, or training.offload, gives servers more",
            )
        scale = 10**DIGITS
        return math.floor(static / (free - CONTEXT_GIB * GIB) * scale) / scale


def gib(number: float) -> str:
    """Bytes as GiB, in words."""
    return f"{number / GIB:.1f}"
