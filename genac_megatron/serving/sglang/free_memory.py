"""What is free on a GPU, asked without taking a context there, which costs half a GiB. Not run on a GPU."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from genac_megatron.errors import GenacError
from genac_megatron.serving.sglang.gpus import MIG

LIMIT_S = 30.0
COMMAND = ("nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits")


def free_bytes(names: Sequence[str], uuids: Mapping[str, str]) -> list[float]:
    """Bytes free on each GPU. names: as CUDA_VISIBLE_DEVICES has them; uuids: of those, as torch says them.

    By UUID where it is known: CUDA's numbers are nvidia-smi's only with CUDA_DEVICE_ORDER=PCI_BUS_ID. Raises
    GenacError where nvidia-smi does not tell.
    """
    if any(name.startswith(MIG) for name in names):
        return [_of_instance(index) for index, _ in enumerate(names)]
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=LIMIT_S, check=True)
        found = parse(done.stdout)
        return [_of(found, name, uuids.get(name, "")) for name in names]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise GenacError(
            f"nvidia-smi does not tell how much memory is free on {', '.join(names)}: {error}",
            where="the start of SGLang servers",
            way_out="see what `nvidia-smi` says on that node",
        ) from error


def parse(text: str) -> dict[str, float]:
    """Bytes by number and by UUID (without "GPU-"), of nvidia-smi's rows in MiB. Raises ValueError."""
    found = {}
    for line in text.splitlines():
        if line.strip():
            index, uuid, free = (cell.strip() for cell in line.split(","))
            found[index] = found[uuid.removeprefix("GPU-")] = float(free) * 2**20
    return found


def _of(found: Mapping[str, float], name: str, uuid: str) -> float:
    key = (uuid or name).removeprefix("GPU-")
    if key in found:
        return found[key]
    [match] = [free for known, free in found.items() if len(key) > 4 and known.startswith(key)]  # cut short
    return match


def _of_instance(index: int) -> float:
    """Of a MIG instance, which nvidia-smi's query leaves out: CUDA shows one of them to a process."""
    import torch

    free, _ = torch.cuda.mem_get_info(index)
    return float(free)
