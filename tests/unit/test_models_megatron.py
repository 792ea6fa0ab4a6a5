"""The Megatron model against transformers on the same weights; its log-probs against its own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from genac_megatron.errors import InputError
from genac_megatron.models.build import RoleModel, build_model
from genac_megatron.models.families.base import Shape
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import hf_config, shape_from_hf, shape_of
from genac_megatron.models.sizes import hf_names
from genac_megatron.recipe.schema import ModelConfig, ModelShape, TrainingConfig
from genac_megatron.training.layout import Layout, init_world

LENGTHS = [1, 17, 40, 3, 64]
# Of the largest logit. Measured: at most 6e-7 (fp32 rounding in another order of operations).
TOLERANCE = 1e-5


def make_shape(family: str, tie: bool, **changes: Any) -> Shape:
    sizes: dict[str, Any] = {
        "layers": 3, "hidden": 48, "ffn": 80, "heads": 6, "kv_heads": 2, "head_dim": 16, "vocab": 101,
        "tie_embeddings": tie, "rope_theta": 5000.0, "init_std": 0.2, "max_positions": 128,
    }  # fmt: skip
    return shape_of(ModelConfig(family=family, shape=ModelShape(**sizes | changes)), 101)


def get_tensor(shape: Shape, seed: int = 1) -> Any:
    """Random weights in which norms and biases matter too."""
    plain = random_weights(shape, seed)

    def get(name: str) -> Tensor:
        tensor = plain(name)
        if tensor.ndim == 1:
            generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
            tensor = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        return tensor

    return get


def megatron_model(shape: Shape, **training: Any) -> RoleModel:
    init_world()
    layout = Layout("test", 0, 1)
    groups = layout.groups()
    assert groups is not None
    (model,) = build_model(
        shape, layout, groups, TrainingConfig(**{"dtype": "fp32", "specs": "torch", **training})
    )
    load_hf_into([model], layout, shape, get_tensor(shape))
    return model


def hf_model(shape: Shape) -> Any:
    raw = hf_config(shape)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), attn_implementation="sdpa")
    assert type(model).__name__ == raw["architectures"][0]
    state = {name: get_tensor(shape)(name) for name in hf_names(shape)}
    if shape.tie:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)  # strict: our names are exactly transformers' names
    return model.eval()


def packed(lengths: list[int]) -> tuple[Tensor, Tensor, Any]:
    """tokens [1, T], positions [1, T], and the PackedSeqParams of sequences of these lengths."""
    from megatron.core.packed_seq_params import PackedSeqParams

    tokens = torch.randint(0, 101, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    return tokens, positions, params


def hf_logits(shape: Shape, tokens: Tensor) -> Tensor:
    """Each packed sequence by itself through transformers: [T, vocab]."""
    model = hf_model(shape)
    return torch.cat([model(part[None]).logits[0] for part in tokens[0].split(LENGTHS)])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_logits_are_those_of_transformers(family: str, tie: bool) -> None:
    shape = make_shape(family, tie)
    tokens, positions, pack = packed(LENGTHS)
    ours = megatron_model(shape).eval()(tokens, positions, None, packed_seq_params=pack)[0]
    theirs = hf_logits(shape, tokens)
    assert (ours - theirs).abs().max() / theirs.abs().max() < TOLERANCE


@torch.no_grad()
def test_llama3_rope_scaling_is_that_of_transformers() -> None:
    config = hf_config(make_shape("llama", True, max_positions=131072)) | {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5000.0, "factor": 16.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }
    }  # fmt: skip
    shape = shape_from_hf(config)
    assert shape.rope_factor == 16.0
    tokens, positions, pack = packed(LENGTHS)
    ours = megatron_model(shape).eval()(tokens, positions, None, packed_seq_params=pack)[0]
    theirs = hf_logits(shape, tokens)
    assert (ours - theirs).abs().max() / theirs.abs().max() < TOLERANCE


@torch.no_grad()
def test_a_plain_batch_gives_the_logits_of_a_pack() -> None:
    shape = make_shape("qwen3", True)
    model = megatron_model(shape).eval()
    tokens, positions, pack = packed([32, 32])
    plain = model(tokens.view(2, 32), positions.view(2, 32), None)
    torch.testing.assert_close(plain.flatten(0, 1), model(tokens, positions, None, packed_seq_params=pack)[0])


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
def test_logprobs_entropies_and_gradients_are_those_of_the_logits(recompute: str) -> None:
    shape = make_shape("qwen3", True)
    model = megatron_model(shape, recompute=recompute, logprob_chunk=16)
    tokens, positions, pack = packed(LENGTHS)
    labels = tokens.roll(-1, 1)
    mask = torch.rand(1, tokens.size(1), generator=torch.Generator().manual_seed(4)) < 0.7
    model.scoring.temperature, model.scoring.with_entropy = 0.7, True
    scored = model(tokens, positions, None, labels=labels, loss_mask=mask, packed_seq_params=pack)
    logp = torch.log_softmax(model(tokens, positions, None, packed_seq_params=pack)[0] / 0.7, -1)
    wanted = torch.stack([logp.gather(-1, labels.T)[:, 0], -(logp.exp() * logp).sum(-1)]) * mask
    torch.testing.assert_close(scored, wanted)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5))
    (scored * weights).sum().backward(retain_graph=True)
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (wanted * weights).sum().backward()
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        # Of the largest gradient: fp32 sums over T tokens and the vocabulary in another order.
        assert (mine[name] - parameter.grad).abs().max() < 2e-6 * scale, name


def test_rope_scaling_that_megatron_lacks_is_refused() -> None:
    config = hf_config(make_shape("llama", True))
    rope = {"rope_type": "yarn", "rope_theta": config["rope_theta"], "factor": 4.0}
    with pytest.raises(InputError, match="yarn"):
        shape_from_hf(config | {"rope_parameters": rope})
