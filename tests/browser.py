"""A headless Chromium, spoken to over a pipe in its DevTools protocol: no driver, no further package.

with Browser(path, profile) as browser:
    page = browser.page(390)
    page.open("http://127.0.0.1:8642/")
    page.value("document.title")
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LIMIT_S = 60.0  # of an answer, on a busy machine


def found() -> str | None:
    """The path of a Chromium; None where this machine has none."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Browser:
    """The process. profile: an empty folder for its files."""

    def __init__(self, program: str, profile: Path) -> None:
        there, self._to = os.pipe()
        self._from, back = os.pipe()
        words = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run",
                 "--force-color-profile=srgb"]  # fmt: skip

        def connect() -> None:  # DevTools reads 3 and writes 4; either may be the other's number here
            kept = os.dup(there), os.dup(back)
            os.dup2(kept[0], 3)
            os.dup2(kept[1], 4)

        with (profile / "log").open("w") as log:
            self.process = subprocess.Popen(
                words, stdout=log, stderr=log, preexec_fn=connect, close_fds=False, start_new_session=True
            )
        os.close(there)
        os.close(back)
        self._last, self._read = 0, b""
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; its result."""
        self._last += 1
        asked = {"id": self._last, "method": method, "params": parameters}
        os.write(self._to, json.dumps(asked | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            message = self.next(LIMIT_S)
            assert message is not None, f"no answer to {method}"
            if message.get("id") == self._last:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def next(self, limit_s: float) -> dict[str, Any] | None:
        """The next message; None where there is none within the limit."""
        until = time.monotonic() + limit_s
        while b"\0" not in self._read:
            if not select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]:
                return None
            got = os.read(self._from, 1 << 16)
            assert got, "the browser has ended"
            self._read += got
        one, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(one)
        return message

    def page(self, width: int, height: int = 900, *, dark: bool = False) -> Page:
        """A page of so many CSS pixels."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        page.ask("Page.enable")
        page.ask("Runtime.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        page.ask("Emulation.setDeviceMetricsOverride", **size)
        theme = "dark" if dark else "light"
        page.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        return page

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._to)
        os.close(self._from)


class Page:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.ask(method, self.session, **parameters)

    def open(self, address: str) -> None:
        """Go there and wait until all of it is loaded."""
        self.ask("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """Of an expression in the page."""
        done = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, expression: str, limit_s: float = LIMIT_S) -> None:
        """Wait for an expression to become true."""
        until = time.monotonic() + limit_s
        while not self.value(expression):
            assert time.monotonic() < until, f"never came true: {expression}"
            time.sleep(0.05)

    def faults(self) -> list[str]:
        """Errors of scripts, and what the page's policy refused."""
        told = [e for e in self.browser.events if e.get("sessionId") == self.session]
        thrown = [
            e["params"]["exceptionDetails"]["text"] for e in told if e["method"] == "Runtime.exceptionThrown"
        ]
        return thrown + [str(e["params"]["entry"]["text"]) for e in told if e["method"] == "Log.entryAdded"]

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of what is seen of it."""
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
