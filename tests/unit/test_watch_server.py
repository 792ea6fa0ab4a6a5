"""`genac watch` as a process, and its pages in a real browser, where this machine has one."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fabricated_run import evaluation_rows, fabricate, metric_rows, part, write_lines
from test_watch_pages import ROW, hostile

from genac_megatron.watch import app, follow
from genac_megatron.watch.server import PORT, begin, listen
from tests.browser import LIMIT_S, Browser, Page, found
from tests.warm import ROOT, environment

WIDTHS = (390, 1400)


def test_the_command_serves_says_where_and_ends_by_ctrl_c(tmp_path: Path) -> None:
    """The key is in the printed address alone; without --port a port in use is passed over."""
    fabricate(tmp_path / "one")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = taken.getsockname()[1]
        words = [sys.executable, "-m", "genac_megatron", "watch", str(tmp_path / "one")]
        process = subprocess.Popen(
            [*words, "--port", "0"], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Started in a shell's background, we ignore SIGINT, and so would it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        refused = subprocess.run(
            [*words, "--port", str(busy)], cwd=ROOT, env=environment(), text=True, capture_output=True,
            check=False,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        said = "".join(process.stdout.readline() for _ in range(5))
        address = re.search(r"here: +(http://127\.0\.0\.1:(\d+)/\?key=\S+)", said)
        assert address is not None, said
        assert re.search(rf"ssh -N -L {address[2]}:127\.0\.0\.1:{address[2]} \S+@\S+", said)
        with httpx.Client(follow_redirects=True, timeout=LIMIT_S) as client:
            page = client.get(address[1])
            assert page.status_code == 200
            assert str(page.url).endswith("/run/one")
            assert (
                client.get(f"http://127.0.0.1:{address[2]}/run/one/plot/accuracy-light.png").content[1:4]
                == b"PNG"
            )
        assert httpx.get(f"http://127.0.0.1:{address[2]}/run/one").status_code == 403
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=LIMIT_S)[0]
    finally:
        process.kill()  # nothing, where it has ended
        process.wait()
    assert process.returncode == 0, rest
    assert "key=" not in rest, "requests are not logged"
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"genac: error: --port: cannot listen at 127.0.0.1:{busy}")
    assert refused.stderr.count("\n") <= 2


def test_a_port_in_use_is_passed_over_where_none_is_asked_for() -> None:
    with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
        numbers = [one.getsockname()[1] for one in (first, second)]
    assert PORT <= numbers[0] < numbers[1]


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = found()
    if program is None:
        pytest.skip("no Chromium on this machine")
    with Browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Give it paths; it holds the address."""
    monkeypatch.setattr(follow, "LOOK_S", 0.0)
    ends = []

    class Served(list[str]):
        def __call__(self, *paths: Path) -> str:
            server, told = begin(paths, "127.0.0.1", 0)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            ends.append(server)
            address = re.search(r"here: +(\S+)/\?(key=\S+)", told)
            assert address is not None
            self.append(address[2])
            return address[1]

    yield Served()
    for server in ends:
        server.shutdown()
        server.server_close()


def opened(browser: Browser, base: str, key: str, path: str, width: int) -> Page:
    page = browser.page(width)
    page.ask("Page.addScriptToEvaluateOnNewDocument", source="window.alert = () => { window.ran = true }")
    page.open(f"{base}{path}?{key}")
    return page


def followed(condition: str) -> str:
    """Whether it holds once the page has asked anew, which it need not wait for."""
    return f"(last = 0, follow().then(() => {condition}))"


def test_a_running_run_is_followed_on_the_page(  # type: ignore[no-untyped-def]
    browser: Browser, serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "REDRAW_S", 0.0)
    monkeypatch.setattr(app, "TIMES", 0.0)
    folder = part(tmp_path / "run", steps=30, evaluations=0, rollouts=0)
    base = serve(folder)
    page = opened(browser, base, serve[-1], "/run/run", 1400)
    assert "6 of 20" in page.value("document.getElementById('live').innerText")
    page.until("getComputedStyle(document.getElementById('plot-accuracy')).display === 'none'")  # no data yet
    page.value("document.querySelector('summary').click(); window.kept = document.querySelector('details')")
    write_lines(folder / "metrics.jsonl", metric_rows(random.Random(0))[:36])
    write_lines(folder / "evaluations.jsonl", evaluation_rows(0)[:4])
    page.until("document.getElementById('live').innerText.includes('12 of 20')")  # by its own clock
    page.until(followed("getComputedStyle(document.getElementById('plot-accuracy')).display !== 'none'"))
    page.until("document.querySelector('#plot-accuracy img').naturalWidth > 100")
    end = {"event": "end", "time": 2.0, "code": 1, "told": "it broke"}
    start = {"event": "start", "time": 1.0, "words": ["run", "r.yaml"], "recipe": "r.yaml", "before": "genac"}
    write_lines(folder / "history.jsonl", [start, end])
    page.until(followed("document.getElementById('figures').innerText.includes('it broke')"))
    (folder / "history.jsonl").write_text("")  # and once more the part has other children
    page.until(followed("!document.getElementById('figures').innerText.includes('it broke')"))
    assert page.value("window.kept.isConnected && window.kept.open"), "what is open stays open"
    assert page.faults() == []


def test_tokens_chips_and_hostile_text_in_a_browser(browser: Browser, serve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = hostile(tmp_path / "run")
    with (folder / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(ROW) + "\n")
    base = serve(folder)
    page = opened(browser, base, serve[-1], "/run/run/rollouts", 390)
    assert page.value("document.querySelectorAll('.talk').length") == 3
    box = page.value(
        "(b => ({x: b.x + 3, y: b.y + 3}))(document.querySelector('.t').getBoundingClientRect())"
    )
    page.ask("Input.dispatchMouseEvent", type="mouseMoved", **box)
    page.until("!document.getElementById('tip').hidden")
    told = page.value("document.getElementById('tip').textContent")
    assert told == 'token 1: "It"\nadvantage 0.6\nvalue 0.4\nlog-prob -0.1'
    page.value("document.querySelectorAll('.tint input')[1].click()")
    assert page.value("document.querySelector('.tinted').dataset.tint") == "value"
    page.value("document.querySelector('a.chip').click()")
    page.until("document.querySelector('.talk > details').open")
    assert page.value("document.querySelector('.state').innerText").startswith("0.4")
    for path in ("/run/run/rollouts", "/run/run"):
        page.open(base + path)
        page.value("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.value("window.ran === undefined && document.querySelectorAll('[onerror]').length === 0")
        assert "<script>alert(1)</script>" in page.value("document.body.innerText")
    assert page.faults() == []


def test_pages_fit_a_phone_and_a_desk(  # type: ignore[no-untyped-def]
    browser: Browser, serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "OWN_PLOTS", app.OWN_PLOTS[:2])  # all are alike, and take their time to draw
    monkeypatch.setattr(app, "ALL_PLOTS", app.ALL_PLOTS[:2])
    base = serve(
        fabricate(tmp_path / "one"),
        part(tmp_path / "a-run-of-a-long-name", steps=40, evaluations=4, rollouts=2),
    )
    for width in WIDTHS:
        page = opened(browser, base, serve[-1], "/", width)
        for path in ("/", "/run/one", "/run/one/rollouts", "/compare"):
            page.open(base + path)
            assert page.value("document.documentElement.scrollWidth <= innerWidth"), (path, width)
            assert page.value("document.body.innerText.length") > 100
