"""Make the conversations with which recipes/smollm2 teaches a small model the two answer formats.

    python tools/make_chain_sum_data.py [FOLDER]

actor.jsonl: sums with a tagged answer. tools.jsonl: the same by way of a calculator. critic.jsonl: the
critic's prompt about a right, a wrong or no partial answer, and a score. Their numbers have two digits where
the recipes' task has one, so that no problem of the task is among them. The files depend on this script and
on reasoning-gym alone.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reasoning_gym

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import prompt_text
from genac_megatron.environments.tools import SCHEMAS
from genac_megatron.recipe.schema import JudgingConfig
from genac_megatron.records import Prompt

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "smollm2"
INSTRUCTION = "Give the final answer as <answer>...</answer>."  # the recipes' task.instruction
JUDGING = JudgingConfig(template="brief")
LIMIT, LINES, CALLS = 32, 160, 48
SCORES = {"right": 9, "wrong": 1, "none": 5}


def problems() -> Iterator[tuple[str, str, str]]:
    """(question, the sum with its result, the result)."""
    pool = reasoning_gym.create_dataset(
        "chain_sum", seed=71, size=LINES, min_terms=2, max_terms=2, min_digits=2, max_digits=2
    )
    for entry in pool:
        expression = entry["metadata"]["expression"]
        yield entry["question"].strip(), f"{expression} = {entry['answer']}", entry["answer"]


def conversation(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def actor() -> Iterator[dict[str, Any]]:
    for question, solved, result in problems():
        yield conversation(f"{question}\n\n{INSTRUCTION}", f"{solved}\n<answer>{result}</answer>")


def asking() -> Iterator[dict[str, Any]]:
    for question, solved, result in list(problems())[:CALLS]:
        given = {"name": "calculator", "arguments": {"expression": solved.partition(" = ")[0]}}
        call = f"<tool_call>{json.dumps(given)}</tool_call>"
        first, last = conversation(f"{question}\n\n{INSTRUCTION}", call), f"<answer>{result}</answer>"
        told = [{"role": "tool", "content": result}, {"role": "assistant", "content": last}]
        yield {"messages": [*first["messages"], *told], "tools": [SCHEMAS["calculator"]]}


def critic() -> Iterator[dict[str, Any]]:
    rng = random.Random(71)
    for question, solved, result in problems():
        kind = rng.choice(list(SCORES))
        wrong = solved.removesuffix(result) + str(int(result) + rng.choice([-10, -2, -1, 1, 2, 10]))
        partial = {"right": f"{solved}\n", "wrong": f"{wrong}\n", "none": ""}[kind]
        prompt = Prompt(id="", messages=(), problem=question, reference=None, ids=())
        icc = IccState(p_bar=rng.choice([0.2, 0.3, 0.4, 0.5]))
        used = 0 if kind == "none" else rng.randint(8, 14)
        said = {"right": "the sum is right", "wrong": "the sum is wrong", "none": "nothing is done yet"}[kind]
        user = "".join(prompt_text(JUDGING, icc, prompt, partial, used, LIMIT))
        yield conversation(user, f"{said}\n<answer>{SCORES[kind]}</answer>")


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else FOLDER
    for name, lines in (("actor", actor()), ("tools", asking()), ("critic", critic())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
