"""Tokenizers: a Hugging Face folder, or the small one that ships beside this file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError
from genac_megatron.links import refuse_unreadable
from genac_megatron.tasks.chat_template import set_template_variables, template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.recipe.schema import ModelConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
BUILTIN, BUILTIN_PREFIX = "builtin:tiny", "builtin:"
TINY_FOLDER = Path(__file__).parent / "tiny_tokenizer"
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")
SHOWN_TOKENS = 4
AGAIN = "fetch the tokenizer's folder again, whole"
MARK = "GENACCONTENTMARK"
TAIL = 64  # tokens of a prompt's end that are looked at
# The end of a prompt that has opened a tag for the answer, and perhaps closed it again.
OPENED = re.compile(r"<(?P<name>[A-Za-z_]\w*)>(?P<gap>\s*)(?P<closing></(?P=name)>)?(?P<after>\s*)\Z")


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
    refuse_unreadable(path.parent)
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"cannot read {path}: {reason}", where=where, way_out="a tokenizer folder holds tokenizer.json"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}", way_out=AGAIN) from None
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        return int(max(ids + [token["id"] for token in tokenizer.get("added_tokens", [])])) + 1
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            "not a tokenizer in the format of `tokenizers`", where=str(path), way_out=AGAIN
        ) from None


def check_rows(spec: str, rows: int, where: str) -> None:
    """Raise InputError, naming the tokens, where a tokenizer has ids for which a model of `rows` embeddings
    has no row. As `tokenizer_size`."""
    known = tokenizer_size(spec, where)
    if known <= rows:
        return
    path = tokenizer_folder(spec, where) / "tokenizer.json"
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    beyond = [(token["content"], token["id"]) for token in added if token["id"] >= rows]
    named = ", ".join(f"'{content}' has id {number}" for content, number in beyond[:SHOWN_TOKENS])
    raise InputError(
        f"its tokenizer has ids up to {known - 1}, the model only {rows} embeddings"
        + (f": {named}" if named else ""),
        where=where,
        way_out=f"where this is the model's own tokenizer, give each id a row (transformers: "
        f"model.resize_token_embeddings({known}), then save_pretrained), or take those tokens out of "
        "tokenizer.json and tokenizer_config.json (the pad_token may be the eos_token); else give the "
        "model's own",
    )


def load_tokenizer(
    spec: str,
    model: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder, or `builtin:tiny`; it always has an end and a padding token.

    Its eos_token is the one that ends a turn (`set_ends`), whatever its folder says. model: the model's
    folder, where it is another one. chat_template: in the place of its own (`template_text`).
    chat_template_kwargs: variables of its chat template, which then has them set. Nothing is fetched. Raises
    InputError where the folder holds no tokenizer or no end token, or the template does not read a variable.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(spec)
    if not folder.is_dir():
        raise InputError(
            "no such tokenizer folder",
            where=str(folder),
            way_out="give a folder with a tokenizer, or builtin:tiny",
        )
    refuse_unreadable(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,  # left open, it asks on the terminal
        )
    except Exception as error:  # the folder is somebody else's, and so is what reads it
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        way_out = "the folder needs tokenizer.json and tokenizer_config.json"
        if "custom code" in why:
            way_out = (
                "code of a folder's own is not run here: save the tokenizer as a fast one (tokenizer.json), "
                "and take auto_map out of tokenizer_config.json"
            )
        raise InputError(f"cannot load a tokenizer: {why}", where=str(folder), way_out=way_out) from error
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
    if chat_template_kwargs:
        set_template_variables(tokenizer, chat_template_kwargs)
    set_ends(tokenizer, model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def role_tokenizer(name: str, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a role. Raises InputError."""
    spec = model.tokenizer or model.hf
    if spec is None:
        raise InputError(
            "a role without an hf folder needs a tokenizer",
            where=f"roles.{name}.model.tokenizer",
            way_out="name a tokenizer folder, or builtin:tiny",
        )
    return load_tokenizer(spec, model.hf, model.chat_template_kwargs, model.chat_template)


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
            way_out="put a chat_template.jinja beside tokenizer.json, or give model.chat_template",
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


def reply_ids(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], text: str, **options: Any
) -> tuple[int, ...]:
    """Ids of a written reply behind a prompt, as they are where prompt and reply are one text.

    Tokenizers of Llama 2's kind put a space before a text that they are given by itself, and some before what
    follows a special token. options: of the tokenizer's call.
    """
    alone = encode_after(tokenizer, "", "a")
    last = tokenizer.added_tokens_decoder.get(prompt_ids[-1]) if prompt_ids else None
    joined = encode_after(tokenizer, "\n" if last is None else last.content, "a")
    if not prompt_ids or joined == alone:
        return encode_after(tokenizer, "", text, **options)
    # A character that the text may follow without a token that holds some of both.
    return encode_after(tokenizer, "a" if text[:1].isspace() else "\n", text, **options)


def reply_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """The white space that the chat template writes between its generation prompt and a reply; mostly ""."""
    return _reply_lead(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _reply_lead(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    asked = [{"role": "user", "content": "?"}]
    prompt = _rendered(tokenizer, asked, add_generation_prompt=True)
    whole = _rendered(tokenizer, [*asked, {"role": "assistant", "content": MARK}])
    if not prompt or whole is None or MARK not in whole or not whole.startswith(prompt):
        return ""
    lead = whole[len(prompt) :].partition(MARK)[0]
    return lead if lead.isspace() else ""


def encode_after(
    tokenizer: PreTrainedTokenizerBase, before: str, text: str, **options: Any
) -> tuple[int, ...]:
    """Ids of `text` where it follows `before`, whose own ids are left out.

    By itself it may get others: tokenizers of Llama 2's kind put a space before every text. Where the two
    share a token, `text` is encoded by itself. options: of the tokenizer's call.
    """

    def ids(part: str) -> tuple[int, ...]:
        if not part:
            return ()
        return tuple(tokenizer(part, add_special_tokens=False, verbose=False, **options)["input_ids"])

    if not before:  # as for every state that a critic is shown: no reason to encode twice
        return ids(text)
    head, whole = ids(before), ids(before + text)
    return whole[len(head) :] if whole[: len(head)] == head else ids(text)


# --- what ends a turn ----------------------------------------------------------------------------


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> tuple[int, ...]:
    """Every token id that ends a turn, the one that is taught first.

    Then those of generation_config.json, the tokenizer's own eos, and known turn ends that it has. model: the
    model's folder, where the tokenizer is of another one. Raises InputError.
    """
    vocab = tokenizer.get_vocab()
    own = str(tokenizer.init_kwargs.get("eos_token") or "")
    known = (vocab[token] for token in (own, *TURN_ENDS) if token in vocab)
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *named_ends(tokenizer, model), *known)))


def set_ends(tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> None:
    """Make the token that ends a turn the tokenizer's eos_token, and all that do special ones.

    The chat template's own end of an answer, where that is an end; else the eos_token, where
    generation_config.json has no others; else the first that it has. So what is taught as an end is one at
    which other engines stop. Raises InputError where there is none.
    """
    added = tokenizer.added_tokens_decoder
    # A plain piece of the vocabulary is hardly an end: it is a default that somebody's tool wrote.
    named = [end for end in named_ends(tokenizer, model) if end in added]
    own = tokenizer.eos_token_id
    if own is None and not named:
        raise InputError(
            "the tokenizer names no eos_token",
            where=str(tokenizer.name_or_path),
            way_out="add it to tokenizer_config.json",
        )
    vocab = tokenizer.get_vocab()
    allowed = named or [own, *(vocab[token] for token in TURN_ENDS if token in vocab)]
    template = _template_end(tokenizer)
    end = template if template in allowed else own if own in allowed else allowed[0]
    _make_special(tokenizer, [i for i in dict.fromkeys([end, *named]) if i in added and not added[i].special])
    if end != own:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)


def _make_special(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> None:
    """Special tokens are left out of decoded text."""
    from transformers import AddedToken

    tokens = [AddedToken(tokenizer.convert_ids_to_tokens(i), special=True, normalized=False) for i in ids]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)


def named_ends(tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> tuple[int, ...]:
    """The end tokens that the model's folder and the tokenizer's name, in that order. Raises InputError.

    As transformers reads them: of generation_config.json, else of config.json, there without plain pieces of
    the vocabulary (llama's default is token 2). A model's folder with another tokenizer of its own means
    others by its ids: it is left out.
    """
    own = Path(str(tokenizer.name_or_path))
    folders = [own]
    if model is not None and same_tokenizer(Path(model).expanduser(), own):
        folders.insert(0, Path(model).expanduser())
    found: list[int] = []
    for folder in folders:
        ends = read_ends(folder / GENERATION)
        found += ends or [i for i in read_ends(folder / CONFIG) if i in tokenizer.added_tokens_decoder]
    return tuple(dict.fromkeys(found))


def same_tokenizer(model: Path, own: Path) -> bool:
    """Whether a model's folder has no tokenizer but that of the folder `own`."""
    theirs, ours = model / "tokenizer.json", own / "tokenizer.json"
    if not theirs.exists() or model == own:
        return True
    return ours.exists() and theirs.read_bytes() == ours.read_bytes()


def read_ends(path: Path) -> tuple[int, ...]:
    """The eos_token_id of a generation_config.json or a config.json; () where it, or the file, is missing.

    Raises InputError.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path), way_out=AGAIN) from error
    found = config.get("eos_token_id") if isinstance(config, dict) else None
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        what = f"eos_token_id is {found!r}, not a token id or a list of them"
        raise InputError(what, where=str(path), way_out="write the number of the token that ends a turn")
    return tuple(ends)


def _template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an assistant's message; None where it ends with none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    text = _rendered(tokenizer, messages)
    if text is None or MARK not in text:
        return None
    after = text[text.rindex(MARK) + len(MARK) :].lstrip()
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    found = [content for content in added if content and after.startswith(content)]
    return added[max(found, key=len)] if found else None


# --- chat templates ------------------------------------------------------------------------------


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Any, **variables: Any) -> str | None:
    """What the chat template makes of messages; None where there is none, or it refuses them."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **variables)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None
    return text if isinstance(text, str) else None


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows today's date, so that the same messages have other ids tomorrow."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return False
    messages = [{"role": "user", "content": "?"}]
    days = [
        _rendered(tokenizer, messages, add_generation_prompt=True, strftime_now=lambda form, day=day: day)
        for day in ("one day", "another day")
    ]
    return days[0] != days[1]


def without_opened(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], text: str, where: str = ""
) -> str:
    """A written completion without the tag that its prompt's end has opened already, such as `<think>`.

    prompt_ids: ids of the prompt. Raises InputError, at `where` (the completion's place), if the prompt has
    closed the tag too (thinking is off) and the completion opens it with something in it.
    """
    opened = OPENED.search(tokenizer.decode(list(prompt_ids[-TAIL:]), skip_special_tokens=False))
    tag = "" if opened is None else f"<{opened['name']}>"
    if opened is None or not text.lstrip().startswith(tag):
        return text
    rest = text.lstrip()[len(tag) :]
    closing = opened["closing"]
    if closing is None:
        return rest.removeprefix(opened["gap"])
    if not rest.lstrip().startswith(closing):
        raise InputError(
            f"an answer begins with {tag}, and the prompt's end has {tag} and {closing} already: "
            f"{text.strip()[:60]!r}",
            where=where or str(tokenizer.name_or_path),
            way_out=f"take what is between {tag} and {closing} out of the answers, or have the chat template "
            "leave the thinking to the model (chat_template_kwargs)",
        )
    return rest.lstrip()[len(closing) :].removeprefix(opened["after"])
