"""A task from a Hugging Face dataset: by name, a folder (of files, or by save_to_disk), or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from genac_megatron.errors import InputError
from genac_megatron.recipe.tasks import DatasetTask
from genac_megatron.tasks.questions import QuestionTask, make_question_task, need_verifier, read_problems
from genac_megatron.tasks.rows import READERS, Located, as_row, read_rows, shortener

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILDERS = ("json", "csv", "parquet")  # of `datasets`, whose files are read here
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk leaves: of one set, of several

T = TypeVar("T")


def make_dataset_task(
    config: DatasetTask, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> QuestionTask:
    """The task of `config.name`; held out are `heldout_split`'s problems, else a seeded share.

    Rows may name their split themselves, as those of JSON lines do; of a set with splits of its own, names
    that say something else are passed over. Raises InputError where the dataset, the split, a column or a
    pattern's match is missing.
    """
    need_verifier(config)
    single = is_one_set(config.name)
    if single and config.heldout_split is not None:
        raise InputError(
            f"it is one set of rows: a heldout_split ({config.heldout_split}) would be the same ones again",
            where=config.name,
            way_out="leave task.heldout_split out (rows may name their split), or give a folder with a file "
            "for each split",
        )
    rows = load_rows(config, config.split)
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
        heldout = read_problems(load_rows(config, config.heldout_split), config, by_split="no")[0]
    return make_question_task(config, train, heldout, tokenizer, seed, config.name)


def is_one_set(name: str) -> bool:
    """Whether a dataset has no splits of its own: a file, or a folder by Dataset.save_to_disk."""
    path = Path(name).expanduser()
    return path.is_file() or (path / SAVED).is_file()


def load_rows(config: DatasetTask, split: str) -> list[Located]:
    """The rows of a split, each with its place. Of one set (`is_one_set`) all rows, whatever the split.

    Raises InputError.
    """
    path = Path(config.name).expanduser()
    if path.is_file():
        if not path.name.lower().removesuffix(".gz").endswith(READERS):
            raise InputError(f"a file that is none of {', '.join(READERS)}", where=config.name)
        return read_rows(path)
    if not path.is_dir():
        return _numbered(_loaded(config, split, lambda: _by_name(config, split)), config, split)
    if (path / SAVED).is_file() or (path / SAVED_SPLITS).is_file():
        return _numbered(_loaded(config, split, lambda: _from_disk(path, split)), config, split)
    files = _loaded(config, split, lambda: _files(config, path, split))
    if files is not None:
        return [row for file in files for row in read_rows(file)]
    return _numbered(_loaded(config, split, lambda: _by_name(config, split)), config, split)


def _by_name(config: DatasetTask, split: str) -> Any:
    import datasets

    path = Path(config.name).expanduser()
    return datasets.load_dataset(str(path) if path.is_dir() else config.name, config.config, split=split)


def _from_disk(path: Path, split: str) -> Any:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"it has {', '.join(map(str, saved))}")
        return saved[split]
    return saved


def _files(config: DatasetTask, path: Path, split: str) -> list[str] | None:
    """The split's files in a folder, where all are of a kind that is read here."""
    import datasets

    builder = datasets.load_dataset_builder(str(path), config.config)
    found = builder.config.data_files
    if builder.builder_configs and config.config is None and len(builder.builder_configs) > 1:
        return None  # `datasets` says which configurations there are
    if type(builder).__module__.rpartition(".")[2] not in BUILDERS or found is None:
        return None
    if split not in found:
        raise ValueError(f"it has {', '.join(map(str, found))}")
    files = [str(file) for file in found[split]]
    readable = (Path(file).name.lower().removesuffix(".gz").endswith(READERS) for file in files)
    return files if all(readable) else None


def _numbered(rows: Iterable[Any], config: DatasetTask, split: str) -> list[Located]:
    features = getattr(rows, "features", None)
    shorten = shortener(features.arrow_schema if features else ())
    return [
        (f"{config.name}[{split}], row {number}", as_row(shorten(row))) for number, row in enumerate(rows)
    ]


def _loaded(config: DatasetTask, split: str, act: Callable[[], T]) -> T:
    """What `act` gives; the cause of its failure is told, not what `datasets` wraps it in."""
    try:
        return act()
    except Exception as error:  # whatever a builder, a file system or a hub of somebody else's raises
        raise InputError(
            f"cannot load split {split!r}: {_told(error)}",
            where=config.name,
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
