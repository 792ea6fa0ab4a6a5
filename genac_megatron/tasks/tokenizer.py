"""Tokenizers: a Hugging Face folder, or the small one that ships beside this file."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,  # left open, it asks on the terminal
        )
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


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Any, tools: Sequence[Any] = (), where: str = ""
) -> tuple[int, ...]:
    """Token ids of chat `messages` with the generation prompt after them.

    `tools`: JSON schemas of functions that the template shows. Raises InputError, at `where` (the messages'
    place), where the tokenizer has no chat template, where it refuses the messages or shows no tools.
    """
    text = chat_text(tokenizer, messages, tools, where=where)
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Any,
    tools: Sequence[Any] = (),
    *,
    where: str = "",
    generation: bool = True,
) -> str:
    """What the chat template makes of `messages`; `generation`: with the generation prompt. As `chat_ids`."""
    from jinja2 import TemplateError

    folder = str(tokenizer.name_or_path)
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template",
            where=folder,
            way_out="put a chat_template.jinja beside tokenizer.json",
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, add_generation_prompt=generation, tokenize=False
        )
        text.encode("utf-8")
    # A template is a program of somebody else's, which may fail in any of these ways.
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"the chat template of {folder} refuses these messages: {why}",
            where=where or folder,
            way_out="give messages in the form that the template asks for, or another chat_template.jinja",
        ) from error
    unseen = _unseen(messages, tools, text)
    if unseen:
        raise InputError(
            f"the chat template of {folder} leaves out what is to be shown: {', '.join(unseen)}",
            where=where or folder,
            way_out="use a tokenizer whose template shows it, or take it out of the data or the recipe "
            "(task.system, task.tools_key: null)",
        )
    return str(text)


def _unseen(messages: Any, tools: Sequence[Any], text: str) -> list[str]:
    """The system message, tools and tool calls that a template has dropped without a word."""
    named = [("tool", tool) for tool in tools]
    named += [("call of", call) for message in messages for call in message.get("tool_calls") or ()]
    system = [m["content"].strip() for m in messages if m["role"] == "system"]
    return ["the system message" for content in system if content not in text] + [
        f"the {what} {name}" for what, each in named if (name := _function(each)) not in text
    ]


def _function(tool: Any) -> str:
    return str(tool.get("function", tool).get("name", ""))


def completion_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a written completion, ended as the model should end its turn."""
    return (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token id that ends a turn: the tokenizer's eos first, then known turn ends it has."""
    vocab = tokenizer.get_vocab()
    known = (vocab[token] for token in TURN_ENDS if token in vocab)
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *known)))
