"""Simon says, an environment of verifiers as its users write them: each turn names a further letter, and the
whole row so far is to be said. The share of rows that were said is the reward; the first miss ends it.
"""

import random

import verifiers as vf
from datasets import Dataset

LETTERS = "abcd"


class Simon(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        said = repeated(state["answer"], messages)
        if said < len(state["trajectory"]):
            state["final_env_response"] = [vf.UserMessage(content="bad")]
            return state["final_env_response"]
        return [vf.UserMessage(content=state["answer"][said])]


def repeated(row, messages):
    """How many of the rows were said, up to the first that was not."""
    turns = [message.content.split() for message in messages if message.role == "assistant"]
    right = [turn == list(row[: number + 1]) for number, turn in enumerate(turns)]
    return [*right, False].index(False)


def share(completion, answer):
    return repeated(answer, completion) / len(answer)


def load_environment(rounds: int = 4, train: int = 400, heldout: int = 64, seed: int = 0) -> vf.Environment:
    rng = random.Random(seed)

    def rows(count):
        drawn = ["".join(rng.choices(LETTERS, k=rounds)) for _ in range(count)]
        return Dataset.from_list(
            [{"prompt": [{"role": "user", "content": row[0]}], "answer": row} for row in drawn]
        )

    rubric = vf.Rubric(funcs=[share])
    return Simon(dataset=rows(train), eval_dataset=rows(heldout), rubric=rubric, max_turns=rounds)
