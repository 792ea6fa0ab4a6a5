"""The pages of `genac watch` over fabricated runs: who gets in, what is shown, hostile text, search."""

from __future__ import annotations

import copy
import json
import random
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from fabricated_run import RECIPE, evaluation_rows, fabricate, metric_rows, part, write_lines
from werkzeug.test import Client, TestResponse

from genac_megatron.watch import app, follow
from genac_megatron.watch.app import App
from genac_megatron.watch.conversation import conversation, values_of
from genac_megatron.watch.find import Query, search
from genac_megatron.watch.follow import Followed, Watched

SECRET = "the-secret"
OUR_TAGS = {
    "html", "head", "meta", "title", "link", "script", "body", "nav", "main", "div", "span", "p", "a",
    "h1", "h2", "h3", "section", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "pre", "code",
    "details", "summary", "form", "label", "select", "option", "input", "button", "fieldset", "legend",
    "progress", "dl", "dt", "dd", "b", "br", "figure", "figcaption", "picture", "source", "img",
}  # fmt: skip
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\" ' onmouseover='alert(3) &lt;b&gt; </style>"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LOOK_S", 0.0)
    monkeypatch.setattr(follow, "SCAN_S", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    fabricate(root / "one")
    fabricate(root / "two", seed=3)
    part(root / "half", steps=40, evaluations=4, rollouts=2)
    return root


def client_of(*paths: Path, admitted: bool = True) -> Client:
    client = Client(App(Watched(paths), SECRET))
    if admitted:
        assert client.get(f"/?key={SECRET}").status_code == 302
    return client


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, response: TestResponse) -> None:
        super().__init__()
        assert response.status_code == 200, response.text
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words = ""
        self.feed(response.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


# --- who gets in ---------------------------------------------------------------------------------


def test_a_visitor_needs_the_key_once(folder: Path) -> None:
    client = client_of(folder, admitted=False)
    for path in ("/", "/run/one", "/page.js", f"/?key={SECRET[:-1]}", "/?key=ü"):
        assert client.get(path).status_code == 403
    first = client.get(f"/compare?key={SECRET}")
    assert first.status_code == 302
    assert first.headers["Location"] == "/compare"
    assert {"HttpOnly", "SameSite=Lax"} <= set(first.headers["Set-Cookie"].split("; "))
    assert client.get("/run/one").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/run/..%2f..%2fetc%2fpasswd", "/run/../../etc/passwd", "/run/nobody", "/run/%00", "/etc/passwd",
        "/run/one/plot/..%2f..%2frecipe.yaml", "/run/one/plot/..%2fx-light.png", "/page.css/..%2fapp.py",
        "/run/one/plot/accuracy-pink.png", "/run/one/plot/nothing-light.png", "/run/one/rollouts/99",
        "/run/one/rollouts/-1", "/run/one/recipe.yaml", "/compare/nothing-light.png",
    ],
)  # fmt: skip
def test_nothing_but_the_pages_is_there(folder: Path, path: str) -> None:
    assert client_of(folder).get(path).status_code == 404


def test_nothing_can_be_changed_and_no_text_could_run(folder: Path) -> None:
    client = client_of(folder)
    assert client.post("/run/one").status_code == 405
    answer = client.get("/run/one")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_script_makes_no_html_of_strings() -> None:
    script = resources.files("genac_megatron.watch").joinpath("page.js").read_text()
    banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|setTimeout\(['\"]"
    assert re.search(banned, script) is None


# --- hostile text --------------------------------------------------------------------------------


def hostile(path: Path) -> Path:
    """A run in which everything that others write tries to be HTML."""
    fabricate(path)
    recipe = {**RECIPE, "name": HOSTILE, "stages": [{"kind": "ppo", "name": HOSTILE, "steps": 3}]}
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    step = {"stage": HOSTILE, "kind": "ppo", "step": 1, "time": 1.0, f"judge/{HOSTILE}": 0.5}
    write_lines(path / "metrics.jsonl", [step, {**step, "step": 2, "time": 2.0}])
    start = {"event": "start", "time": 1.0, "version": HOSTILE, "command": HOSTILE, "host": HOSTILE,
             "words": ["run", HOSTILE], "recipe": HOSTILE, "before": HOSTILE,
             "files": {HOSTILE: HOSTILE}}  # fmt: skip
    write_lines(path / "history.jsonl", [start, {"event": "end", "time": 2.0, "code": 1, "told": HOSTILE}])
    state = {"cut": 0, "cut_text": 0, "text": HOSTILE, "value": None, "used": 0.5, "prompt": [3, HOSTILE]}
    row = {
        "stage": HOSTILE, "step": 1, "of": HOSTILE, "prompt": HOSTILE, "problem": HOSTILE, "outcome": 0.0,
        "messages": [{"role": HOSTILE, "content": HOSTILE}, {"role": "user", "content": [{"text": HOSTILE}]}],
        "response": HOSTILE, "states": [state, {**state, "unasked": HOSTILE}], "judge_prompt": HOSTILE,
        "reference": HOSTILE, "parts": {HOSTILE: 1.0}, "version": HOSTILE, "length": HOSTILE,
        "tokens": {"ends": [5, len(HOSTILE)], "advantages": [0.1, -0.2], "logprobs": [-1.0, HOSTILE]},
    }  # fmt: skip
    write_lines(path / "rollouts.jsonl", [row, {**row, "tokens": None}])
    return path


def test_what_others_wrote_is_shown_and_never_run(tmp_path: Path) -> None:
    client = client_of(hostile(tmp_path / "bad <i>run"), fabricate(tmp_path / "one"))
    for path in (
        "/",
        "/run/bad <i>run",
        "/run/bad <i>run/rollouts",
        "/run/bad <i>run/rollouts/0",
        "/compare",
    ):
        page = Page(client.get(path))
        assert [script["src"] for script in page.all("script")] == ["/page.js"], path
        assert all(image["src"].startswith(("/run/", "/compare/")) for image in page.all("img")), path
        assert {tag for tag, _ in page.tags} <= OUR_TAGS, path
        names = {name for _, attributes in page.tags for name in attributes}
        assert not [name for name in names if name.startswith("on") or name == "style"], path
        hrefs = [link["href"] for link in page.all("a")]
        assert all(href.startswith(("/", "#")) for href in hrefs), path
    talk = Page(client.get("/run/bad <i>run/rollouts/0"))
    assert talk.words.count("<script>alert(1)</script>") >= 6  # as text: prompt, answer, judgement and more


# --- what is shown -------------------------------------------------------------------------------


def test_runs_stand_beside_each_other(folder: Path) -> None:
    page = Page(client_of(folder).get("/"))
    assert [a["href"] for a in page.all("a") if a["href"].startswith("/run/")] == [
        "/run/half", "/run/one", "/run/two"
    ]  # fmt: skip
    assert "16 of 20" in page.words
    assert "held-out accuracy" in page.words
    alone = client_of(folder / "one").get("/")
    assert alone.headers["Location"] == "/run/one"


def test_a_run_has_the_reports_figures_and_plots(folder: Path) -> None:
    client = client_of(folder)
    page = Page(client.get("/run/one"))
    for words in ("Critic Brier after ppo", "Where the time went", "The resolved recipe", "objects: 4"):
        assert words in page.words
    images = [image["src"] for image in page.all("img")]
    assert len(images) == 14
    first = client.get(images[0])
    assert first.mimetype == "image/png"
    assert first.data.startswith(b"\x89PNG")
    assert client.get(images[0]).data == first.data
    assert client.get("/run/half/plot/position-dark.png").status_code in (200, 404)


def test_a_run_has_what_the_report_says_of_bands_and_suites(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    recipe = copy.deepcopy(RECIPE)
    recipe["stages"][-1]["expect"] = [{"figure": "actor/entropy", "low": 5.0, "helps": "lower it"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_lines(run / "metrics.jsonl", [{**row, "actor/lr": 1e-4} for row in metric_rows(random.Random(0))])
    asked = {"average": 0.25, "samples": 1, "outcomes": {"q1": [0.0], "q2": [1.0], "q3": [0.0], "q4": [0.0]}}
    write_lines(
        run / "evaluations.jsonl", [{**row, "suites": {"maths": asked}} for row in evaluation_rows(0)]
    )
    words = Page(client_of(run).get("/run/run")).words
    assert "What usually helps: lower it." in words
    assert "suite/maths_low" in words  # of the summary that is folded away


def test_a_comparison_says_how_many_runs_it_leaves_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_RUNS", 2)
    monkeypatch.setattr(app, "ALL_PLOTS", [])
    client = client_of(folder)
    assert "2 of 3 runs are compared; choose above." in Page(client.get("/compare")).words
    assert "runs are compared" not in Page(client.get("/compare?run=one&run=two&run=one")).words


def test_a_part_is_what_the_page_has_of_it(folder: Path) -> None:
    client = client_of(folder)
    for name in ("live", "figures"):
        (div,) = [d for d in Page(client.get(f"/run/one?part={name}")).all("div") if d.get("id") == name]
        assert div in Page(client.get("/run/one")).all("div")


def test_a_run_that_cannot_be_read_is_told_and_hides_no_other(tmp_path: Path) -> None:
    bad = fabricate(tmp_path / "bad")
    (bad / "recipe.yaml").write_text("a: [\n")
    client = client_of(bad, fabricate(tmp_path / "good"))
    page = Page(client.get("/"))
    assert "cannot be read" in page.words
    assert "held-out accuracy" in page.words
    answer = client.get("/run/bad")
    assert answer.status_code == 500
    assert "recipe.yaml" in answer.text
    assert "recipe.yaml" in client.get("/compare").text


# --- conversations -------------------------------------------------------------------------------

ROW: dict[str, Any] = {
    "stage": "ppo", "step": 3, "of": "training", "version": 4, "prompt": "train/7", "problem": "1 + 1",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1"}],
    "response": "It is 2.", "outcome": 1.0, "truncated": False, "length": 3, "reference": "2",
    "judge_prompt": "judge 1 + 1: It is", "states": [
        {"cut": 0, "cut_text": 0, "text": "easy", "value": 0.4, "used": 0.4, "prompt": [13, ""]},
        {"cut": 2, "cut_text": 5, "text": "nearly", "value": None, "used": 0.9, "prompt": [18, ""]},
    ],
    "tokens": {"ends": [2, 5, 8], "logprobs": [-0.1, -2.0, -0.5], "advantages": [0.6, 0.6, -0.1]},
}  # fmt: skip


def test_a_conversation_has_turns_tokens_values_and_the_critics_words() -> None:
    html = conversation(ROW, 12, "/somewhere")
    figures = json.loads(re.search(r'data-figures="([^"]*)"', html)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert figures["advantages"] == [0.6, 0.6, -0.1]
    assert figures["values"] == [0.4, 0.4, 0.9]
    assert re.findall(r"class='t[^']*' data-i=(\d)>([^<]*)<", html) == [
        ("0", "It"),
        ("1", " is"),
        ("2", " 2."),
    ]
    assert "class='t a5 vm1' data-i=0" in html  # the largest advantage; a value a little below a half
    assert html.index("easy") < html.index("nearly")
    assert "judge 1 + 1: </pre>" in html
    assert "judge 1 + 1: It is</pre>" in html
    assert html.index("? (0.90)") < html.index(" 2.</span>")
    for words in ("Be brief.", "right", "actor v4", "expected: 2", "#r12s1", "/somewhere"):
        assert words in html


def test_rows_of_earlier_versions_and_odd_ones_are_shown() -> None:
    old = {key: ROW[key] for key in ("stage", "step", "prompt", "problem", "response", "outcome")}
    old["states"] = [{"cut_text": 0, "text": "easy", "value": 0.4, "used": 0.4}]
    html = conversation(old, 0)
    assert "It is 2." in html
    assert "1 + 1" in html
    for odd in (
        {},
        {"states": [None, 3], "tokens": {"ends": []}, "messages": ["x"]},
        {"tokens": {"ends": [99]}},
    ):
        assert "<section" in conversation(dict(odd), 0)
    longer = conversation({**ROW, "response": "It is 2. And more."}, 0)
    assert "And more.</span>" in longer  # beyond the tokens that have figures
    assert values_of([{"cut_text": 3, "used": None}, {"cut_text": 0, "used": 0.5}], [0, 3]) == [0.5, None]


def test_what_others_said_in_a_conversation_has_no_figures() -> None:
    """Two turns of the actor, of a token each, and an answer between them."""
    text = "<actor>\nA\n<environment>\nno\n<actor>\nB\n"
    begins = [text.index("A\n"), text.index("B\n")]
    tokens = {"begins": begins, "ends": [at + 1 for at in begins], "advantages": [0.2, -0.4]}
    states = [{"cut": 0, "cut_text": 0, "value": 0.1, "used": 0.1},
              {"cut": 3, "cut_text": begins[1], "value": 0.9, "used": 0.9}]  # fmt: skip
    html = conversation(
        {**ROW, "response": text, "tokens": tokens, "states": states, "turns": 2, "ended": "won"}, 0
    )
    assert re.findall(r"class='t[^']*' data-i=(\d)>([^<]*)<", html) == [("0", "A"), ("1", "B")]
    assert (
        '<span class=soft>\n&lt;environment&gt;\nno\n&lt;actor&gt;\n</span><a class=chip href="#r0s1">0.9'
        in html
    )
    assert "2 turns · ended: won" in html


def test_rollouts_are_found_by_outcome_text_and_what_the_critic_made_of_them(tmp_path: Path) -> None:
    rows = [
        {**ROW, "step": 1},
        {**ROW, "step": 2, "outcome": 0.0, "response": "Ünsure", "truncated": True},
        {**ROW, "step": 3, "of": "heldout", "stage": "sft", "outcome": 0.5},
        {**ROW, "step": 4, "states": [{**ROW["states"][0], "value": 0.1, "text": "hopeless"}]},
    ]
    folder = fabricate(tmp_path / "run")
    write_lines(folder / "rollouts.jsonl", rows)
    run = Followed("run", folder)

    def steps(**words: str) -> list[int]:
        return [row["step"] for _, row in search(run, Query.read(words))]

    assert steps() == [4, 3, 2, 1]
    assert steps(outcome="right") == [4, 1]
    assert steps(outcome="wrong") == [2]
    assert steps(outcome="partly") == [3]
    assert steps(outcome="cut") == [2]
    assert steps(of="heldout") == [3]
    assert steps(stage="sft") == [3]
    assert steps(text="üNSURE") == [2]
    assert steps(text="hopeless") == [4]  # the critic's words
    assert steps(text="be brief", outcome="right") == [4, 1]
    assert steps(critic="unread") == [3, 2, 1]
    assert steps(critic="off") == [4, 1]
    assert steps(outcome="' or 1=1") == [4, 3, 2, 1]
    page = Page(client_of(folder).get("/run/run/rollouts?outcome=right"))
    assert len([d for d in page.all("section") if d.get("class") == "card talk"]) == 2


def test_many_rollouts_come_page_by_page(tmp_path: Path) -> None:
    folder = fabricate(tmp_path / "run")
    write_lines(folder / "rollouts.jsonl", [{**ROW, "step": n} for n in range(14)])
    client, seen = client_of(folder), list[str]()
    address: str | None = "/run/run/rollouts?outcome=right"
    while address is not None:
        page = Page(client.get(address))
        seen += re.findall(r"ppo, step (\d+)", page.words)
        address = next((a["href"] for a in page.all("a") if a.get("rel") == "next"), None)
    assert seen == [str(n) for n in range(13, -1, -1)]
