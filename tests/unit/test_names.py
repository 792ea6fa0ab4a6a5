"""The tests' own files: whole areas run in one session, where two modules of one name would be one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_no_two_files_of_tests_have_one_name() -> None:
    counted = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, times in counted.items() if times > 1] == []
