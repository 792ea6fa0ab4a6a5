"""False verdicts of graders on tests/unit/answers.yaml: right answers that earn 0, others that earn 1.

ours: the rule of the final answer, then equality.py. math-verify: the library alone, as its page shows it, on
the whole response. verl's graders are read from its package, unpacked somewhere by
`pip install --no-deps --target FOLDER verl`, one file each: the package itself imports what grading does not
need. Each of verl's reads one format (gsm8k: ####; math_reward: a box; math_dapo: "Answer:", else a box in
the last 100 characters), so its misses count formats that its data do not have. The index has no
open-instruct.

The table was written along with our rule: its figures say what the rule covers, and not how often real
responses are of these kinds. Kinds for which the recipe names other forms are left out.
Run: python -m benchmarks.answer_rules [--verl FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import save, table
from genac_megatron.tasks.answers import final_answer
from genac_megatron.tasks.equality import agrees

TABLE = Path(__file__).parents[1] / "tests" / "unit" / "answers.yaml"
Grade = Callable[[str, str], float]  # (reference, response)


def ours(reference: str, text: str) -> float:
    answer = final_answer(text)
    return float(answer is not None and agrees(reference, answer))


def math_verify_alone(reference: str, text: str) -> float:
    from math_verify import parse, verify

    return float(verify(parse(f"\\boxed{{{reference}}}"), parse(text)))


def verl_graders(folder: Path) -> dict[str, Grade]:
    """verl's own functions by name, unchanged."""
    scores = folder / "verl" / "utils" / "reward_score"

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(f"verl_{name}", scores / f"{name}.py")
        if spec is None or spec.loader is None:
            raise FileNotFoundError(scores / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    gsm8k, math_reward, math_dapo, with_math_verify = map(
        load, ("gsm8k", "math_reward", "math_dapo", "math_verify")
    )
    return {
        "verl gsm8k": lambda reference, text: gsm8k.compute_score(text, reference),
        "verl math_reward": lambda reference, text: math_reward.compute_score(text, reference),
        "verl math_dapo": lambda reference, text: math_dapo.compute_score(text, reference)["acc"],
        # What its compute_score runs in a process of its own.
        "verl math_verify": lambda reference, text: with_math_verify._verify_in_subprocess(
            f"\\boxed{{{reference}}}", text
        ),
    }


def verl_version(folder: Path) -> str:
    return (folder / "verl" / "version" / "version").read_text().strip()


def count(grade: Grade, kinds: Sequence[dict[str, Any]]) -> tuple[dict[str, int], dict[str, str]]:
    """A grader's false verdicts in all, and by kind as "false positives + false negatives of n"."""
    total = {"pairs": 0, "right": 0, "false_positives": 0, "false_negatives": 0}
    by_kind = {}
    for kind in kinds:
        positives = negatives = 0
        for reference, text, right in kind["pairs"]:
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    given = grade(reference, text) > 0
                except Exception:  # a grader that raises pays nothing
                    given = False
            positives += given and not right
            negatives += right and not given
            total["right"] += right
        total["pairs"] += len(kind["pairs"])
        total["false_positives"] += positives
        total["false_negatives"] += negatives
        by_kind[kind["kind"]] = f"{positives} + {negatives} of {len(kind['pairs'])}"
    return total, by_kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--verl", type=Path, help="where verl's package is unpacked")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    kinds = [kind for kind in yaml.safe_load(TABLE.read_text()) if "forms" not in kind]
    graders: dict[str, Grade] = {"ours": ours, "math-verify alone": math_verify_alone}
    settings: dict[str, Any] = {
        "math-verify": version("math-verify"),
        "open-instruct": "not run: the package index has none",
    }
    if options.verl is not None:
        graders |= verl_graders(options.verl)
        settings["verl"] = verl_version(options.verl)
    rows, settings["by kind: false positives + false negatives"] = [], {}
    for name, grade in graders.items():
        total, by_kind = count(grade, kinds)
        rows.append({"grader": name, **total})
        settings["by kind: false positives + false negatives"][name] = by_kind
    print(table(rows))
    print(f"written to {save('answer_rules', settings, rows)}")


if __name__ == "__main__":
    main()
