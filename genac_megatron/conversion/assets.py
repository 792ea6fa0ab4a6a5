"""What a Hugging Face folder has beside weights: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import hf_config, shape_from_folder
from genac_megatron.observe.runinfo import RunFolder, write_json_atomic
from genac_megatron.tasks.tokenizer import (
    BUILTIN,
    TINY_FOLDER,
    load_tokenizer,
    stop_token_ids,
    tokenizer_size,
)

HF = "hf"  # a converted checkpoint's folder of these
CONFIG, GENERATION = "config.json", "generation_config.json"
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

    def check(self, shape: Shape) -> None:
        """Raise InputError where tokenizer or config are not those of a model of `shape`."""
        known = tokenizer_size(str(self.tokenizer), str(self.tokenizer))
        if known > shape.vocab:
            raise InputError(
                f"its tokenizer has ids up to {known - 1}, the model only {shape.vocab} embeddings",
                where=str(self.tokenizer),
                way_out="give the model's own tokenizer with --assets",
            )
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
        ends = None if self.config is not None else _ends(self.tokenizer)
        config = hf_config(shape) if self.config is None else _read(self.config / CONFIG)
        named = str(dtype).removeprefix("torch.")
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": named} | (ends or {})
        write_json_atomic(folder / CONFIG, config)
        if self.config is not None and (self.config / GENERATION).exists():
            shutil.copyfile(self.config / GENERATION, folder / GENERATION)
        else:
            write_json_atomic(folder / GENERATION, ends or _ends(self.tokenizer))


def _read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _difference(found: Shape, wanted: Shape) -> str:
    names = vars(wanted)
    return ", ".join(
        f"{k} {getattr(found, k)} (here {v})" for k, v in names.items() if getattr(found, k) != v
    )


def _ends(tokenizer: Path) -> dict[str, Any]:
    """Token ids that begin, end and pad, from the tokenizer."""
    loaded = load_tokenizer(str(tokenizer))
    stops = list(stop_token_ids(loaded))
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
    return Assets(tokenizer, hf)


def _place(given: str) -> Path:
    return TINY_FOLDER if given == BUILTIN else Path(given).expanduser()


def _in(folder: Path) -> Assets:
    return Assets(folder, folder if (folder / CONFIG).exists() else None)


def _recipe_model(path: Path, role: str) -> Mapping[str, Any] | None:
    """A role's model block in the recipe of the run that a checkpoint lies in."""
    roles = RunFolder(path.absolute().parent.parent).resolved_recipe().get("roles") or {}
    model = (roles.get(role) or {}).get("model")
    return model if isinstance(model, Mapping) else None
