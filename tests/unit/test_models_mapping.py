"""Weights: Hugging Face to shards and back is exact, faults are named, random weights know no layout."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.families.reading import LLAMA3_ROPE
from genac_megatron.models.mapping import init_tensor, param_rules, random_weights, shard, unshard
from genac_megatron.models.registry import FAMILIES, family, hf_config, rules, shape_from_hf
from genac_megatron.models.sizes import hf_names, hf_size, local_size, padded_vocab, parameters

TINY = Shape(
    family="qwen3", layers=2, hidden=12, ffn=8, heads=4, kv_heads=2, head_dim=6, vocab=23, tie=False,
    rope_theta=1e4, norm_eps=1e-6, max_positions=64, init_std=0.02, qk_norm=True,
)  # fmt: skip


def kind_of(name: str, experts: int = 3) -> dict[str, Any]:
    """What a Shape of this family has beside sizes."""
    kind = family(name)
    of_experts = {"experts": experts, "experts_per_token": 1, "expert_ffn": 5, "norm_topk": True}
    return {"qk_norm": kind.qk_norm, "qkv_bias": kind.qkv_bias, **(of_experts if kind.moe else {})}


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Shape, int]:
    """A shape of any family, and a tp that can cut it."""
    tp = draw(st.sampled_from([1, 2, 4]))
    name = draw(st.sampled_from(sorted(FAMILIES)))
    kv_heads = draw(st.sampled_from([*{max(1, tp // 2), tp, 2 * tp}]))
    shared = max(1, tp // kv_heads)  # ranks of a head of keys
    return (
        dataclasses.replace(
            TINY,
            family=name,
            layers=draw(st.integers(1, 2)),
            hidden=draw(st.integers(1, 9)),
            ffn=tp * draw(st.integers(1, 4)),
            heads=kv_heads * shared * draw(st.integers(1, 3)),
            kv_heads=kv_heads,
            head_dim=2 * draw(st.integers(1, 3)),
            vocab=draw(st.integers(1, 30)),
            tie=draw(st.booleans()),
            **kind_of(name, experts=draw(st.integers(1, 3))),
        ),
        tp,
    )


@given(shapes())
@settings(max_examples=60)
def test_there_and_back_is_exact(case: tuple[Shape, int]) -> None:
    shape, tp = case
    tensors = {name: torch.randn(size) for name, size in hf_names(shape).items()}
    seen = {}
    for rule in rules(shape):
        for layer in range(shape.layers) if rule.per_layer else [None]:
            hf = [tensors[name] for name in rule.hf_names(layer)]
            shards = [shard(rule, hf, shape, rank, tp) for rank in range(tp)]
            assert {x.shape for x in shards} == {local_size(rule, shape, tp)}
            assert all(x.is_contiguous() for x in shards)
            seen |= unshard(rule, shards, shape, layer)
    assert seen.keys() == tensors.keys()
    assert all(torch.equal(seen[name], tensors[name]) for name in tensors)


def test_a_rank_holds_whole_groups_of_query_key_value() -> None:
    (rule,) = (r for r in rules(TINY) if r.name.endswith("linear_qkv.weight"))
    q, k, v = (torch.randn(hf_size(name, TINY)) for name in rule.hf)
    wanted = torch.cat([q[12:24], k[6:12], v[6:12]])  # group 1: heads 2 and 3, and their key and value
    assert torch.equal(shard(rule, [q, k, v], TINY, 1, 2), wanted)


def test_a_rank_holds_its_gate_above_its_up() -> None:
    (rule,) = (r for r in rules(TINY) if r.fuse == "gate_up")
    gate, up = (torch.randn(hf_size(name, TINY)) for name in rule.hf)
    assert torch.equal(shard(rule, [gate, up], TINY, 1, 2), torch.cat([gate[4:], up[4:]]))


def test_the_vocabulary_is_padded_with_zeros() -> None:
    rule = rules(TINY)[0]
    table = torch.ones(23, 12)
    last = shard(rule, [table], TINY, 3, 4)
    assert padded_vocab(TINY, 4) == 24
    assert last[:5].eq(1).all()
    assert last[5:].eq(0).all()


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("tie", [True, False])
def test_a_config_survives_the_way_to_hf_and_back(name: str, tie: bool) -> None:
    shape = dataclasses.replace(TINY, family=name, tie=tie, rope_factor=32.0, **kind_of(name))
    assert shape_from_hf(json.loads(json.dumps(hf_config(shape)))) == shape
    old = {key: value for key, value in hf_config(shape).items() if key != "rope_parameters"}
    assert shape_from_hf(old) == shape  # as transformers 4 wrote it


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_a_config_leaves_out_is_what_transformers_takes(name: str) -> None:
    given = {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 64,
        "num_attention_heads": 32,
        "vocab_size": 40,
    }
    full = AutoConfig.for_model(name, **given).to_dict()
    assert shape_from_hf(given | {"model_type": name}) == shape_from_hf(full)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' is missing"),
        ({"model_type": "gemma"}, "'gemma' is not supported"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "SequenceClassification"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, **LLAMA3_ROPE}
                | {"original_max_position_embeddings": 4096}
            },
            "original_max_position_embeddings",
        ),
    ],
)
def test_a_config_that_we_cannot_build_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        shape_from_hf(hf_config(TINY) | change)
    assert caught.value.where == "config.json"
    assert caught.value.way_out


QUIRKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what is said beside the sizes, and what it means
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "num_key_value_heads": 2, "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": False,
            "sliding_window": 32768, "max_window_layers": 2, "max_position_embeddings": 32768,
            "rope_theta": 1e6, "tie_word_embeddings": True, "use_mrope": False, "use_cache": True,
            "eos_token_id": 151645, "torch_dtype": "bfloat16",
        },
        {"tie": True, "max_positions": 32768, "rope_theta": 1e6, "qkv_bias": True},
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16,
            "rope_scaling": None, "sliding_window": None,
            "attention_bias": False, "rope_theta": 1000000, "tie_word_embeddings": True,
            "max_position_embeddings": 40960,
        },
        {"tie": True, "head_dim": 16, "qk_norm": True, "rope_theta": 1e6},
    ),
    "Llama-3.2-1B": (
        {
            "model_type": "llama", "eos_token_id": [128001, 128008, 128009], "pretraining_tp": 1,
            "mlp_bias": False, "rope_theta": 5e5, "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **LLAMA3_ROPE},
        },
        {"tie": True, "rope_theta": 5e5, "rope_factor": 32.0},
    ),
    "Llama 2, whose theta and heads of keys are the class's": (
        {"model_type": "llama", "num_key_value_heads": None, "rope_theta": None, "rope_scaling": None},
        {"tie": False, "rope_theta": 1e4, "kv_heads": 4},
    ),
    "SmolLM2": (
        {
            "model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "tie_word_embeddings": True,
        },
        {"tie": True, "rope_theta": 1e5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUIRKS)
def test_configs_as_published_models_have_them(name: str) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 40}
    said, meant = QUIRKS[name]
    shape = shape_from_hf({**sizes, "num_attention_heads": 4, **said})
    assert {key: getattr(shape, key) for key in meant} == meant


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ("qwen2", {"use_mrope": True}, "use_mrope"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),  # SmolLM2's is false
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"vocab_size": 40.0}, "'vocab_size' is 40.0"),
        ("mistral", {"sliding_window": None}, "'mistral' is not supported"),
        ("gemma2", {}, "'gemma2' is not supported"),
        ("gemma3_text", {}, "'gemma3_text' is not supported"),
        ("smollm3", {}, "'smollm3' is not supported"),
        ("qwen3_next", {}, "'qwen3_next' is not supported"),
        ("qwen3_vl", {}, "'qwen3_vl' is not supported"),
    ],
)
def test_quirks_of_published_configs_are_refused_by_name(
    model_type: str, change: dict[str, Any], message: str
) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 40}
    given = {"model_type": model_type, "num_attention_heads": 4, **sizes, **change}
    with pytest.raises(InputError, match=message) as caught:
        shape_from_hf(given)
    assert caught.value.way_out


QWEN3 = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "head_dim": 128, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 40960,
    "num_attention_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PUBLISHED = {  # config.json as published, and billions of parameters
    "Llama-3.1-8B": (8.030, {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    }),
    "SmolLM2-135M": (0.1345, {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "use_cache": True,
        "vocab_size": 49152,
    }),
    "Qwen2.5-7B": (7.616, {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
    }),
    "Qwen3-8B": (8.191, QWEN3 | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096,
        "intermediate_size": 12288, "max_window_layers": 36, "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    }),
    "Qwen3-30B-A3B": (30.532, QWEN3 | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "max_window_layers": 48, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
        "output_router_logits": False, "router_aux_loss_coef": 0.001,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_configs_are_read_and_counted(name: str) -> None:
    billions, config = PUBLISHED[name]
    shape = shape_from_hf(config)
    assert parameters(shape) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert shape_from_hf(hf_config(shape)) == shape


# --- random weights ------------------------------------------------------------------------------


def test_random_weights_depend_on_name_and_seed_alone() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    first = random_weights(TINY, 3)(name)
    assert torch.equal(first, init_tensor(name, hf_size(name, TINY), TINY, 3))
    assert not torch.equal(first, random_weights(TINY, 4)(name))
    assert not torch.equal(first, random_weights(TINY, 3)(name.replace("up", "gate")))


def test_random_weights_have_the_shapes_deviations() -> None:
    big = dataclasses.replace(TINY, hidden=256, ffn=512, heads=16, head_dim=16)
    get = random_weights(big, 0)
    # The deviation of n normal samples is within 5 standard errors, sigma / sqrt(2 n): here n >= 65536.
    assert float(get("model.layers.0.mlp.up_proj.weight").std()) == pytest.approx(0.02, rel=0.015)
    assert float(get("model.layers.0.mlp.down_proj.weight").std()) == pytest.approx(0.01, rel=0.015)
    assert float(get("model.layers.1.self_attn.o_proj.weight").std()) == pytest.approx(0.01, rel=0.015)
    assert get("model.norm.weight").eq(1).all()


# --- a model's parameters ------------------------------------------------------------------------


class _Chunk(torch.nn.Module):
    """As much of a model chunk as param_rules looks at: it has the right parameters for TINY, tied or not."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.pre_process = self.post_process = True
        self.config = type("Config", (), {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1})
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(shape.layers))
        for rule in rules(shape):
            if rule.name.startswith("output_layer") and shape.tie:
                continue
            for layer in range(shape.layers) if rule.per_layer else [0]:
                self.put(rule.name.format(layer=layer), torch.zeros(local_size(rule, shape, 1)))

    def put(self, name: str, value: torch.Tensor | None) -> None:
        *path, last = name.split(".")
        module: torch.nn.Module = self
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, None if value is None else torch.nn.Parameter(value))


@pytest.mark.parametrize("tie", [True, False])
def test_every_parameter_has_its_rule_and_global_layer(tie: bool) -> None:
    shape = dataclasses.replace(TINY, tie=tie)
    found = param_rules(_Chunk(shape), 5, shape)
    assert {item.layer for item in found} == {None, 5, 6}
    by_name = {item.name: item for item in found}
    assert by_name["decoder.layers.1.mlp.linear_fc2.weight"].hf_names == (
        "model.layers.6.mlp.down_proj.weight",
    )
    assert ("output_layer.weight" in by_name) != tie


def test_transformer_engines_fused_norms_are_known() -> None:
    chunk = _Chunk(TINY)
    for layer in range(2):
        chunk.put(f"decoder.layers.{layer}.input_layernorm.weight", None)
        chunk.put(f"decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight", torch.zeros(12))
    names = {item.name: item.hf_names for item in param_rules(chunk, 0, TINY)}
    fused = names["decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"]
    assert fused == ("model.layers.1.input_layernorm.weight",)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("decoder.layers.1.mlp.linear_fc2.weight", None, "missing parameter decoder.layers.1.mlp.linear_fc2"),
        ("decoder.layers.0.mlp.linear_fc2.bias", torch.zeros(12), "surplus parameter decoder.layers.0.mlp"),
        (
            "output_layer.weight",
            torch.zeros(22, 12),
            r"output_layer.weight has shape \(22, 12\), expected \(23, 12\)",
        ),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(name: str, value: Any, message: str) -> None:
    chunk = _Chunk(TINY)
    chunk.put(name, value)
    with pytest.raises(InputError, match=message):
        param_rules(chunk, 0, TINY)
