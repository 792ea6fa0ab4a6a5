"""Conversations over real servers: ids as they were sampled, the prefix cache, versions, a server that dies.

The environment is asked in this process (`Direct`), so that it can do things between two turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_servers import Farm, engine_over, run, served_config
from tiny_models import VOCAB, forced_logprobs, plain_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genac_megatron.environments.base import Step
from genac_megatron.environments.host import Answer, Job
from genac_megatron.recipe.schema import RolloutConfig
from genac_megatron.records import Prompt, Rollout
from genac_megatron.serving.sglang.client import Generated
from genac_megatron.serving.sglang.engine import SglangEngine
from genac_megatron.stages.conversations import conversation_figures
from genac_megatron.stages.rollouts import Generator, Group, Lot, groups_of
from genac_megatron.tasks.tokenizer import chat_ids
from tests.unit.test_conversations import TINY, Direct

FP32 = 1e-4
MODEL, NEWER = (plain_model(served_config("qwen3"), seed) for seed in (0, 1))


def letters() -> PreTrainedTokenizerFast:
    """A letter a token, as many as the servers' model has; the template of builtin:tiny."""
    marks = ["<|im_start|>", "<|im_end|>"]
    text = "\n" + "".join(map(chr, range(32, 32 + VOCAB - len(marks) - 1)))
    level = pre_tokenizers.ByteLevel(False)
    alphabet = [token for letter in text for token, _ in level.pre_tokenize_str(letter)]
    text_only = Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    text_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text_only.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=text_only, eos_token=marks[1], pad_token=marks[1])
    made.add_special_tokens({"additional_special_tokens": marks})
    made.chat_template = TINY.chat_template
    assert len(made) == VOCAB
    return made


LETTERS = letters()
Sent = list[tuple[str, tuple[int, ...], Generated]]  # to which server, its ids, what it said


def recorded(engine: SglangEngine) -> Sent:
    """Everything that goes to servers from now on, and comes back."""
    sent: Sent = []

    def through(client: Any) -> Callable[..., Any]:
        ask = client.generate

        async def generate(ids: Sequence[int], *more: Any, **options: Any) -> list[Generated]:
            found: list[Generated] = await ask(ids, *more, **options)
            sent.append((client.name, tuple(ids), found[0]))
            return found

        return generate

    for client in engine.clients:
        client.generate = through(client)  # type: ignore[method-assign]
    return sent


class Together(Direct):
    """Which answers no first turn until so many conversations have taken theirs."""

    def __init__(self, answers: Callable[[int, str], Any], conversations: int, **config: Any) -> None:
        super().__init__(answers, **config)
        self._all = asyncio.Barrier(conversations)

    async def ask(self, job: Job) -> Answer:
        if len(job.turns) == 1:
            await self._all.wait()
        return await super().ask(job)


async def played(
    engine: SglangEngine,
    answers: Callable[[int, str], Any],
    *,
    prompts: int = 1,
    samples: int = 1,
    tokens: int,
    stop_ids: tuple[int, ...] = (LETTERS.eos_token_id,),
) -> list[Group]:
    """Conversations of turns of `tokens` tokens at most."""
    environment: Any = Together(
        answers, prompts * samples, turns=4, turn_tokens=tokens, observation_tokens=64
    )
    task: Any = SimpleNamespace(reasoning_tags=None)
    asked = []
    for n in range(prompts):
        messages = ({"role": "user", "content": f"begin with {n}" + "." * 40},)
        asked.append(Prompt(f"train/{n}", messages, "begin", "", chat_ids(LETTERS, messages)))
    config = RolloutConfig(max_new_tokens=1600)
    generator = Generator(engine, LETTERS, task, config, stop_ids, (1,), environment=environment)
    return await groups_of(generator, Lot(asked, samples, [0] * prompts, range(prompts)))


def check_logprobs(rollout: Rollout, models: dict[int, PreTrainedModel]) -> None:
    """Each sampled token has the log-prob that its version's model gives it behind everything before it."""
    completion = rollout.completion
    wanted = {v: forced_logprobs(models[v], rollout.prompt.ids, completion.ids) for v, _ in completion.spans}
    versions = [version for version, count in completion.spans for _ in range(count)]
    places = [place for begin, end in completion.ranges for place in range(begin, end)]
    expected = [wanted[version][place] for version, place in zip(versions, places, strict=True)]
    assert completion.logprobs == pytest.approx(expected, abs=FP32)


def test_what_was_sampled_is_sent_again_and_read_once(farm: Farm) -> None:
    engine = engine_over([farm.shared()], MODEL)
    sent = recorded(engine)

    def answers(n: int, _: str) -> Step:
        return Step(f"answer {n}", done=n == 4, outcome=1.0)

    groups = run(played(engine, answers, prompts=2, samples=2, tokens=12))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert len(sent) == 4 * 4
    for rollout in rollouts:
        check_logprobs(rollout, {0: MODEL})
        whole = (*rollout.prompt.ids, *rollout.completion.ids)
        ends = [len(rollout.prompt.ids) + begin for begin, _ in rollout.completion.ranges]
        for end, (_, after) in zip(ends, rollout.completion.ranges, strict=True):
            assert any(
                ids == whole[:end] and (*ids, *found.ids) == whole[: len(rollout.prompt.ids) + after]
                for _, ids, found in sent
            ), "the server was sent the very ids that it had given before"
    figures = conversation_figures(rollouts)
    assert 0.97 < figures["rollout/turns_cached"] <= 1.0
    stats = engine.stats()
    assert stats["prompt_tokens"] - stats["cached_tokens"] < 0.6 * stats["prompt_tokens"]


def test_versions_of_turns_over_publications_between_and_inside_them(farm: Farm) -> None:
    """New weights come with a short turn's answer, while a long one is under way."""
    engine = engine_over([farm.shared()], MODEL)

    def answers(n: int, _: str) -> Step:
        if n == 1:
            engine.load_weights(7, NEWER.named_parameters())
        return Step("go on", done=n == 2, outcome=1.0)

    async def both() -> list[Rollout]:
        short = played(engine, answers, tokens=60, stop_ids=())
        long = played(engine, lambda *_: Step(done=True, outcome=1.0), tokens=900, stop_ids=())
        return [group.rollouts[0] for (group,) in await asyncio.gather(short, long)]

    turns, one = run(both())
    assert turns.completion.spans == ((0, 60), (7, 60))
    (old, before), (new, after) = one.completion.spans
    assert (old, new, before + after) == (0, 7, 900)
    for rollout in (turns, one):
        check_logprobs(rollout, {0: MODEL, 7: NEWER})
    assert turns.completion.version == 0
    assert turns.episode is not None
    assert turns.episode.cached is not None
    texts = [(*rollout.prompt.ids, *rollout.completion.ids) for rollout in (turns, one)]
    differ = [ours != theirs for ours, theirs in zip(*texts, strict=False)]
    assert turns.episode.cached <= differ.index(True), (
        "of which the long one, whose first tokens may be the same, was read again by new weights"
    )


def test_a_conversation_goes_on_elsewhere_where_its_server_is_killed(farm: Farm) -> None:
    servers = [farm.start(), farm.shared()]
    engine = engine_over(servers, MODEL)
    sent = recorded(engine)
    killed: list[int] = []

    def answers(n: int, _: str) -> Step:
        if n == 2 and not killed:
            killed.append(len(sent))
            servers[0].stop()
        return Step("go on", done=n == 4, outcome=1.0)

    groups = run(played(engine, answers, prompts=2, samples=2, tokens=40))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for rollout in rollouts:
        assert rollout.episode is not None
        assert (rollout.episode.taken, rollout.outcome) == (4, 1.0)
        check_logprobs(rollout, {0: MODEL})
    homes = [
        {name for name, ids, _ in sent[: killed[0]] if ids[: len(group.prompt.ids)] == group.prompt.ids}
        for group in groups
    ]
    assert sorted(len(home) for home in homes) == [1, 1]
    assert homes[0] != homes[1], "a conversation stays with its server"
    assert len(sent) == 4 * 4, "each turn was taken once"
