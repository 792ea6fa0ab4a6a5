"""What is wrong with a model folder's files whatever they hold: links that lead nowhere, as a download cache
leaves them whose files were removed; a byte order mark before JSON.
"""

from __future__ import annotations

from pathlib import Path

from genac_megatron.errors import InputError

BOM = b"\xef\xbb\xbf"
# Of files that a model or a tokenizer is made of; others (a pruned .bin) are not read anyway.
SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt")


def refuse_unreadable(folder: Path) -> None:
    """Raise InputError naming the links to nothing among a model folder's files, or JSON behind a mark.

    A reader that asks whether a file exists takes a folder with such links for one that never had it.
    """
    if not folder.is_dir():
        return
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
        gone = [path for path in files if _dangles(path)]
        marked = [path for path in files if path.suffix == ".json" and path.is_file() and _is_marked(path)]
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}",
            where=str(folder),
            way_out="see its owner and rights (ls -ld)",
        ) from error
    if gone:
        more = f" ({len(gone) - 1} more such links)" if len(gone) > 1 else ""
        raise InputError(
            f"{gone[0].name} is a link to {gone[0].readlink()}, and nothing is there{more}",
            where=str(folder),
            way_out="fetch the folder again, whole, or copy it with its links followed (cp -rL)",
        )
    if marked:
        raise InputError(
            "begins with a byte order mark, which readers of JSON refuse",
            where=str(marked[0]),
            way_out="save it as UTF-8 without one: sed -i '1s/^\\xEF\\xBB\\xBF//' FILE",
        )


def _dangles(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _is_marked(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(BOM)) == BOM
