"""SGLang's own parser takes the command line of every server of every cluster recipe. None is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.published_models import write_place
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import AdapterConfig
from genac_megatron.recipe.training import TARGETS
from genac_megatron.serving.sglang.adapters import lora_arguments
from genac_megatron.serving.sglang.server import ServerSpec
from tests.server_specs import RECIPES, specs_of
from tests.serving.zygote import AskingZygote

PARSE = """
import argparse
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(exit_on_error=False)
ServerArgs.add_cli_args(parser)
names = ["tp_size", "port", "host", "mem_fraction_static", "max_running_requests", "max_total_tokens"]
names += ["device", "enable_lora", "max_lora_rank", "max_loras_per_batch", "lora_backend"]
names.append("lora_target_modules")
found = []
for line in given:
    parsed, unknown = parser.parse_known_args(line)
    found.append({name: getattr(parsed, name) for name in names} | {"unknown": unknown})
"""


def test_every_servers_command_line(
    zygote: AskingZygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    specs = [spec for path in RECIPES for _, spec in specs_of(load_recipe(path), tmp_path)]
    assert len(specs) > 100
    # And what no cluster recipe has: a CPU's server with limits, and an argument that SGLang has not.
    limited = ServerSpec("a/0", tmp_path, 21_000, max_running=7, max_tokens=4096)
    # A server of two adapters.
    adapters = lora_arguments([AdapterConfig(rank=8), AdapterConfig(rank=16, targets=["q_proj"])], gpu=False)
    lora = ServerSpec("a/0", tmp_path, 21_000, max_running=7, max_tokens=4096, args=adapters)
    wrong = ServerSpec("a/0", tmp_path, 21_000, args=("--max-running-request-count", "3"))
    *whole, bad = zygote.ask(PARSE, [spec.arguments() for spec in (*specs, limited, lora, wrong)])
    asked = {
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras_per_batch": 5,
        "lora_backend": "torch_native",
    }
    assert {key: value for key, value in whole[-1].items() if key in asked} == asked
    assert set(whole[-1]["lora_target_modules"]) == set(TARGETS)
    for spec, got in zip((*specs, limited, lora), whole, strict=True):
        assert {key: value for key, value in got.items() if "lora" not in key} == {
            "tp_size": spec.tp,
            "port": spec.port,
            "host": spec.host,
            "mem_fraction_static": spec.mem_fraction,
            "max_running_requests": spec.max_running,
            "max_total_tokens": spec.max_tokens,
            "device": "cpu" if spec.device == "cpu" else None,
            "unknown": [],
        }
        assert (spec.max_running is None) == (spec.max_tokens is None) == (spec.device == "cuda")
    assert bad["unknown"] == ["--max-running-request-count", "3"]
