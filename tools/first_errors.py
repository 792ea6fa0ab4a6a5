"""Where a critic's reasoning first leaves the exact teacher's: the line's form, misread or miscomputed.

    python tools/first_errors.py BANK SCORES [--tokenizer builtin:tiny] [--places]

BANK is a state bank of a task with an exact teacher (`genac evaluate bank`), SCORES a critic's name in it.
What the teacher writes about each state is compared with what the critic wrote, line by line, the score left
out. A line is told by its form: every letter an x, every digit a 0, every sign a +. A sum whose parts are
right is miscomputed; whatever else is wrong was misread. --places: by how many lines of the response the
state holds.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genac_megatron.critic.states import state_text
from genac_megatron.errors import GenacError, InputError
from genac_megatron.evaluation.bank import Bank, BankState, read_bank
from genac_megatron.observe.runinfo import read_jsonl
from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.tasks import Teacher, make_task
from genac_megatron.tasks.tokenizer import load_tokenizer

RIGHT = "all right"
WORDS, SIGN = re.compile(r"\b[a-z]\b|\d"), re.compile(r" [-+*] ")


def form(line: str) -> str:
    """A line with letters and digits blurred, lists cut to one: "left a b c" is "left x"."""
    blurred = SIGN.sub(" + ", WORDS.sub(lambda found: "0" if found[0].isdigit() else "x", line))
    return re.sub(r"(\b[x0]\b)( \1)+", r"\1", blurred)


def first_error(wanted: str, written: str) -> str:
    """What is wrong with the first line that is not the teacher's; RIGHT where all are."""
    theirs = written.split("\n")
    for number, line in enumerate(wanted.split("\n")):
        other = theirs[number] if number < len(theirs) else ""
        if other != line:
            parts, asked = line.rpartition(" : ")[0], other.rpartition(" : ")[0]
            computed = parts == asked and SIGN.search(parts)
            return f"{form(line)}, {'miscomputed' if computed else 'misread'}"
    return RIGHT


def compared(bank: Bank, scores: Path, tokenizer: str) -> Iterator[tuple[int, str]]:
    """Of each state: how many lines of the response it holds, and its first error. Raises InputError."""
    plan = bank.manifest["plan"]
    words = load_tokenizer(tokenizer)
    task = make_task(TypeAdapter(TaskConfig).validate_python(plan["task"]), words, plan["seed"])
    teacher = task.teacher
    if teacher is None:
        raise InputError(f"the task {plan['task']['kind']} has no exact teacher", where=str(bank.folder))
    rows, _ = read_jsonl(scores)
    if len(rows) != len(bank.states):
        raise InputError(
            f"{len(rows)} of the bank's {len(bank.states)} states are scored",
            where=str(scores),
            way_out="genac evaluate bank score BANK ..., and give the name that it has in BANK/scores",
        )
    for state, row in zip(bank.states, rows, strict=True):
        partial = state_text(state.state, words)
        yield len(partial.splitlines()), first_error(traced(teacher, state, partial, bank), row["text"])


def traced(teacher: Teacher, state: BankState, partial: str, bank: Bank) -> str:
    return teacher.trace(state.prompt, partial, float(bank.manifest["p_bar"]), random.Random(0))[0]


def shares(found: list[str]) -> str:
    counts = collections.Counter(found).most_common()
    return ", ".join(f"{kind} {count / len(found):.3f}" for kind, count in counts)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bank", type=Path)
    parser.add_argument("scores", help="a name in BANK/scores")
    parser.add_argument("--tokenizer", default="builtin:tiny", help="the actor's")
    parser.add_argument("--places", action="store_true")
    given = parser.parse_args(arguments)
    try:
        path = given.bank / "scores" / given.scores / "states.jsonl"
        found = [*compared(read_bank(given.bank), path, given.tokenizer)]
    except GenacError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{given.bank}, {given.scores}, {len(found)} states: {shares([kind for _, kind in found])}")
    for place in sorted({place for place, _ in found} if given.places else ()):
        here = [kind for at, kind in found if at == place]
        print(f"  {place} line(s), {len(here)} states: {shares(here)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
