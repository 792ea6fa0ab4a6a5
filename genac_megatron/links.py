"""Links in a folder that lead nowhere, as a download cache leaves them whose files were removed."""

from __future__ import annotations

from pathlib import Path

from genac_megatron.errors import InputError

# Of files that a model or a tokenizer is made of; others (a pruned .bin) are not read anyway.
SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt")


def refuse_dangling(folder: Path) -> None:
    """Raise InputError naming the links to nothing among a model folder's files.

    A reader that asks whether a file exists takes such a folder for one that never had it.
    """
    if not folder.is_dir():
        return
    try:
        gone = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and _dangles(path))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(folder)) from error
    if gone:
        more = f" ({len(gone) - 1} more such links)" if len(gone) > 1 else ""
        raise InputError(
            f"{gone[0].name} is a link to {gone[0].readlink()}, and nothing is there{more}",
            where=str(folder),
            way_out="fetch the folder again, whole, or copy it with its links followed (cp -rL)",
        )


def _dangles(path: Path) -> bool:
    return path.is_symlink() and not path.exists()
