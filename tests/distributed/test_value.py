"""A scalar critic: the same in every layout, in transformers, through checkpoints, and from a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import make_role, make_samples, published, role_config
from tests.distributed.test_role import LAYOUTS, LOSS, NORM, WEIGHT

CHOSEN = ("dp2", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "tp2-pp2", "tp2-offset")


def value_config(**overrides: Any) -> Any:
    config = role_config(**overrides)
    return config.model_copy(update={"model": config.model.model_copy(update={"head": "value"})})


def value_samples(count: int, seed: int) -> list[Any]:
    """Every second one is trained at its last token alone, as SP3O's are at a few."""
    samples = make_samples(count, seed)
    for number, sample in enumerate(samples):
        fields = sample.fields
        if number % 2:
            fields["weights"] = [0.0] * (sample.trained - 1) + fields["weights"][-1:]
        fields["targets"] = [float(len(sample.tokens) % 2)] * sample.trained
        fields["old"] = [0.1] * sample.trained
        del fields["advantages"], fields["behaviour"]
    return samples


def train_values(role: Any, steps: int, first: int = 0) -> list[tuple[float, float]]:
    from genac_megatron.algorithms.losses import make_value_loss

    figures = []
    for step in range(first, first + steps):
        result = role.train_step(value_samples(11, 100 + step), make_value_loss(0.5))
        figures.append((result.stats["loss"], result.stats["grad_norm"]))
    return figures


def value_case(rank: int, config: Any) -> Any:
    role = make_role("critic", config, torch.distributed.get_world_size())
    role.begin_stage(None, 10)
    before = role.values(make_samples(7, 5))
    return {"before": before, "figures": train_values(role, 3), "weights": published(role)}


@pytest.fixture(scope="module")
def reference(pool: Any) -> Any:
    return pool.run(value_case, value_config(layout={"count": 1}))[0]


def test_it_learns(reference: Any) -> None:
    losses = [loss for loss, _ in reference["figures"]]
    assert losses[-1] < losses[0]
    assert {"score.weight", "score.bias"} < reference["weights"].keys()
    assert "lm_head.weight" not in reference["weights"]


@pytest.mark.parametrize("layout", CHOSEN)
def test_a_layout_trains_like_one_rank(pool: Any, reference: Any, layout: str) -> None:
    for result in pool.run(value_case, value_config(layout=LAYOUTS[layout])):
        for mine, theirs in zip(result["before"], reference["before"], strict=True):
            assert mine == pytest.approx(theirs, abs=LOSS)
        for (loss, norm), (loss_ref, norm_ref) in zip(result["figures"], reference["figures"], strict=True):
            assert loss == pytest.approx(loss_ref, abs=LOSS)
            assert norm == pytest.approx(norm_ref, rel=NORM)
        for name, weight in reference["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, atol=WEIGHT, rtol=0, msg=name)


def test_transformers_gives_the_same_values(pool: Any, reference: Any) -> None:
    """Values of about 1, sums of 32 products in fp32 in another order: 1e-5."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    from genac_megatron.models.registry import hf_config, shape_from_hf, shape_of

    shape = shape_of(value_config().model, 67)
    description = hf_config(shape)
    assert shape_from_hf(description) == shape
    config = AutoConfig.for_model(**description)
    model = AutoModelForTokenClassification.from_config(config).eval()
    untrained = pool.run(untrained_weights)[0]
    model.load_state_dict(untrained)
    for sample, values in zip(make_samples(7, 5), reference["before"], strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([sample.tokens])).logits[0, :, 0]
        # The value for token t is read at t - 1: from the prefix strictly before it.
        assert values == pytest.approx(wanted[sample.start - 1 : -1].tolist(), abs=1e-5)


# --- frozen attention (SAO) ----------------------------------------------------------------------


def frozen_config(layout: dict[str, Any], **training: Any) -> Any:
    return value_config(layout=layout, training={"frozen_attention": True, **training})


def is_attention(name: str) -> bool:
    return ".self_attn." in name or ".input_layernorm." in name


@pytest.fixture(scope="module")
def frozen(pool: Any) -> Any:
    return pool.run(value_case, frozen_config({"count": 1}))[0]


def test_frozen_attention_stays_as_it_began_and_the_rest_learns(
    pool: Any, frozen: Any, reference: Any
) -> None:
    began = pool.run(untrained_weights)[0]
    for name, weight in frozen["weights"].items():
        assert torch.equal(weight, began[name]) == is_attention(name), name
    norms = [[norm for _, norm in one["figures"]] for one in (frozen, reference)]
    assert norms[0][0] < norms[1][0]  # nothing of attention's gradient is in it
    assert frozen["figures"][-1][0] < frozen["figures"][0][0]


@pytest.mark.parametrize("layout", CHOSEN)
def test_frozen_attention_is_the_same_in_every_layout(pool: Any, frozen: Any, layout: str) -> None:
    for result in pool.run(value_case, frozen_config(LAYOUTS[layout])):
        for (loss, norm), (loss_ref, norm_ref) in zip(result["figures"], frozen["figures"], strict=True):
            assert loss == pytest.approx(loss_ref, abs=LOSS)
            assert norm == pytest.approx(norm_ref, rel=NORM)
        for name, weight in frozen["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, atol=WEIGHT, rtol=0, msg=name)


@pytest.mark.parametrize("distributed", [True, False])
def test_frozen_attention_is_saved_and_goes_on_in_another_layout(
    pool: Any, tmp_path: Path, distributed: bool
) -> None:
    training = {"frozen_attention": True, "distributed_optimizer": distributed}
    figures, weights = pool.run(saved, str(tmp_path), {"count": 2, "tp": 2}, training)[0]
    again, same = pool.run(resumed, str(tmp_path), {"count": 2, "pp": 2}, training)[0]
    for (loss, norm), (loss_ref, norm_ref) in zip(again, figures, strict=True):
        assert loss == pytest.approx(loss_ref, abs=LOSS)
        assert norm == pytest.approx(norm_ref, rel=NORM)
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, atol=WEIGHT, rtol=0, msg=name)


def untrained_weights(rank: int) -> Any:
    return published(make_role("critic", value_config(layout={"count": 1}), 4))


def saved(rank: int, folder: str, layout: dict[str, Any], training: dict[str, Any] | None = None) -> Any:
    from genac_megatron.training.checkpoint import Checkpoints

    role = make_role(
        "critic", value_config(layout=layout, training=training or {}), torch.distributed.get_world_size()
    )
    role.begin_stage(None, 10)
    train_values(role, 2)
    Checkpoints(Path(folder), 2, False).save("value-00002", {"critic": role}, {})
    return train_values(role, 2, 2), published(role)


def resumed(rank: int, folder: str, layout: dict[str, Any], training: dict[str, Any] | None = None) -> Any:
    from genac_megatron.training.checkpoint import load_checkpoint

    role = make_role(
        "critic",
        value_config(layout=layout, training=training or {}),
        torch.distributed.get_world_size(),
        seed=8,
    )
    load_checkpoint(
        Path(folder) / "value-00002", {"critic": role}
    )  # as runs do: frozen weights are in it alone
    role.begin_stage(None, 10)
    load_checkpoint(Path(folder) / "value-00002", {"critic": role}, optimizers=True)
    return train_values(role, 2, 2), published(role)


def test_a_checkpoint_of_tp2_goes_on_with_pp2(pool: Any, tmp_path: Path) -> None:
    figures, weights = pool.run(saved, str(tmp_path), {"count": 2, "tp": 2})[0]
    again, same = pool.run(resumed, str(tmp_path), {"count": 2, "pp": 2})[0]
    for (loss, norm), (loss_ref, norm_ref) in zip(again, figures, strict=True):
        assert loss == pytest.approx(loss_ref, abs=LOSS)
        assert norm == pytest.approx(norm_ref, rel=NORM)
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, atol=WEIGHT, rtol=0, msg=name)


def copied(rank: int) -> Any:
    from genac_megatron.publication.publisher import Publisher, RoleSink

    actor = make_role("actor", role_config(layout={"tp": 2}), 4)
    critic = make_role("critic", value_config(layout={"pp": 2}), 4, seed=9)
    Publisher(actor, [RoleSink(critic)]).publish(0)
    return published(actor), published(critic)


def test_it_starts_from_a_language_models_body_with_a_head_of_its_own(pool: Any) -> None:
    actor, critic = pool.run(copied)[0]
    assert critic.keys() - actor.keys() == {"score.weight", "score.bias"}
    for name in actor:
        assert torch.equal(actor[name], critic[name]), name
    assert critic["score.weight"].abs().sum() > 0


def begun_from_a_language_model(rank: int, folder: str) -> Any:
    from genac_megatron.training.checkpoint import Checkpoints, load_checkpoint

    model = make_role("critic", role_config(layout={"tp": 2}), 4)
    model.begin_stage(None, 10)
    Checkpoints(Path(folder), 2, False).save("sft-end", {"critic": model}, {})
    critic = make_role("critic", value_config(layout={"pp": 2}), 4, seed=9)
    head = published(critic)["score.weight"]
    load_checkpoint(Path(folder) / "sft-end", {"critic": critic})
    return published(model), published(critic), head


def test_it_starts_from_a_language_models_checkpoint(pool: Any, tmp_path: Path) -> None:
    model, critic, head = pool.run(begun_from_a_language_model, str(tmp_path))[0]
    assert critic.keys() - model.keys() == {"score.weight", "score.bias"}
    assert all(torch.equal(model[name], critic[name]) for name in model)
    assert torch.equal(critic["score.weight"], head)
