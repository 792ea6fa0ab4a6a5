"""What a generative critic costs: prompt tokens that its server computes, and an iteration's FLOPs.

Cache table: real judgements of long responses' nested states on a real SGLang server (a tiny random critic,
so what counts is the tokens, not the words). unique: tokens of the prompts' prefix tree, the least that any
cache can compute; computed: the new tokens of its prefill batches, as the server logs them (a reply's own
count of cached tokens takes a chunk of the same prompt for cached). Goal: computed / unique at most 1.05.

FLOPs table: a GenAC step over one of PPO with a scalar critic of the same size on the same rollouts, by
counting, for each lever of a recipe (benchmarks/critic_counts.py says how). With --counts it alone, without a
server: it goes into results/critic_levers.json and docs/performance.md.

Iteration table (with --study): a step of joint training over a step of PPO with a real scalar critic, on the
same prompts and seeds, as a study measured them: tokens, FLOPs, seconds, and both critics' value MSE.

Seconds table (--seconds FOLDER): processor seconds of such steps, from a study's base runs, by turns
(benchmarks/critic_seconds.py); the folder is what `genac study recipes/studies/joint_cost.yaml --work` was
given.
Run: python -m benchmarks.critic_cost [--study experiments/joint_cost] [--counts] [--seconds FOLDER]
(GENAC_SERVE_PYTHON: the serving environment's interpreter)
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.critic_counts import Group, length_table, lever_table, write
from benchmarks.critic_seconds import step_seconds
from benchmarks.machine import RESULTS, ROOT, save, table
from genac_megatron.critic.icc import IccState
from genac_megatron.critic.states import cut_states
from genac_megatron.models.mapping import random_weights
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.models.sizes import hf_names
from genac_megatron.platform.network import spare_ports
from genac_megatron.recipe.schema import EngineConfig, JudgingConfig, ModelConfig, ModelShape, StatesConfig
from genac_megatron.records import Completion, Prompt, Rollout, State
from genac_megatron.serving.generation import unique_tokens
from genac_megatron.serving.sglang.client import ServerClient
from genac_megatron.serving.sglang.engine import SglangEngine
from genac_megatron.serving.sglang.server import Server, ServerSpec, Zygote, serving_python
from genac_megatron.stages.judging import Judge
from genac_megatron.tasks.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("builtin:tiny")
SHAPE = shape_of(
    ModelConfig(
        family="qwen3",
        tokenizer="builtin:tiny",
        shape=ModelShape(layers=2, hidden=64, ffn=128, heads=2, kv_heads=2, max_positions=8192),
    ),
    len(TOKENIZER),
)


PROBLEM_WORDS = 40
JOINT = ROOT / "recipes" / "studies" / "joint_cost.yaml"
LEFT_OUT = ("genac_half", "genac_certain", "genac_light", "genac_light_soft", "genac_light_certain")
CELLS = ("ppo", "genac", *LEFT_OUT)


class ColdEngine(SglangEngine):
    """Reads nothing ahead."""

    async def warm(self, ids: Sequence[int], key: str = "") -> None:
        return


def responses(count: int, per_prompt: int, tokens: int) -> list[Rollout]:
    """Lines of words, no two alike, `per_prompt` to a problem."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        group, sample = divmod(number, per_prompt)
        if sample == 0:
            words = " ".join(rng.choice("abcdefgh") for _ in range(PROBLEM_WORDS))
            prompt = Prompt(f"train/{group}", (), f"problem {group} : {words}", None)
        text = ""
        count = 0
        while count < tokens:
            line = " ".join(rng.choice("abcdefgh") for _ in range(12)) + "\n"
            count += len(TOKENIZER.encode(line, add_special_tokens=False))
            text += line
        ids = tuple(TOKENIZER.encode(text, add_special_tokens=False)[:tokens])
        made.append(Rollout(prompt, sample, Completion(ids, (0.0,) * len(ids), "stop"), text, limit=tokens))
    return made


def judge_all(engine: SglangEngine, rollouts: Sequence[Rollout], config: JudgingConfig) -> Judge:
    """Every response judged as in a run: the prompt state first, each response's states together."""
    judge = Judge(engine, TOKENIZER, TOKENIZER, config, IccState(0.5), (), 4096, (0, "judge"))

    async def work() -> None:
        first = {rollout.prompt.id: rollout.prompt for rollout in rollouts}
        shared = {key: asyncio.ensure_future(judge.judge_prompt(prompt)) for key, prompt in first.items()}
        await asyncio.gather(*shared.values())  # they are done long before the first response is
        await asyncio.gather(*(judge.judge_response(r, shared[r.prompt.id]) for r in rollouts))

    asyncio.run(work())
    return judge


def prefilled(log: Path) -> int:
    """Prompt tokens that the server has computed so far."""
    return sum(map(int, re.findall(r"Prefill batch.*?#new-token: (\d+)", log.read_text(errors="replace"))))


def cache_row(
    order: str,
    engine: SglangEngine,
    server: Server,
    options: argparse.Namespace,
    states: int,
) -> dict[str, Any]:
    rollouts = responses(options.responses, options.per_prompt, options.tokens)
    cutting = StatesConfig(max_states=states, min_segment=16)
    config = JudgingConfig(template="standard", max_new_tokens=options.critic_tokens, states=cutting)
    engine.clients[0].flush_cache()
    before = prefilled(server.log)
    began = time.perf_counter()
    judge = judge_all(engine, rollouts, config)
    seconds = time.perf_counter() - began
    time.sleep(1.0)  # for the log
    computed = prefilled(server.log) - before
    cut = [state for r in rollouts for state in cut_states(r, TOKENIZER, cutting)[1:]]
    prompts = {judge.prompt_ids(state) for state in cut}
    prompts |= {judge.prompt_ids(State(r, 0, 0, 0)) for r in rollouts}
    unique = unique_tokens(prompts)
    return {
        "order": order,
        "states": states,
        "judgements": len(prompts),
        "unique": unique,
        "computed": computed,
        "computed/unique": round(computed / unique, 3),
        "asked/unique": round(sum(map(len, prompts)) / unique, 2),
        "seconds": round(seconds, 1),
    }


def served(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The cache table, from a server of its own."""
    (folder / "config.json").write_text(json.dumps(hf_config(SHAPE)))
    zygote = Zygote(serving_python(), folder / "zygote.log")
    spec = ServerSpec("critic/0", folder, spare_ports(1)[0], dtype="fp32", max_running=32, max_tokens=65_536)
    server = Server(spec, folder / "server.log", zygote=zygote)
    try:
        server.start()
        server.wait_healthy(300.0)
        client = ServerClient(spec.url, spec.key, name=spec.name)
        config = EngineConfig(kind="sglang")
        cold, warm = ColdEngine([client], config, SHAPE), SglangEngine([client], config, SHAPE)
        get = random_weights(SHAPE, 0)
        for engine in (cold, warm):
            engine.load_weights(1, [(name, get(name)) for name in hf_names(SHAPE)])
        rows = [cache_row("all at once", cold, server, options, 8)]
        rows += [cache_row("longest first", warm, server, options, states) for states in (8, 4, 2)]
        return rows
    finally:
        server.stop()
        zygote.close()


def iteration_table(folder: Path) -> list[dict[str, Any]]:
    """Means over seeds of GenAC's and a scalar critic's runs in a study, and their ratios."""
    records = json.loads((folder / "figures.json").read_text())["records"]

    def mean(cell: str, key: str) -> float:
        found = [r["figures"][key] for r in records if r["cell"] == cell and key in r["figures"]]
        return sum(found) / len(found) if found else float("nan")

    rows = []
    cells = {record["cell"] for record in records}
    for ours, cell in itertools.product(CELLS[1:], ("ppo", "vc_ppo", "vapo", "sp3o")):
        if not {ours, cell} <= cells:
            continue
        row: dict[str, Any] = {"cell": ours, "over": cell}
        for key in ("tokens", "flops", "seconds"):
            row[key] = round(mean(ours, f"step/{key}") / mean(cell, f"step/{key}"), 2)
        row["MSE"] = round(mean(ours, "critic/mse"), 4)
        row["MSE, scalar"] = round(mean(cell, "critic/mse"), 4)
        rows.append(row)
    return rows


def timed(options: argparse.Namespace) -> None:
    """The seconds table, into results/critic_seconds.json; cells that are not timed now keep their rows."""
    cells = [cell for cell in CELLS if cell == "ppo" or cell in (options.cells or CELLS)]
    rows = step_seconds(
        JOINT, options.seconds, cells, "ppo", seed=options.seed, steps=options.steps, rounds=options.rounds
    )
    how = {"steps": options.steps, "rounds": options.rounds, "load": round(os.getloadavg()[0], 1)}
    found = {row["cell"]: row | how for row in rows}
    path = RESULTS / "critic_seconds.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = {row["cell"]: row for row in before if row["cell"] not in found}
    rows = [(kept | found)[cell] for cell in CELLS if cell in kept | found]
    print(table(rows))
    print(save("critic_seconds", {"seed": options.seed}, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--responses", type=int, default=12)
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="responses to a prompt, for the FLOPs table")
    parser.add_argument("--tokens", type=int, default=1200, help="of a response")
    parser.add_argument("--critic-tokens", type=int, default=8, help="written per state, for the cache table")
    parser.add_argument("--counts", action="store_true", help="the FLOPs table alone, without a server")
    parser.add_argument("--lengths", type=int, nargs="+", default=[300, 1200, 3000, 8000], help="by length")
    parser.add_argument("--seconds", type=Path, help="the seconds table alone, from the runs of that folder")
    parser.add_argument(
        "--cells", nargs="+", choices=CELLS, help="of the seconds table, besides ppo; default: all"
    )
    parser.add_argument("--seed", type=int, default=1, help="of those runs")
    parser.add_argument("--steps", type=int, default=14, help="of the longer runs of the seconds table")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--study", type=Path, help="the joint study's folder of results")
    options = parser.parse_args()
    if options.seconds:
        timed(options)
        return
    flops = lever_table(Group(responses(options.group, options.group, options.tokens)))
    if options.counts:
        groups = [Group(responses(options.group, options.group, n)) for n in options.lengths]
        lengths = length_table(groups)
        print(table(flops), table(lengths), sep="\n\n")
        settings = {"per_prompt": options.group, "tokens": options.tokens}
        print(write(settings, flops, lengths))
        return
    with tempfile.TemporaryDirectory() as folder:
        cache = served(options, Path(folder))
    print(table(cache), end="\n\n")
    print(table(flops), end="\n\n")
    measured = iteration_table(options.study) if options.study else []
    if measured:
        print(table(measured))
    given = {**vars(options), "study": options.study and options.study.name}
    print(save("critic_cost", given, [*cache, *measured]))


if __name__ == "__main__":
    main()
