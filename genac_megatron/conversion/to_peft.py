"""A role's adapters in a checkpoint, as a PEFT folder, or merged with the model that they stand beside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genac_megatron.conversion.safetensors_file import write_safetensors
from genac_megatron.conversion.stored import StoredWeights
from genac_megatron.conversion.to_hf import ToHf
from genac_megatron.conversion.units import Unit
from genac_megatron.dtypes import DTYPES
from genac_megatron.errors import InputError
from genac_megatron.models.adapters import Place, places
from genac_megatron.models.families.base import Shape
from genac_megatron.models.hf_folder import HfFolder
from genac_megatron.models.peft import CONFIG, WEIGHTS, peft_config, peft_names, peft_sizes
from genac_megatron.models.sizes import hf_names
from genac_megatron.observe.runinfo import write_json_atomic
from genac_megatron.publication.digest import WeightDigest
from genac_megatron.recipe.schema import AdapterConfig


@dataclass(frozen=True)
class Adapted:
    """A role's adapters in a checkpoint. said: what its manifest says of them."""

    weights: Path
    role: str
    shape: Shape
    said: Mapping[str, Any]

    @cached_property
    def config(self) -> AdapterConfig:
        return AdapterConfig.model_validate({key: self.said[key] for key in ("rank", "alpha", "targets")})

    @cached_property
    def stored(self) -> StoredWeights:
        return StoredWeights(self.weights, self.role, self.shape)

    @property
    def places(self) -> list[Place]:
        return list(places(self.shape, self.config, range(self.shape.layers)))

    def parts(self, place: Place) -> dict[str, tuple[Tensor, Tensor]]:
        """A [rank, in] and B [out, rank] of a layer's projections, by their names. Raises InputError."""
        key = f"adapters.{place.key}"
        a = self.stored.whole(f"{key}.A").split(self.config.rank)
        bs = [self.stored.whole(f"{key}.B.{index}") for index in range(len(place.targets))]
        return dict(zip(place.projections, zip(a, bs, strict=True), strict=True))

    def need_language_model(self) -> None:
        """Raise InputError for a scalar critic."""
        if self.shape.value:
            raise InputError(
                f"its {self.role} is a scalar critic's adapter, which is not written in transformers' terms",
                where=str(self.weights.parent),
                way_out="train the whole critic (take training.adapter out) to convert it",
            )

    def need_base(self, folder: Path) -> HfFolder:
        """The model that the adapters stand beside. Raises InputError where the folder's is another."""
        base, digest = HfFolder(folder), WeightDigest()
        base.check(self.shape)
        dtype = DTYPES[self.said["dtype"]]
        digest.load_weights(0, ((name, base.get(name).to(dtype)) for name in hf_names(self.shape)))
        if digest.hexdigest() != self.said["base"]:
            raise InputError(
                f"it is not the model that {self.role}'s adapter was trained beside: "
                f"{digest.hexdigest():.12}, and the checkpoint says {self.said['base']:.12} "
                f"(in {self.said['dtype']})",
                where=str(folder),
                way_out="name the folder of roles.*.model.hf, or what its model.base was converted to",
            )
        return base


def write_peft(adapted: Adapted, dst: Path, base: str | None) -> None:
    """A PEFT folder: adapter_model.safetensors and adapter_config.json, which says `base` of the model.

    Raises InputError where `dst` exists, or a tensor cannot be read.
    """
    adapted.need_language_model()
    if dst.exists():
        raise InputError("exists already", where=str(dst), way_out="remove it, or name another folder")
    part = dst.with_name(dst.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    sizes = list(peft_sizes(adapted.shape, adapted.config, range(adapted.shape.layers)))
    write_safetensors(part / WEIGHTS, sizes, DTYPES[adapted.said["dtype"]], _tensors(adapted))
    write_json_atomic(part / CONFIG, peft_config(adapted.config, base))
    os.replace(part, dst)


def _tensors(adapted: Adapted) -> Iterator[tuple[str, Tensor]]:
    for place in adapted.places:
        for name, (a, b) in adapted.parts(place).items():
            yield from zip(peft_names(name), (a, b), strict=True)


@dataclass
class Merged(ToHf):
    """The conversion of adapters and their base to a Hugging Face folder: W + alpha / rank B A.

    base: its folder; None: it is in the checkpoint, as the weights of `role`.
    """

    adapted: Adapted
    base: Path | None

    @cached_property
    def folder(self) -> HfFolder | None:
        return None if self.base is None else HfFolder(self.base)

    def dtypes(self) -> set[torch.dtype]:
        return {DTYPES[self.adapted.said["dtype"]]}

    def plan(self) -> dict[str, Any]:
        base = None if self.base is None else str(self.base.absolute())
        return {**super().plan(), "base": base, "adapter": self.adapted.role}

    def _split(self, unit: Unit) -> dict[str, Tensor]:
        folder = self.folder
        found = {n: folder.get(n) for n, _ in unit.hf} if folder is not None else super()._split(unit)
        place = next((p for p in self.adapted.places if (p.rule, p.layer) == (unit.rule, unit.layer)), None)
        for name, (a, b) in (self.adapted.parts(place) if place is not None else {}).items():
            weight = found[f"{name}.weight"].to(DTYPES[self.adapted.said["dtype"]])
            found[f"{name}.weight"] = weight.float() + self.adapted.config.scale * (b.float() @ a.float())
        return found
