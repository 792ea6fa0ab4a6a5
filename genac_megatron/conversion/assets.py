"""What a Hugging Face folder has beside weights: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from genac_megatron.errors import InputError
from genac_megatron.links import refuse_unreadable
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import hf_config, shape_from_folder
from genac_megatron.observe.runinfo import RunFolder, write_json_atomic, write_text_atomic
from genac_megatron.tasks.chat_template import template_text
from genac_megatron.tasks.tokenizer import (
    BUILTIN,
    CONFIG,
    GENERATION,
    TINY_FOLDER,
    check_rows,
    load_tokenizer,
    read_ends,
    stop_token_ids,
)

TEMPLATE = "chat_template.jinja"
HF = "hf"  # a converted checkpoint's folder of these
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates",
)  # fmt: skip


@dataclass(frozen=True)
class Assets:
    """Where they come from."""

    tokenizer: Path  # a folder with tokenizer.json
    config: Path | None  # a folder with config.json; None: it is made of the shape
    template: str | None = None  # the recipe's chat template, in the place of the tokenizer's
    variables: Mapping[str, Any] = field(default_factory=dict)  # the recipe's chat_template_kwargs

    def of(self, shape: Shape) -> Assets:
        """These for a model of `shape`: the config of the language model that a scalar critic began as is not
        its own, which is made of its shape.
        """
        if self.config is None or not shape.value or (found := shape_from_folder(self.config)).value:
            return self
        return replace(self, config=None) if shape.may_start_from(found) else self

    def check(self, shape: Shape) -> None:
        """Raise InputError where tokenizer or config are not those of a model of `shape`."""
        check_rows(str(self.tokenizer), shape.vocab, str(self.tokenizer))
        for place in {self.tokenizer, self.config or self.tokenizer}:
            refuse_unreadable(place)
            read_ends(place / GENERATION)
        if self.config is not None and (found := shape_from_folder(self.config)) != shape:
            raise InputError(
                f"its config.json is another model's: {_difference(found, shape)}",
                where=str(self.config),
                way_out="give the model's own folder with --assets",
            )

    def write(self, folder: Path, shape: Shape, dtype: torch.dtype) -> None:
        """Put them into `folder`."""
        for name in FILES:
            source = self.tokenizer / name
            if source.is_dir():
                shutil.copytree(source, folder / name, dirs_exist_ok=True)
            elif source.exists():
                shutil.copyfile(source, folder / name)
        if self.variables:  # whoever renders it has them
            loaded = load_tokenizer(str(self.tokenizer), None, self.variables, self.template)
            write_text_atomic(folder / TEMPLATE, str(loaded.chat_template))
        elif self.template is not None:
            write_text_atomic(folder / TEMPLATE, template_text(self.template))
        ends = {} if self._names_ends else _ends(self.tokenizer, self.config, self.template)
        config, generation = {**hf_config(shape), **ends}, {}
        if self.config is not None:
            config = _read(self.config / CONFIG)
            generation = _read(self.config / GENERATION) if (self.config / GENERATION).exists() else {}
        named = str(dtype).removeprefix("torch.")
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": named}
        write_json_atomic(folder / CONFIG, config)
        write_json_atomic(folder / GENERATION, generation | ends)

    @property
    def _names_ends(self) -> bool:
        """Whether the source's own generation config says where a turn ends.

        What is taught as an end is one of those then (`tasks.tokenizer.set_ends`).
        """
        if self.config is None or self.config != self.tokenizer:
            return False
        added = _added_ids(self.tokenizer)
        return any(end in added for end in read_ends(self.config / GENERATION))


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _difference(found: Shape, wanted: Shape) -> str:
    names = vars(wanted)
    return ", ".join(
        f"{k} {getattr(found, k)} (here {v})" for k, v in names.items() if getattr(found, k) != v
    )


def _added_ids(tokenizer: Path) -> set[int]:
    """Ids of the tokens that were added to a tokenizer's vocabulary, special ones among them."""
    return {token["id"] for token in _read(tokenizer / "tokenizer.json").get("added_tokens", [])}


def _ends(tokenizer: Path, config: Path | None, template: str | None) -> dict[str, Any]:
    """Token ids that begin, end and pad, from the tokenizer and what the model's folder says."""
    model = None if config is None else str(config)
    loaded = load_tokenizer(str(tokenizer), model, None, template)
    stops = list(stop_token_ids(loaded, model))
    ids = {"eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": loaded.pad_token_id}
    return ids if loaded.bos_token_id is None else {"bos_token_id": loaded.bos_token_id, **ids}


def of_folder(folder: Path, given: str | None = None) -> Assets:
    """Those of a Hugging Face folder; its tokenizer from elsewhere where `given` names another place."""
    return Assets(_place(given) if given else folder, folder)


def of_checkpoint(path: Path, role: str, given: str | None = None) -> Assets:
    """Those that go with a role of a checkpoint: given, kept in it, or named by its run's recipe.

    given: a Hugging Face folder, or builtin:tiny. Raises InputError where there is none.
    """
    if given:
        return _in(_place(given))
    if (path / HF).is_dir():
        return _in(path / HF)
    model = _recipe_model(path, role)
    if model is None:
        raise InputError(
            f"nothing here says which tokenizer its {role} has",
            where=str(path),
            way_out="name its Hugging Face folder, or builtin:tiny, with --assets",
        )
    hf = Path(str(model["hf"])).expanduser() if model.get("hf") else None
    tokenizer = _place(str(model["tokenizer"])) if model.get("tokenizer") else hf
    if tokenizer is None:
        raise InputError(f"the recipe names no tokenizer for {role}", where=str(path), way_out="use --assets")
    template = model.get("chat_template")
    variables = model.get("chat_template_kwargs") or {}
    return Assets(tokenizer, hf, None if template is None else str(template), variables)


def trained_from(path: Path, role: str) -> str | None:
    """The Hugging Face folder that a role of a checkpoint began with, by its run's recipe; None: it has none.

    With a `base` it began with another checkpoint's weights.
    """
    model = _recipe_model(path, role) or {}
    return None if model.get("base") or not model.get("hf") else str(model["hf"])


def _place(given: str) -> Path:
    return TINY_FOLDER if given == BUILTIN else Path(given).expanduser()


def _in(folder: Path) -> Assets:
    return Assets(folder, folder if (folder / CONFIG).exists() else None)


def _recipe_model(path: Path, role: str) -> Mapping[str, Any] | None:
    """A role's model block in the recipe of the run that a checkpoint lies in."""
    roles = RunFolder(path.absolute().parent.parent).resolved_recipe().get("roles") or {}
    model = (roles.get(role) or {}).get("model")
    return model if isinstance(model, Mapping) else None
