"""Where a benchmark's questions are read, as the command line says it."""

from __future__ import annotations

from collections.abc import Sequence

from genac_megatron.errors import InputError


def paths_of(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """NAME=PATH pairs; a bare PATH where there is one benchmark. Raises InputError."""
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals and len(names) == 1:
            name, path = names[0], text
        if name not in names:
            raise InputError(
                f"--path {text} is for none of {', '.join(names)}", way_out="write --path BENCHMARK=FILE"
            )
        found[name] = path
    return found
