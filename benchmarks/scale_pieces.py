"""What every rank's processor does with the whole batch, per token: a measured piece of scale_model.py.

A batch is gathered on every rank (torch pickles it) and made into samples there, so this grows with the
batch, whatever the number of ranks. Synthetic groups of the sizes that the cluster recipes name. One thread.
Run: python -m benchmarks.scale_pieces
"""

from __future__ import annotations

import pickle
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.machine import save, table
from genac_megatron.recipe.algorithms import CriticLossConfig
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
from genac_megatron.stages.batch import Batch, critic_samples
from genac_megatron.stages.rollouts import Group

PROMPT, RESPONSE, STATES, JUDGEMENT = 256, 1024, 8, 512  # tokens; states per response
GROUPS, SAMPLES, REPEATS = 4, 8, 5
VOCAB = 150_000


def completion(rng: random.Random, length: int) -> Completion:
    ids = tuple(rng.randrange(VOCAB) for _ in range(length))
    return Completion(ids, tuple(-rng.random() for _ in ids), "stop", ((1, length),))


def group(rng: random.Random, index: int) -> Group:
    """A prompt's responses with their judgements; the prompt state's is shared."""
    ids = tuple(rng.randrange(VOCAB) for _ in range(PROMPT))
    prompt = Prompt(f"train/{index}", ({"role": "user", "content": "x" * 1000},), "x" * 1000, "1", ids)
    made = Group(prompt)
    shared = None
    for sample in range(SAMPLES):
        rollout = Rollout(prompt, sample, completion(rng, RESPONSE), "y" * 4 * RESPONSE, rng.random())
        judged = [shared] if shared else []
        for k in range(len(judged), STATES):
            state = State(rollout, k, k * RESPONSE // STATES, (k + 1) * RESPONSE // STATES)
            prompt_ids = ids + rollout.completion.ids[: state.cut]
            judged.append(Judgement(state, prompt_ids, completion(rng, JUDGEMENT), "z" * 2000, rng.random()))
        shared = shared or judged[0]
        made.rollouts.append(rollout)
        made.judgements.append(judged)
    return made


def cpu_s(act: Callable[[], Any]) -> float:
    """Median seconds of this process's processor: others on the machine do not count."""
    taken = []
    for _ in range(REPEATS):
        began = time.process_time()
        act()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def main() -> None:
    rng = random.Random(1)
    groups = [group(rng, index) for index in range(GROUPS)]
    states = GROUPS * (1 + SAMPLES * (STATES - 1))
    tokens = GROUPS * SAMPLES * RESPONSE + states * JUDGEMENT  # sampled ones
    packed = pickle.dumps(groups)
    trained = CriticLossConfig()
    figures = {
        "bytes per sampled token": len(packed) / tokens,
        "pickle, ns per sampled token": cpu_s(lambda: pickle.dumps(groups)) / tokens * 1e9,
        "unpickle, ns per sampled token": cpu_s(lambda: pickle.loads(packed)) / tokens * 1e9,
        "samples, ns per sampled token": cpu_s(
            lambda: critic_samples(Batch(groups), STATES, "leave_one_out", trained)
        )
        / (states * JUDGEMENT)
        * 1e9,
    }
    rows = [{"piece": name, "value": round(value, 1)} for name, value in figures.items()]
    print(table(rows))
    settings = {"prompt": PROMPT, "response": RESPONSE, "states": STATES, "judgement": JUDGEMENT}
    print(save("scale_pieces", settings, rows))


if __name__ == "__main__":
    main()
