"""Work in pieces: what a killed process leaves, and what must not be mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from genac_megatron.errors import InputError
from genac_megatron.evaluation.parts import Parts
from genac_megatron.observe.lock import Held

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


def finished(folder: Path, rows: int = 4) -> Parts:
    work = parts(folder)
    work.begin(PLAN)
    work.finish([{"number": n, "x": "a"} for n in range(rows)], {"plan": PLAN})
    return work


def test_finished_work_that_lost_lines_is_not_gone_on_with_but_made_again(tmp_path: Path) -> None:
    """A shorter file with a manifest that fits it would be a smaller bank, and look whole."""
    work = finished(tmp_path / "bank")
    before = work.rows_file.read_bytes()
    work.rows_file.write_bytes(b"".join(before.splitlines(keepends=True)[:2]))
    for act in (lambda: parts(tmp_path / "bank").begin(PLAN), work.read):
        with pytest.raises(InputError, match="not the file that its manifest names") as error:
            act()
        assert "remove rows.jsonl and manifest.json there" in str(error.value)
    work.rows_file.unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl cannot be read"):
        parts(tmp_path / "bank").begin(PLAN)
    (tmp_path / "bank" / "manifest.json").unlink()  # the way out
    assert parts(tmp_path / "bank").begin(PLAN) == {}
    finished(tmp_path / "bank")
    assert work.rows_file.read_bytes() == before


def test_a_manifest_or_plan_that_is_no_json_is_told(tmp_path: Path) -> None:
    work = finished(tmp_path / "bank")
    (tmp_path / "bank" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json cannot be read"):
        work.begin(PLAN)
    (tmp_path / "bank" / "plan.json").write_text("[]")
    with pytest.raises(InputError, match=r"plan\.json cannot be read"):
        work.begin(PLAN)


def test_work_is_finished_with_all_of_its_rows_and_no_others(tmp_path: Path) -> None:
    work = parts(tmp_path / "bank")
    work.begin(PLAN)
    work.append([{"number": 2}, {"number": 0}], rank=0)
    assert work.whole(PLAN, [(0,), (2,)]) == [{"number": 0}, {"number": 2}]
    with pytest.raises(InputError, match="2 of 4 rows are not there, the first: number 1") as error:
        work.whole(PLAN, [(n,) for n in range(4)])
    assert "a folder that all nodes share" in str(error.value)
    with pytest.raises(InputError, match="rows are there that were not planned: 1, the first: number 2"):
        work.whole(PLAN, [(0,)])


def test_a_plan_of_another_version_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    parts(tmp_path / "bank").begin(PLAN)
    with pytest.raises(InputError, match=r"another version .* says nothing of texts"):
        parts(tmp_path / "bank").begin({**PLAN, "texts": "ab"})
    with pytest.raises(InputError, match="another seed, texts"):
        parts(tmp_path / "bank").begin({**PLAN, "texts": "ab", "seed": 2})


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    """Bytes of an engine that are no UTF-8 can become such; no file holds them."""
    work = parts(tmp_path / "bank")
    work.begin(PLAN)
    work.append([{"number": 0, "text": "a\ud83d b \U0001f600"}], rank=0)
    rows = work.whole(PLAN, [(0,)])
    assert rows == [{"number": 0, "text": "a\ufffd b \U0001f600"}]
    work.finish([{"number": 0, "text": "a\udc00"}], {"plan": PLAN})
    assert work.read()[1] == [{"number": 0, "text": "a\ufffd"}]


def test_what_is_cleared_can_begin_as_other_work(tmp_path: Path) -> None:
    work = finished(tmp_path / "bank")
    work.clear()
    assert work.begin({**PLAN, "seed": 2}) == {}


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


HOLD = """
import sys, time
from pathlib import Path
from genac_megatron.evaluation.parts import Parts
parts = Parts(Path(sys.argv[1]), "rows.jsonl", ("number",))
parts.begin({"of": 1})
parts.append([{"number": 0}], 0)
print("begun", flush=True)
time.sleep(60)
"""


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    """Also with --again, which clears: nothing of a living process goes. A killed one's work goes on."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        mine = Parts(tmp_path / "out", "rows.jsonl", ("number",))
        for act in (lambda: mine.begin({"of": 1}), mine.clear):
            with pytest.raises(Held, match=f"the evaluation is under way: process {process.pid}"):
                act()
        assert (tmp_path / "out" / "plan.json").exists()
        process.kill()
    assert mine.begin({"of": 1}) == {(0,): {"number": 0}}
    mine.finish(mine.whole({"of": 1}, [(0,)]), {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "plan.json", "rows.jsonl",
    ]  # fmt: skip
