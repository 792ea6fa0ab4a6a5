"""Work in pieces: what a killed process leaves, and what must not be mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genac_megatron.errors import InputError
from genac_megatron.evaluation.parts import Parts

PLAN = {"kind": "bank", "seed": 1, "actor": {"weights": "ab"}}


def parts(folder: Path) -> Parts:
    return Parts(folder, "rows.jsonl", ("number",))


def test_rows_of_killed_processes_are_kept_but_for_half_a_line(tmp_path: Path) -> None:
    first = parts(tmp_path / "bank")
    assert first.begin(PLAN) == {}
    first.append([{"number": 0, "x": "a"}, {"number": 2, "x": "c\u2028"}], rank=0)
    first.append([{"number": 3, "x": "d"}], rank=1)
    [half] = list((tmp_path / "bank" / "parts").glob("00000-*.jsonl"))
    with half.open("a") as file:
        file.write('{"number": 4, "x": "e')  # killed inside a write
    second = parts(tmp_path / "bank")
    assert sorted(second.begin(PLAN)) == [(0,), (2,), (3,)]
    second.append([{"number": 1, "x": "b"}], rank=0)  # not behind the half line
    rows = [row for _, row in sorted(parts(tmp_path / "bank").begin(PLAN).items())]
    assert [row["x"] for row in rows] == ["a", "b", "c\u2028", "d"]
    assert not second.complete
    second.finish(rows, {"plan": PLAN})
    assert second.complete
    assert not (tmp_path / "bank" / "parts").exists()
    manifest, found = parts(tmp_path / "bank").read()
    assert found == rows
    assert manifest["plan"] == PLAN
    assert sorted(parts(tmp_path / "bank").begin(PLAN)) == [(0,), (1,), (2,), (3,)]


def test_other_work_in_the_folder_is_refused_by_what_differs(tmp_path: Path) -> None:
    parts(tmp_path / "bank").begin(PLAN)
    with pytest.raises(InputError, match=r'another actor \(actor: {"weights": "ab"} there'):
        parts(tmp_path / "bank").begin({**PLAN, "actor": {"weights": "cd"}})
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="something else"):
        parts(tmp_path / "else").begin(PLAN)


def test_unfinished_and_damaged_work_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no manifest\.json"):
        parts(tmp_path / "none").read()
    work = parts(tmp_path / "bank")
    work.begin(PLAN)
    with pytest.raises(InputError, match="unfinished"):
        work.read()
    work.finish([{"number": 0}], {"plan": PLAN})
    work.rows_file.write_text(json.dumps({"number": 1}) + "\n")
    with pytest.raises(InputError, match="not the file that its manifest names"):
        work.read()
