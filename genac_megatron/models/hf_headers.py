"""What a Hugging Face model folder's safetensors hold, by their headers alone. Imports no torch.

Recipes are checked with it before anything is started, and `hf_folder` reads tensors through it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from genac_megatron.errors import InputError
from genac_megatron.links import refuse_unreadable
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import shape_from_folder
from genac_megatron.models.sizes import hf_names, hf_size
from genac_megatron.recipe.schema import ModelConfig

WHOLE = "fetch the folder again, whole"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOAT_NAMES = ("F32", "BF16", "F16")
EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# All experts of a layer in one tensor, as transformers 5 holds them: the parts of each, in their order.
FUSED_EXPERTS = {
    "mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),  # [experts, 2 ffn, hidden]
    "mlp.experts.down_proj": ("down_proj",),  # [experts, hidden, ffn]
}
SHOWN_FAULTS = 8
BLOCK = 1 << 24  # bytes that are compared at a time


def begins_with_weights(model: ModelConfig, *, resuming: bool = False, adapter: bool = False) -> bool:
    """Whether a role is given its folder's weights, or random ones, before anything else.

    A checkpoint brings them all, but for a scalar head that a language model's lacks, and an adapter's base.
    """
    if model.head != "lm" or adapter:
        return model.head != "lm" or model.base is None
    return not (resuming or model.checkpoint is not None)


def check_weights(
    model: ModelConfig, *, resuming: bool = False, planning: bool = False, adapter: bool = False
) -> None:
    """Raise InputError where a role would read its folder's weights, and they are not those of the model that
    its config.json describes.

    planning: a folder without any weights will do.
    """
    if model.hf is None or not begins_with_weights(model, resuming=resuming, adapter=adapter):
        return
    folder = Path(model.hf).expanduser()
    if not planning or any(folder.glob("*.safetensors*")):
        HfHeaders(folder).check(shape_from_folder(folder))


class HfHeaders:
    """The headers of a folder with model.safetensors, or with shards and their index.

    Where both are there the single file is read and the index is not, as transformers does. Experts that are
    fused in one tensor are given one by one, under the names of a Qwen3-MoE folder. Every fault is an
    InputError that names the file or the tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._open: dict[Path, Header] = {}
        refuse_unreadable(self.path)
        self._file_of = self._find()
        for name in [name for name in self._file_of if name.endswith(tuple(FUSED_EXPERTS))]:
            self._unfuse(name)

    def _find(self) -> dict[str, Path]:
        """Which file holds which tensor."""
        single, index = self.path / SINGLE, self.path / INDEX
        if single.is_file():
            return dict.fromkeys(self._file(single).entries, single)
        if not index.is_file():
            raise InputError(f"has no {SINGLE} and no {INDEX}", where=str(self.path), way_out=self._instead())
        try:
            entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): self.path / file for name, file in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"is not an index of shards ({error!r})", where=str(index), way_out=WHOLE
            ) from error

    def _instead(self) -> str:
        """What to do with a folder that has neither weights in one file nor an index."""
        found = sorted(self.path.glob("*.safetensors"))
        if len(found) == 1 and "-of-" not in found[0].name:
            return f"there is {found[0].name}: where it is the whole model, rename it to {SINGLE}"
        if found:
            return f"there are shards without their index: {WHOLE}"
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.gguf")):
            return "its weights are in another format: save them as safetensors"
        return "give a Hugging Face folder with weights"

    def _unfuse(self, name: str) -> None:
        """Put each expert's tensors in the place of one that holds a layer's: stretches of its bytes."""
        header, entry = self.entry(name)
        stem, _, kind = name.rpartition(".")
        parts = FUSED_EXPERTS[f"mlp.experts.{kind}"]
        if len(entry["shape"]) != 3 or entry["shape"][1] % len(parts):
            return  # then it is surplus
        experts, rows, columns = entry["shape"]
        names = [f"{stem}.{expert}.{part}.weight" for expert in range(experts) for part in parts]
        if any(each in self._file_of for each in names):
            return
        begin, end = entry["data_offsets"]
        size = (end - begin) // len(names)
        for number, each in enumerate(names):
            first = begin + number * size
            header.entries[each] = entry | {
                "shape": [rows // len(parts), columns],
                "data_offsets": [first, first + size],
            }
            self._file_of[each] = self._file_of[name]
        del self._file_of[name]

    def _file(self, path: Path) -> Header:
        if path not in self._open:
            self._open[path] = open_header(path)
        return self._open[path]

    @property
    def names(self) -> list[str]:
        """Names of all its tensors."""
        return list(self._file_of)

    def dtype(self, name: str) -> str:
        """The dtype of tensor `name`, in safetensors' words (F32, BF16, ...)."""
        return str(self.entry(name)[1]["dtype"])

    def entry(self, name: str) -> tuple[Header, dict[str, Any]]:
        """The header of a tensor's file, and what it says about it. Raises InputError where it is missing."""
        if name not in self._file_of:
            raise InputError(f"tensor {name} is missing", where=str(self.path), way_out=WHOLE)
        header = self._file(self._file_of[name])
        if name not in header.entries:
            what = f"tensor {name} is not in it, where the index has it"
            raise InputError(what, where=str(header.path), way_out=WHOLE)
        return header, header.entries[name]

    def check(self, shape: Shape) -> None:
        """Raise InputError naming the tensors of a model of `shape` that are missing, surplus, misshapen, or
        not of plain floating-point numbers.

        Of what is surplus two are let pass: rotary tables of old files, and the output layer of a tied model
        where it is the embedding again.
        """
        wanted = hf_names(shape)
        faults = [f"missing tensor {name}" for name in wanted.keys() - self._file_of.keys()]
        surplus = []
        for name in self._file_of:
            if name in wanted:
                size = tuple(self.entry(name)[1]["shape"])
                if size != hf_size(name, shape):
                    faults.append(f"{name} has shape {size}, expected {hf_size(name, shape)}")
                if self.dtype(name) not in FLOAT_NAMES:
                    faults.append(f"{name} is {self.dtype(name)}, not one of {', '.join(FLOAT_NAMES)}")
            elif not name.endswith("rotary_emb.inv_freq") and not (shape.tie and name == OUTPUT):
                surplus.append(name)
        faults += [f"surplus tensor {name}" for name in surplus]
        if faults:
            faults.sort()
            shown = "; ".join(faults[:SHOWN_FAULTS])
            more = f" and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
            missing = wanted.keys() - self._file_of.keys()
            raise InputError(shown + more, where=str(self.path), way_out=_way_out(missing, surplus))
        if shape.tie and OUTPUT in self._file_of:
            self._check_tie()

    def _check_tie(self) -> None:
        """Raise InputError where a tied model's output layer is not its embedding."""
        if not self._same(EMBEDDING, OUTPUT):
            raise InputError(
                f"config.json says that the output layer is the embedding (tie_word_embeddings), and "
                f"{OUTPUT} is not {EMBEDDING}: readers differ in which they take",
                where=str(self.path),
                way_out=f"set tie_word_embeddings to false in config.json to use {OUTPUT}, or save the "
                "model without it",
            )

    def _same(self, one: str, other: str) -> bool:
        """Whether two tensors have the same dtype, shape and bytes; read block by block."""
        (here, a), (there, b) = self.entry(one), self.entry(other)
        if (a["dtype"], a["shape"]) != (b["dtype"], b["shape"]):
            return False
        left = a["data_offsets"][1] - a["data_offsets"][0]
        with here.path.open("rb") as first, there.path.open("rb") as second:
            first.seek(here.begin + a["data_offsets"][0])
            second.seek(there.begin + b["data_offsets"][0])
            while left > 0:
                if first.read(min(BLOCK, left)) != second.read(min(BLOCK, left)):
                    return False
                left -= BLOCK
        return True


def _way_out(missing: set[str], surplus: list[str]) -> str:
    """What helps where a folder's tensors are not its config.json's."""
    if (prefix := _prefix(missing, surplus)) is not None:
        return f"its tensors are named with '{prefix}' before them: save the language model by itself"
    if NORM in missing and NORM.removeprefix("model.") in surplus:
        return "its tensors are those of a model without a head: save it as one for causal language modelling"
    if missing == {OUTPUT}:
        return "where its output layer is the embedding, set tie_word_embeddings to true in config.json"
    if surplus and not missing:
        return (
            "config.json does not describe them, so the model would be computed without: have config.json "
            "name what it is, or save the model without them"
        )
    return "config.json and weights are not of one model: fetch the folder again, whole"


def _prefix(missing: set[str], surplus: list[str]) -> str | None:
    """What stands before the names of all missing tensors, as wrappers of models leave it there."""
    found = next((name for name in surplus if NORM in missing and name.endswith(f".{NORM}")), None)
    prefix = None if found is None else found.removesuffix(NORM)
    return prefix if prefix is not None and all(f"{prefix}{name}" in surplus for name in missing) else None


class Header(NamedTuple):
    """A safetensors file's header. Tensors are read by its byte ranges rather than through the library.

    That maps the file: what was read stays resident as long as it is open, and a file that is larger than
    memory cannot be mapped at all.
    """

    path: Path
    begin: int  # of the tensors' bytes
    entries: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, path: Path) -> Header:
        """The header of a file that safetensors can open. Raises OSError."""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        return cls(path, 8 + length, entries)


def open_header(path: Path) -> Header:
    """The header of a safetensors file. Raises InputError."""
    try:
        with safe_open(str(path), framework="np"):
            pass  # the library has looked at the header, and whether the file is as long as it says
        return Header.of(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot be read ({error})",
            where=str(path),
            way_out="the file is missing, cut short or not safetensors: fetch the folder again",
        ) from error
