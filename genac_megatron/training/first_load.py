"""A role's first weights: each Hugging Face tensor is read once in all, cut there, and sent to who holds it.

A parameter lies on as many ranks as its replicas have: data- and context-parallel ones, of an expert all that
share it. Their first tensor-parallel ranks take turns as its reader, parameter by parameter. A reader cuts
what it has read for its tensor-parallel group, whose ranks send their shards to their replicas. Readers read
ahead, in a thread, so that all of them read at once.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from genac_megatron import platform
from genac_megatron.models.mapping import (
    GetTensor,
    ParamRule,
    checked,
    keep,
    load_hf_into,
    role_rules,
    shard,
)
from genac_megatron.platform.fp8 import kept_in_fp8
from genac_megatron.training.role import Role

AHEAD = 2  # parameters that a reader has read and nobody has taken


def load_once(role: Role, get_tensor: GetTensor) -> None:
    """Set the role's parameters from Hugging Face tensors, as `load_hf_into` would on each rank by itself.

    Collective over the role's block. get_tensor: as there, and safe to call in a thread. A reader's error is
    kept until all have been served, and then raised there: the caller tells the others (`agree`).
    """
    if role.layout.count == 1:
        load_hf_into(role.models, role.layout, role.shape, get_tensor)
    else:
        _Shared(role, get_tensor).load()


class _Shared:
    def __init__(self, role: Role, get_tensor: GetTensor) -> None:
        self.role, self.get = role, get_tensor
        self.items = list(role_rules(role.models, role.layout, role.shape))
        self.failure: Exception | None = None

    def load(self) -> None:
        mine = [index for index in range(len(self.items)) if self._reads(index)]
        with ThreadPoolExecutor(1, thread_name_prefix="weights") as thread, torch.no_grad():
            ahead: deque[Future[list[Tensor]]] = deque()
            begun = iter(mine)
            for index, item in enumerate(self.items):
                while len(ahead) < AHEAD and (nearest := next(begun, None)) is not None:
                    ahead.append(thread.submit(self._shards, self.items[nearest]))
                shards = self._attempted(ahead.popleft()) if self._reads(index) else None
                self._take(index, item, shards)
        if self.failure is not None:
            raise self.failure

    def _replicas(self, item: ParamRule) -> dist.ProcessGroup:
        """The ranks that hold the same of a parameter as this one."""
        groups = self.role.groups
        return groups.expt_dp if item.rule.expert is not None else groups.dp_cp

    def _cut(self, item: ParamRule) -> bool:
        """Whether a reader serves its tensor-parallel group; experts have no such."""
        return item.rule.expert is None and self.role.layout.tp > 1

    def _reads(self, index: int) -> bool:
        item = self.items[index]
        replicas = self._replicas(item)
        turn = replicas.rank() == index % replicas.size()
        return turn and (not self._cut(item) or self.role.groups.tp.rank() == 0)

    def _shards(self, item: ParamRule) -> list[Tensor]:
        """Of all ranks that this reader serves, as they travel: bytes."""
        tp = self.role.layout.tp if self._cut(item) else 1
        whole = _read(item, self.get, self.role)
        dtype = _travelling(item)
        made = (shard(item.rule, whole, self.role.shape, rank, self.role.layout.tp) for rank in range(tp))
        return [each.to(dtype).contiguous().view(torch.uint8) for each in made]

    def _attempted(self, read: Future[list[Tensor]]) -> list[Tensor] | None:
        try:
            return read.result()
        except Exception as error:
            self.failure = self.failure or error
            return None

    def _take(self, index: int, item: ParamRule, shards: list[Tensor] | None) -> None:
        """This rank's part in sending a parameter, and its own of it. shards: of a reader that could read."""
        replicas, dtype, device = self._replicas(item), _travelling(item), platform.device()
        source = index % replicas.size()
        value = torch.zeros(item.parameter.numel() * dtype.itemsize, dtype=torch.uint8, device=device)
        if replicas.rank() == source:
            if self._cut(item):
                tp = self.role.groups.tp
                given = [value.clone() for _ in range(tp.size())] if shards is None else shards
                sent = [each.to(device).flatten() for each in given] if tp.rank() == 0 else None
                dist.scatter(value, sent, group=tp, group_src=0)
            elif shards is not None:
                value.copy_(shards[0].flatten())
        if replicas.size() > 1:
            dist.broadcast(value, group=replicas, group_src=source)
        keep(item, value.view(dtype).view(item.parameter.shape))


def _read(item: ParamRule, get_tensor: GetTensor, role: Role) -> list[Tensor]:
    return [checked(get_tensor(name), name, role.shape) for name in item.hf_names]


def _travelling(item: ParamRule) -> torch.dtype:
    """What a shard is sent in: the parameter's precision, of one in FP8 what its master begins with."""
    return torch.float32 if kept_in_fp8(item.parameter) else item.parameter.dtype
