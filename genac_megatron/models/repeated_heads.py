"""Self-attention whose tensor-parallel ranks outnumber the key-value heads, so that none holds a whole one.

Megatron-core cuts the fused projection in equal rows, gathers its outputs and has each rank pick its head: by
its global state's group, which is of no role here.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from genac_megatron.errors import GenacError


class RepeatedHeads(SelfAttention):
    """Megatron's, over the role's own tensor-parallel group. tp is a multiple of the key-value heads."""

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """Queries [s, b, heads / tp, d], key and value [s, b, 1, d] of this rank's head."""
        if output_gate or not split_qkv:
            raise GenacError("queries with a gate or an unsplit projection are not cut over tp > kv_heads")
        mixed, _ = self.linear_qkv(hidden_states)
        mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.tp_group)
        heads, d = self.config.num_query_groups, self.hidden_size_per_attention_head
        head, place = divmod(self.tp_group.rank(), self.tp_group.size() // heads)
        own = mixed.chunk(heads, dim=-1)[head].unflatten(-1, (-1, d))
        query, key, value = own.split([own.size(-2) - 2, 1, 1], dim=-2)
        query = query.chunk(self.tp_group.size() // heads, dim=-2)[place]
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value
