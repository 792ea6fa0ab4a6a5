"""Rollouts, verification and judging with real engines and the real task.

Actor and critic are tiny random models. Where a test needs words that a random model does not say, it uses
a `chain`: a model whose weights make the next token depend on the current one alone.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import make_engine
from torch import Tensor

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.score import fill_used, parse_score
from genac_megatron.critic.states import cut_states
from genac_megatron.errors import InputError
from genac_megatron.models.mapping import random_weights
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.recipe.schema import (
    JudgingConfig,
    ModelConfig,
    RolloutConfig,
    StatesConfig,
)
from genac_megatron.recipe.tasks import StateTrackingTask
from genac_megatron.records import Completion, Judgement, Prompt, Request, Rollout, State
from genac_megatron.serving.embedded import EmbeddedEngine
from genac_megatron.serving.sglang.routing import group_of
from genac_megatron.stages.budget import Budget
from genac_megatron.stages.judging import Judge
from genac_megatron.stages.rollouts import (
    Generator,
    Group,
    continue_states,
    generate,
    judge_groups,
    repeats,
)
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import Problem, Task
from genac_megatron.tasks.tokenizer import completion_ids, load_tokenizer, stop_token_ids

FP32 = 3e-5  # as in test_embedded_sampling.py: another batch, another order of fp32 sums
LIMIT = 20
TOKENIZER = load_tokenizer("builtin:tiny")
TASK = make_task(
    StateTrackingTask(kind="state_tracking", objects=3, min_swaps=1, max_swaps=2, heldout_size=16),
    TOKENIZER,
    0,
)
STOPS = stop_token_ids(TOKENIZER)


def model_shape(**changes: Any) -> Any:
    sizes = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 2, "init_std": 0.2} | changes
    config = ModelConfig.model_validate({"family": "qwen3", "shape": sizes, "tokenizer": "builtin:tiny"})
    return shape_of(config, len(TOKENIZER))


def random_engine(seed: int, **engine: Any) -> EmbeddedEngine:
    shape = model_shape()
    made = make_engine(hf_config(shape), **engine)
    get = random_weights(shape, seed)
    made.load_weights(1, [(name, get(name)) for name in _names(shape)])
    return made


def chain_engine(links: dict[int, dict[int, float]]) -> EmbeddedEngine:
    """An engine whose next token is drawn from links[current token]: {token: logit}, others at -30.

    Attention and MLP write nothing, so the hidden state is the current token's one-hot embedding.
    """
    vocab = len(TOKENIZER)
    shape = model_shape(layers=1, hidden=vocab, head_dim=8, ffn=4, tie_embeddings=False)
    # RMS norm brings a one-hot vector to the length sqrt(hidden).
    embedding, head = torch.eye(vocab), torch.full((vocab, vocab), -30.0)
    for current, following in links.items():
        for token, logit in following.items():
            head[token, current] = logit
    tensors: dict[str, Tensor] = {}
    get = random_weights(shape, 0)
    for name in _names(shape):
        silent = name.endswith(("o_proj.weight", "down_proj.weight"))
        tensors[name] = torch.zeros_like(get(name)) if silent else get(name)
    tensors["model.embed_tokens.weight"] = embedding
    tensors["lm_head.weight"] = head / vocab**0.5
    made = make_engine(hf_config(shape))
    made.load_weights(1, tensors.items())
    return made


def _names(shape: Any) -> list[str]:
    from genac_megatron.models.mapping import hf_names

    return list(hf_names(shape))


def token(text: str) -> int:
    (only,) = TOKENIZER.encode(text, add_special_tokens=False)
    return only


def judge(engine: EmbeddedEngine, **config: Any) -> Judge:
    states = StatesConfig(max_states=4, min_segment=3, cutter="fixed", fixed_length=4)
    given = {"template": "brief", "max_new_tokens": 12, "states": states} | config
    return Judge(
        engine, TOKENIZER, TOKENIZER, JudgingConfig(**given), IccState(0.5), STOPS, LIMIT, (0, "judge")
    )


def generator(
    engine: EmbeddedEngine, judge: Judge | None = None, stops: Any = STOPS, **config: Any
) -> Generator:
    given = RolloutConfig(**({"prompts": 4, "samples": 3, "max_new_tokens": LIMIT} | config))
    return Generator(engine, TOKENIZER, TASK, given, stops, (0, "actor"), judge)


def prompts(count: int) -> list[Prompt]:
    return [TASK.prompt("train", index) for index in range(count)]


def play(count: int = 4, **engine: Any) -> list[Group]:
    """Groups of three by fresh engines."""
    critic = judge(random_engine(2, **engine))
    return generate(generator(random_engine(1, **engine), critic), prompts(count), 3)


def unique(groups: Sequence[Group]) -> list[Judgement]:
    return list({id(j): j for group in groups for js in group.judgements for j in js}.values())


class Starts(Task):
    """A task whose outcomes differ within a group, or do not."""

    def _problem(self, split: Any, index: int) -> Problem:
        return Problem("anything", "")

    def verify(self, prompt: Prompt, text: str) -> float:
        return float(prompt.id != "train/0" and zlib.crc32(text.encode()) % 3 == 0)


def test_responses_whose_outcome_is_certain_are_not_judged() -> None:
    """What is judged all the same is judged as if all were; a group's prompt state where anybody is."""
    found: dict[bool, list[Group]] = {}
    for leaves in (False, True):
        made = generator(random_engine(1), judge(random_engine(2), max_new_tokens=4))
        made.task, made.leaves_certain = Starts(TOKENIZER, 1, 1), leaves
        assert made.judge is not None
        made.judge.final = True
        found[leaves] = generate(made, prompts(5), 4)
    kinds = set()
    for whole, group in zip(found[False], found[True], strict=True):
        outcomes = [rollout.outcome for rollout in group.rollouts]
        assert outcomes == [rollout.outcome for rollout in whole.rollouts]
        kinds.add(sum(outcomes))
        firsts = {id(judgements[0]) for judgements in group.judgements if judgements[0].certain is None}
        assert len(firsts) == (len(set(outcomes)) > 1)
        for n, (judgements, final) in enumerate(zip(group.judgements, group.finals, strict=True)):
            rest = {*outcomes[:n], *outcomes[n + 1 :]}
            if len(rest) > 1:
                assert [j.text for j in judgements] == [j.text for j in whole.judgements[n]]
                assert (final.text, final.certain) == (whole.finals[n].text, None)
                continue
            length = len(group.rollouts[n].completion.ids)
            assert [(j.state.cut, j.state.end, j.certain) for j in judgements] == [(0, length, *rest)]
            assert (final.state.cut, final.skipped, final.certain) == (length, True, *rest)
    assert 0.0 in kinds
    assert len(kinds) > 1


# --- groups --------------------------------------------------------------------------------------


def test_groups_are_complete() -> None:
    actor, critic = random_engine(1), random_engine(2)
    groups = generate(generator(actor, judge(critic)), prompts(4), 3)
    assert [group.prompt for group in groups] == prompts(4)
    config = judge(critic).config.states
    for group in groups:
        assert [rollout.sample for rollout in group.rollouts] == [0, 1, 2]
        assert len({rollout.completion.ids for rollout in group.rollouts}) == 3, "samples are drawn apart"
        for rollout, judgements in zip(group.rollouts, group.judgements, strict=True):
            assert rollout.prompt == group.prompt
            assert 1 <= len(rollout.completion.ids) <= LIMIT == rollout.limit
            assert rollout.outcome == TASK.verify(rollout.prompt, rollout.text)
            assert rollout.text == TOKENIZER.decode(rollout.completion.ids, skip_special_tokens=True)
            wanted = cut_states(rollout, TOKENIZER, config)
            cuts = [(j.state.index, j.state.cut, j.state.end) for j in judgements[1:]]
            assert cuts == [(state.index, state.cut, state.end) for state in wanted[1:]]
            assert all(j.state.rollout is rollout for j in judgements[1:])
            for j in judgements:
                assert j.value == parse_score(j.text)
                assert j.completion.version == 1
    assert any(len(js) > 2 for group in groups for js in group.judgements)


def test_beyond_the_budget_states_are_left_out_and_take_the_value_before_them() -> None:
    whole = judge(random_engine(2))
    spent = sum(
        len(j.completion.ids) for j in unique(generate(generator(random_engine(1), whole), prompts(4), 3))
    )
    critic = judge(random_engine(2))
    critic.budget = Budget(spent // 2)
    groups = generate(generator(random_engine(1), critic), prompts(4), 3)
    left_out = [j for j in unique(groups) if j.skipped]
    assert left_out
    assert all(j.value is None and j.completion.ids == () for j in left_out)
    written = sum(len(j.completion.ids) for j in unique(groups))
    assert spent // 8 < written == critic.budget.spent <= spent // 2
    assert any(not j.skipped for j in unique(groups) if j.state.index > 0)
    assert generate(generator(random_engine(1), critic), prompts(4), 3) == groups, "dealt anew"
    for group in groups:
        for judgements in group.judgements:
            fill_used(judgements, 0.5)
            for before, after in pairwise(judgements):
                assert not after.skipped or after.used == before.used


def test_states_without_room_in_the_critics_model_take_the_value_before_them() -> None:
    whole = unique(generate(generator(random_engine(1), judge(random_engine(2))), prompts(4), 3))
    lengths = sorted(len(j.prompt_ids) for j in whole)
    critic = judge(random_engine(2))
    critic.positions = lengths[len(lengths) // 2] + critic.config.max_new_tokens
    groups = generate(generator(random_engine(1), critic), prompts(4), 3)
    left_out = [j for j in unique(groups) if j.too_long]
    assert len(left_out) == sum(length > lengths[len(lengths) // 2] for length in lengths) > 0
    assert all(j.skipped and j.value is None and j.completion.ids == () for j in left_out)
    others = {(j.state.rollout.key, j.state.index): j.text for j in unique(groups) if not j.too_long}
    assert others
    assert all(others.get((j.state.rollout.key, j.state.index), j.text) == j.text for j in whole)
    for group in groups:
        for judgements in group.judgements:
            fill_used(judgements, 0.5)
            for before, after in pairwise(judgements):
                assert not after.skipped or after.used == before.used


def test_each_state_is_judged_once_and_the_prompt_state_once_per_group() -> None:
    critic = random_engine(2)
    groups = generate(generator(random_engine(1), judge(critic)), prompts(4), 3)
    for group in groups:
        assert len({id(judgements[0]) for judgements in group.judgements}) == 1
        assert group.judgements[0][0].state.cut == 0
    states = 4 + sum(len(js) - 1 for group in groups for js in group.judgements)
    assert len(unique(groups)) == states
    stats = critic.stats()
    assert stats["prompt_tokens"] == sum(len(j.prompt_ids) for j in unique(groups))
    assert stats["tokens"] == sum(len(j.completion.ids) for j in unique(groups))


def test_a_critic_is_shown_what_is_before_the_cut_and_nothing_behind_it() -> None:
    critic = judge(random_engine(2))
    for j in unique(play()):
        rollout, cut = j.state.rollout, j.state.cut
        shown = TOKENIZER.decode(j.prompt_ids)
        assert f"used {cut} of {LIMIT}" in shown
        assert rollout.prompt.problem in shown
        ids = (*rollout.completion.ids[:cut], 5, 5, 5, 5)  # goes on in another way, and succeeds
        other = Rollout(rollout.prompt, rollout.sample, Completion(ids, (-1.0,) * len(ids), "stop"), "", 1.0)
        other.limit = LIMIT
        (group,) = judge_groups(critic, [Group(rollout.prompt, [other])])
        (same,) = [x for x in group.judgements[0] if x.state.cut == cut]
        assert same.prompt_ids == j.prompt_ids
        assert same.completion.ids == j.completion.ids


# --- reproducibility -----------------------------------------------------------------------------


def test_seeds_make_it_reproducible_to_the_bit() -> None:
    assert play() == play()


def test_an_engine_used_before_gives_the_same() -> None:
    critic, actor = judge(random_engine(2)), random_engine(1)
    first = generate(generator(actor, critic), prompts(4), 3)
    assert generate(generator(actor, critic), prompts(4), 3) == first


def test_another_seed_gives_other_rollouts() -> None:
    made = generator(random_engine(1))
    first = generate(made, prompts(2), 2)
    made.seed = (1, "actor")
    second = generate(made, prompts(2), 2)
    pairs = [
        (a, b)
        for g, h in zip(first, second, strict=True)
        for a, b in zip(g.rollouts, h.rollouts, strict=True)
    ]
    assert all(a.completion.ids != b.completion.ids for a, b in pairs)


@pytest.mark.parametrize("max_batch", [64, 3])
def test_a_batch_split_over_two_ranks_is_the_same_batch(max_batch: int) -> None:
    """Tokens are the same, log-probs up to rounding: batches are padded and summed in another way."""
    whole = play(5)
    parts = []
    for rank in range(2):
        critic = judge(random_engine(2, max_batch=max_batch))
        actor = generator(random_engine(1, max_batch=max_batch), critic)
        parts.append(generate(actor, prompts(5)[rank::2], 3))
    for index, group in enumerate(whole):
        other = parts[index % 2][index // 2]
        assert other.prompt == group.prompt
        for mine, theirs in zip(group.rollouts, other.rollouts, strict=True):
            assert mine.completion.ids == theirs.completion.ids
            assert mine.completion.logprobs == pytest.approx(theirs.completion.logprobs, abs=FP32)
            assert mine.outcome == theirs.outcome
        for mine_js, their_js in zip(group.judgements, other.judgements, strict=True):
            assert [j.prompt_ids for j in mine_js] == [j.prompt_ids for j in their_js]
            assert [j.completion.ids for j in mine_js] == [j.completion.ids for j in their_js]
            for j, k in zip(mine_js, their_js, strict=True):
                assert j.completion.logprobs == pytest.approx(k.completion.logprobs, abs=FP32)


def test_groups_of_all_ranks_are_dealt_without_gaps_and_every_request_is_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An actor's by prompt, a critic's by response, all states of it together (serving/sglang/routing.py)."""
    dealt: dict[str, dict[str, int]] = {"actor": {}, "critic": {}}
    asked: dict[str, set[str]] = {"actor": set(), "critic": set()}
    for rank, places in enumerate((range(3), range(3, 5))):
        actor, critic = random_engine(1), random_engine(2)
        for name, engine in (("actor", actor), ("critic", critic)):
            real = engine.complete

            async def complete(request: Request, name: str = name, real: Any = real) -> Completion:
                asked[name].add(group_of(request.key))
                completion: Completion = await real(request)
                return completion

            monkeypatch.setattr(engine, "complete", complete)
            monkeypatch.setattr(engine, "deal", dealt[name].update)
        groups = generate(generator(actor, judge(critic)), prompts(5)[rank::2], 3, places=places)
        again = dict(dealt["critic"])
        judge_groups(judge(critic), groups, places)
        assert dealt["critic"] == again
    assert sorted(dealt["actor"].values()) == list(range(5))
    assert sorted(dealt["critic"].values()) == list(range(15))
    assert asked["actor"] == dealt["actor"].keys()
    assert asked["critic"] <= dealt["critic"].keys()


def repeated() -> list[Prompt]:
    """A batch in which one prompt stands three times and one twice, as at the end of a small epoch."""
    a, b, c = prompts(3)
    return [a, b, a, c, b, a]


def test_a_repeated_prompt_is_rolled_out_afresh() -> None:
    groups = generate(generator(random_engine(1), judge(random_engine(2))), repeated(), 2)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert len({rollout.key for rollout in rollouts}) == len(rollouts)
    same = [r.completion.ids for r in rollouts if r.prompt == prompts(1)[0]]
    assert len(set(same)) == len(same) == 6
    judged = [group.judgements[0][0] for group in groups if group.prompt == prompts(1)[0]]
    assert len({j.completion.ids for j in judged}) == 3, "the prompt state is judged once per group"


def test_repeats_change_nothing_for_prompts_that_come_first() -> None:
    alone = generate(generator(random_engine(1), judge(random_engine(2))), prompts(3), 2)
    batch = generate(generator(random_engine(1), judge(random_engine(2))), repeated(), 2)
    for first, group in zip(alone, [batch[0], batch[1], batch[3]], strict=True):
        assert [r.key for r in group.rollouts] == [r.key for r in first.rollouts]
        assert [r.completion.ids for r in group.rollouts] == [r.completion.ids for r in first.rollouts]


def test_repeats_are_numbered_over_the_whole_batch_whatever_the_ranks() -> None:
    batch = repeated()
    whole = generate(generator(random_engine(1), judge(random_engine(2))), batch, 2)
    turns = repeats([prompt.id for prompt in batch])
    assert turns == [0, 0, 1, 0, 1, 2]
    for size in (2, 3):
        for rank in range(size):
            made = generator(random_engine(1), judge(random_engine(2)))
            mine = generate(made, batch[rank::size], 2, turns[rank::size])
            for group, other in zip(whole[rank::size], mine, strict=True):
                assert [r.key for r in group.rollouts] == [r.key for r in other.rollouts]
                assert [r.completion.ids for r in group.rollouts] == [
                    r.completion.ids for r in other.rollouts
                ]
                for js, ks in zip(group.judgements, other.judgements, strict=True):
                    assert [j.completion.ids for j in js] == [k.completion.ids for k in ks]


def test_judging_again_gives_the_same_judgements() -> None:
    """The held-out evaluation judges stored responses; it must ask what the rollouts asked."""
    groups = generate(generator(random_engine(1), judge(random_engine(2))), repeated(), 3)
    again = judge_groups(judge(random_engine(2)), groups)
    for before, after in zip(groups, again, strict=True):
        assert after.rollouts is before.rollouts
        for mine, theirs in zip(before.judgements, after.judgements, strict=True):
            assert [j.prompt_ids for j in mine] == [j.prompt_ids for j in theirs]
            assert [j.completion.ids for j in mine] == [j.completion.ids for j in theirs]
        assert len({id(js[0]) for js in after.judgements}) == 1


# --- room ----------------------------------------------------------------------------------------


def test_a_prompt_that_leaves_no_room_for_the_response_is_named() -> None:
    made = generator(random_engine(1))
    longest = max(len(prompt.ids) for prompt in prompts(4))
    made.positions = longest + LIMIT
    assert generate(made, prompts(4), 1)
    made.positions -= 1
    with pytest.raises(InputError) as caught:
        generate(made, prompts(4), 1)
    named = [prompt.id for prompt in prompts(4) if f"prompt {prompt.id}" in str(caught.value)]
    assert [len(prompt.ids) for prompt in prompts(4) if prompt.id in named] == [longest]
    for said in (
        f"{longest} tokens",
        f"{LIMIT} new",
        f"{made.positions} positions",
        "rollout.max_new_tokens",
    ):
        assert said in str(caught.value)


def test_a_critics_prompt_that_leaves_no_room_is_not_asked_about() -> None:
    """It shows the response: the last state's is the longest."""
    engine = random_engine(1)
    critic = judge(random_engine(2))
    groups = generate(generator(engine, critic), prompts(1), 1)
    longest = max(len(j.prompt_ids) for j in groups[0].judgements[0])
    critic.positions = longest + critic.config.max_new_tokens
    assert not any(j.too_long for j in judge_groups(critic, groups)[0].judgements[0])
    critic.positions -= 1
    assert [j.too_long for j in judge_groups(critic, groups)[0].judgements[0]][-1]


# --- scores --------------------------------------------------------------------------------------

SCORES = {3: 1.0, 7: 2.0, 10: 0.5}  # score -> logit


def scoring_engine() -> EmbeddedEngine:
    """A critic that answers 3, 7 or 10 with chances proportional to exp of SCORES' logits."""
    start, opening, closing = token("\n"), token("<answer>"), token("</answer>")
    digits = {token(str(n)): logit for n, logit in SCORES.items()}
    links = {start: {opening: 0.0}, opening: digits, closing: {STOPS[0]: 0.0}}
    return chain_engine(links | {digit: {closing: 0.0} for digit in digits})


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_soft_scores_are_the_expectation_of_the_sampled_ones(temperature: float) -> None:
    """At the temperature that scores are sampled at; "10" is one token, as "3" and "7" are."""
    critic = judge(scoring_engine(), score="soft", temperature=temperature)
    groups = generate(generator(random_engine(1), critic), prompts(2), 2)
    values = torch.tensor([n / 10 for n in SCORES])
    expected = float(((torch.tensor(list(SCORES.values())) / temperature).softmax(0) * values).sum())
    seen = set()
    for j in unique(groups):
        if j.value is None:  # at a high temperature, the rest has chances too
            continue
        assert j.soft is not None
        assert 0.0 <= j.soft <= 1.0
        assert j.soft == pytest.approx(expected, abs=1e-5)  # fp32 log-probs; others have e^-15 at most
        seen.add(j.value)
    assert len(seen) > 1, "the sampled score varies where the soft one does not"


def two_token_engine() -> EmbeddedEngine:
    """A critic that says 1 or 10 or 0, where 10 is written as two tokens, 1 and 0."""
    start, opening, closing = token("\n"), token("<answer>"), token("</answer>")
    one, nought = token("1"), token("0")
    return chain_engine({
        start: {opening: 0.0}, opening: {one: 1.0, nought: 0.0}, one: {closing: 0.0, nought: 0.5},
        nought: {closing: 0.0}, closing: {STOPS[0]: 0.0},
    })  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_answers_of_several_tokens_are_tempered_token_by_token(temperature: float) -> None:
    """As they are sampled: p(10) = p(1) p(0 | 1), each of the tempered distribution."""
    first = (torch.tensor([1.0, 0.0]) / temperature).softmax(0)
    second = (torch.tensor([0.0, 0.5]) / temperature).softmax(0)
    candidates = [(token(str(n)), token("</answer>")) for n in (0, 1)]
    candidates.append((token("1"), token("0"), token("</answer>")))
    ids = (token("\n"), token("<answer>"))
    scores = asyncio.run(two_token_engine().score(ids, candidates, temperature=temperature))
    wanted = [first[1], first[0] * second[0], first[0] * second[1]]
    # Other tokens take e^-30 / temperature of the chance each, of a vocabulary of under 200.
    assert [math.exp(x) for x in scores] == pytest.approx([float(x) for x in wanted], abs=1e-3)


def test_a_sampled_score_asks_for_no_soft_one() -> None:
    engine = scoring_engine()
    groups = generate(generator(random_engine(1), judge(engine)), prompts(2), 2)
    assert all(j.soft is None and j.value is not None for j in unique(groups))


def test_where_nothing_parses_there_is_no_score_of_either_kind() -> None:
    critic = judge(random_engine(2), score="soft")
    for j in unique(generate(generator(random_engine(1), critic), prompts(2), 2)):
        assert (j.value is None) == (j.soft is None)


# --- continuations and outcomes ------------------------------------------------------------------


def demonstrated(prompt: Prompt, finish: Any = "stop") -> Rollout:
    """The teacher's right response."""
    assert TASK.teacher is not None
    text = TASK.teacher.demonstrate(prompt, random.Random(0))
    ids = completion_ids(TOKENIZER, text)
    return Rollout(prompt, 0, Completion(ids, (-1.0,) * len(ids), finish), text)


def test_continuations_stay_within_the_actors_limit() -> None:
    """An actor that never stops writes exactly what is left of the limit, from every cut."""
    engine = random_engine(1)
    made = generator(engine, stops=())
    (group,) = generate(made, prompts(1), 1)
    engine.stats()
    cuts = [0, 1, 7, LIMIT - 1]
    states = [State(group.rollouts[0], k, cut, LIMIT) for k, cut in enumerate(cuts)]
    outcomes = continue_states(made, states, 3)
    assert [len(row) for row in outcomes] == [3] * len(cuts)
    assert engine.stats()["tokens"] == 3 * sum(LIMIT - cut for cut in cuts)


def test_a_continuation_is_verified_with_what_it_continues() -> None:
    """An actor that only says "stop": right where all but the end token was there, wrong from the prompt."""
    prompt = prompts(1)[0]
    rollout = demonstrated(prompt)
    engine = chain_engine({current: {STOPS[0]: 0.0} for current in range(len(TOKENIZER))})
    length = len(rollout.completion.ids)
    states = [State(rollout, 0, 0, length - 1), State(rollout, 1, length - 1, length)]
    made = generator(engine, max_new_tokens=length)
    assert continue_states(made, states, 2) == [[0.0, 0.0], [1.0, 1.0]]
    assert continue_states(made, states[::-1], 1) == [[1.0], [0.0]]


class Fingerprint(Task):
    """A task whose outcomes tell responses apart."""

    def _problem(self, split: Any, index: int) -> Problem:
        return Problem("anything", "")

    def verify(self, prompt: Prompt, text: str) -> float:
        return zlib.crc32(text.encode()) / 2**32


def test_continuations_are_drawn_apart_and_reproducible() -> None:
    state = State(demonstrated(prompts(1)[0]), 1, 4, 9)
    seen = []
    for _ in range(2):
        made = generator(random_engine(1))
        made.task = Fingerprint(TOKENIZER, 1, 1)
        seen.append(continue_states(made, [state], 4))
    assert seen[0] == seen[1]
    assert len(set(seen[0][0])) == 4


@pytest.mark.parametrize(("rule", "wanted"), [("verify", 1.0), ("zero", 0.0)])
def test_what_a_cut_off_response_earns(rule: str, wanted: float) -> None:
    made = generator(random_engine(1), truncated_outcome=rule)
    whole, cut_off = demonstrated(prompts(1)[0]), demonstrated(prompts(1)[0], "length")
    asyncio.run(made.verify(whole))
    asyncio.run(made.verify(cut_off))
    assert (whole.outcome, cut_off.outcome) == (1.0, wanted)


@pytest.mark.parametrize(("rule", "wanted"), [("verify", 1.0), ("zero", 0.0)])
def test_a_cut_off_continuation_earns_the_same(rule: str, wanted: float) -> None:
    """The right answer stands, then an actor goes on with blanks until the limit."""
    rollout = demonstrated(prompts(1)[0])
    blank = token("\n")
    engine = chain_engine({current: {blank: 0.0} for current in range(len(TOKENIZER))})
    length = len(rollout.completion.ids)
    made = generator(engine, truncated_outcome=rule, max_new_tokens=length + 3)
    assert continue_states(made, [State(rollout, 1, length - 1, length)], 2) == [[wanted, wanted]]


def test_a_failure_is_raised_once_and_no_task_tells_of_it_again(caplog: pytest.LogCaptureFixture) -> None:
    """A tokenizer that has no template fails every state, and the prompt state that a group shares."""
    critic = judge(random_engine(2))
    critic.tokenizer = load_tokenizer("builtin:tiny")
    critic.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        generate(generator(random_engine(1), critic), prompts(2), 3)
    fine = generate(generator(random_engine(1)), prompts(2), 3)
    with pytest.raises(InputError, match="no chat template"):
        judge_groups(critic, fine)
    gc.collect()  # a task that was never asked tells of its exception when it goes
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []
