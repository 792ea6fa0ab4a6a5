"""One-digit sums with a calculator, an environment of verifiers: its ToolEnv, with rows and a rubric."""

import random
import re

import verifiers as vf
from datasets import Dataset

ASKED = (
    "State the final answer to the following arithmetic problem: {} =\n\n"
    "Give the final answer as <answer>...</answer>."
)


def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: Such as 3 + 4.
    """
    found = re.fullmatch(r"\s*(\d{1,9})\s*([+-])\s*(\d{1,9})\s*", expression)
    if found is None:
        return "error: two numbers with + or - between them"
    first, sign, second = found.groups()
    return str(int(first) + int(sign + second))


def right(completion, answer):
    found = re.findall(r"<answer>\s*(-?\d+)\s*</answer>", completion[-1].content or "")
    return float(found[-1:] == [answer])


def load_environment(size: int = 120, seed: int = 0) -> vf.Environment:
    sums = [f"{a} {sign} {b}" for a in range(10) for b in range(10) for sign in "+-"]
    random.Random(seed).shuffle(sums)
    rows = [{"question": ASKED.format(one), "answer": calculator(one)} for one in sums[:size]]
    rubric = vf.Rubric(funcs=[right])
    return vf.ToolEnv(tools=[calculator], dataset=Dataset.from_list(rows), rubric=rubric, max_turns=3)
