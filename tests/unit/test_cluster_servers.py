"""What every server of every cluster recipe is started with: GPUs, cores and limits. No GPU is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.published_models import write_place
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.servers import role_gpus, started_engines
from genac_megatron.serving.sglang.boot import CORES
from genac_megatron.serving.sglang.gpus import VARIABLE
from tests.server_specs import HELD, MASK, RECIPES, specs_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    write_place(folder)
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_two_servers_share_a_gpu_or_a_core(
    path: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    visible = [MASK.format(7 * n % 8) for n in range(8)]
    monkeypatch.setenv(VARIABLE, ",".join(visible))
    recipe = load_recipe(path)
    found = list(specs_of(recipe, tmp_path))
    engines = started_engines(recipe)
    assert len(found) == sum(engine.engines for engine in engines.values()) > 0
    gpus: dict[int, list[str]] = {}
    cores: dict[int, list[int]] = {}
    for node, spec in found:
        environ, role = spec.environment(), spec.name.partition("/")[0]
        mine = environ[VARIABLE].split(",")
        assert len(mine) == spec.tp == engines[role].tp
        gpus.setdefault(node, []).extend(mine)
        threads = list(map(int, environ[CORES].split(",")))
        near = {visible.index(gpu) // 4 for gpu in mine}
        assert {thread // 32 for thread in threads} == near, "of the GPUs' sockets"
        cores.setdefault(node, []).extend(threads)
        arguments = spec.arguments()
        assert not {"--max-running-requests", "--max-total-tokens"} & set(arguments), "the server's own"
        assert arguments[arguments.index("--tp") + 1] == str(spec.tp)
        assert "cpu" not in arguments
    for node, names in gpus.items():
        assert len(set(names)) == len(names)
        assert set(names) <= set(visible)
        printed = [place for role in engines for place in role_gpus(recipe, role, node)]
        assert names == [visible[place] for place in printed], "as genac slurm prints them"
        assert len(set(cores[node])) == len(cores[node])
        assert set(cores[node]) <= set(HELD), "within the job's mask"
