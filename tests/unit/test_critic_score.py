"""Parser, Brier reward, soft score, leave-one-out baseline, and the fallback of parse failures."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import _chat_frame, build_prompt_ids, prompt_text
from genac_megatron.critic.score import (
    answer_candidates,
    fill_used,
    format_answer,
    leave_one_out,
    parse_score,
    reinforce_weights,
    reward,
    soft_score,
)
from genac_megatron.recipe.schema import JudgingConfig
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State
from genac_megatron.tasks.tokenizer import load_tokenizer

fractions = st.floats(0, 1)


# --- parse ---------------------------------------------------------------------------------------


@given(
    st.text(), st.integers(0, 10), st.text(" \n\t", max_size=4), st.text(alphabet="abc <>/0123456789answer\n")
)
def test_reads_the_last_answer(before: str, score: int, space: str, after: str) -> None:
    text = f"{before}<answer>{space}{score}{space}</answer>"
    assert parse_score(text) == score / 10
    assert parse_score(f"<answer>{(score + 1) % 11}</answer>{text}") == score / 10
    if "</answer>" not in after:
        assert parse_score(text + after) == score / 10


@given(st.integers().filter(lambda n: not 0 <= n <= 10))
def test_integers_out_of_range_fail(number: int) -> None:
    assert parse_score(f"<answer>3</answer> or rather <answer>{number}</answer>") is None


@pytest.mark.parametrize(
    "text",
    ["", "7", "<answer></answer>", "<answer>7.5</answer>", "<answer>7/10</answer>", "<answer>seven</answer>",
     "<answer>7", "7</answer>", "< answer>7</ answer>", "<ANSWER>7</ANSWER>", "<answer>٧</answer>",
     "<answer>1 0</answer>", "<answer>" + "9" * 5000 + "</answer>", "<answer>-1</answer>"],
)  # fmt: skip
def test_anything_else_fails(text: str) -> None:
    assert parse_score(text) is None


@given(st.text(alphabet="<>/answer 0123456789\n-+"))
def test_never_raises_and_stays_on_the_eleven_levels(text: str) -> None:
    assert parse_score(text) in (None, *(n / 10 for n in range(11)))


def test_a_sign_counts_in_the_last_answer_only() -> None:
    assert parse_score("<answer>-1</answer><answer>+3</answer>") == 0.3
    assert parse_score("<answer>3</answer><answer>-1</answer>") is None
    assert parse_score("<answer>-0</answer>") == 0.0
    assert parse_score("<answer>007</answer>") == 0.7


def test_format_is_what_parse_reads() -> None:
    assert [parse_score(format_answer(n)) for n in range(11)] == [n / 10 for n in range(11)]
    with pytest.raises(ValueError, match="0 to 10"):
        format_answer(11)


# --- reward --------------------------------------------------------------------------------------


def test_no_parse_earns_what_the_worst_number_earns() -> None:
    assert reward(None, 1.0) == reward(0.0, 1.0) == reward(None, 0.0) == reward(1.0, 0.0) == 0.0
    assert reward(1.0, 1.0) == 1.0
    assert reward(0.5, 0.0) == 0.75


@given(fractions)
def test_strictly_proper(chance: float) -> None:
    """The level nearest the true chance earns most: E R = 1 - p(1-p) - (p-v)^2."""
    expected = [chance * reward(n / 10, 1.0) + (1 - chance) * reward(n / 10, 0.0) for n in range(11)]
    formula = [1 - chance * (1 - chance) - (chance - n / 10) ** 2 for n in range(11)]
    assert expected == pytest.approx(formula, abs=1e-12)  # a handful of roundings of numbers below 1
    best = max(range(11), key=expected.__getitem__)
    assert abs(best / 10 - chance) <= 0.05 + 1e-9


# --- soft score ----------------------------------------------------------------------------------


@given(st.lists(st.floats(-40, 0), min_size=11, max_size=11), st.floats(-500, 500))
def test_soft_score_is_the_normalised_mean(logprobs: list[float], shift: float) -> None:
    weights = [math.exp(x) for x in logprobs]
    slow = sum(n / 10 * w for n, w in enumerate(weights)) / sum(weights)
    assert soft_score(logprobs) == pytest.approx(slow, rel=1e-9)
    # A shift by hundreds keeps about 13 digits of the differences.
    assert soft_score([x + shift for x in logprobs]) == pytest.approx(slow, rel=1e-9, abs=1e-9)


def test_soft_score_edges() -> None:
    sure = [-math.inf] * 11
    sure[10] = -3.0
    assert soft_score(sure) == 1.0
    for bad in ([0.0] * 10, [-math.inf] * 11, [math.nan] + [0.0] * 10, [0.0] * 10 + [math.nan]):
        with pytest.raises(ValueError):
            soft_score(bad)


@pytest.mark.parametrize(
    "text",
    ["so <answer>7</answer>", "<answer>3</answer> no\n<answer> 10 </answer>", "a<answer>\n0</answer>b"],
)
def test_candidates_go_on_where_the_integer_stands(text: str) -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    found = answer_candidates(tokenizer, ids)
    assert found is not None
    keep, candidates = found
    start = text.rindex("<answer>")
    for n, candidate in enumerate(candidates):
        continued = tokenizer.decode([*ids[:keep], *candidate])
        assert continued.startswith(text[:start])
        assert continued.endswith(f"{n}</answer>")
        assert continued.count("<answer>") == text.count("<answer>")
        assert parse_score(continued) == n / 10
    assert len(set(candidates)) == 11
    assert answer_candidates(tokenizer, tokenizer.encode("no answer", add_special_tokens=False)) is None


# --- leave one out -------------------------------------------------------------------------------


def slow_baselines(
    rewards: Sequence[float], outcomes: Sequence[float], keys: Sequence[object]
) -> list[float]:
    answer = []
    for i in range(len(rewards)):
        others = [
            rewards[j]
            for j in range(len(rewards))
            if round(outcomes[j] * 10) == round(outcomes[i] * 10) and keys[j] != keys[i]
        ]
        answer.append(sum(others) / len(others) if others else rewards[i])
    return answer


@given(st.lists(st.tuples(fractions, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 4)), max_size=20))
def test_leave_one_out_against_the_definition(entries: list[tuple[float, float, int]]) -> None:
    rewards, outcomes, keys = ([e[i] for e in entries] for i in range(3))
    # 1e-12: sums of at most 20 numbers below 1, in another order.
    assert leave_one_out(rewards, outcomes, keys) == pytest.approx(
        slow_baselines(rewards, outcomes, keys), abs=1e-12
    )
    alone = list(range(len(entries)))
    assert leave_one_out(rewards, outcomes) == pytest.approx(
        slow_baselines(rewards, outcomes, alone), abs=1e-12
    )


@given(st.lists(st.tuples(fractions, st.booleans()), min_size=2, max_size=12), fractions)
def test_a_baseline_never_sees_its_own_reward(entries: list[tuple[float, bool]], other: float) -> None:
    rewards, outcomes = [e[0] for e in entries], [float(e[1]) for e in entries]
    if outcomes.count(outcomes[0]) < 2:
        return
    before = leave_one_out(rewards, outcomes)[0]
    assert leave_one_out([other, *rewards[1:]], outcomes)[0] == pytest.approx(before, abs=1e-12)


def test_weights() -> None:
    # Key "p" is a prompt state judged on both outcomes; "a", "b" are right, "c" is alone among the wrong.
    rewards, outcomes, keys = [0.9, 0.2, 0.5, 0.7], [1.0, 0.0, 1.0, 1.0], ["p", "p", "a", "b"]
    weights = reinforce_weights(rewards, outcomes, keys)
    assert weights == pytest.approx({"p": ((0.9 - 0.6) + 0.0) / 2, "a": 0.5 - 0.8, "b": 0.7 - 0.7})
    assert reinforce_weights(rewards, outcomes, keys, "none") == pytest.approx(
        {"p": 0.55, "a": 0.5, "b": 0.7}
    )
    assert leave_one_out([0.4], [1.0]) == [0.4]  # alone: weight 0
    with pytest.raises(ValueError, match="equally long"):
        leave_one_out([0.4], [1.0, 0.0])


# --- fallback ------------------------------------------------------------------------------------


def judgements(values: Sequence[float | None], softs: Sequence[float | None] = ()) -> list[Judgement]:
    rollout = Rollout(Prompt("train/0", (), "", None), 0, Completion((), (), "stop"), "")
    filled = [*softs, *[None] * (len(values) - len(softs))]
    return [
        Judgement(State(rollout, k, k, k + 1), (), rollout.completion, "", value, soft)
        for k, (value, soft) in enumerate(zip(values, filled, strict=True))
    ]


@given(st.lists(st.none() | fractions, max_size=8), fractions)
def test_failures_use_the_previous_value_else_p_bar(values: list[float | None], p_bar: float) -> None:
    filled = judgements(values)
    used = fill_used(filled, p_bar)
    assert used == [j.used for j in filled]
    assert len(used) == len(values)
    for k, value in enumerate(values):
        known = [v for v in values[: k + 1] if v is not None]
        assert used[k] == (known[-1] if known else p_bar)
        assert filled[k].value == value  # the parse itself stays as it was


def test_soft_scores_are_used_where_asked_for() -> None:
    assert fill_used(judgements([0.3, 0.8, None], [0.33, None, None]), 0.5, "soft") == [0.33, 0.8, 0.8]
    assert fill_used(judgements([0.3], [0.33]), 0.5) == [0.3]


def merging(pieces: Sequence[str]) -> Tokenizer:
    """Single characters, from which the pieces merge."""
    alphabet = sorted({*string.printable, "▁"} - set(" "))
    vocab = {"</s>": 0, "<unk>": 1} | {c: n for n, c in enumerate(alphabet, 2)}
    merges = []
    for piece in pieces:
        for n in range(2, len(piece) + 1):
            if piece[:n] not in vocab:
                vocab[piece[:n]] = len(vocab)
                merges.append((piece[: n - 1], piece[n - 1]))
    return Tokenizer(BPE(vocab, merges, unk_token="<unk>"))


def spaced_tokenizer(path: Path, pieces: Sequence[str] = (), first: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space goes before every text (or before the first alone), and pieces merge."""
    inner = merging(pieces)
    if first:
        inner.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(path)
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}</s>[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    return load_tokenizer(str(path))


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("pieces", [(), ("7</answer>", "1", "10</"), (">7",), ("</answer>\n", "▁so")])
@pytest.mark.parametrize(
    "text",
    [
        "the score is <answer>7</answer>",
        "<answer>7</answer>",
        "so <answer> 10 </answer>\nx",
        "<answer>\n07</answer>.",
    ],
)
def test_candidates_are_the_ids_that_a_critic_wrote(
    tmp_path: Path, pieces: tuple[str, ...], text: str, first: bool
) -> None:
    tokenizer = spaced_tokenizer(tmp_path, pieces, first)
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    found = answer_candidates(tokenizer, ids)
    value = parse_score(text)
    assert found is not None
    assert value is not None
    keep, candidates = found
    given = candidates[round(value * 10)]
    plain = "<answer>7</answer>" in text
    assert not plain or ids[keep : keep + len(given)] == list(given)
    written = tokenizer.decode(ids, skip_special_tokens=True)
    for n, candidate in enumerate(candidates):
        continued = tokenizer.decode([*ids[:keep], *candidate])
        assert parse_score(continued) == n / 10
        assert written.startswith(tokenizer.decode(ids[:keep]))
        # What the tokenizer makes of the whole, as the critic would have written it.
        whole = tokenizer.encode(re.sub(r"[0-9]+\s*(?=</answer>)", str(n), text), add_special_tokens=False)
        assert whole[: keep + len(candidate)] == [*ids[:keep], *candidate] or not plain
    assert len(set(candidates)) == 11


def test_an_answer_spelt_otherwise_than_the_tokenizer_would_is_rated_as_written(tmp_path: Path) -> None:
    tokenizer = spaced_tokenizer(tmp_path, ("7</answer>",))
    spelt = tokenizer.convert_tokens_to_ids(["▁", *"<answer>7</answer>"])
    keep, candidates = answer_candidates(tokenizer, spelt) or (0, [])
    assert [*spelt[:keep], *candidates[7]] == spelt
    assert tokenizer.decode([*spelt[:keep], *candidates[3]]) == "<answer>3</answer>"


@pytest.mark.parametrize("first", [False, True])
def test_a_critics_prompt_has_no_space_where_its_parts_meet(tmp_path: Path, first: bool) -> None:
    tokenizer = spaced_tokenizer(tmp_path, (), first)
    judging, prompt = JudgingConfig(), Prompt("p", (), "2+2?", "4")
    icc = IccState(0.5)
    for partial in ("x = 4", "\nx", " x", ""):
        ids = build_prompt_ids(tokenizer, judging, icc, prompt, partial, 3, 9)
        content = "".join(prompt_text(judging, icc, prompt, partial, 3, 9, _chat_frame(tokenizer).tokens))
        assert tokenizer.decode(ids).endswith(f"[user]{content}")
        assert list(ids) == tokenizer.encode(f"</s>[user]{content}", add_special_tokens=False)
