"""What shared prefixes save in updates: tokens, FLOPs and processor seconds of flat packs over trees.

critic: a REINFORCE update on the judgements of nested states of a group's responses, whose prompts begin with
the same instructions and problem. actor: a PPO update on the group itself. Both packed to the same limit.
limit: FLOPs of flat packs over those of trees by counting (6 per weight and token, 12 x layers x heads x
head_dim per query and key, the output layer at trained tokens alone), each tree uncut.
of limit: seconds' ratio over it, above 1 where long sequences' attention costs more than it counts for.
Goal: at least 0.9 at 3,000 tokens and above. Figures of one thread; flat and tree updates take turns, the
least of `--repeat` counts.
--small: samples as short as the quickstart's (192 judgements of 60 to 140 tokens, 48 responses; hidden 128).
--planner: what the planner makes of 1,024 samples, without a model (benchmarks/tree_plans.py).
Run: python -m benchmarks.trees [--small | --planner] [--responses 300 3000] [--states 2 4 8] [--groups 1 4 8]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.machine import RESULTS, save, table
from benchmarks.tree_plans import LIMIT, plan_rows
from genac_megatron.algorithms.losses import Loss, make_ppo_loss, make_reinforce_loss
from genac_megatron.models.families.base import Shape
from genac_megatron.models.mapping import load_hf_into, random_weights
from genac_megatron.models.registry import shape_of
from genac_megatron.recipe.algorithms import CriticLossConfig
from genac_megatron.recipe.schema import LossConfig, RoleConfig
from genac_megatron.records import Sample
from genac_megatron.training.layout import Layout, init_world
from genac_megatron.training.role import Role
from genac_megatron.training.trees import order_of

VOCAB = 4096
PROMPT, INSTRUCTIONS, COUNT_LINE = 400, 100, 8  # tokens


def ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


def critic_samples(response: int, states: int, group: int, judgement: int) -> list[Sample]:
    """State k of n is cut at k / n of the response, the prompt state left out."""
    rng = random.Random(0)
    head, samples = ids(rng, INSTRUCTIONS + PROMPT), []
    for _ in range(group):
        body = ids(rng, response)
        for k in range(1, states + 1):
            shown = [*head, *body[: response * k // states], *ids(rng, COUNT_LINE)]
            samples.append(Sample([*shown, *ids(rng, judgement)], len(shown)))
    return weighed(samples, rng)


def actor_samples(response: int, group: int) -> list[Sample]:
    rng = random.Random(1)
    prompt = ids(rng, PROMPT)
    return weighed([Sample([*prompt, *ids(rng, response)], PROMPT) for _ in range(group)], rng)


def small_samples() -> tuple[list[Sample], list[Sample]]:
    """Judgements and responses as short as the quickstart's: 12 prompts, 4 responses, 4 states of each."""
    rng = random.Random(2)
    judged, written = [], []
    for _ in range(12):
        prompt = ids(rng, 30)
        for _ in range(4):
            body = ids(rng, rng.randint(48, 64))
            written.append(Sample([*prompt, *body], len(prompt)))
            for k in range(4):
                shown = [*prompt, *body[: len(body) * k // 4], *ids(rng, COUNT_LINE)]
                judged.append(Sample([*shown, *ids(rng, rng.randint(24, 48))], len(shown)))
    return weighed(judged, rng), weighed(written, rng)


def weighed(samples: list[Sample], rng: random.Random) -> list[Sample]:
    total = sum(sample.trained for sample in samples)
    for sample in samples:
        sample.fields = {
            "weights": [1 / total] * sample.trained,
            "advantages": [rng.gauss(0, 1)] * sample.trained,
            "behaviour": [-8.0] * sample.trained,
        }
    return samples


def flops(shape: Shape, tokens: int, pairs: int, trained: int) -> float:
    layer = shape.hidden * (2 * shape.q_size + 2 * shape.kv_size) + 3 * shape.hidden * shape.ffn
    matrices = 6.0 * (shape.layers * layer * tokens + shape.hidden * shape.vocab * trained)
    return matrices + 12.0 * shape.layers * shape.q_size * pairs


def make_role(options: argparse.Namespace) -> Role:
    config = RoleConfig.model_validate(
        {
            "model": {
                "family": "qwen3",
                "tokenizer": "builtin:tiny",
                "shape": {
                    "layers": options.layers,
                    "hidden": options.hidden,
                    "ffn": options.hidden * 11 // 4,
                    "heads": options.hidden // 64,
                    "kv_heads": max(1, options.hidden // 128),
                    "head_dim": 64,
                    "vocab": VOCAB,
                    "max_positions": 32_768,
                },
            },
            "training": {"dtype": "fp32", "tokens_per_microbatch": options.tokens_per_microbatch},
        }
    )
    shape = shape_of(config.model, VOCAB)
    layout = Layout.from_config("trees", config.layout, init_world().size)
    role = Role("trees", config, shape, layout, layout.groups())
    load_hf_into(role.models, layout, shape, random_weights(shape, 0))
    role.begin_stage(None, 1000)
    return role


def update(role: Role, samples: Sequence[Sample], loss: Loss, trees: bool) -> tuple[float, dict[str, float]]:
    """Processor seconds of one update, and its figures."""
    training = role.config.training.model_copy(update={"share_prefixes": trees})
    role.config = role.config.model_copy(update={"training": training})
    began = time.process_time()
    stats = role.train_step(samples, loss).stats
    return time.process_time() - began, stats


def measure(
    role: Role, what: str, cell: dict[str, Any], samples: list[Sample], repeat: int
) -> dict[str, Any]:
    loss = make_reinforce_loss(CriticLossConfig()) if what == "critic" else make_ppo_loss(LossConfig())
    order, everyone = order_of(samples), range(len(samples))
    trained = sum(sample.trained for sample in samples)
    flat_tokens, whole = (
        sum(figures) for figures in zip(*((n, n * (n + 1) // 2) for n in order.lengths.tolist()), strict=True)
    )
    limit = flops(role.shape, flat_tokens, whole, trained) / flops(
        role.shape, order.size(everyone), order.pairs(everyone), trained
    )
    seconds: dict[bool, float] = {}
    share = 1.0
    for trees in (True, False) * repeat:
        took, stats = update(role, samples, loss, trees)
        seconds[trees] = min(took, seconds.get(trees, took))
        share = stats["computed_tokens"] / stats["tokens"] if trees else share
    ratio = seconds[False] / seconds[True]
    return {
        **cell,
        "flat tokens": flat_tokens,
        "unique": order.size(everyone),
        "computed": round(share * flat_tokens),
        "tokens, flat / tree": round(1 / share, 2),
        "FLOPs limit": round(limit, 2),
        "flat s": round(seconds[False], 2),
        "tree s": round(seconds[True], 2),
        "seconds, flat / tree": round(ratio, 2),
        "of limit": round(ratio / limit, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--responses", type=int, nargs="+", default=[300, 3000, 8000], help="tokens")
    parser.add_argument("--states", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--judgement", type=int, default=256, help="tokens that a critic wrote")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens-per-microbatch", type=int, default=16_384)
    parser.add_argument(
        "--most", type=int, default=60_000, help="flat tokens of a cell; larger ones are left out"
    )
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="samples as short as the quickstart's")
    parser.add_argument("--planner", action="store_true", help="plans of 1,024 samples, no model")
    parser.add_argument("--add", action="store_true", help="what an earlier call's rows have not")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.planner:
        rows = plan_rows()
        print(table(rows), save("trees_planner", {"tokens_per_microbatch": LIMIT}, rows).name, sep="\n")
        return
    if options.small:
        options.hidden, options.layers = 128, 2
        role, rows = make_role(options), []
        update(role, actor_samples(100, 4), make_ppo_loss(LossConfig()), True)  # warm
        for what, samples in zip(("critic", "actor"), small_samples(), strict=True):
            cell = {"update": what, "samples": len(samples)}
            rows.append(measure(role, what, cell, samples, options.repeat))
        print(table(rows), save("trees_small", {"repeat": options.repeat}, rows).name, sep="\n")
        return
    of_rows = ("responses", "states", "groups", "most", "add", "small", "planner")
    settings = {key: value for key, value in vars(options).items() if key not in of_rows}
    role, rows = make_role(options), []
    if options.add:
        rows = json.loads((RESULTS / "trees.json").read_text())["rows"]
    update(role, actor_samples(100, 4), make_ppo_loss(LossConfig()), True)  # warm
    for response in options.responses:
        for group in options.groups:
            cells = [
                ("critic", n, critic_samples(response, n, group, options.judgement)) for n in options.states
            ]
            if group > 1:
                cells.append(("actor", 0, actor_samples(response, group)))
            for what, states, samples in cells:
                cell = {"update": what, "response": response, "states": states, "group": group}
                there = any(cell.items() <= row.items() for row in rows)
                if there or sum(len(sample.tokens) for sample in samples) > options.most:
                    continue
                rows.append(measure(role, what, cell, samples, options.repeat))
                print(rows[-1], flush=True)
                save("trees", settings | {"load": round(os.getloadavg()[0], 1)}, rows)
    rows.sort(key=lambda row: (row["update"] == "actor", row["response"], row["group"], row["states"]))
    written = save("trees", settings | {"load": round(os.getloadavg()[0], 1)}, rows)
    print(table(rows))
    long = [row["of limit"] for row in rows if row["response"] >= 3000]
    if long:
        print(f"least of limit at 3,000 and above: {min(long)} (goal >= 0.9)")
    print("written", written.name)


if __name__ == "__main__":
    main()
