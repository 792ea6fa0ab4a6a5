"""A task whose prompts are another package's environment's, which plays them too."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import InputError
from genac_megatron.records import Prompt
from genac_megatron.tasks.base import HELD_OUT, FixedTask, Problem
from genac_megatron.tasks.fields import read_messages, shown_text
from genac_megatron.tasks.theirs.process import Failed, Lost, TheirProcess, Theirs, theirs_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genac_megatron.recipe.tasks import PackageTask

INSTALL = (
    "`make environments-env` builds an interpreter that has verifiers and textarena, and prints it: set "
    "task.python, or export GENAC_ENVIRONMENTS_PYTHON"
)
LOADS = "see that it loads under that interpreter, without a network where there is none"


class PackageEnvironment(FixedTask):
    """Its prompts; what a conversation is worth the environment says (environments/theirs.py)."""

    def __init__(
        self,
        config: PackageTask,
        tokenizer: PreTrainedTokenizerBase | None,
        splits: tuple[Sequence[Problem], Sequence[Problem]],
        loaded: Mapping[str, Any],
    ) -> None:
        super().__init__(tokenizer, *splits)
        self.success = f"the environment '{config.id}' gives its reward"
        self.turns = loaded["turns"]
        self.notes.append(f"{config.id} of {config.kind} {loaded['version']}")

    def verify(self, prompt: Prompt, text: str) -> float:
        """0: what the environment has not rewarded earns nothing."""
        return 0.0

    def reveal(self, problem: Problem) -> dict[str, str]:
        """The row's answer, where it has one."""
        answer = problem.reference["answer"].strip()
        return {"reference": answer} if answer else {}


def make_package_task(
    config: PackageTask, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> PackageEnvironment:
    """The task. Raises InputError where the package, the environment or its rows cannot be used."""
    return package_task(config, tokenizer, seed, load(theirs_of(config, seed)))


def package_task(
    config: PackageTask,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    loaded: Mapping[str, Any],
) -> PackageEnvironment:
    """The task of what the environment says of itself. Raises InputError where its rows cannot be used."""
    theirs = theirs_of(config, seed)
    rows = {split: _different(theirs, split, loaded[split]) for split in ("train", "heldout")}
    notes: list[str] = []
    train, heldout = _split(rows["train"], rows["heldout"], config, seed, notes)
    same = {problem.reference["same"] for problem in heldout}
    kept = [problem for problem in train if problem.reference["same"] not in same]
    if not kept:
        raise InputError(
            f"{theirs.name} has no row to train on that is not held out",
            where="task",
            way_out="give it more rows (task.args)",
        )
    task = PackageEnvironment(config, tokenizer, (kept, heldout), loaded)
    digest = hashlib.sha256("\n".join(problem.reference["same"] for problem in [*kept, *heldout]).encode())
    task.digest = digest.hexdigest()
    task.notes += notes
    if left := len(loaded["train"]) - len(kept) - (0 if rows["heldout"] else len(heldout)):
        task.notes.append(
            f"{left} of its {len(loaded['train'])} rows are left out: they repeat others, or are held out"
        )
    return task


def load(theirs: Theirs) -> dict[str, Any]:
    """What the environment says of its rows and limits. Raises InputError."""
    process = TheirProcess(theirs)
    try:
        return process.load(theirs, rows=True)
    except (Failed, Lost) as error:
        way_out = getattr(error, "way_out", "")
        missing = str(error).endswith("is not installed there")
        what = (
            f"{theirs.kind} is not installed under {theirs.python}" if missing else f"{theirs.name} {error}"
        )
        raise InputError(what, where="task", way_out=INSTALL if missing else way_out or LOADS) from None
    finally:
        process.close()


def _different(theirs: Theirs, split: str, rows: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """The rows as problems, each once."""
    found: dict[str, Problem] = {}
    for number, row in enumerate(rows):
        where = f"{theirs.name}, row {number} ({split})"
        messages = read_messages(row["messages"], where, "give rows whose prompt is chat messages")
        reference = {"row": row["row"], "answer": row.get("answer", ""), "same": row["same"]}
        tools = tuple(row.get("tools", ()))
        problem = Problem(shown_text(messages), reference, messages=messages, tools=tools, where=where)
        found.setdefault(row["same"], problem)
    return list(found.values())


def _split(
    train: list[Problem], heldout: list[Problem], config: PackageTask, seed: int, notes: list[str]
) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out): the environment's own rows to evaluate on, else a seeded share of its rows.

    `notes` says what is left aside of the former.
    """
    held = heldout or train
    random.Random(f"split/{seed}").shuffle(held)
    size = config.heldout_size or (len(heldout) if heldout else HELD_OUT)
    if not heldout and len(train) <= size:
        raise InputError(
            f"{len(train)} different rows do not suffice for heldout_size {size}",
            where="task.heldout_size",
            way_out="lower it, or give the environment more rows (task.args)",
        )
    if heldout and len(held) > size:
        notes.append(
            f"{len(held) - size:,} of {len(held):,} held-out rows are left aside (task.heldout_size {size})"
        )
    return (train if heldout else held[size:]), held[:size]
