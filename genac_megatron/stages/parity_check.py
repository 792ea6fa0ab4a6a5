"""`genac parity ROLE RECIPE`: fixed prompts by a role's engine, its log-probs against the trainer's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genac_megatron.errors import GateFailed, InputError, on_all_ranks
from genac_megatron.observe.runinfo import run_path, write_json_atomic
from genac_megatron.recipe.schema import Recipe
from genac_megatron.recipe.sharing import only
from genac_megatron.records import Completion, Request, Sample, SamplingParams
from genac_megatron.stages.parity import engine_sample, parity_figures
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.seeds import seed_for
from genac_megatron.stages.session import session
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.training.layout import World

WORST = 5  # sequences that are shown whole
Pair = tuple[Request, Completion]


def check_parity(
    recipe: Recipe,
    world: World,
    stop: StopFlag,
    *,
    role: str,
    prompts: int,
    max_new_tokens: int,
    folder: Path,
) -> None:
    """Publish the role, sample `prompts` held-out prompts of the task, and compare. Collective.

    Figures, their course over positions, and the worst sequences go to <run>/parity/<role>.json. folder: for
    all else, held meanwhile: a run of the recipe may be under way.
    Raises GateFailed where p99 |delta log-prob| is above observe.parity_alarm (or parity_alarm_fp8),
    InputError where there is no such role.
    """
    if role not in recipe.roles:
        what = f"the recipe has no role '{role}'"
        raise on_all_ranks(InputError(what, where="parity", way_out=f"one of: {', '.join(recipe.roles)}"))
    recipe = only(recipe, {role: recipe.roles[role]})
    with session(recipe, world, stop, "parity", folder) as run:
        run.publish(role)
        pairs = run.gather(_sampled(run, role, prompts, max_new_tokens))
        samples = [engine_sample(request.ids, completion) for request, completion in pairs]
        logprobs = run.roles[role].logprobs(samples)
    figures = parity_figures(role, samples, logprobs)
    report = {
        **figures,
        "tokens": sum(sample.trained for sample in samples),
        "positions": by_position(samples, logprobs),
        "worst": _worst(run, role, pairs, samples, logprobs),
    }
    if world.rank == 0:
        path = run_path(recipe) / "parity" / f"{role}.json"
        write_json_atomic(path, report)
        print(shown(role, report, path), flush=True)
    p99, (key, alarm) = figures[f"parity/{role}_p99"], recipe.parity_alarm(role)
    if not p99 <= alarm:
        raise GateFailed(
            f"p99 |delta log-prob| is {p99:.3g}, above {alarm:g}",
            where=f"parity of {role}",
            way_out="compare the precisions of training and engine, and the worst sequences; or raise "
            f"observe.{key}",
        )


def _sampled(run: Run, role: str, prompts: int, max_new_tokens: int) -> list[Pair]:
    """This rank's share of the prompts, sampled at temperature 1."""
    count = min(prompts, run.task.heldout_size)
    fixed = run.together(lambda: [run.task.prompt("heldout", index) for index in range(count)])
    params = SamplingParams(max_new_tokens, 1.0, run.stop_ids(role))
    requests = [  # the task's ids are of this role's tokenizer, as the recipe has no other role here
        Request(prompt.ids, params, seed_for(run.recipe.seed, "parity", prompt.id), prompt.id)
        for prompt in run.share(fixed)
    ]

    async def complete() -> list[Completion]:
        return list(await asyncio.gather(*(run.engines[role].complete(request) for request in requests)))

    return list(zip(requests, run.generating(lambda: asyncio.run(complete())), strict=True))


def by_position(
    samples: Sequence[Sample], logprobs: Sequence[Sequence[float]]
) -> list[dict[str, float | int]]:
    """Mean and largest |delta| over token positions, in spans that double in length: 0, 1-2, 3-6, ..."""
    deltas: dict[int, list[float]] = {}
    for sample, trainer in zip(samples, logprobs, strict=True):
        for position, (engine, now) in enumerate(zip(sample.fields["behaviour"], trainer, strict=True)):
            deltas.setdefault((position + 1).bit_length() - 1, []).append(abs(now - engine))
    return [
        {
            "first": 2**span - 1,
            "last": 2 ** (span + 1) - 2,
            "mean": float(np.mean(values)),
            "max": float(np.max(values)),
        }
        for span, values in sorted(deltas.items())
    ]


def _worst(
    run: Run,
    role: str,
    pairs: Sequence[Pair],
    samples: Sequence[Sample],
    logprobs: Sequence[Sequence[float]],
) -> list[dict[str, Any]]:
    """The sequences with the largest |delta|, whole."""
    gaps = [
        max((abs(a - b) for a, b in zip(sample.fields["behaviour"], trainer, strict=True)), default=0.0)
        for sample, trainer in zip(samples, logprobs, strict=True)
    ]
    order = sorted(range(len(gaps)), key=lambda index: -gaps[index])[:WORST]
    return [
        {
            "key": pairs[index][0].key,
            "max": gaps[index],
            "text": run.tokenizers[role].decode(pairs[index][1].ids),
            "ids": list(pairs[index][1].ids),
            "engine": list(pairs[index][1].logprobs),
            "trainer": list(logprobs[index]),
        }
        for index in order
    ]


def shown(role: str, report: dict[str, Any], path: Path) -> str:
    """The report as a person reads it."""
    names = ("mean", "p99", "max", "k3")
    head = ", ".join(f"{name} {report[f'parity/{role}_{name}']:.3g}" for name in names)
    lines = [f"parity of {role} over {report['tokens']} tokens, |delta log-prob|: {head}"]
    lines += [
        f"  tokens {span['first']:>5} to {span['last']:>5}: mean {span['mean']:.2e}, max {span['max']:.2e}"
        for span in report["positions"]
    ]
    worst = ", ".join(f"{one['key']} ({one['max']:.2e})" for one in report["worst"])
    return "\n".join([*lines, f"  largest: {worst}", str(path)])
