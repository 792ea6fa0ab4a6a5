"""GenAC-Megatron: LLM reinforcement learning with a generative critic, on Megatron-core.

`import genac_megatron as genac` gives what `__all__` names (library.py), each imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from genac_megatron.library import (
        Comparison,
        FinishedRun,
        GenacError,
        Recipe,
        compare,
        dump_recipe,
        load_recipe,
        open_run,
        run,
        score,
        to_hf,
        to_megatron,
    )

__all__ = [
    "Comparison",
    "FinishedRun",
    "GenacError",
    "Recipe",
    "compare",
    "dump_recipe",
    "load_recipe",
    "open_run",
    "run",
    "score",
    "to_hf",
    "to_megatron",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"genac_megatron has no {name}; it has {', '.join(__all__)}")
    from genac_megatron import library

    return getattr(library, name)
