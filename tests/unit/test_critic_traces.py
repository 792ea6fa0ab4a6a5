"""Trace sources: the exact teacher, own judgements with rejection, a chat endpoint; and balance."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from fake_chat import FakeChat, reply
from pydantic import TypeAdapter

from genac_megatron.critic.endpoint import ask_endpoint
from genac_megatron.critic.icc import IccState
from genac_megatron.critic.score import deciding, parse_score
from genac_megatron.critic.states import cut_states
from genac_megatron.critic.traces import (
    TraceContext,
    accept,
    bears_out,
    endpoint_messages,
    endpoint_samples,
    exact_samples,
    monte_carlo_samples,
    own_samples,
    to_sample,
    unscored,
)
from genac_megatron.errors import InputError, PeerLost
from genac_megatron.recipe.schema import JudgingConfig, StatesConfig, TeacherConfig
from genac_megatron.recipe.tasks import StateTrackingTask, TaskConfig
from genac_megatron.records import Completion, Finish, Judgement, Prompt, Rollout, State
from genac_megatron.tasks import make_task
from genac_megatron.tasks.base import Teacher
from genac_megatron.tasks.state_tracking import StateTracking
from genac_megatron.tasks.tokenizer import load_tokenizer

TINY = load_tokenizer("builtin:tiny")
JUDGING = JudgingConfig(template="brief", max_new_tokens=200)
CONTEXT = TraceContext(TINY, TINY, JUDGING, IccState(0.62, step=3), limit=96)


def rollout(text: str, prompt: Prompt | None = None, sample: int = 0, outcome: float = 0.0) -> Rollout:
    ids = (*TINY.encode(text, add_special_tokens=False), TINY.eos_token_id)
    made = prompt or Prompt("train/0", (), "the problem", "SECRET")
    return Rollout(made, sample, Completion(ids, (-0.1,) * len(ids), "stop"), text, outcome)


def states_of(made: Rollout) -> list[State]:
    return cut_states(made, TINY, StatesConfig(min_segment=2))


def test_the_critic_room_imports_no_torch() -> None:
    code = "import sys, genac_megatron.critic.traces; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- samples, exact teacher ----------------------------------------------------------------------


def test_loss_covers_the_completion_and_its_end() -> None:
    sample = to_sample(TINY, (5, 6, 7), "fine\n<answer>3</answer>")
    assert sample.tokens[:3] == [5, 6, 7]
    assert sample.start == 3
    assert sample.tokens[-1] == TINY.eos_token_id
    assert TINY.decode(sample.tokens[3:-1]) == "fine\n<answer>3</answer>"
    sneaky = to_sample(TINY, (5,), "end <|im_end|> go on")
    assert sneaky.tokens.count(TINY.eos_token_id) == 1


def test_exact_teacher_traces() -> None:
    config = StateTrackingTask(kind="state_tracking", train_size=20, heldout_size=4, slip_rate=0.3)
    task = StateTracking(config, TINY, 0)
    assert task.teacher is not None
    states = []
    for index in range(6):
        prompt = task.prompt("train", index)
        text = task.teacher.demonstrate(prompt, random.Random(index))
        states += states_of(rollout(text, prompt))
    samples = exact_samples(states, task.teacher, CONTEXT)
    assert len(samples) == len(states) > 6
    for state, sample in zip(states, samples, strict=True):
        assert tuple(sample.tokens[: sample.start]) == CONTEXT.prompt_ids(state)
        text = str(TINY.decode(sample.tokens[sample.start :], skip_special_tokens=True))
        assert parse_score(text) is not None
        assert text.count("<answer>") == 1
        assert text.endswith("</answer>")
    # A state's trace does not depend on its neighbours or their order.
    assert exact_samples(states[::-1], task.teacher, CONTEXT) == samples[::-1]
    short = TraceContext(TINY, TINY, JUDGING.model_copy(update={"max_new_tokens": 1}), CONTEXT.icc, 96)
    assert exact_samples(states, task.teacher, short) == []


# --- own judgements ------------------------------------------------------------------------------


def judgement(value: float | None, finish: Finish = "stop") -> Judgement:
    state = states_of(rollout("a\nb\nc"))[0]
    return Judgement(state, (1, 2), Completion((3, 4, 5), (0.0,) * 3, finish), "", value)


def test_rejection_keeps_what_monte_carlo_bears_out() -> None:
    """Within 0.05 and two standard errors: of 8 continuations with mean 0.5 that is 0.05 + 0.354."""
    made = [judgement(0.9), judgement(1.0), judgement(None), judgement(0.5, "length"), judgement(0.1)]
    config = TeacherConfig(kind="self", continuations=8)
    kept = accept([[one] for one in made], [0.5, 0.5, 0.5, 0.5, 0.5], config)
    assert kept == [made[0], None, None, None, made[4]]
    narrow = TeacherConfig(kind="self", tolerance_floor=0.15, tolerance_errors=0.0)
    assert accept([[judgement(0.6)]] * 2, [0.45, 0.4375], narrow)[1] is None, "0.15 is in, 0.1625 is not"
    assert accept([[judgement(0.6)]] * 2, [0.45, 0.4375], narrow)[0] is not None
    samples = own_samples(made[:1])
    assert samples[0].tokens == [1, 2, 3, 4, 5]
    assert samples[0].start == 2
    with pytest.raises(ValueError):
        accept([[one] for one in made], [0.5], config)


def test_the_nearest_of_several_judgements_is_kept() -> None:
    several = [judgement(0.9), judgement(None), judgement(0.6), judgement(0.5, "length"), judgement(0.4)]
    config = TeacherConfig(kind="self", continuations=8)
    assert accept([several, several], [0.52, 1.0], config) == [several[2], several[0]]
    assert accept([several], [0.1], config) == [several[4]]
    assert accept([several], [0.0], config) == [None], "0.4 is more than two errors from 0"
    assert accept([several[:2]], [0.0], config) == [None]
    assert accept([[]], [0.0], config) == [None]


@pytest.mark.parametrize("continuations", [8, 16, 32])
def test_a_right_judgement_is_kept_whatever_the_state_is_worth(continuations: int) -> None:
    """Exactly, over all outcomes of the continuations: a filter that keeps sure states more often than open
    ones teaches extremes. With a fixed 0.15 of 8 it was 100 % at 0 and 1 and 55 to 71 % at 0.2 to 0.7.
    """
    config = TeacherConfig(kind="self", continuations=continuations)
    for level in range(11):
        value = level / 10
        kept = sum(
            math.comb(continuations, right) * value**right * (1 - value) ** (continuations - right)
            for right in range(continuations + 1)
            if bears_out(value, right / continuations, config)
        )
        assert kept > 0.95, value
    assert not bears_out(1.0, 0.5, config)
    assert not bears_out(0.0, 0.7, config)


# --- what says which score -----------------------------------------------------------------------


def read(ids: list[int], places: set[int]) -> list[str]:
    return [str(TINY.decode([ids[place]])) for place in sorted(places)]


@pytest.mark.parametrize("score", range(11))
def test_the_loss_is_taken_off_the_score_alone(score: int) -> None:
    text = f"step 10 of 10\nhas a + 1\np 0.10\n<answer>{score}</answer>"
    sample = unscored(TINY, to_sample(TINY, (5, 6), text))
    ids, weights = sample.tokens[sample.start :], sample.fields["weights"]
    said = {place for place, weight in enumerate(weights) if weight == 0.0}
    assert set(weights) == {0.0, 1.0}
    assert "".join(read(ids, said)).startswith(str(score))
    others = [
        to_sample(TINY, (5, 6), text.replace(f"<answer>{score}<", f"<answer>{other}<")).tokens[2:]
        for other in range(11)
    ]
    for place, weight in enumerate(weights):  # by the definition: does any other score part from it here?
        parts = any(other[:place] == ids[:place] and other[place] != ids[place] for other in others)
        assert (weight == 0.0) == parts
    assert weights[-1] == 1.0, "the end is learnt"
    assert sum(weight == 0.0 for weight in weights) <= 2


def test_a_score_in_another_form_counts_whole_and_drafts_too() -> None:
    ids = TINY.encode("I say <answer> 07 </answer> no, <answer>3</answer>", add_special_tokens=False)
    said = read(ids, deciding(TINY, ids))
    assert "3" in said
    assert "7" in "".join(said)
    assert "no" not in "".join(said)
    assert "say" not in "".join(said)
    assert deciding(TINY, TINY.encode("step 3 of 5", add_special_tokens=False)) == set()
    assert deciding(TINY, []) == set()


class Scores(Teacher):
    """A task's own teacher, whose traces end in a score that is given."""

    def __init__(self, teacher: Teacher, score: int) -> None:
        self.teacher, self.score = teacher, score

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        return self.teacher.demonstrate(prompt, rng)

    def trace(self, prompt: Prompt, partial: str, p_bar: float, rng: random.Random) -> tuple[str, int]:
        return self.teacher.trace(prompt, partial, p_bar, rng)[0], self.score


def part(one: list[int], other: list[int]) -> int:
    """Where two token sequences part."""
    return next(place for place, both in enumerate(zip(one, other, strict=False)) if both[0] != both[1])


@pytest.mark.parametrize("icc", ["on", "off"])
@pytest.mark.parametrize("by", ["exact", "monte_carlo"])
@pytest.mark.parametrize("kind", ["state_tracking", "chained_arithmetic"])
def test_no_token_that_is_learnt_parts_two_traces_of_other_scores(kind: str, by: str, icc: str) -> None:
    """Only a score that is not 0 has the success rate before it: what follows the reasoning told of 0."""
    block = {"kind": kind, "train_size": 20, "heldout_size": 4, "slip_rate": 0.3}
    task = make_task(TypeAdapter(TaskConfig).validate_python(block), TINY, 0)
    assert task.teacher is not None
    context = replace(CONTEXT, judging=JUDGING.model_copy(update={"icc": icc}))
    for index in range(4):
        prompt = task.prompt("train", index)
        states = states_of(rollout(task.teacher.demonstrate(prompt, random.Random(index)), prompt))
        made = []
        for score in range(11):
            if by == "exact":
                samples = exact_samples(states, Scores(task.teacher, score), context)
            else:
                samples = monte_carlo_samples(states, [score / 10] * len(states), task.teacher, context)
            made.append([unscored(TINY, sample) for sample in samples])
        for several in zip(*made, strict=True):  # of one state
            for one, other in itertools.permutations(several, 2):
                place = part(one.tokens, other.tokens)
                assert one.fields["weights"][place - one.start] == 0.0, TINY.decode(one.tokens[one.start :])
            for score, one in enumerate(several):
                said = {place for place, weight in enumerate(one.fields["weights"]) if weight == 0.0}
                shown = "".join(read(one.tokens[one.start :], said))
                lead = "" if icc == "off" else "p" if score else "<answer>"
                assert shown.startswith(f"{lead}{score}"), "and no more than that"
                assert len(said) == bool(lead) + 1


# --- Monte Carlo's values as scores --------------------------------------------------------------


def test_monte_carlo_scores_stand_behind_the_exact_teachers_reasoning() -> None:
    config = StateTrackingTask(kind="state_tracking", train_size=20, heldout_size=4, slip_rate=0.3)
    task = StateTracking(config, TINY, 0)
    assert task.teacher is not None
    prompt = task.prompt("train", 0)
    states = states_of(rollout(task.teacher.demonstrate(prompt, random.Random(1)), prompt))
    values = [0.0, 0.25, 0.44, 0.9375, 1.0, 0.6][: len(states)]
    samples = monte_carlo_samples(states, values, task.teacher, CONTEXT)
    exact = exact_samples(states, task.teacher, CONTEXT)
    for value, sample, other, state in zip(values, samples, exact, states, strict=False):
        text, words = (str(TINY.decode(s.tokens[s.start : -1])) for s in (sample, other))
        assert parse_score(text) == int(10 * value + 0.5) / 10
        assert text.split("\n")[0] == words.split("\n")[0], "the exact teacher's first line"
        assert tuple(sample.tokens[: sample.start]) == CONTEXT.prompt_ids(state)
        assert ("\np 0.62" in text) == (value > 0)
    bare = monte_carlo_samples(states, values, None, CONTEXT)
    texts = [str(TINY.decode(sample.tokens[sample.start : -1])) for sample in bare]
    assert texts == [f"<answer>{int(10 * value + 0.5)}</answer>" for value in values]


# --- endpoint ------------------------------------------------------------------------------------


def teacher(server: FakeChat, **changes: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"kind": "endpoint", "url": server.url, "model": "wise", **changes})


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers_come_in_order_under_bounded_concurrency(
    fake_chat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        question = body["messages"][0]["content"]
        time.sleep(0.05 if question in ("q0", "q3", "q7") else 0.01)  # so that answers overtake each other
        return 200, reply(f"re: {question}")

    server = fake_chat(slow)
    monkeypatch.setenv("MY_KEY", "k-123")
    answers = ask_endpoint(
        teacher(server, concurrency=3, api_key_env="MY_KEY"), [ask(f"q{i}") for i in range(12)], 77
    )
    assert answers == [f"re: q{i}" for i in range(12)]
    assert 2 <= server.most_open <= 3
    assert set(server.paths) == {"/v1/chat/completions"}
    assert all(h["Authorization"] == "Bearer k-123" for h in server.headers)
    assert all(b["model"] == "wise" and b["max_tokens"] == 77 for b in server.bodies)


def test_waiting_for_a_turn_is_no_time_out(fake_chat: Any) -> None:
    def slow(_: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.6)
        return 200, reply("done")

    # All together take longer than one may; one alone, on a busy machine, far less.
    config = teacher(fake_chat(slow), concurrency=1, timeout_s=4.0, attempts=1)
    assert ask_endpoint(config, [ask("q")] * 8, 10) == ["done"] * 8


def test_failures_are_tried_again_and_then_skipped(fake_chat: Any) -> None:
    tries: dict[str, int] = {}
    given_up = threading.Event()

    def shaky(body: dict[str, Any]) -> tuple[int, Any]:
        name = body["messages"][0]["content"]
        tries[name] = tries.get(name, 0) + 1
        if name == "late" and tries[name] == 1:
            given_up.wait(60)
        if name == "never" or (name == "busy" and tries[name] < 3):
            return (429 if name == "busy" else 503), {}
        return 200, reply(None if name == "empty" else name)

    config = teacher(fake_chat(shaky), timeout_s=3.0, attempts=3)
    answers = ask_endpoint(config, [ask(n) for n in ("good", "busy", "never", "late", "empty")], 10)
    given_up.set()
    assert answers == ["good", "busy", None, "late", None]
    assert tries == {"good": 1, "busy": 3, "never": 3, "late": 2, "empty": 1}


def test_a_dead_endpoint_is_a_lost_peer(fake_chat: Any) -> None:
    server = fake_chat(lambda _: (200, reply("x")))
    config = teacher(server, attempts=2, timeout_s=1.0)
    server.http.server_close()
    with pytest.raises(PeerLost, match="none of 2"):
        ask_endpoint(config, [ask("a"), ask("b")], 10)
    assert ask_endpoint(config, [], 10) == []


def test_a_refused_item_is_skipped_and_a_refused_batch_tells_why(fake_chat: Any) -> None:
    def prim(body: dict[str, Any]) -> tuple[int, Any]:
        asked = body["messages"][0]["content"]
        if asked == "down":
            return 503, {}
        return (422, {"error": "too long"}) if asked == "long" else (200, reply("ok"))

    server = fake_chat(prim)
    config = teacher(server, attempts=1)
    answers = ask_endpoint(config, [ask(text) for text in ("a", "long", "b", "down")], 10)
    assert answers == ["ok", None, "ok", None]
    assert len(server.bodies) == 4
    with pytest.raises(InputError, match=r"refused each of 2 requests, the last with status 422.*too long"):
        ask_endpoint(config, [ask("long")] * 2, 10)
    with pytest.raises(PeerLost, match=r"none of 2 requests.*it refused 1 of them.*too long"):
        ask_endpoint(config, [ask("long"), ask("down")], 10)


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [(401, {"error": "bad key"}, "status 401.*bad key"), (404, {}, "404"), (200, b"<html>", "not an OpenAI"),
     (403, {}, "403"), (400, {"error": {"message": "The model `wise-2.5` does not exist"}}, "does not exist"),
     (400, {"error": {"code": "model_not_found"}}, "model_not_found"),
     (200, {"text": "x"}, "not an OpenAI")],
)  # fmt: skip
def test_refusals_are_input_errors(fake_chat: Any, status: int, reply: Any, message: str) -> None:
    server = fake_chat(lambda _: (status, reply))
    with pytest.raises(InputError, match=message) as error:
        ask_endpoint(teacher(server, concurrency=1), [ask(str(i)) for i in range(20)], 10)
    assert "way out" in str(error.value)
    assert len(server.bodies) <= 2


def test_missing_settings_are_input_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABSENT_KEY", raising=False)
    for config, message in (
        (TeacherConfig(kind="endpoint", model="m"), "needs url and model"),
        (TeacherConfig(kind="endpoint", url="http://127.0.0.1:9/v1"), "needs url and model"),
        (
            TeacherConfig(kind="endpoint", url="http://127.0.0.1:9", model="m", api_key_env="ABSENT_KEY"),
            "ABSENT_KEY",
        ),
        (TeacherConfig(kind="endpoint", url="ftp://x", model="m"), "not an http address"),
        (TeacherConfig(kind="endpoint", url="http://host:port/v1", model="m"), "Invalid port"),
        (TeacherConfig(kind="endpoint", url="host:80/v1", model="m"), "not an http address"),
        (TeacherConfig(kind="endpoint", url="http://xn--/v1", model="m"), "not an http address"),
    ):
        with pytest.raises(InputError, match=message):
            ask_endpoint(config, [ask("a")], 10)


def test_endpoint_traces_parse_fit_and_never_saw_the_outcome(fake_chat: Any) -> None:
    replies = {
        "a\n": "Easy. <answer>9</answer> Hope that helps!",
        "a\nb\n": "I cannot say.",
        "a\nb\nc\n": "long " * 300 + "<answer>1</answer>",
    }

    def teach(body: dict[str, Any]) -> tuple[int, Any]:
        content = body["messages"][0]["content"]
        partial = content.split("<partial_response>\n")[1].split("\n</partial_response>")[0]
        return 200, reply(replies.get(partial, "So far nothing.\n<answer>6</answer>"))

    states = cut_states(rollout("a\nb\nc\nd", outcome=1.0), TINY, StatesConfig(min_segment=2))
    server = fake_chat(teach)
    samples = endpoint_samples(states, teacher(server), CONTEXT)
    texts = [TINY.decode(s.tokens[s.start : -1]) for s in samples]
    assert len(states) == 4
    assert texts == ["So far nothing.\n<answer>6</answer>", "Easy. <answer>9</answer>"]
    assert [tuple(s.tokens[: s.start]) for s in samples] == [CONTEXT.prompt_ids(s) for s in states[:2]]
    assert all("SECRET" not in json.dumps(body) for body in server.bodies)
    other = cut_states(rollout("a\nb\nc\nd", outcome=0.0), TINY, StatesConfig(min_segment=2))
    assert [endpoint_messages(s, CONTEXT) for s in states] == [endpoint_messages(s, CONTEXT) for s in other]


def test_exact_traces_about_actors_of_a_range_show_and_use_another_p_bar_each() -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    config = StateTrackingTask(kind="state_tracking", train_size=40, heldout_size=8)
    task = StateTracking(config, tokenizer, 0)
    states = []
    for index in range(30):
        rollout = Rollout(task.prompt("train", index), 0, Completion((), (), "stop"), "")
        states.append(State(rollout, 0, 0, 0))
    judging = JudgingConfig(template="brief", max_new_tokens=64)
    context = TraceContext(tokenizer, tokenizer, judging, IccState(0.5), limit=64)
    assert task.teacher is not None
    texts = [tokenizer.decode(s.tokens) for s in exact_samples(states, task.teacher, context, (0.4, 0.9))]
    shown = [float(re.search(r"\np (\d\.\d\d)", text).group(1)) for text in texts]  # type: ignore[union-attr]
    assert all(0.4 <= p <= 0.9 for p in shown)
    assert len(set(shown)) > 10
    for text, p_bar, state in zip(texts, shown, states, strict=True):
        wanted = task.teacher.trace(state.rollout.prompt, "", p_bar, random.Random(0))[1]
        again = f"\np {p_bar:.2f}\n" if wanted else "\n"
        assert f"{again}<answer>{wanted}</answer>" in text
    for sample, whole in zip(
        exact_samples(states[:3], task.teacher, context, (0.4, 0.9), "reasoning"), texts, strict=False
    ):
        written = tokenizer.decode(sample.tokens[sample.start :], skip_special_tokens=True)
        assert written.startswith("step 0")
        assert "<answer>" not in written
        assert "\np 0." not in written
        assert f"{written}\n" in whole
    bare = exact_samples(states[:3], task.teacher, context, (0.4, 0.9), "score")
    for sample, whole in zip(bare, texts, strict=False):
        written = tokenizer.decode(sample.tokens[sample.start :], skip_special_tokens=True)
        assert re.fullmatch(r"<answer>\d+</answer>", written)
        assert written in whole
    for mode in ("off", "shuffled"):  # what it is not shown is not varied
        blind = replace(context, judging=judging.model_copy(update={"icc": mode}))
        for sample, state in zip(exact_samples(states, task.teacher, blind, (0.4, 0.9)), states, strict=True):
            wanted = task.teacher.trace(state.rollout.prompt, "", 0.5, random.Random(0))[1]
            text = tokenizer.decode(sample.tokens[sample.start :])
            assert f"<answer>{wanted}</answer>" in text
            assert "\np 0." not in text, "it says nothing of what it cannot know"
