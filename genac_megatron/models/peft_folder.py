"""PEFT's folders of adapters: what they hold, by their configuration and header alone. Imports no torch.

adapter_config.json says rank, alpha and projections; adapter_model.safetensors has a lora_A and a lora_B of
each. How tensors are called differs by who saved them, and whether a library stood around the model:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight             PEFT
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight     its state by the adapter's name
    base_model.model.layers.0..., model.layers.0..., layers.0...               without a head, without PEFT
"""

from __future__ import annotations

import json
import math
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from genac_megatron.errors import InputError
from genac_megatron.links import refuse_unreadable
from genac_megatron.models.families.base import Shape
from genac_megatron.models.hf_headers import FLOAT_NAMES, SHOWN_FAULTS, Header, open_header
from genac_megatron.models.registry import ADAPTER, rules
from genac_megatron.models.sizes import Size, hf_size
from genac_megatron.recipe.training import TARGETS, AdapterConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", ADAPTER
NAME = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?"
    r"(?P<module>layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\.lora_(?P<part>[AB])(?:\.\w+)?\.weight"
)
# What an adapter of another kind says of itself, and the values of one of ours.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}
REQUIRED = ("peft_type",)


class PeftHeaders:
    """A PEFT folder's configuration and header. Every fault is an InputError that names file or tensor."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        refuse_unreadable(self.path)
        if not (self.path / CONFIG).is_file():
            raise InputError(f"has no {CONFIG}", where=str(self.path), way_out="give a PEFT adapter's folder")
        if not (self.path / WEIGHTS).is_file():
            other = "save them with safe_serialization=True" if any(self.path.glob("*.bin")) else "fetch it"
            raise InputError(f"has no {WEIGHTS}", where=str(self.path), way_out=other)
        self.config = self._config()
        self._header = open_header(self.path / WEIGHTS)

    def _config(self) -> dict[str, Any]:
        path = self.path / CONFIG
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(found, dict)
        except (OSError, ValueError, AssertionError) as error:
            what = f"is not an adapter's configuration ({error!r})"
            raise InputError(what, where=str(path), way_out="give a PEFT adapter's folder") from error
        for key, values in PLAIN.items():
            if found.get(key, values[0] if key not in REQUIRED else None) not in values:
                raise InputError(
                    f"{key} is {found.get(key)!r}, which adapters here have not",
                    where=str(path),
                    way_out="merge it into its model (PEFT: merge_and_unload) and begin with that folder",
                )
        return found

    @cached_property
    def entries(self) -> dict[tuple[str, str], str]:
        """(a Hugging Face module, A or B) -> the tensor's name in the file."""
        found: dict[tuple[str, str], str] = {}
        for name in self._header.entries:
            match = NAME.fullmatch(name)
            key = (f"model.{match['module']}", match["part"]) if match else None
            if key is None or key in found:
                what = f"tensor {name} is no projection's lora_A or lora_B" if key is None else (
                    f"tensors {found[key]} and {name} are of one projection"
                )  # fmt: skip
                raise InputError(what, where=str(self.path / WEIGHTS), way_out="give a folder of one adapter")
            found[key] = name
        return found

    def adapter(self) -> AdapterConfig:
        """Rank, alpha and targets, as a recipe says them. rsLoRA's alpha / sqrt(rank) is ours over rank."""
        try:
            rank, alpha = int(self.config["r"]), float(self.config["lora_alpha"])
            if self.config.get("use_rslora"):
                alpha *= math.sqrt(rank)
            there = {module.rpartition(".")[2] for module, _ in self.entries}
            targets = [target for target in TARGETS if target in there]
            return AdapterConfig(rank=rank, alpha=alpha, targets=targets)
        except (KeyError, TypeError, ValueError) as error:
            what = f"says no rank and alpha of projections that are known here ({error!r:.200})"
            way_out = f"it needs r and lora_alpha, and modules among {', '.join(TARGETS)}"
            raise InputError(what, where=str(self.path / CONFIG), way_out=way_out) from error

    def check(self, shape: Shape) -> None:
        """Raise InputError naming what is missing, surplus or misshapen beside a model of this shape."""
        adapter = self.adapter()
        wanted: dict[tuple[str, str], Size] = {}
        for layer in range(shape.layers):
            for rule in rules(shape):
                for template in rule.hf if rule.per_layer and rule.name.endswith(".weight") else ():
                    module = template.format(layer=layer).removesuffix(".weight")
                    if module.rpartition(".")[2] in adapter.targets:
                        out, into = hf_size(f"{module}.weight", shape)
                        wanted |= {(module, "A"): (adapter.rank, into), (module, "B"): (out, adapter.rank)}
        missing = [key for key in wanted if key not in self.entries]
        faults = [f"{module}.lora_{part} is missing" for module, part in missing]
        for key, name in self.entries.items():
            entry = self._header.entries[name]
            if key not in wanted:
                faults.append(f"{name} is beside no projection of the model")
            elif tuple(entry["shape"]) != wanted[key]:
                faults.append(f"{name} is {tuple(entry['shape'])}, expected {wanted[key]}")
            elif entry["dtype"] not in FLOAT_NAMES:
                faults.append(f"{name} is {entry['dtype']}, not one of {', '.join(FLOAT_NAMES)}")
        if faults:
            more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
            raise InputError(
                "; ".join(faults[:SHOWN_FAULTS]) + more,
                where=str(self.path / WEIGHTS),
                way_out=f"it is another model's, or of a part of its layers: {shape.family} with "
                f"{shape.layers} layers, hidden {shape.hidden}",
            )

    def entry(self, module: str, part: str) -> tuple[Header, str, dict[str, Any]]:
        """A tensor's file, name and header entry."""
        name = self.entries[module, part]
        return self._header, name, self._header.entries[name]
