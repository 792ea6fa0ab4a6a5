"""What a model family is: its sizes, its Hugging Face config, and how its weights map to Megatron's.

Imports no torch. An InputError from here names no place: `models.registry` adds the file or the line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from genac_megatron.errors import InputError
from genac_megatron.models.families.reading import (
    LLAMA3_ROPE,
    default_head_dim,
    flag,
    number,
    read_experts,
    refuse_unknown,
    rope,
    size,
)

Fuse = Literal["copy", "qkv", "gate_up"]
LOGIT = "logit"  # the label of a scalar critic whose output is the value's log-odds; of others "value"


@dataclass(frozen=True)
class Shape:
    """All sizes of a decoder-only transformer, whatever its family."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int  # rows of the Hugging Face embedding, before any padding
    tie: bool  # the output layer is the embedding
    rope_theta: float
    norm_eps: float
    max_positions: int
    init_std: float
    qk_norm: bool = False
    qkv_bias: bool = False
    rope_factor: float | None = None  # Llama 3.1 rope scaling; None: plain rope
    experts: int | None = None  # per layer; None: a dense model
    experts_per_token: int | None = None
    expert_ffn: int | None = None
    norm_topk: bool | None = None  # the chosen experts' weights are made to sum to 1
    value: bool = False  # a scalar head (transformers' ForTokenClassification) in place of the LM's
    logit: bool = False  # its output is the value's log-odds

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise InputError(
                f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}",
                way_out="each key-value head serves the same number of heads: change one",
            )
        if (self.experts_per_token or 0) > (self.experts or 0):
            raise InputError(
                f"experts_per_token {self.experts_per_token} of {self.experts} experts",
                way_out="a token goes to at most as many experts as there are",
            )
        if self.head_dim % 2:
            raise InputError(
                f"head_dim {self.head_dim} is odd", way_out="rotary positions need pairs: make it even"
            )

    @property
    def as_value(self) -> Shape:
        """The same model with a scalar head, which is nobody's embedding."""
        return replace(self, value=True, tie=False)

    def may_start_from(self, other: Shape) -> bool:
        """Whether `other`'s weights fit: all of them, or a language model's but for the scalar head."""
        if self.value and not other.value:
            return replace(other.as_value, logit=self.logit) == self
        return self == other

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key (or value) projection."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors that it is made of.

    `fuse`: copy (one tensor), qkv (query, key, value interleaved per key-value group) or gate_up (gate above
    up, per rank). `tp_axis`: the axis that tensor parallelism cuts, None where every rank holds all of it.
    `padded`: axis 0 is the vocabulary, padded to a multiple of tp. `aliases`: other names of the same
    parameter (Transformer Engine keeps a norm's weight inside the linear layer after it).
    """

    name: str  # in a model chunk that has all experts; {layer} is the chunk's own layer index
    hf: tuple[str, ...]  # {layer} is the global layer index
    fuse: Fuse = "copy"
    tp_axis: int | None = None
    padded: bool = False
    aliases: tuple[str, ...] = ()
    expert: int | None = None  # global index of the expert that it is part of
    local: tuple[str, ...] = ()  # of an expert: names in a chunk, by the {expert}'s index among the rank's
    key: str = ""  # in a checkpoint; "": made of the last alias or the name

    @property
    def stored(self) -> str:
        """Its key in a checkpoint, where all layers (and experts) are one tensor with leading axes."""
        return self.key or (self.name, *self.aliases)[-1].replace("layers.{layer}.", "layers.")

    def in_chunk(self, layer: int | None = None, first_expert: int = 0) -> tuple[str, ...]:
        """The names it may have in a chunk: `layer` counts the chunk's layers, first_expert is the rank's."""
        here = None if self.expert is None else self.expert - first_expert
        names = self.local or (self.name, *self.aliases)
        return tuple(name.format(layer=layer, expert=here) for name in names)

    @property
    def room(self) -> str:
        """The part of the model it is in: embedding, decoder or output_layer."""
        return self.name.split(".")[0]

    @property
    def per_layer(self) -> bool:
        """Whether every transformer layer has such a parameter."""
        return "{layer}" in self.name

    def hf_names(self, layer: int | None = None) -> tuple[str, ...]:
        """Names of its Hugging Face tensors, of global layer `layer` where it is per layer."""
        return tuple(name.format(layer=layer) for name in self.hf)


@dataclass(frozen=True)
class Family:
    """A model family: which config.json it reads and writes, and its weight rules."""

    name: str
    architecture: str  # class name in transformers
    qk_norm: bool
    qkv_bias: bool
    defaults: Mapping[str, Any]  # what transformers takes for a key that config.json lacks
    read_extras: Callable[[Mapping[str, Any]], None]  # raises InputError on an option that we do not build
    keys: frozenset[str]  # keys of its own that read_extras, or nothing, has to look at
    write_extras: Mapping[str, Any]
    moe: bool = False  # every layer is a mixture of experts

    @property
    def value_architecture(self) -> str:
        """transformers' class of it with a scalar head."""
        return self.architecture.replace("ForCausalLM", "ForTokenClassification")

    def shape_from_hf(self, given: Mapping[str, Any]) -> Shape:
        """The Shape of a config.json's content. Raises InputError on what this family cannot be here."""
        config = {**self.defaults, **given}
        value = self.value_architecture in (given.get("architectures") or ())
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"hidden_act {config['hidden_act']!r} is not silu")
        self.read_extras(config)
        refuse_unknown(config, self.value_architecture if value else self.architecture, self.keys)
        labels = list((config.get("id2label") or {}).values())
        if value and len(labels) != 1:
            raise InputError(f"{self.value_architecture} with more than one label is not a scalar critic")
        heads, hidden = size(config, "num_attention_heads"), size(config, "hidden_size")
        rope_theta, rope_factor = rope(config)
        return Shape(
            family=self.name,
            layers=size(config, "num_hidden_layers"),
            hidden=hidden,
            ffn=size(config, "intermediate_size"),
            heads=heads,
            kv_heads=size(config, "num_key_value_heads", heads),
            head_dim=size(config, "head_dim") if config.get("head_dim") else default_head_dim(hidden, heads),
            vocab=size(config, "vocab_size"),
            tie=flag(config, "tie_word_embeddings") and not value,
            value=value,
            logit=value and labels == [LOGIT],
            rope_theta=rope_theta,
            norm_eps=number(config, "rms_norm_eps", 1e-6),
            max_positions=size(config, "max_position_embeddings"),
            init_std=number(config, "initializer_range", 0.02),
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
            rope_factor=rope_factor,
            **(read_experts(config) if self.moe else {}),
        )

    def hf_config(self, shape: Shape) -> dict[str, Any]:
        """The config.json content of `shape`; transformers' AutoConfig reads it."""
        label = LOGIT if shape.logit else "value"
        scaling: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
        if shape.rope_factor is not None:
            scaling |= {"rope_type": "llama3", "factor": shape.rope_factor} | LLAMA3_ROPE
        return {
            "architectures": [self.value_architecture if shape.value else self.architecture],
            "model_type": self.name,
            "hidden_act": "silu",
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "vocab_size": shape.vocab,
            "tie_word_embeddings": shape.tie,
            "rms_norm_eps": shape.norm_eps,
            "max_position_embeddings": shape.max_positions,
            "initializer_range": shape.init_std,
            "rope_parameters": scaling,
            # The same for readers older than transformers 5.
            "rope_theta": shape.rope_theta,
            "rope_scaling": None if shape.rope_factor is None else scaling,
            **(write_experts(shape) if self.moe else {}),
            **({"id2label": {"0": label}, "label2id": {label: 0}} if shape.value else {}),
            **self.write_extras,
        }

    def rules(self, shape: Shape) -> tuple[Rule, ...]:
        """The weight rules of a model of `shape`."""
        return decoder_rules(shape, expert_rules(shape) if self.moe else DENSE_MLP)


def write_experts(shape: Shape) -> dict[str, Any]:
    """The keys of config.json that describe the experts."""
    return {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_ffn,
        "norm_topk_prob": shape.norm_topk,
    }


HF_LAYER, LAYER = "model.layers.{layer}.", "decoder.layers.{layer}."
DENSE_MLP = (
    Rule(
        LAYER + "pre_mlp_layernorm.weight",
        (HF_LAYER + "post_attention_layernorm.weight",),
        aliases=(LAYER + "mlp.linear_fc1.layer_norm_weight",),
    ),
    Rule(
        LAYER + "mlp.linear_fc1.weight",
        (HF_LAYER + "mlp.gate_proj.weight", HF_LAYER + "mlp.up_proj.weight"),
        "gate_up",
        tp_axis=0,
    ),
    Rule(LAYER + "mlp.linear_fc2.weight", (HF_LAYER + "mlp.down_proj.weight",), tp_axis=1),
)


EXPERT_PARTS: tuple[tuple[str, tuple[str, ...], Fuse], ...] = (
    ("linear_fc1.weight", ("gate_proj.weight", "up_proj.weight"), "gate_up"),
    ("linear_fc2.weight", ("down_proj.weight",), "copy"),
)


def expert_rules(shape: Shape) -> tuple[Rule, ...]:
    """The rules of a mixture of experts: its norm, its router, and each expert by its global index.

    Experts are not cut by tensor parallelism. Their names are those of a sequence of experts; a grouped one
    (Transformer Engine) numbers its weights instead.
    """
    norm, router = "pre_mlp_layernorm.weight", "mlp.router.weight"
    made = [
        Rule(LAYER + norm, (HF_LAYER + "post_attention_layernorm.weight",)),
        Rule(LAYER + router, (HF_LAYER + "mlp.gate.weight",)),
    ]
    for expert in range(shape.experts or 0):
        hf, experts = f"{HF_LAYER}mlp.experts.{expert}.", LAYER + "mlp.experts."
        for part, names, fuse in EXPERT_PARTS:
            sequence, group = f"{experts}local_experts.{{expert}}.{part}", f"{experts}{part}{{expert}}"
            made.append(
                Rule(
                    sequence.replace("{expert}", str(expert)),
                    tuple(hf + name for name in names),
                    fuse,
                    expert=expert,
                    local=(sequence, group),
                    key=f"decoder.layers.mlp.experts.experts.{part}",
                )
            )
    return tuple(made)


# Every tensor-parallel rank has the whole of it.
VALUE_HEAD = (Rule("output_layer.weight", ("score.weight",)), Rule("output_layer.bias", ("score.bias",)))


def _lm_head(shape: Shape) -> Rule:
    hf = "model.embed_tokens.weight" if shape.tie else "lm_head.weight"
    return Rule("output_layer.weight", (hf,), tp_axis=0, padded=True)


def decoder_rules(shape: Shape, mlp: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules that Llama and its kin share, with those of their feed-forward part."""
    hf, mega = HF_LAYER, LAYER
    qkv = tuple(f"{hf}self_attn.{x}_proj" for x in "qkv")
    rules = [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), tp_axis=0, padded=True),
        Rule(
            mega + "input_layernorm.weight",
            (hf + "input_layernorm.weight",),
            aliases=(mega + "self_attention.linear_qkv.layer_norm_weight",),
        ),
        Rule(mega + "self_attention.linear_qkv.weight", tuple(f"{x}.weight" for x in qkv), "qkv", tp_axis=0),
        Rule(mega + "self_attention.linear_proj.weight", (hf + "self_attn.o_proj.weight",), tp_axis=1),
        *mlp,
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
        *(VALUE_HEAD if shape.value else (_lm_head(shape),)),
    ]
    if shape.qkv_bias:
        rules.append(
            Rule(mega + "self_attention.linear_qkv.bias", tuple(f"{x}.bias" for x in qkv), "qkv", tp_axis=0)
        )
    if shape.qk_norm:
        rules += [
            Rule(mega + f"self_attention.{x}_layernorm.weight", (hf + f"self_attn.{x}_norm.weight",))
            for x in "qk"
        ]
    return tuple(rules)
