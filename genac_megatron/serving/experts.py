"""A mixture of experts in transformers' memory, under the names that its files have."""

from __future__ import annotations

from torch import Tensor

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def by_file_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of a model in memory, with views of each expert's gate, up and down in place of stacks.

    transformers keeps gate over up [experts, 2 ffn, hidden] and down [experts, hidden, ffn]; in files every
    expert has three tensors of its own.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(GATE_UP):
            base = name.removesuffix("gate_up_proj")
            for expert, stacked in enumerate(tensor):
                gate, up = stacked.chunk(2)
                found |= {f"{base}{expert}.gate_proj.weight": gate, f"{base}{expert}.up_proj.weight": up}
        elif name.endswith(DOWN):
            base = name.removesuffix("down_proj")
            found |= {f"{base}{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            found[name] = tensor
    return found
