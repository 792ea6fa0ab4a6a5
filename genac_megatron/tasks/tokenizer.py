"""Tokenizers: a Hugging Face folder, or the small one that ships beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN, BUILTIN_PREFIX = "builtin:tiny", "builtin:"
TINY_FOLDER = Path(__file__).parent / "tiny_tokenizer"
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")


def tokenizer_folder(spec: str, where: str = "") -> Path:
    """The folder of a tokenizer spec. Raises InputError, at `where`, on an unknown built-in one."""
    if spec.startswith(BUILTIN_PREFIX) and spec != BUILTIN:
        raise InputError(
            f"no built-in tokenizer is called '{spec}'", where=where, way_out=f"use {BUILTIN}, or a folder"
        )
    return TINY_FOLDER if spec == BUILTIN else Path(spec).expanduser()


def tokenizer_size(spec: str, where: str = "") -> int:
    """One more than the highest token id of a tokenizer folder or of builtin:tiny, without loading it.

    Raises InputError, at `where` (who names the folder) or naming the file.
    """
    path = tokenizer_folder(spec, where) / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"cannot read {path}: {reason}", where=where, way_out="a tokenizer folder holds tokenizer.json"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        return int(max(ids + [token["id"] for token in tokenizer.get("added_tokens", [])])) + 1
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError("not a tokenizer in the format of `tokenizers`", where=str(path)) from None


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, or `builtin:tiny`; it always has an end and a padding token.

    Nothing is fetched. Raises InputError where the folder holds no tokenizer or no end token.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(spec)
    if not folder.is_dir():
        raise InputError(
            "no such tokenizer folder",
            where=str(folder),
            way_out="give a folder with a tokenizer, or builtin:tiny",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot load a tokenizer: {str(error).splitlines()[0]}",
            where=str(folder),
            way_out="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer names no eos_token", where=str(folder), way_out="add it to tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Any) -> tuple[int, ...]:
    """Token ids of chat `messages` with the generation prompt after them.

    Raises InputError where the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            way_out="put a chat_template.jinja beside tokenizer.json",
        )
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tuple(ids)


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a written completion, ended as the model should end its turn."""
    return (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token id that ends a turn: the tokenizer's eos first, then known turn ends it has."""
    vocab = tokenizer.get_vocab()
    known = (vocab[token] for token in TURN_ENDS if token in vocab)
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *known)))
