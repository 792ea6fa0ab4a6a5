"""Chat templates that a recipe gives, and the variables that it sets in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Variables and functions that transformers gives to a chat template: not a recipe's.
RENDERED = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace"}


def template_text(given: str) -> str:
    """A recipe's chat template: what the file `given` holds, or `given` itself where it is Jinja.

    Raises InputError where the file cannot be read, or holds no template.
    """
    if "{{" in given or "{%" in given:
        return checked_template(given, "model.chat_template")
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(
            f"cannot read the chat template {given}: {reason}",
            where="model.chat_template",
            way_out="give the path of a Jinja file, or the template's text, which has {{ ... }}",
        ) from error
    return checked_template(text, given)


def checked_template(text: str, where: str) -> str:
    """`text`, which shows messages. Raises InputError, at `where`, where it is no template, or shows none."""
    if "messages" not in _read_by(text, where):
        raise InputError(
            "the chat template does not read `messages`",
            where=where,
            way_out="for example: {% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
        )
    return text


def set_template_variables(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
    """Set variables at the head of the chat template, so that whoever renders it has them.

    Raises InputError where the template reads no variable of that name.
    """
    template, where = tokenizer.chat_template, str(tokenizer.name_or_path)
    if not isinstance(template, str):
        raise InputError(
            "chat_template_kwargs need one chat template",
            where=where,
            way_out="put a chat_template.jinja beside tokenizer.json, or give model.chat_template",
        )
    read = _variables(template)
    for name in variables:
        if name not in read:
            known = ", ".join(sorted(read)) or "none"
            raise InputError(
                f"chat_template_kwargs sets '{name}', which its chat template does not read",
                where=where,
                way_out=f"take it out, or correct its name: the template's variables are {known}",
            )
    # A literal of Python is one of Jinja. transformers' Jinja takes the line's end away with the block.
    head = "".join(f"{{% set {name} = {value!r} %}}\n" for name, value in variables.items())
    tokenizer.chat_template = head + template


def _variables(template: str) -> set[str]:
    """What a recipe may set of what a chat template reads. Raises InputError where it is no template."""
    return _read_by(template, "chat_template_kwargs") - RENDERED


def _read_by(template: str, where: str) -> set[str]:
    """The variables that a chat template reads. Raises InputError, at `where`, where it is no template."""
    from jinja2 import Environment, TemplateError, meta

    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # a tag that transformers adds
    try:
        read = meta.find_undeclared_variables(
            Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
        )
    except TemplateError as error:
        raise InputError(
            f"the chat template cannot be read: {error}",
            where=where,
            way_out="correct it, or give another by model.chat_template (recipes/base-models/plain.jinja)",
        ) from error
    return {str(name) for name in read}
