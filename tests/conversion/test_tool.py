"""`genac convert` and `genac inspect` on tiny models: exact, resumable, and clear about what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from genac_megatron.cli import main
from genac_megatron.errors import InputError
from genac_megatron.models.hf_folder import HfFolder
from genac_megatron.models.registry import FAMILIES
from genac_megatron.observe.lock import _began as began
from genac_megatron.observe.lock import held
from genac_megatron.recipe.schema import ModelShape
from tests import warm
from tests.conversion.tiny_folder import make_folder, tiny_shape

ROOT = Path(__file__).resolve().parents[2]


def convert(direction: str, *given: Any) -> int:
    return main(["convert", direction, *map(str, given)])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    read = HfFolder(folder)
    return {name: read.get(name) for name in read.names}


def assert_same(first: Path, second: Path) -> None:
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("hf") / "source", tiny_shape())


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ck") / "checkpoint"
    assert convert("to-megatron", source, folder, "--quiet") == 0
    return folder


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("tie", [True, False])
def test_there_and_back_with_logits_compared(
    name: str, tie: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "hf", tiny_shape(name, tie=tie))
    assert convert("to-megatron", source, tmp_path / "ck", "--verify", "--max-shard-size", "20KB") == 0
    assert convert("to-hf", tmp_path / "ck", tmp_path / "back", "--verify", "--max-shard-size", "30KB") == 0
    assert capfd.readouterr().err.count("verified: logits differ by at most") == 2
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(source).values())
    assert len(set(index["weight_map"].values())) > 3
    assert_same(source, tmp_path / "back")


def test_a_dtype_can_be_chosen(source: Path, tmp_path: Path) -> None:
    assert convert("to-megatron", source, tmp_path / "ck", "--dtype", "fp32", "--role", "critic") == 0
    given = ["--role", "critic", "--dtype", "bf16", "--workers", 2, "--max-shard-size", "20KB", "--verify"]
    assert convert("to-hf", tmp_path / "ck", tmp_path / "back", *given) == 0
    assert_same(source, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = json.loads(inspect_json(tmp_path / "ck"))["roles"]["critic"]["tensors"]
    assert {tensor["dtype"] for tensor in stored.values()} == {"float32"}


def inspect_json(checkpoint: Path) -> str:
    done = warm.genac("inspect", str(checkpoint), "--json", cwd=checkpoint)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_inspect_lists_roles_shapes_and_tensors(
    source: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    assert f"converted from {source}" in text
    assert "actor:" in text
    assert "critic:" in text
    assert "decoder.layers.self_attention.linear_qkv.weight" in text
    assert "3 x 96 x 48  in 3" in text
    assert "family qwen3, layers 3, hidden 48" in text
    assert main(["inspect", str(checkpoint), "--role", "value"]) == 2


def test_transformers_loads_what_comes_out(checkpoint: Path, tmp_path: Path) -> None:
    assert convert("to-hf", checkpoint, tmp_path / "back") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.chat_template
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_verification_finds_swapped_weights(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from genac_megatron.conversion.verify import verify

    other = tmp_path / "other"
    shutil.copytree(source, other)
    swapped = tensors(source)
    gate, up = (f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up"))
    swapped[gate], swapped[up] = swapped[up], swapped[gate]
    save_file(swapped, other / "model.safetensors", {"format": "pt"})
    assert verify(source, checkpoint, "actor", tiny_shape(), torch.bfloat16) < 1e-5
    with pytest.raises(InputError, match="logits differ by"):
        verify(other, checkpoint, "actor", tiny_shape(), torch.bfloat16)


def test_a_runs_recipe_says_what_goes_with_its_weights(
    source: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / "ppo-00004")
    shutil.rmtree(run / "checkpoints" / "ppo-00004" / "hf")
    assert convert("to-hf", run, tmp_path / "none") == 2
    assert "nothing here says which tokenizer its actor has" in capsys.readouterr().err
    roles = {
        "actor": {"model": {"hf": str(source)}, "layout": {"tp": 3}},
        "critic": {"model": {"tokenizer": "builtin:tiny"}},
    }
    (run / "recipe.yaml").write_text(json.dumps({"roles": roles}))  # JSON is YAML
    for role in roles:
        assert convert("to-hf", run, tmp_path / role, "--role", role, "--verify") == 0
        assert_same(source, tmp_path / role)
    assert main(["inspect", str(run), "--role", "actor"]) == 0
    assert "written by tp=3" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_scalar_critic_there_and_back_with_values_compared(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "hf", tiny_shape(name).as_value)
    assert convert("to-megatron", source, tmp_path / "ck", "--role", "critic", "--verify") == 0
    assert convert("to-hf", tmp_path / "ck", tmp_path / "back", "--role", "critic", "--verify") == 0
    assert capfd.readouterr().err.count("verified: values differ by at most") == 2
    assert_same(source, tmp_path / "back")


def test_a_scalar_critic_that_began_as_a_language_model_has_its_own_config(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its recipe names that model's folder, whose tokenizer it has."""
    began_as = make_folder(tmp_path / "lm", tiny_shape(tie=True))
    source = make_folder(tmp_path / "value", tiny_shape(tie=True).as_value)
    run = tmp_path / "run"
    assert convert("to-megatron", source, run / "checkpoints" / "value-00004", "--role", "critic") == 0
    shutil.rmtree(run / "checkpoints" / "value-00004" / "hf")
    (run / "recipe.yaml").write_text(json.dumps({"roles": {"critic": {"model": {"hf": str(began_as)}}}}))
    assert convert("to-hf", run, tmp_path / "back", "--role", "critic", "--verify") == 0
    assert "verified: values differ by" in capfd.readouterr().err
    assert_same(source, tmp_path / "back")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "back")
    assert model.config.architectures == ["Qwen3ForTokenClassification"]
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template
    other = make_folder(tmp_path / "other", tiny_shape(hidden=96, tie=True))
    (run / "recipe.yaml").write_text(json.dumps({"roles": {"critic": {"model": {"hf": str(other)}}}}))
    assert convert("to-hf", run, tmp_path / "none", "--role", "critic") == 2
    assert "its config.json is another model's" in capfd.readouterr().err


@pytest.mark.parametrize("named", ["sizes", "folder"])
def test_a_run_starts_from_a_converted_checkpoint_and_ends_as_a_folder(named: str, tmp_path: Path) -> None:
    """Two ranks, an expert each; a learning rate that moves no bf16 weight.

    A model's folder gives config and tokenizer alone: its weights are not read, and here they are gone.
    """
    shape = tiny_shape("qwen3_moe", experts=2, max_positions=1024)
    source = make_folder(tmp_path / "hf", shape)
    assert convert("to-megatron", source, tmp_path / "ck", "--quiet") == 0
    sizes = {key: getattr(shape, key) for key in ModelShape.model_fields if hasattr(shape, key)}
    model: dict[str, Any] = {"family": shape.family, "tokenizer": "builtin:tiny"}
    model["shape"] = {**sizes, "tie_embeddings": shape.tie}
    if named == "folder":
        bare = shutil.copytree(source, tmp_path / "bare")
        (bare / "model.safetensors").unlink()
        model = {"hf": str(bare)}
    recipe = {
        "name": "run", "runs": str(tmp_path / "runs"), "world": {"ranks": 2},
        "task": {"kind": "state_tracking", "heldout_size": 16, "train_size": 200},
        "roles": {"actor": {
            "model": {**model, "checkpoint": str(tmp_path / "ck")},
            "layout": {"ep": 2}, "training": {"tokens_per_microbatch": 1024},
            "optimizer": {"lr": 1e-12, "weight_decay": 0.0},
        }},
        "stages": [{"kind": "sft", "role": "actor", "data": "demonstrations", "size": 16, "epochs": 1,
                    "batch": 8, "rollout": {"max_new_tokens": 16}}],
        "evaluation": {"prompts": 4, "samples": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    done = warm.genac("run", str(tmp_path / "recipe.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert convert("to-hf", tmp_path / "runs" / "run", tmp_path / "back", "--quiet") == 0
    assert_same(source, tmp_path / "back")


# --- killed, resumed, shared -----------------------------------------------------------------------


def test_a_killed_conversion_leaves_nothing_whole_and_goes_on(tmp_path: Path) -> None:
    shape = tiny_shape(layers=60, hidden=256, ffn=1024, heads=8, kv_heads=4, head_dim=32)
    source = make_folder(tmp_path / "hf", shape)
    back = tmp_path / "ck"
    part = tmp_path / "ck.part"
    given = ("convert", "to-megatron", str(source), str(back), "--max-shard-size", "500KB")
    process = warm.Popen(warm.command(*given), cwd=tmp_path)
    while len(list(part.glob("done/*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in part.glob("done/*.json")}
    assert not back.exists()
    files = {f: f.stat().st_mtime_ns for f in part.glob("weights/*.distcp")}
    assert convert("to-megatron", source, back, "--max-shard-size", "500KB") == 0
    kept = [
        f.name for f, written in files.items() if (back / "weights" / f.name).stat().st_mtime_ns == written
    ]
    assert len(kept) >= len(done) >= 5
    assert not part.exists()
    assert convert("to-hf", back, tmp_path / "back") == 0
    assert_same(source, tmp_path / "back")


def test_a_killed_conversion_leaves_no_worker(tmp_path: Path) -> None:
    shape = tiny_shape(layers=60, hidden=256, ffn=1024, heads=8, kv_heads=4, head_dim=32)
    source, part = make_folder(tmp_path / "hf", shape), tmp_path / "ck.part"
    given = ("convert", "to-megatron", str(source), str(tmp_path / "ck"), "--max-shard-size", "200KB")
    process = warm.Popen(warm.command(*given, "--workers", "2"), cwd=tmp_path)
    while len(list(part.glob("done/*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_conversion_that_is_asked_to_stop_keeps_what_is_done(tmp_path: Path, workers: str) -> None:
    """SIGUSR1, as a batch script sends it: code 75, and the same command goes on."""
    shape = tiny_shape(layers=60, hidden=256, ffn=1024, heads=8, kv_heads=4, head_dim=32)
    source, back, part = make_folder(tmp_path / "hf", shape), tmp_path / "ck", tmp_path / "ck.part"
    options = ("--max-shard-size", "200KB", "--workers", workers)
    command = warm.command("convert", "to-megatron", str(source), str(back), *options)
    process = warm.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while len(list(part.glob("done/*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    done = list(part.glob("done/*.json"))
    assert process.returncode == 75, said
    assert f"genac: stopped: stopped as asked after {len(done)} of " in said
    assert "run the same command again: it goes on where it stopped" in said
    assert not back.exists()
    assert convert("to-megatron", source, back, *options) == 0
    assert convert("to-hf", back, tmp_path / "back") == 0
    assert_same(source, tmp_path / "back")


def test_ranks_share_the_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "ck"
    command = [
        sys.executable, str(ROOT / "tools" / "convert_hf_to_megatron.py"), str(source), str(out),
        "--max-shard-size", "20KB", "--quiet",
    ]  # fmt: skip
    ranks = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "3"}, cwd=tmp_path)
        for rank in range(3)
    ]
    assert [process.wait(120) for process in ranks] == [0, 0, 0]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert_megatron_to_hf.py"), str(out), str(tmp_path / "back")],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "back")
    assert_same(source, tmp_path / "back")


def test_a_second_process_into_the_same_place_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file says that this process's parent converts, which lives; then a process that has ended."""
    part = tmp_path / "ck.part"
    with held(part, "the conversion", name=".rank0.lock"):
        (path,) = part.glob(".rank0.lock/*.json")
        holder, parent = json.loads(path.read_text()), os.getppid()
        path.write_text(json.dumps({**holder, "pid": parent, "began": began(parent)}))
        assert convert("to-megatron", source, tmp_path / "ck") == 2
        assert f"the conversion is under way: process {parent}" in capsys.readouterr().err
        path.write_text(json.dumps({**holder, "pid": parent, "began": "1"}))
        (part / "rank0.lock").write_text("")  # of an earlier version, killed
        assert convert("to-megatron", source, tmp_path / "ck") == 0
    assert not [path.name for path in (tmp_path / "ck").iterdir() if "lock" in path.name]


def test_another_conversion_into_the_same_place_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "ck.part"
    part.mkdir()
    (part / "plan.json").write_text(json.dumps({"to": "megatron", "dtype": "torch.float16"}))
    assert convert("to-megatron", source, tmp_path / "ck") == 2
    message = capsys.readouterr().err
    assert "dtype: torch.float16 then, torch.bfloat16 now" in message
    shutil.rmtree(part)
    (tmp_path / "ck").mkdir()
    assert convert("to-megatron", source, tmp_path / "ck") == 2
    assert "exists already" in capsys.readouterr().err


# --- what is wrong with an input -------------------------------------------------------------------


def broken(source: Path, copy: Path, what: str) -> Path:
    """A copy of a folder with one fault."""
    shutil.copytree(source, copy)
    weights = copy / "model.safetensors"
    config = json.loads((copy / "config.json").read_text())
    match what:
        case "no index":
            weights.rename(copy / "model-00001-of-00002.safetensors")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "dtype":
            from safetensors.torch import save_file

            save_file({n: t.view(torch.int16) for n, t in tensors(source).items()}, weights)
        case "family":
            config["model_type"] = "mamba2"
        case "vocabulary":
            config["vocab_size"] = 100
        case "option":
            config["attn_logit_softcapping"] = 30.0
        case "sliding":
            config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
        case "quantised":
            config["quantization_config"] = {"quant_method": "fp8"}
        case "tokenizer":
            tokenizer = json.loads((copy / "tokenizer.json").read_text())
            tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 5000, "content": "<new>"})
            (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no index", "shards without their index"),
        ("truncated", "model.safetensors: cannot be read"),
        ("dtype", "model.embed_tokens.weight is I16, not one of F32, BF16, F16"),
        ("family", "'mamba2' is not supported"),
        ("vocabulary", r"embed_tokens.weight has shape"),
        ("option", "attn_logit_softcapping: 30.0"),
        ("sliding", "layer_types has sliding_attention"),
        ("quantised", "quantization_config: the weights are quantised"),
        ("tokenizer", "its tokenizer has ids up to 5000, the model only 355 embeddings"),
    ],
)
def test_a_bad_folder_is_named(
    source: Path, tmp_path: Path, what: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = broken(source, tmp_path / "bad", what)
    assert convert("to-megatron", bad, tmp_path / "ck") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_damaged_checkpoint_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    file = bad / "weights" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-2000])
    assert convert("to-hf", bad, tmp_path / "hf") == 2
    assert "__0_0.distcp: actor.output_layer.weight cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    file.unlink()
    assert convert("to-hf", bad, tmp_path / "hf2") == 2
    assert "missing file __0_0.distcp" in capsys.readouterr().err
    assert convert("to-hf", bad, tmp_path / "hf3", "--role", "value") == 2
    assert "holds no role value, only actor, critic" in capsys.readouterr().err
    (bad / "manifest.json").unlink()
    assert convert("to-hf", bad, tmp_path / "hf4") == 2
    assert "no complete checkpoint there" in capsys.readouterr().err


def test_no_room_is_said_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (shutil.disk_usage(tmp_path).free + (1 << 30)) // 96
    source = make_folder(tmp_path / "hf", tiny_shape(tie=True))
    weights = source / "model.safetensors"
    raw = weights.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"][0] = rows if "embed" in name else entry["shape"][0]
            size = 2 * torch.Size(entry["shape"]).numel()
            entry["data_offsets"] = [end, end + size]
            end += size
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(weights, 8 + len(text) + end)  # a hole: it takes no room itself
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    assert convert("to-megatron", source, tmp_path / "ck") == 2
    assert "no space left" in capsys.readouterr().err
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize("size", ["", "five", "0", "3PB", "-1GB"])
def test_a_size_that_is_none_is_refused(size: str, source: Path, tmp_path: Path) -> None:
    assert convert("to-megatron", source, tmp_path / "ck", f"--max-shard-size={size}") == 2
