"""A Hugging Face model folder's safetensors, read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import hf_names, hf_size

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HfFolder:
    """The weights of a folder with model.safetensors, or with shards and their index.

    Opening reads headers only. Every fault is an InputError that names the file or the tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._open: dict[Path, _Header] = {}
        self._file_of = self._find()

    def _find(self) -> dict[str, Path]:
        """Which file holds which tensor."""
        index = self.path / INDEX
        if index.exists():
            try:
                entries = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise InputError(f"is not an index of shards ({error!r})", where=str(index)) from error
            return {name: self.path / file for name, file in entries.items()}
        single = self.path / SINGLE
        if not single.exists():
            raise InputError(f"has no {SINGLE} and no {INDEX}", where=str(self.path), way_out=self._instead())
        return dict.fromkeys(self._file(single).entries, single)

    def _instead(self) -> str:
        """What to do with a folder that has neither weights in one file nor an index."""
        if any(self.path.glob("*.safetensors")):
            return "there are shards without their index: fetch the folder again, whole"
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.gguf")):
            return "its weights are in another format: save them as safetensors"
        return "give a Hugging Face folder with weights"

    def _file(self, path: Path) -> _Header:
        if path not in self._open:
            try:
                with safe_open(str(path), framework="np"):
                    pass  # the library has looked at the header, and whether the file is as long as it says
                self._open[path] = _Header.of(path)
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"cannot be read ({error})",
                    where=str(path),
                    way_out="the file is missing, cut short or not safetensors: fetch the folder again",
                ) from error
        return self._open[path]

    @property
    def names(self) -> list[str]:
        """Names of all its tensors."""
        return list(self._file_of)

    def get(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU, in the file's dtype."""
        if name not in self._file_of:
            raise InputError(f"tensor {name} is missing", where=str(self.path))
        header, entry = self._entry(name)
        if entry["dtype"] not in FLOATS:
            raise InputError(
                f"tensor {name} is {entry['dtype']}, not one of {', '.join(FLOATS)}", where=str(self.path)
            )
        begin, end = entry["data_offsets"]
        raw = torch.empty(end - begin, dtype=torch.uint8)
        try:
            with header.path.open("rb") as file:
                file.seek(header.begin + begin)
                if file.readinto(raw.numpy().data) != end - begin:
                    raise OSError("cut short")
        except OSError as error:
            raise InputError(f"tensor {name}: {error}", where=str(header.path)) from error
        return raw.view(FLOATS[entry["dtype"]]).view(entry["shape"])

    def dtype(self, name: str) -> str:
        """The dtype of tensor `name`, in safetensors' words (F32, BF16, ...)."""
        return str(self._entry(name)[1]["dtype"])

    def check(self, shape: Shape) -> None:
        """Raise InputError naming the tensors of a model of `shape` that are missing, surplus, misshapen, or
        not of plain floating-point numbers.

        A tied model may carry its output layer, and old files their rotary tables; neither is read.
        """
        wanted = hf_names(shape)
        faults = [f"missing tensor {name}" for name in wanted.keys() - self._file_of.keys()]
        for name in self._file_of:
            unread = name.endswith("rotary_emb.inv_freq") or (shape.tie and name == "lm_head.weight")
            if name in wanted:
                size = tuple(self._entry(name)[1]["shape"])
                if size != hf_size(name, shape):
                    faults.append(f"{name} has shape {size}, expected {hf_size(name, shape)}")
                if self.dtype(name) not in FLOATS:
                    faults.append(f"{name} is {self.dtype(name)}, not one of {', '.join(FLOATS)}")
            elif not unread:
                faults.append(f"surplus tensor {name}")
        if faults:
            shown = "; ".join(sorted(faults)[:8])
            more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise InputError(shown + more, where=str(self.path))

    def _entry(self, name: str) -> tuple[_Header, dict[str, Any]]:
        """The header of a tensor's file, and what it says about it."""
        header = self._file(self._file_of[name])
        if name not in header.entries:
            raise InputError(f"tensor {name} is not in it, where the index has it", where=str(header.path))
        return header, header.entries[name]


class _Header(NamedTuple):
    """A safetensors file's header. Tensors are read by its byte ranges rather than through the library.

    That maps the file: what was read stays resident as long as it is open, and a file that is larger than
    memory cannot be mapped at all.
    """

    path: Path
    begin: int  # of the tensors' bytes
    entries: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, path: Path) -> _Header:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        return cls(path, 8 + length, entries)
