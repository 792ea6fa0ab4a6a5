"""What a recipe may say of several actors, and of a file of traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from genac_megatron.errors import InputError
from genac_megatron.recipe.loader import load_recipe
from tests.e2e.test_gates import SMALL

OWN, EARLY = {"name": "actor"}, {"name": "early", "checkpoint": "runs/early"}
FILE = {"kind": "file", "path": "traces.jsonl"}


def load(tmp_path: Path, **changes: Any) -> Any:
    sft = {"kind": "sft", "name": "s", "role": "critic", "data": "traces", **changes}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**SMALL, "stages": [sft]}))
    return load_recipe(str(tmp_path / "r.yaml"))


def test_actors_and_a_file_are_read(tmp_path: Path) -> None:
    recipe = load(tmp_path, actors=[EARLY, OWN], teacher=FILE)
    assert [actor.name for actor in recipe.stages[0].actors] == ["early", "actor"]
    assert recipe.stages[0].copies


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actors": [EARLY, EARLY]}, "2 actors of the stage 's' are called 'early'"),
        ({"actors": [{"name": "now"}]}, "names no checkpoint: it is the run's own"),
        ({"actors": [{**EARLY, "name": "actor"}]}, "is another's, and the run's own is called 'actor'"),
        ({"actors": [EARLY], "data": "demonstrations"}, "only traces for the critic are of their states"),
        ({"teacher": {"kind": "file"}}, "asks for the traces of a file, and names none"),
        ({"teacher": {"kind": "exact", "path": "x"}}, "asks for no file, and names one"),
        ({"teacher": {**FILE, "writes": "score"}}, "learns a file's traces as they are"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(tmp_path, **changes)
