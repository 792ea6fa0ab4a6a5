"""From a recipe's model or a Hugging Face folder to a Shape, and from a Shape to everything made of it.

Imports no torch: recipes are checked, and their memory estimated, with it. A new family is a file in
`families/` and a row of FAMILIES.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.links import refuse_unreadable
from genac_megatron.models.families import llama, qwen2, qwen3, qwen3_moe
from genac_megatron.models.families.base import Family, Rule, Shape
from genac_megatron.models.families.reading import default_head_dim
from genac_megatron.recipe.schema import ModelConfig, ModelShape

FAMILIES: dict[str, Family] = {
    f.name: f for f in (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY)
}
ADAPTER = "adapter_config.json"
FOLDER = (
    f"give a folder of a language model of {', '.join(sorted(FAMILIES))} as transformers writes it; a "
    "config.json that was changed by hand has to say what the weights are"
)
Where = Callable[[str], str]  # from a key of the model's block ("": itself) to its place in the user's files


def _in_block(key: str) -> str:
    return f"model.{key}" if key else "model"


def family(name: str) -> Family:
    """The family called `name`. Raises InputError where there is none."""
    if name not in FAMILIES:
        raise InputError(
            f"the model family '{name}' is not supported",
            way_out=f"supported are {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[name]


def shape_of(model: ModelConfig, tokenizer_vocab: int | None, where: Where = _in_block) -> Shape:
    """The Shape of a recipe's model: its folder's config.json, or its family and sizes.

    tokenizer_vocab: one more than the tokenizer's highest id; the model must have a row for each, and it is
    the vocabulary where the recipe names none. None: the tokenizer is the folder's own. Raises InputError.
    """
    if model.hf is not None:
        if model.family or model.shape:
            raise InputError(
                "a model is either `hf` or `family` and `shape`, not both",
                where=where(""),
                way_out="take one out (a key set to null is out)",
            )
        shape = shape_from_folder(Path(model.hf).expanduser(), where("hf"))
    else:
        shape = _shape_of_sizes(model, tokenizer_vocab, where)
    if model.head != "lm":
        if shape.value and shape.logit != (model.head == "logit"):
            has = "logit" if shape.logit else "value"
            raise InputError(
                f"the folder is that of a scalar critic with the head '{has}'",
                where=where("head"),
                way_out=f"set head: {has}",
            )
        shape = replace(shape.as_value, logit=model.head == "logit")
    elif shape.value:
        raise InputError(
            "the folder is a scalar critic's",
            where=where("hf"),
            way_out=f"set head: {'logit' if shape.logit else 'value'}, or give a language model's folder",
        )
    if tokenizer_vocab is not None and shape.vocab < tokenizer_vocab:
        raise InputError(
            f"the tokenizer has ids up to {tokenizer_vocab - 1}, its model only {shape.vocab} embeddings",
            where=where("tokenizer"),
            way_out=f"set vocab to at least {tokenizer_vocab}, or leave it out"
            if model.hf is None
            else "use the model's own tokenizer; where this is it, give each id a row (transformers: "
            "model.resize_token_embeddings, then save_pretrained)",
        )
    return shape


def _shape_of_sizes(model: ModelConfig, tokenizer_vocab: int | None, where: Where) -> Shape:
    sizes = model.shape
    if model.family is None or sizes is None:
        raise InputError(
            "the model is not given",
            where=where(""),
            way_out="hf: a local folder, or family: and shape: for random weights",
        )
    if tokenizer_vocab is None:
        raise InputError(
            "a model with random weights needs a tokenizer",
            where=where(""),
            way_out="tokenizer: builtin:tiny, or a folder",
        )
    with _named(where("family")):
        kind = family(model.family)
    with _named(where("shape")):
        return Shape(
            family=kind.name,
            layers=sizes.layers,
            hidden=sizes.hidden,
            ffn=sizes.ffn,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim or default_head_dim(sizes.hidden, sizes.heads),
            vocab=sizes.vocab or tokenizer_vocab,
            tie=sizes.tie_embeddings,
            rope_theta=sizes.rope_theta,
            norm_eps=sizes.norm_eps,
            max_positions=sizes.max_positions,
            init_std=sizes.init_std,
            qk_norm=kind.qk_norm,
            qkv_bias=kind.qkv_bias,
            **_experts(kind, sizes),
        )


def _experts(kind: Family, sizes: ModelShape) -> dict[str, Any]:
    """The sizes of a mixture of experts, where the family has one."""
    given = {key: getattr(sizes, key) for key in ("experts", "experts_per_token", "expert_ffn", "norm_topk")}
    wrong = [key for key, value in given.items() if (value is None) == kind.moe]
    if wrong:
        what = "needs" if kind.moe else "has no"
        way_out = "give them" if kind.moe else "take them out of the shape, or choose qwen3_moe"
        raise InputError(f"the family '{kind.name}' {what} {', '.join(wrong)}", way_out=way_out)
    return given if kind.moe else {}


@contextmanager
def _named(where: str, way_out: str = "") -> Iterator[None]:
    """Give the place, and a way out, to an InputError that names none."""
    try:
        yield
    except InputError as error:
        if error.where:
            raise
        raise InputError(error.what, where=where, way_out=error.way_out or way_out) from None


def shape_from_folder(folder: str | Path, where: str = "") -> Shape:
    """The Shape that a Hugging Face folder's config.json describes.

    Raises InputError naming the file, or `where` (who names the folder) if it cannot be read.
    """
    path = Path(folder) / "config.json"
    refuse_unreadable(Path(folder))
    _refuse_adapter(Path(folder))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"cannot read {path}: {reason}",
            where=where,
            way_out="hf is a local folder with config.json, safetensors and a tokenizer. To fetch one: "
            f"hf download OWNER/{Path(folder).name} --local-dir {folder} (a dry run needs no safetensors: "
            "--exclude '*.safetensors')",
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}", way_out=FOLDER) from None
    if not isinstance(config, dict):
        raise InputError("not a JSON object", where=str(path), way_out=FOLDER)
    return shape_from_hf(config, str(path))


def _refuse_adapter(folder: Path) -> None:
    """An adapter beside a whole model is loaded on top of it by transformers, and by nothing here."""
    if (folder / ADAPTER).exists():
        raise InputError(
            f"is an adapter's folder ({ADAPTER}): its weights are a change to another model's",
            where=str(folder),
            way_out="merge it into that model (PEFT: merge_and_unload) and give the folder saved then; where "
            f"that was done here, remove {ADAPTER}",
        )


def shape_from_hf(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The Shape that the content of a config.json (`where`) describes. Raises InputError."""
    with _named(where, FOLDER):
        return family(str(config.get("model_type"))).shape_from_hf(config)


def hf_config(shape: Shape) -> dict[str, Any]:
    """The config.json content of `shape`."""
    return family(shape.family).hf_config(shape)


@functools.cache
def rules(shape: Shape) -> tuple[Rule, ...]:
    """The weight rules of `shape`."""
    return family(shape.family).rules(shape)
