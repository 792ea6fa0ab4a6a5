"""Adapters beside a frozen base: transformers' gradients, the same in every layout, checkpoints of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import make_role, make_samples, published, role_config, train
from tests.distributed.test_role import LAYOUTS, LOSS, NORM, WEIGHT

RANK, ALPHA = 4, 8.0
ADAPTER: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}
SOME = {**ADAPTER, "targets": ["v_proj", "o_proj", "up_proj"]}  # of each fused layer a part


def adapted(layout: dict[str, Any], adapter: Any = None, **overrides: Any) -> Any:
    training = {"adapter": adapter or ADAPTER, **overrides.pop("training", {})}
    return role_config(layout=layout, training=training, **overrides)


def adapter_role(config: Any, seed: int = 3) -> Any:
    """A role whose B is not 0, so that A too has a gradient, alike in every layout. Collective."""
    from genac_megatron.publication.digest import know_base

    role = make_role("actor", config, torch.distributed.get_world_size(), seed)
    for part in (p for model in role.models for p in model.adapters.parts):
        for name, b in zip(part.place.projections, part.B, strict=True):
            digest = hashlib.sha256(name.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            tp = part.group.size() if part.place.column else 1
            whole = torch.randn(len(b) * tp, RANK, generator=generator) * 0.1
            b.data.copy_(whole.chunk(tp)[part.group.rank() if part.place.column else 0])
    know_base(role)
    return role


def base_of(role: Any) -> dict[str, torch.Tensor]:
    """Collective: the base's weights by their Hugging Face names."""
    from genac_megatron.publication.publisher import Publisher
    from tests.distributed.cases import Collected

    sink = Collected()
    Publisher(role, [sink], 1 << 14, base=True).publish(1)
    return sink.tensors


def adapter_case(rank: int, config: Any) -> Any:
    role = adapter_role(config)
    before, digest = base_of(role), role.base
    role.begin_stage(None, 10)
    first = role.logprobs(make_samples(7, 5), temperature=0.8)
    figures = train(role, 3)
    after = base_of(role)
    return {
        "before": first,
        "figures": figures,
        "weights": published(role),
        "base": before,
        "digest": digest,
        "untouched": all(torch.equal(after[name], weight) for name, weight in before.items()),
        "last": role.logprobs(make_samples(7, 5), temperature=0.8),
    }


CP = {"cp2": {"count": 2, "cp": 2}}
CASES = {
    "qwen3": {},
    "some": {"adapter": SOME},
    "llama": {"family": "llama", "tie": False},
    "qwen2": {"family": "qwen2"},  # biases of queries, keys and values
    "dropout": {"adapter": {**ADAPTER, "dropout": 0.2}},
}


@pytest.fixture(scope="module")
def reference(pool: Any) -> Any:
    """One rank, no parallelism; made when first asked for."""
    made: dict[str, Any] = {}

    def get(case: str) -> Any:
        if case not in made:
            made[case] = pool.run(adapter_case, adapted({"count": 1}, **CASES[case]))[0]
        return made[case]

    return get


@pytest.mark.parametrize(
    ("case", "layout", "recompute"),
    [
        *(("qwen3", name, "off") for name in ("dp2", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "tp2-pp2")),
        ("qwen3", "tp2-sp", "full"),
        ("qwen3", "pp2-dp2", "full"),
        ("some", "tp2-sp", "off"),
        ("llama", "tp2-pp2", "off"),
        ("qwen2", "tp2-offset", "off"),
        ("dropout", "tp2-sp", "full"),
        ("dropout", "tp2-pp2", "off"),
        ("dropout", "cp2", "off"),
    ],
)
def test_a_layout_trains_adapters_like_one_rank(
    pool: Any, reference: Any, case: str, layout: str, recompute: str
) -> None:
    wanted = reference(case)
    config = adapted({**LAYOUTS, **CP}[layout], training={"recompute": recompute}, **CASES[case])
    for got in pool.run(adapter_case, config):
        assert got["untouched"]
        assert got["digest"] == wanted["digest"]
        for key in ("before", "last"):
            for mine, theirs in zip(got[key], wanted[key], strict=True):
                assert mine == pytest.approx(theirs, abs=LOSS * (1 if key == "before" else 5))
        for (loss, norm), (loss_ref, norm_ref) in zip(got["figures"], wanted["figures"], strict=True):
            assert loss == pytest.approx(loss_ref, abs=LOSS)
            assert norm == pytest.approx(norm_ref, rel=NORM)
        for name, weight in wanted["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, atol=WEIGHT, rtol=0, msg=name)


@pytest.mark.parametrize("case", ["qwen3", "some"])
def test_targets_alone_differ_from_the_base(reference: Any, case: str) -> None:
    """Three steps of Adam move every target, and nothing else."""
    targets = CASES[case].get("adapter", {}).get("targets") or [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    got = reference(case)
    for name, weight in got["weights"].items():
        assert torch.equal(weight, got["base"][name]) != (name.split(".")[-2] in targets), name
    assert got["figures"][-1][0] != got["figures"][0][0]


# --- against transformers ------------------------------------------------------------------------


def gradient_case(rank: int, config: Any) -> Any:
    """The adapters, their gradients and log-probs, on one rank; the base by its Hugging Face names."""
    from genac_megatron.algorithms.losses import make_sft_loss

    role = adapter_role(config)
    base = base_of(role)
    role.begin_stage(None, 10)
    role.gradient(make_samples(4, 77), make_sft_loss())
    found: dict[str, Any] = {}
    for part in (p for model in role.models for p in model.adapters.parts):
        a, da = part.A.detach().split(RANK), part.A.main_grad.split(RANK)
        for index, name in enumerate(part.place.projections):
            found[name] = (a[index], part.B[index].detach(), da[index], part.B[index].main_grad)
    found = {name: [x.clone() for x in tensors] for name, tensors in found.items()}
    return base, found, role.logprobs(make_samples(4, 77))


@pytest.mark.parametrize("case", [case for case in CASES if case != "dropout"])
def test_gradients_are_those_of_whole_weights_in_transformers(pool: Any, case: str) -> None:
    """Autograd through W + scale B A in transformers' model; fp32 sums in another order."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from genac_megatron.models.registry import hf_config, shape_of

    config = adapted({"count": 1}, **CASES[case])
    base, found, logprobs = pool.run(gradient_case, config)[0]
    fields = dict(hf_config(shape_of(config.model, 67)))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=torch.float32
    )
    leaves = {name: [x.requires_grad_() for x in tensors[:2]] for name, tensors in found.items()}
    whole = dict(base)
    for name, (a, b) in leaves.items():
        whole[f"{name}.weight"] = base[f"{name}.weight"] + ALPHA / RANK * b @ a
    loss = torch.zeros(())
    for sample, mine in zip(make_samples(4, 77), logprobs, strict=True):
        inputs = (torch.tensor([sample.tokens[:-1]]),)
        logits = torch.func.functional_call(model, whole, inputs).logits[0]
        labels = torch.tensor(sample.tokens[1:])[:, None]
        logp = logits.log_softmax(-1).gather(1, labels)[sample.start - 1 :, 0]
        assert mine == pytest.approx(logp.tolist(), abs=LOSS)
        loss = loss - (torch.tensor(sample.fields["weights"]) * logp).sum()
    for name, (a, b) in leaves.items():
        wanted = torch.autograd.grad(loss, [a, b], retain_graph=True)
        for got, want in zip(found[name][2:], wanted, strict=True):
            assert want.abs().max() > 1e-4  # it says something
            torch.testing.assert_close(got, want, atol=LOSS, rtol=0, msg=name)


# --- checkpoints ---------------------------------------------------------------------------------


def saved(rank: int, folder: str, config: Any) -> Any:
    from genac_megatron.training.checkpoint import Checkpoints

    role = adapter_role(config)
    role.begin_stage(None, 10)
    train(role, 2)
    Checkpoints(Path(folder), 2, False).save("ppo-00002", {"actor": role}, {})
    return train(role, 2, 2), published(role)


def resumed(rank: int, folder: str, config: Any, seed: int = 3) -> Any:
    """A role that begins anew, as a resumed run does: the recipe's base, the checkpoint's adapters."""
    from genac_megatron.publication.digest import know_base
    from genac_megatron.training.checkpoint import load_checkpoint

    role = make_role("actor", config, torch.distributed.get_world_size(), seed)
    if config.training.adapter is not None:
        know_base(role)
    load_checkpoint(Path(folder) / "ppo-00002", {"actor": role})
    role.begin_stage(None, 10)
    load_checkpoint(Path(folder) / "ppo-00002", {"actor": role}, optimizers=True)
    return train(role, 2, 2), published(role)


TP2_PP2 = {"tp": 2, "pp": 2}


@pytest.mark.parametrize(
    "training",
    [{}, {"dtype": "bf16"}, {"distributed_optimizer": False}, {"dropout": 0.2}],
    ids=["fp32", "bf16", "replicated", "dropout"],
)
def test_a_resumed_run_goes_on_byte_for_byte(pool: Any, tmp_path: Path, training: Any) -> None:
    rest = {key: value for key, value in training.items() if key != "dropout"}
    config = adapted(TP2_PP2, {**ADAPTER, "dropout": training.get("dropout", 0.0)}, training=rest)
    figures, weights = pool.run(saved, str(tmp_path), config)[0]
    again, same = pool.run(resumed, str(tmp_path), config)[0]
    assert again == figures
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
    manifest = json.loads((tmp_path / "ppo-00002" / "manifest.json").read_text())
    found = manifest["adapters"]["actor"]
    assert (found["rank"], found["alpha"], len(found["targets"]), len(found["base"])) == (4, 8.0, 7, 32)


@pytest.fixture(scope="module")
def checkpoint(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of tp2-pp2, and what two more steps made of it."""
    folder = tmp_path_factory.mktemp("adapter")
    return folder, *pool.run(saved, str(folder), adapted(TP2_PP2))[0]


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vpp2", "dp2"])
def test_it_goes_on_in_another_layout(pool: Any, checkpoint: Any, layout: str) -> None:
    folder, figures, weights = checkpoint
    again, same = pool.run(resumed, str(folder), adapted(LAYOUTS[layout]))[0]
    for (loss, norm), (loss_ref, norm_ref) in zip(again, figures, strict=True):
        assert loss == pytest.approx(loss_ref, abs=LOSS)
        assert norm == pytest.approx(norm_ref, rel=NORM)
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, atol=WEIGHT, rtol=0, msg=name)


def test_a_checkpoint_holds_adapters_alone(checkpoint: Any) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    keys = FileSystemReader(checkpoint[0] / "ppo-00002" / "weights").read_metadata().state_dict_metadata
    mine = [key for key in keys if key.startswith("actor.")]
    assert all(key.startswith("actor.adapters.") for key in mine)
    assert len(mine) == 4 * (4 + 7)  # layers: an A of each linear layer, a B of each projection
    assert not [key for key in keys if "word_embeddings" in key or "linear_fc1.weight" in key]


def refused(rank: int, folder: str, config: Any, seed: int) -> str:
    from genac_megatron.errors import InputError

    try:
        resumed(rank, folder, config, seed)
    except InputError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(
    ("change", "seed", "words"),
    [
        ({}, 4, ("an adapter beside another base", "roles.actor.model (hf, base or init_seed)")),
        ({"training": {"dtype": "bf16"}}, 3, ("an adapter beside another base", "training.dtype")),
        ({"adapter": {**ADAPTER, "rank": 8}}, 3, ("rank 4 (the recipe: 8)", "roles.actor.training.adapter")),
        ({"adapter": SOME}, 3, ("another adapter: targets [", "roles.actor.training.adapter")),
    ],
    ids=["base", "dtype", "rank", "targets"],
)
def test_another_base_or_adapter_is_refused(
    pool: Any, checkpoint: Any, change: Any, seed: int, words: tuple[str, str]
) -> None:
    for told in pool.run(refused, str(checkpoint[0]), adapted({"count": 2, "tp": 2}, **change), seed):
        assert all(word in told for word in (*words, "ppo-00002")), told


def test_a_whole_model_is_no_adapter_and_an_adapter_none(pool: Any, checkpoint: Any, tmp_path: Path) -> None:
    told = pool.run(refused, str(checkpoint[0]), role_config(layout={"count": 1}), 3)[0]
    words = "is an adapter of rank 4 beside a base", "genac convert to-hf"
    assert all(word in told for word in words), told
    pool.run(whole_saved, str(tmp_path))
    told = pool.run(refused, str(tmp_path), adapted({"count": 1}), 3)[0]
    assert all(word in told for word in ("is a whole model", "roles.actor.model.base")), told


def whole_saved(rank: int, folder: str) -> Any:
    from genac_megatron.training.checkpoint import Checkpoints

    role = make_role("actor", role_config(layout={"tp": 2}), 4, seed=5)
    role.begin_stage(None, 10)
    train(role, 1)
    Checkpoints(Path(folder), 2, False).save("ppo-00002", {"actor": role}, {})
    return published(role)


def begun_beside(rank: int, folder: str) -> Any:
    """An adapter beside the weights of a whole model's checkpoint."""
    from genac_megatron.training.checkpoint import load_base

    role = make_role("actor", adapted({"count": 2, "pp": 2}), 4)
    load_base(Path(folder) / "ppo-00002", role, "actor")
    return base_of(role), published(role)


def test_a_whole_models_checkpoint_is_a_base(pool: Any, tmp_path: Path) -> None:
    whole = pool.run(whole_saved, str(tmp_path))[0]
    base, began = pool.run(begun_beside, str(tmp_path))[0]
    for name, weight in whole.items():
        assert torch.equal(base[name], weight), name
        assert torch.equal(began[name], weight), name  # B is 0
