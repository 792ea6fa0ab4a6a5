"""The sizes of a role's model, from the recipe or from a Hugging Face folder's config.json. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.recipe.schema import ModelConfig

FAMILIES = ("llama", "qwen2", "qwen3")
BUILTIN = "builtin:tiny"
BUILTIN_FOLDER = Path(__file__).resolve().parent.parent / "tasks" / "tiny_tokenizer"


@dataclass(frozen=True)
class Sizes:
    """What layouts and estimates need of a dense model."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def layer_sharded(self) -> int:
        """Parameters of one layer that tensor parallelism divides."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        bias = query + 2 * key if self.family == "qwen2" else 0
        return self.hidden * (2 * query + 2 * key) + bias + 3 * self.hidden * self.ffn

    @property
    def layer_replicated(self) -> int:
        """Parameters of one layer that every tensor-parallel rank holds: its norms."""
        return 2 * self.hidden + (2 * self.head_dim if self.family == "qwen3" else 0)

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        layers = self.layers * (self.layer_sharded + self.layer_replicated)
        return layers + self.hidden + self.embedding * (1 if self.tied else 2)


def read_sizes(model: ModelConfig, where: str = "") -> Sizes:
    """The sizes of a model. Raises InputError: an ambiguous or incomplete block, a missing folder or key."""
    if model.hf is not None:
        if model.family or model.shape:
            raise InputError(
                "a model is either `hf` or `family` and `shape`, not both",
                where=where,
                way_out="take one out (a key set to null is out)",
            )
        return _from_folder(Path(model.hf).expanduser(), where)
    if model.family is None or model.shape is None:
        raise InputError(
            "the model is not given",
            where=where,
            way_out="hf: a local folder, or family: and shape: for random weights",
        )
    if model.tokenizer is None:
        raise InputError(
            "a model with random weights needs a tokenizer",
            where=where,
            way_out=f"tokenizer: {BUILTIN}, or a folder",
        )
    shape = model.shape
    if shape.head_dim is None and shape.hidden % shape.heads:
        raise InputError(
            f"hidden {shape.hidden} is not a multiple of heads {shape.heads}",
            where=where,
            way_out="change one, or give head_dim",
        )
    return Sizes(
        family=model.family,
        layers=shape.layers,
        hidden=shape.hidden,
        ffn=shape.ffn,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim or shape.hidden // shape.heads,
        vocab=shape.vocab or tokenizer_size(model.tokenizer, where),
        tied=shape.tie_embeddings,
    )


def tokenizer_size(spec: str, where: str = "") -> int:
    """One more than the highest token id of a tokenizer folder or of builtin:tiny."""
    if spec.startswith("builtin:") and spec != BUILTIN:
        raise InputError(f"no built-in tokenizer is called '{spec}'", where=where, way_out=f"use {BUILTIN}")
    folder = BUILTIN_FOLDER if spec == BUILTIN else Path(spec).expanduser()
    tokenizer = _read_json(folder / "tokenizer.json", where, "a tokenizer folder holds tokenizer.json")
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        return int(max(ids + [token["id"] for token in tokenizer.get("added_tokens", [])])) + 1
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            "not a tokenizer in the format of `tokenizers`", where=str(folder / "tokenizer.json")
        ) from None


def _from_folder(folder: Path, where: str) -> Sizes:
    path = folder / "config.json"
    config = _read_json(path, where, "hf is a local folder with config.json, safetensors and a tokenizer")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"the model family '{family}' is not known",
            where=str(path),
            way_out=f"known: {', '.join(FAMILIES)}",
        )
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Sizes(
            family=family,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise InputError(f"the key {error} is missing", where=str(path)) from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"a size is not a positive number: {error}", where=str(path)) from None


def _read_json(path: Path, where: str, way_out: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}", where=where, way_out=way_out) from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=str(path))
    return value
