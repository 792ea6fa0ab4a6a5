"""What Transformer Engine's attention is handed under context parallelism, with a stand-in for it.

Not run on a GPU: Megatron's own TEDotProductAttention and packed rotary embeddings run here, over gloo.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

from tests.distributed.cases import make_role, make_samples, published, role_config, train, train_case
from tests.distributed.pool import Pool
from tests.distributed.test_role import check


def contract_case(rank: int, layout: dict[str, Any]) -> Any:
    """`train_case` with Megatron's attention for Transformer Engine in our place. Spoils the process."""
    from tests.distributed import te_stand_in

    te_stand_in.install()
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    from genac_megatron.models import specs

    ours, specs.SDPACoreAttention = specs.SDPACoreAttention, TEDotProductAttention  # type: ignore[misc,assignment]
    try:
        role = make_role("actor", role_config(layout=layout), 4)
        for model in role.models:
            model.specs = "te"  # Megatron rotates queries and keys
        role.begin_stage(None, 10)
        before = role.logprobs(make_samples(7, 5), temperature=0.8)
        got = {"before": before, "figures": train(role, 3), "weights": published(role)}
    finally:
        specs.SDPACoreAttention = ours  # type: ignore[misc]
    return got, te_stand_in.RECORD


def test_packs_are_what_the_ring_asks_for_with_a_stand_in_for_transformer_engine(pool: Any) -> None:
    wanted = pool.run(train_case, role_config(layout={"count": 1}))[0]
    with closing(Pool()) as spoilt:
        for got, record in spoilt.run(contract_case, {"count": 4, "tp": 2, "cp": 2}):
            check(got, wanted)
            assert record["cp_comm_type"] == "p2p"
            assert record["calls"] > 0
