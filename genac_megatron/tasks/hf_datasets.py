"""A task from a Hugging Face dataset: by name, a folder (of files, or by save_to_disk), or a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from genac_megatron.errors import InputError
from genac_megatron.recipe.data import is_known_config
from genac_megatron.recipe.tasks import DatasetTask
from genac_megatron.tasks.filters import kept_rows
from genac_megatron.tasks.questions import QuestionTask, make_question_task, need_verifier, read_problems
from genac_megatron.tasks.rows import READERS, Located, as_row, iter_rows, shortener

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILDERS = ("json", "csv", "parquet")  # of `datasets`, whose files are read here
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk leaves: of one set, of several

T = TypeVar("T")


def make_dataset_task(
    config: DatasetTask, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> QuestionTask:
    """The task of `config.source`; held out are `heldout_split`'s problems, else a seeded share.

    Rows may name their split themselves, as those of JSON lines do; of a set with splits of its own, names
    that say something else are passed over. Raises InputError where the dataset, the split, a column or a
    pattern's match is missing.
    """
    need_verifier(config)
    single = is_one_set(config.source)
    if single and config.heldout_split is not None:
        raise InputError(
            f"it is one set of rows: a heldout_split ({config.heldout_split}) would be the same ones again",
            where=config.source,
            way_out="leave task.heldout_split out (rows may name their split), or give a folder with a file "
            "for each split",
        )
    notes: list[str] = []
    rows = kept_rows(distinct_rows(config, config.split, notes), config, notes)
    train, given = read_problems(rows, config, by_split="yes" if single else "known")
    heldout: list[Any] | None = given or None
    if config.heldout_split is not None:
        if given:
            raise InputError(
                f"{config.split_key!r} of a row of split {config.split!r} names a held-out one",
                where=given[0].where,
                way_out="leave task.heldout_split out, so that rows name their split, or set task.split_key: "
                "null where it says something else",
            )
        rows = kept_rows(distinct_rows(config, config.heldout_split, notes), config, notes)
        heldout = read_problems(rows, config, by_split="no")[0]
    return make_question_task(config, train, heldout, tokenizer, seed, config.source, notes)


def is_one_set(name: str) -> bool:
    """Whether a dataset has no splits of its own: a file, or a folder by Dataset.save_to_disk."""
    path = Path(name).expanduser()
    return path.is_file() or (path / SAVED).is_file()


def distinct_rows(config: DatasetTask, split: str, notes: list[str]) -> list[Located]:
    """The rows of a split, those that repeat another word for word left out, and told in `notes`.

    A data set may hold each row a hundred times (DAPO-Math-17k: 1.8 million): they are let go as they come.
    """
    seen: set[bytes] = set()
    kept: list[Located] = []
    count = 0
    for where, row in _rows(config, split):
        count += 1
        key = hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            kept.append((where, row))
    if count > len(kept):
        notes.append(
            f"{count - len(kept):,} of {count:,} rows of {split} repeat another one: each counts once"
        )
    return kept


def load_rows(config: DatasetTask, split: str) -> list[Located]:
    """The rows of a split, each with its place. Of one set (`is_one_set`) all rows, whatever the split.

    Raises InputError.
    """
    return list(_rows(config, split))


def _rows(config: DatasetTask, split: str) -> Iterable[Located]:
    path = Path(config.source).expanduser()
    if path.is_file():
        if not path.name.lower().removesuffix(".gz").endswith(READERS):
            raise InputError(
                f"a file that is none of {', '.join(READERS)}",
                where=config.source,
                way_out="save it in one of these forms, or give its name that ending",
            )
        return iter_rows(path)
    if path.is_dir() and ((path / SAVED).is_file() or (path / SAVED_SPLITS).is_file()):
        return _numbered(_loaded(config, split, lambda: _from_disk(path, split)), config.source, split)
    if not path.is_dir():
        names = config.config if isinstance(config.config, list) else [config.config]
        places: list[tuple[Path, str | None]] = [(path, name) for name in names]
    else:
        places = _local_configs(config, path, split)
    return chain.from_iterable(_of_config(config, folder, name, split) for folder, name in places)


def _local_configs(config: DatasetTask, path: Path, split: str) -> list[tuple[Path, str | None]]:
    """Where a folder has the rows of `config.config`: (folder, configuration of it), by its card or as a
    folder of that name. Of names that a known set brings along those that are there; else all its files.

    Raises InputError where one that the recipe names is not there.
    """
    import datasets

    names = config.config if isinstance(config.config, list) else [config.config]
    wanted = [name for name in names if name is not None]
    if not wanted:
        return [(path, None)]
    there = _loaded(config, split, lambda: datasets.get_dataset_config_names(str(path)))
    folders = {one.name for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")}
    found: list[tuple[Path, str | None]] = [
        (path, name) if name in there else (path / name, None)
        for name in wanted
        if name in there or name in folders
    ]
    missing = [name for name in wanted if name not in there and name not in folders]
    if missing and not is_known_config(config.name, config.config):
        shown = sorted({*there, *folders} - {"default"})
        raise InputError(
            f"there is no configuration {', '.join(missing)}",
            where=f"{config.source} (task.config)",
            way_out=f"there are: {', '.join(shown)}" if shown else "leave task.config out: it has none",
        )
    return found or [(path, None)]


def _of_config(config: DatasetTask, path: Path, name: str | None, split: str) -> Iterable[Located]:
    """The rows of one configuration, from a folder's files or by `datasets`."""
    if path.is_dir():
        files = _loaded(config, split, lambda: _files(name, path, split))
        if files is not None:
            return chain.from_iterable(map(iter_rows, files))
    where = config.source if name is None else f"{config.source}, {name}"
    return _numbered(_loaded(config, split, lambda: _by_name(config, name, split)), where, split)


def _by_name(config: DatasetTask, name: str | None, split: str) -> Any:
    import datasets

    path = Path(config.source).expanduser()
    if path.is_dir():
        return datasets.load_dataset(str(path), name, split=split)
    return datasets.load_dataset(config.source, name, split=split, revision=config.revision)


def _from_disk(path: Path, split: str) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"it has {', '.join(map(str, saved))}")
        return saved[split]
    return saved


def _files(name: str | None, path: Path, split: str) -> list[str] | None:
    """The split's files in a folder, where all are of a kind that is read here."""
    import datasets

    builder = datasets.load_dataset_builder(str(path), name)
    found = builder.config.data_files
    if builder.builder_configs and name is None and len(builder.builder_configs) > 1:
        return None  # `datasets` says which configurations there are
    if type(builder).__module__.rpartition(".")[2] not in BUILDERS or found is None:
        return None
    if split not in found:
        raise ValueError(f"it has {', '.join(map(str, found))}")
    files = [str(file) for file in found[split]]
    readable = (Path(file).name.lower().removesuffix(".gz").endswith(READERS) for file in files)
    return files if all(readable) else None


def _numbered(rows: Iterable[Any], name: str, split: str) -> Iterable[Located]:
    features = getattr(rows, "features", None)
    shorten = shortener(features.arrow_schema if features else ())
    return ((f"{name}[{split}], row {number}", as_row(shorten(row))) for number, row in enumerate(rows))


def _loaded(config: DatasetTask, split: str, act: Callable[[], T]) -> T:
    """What `act` gives; the cause of its failure is told, not what `datasets` wraps it in."""
    try:
        return act()
    except Exception as error:  # whatever a builder, a file system or a hub of somebody else's raises
        raise InputError(
            f"cannot load split {split!r}: {_told(error)}",
            where=config.source,
            way_out="give a local file or folder, or the name of a dataset on its hub or in its cache",
        ) from error


def _told(error: BaseException) -> str:
    """The first lines of an error and of what caused it, innermost last."""
    lines: list[str] = []
    found: BaseException | None = error
    while found is not None:
        line = (str(found).strip() or type(found).__name__).splitlines()[0]
        if line not in lines:
            lines.append(line)
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return "; caused by: ".join(lines)
