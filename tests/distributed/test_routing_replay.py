"""Routing replay with a tiny Qwen3-MoE: the trainer computes with the experts that it is given.

The reference is transformers' model with its routers' choice overwritten, its gates over them computed anew.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.cases import make_role, make_samples, published, role_config
from tests.distributed.test_moe import EXPERTS, FAMILY, assert_same

# Log-probs of one sequence in fp32 by two implementations: measured at most 2e-6.
FP32 = 2e-5
LAYERS, TOP_K = 4, 2

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": {"count": 2, "ep": 2},
    "tp2-sp": {"count": 2, "tp": 2},
    "tp2-ep4": {"tp": 2, "ep": 4},
    "pp2": {"count": 2, "pp": 2},
    "pp2-vpp2-ep2": {"pp": 2, "vpp": 2, "ep": 2},
}
# So that stages have micro-batches of other experts between one's passes, with two data-parallel ranks too.
SMALL = {"tokens_per_microbatch": 48}


def perturbed(samples: list[Any], seed: int = 7, share: float = 1.0) -> list[Any]:
    """The samples, `share` of them with random experts, two different ones per token and layer."""
    rng = random.Random(seed)
    for sample in samples:
        if rng.random() < share:
            pairs = [
                rng.sample(range(EXPERTS["experts"]), TOP_K) for _ in range((len(sample.tokens) - 1) * LAYERS)
            ]
            sample.experts = np.array(pairs, np.uint8).reshape(-1, LAYERS, TOP_K)
    return samples


def reference(role: Any) -> Any:
    """transformers' model with the role's weights. Collective."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from genac_megatron.models.registry import hf_config
    from genac_megatron.serving.experts import by_file_names

    fields = dict(hf_config(role.shape))
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = by_file_names(dict(model.named_parameters()))
    weights = published(role)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])
    return model


@contextmanager
def forced(model: Any, experts: Any) -> Any:
    """Its routers choose these experts [tokens, layers, top-k]; gates: softmax over the chosen."""
    from genac_megatron.serving.experts import routers

    def hook(layer: int) -> Any:
        def choose(_module: Any, _inputs: Any, output: Any) -> Any:
            chosen = torch.from_numpy(experts[:, layer].astype("int64"))
            return output[0], output[0].gather(1, chosen).softmax(-1), chosen

        return choose

    with ExitStack() as stack:
        for layer, router in enumerate(routers(model)):
            stack.callback(router.register_forward_hook(hook(layer)).remove)
        yield


def transformers_logprobs(model: Any, sample: Any) -> list[float]:
    """Log-probs of the trained tokens with the sample's experts."""
    with torch.no_grad(), forced(model, sample.experts):
        logits = model(torch.tensor([sample.tokens[:-1]])).logits[0]
    found = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens[1:])[:, None])[:, 0]
    return found[sample.start - 1 :].tolist()


def forced_case(rank: int, layout: dict[str, Any]) -> Any:
    role = make_role("actor", role_config(layout=layout, **FAMILY), torch.distributed.get_world_size())
    samples = perturbed(make_samples(7, 5))
    mine, free = role.logprobs(samples), role.logprobs(make_samples(7, 5))
    model = reference(role)
    return mine, [transformers_logprobs(model, sample) for sample in samples], free


@pytest.mark.parametrize("layout", [{"count": 1}, *LAYOUTS.values()], ids=["one", *LAYOUTS])
def test_the_trainer_computes_with_the_experts_it_is_given(layout: dict[str, Any], pool: Any) -> None:
    mine, wanted, free = pool.run(forced_case, layout)[0]
    for got, theirs, own in zip(mine, wanted, free, strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(theirs), atol=FP32, rtol=FP32)
        assert (torch.tensor(got) - torch.tensor(own)).abs().max() > 0.01  # other experts, other log-probs


def own_choices(role: Any, samples: list[Any]) -> None:
    """Give the samples what the role's routers choose by themselves. One rank, one layer after the other."""
    for sample in samples:
        chosen: list[Any] = []
        layers = role.models[0].decoder.layers
        hooks = [
            layer.mlp.router.register_forward_hook(lambda _m, _i, out, c=chosen: c.append(out[1]))
            for layer in layers
        ]
        role.logprobs([sample])
        for hook in hooks:
            hook.remove()
        indices = [maps.nonzero()[:, 1].view(-1, TOP_K) for maps in chosen]
        sample.experts = torch.stack(indices, dim=1).numpy().astype(np.uint8)


def own_case(rank: int) -> Any:
    role = make_role("actor", role_config(layout={"count": 1}, **FAMILY), torch.distributed.get_world_size())
    if rank:  # the role is on rank 0 alone; the others share its results
        samples = make_samples(7, 5)
        for sample in samples:
            role.logprobs([sample])
        return role.logprobs(samples), role.logprobs(samples)
    samples = make_samples(7, 5)
    own_choices(role, samples)
    return role.logprobs(make_samples(7, 5)), role.logprobs(samples)


def test_a_replay_of_the_trainers_own_choices_changes_no_bit(pool: Any) -> None:
    free, replayed = pool.run(own_case)[0]
    assert free == replayed  # of two gates only the order differs, and a + b is b + a


def replay_steps(role: Any, steps: int = 2) -> list[tuple[float, float]]:
    from genac_megatron.algorithms.losses import make_ppo_loss
    from genac_megatron.recipe.schema import LossConfig

    loss = make_ppo_loss(LossConfig(entropy_coef=0.01))
    figures = []
    for step in range(steps):
        samples = perturbed(make_samples(11, 100 + step), seed=step, share=0.7)  # some have no experts
        result = role.train_step(samples, loss, temperature=0.8, with_entropy=True)
        figures.append((result.stats["loss"], result.stats["grad_norm"]))
    return figures


def step_case(rank: int, config: Any) -> Any:
    role = make_role("actor", config, torch.distributed.get_world_size())
    role.begin_stage(None, 10)
    before = role.logprobs(perturbed(make_samples(7, 5), share=0.7), temperature=0.8)
    figures = replay_steps(role)
    return {"before": before, "figures": figures, "weights": published(role)}


@pytest.fixture(scope="module")
def one_rank(pool: Any) -> Any:
    return pool.run(step_case, role_config(layout={"count": 1}, **FAMILY))[0]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_replayed_steps_are_the_same_in_every_layout(name: str, pool: Any, one_rank: Any) -> None:
    training = SMALL if "pp" in LAYOUTS[name] else {}
    for result in pool.run(step_case, role_config(layout=LAYOUTS[name], training=training, **FAMILY)):
        assert_same(result, one_rank)


@pytest.mark.parametrize("layout", [{"count": 1}, {"pp": 2, "vpp": 2, "ep": 2}], ids=["one", "pp2-vpp2-ep2"])
def test_recomputation_takes_the_same_experts(layout: Any, pool: Any, one_rank: Any) -> None:
    """1F1B recomputes one micro-batch between the passes of others: each must meet its own experts."""
    config = role_config(layout=layout, training={"recompute": "full", **SMALL}, **FAMILY)
    assert_same(pool.run(step_case, config)[0], one_rank)


def test_experts_of_a_batch_are_gone_with_it(pool: Any) -> None:
    """A step without replay after one with it, on the same role, is a free one."""
    assert pool.run(after_case)[0] == pool.run(untouched_case)[0]


def after_case(rank: int) -> Any:
    role = make_role("actor", role_config(layout={"count": 1}, **FAMILY), torch.distributed.get_world_size())
    role.logprobs(perturbed(make_samples(7, 5)))
    return role.logprobs(make_samples(7, 5))


def untouched_case(rank: int) -> Any:
    role = make_role("actor", role_config(layout={"count": 1}, **FAMILY), torch.distributed.get_world_size())
    return role.logprobs(make_samples(7, 5))


# --- an engine's choices -----------------------------------------------------------------------------


def sampled(role: Any, dtype: str, count: int = 8, new: int = 24) -> list[Any]:
    """What the embedded engine samples with the role's weights, with its experts. Collective."""
    from genac_megatron.models.registry import hf_config
    from genac_megatron.publication.publisher import Publisher
    from genac_megatron.recipe.schema import EngineConfig
    from genac_megatron.records import Request, SamplingParams
    from genac_megatron.serving.embedded import EmbeddedEngine
    from genac_megatron.stages.parity import engine_sample

    engine = EmbeddedEngine(hf_config(role.shape), EngineConfig(dtype=dtype, routing_replay=True), "cpu")
    Publisher(role, [engine]).publish(1)
    rng = random.Random(4)
    prompts = [tuple(rng.randrange(67) for _ in range(rng.randint(2, 12))) for _ in range(count)]

    async def all_of_them() -> Any:
        asked = (engine.complete(Request(ids, SamplingParams(new), seed)) for seed, ids in enumerate(prompts))
        return await asyncio.gather(*asked)

    completions = asyncio.run(all_of_them())
    return [engine_sample(ids, done) for ids, done in zip(prompts, completions, strict=True)]


def engine_case(rank: int, layout: dict[str, Any], dtype: str, count: int = 8, new: int = 24) -> Any:
    config = role_config(layout=layout, training={"dtype": dtype}, **FAMILY)
    role = make_role("actor", config, torch.distributed.get_world_size())
    samples = sampled(role, dtype, count, new)
    replayed = role.logprobs(samples)
    experts = [sample.experts for sample in samples]
    for sample in samples:
        sample.experts = None
    return {
        "experts": experts,
        "engine": [sample.fields["behaviour"] for sample in samples],
        "replayed": replayed,
        "free": role.logprobs(samples),
    }


@pytest.fixture(scope="module")
def one_with_engine(pool: Any) -> Any:
    return pool.run(engine_case, {"count": 1}, "fp32")[0]


@pytest.mark.parametrize("name", ["ep2", "tp2-ep4", "pp2"])
def test_an_engines_choices_give_its_logprobs_in_every_layout(
    name: str, pool: Any, one_with_engine: Any
) -> None:
    one = one_with_engine
    spread = pool.run(engine_case, LAYOUTS[name], "fp32")[0]
    close = {"atol": FP32, "rtol": FP32}
    for mine, theirs, engine in zip(spread["replayed"], one["replayed"], one["engine"], strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), **close)
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(engine), **close)
    for mine, theirs in zip(spread["experts"], one["experts"], strict=True):
        assert (mine == theirs).all()


def test_replay_brings_trainer_and_engine_nearer_in_bf16(pool: Any) -> None:
    """Rounding flips nearly tied experts; what is left with replay is the rounding itself."""
    done = pool.run(engine_case, {"count": 1}, "bf16", 32, 64)[0]
    engine = np.concatenate([np.array(x) for x in done["engine"]])
    gaps = {name: np.abs(np.concatenate(done[name]) - engine) for name in ("replayed", "free")}
    print({name: (gap.mean(), np.quantile(gap, 0.99), gap.max()) for name, gap in gaps.items()})
    assert np.quantile(gaps["replayed"], 0.99) < 0.8 * np.quantile(gaps["free"], 0.99)
    assert gaps["replayed"].max() < gaps["free"].max()


def wrong_case(rank: int) -> Any:
    from genac_megatron.errors import InputError

    role = make_role("actor", role_config(layout={"count": 1}, **FAMILY), torch.distributed.get_world_size())
    if rank:
        return []
    said = []
    rows = len(make_samples(1, 5)[0].tokens) - 1
    for shape, value in (((rows, LAYERS, 3), 0), ((rows, LAYERS, TOP_K), 4), ((rows - 1, LAYERS, TOP_K), 0)):
        (sample,) = make_samples(1, 5)
        sample.experts = np.full(shape, value, np.uint8)
        with pytest.raises(InputError) as error:
            role._packs(role.take([sample]))
        said.append(str(error.value))
    return said


def test_experts_that_the_model_does_not_have_are_named(pool: Any) -> None:
    said = pool.run(wrong_case)[0]
    assert "(4, 3) layers and choices, the model 4 of (4, 2)" in said[0]
    assert "experts up to 4" in said[1]
    assert "experts of sample 0 have shape" in said[2]
