"""A critic after training: whose answer is taken of several, and values of transcripts. Invented critics."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_chat import FakeChat, question, reply

import genac_megatron as genac
from genac_megatron.cli import main
from genac_megatron.critic.icc import IccState
from genac_megatron.errors import InputError
from genac_megatron.evaluation.score import (
    mean_values,
    need_values,
    prefixes,
    score_by_server,
    scored,
    state_rows,
)
from genac_megatron.evaluation.transcripts import ScoreOptions, read_transcripts
from genac_megatron.evaluation.votes import (
    Ballot,
    answer_of,
    best,
    figures,
    majority,
    vote_table,
    votes_parts,
    votes_plan,
    weighted,
)
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import TeacherConfig
from genac_megatron.recipe.tasks import JsonlTask
from genac_megatron.tasks import make_task
from genac_megatron.tasks.tokenizer import load_tokenizer
from tests.e2e.test_gates import SMALL

TINY = load_tokenizer("builtin:tiny")


def test_each_rule_takes_what_it_says() -> None:
    ballots = [Ballot(0, "5", 0.2), Ballot(0, "5", 0.3), Ballot(1, "7", 0.9), Ballot(0, None, 0.95)]
    assert majority(ballots) == 0
    assert weighted(ballots) == 1  # .9 against .5
    assert best(ballots) == 0  # by value alone: the one without an answer
    assert best(ballots[:3]) == 1
    assert majority(ballots[1:3]) == 0.5  # a tie
    assert weighted([Ballot(1, "a", 0.0), Ballot(0, "b", 0.0)]) == 0.5
    assert majority([Ballot(0, None, 1.0)]) == 0
    assert best([Ballot(1, "a", 0.5), Ballot(0, "b", 0.5)]) == 0.5


def problems(says: Callable[[float, random.Random], float]) -> list[list[Ballot]]:
    """Each problem's right answer comes with a chance of its own, wrong ones are of a few kinds."""
    rng = random.Random(1)
    found = []
    for _ in range(400):
        rate = rng.random()
        outcomes = [float(rng.random() < rate) for _ in range(8)]
        found.append(
            [Ballot(o, "r" if o else rng.choice("abc"), says(o, rng)) for o in outcomes]
        )  # fmt: skip
    return found


def test_a_critic_that_knows_helps_and_one_that_does_not_leaves_the_majority() -> None:
    known = figures(problems(lambda o, rng: 0.7 * o + 0.3 * rng.random()), 8, 200)
    blind = figures(problems(lambda o, rng: 0.9), 8, 200)
    value = {name: figure["value"] for name, figure in known.items()}
    assert set(value) == {f"{rule}@{j}" for rule in ("best", "maj", "weighted") for j in (1, 2, 4, 8)}
    assert abs(value["best@1"] - 0.5) < 0.05
    assert value["best@1"] == value["maj@1"] == value["weighted@1"]
    assert value["best@8"] > value["maj@8"] + 0.1
    assert value["weighted@8"] > value["maj@8"] + 0.1
    assert blind["weighted@8"]["value"] == pytest.approx(blind["maj@8"]["value"])
    assert abs(blind["best@8"]["value"] - 0.5) < 0.05
    assert known["best@8"]["low"] < value["best@8"] < known["best@8"]["high"]


def test_answers_are_read_as_the_task_reads_them(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("".join(f'{{"question": "q{n}", "answer": "{n}"}}\n' for n in range(4)))
    config = JsonlTask(kind="jsonl", path=str(tmp_path / "q.jsonl"), verifier="math", heldout_size=1)
    task = make_task(config, TINY, 0)
    prompt = task.prompt("heldout", 0)
    try:
        assert answer_of(task, prompt, "<think>\\boxed{1}</think> so \\boxed{ 12 }", True) == "12"
        assert answer_of(task, prompt, "no idea", True) is None
        assert answer_of(task, prompt, "Answer: 3", False) is None  # cut off
    finally:
        task.close()


def test_transcripts_are_read_in_their_forms_and_bad_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows = [
        {"problem": "p", "response": "r", "id": 7, "meta": "\U0001f600"},  # written as a pair that is whole
        {"question": "q", "response": ""},
        {"messages": chat},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_transcripts(path)
    assert [(row["problem"], row["response"]) for row in found] == [("p", "r"), ("q", ""), ("2+2?", "4")]
    assert (found[0]["id"], found[0]["meta"]) == (7, "\U0001f600")
    for bad, said in (
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"problem": "p"}', "it has no problem and response"),
        (json.dumps({"messages": chat[:1]}), "it has no problem and response"),
        ('{"problem": "p", "response": "r", "p_bar": 1.5}', r"p_bar is 1\.5"),
        ('{"problem": "p", "response": "r", "tokens": true}', "tokens is True"),
        ('{"problem": "p", "response": "r", "step": Infinity}', "step is inf"),
        ('{"problem": "p", "response": "r", "limit": 1e400}', "limit is inf"),
        (r'{"problem": "p", "response": "\ud83d"}', "its response is no Unicode text"),
        (r'{"problem": "p", "response": "r", "actor": "a\ud83d"}', "its actor is .* pair at character 1"),
        (r'{"problem": "p", "response": "r", "meta": [{"a": "\ud83d"}]}', "its meta is no Unicode text"),
        (r'{"problem": "p", "response": "r", "\ud83d": 1}', r"its \\ud83d is no Unicode text"),
    ):
        path.write_text(f"\n{bad}\n")
        with pytest.raises(InputError, match=rf"t\.jsonl:2: {said}"):
            read_transcripts(path)
    nulls = {"problem": None, "question": "q", "response": "r", "id": None, "p_bar": None, "step": None}
    path.write_text(
        json.dumps(nulls | {"tokens": None, "limit": None, "actor": None, "success": None}) + "\n"
    )
    assert read_transcripts(path) == [{"problem": "q", "question": "q", "response": "r", "id": None}]
    path.write_text("\n")
    with pytest.raises(InputError, match="no transcript"):
        read_transcripts(path)
    (tmp_path / "r.yaml").write_text(json.dumps(SMALL))
    with pytest.raises(InputError, match="its meta is no Unicode text"):
        genac.score([{"problem": "p", "response": "r", "meta": "\ud83d"}], tmp_path / "r.yaml", p_bar=0.5)


def test_prefixes_and_what_is_told_of_them(tmp_path: Path) -> None:
    assert prefixes("a\nb\nc", 8) == ["", "a\n", "a\nb\n", "a\nb\nc"]
    assert prefixes("a", 2) == ["", "a"]
    assert len(prefixes("x\n" * 40, 5)) == 5
    options = ScoreOptions(tmp_path, tmp_path, limit=9, lines=True)
    rows = [{"problem": "p", "response": "a\nb", "p_bar": 0.25, "actor": "other", "tokens": 77}]
    asked, owners = state_rows(rows, options, IccState(0.5, 3, actor="actor"), TINY, 8)
    assert [(row["partial"], row["actor"], row["p_bar"], row["step"]) for row in asked] == [
        ("", "other", 0.25, 3), ("a\n", "other", 0.25, 3), ("a\nb", "other", 0.25, 3)
    ]  # fmt: skip
    assert [(row["used"], row["limit"]) for row in asked] == [(0, 9), (2, 9), (77, 77)]
    assert owners == [0, 0, 0]
    values = mean_values([{"state": 0, "value": 0.5}, {"state": 2, "value": 0.2}, {"state": 2, "value": None},
                          {"state": 2, "value": 0.4}])  # fmt: skip
    [row] = scored(rows, asked, owners, values)
    assert row["value"] == pytest.approx(0.3)
    assert [one["value"] for one in row["values"]] == [0.5, None, pytest.approx(0.3)]


def test_a_critic_behind_a_server_values_transcripts_and_goes_on(
    fake_chat: Callable[..., FakeChat], tmp_path: Path
) -> None:
    def judge(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, reply("<answer>8</answer>" if "good" in question(body) else "hm <answer>1</answer>")

    server = fake_chat(judge)
    (tmp_path / "r.yaml").write_text(json.dumps(SMALL))
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    source, out = tmp_path / "t.jsonl", tmp_path / "s.jsonl"
    rows = [{"problem": "p", "response": text} for text in ("good", "bad", "good too")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ScoreOptions(source, out, p_bar=0.5, judgements=2)
    teacher = TeacherConfig(kind="endpoint", url=server.url, model="critic")
    for _ in range(2):  # the second time nothing is asked
        score_by_server(recipe, options, teacher)
        assert [json.loads(line)["value"] for line in out.read_text().splitlines()] == [0.8, 0.1, 0.8]
        assert len(server.bodies) == 6
    assert question(server.bodies[0]).startswith("judge actor step 0")  # the recipe's template, brief
    with pytest.raises(InputError, match="success rate, and nothing here says it"):
        score_by_server(recipe, ScoreOptions(source, out), teacher)


def test_the_command_line_scores_by_the_librarys_call(
    fake_chat: Callable[..., FakeChat], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake_chat(lambda body: (200, reply("<answer>8</answer>" if "good" in question(body) else "hm")))
    recipe, source, out = tmp_path / "r.yaml", tmp_path / "t.jsonl", tmp_path / "s.jsonl"
    recipe.write_text(json.dumps(SMALL))
    rows = [{"problem": "p", "response": "good", "mine": 7}, {"problem": "p", "response": "bad"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_url = ["--url", server.url, "--model", "critic", "--p-bar", "0.5"]
    assert main(["score", str(source), str(recipe), "--out", str(out), *by_url]) == 0
    assert capsys.readouterr().out == f"{out}: 1 of 2 transcripts have a value, mean value 0.800\n"
    found = genac.score(rows, recipe, url=server.url, model="critic", p_bar=0.5, quiet=True)
    assert capsys.readouterr().out == ""
    assert found.to_json(orient="records", lines=True) == pd.read_json(out, lines=True).to_json(
        orient="records", lines=True
    )
    assert list(found["mine"].dropna()) == [7]
    source.write_text(json.dumps(rows[1]))
    assert main(["score", str(source), str(recipe), "--out", str(tmp_path / "none.jsonl"), *by_url]) == 2
    assert "no judgement parses: it is no critic" in capsys.readouterr().err


def test_what_a_server_refused_is_told_and_asked_again(
    fake_chat: Callable[..., FakeChat], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = {"good", "bad"}  # what it has no room for

    def judge(body: dict[str, Any]) -> tuple[int, Any]:
        refused = any(text in question(body) for text in short)
        return (400, "context too long") if refused else (200, reply("<answer>8</answer>"))

    server = fake_chat(judge)
    recipe, out = tmp_path / "r.yaml", tmp_path / "s.jsonl"
    recipe.write_text(json.dumps(SMALL))

    def scored_by(*texts: str) -> tuple[int, str]:
        source = tmp_path / "t.jsonl"
        source.write_text("".join(json.dumps({"problem": "p", "response": t}) + "\n" for t in texts))
        words = ["--out", str(out), "--url", server.url, "--model", "critic", "--p-bar", "0.5"]
        code = main(["score", str(source), str(recipe), *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = scored_by("good", "bad")
    assert code == 2
    assert "refused each of 2 requests" in said
    short.remove("good")
    code, said = scored_by("good", "bad")
    assert code == 0
    assert "1 of 2 transcripts have a value, mean value 0.800; of the judgements 1 of 2 refused" in said
    assert "context too long" in said
    short.clear()
    code, said = scored_by("good", "bad")
    assert (code, len(server.bodies)) == (0, 5)
    assert said == f"{out}: 2 of 2 transcripts have a value, mean value 0.800\n"
    out = tmp_path / "one.jsonl"
    short.add("good")
    code, said = scored_by("good")
    assert code == 2
    assert "no judgement has a value: 1 of 1 refused, the last: status 400" in said
    short.clear()
    assert scored_by("good")[0] == 0


def test_a_template_that_was_edited_is_another_judging(
    fake_chat: Callable[..., FakeChat], tmp_path: Path
) -> None:
    server = fake_chat(lambda body: (200, reply("<answer>8</answer>")))
    template = tmp_path / "t.txt"
    template.write_text("Judge {actor} {p_bar} {problem} {partial} {used} {limit}")
    (tmp_path / "r.yaml").write_text(
        json.dumps({**SMALL, "judging": {**SMALL["judging"], "template": "./t.txt"}})
    )
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    (tmp_path / "t.jsonl").write_text(json.dumps({"problem": "p", "response": "good"}))
    options = ScoreOptions(tmp_path / "t.jsonl", tmp_path / "s.jsonl", p_bar=0.5)
    teacher = TeacherConfig(kind="endpoint", url=server.url, model="critic")
    score_by_server(recipe, options, teacher)
    template.write_text("Judge {actor} {p_bar} {problem} {partial} {used} {limit} well")
    with pytest.raises(InputError, match=r"another template(.|\n)*or name another file by --out"):
        score_by_server(recipe, options, teacher)


def test_votes_of_another_judging_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(SMALL))
    folder = tmp_path / "bench" / "values"

    def begin(told: IccState, *overrides: str) -> None:
        plan = votes_plan(load_recipe(str(tmp_path / "r.yaml"), overrides), {}, {"weights": "w"}, told)
        parts = votes_parts(folder.parent)
        try:
            parts.begin(plan)
        finally:
            parts.release()

    told = IccState(0.5, 3, actor="actor")
    for _ in range(2):
        begin(told, "judging.states.max_states=5")  # of no matter: a sample is judged as it ended
    where = rf"\(judging: {{\"temperature\": 1.0}} there(.|\n)*or remove {folder}: the samples stay"
    with pytest.raises(InputError, match=rf"another judging {where}"):
        begin(told, "judging.temperature=0.5")
    for other, words in ((told, ("seed=9",)), (IccState(0.5, 4, actor="actor"), ())):
        with pytest.raises(InputError, match=r"another (seed|step)"):
            begin(other, *words)


def test_a_critic_that_cannot_be_read_is_told_of_beside_its_votes() -> None:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    report = {"k": 2, "best@2": figure, "maj@2": figure, "weighted@2": figure}
    shown = vote_table({"good": {**report, "parsed": 0.75}})
    assert "| parsed |" in shown
    assert "0.750 |" in shown
    assert "no judgement" not in shown
    shown = vote_table(
        {
            "good": {**report, "parsed": 0.75, "refused": "1 of 4 refused, the last: no room"},
            "bad": {**report, "parsed": 0.0},
        }
    )
    assert "good: of the judgements 1 of 4 refused, the last: no room" in shown
    assert "bad: no judgement parses, so best@k and weighted@k are no critic's" in shown


def test_judgements_without_room_are_not_called_another_models() -> None:
    answers = [{"value": None, "refused": "no room: 900 tokens in 512 positions"}]
    with pytest.raises(InputError, match=r"no room: 900 tokens(.|\n)*a lower judging\.max_new_tokens"):
        need_values(answers, "roles.critic")


def test_the_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(SMALL))
    given = [
        "score",
        "no.jsonl",
        str(tmp_path / "r.yaml"),
        "--out",
        str(tmp_path / "s.jsonl"),
        "--p-bar",
        "2",
    ]
    assert main(given) == 2
    assert "2.0 is no success rate" in capsys.readouterr().err
