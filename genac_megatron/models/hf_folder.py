"""A Hugging Face model folder's safetensors, read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from genac_megatron.errors import InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import hf_names, hf_size

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F32", "BF16", "F16")


class HfFolder:
    """The weights of a folder with model.safetensors, or with shards and their index.

    Opening reads headers only. Every fault is an InputError that names the file or the tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[Path, Any] = {}
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
        return dict.fromkeys(self._file(single).keys(), single)

    def _instead(self) -> str:
        """What to do with a folder that has neither weights in one file nor an index."""
        if any(self.path.glob("*.safetensors")):
            return "there are shards without their index: fetch the folder again, whole"
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.gguf")):
            return "its weights are in another format: save them as safetensors"
        return "give a Hugging Face folder with weights"

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(str(path), framework="pt")
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
        path = self._file_of[name]
        try:
            # Opened anew: pages that a mapped file has read stay resident as long as its handle lives.
            with safe_open(str(path), framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"tensor {name}: {error}", where=str(path)) from error
        return tensor

    def dtype(self, name: str) -> str:
        """The dtype of tensor `name`, in safetensors' words (F32, BF16, ...)."""
        return str(self._slice(name).get_dtype())

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
                size = tuple(self._slice(name).get_shape())
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

    def _slice(self, name: str) -> Any:
        """A tensor's header: nothing is read before it is indexed."""
        try:
            return self._file(self._file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise InputError(f"tensor {name}: {error}", where=str(self._file_of[name])) from error
