"""A pytest plugin: a line of results per test as soon as it has ended, and one for all of them.

Where every test was skipped, on a GPU that is a failure: nothing was tried.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

WORKER = "PYTEST_XDIST_WORKER"  # set in pytest-xdist's processes, whose reports come to the first one too
WORDS = 600  # characters of a reason


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu minutes")
    group.addoption("--results", type=Path, required=True, help="lines of JSON are added to it")
    group.addoption("--step", required=True, help="its name there")
    group.addoption("--tiny", action="store_true", help="on a CPU, where tests that need a GPU are skipped")


def pytest_configure(config: pytest.Config) -> None:
    if WORKER not in os.environ:
        lines = Lines(config.option.results, config.option.step, config.option.tiny)
        config.pluginmanager.register(lines, "gpu-minutes-lines")


class Lines:
    def __init__(self, results: Path, step: str, tiny: bool) -> None:
        self.results, self.step, self.tiny = results, step, tiny
        self.began, self.counts = time.time(), {"passed": 0, "failed": 0, "skipped": 0}

    def say(self, what: str, **figures: Any) -> None:
        row = {"step": self.step, "what": what, "at_s": round(time.time() - self.began, 1), **figures}
        with self.results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:  # a file that cannot be imported
            self.counts["failed"] += 1
            self.say(report.nodeid, ok=False, outcome="failed", why=report.longreprtext[-WORDS:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        why = {} if report.passed else {"why": _reason(report)}
        spent = round(report.duration, 2)
        self.say(report.nodeid, ok=not report.failed, outcome=report.outcome, s=spent, **why)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        tried = self.counts["passed"] or self.tiny
        well = bool(tried and not self.counts["failed"])
        if not well and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        self.say("tests", ok=well, **self.counts)


def _reason(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return report.longreprtext[-WORDS:]
