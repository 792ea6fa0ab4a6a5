"""Folders of others' making: what transformers would load is what is loaded, or it is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from genac_megatron.cli import main
from genac_megatron.errors import EXIT_INPUT, EXIT_OK, InputError
from genac_megatron.models.families.base import Shape
from genac_megatron.models.families.reading import LLAMA3_ROPE
from genac_megatron.models.hf_folder import INDEX, SINGLE, HfFolder
from genac_megatron.models.hf_headers import check_weights
from genac_megatron.models.mapping import random_weights
from genac_megatron.models.registry import hf_config, shape_from_folder, shape_from_hf
from genac_megatron.models.sizes import hf_names
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.schema import ModelConfig
from genac_megatron.stages.runtime import Run
from genac_megatron.tasks.tokenizer import TINY_FOLDER, check_rows, tokenizer_size

TINY = Shape(
    family="qwen3", layers=2, hidden=12, ffn=8, heads=4, kv_heads=2, head_dim=6, vocab=23, tie=False,
    rope_theta=1e4, norm_eps=1e-6, max_positions=64, init_std=0.02, qk_norm=True,
)  # fmt: skip


def _folder(path: Path, shards: int) -> dict[str, torch.Tensor]:
    """A folder of random weights for TINY, in `shards` files."""
    tensors = {name: random_weights(TINY, 1)(name) for name in hf_names(TINY)}
    if shards == 1:
        save_file(tensors, path / SINGLE)
        return tensors
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_gives_its_tensors(tmp_path: Path, shards: int) -> None:
    tensors = _folder(tmp_path, shards)
    folder = HfFolder(tmp_path)
    folder.check(TINY)
    assert sorted(folder.names) == sorted(tensors)
    assert all(torch.equal(folder.get(name), tensor) for name, tensor in tensors.items())


def test_a_folders_faults_are_named(tmp_path: Path) -> None:
    _folder(tmp_path, 3)
    folder = HfFolder(tmp_path)
    with pytest.raises(InputError, match=r"model.extra is missing"):
        folder.get("model.extra")
    with pytest.raises(InputError, match=r"embed_tokens.weight has shape \(23, 12\), expected \(24, 12\)"):
        folder.check(dataclasses.replace(TINY, vocab=24))
    with pytest.raises(InputError, match=r"missing tensor model.layers.2.*and \d+ more"):
        folder.check(dataclasses.replace(TINY, layers=3))
    with pytest.raises(InputError, match=r"surplus tensor model.layers.0.self_attn.k_norm.weight"):
        folder.check(dataclasses.replace(TINY, family="llama", qk_norm=False))
    with pytest.raises(InputError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        folder.check(dataclasses.replace(TINY, tie=True))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_file_cut_short_or_missing_is_named(tmp_path: Path, shards: int) -> None:
    _folder(tmp_path, shards)
    file = tmp_path / (SINGLE if shards == 1 else "model-1.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match=file.name):
        HfFolder(tmp_path).check(TINY)
    file.unlink()
    with pytest.raises(InputError, match=file.name):
        HfFolder(tmp_path).check(TINY)


# --- folders as people have them -----------------------------------------------------------------

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make(path: Path, shape: Shape, seed: int = 1) -> Path:
    """config.json and weights of `shape` beside the built-in tokenizer."""
    shutil.copytree(TINY_FOLDER, path)
    shape = dataclasses.replace(shape, vocab=tokenizer_size("builtin:tiny"), max_positions=4096)
    (path / "config.json").write_text(json.dumps(hf_config(shape)))
    get = random_weights(shape, seed)
    save_file({name: get(name) for name in hf_names(shape)}, path / SINGLE, {"format": "pt"})
    return path


def change(path: Path, **tensors: torch.Tensor) -> None:
    """Add tensors (__ for a dot) to a folder's single file."""
    held = load_file(path / SINGLE) | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file(held, path / SINGLE, {"format": "pt"})


def configure(path: Path, **keys: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | keys))


def another_head(path: Path) -> None:
    make(path, dataclasses.replace(TINY, tie=True))
    change(path, lm_head__weight=torch.randn(tokenizer_size("builtin:tiny"), 12))


def biases(path: Path) -> None:
    llama = dataclasses.replace(TINY, family="llama", qk_norm=False)
    make(path, llama)
    sizes = {"q": llama.q_size, "k": llama.kv_size, "v": llama.kv_size}
    change(
        path,
        **{
            f"model__layers__{n}__self_attn__{x}_proj__bias": torch.ones(sizes[x])
            for n in (0, 1)
            for x in "qkv"
        },
    )


def marked(name: str) -> Callable[[Path], None]:
    def begin(path: Path) -> None:
        make(path, TINY)
        before = (path / name).read_bytes() if (path / name).exists() else b"{}"
        (path / name).write_bytes(b"\xef\xbb\xbf" + before)

    return begin


def renamed(path: Path) -> None:
    make(path, TINY)
    (path / SINGLE).rename(path / "consolidated.safetensors")


def prefixed(path: Path) -> None:
    make(path, TINY)
    held = {f"language_model.{name}": tensor for name, tensor in load_file(path / SINGLE).items()}
    save_file(held, path / SINGLE, {"format": "pt"})


def configured(**keys: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        make(path, TINY)
        configure(path, **keys)

    return write


def yarn(path: Path) -> None:
    make(path, TINY)
    configure(
        path,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    )


def adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somewhere"}')
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)},
        path / "adapter_model.safetensors",
    )


def adapter_beside_a_model(path: Path) -> None:
    make(path, TINY)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def _link(name: str) -> Callable[[Path], None]:
    def broken(path: Path) -> None:
        make(path, TINY)
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to("../../blobs/0123abcd")

    return broken


def pad_beyond(path: Path) -> None:
    make(path, TINY)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    rows = tokenizer_size("builtin:tiny")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": rows, "content": "[PAD]", "special": True, **flags})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


REFUSED = {
    "another_head": (another_head, r"lm_head\.weight is not(.|\n)*set tie_word_embeddings to false"),
    "biases": (biases, r"surplus tensor model\.layers\.0\.self_attn\.k_proj\.bias(.|\n)*config\.json"),
    "renamed": (renamed, r"there is consolidated\.safetensors(.|\n)*rename it to model\.safetensors"),
    "prefixed": (prefixed, r"missing tensor(.|\n)*named with 'language_model\.' before them"),
    "config_mark": (marked("config.json"), r"config\.json: begins with a byte order mark(.|\n)*sed"),
    "tokenizer_mark": (marked("tokenizer.json"), r"tokenizer\.json: begins with a byte order mark"),
    "ends_mark": (marked("generation_config.json"), r"generation_config\.json: begins with a byte"),
    "tie_text": (configured(tie_word_embeddings="false"), r"'tie_word_embeddings' is 'false', neither"),
    "two_thetas": (configured(rope_theta=5e5), r"rope_theta is 500000\.0, in rope_parameters 10000"),
    "yarn": (yarn, r"rope_scaling\).*yarn"),
    "adapter": (adapter, r"adapter's folder(.|\n)*merge_and_unload"),
    "adapter_beside": (adapter_beside_a_model, r"adapter's folder(.|\n)*remove adapter_config\.json"),
    "no_weights": (_link(SINGLE), r"model\.safetensors is a link to \.\./\.\./blobs/0123abcd, and nothing"),
    "no_config": (_link("config.json"), r"config\.json is a link to"),
    "no_tokenizer": (_link("tokenizer.json"), r"tokenizer\.json is a link to"),
    "no_template": (_link("chat_template.jinja"), r"chat_template\.jinja is a link to"),
    "no_generation": (_link("generation_config.json"), r"generation_config\.json is a link to"),
    "pad": (pad_beyond, r"ids up to (\d+), the model only \1 emb.*: '\[PAD\]' has id \1(.|\n)*resize_token"),
}  # fmt: skip


def recipe_of(folder: Path) -> str:
    model = f"{{model: {{hf: {folder}}}}}"
    return (
        f"name: x\nworld: {{ranks: 1}}\nroles: {{actor: {model}, critic: {model}}}\n"
        "task: {kind: state_tracking, objects: 3}\n"
        "stages: [{kind: sft, role: actor, data: demonstrations, size: 4, batch: 4}]\n"
    )


@pytest.mark.parametrize("name", REFUSED)
def test_convert_and_run_refuse_the_same_folders_by_name(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    make_it, message = REFUSED[name]
    make_it(folder)
    (tmp_path / "r.yaml").write_text(recipe_of(folder))
    for command in (
        ["convert", "to-megatron", str(folder), str(tmp_path / "out")],
        ["run", str(tmp_path / "r.yaml"), "--dry-run"],
    ):
        assert main(command) == EXIT_INPUT, command
        told = capsys.readouterr().err
        assert str(folder) in told
        assert re.search(message, told), told
        assert "way out" in told
    assert not (tmp_path / "out").exists()


def test_ranks_check_their_folders_before_servers_are_started(tmp_path: Path) -> None:
    """A stand-in for a rank, which needs a world: what it starts first."""
    biases(tmp_path / "folder")
    (tmp_path / "r.yaml").write_text(recipe_of(tmp_path / "folder"))
    rank: Any = SimpleNamespace(recipe=load_recipe(tmp_path / "r.yaml"))
    with pytest.raises(InputError, match="surplus tensor"):
        Run._start_fleets(rank, False, {})


def test_a_dry_run_passes_a_sound_folder_and_one_whose_weights_a_checkpoint_brings(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(recipe_of(make(tmp_path / "sound", TINY)))
    assert main(["run", str(tmp_path / "r.yaml"), "--dry-run"]) == EXIT_OK
    bare = make(tmp_path / "bare", TINY)
    (bare / SINGLE).unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        check_weights(ModelConfig(hf=str(bare)))
    check_weights(ModelConfig(hf=str(bare)), planning=True)
    check_weights(ModelConfig(hf=str(bare), checkpoint="somewhere"))
    check_weights(ModelConfig(hf=str(bare)), resuming=True)
    with pytest.raises(
        InputError, match=r"has no model\.safetensors"
    ):  # its head is made beside what is there
        check_weights(ModelConfig(hf=str(bare), checkpoint="somewhere", head="value"))


def test_a_tied_model_may_carry_its_embedding_twice(tmp_path: Path) -> None:
    folder = make(tmp_path / "tied", dataclasses.replace(TINY, tie=True))
    change(folder, lm_head__weight=load_file(folder / SINGLE)[EMBED].clone())
    check_weights(ModelConfig(hf=str(folder)))


def test_a_scalar_critic_may_begin_as_a_language_model(tmp_path: Path) -> None:
    check_weights(ModelConfig(hf=str(make(tmp_path / "lm", TINY)), head="value"))


@pytest.mark.parametrize("gone", [False, True])
def test_a_single_file_is_read_and_an_index_beside_it_is_not_as_in_transformers(
    tmp_path: Path, gone: bool
) -> None:
    folder, other = make(tmp_path / "one", TINY, seed=1), make(tmp_path / "other", TINY, seed=2)
    shutil.copy(other / SINGLE, folder / "model-00001-of-00001.safetensors")
    names = list(load_file(other / SINGLE))
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    if gone:
        (folder / "model-00001-of-00001.safetensors").unlink()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = HfFolder(folder)
    ours.check(shape_from_folder(folder))
    assert all(torch.equal(ours.get(name), theirs[name]) for name in hf_names(shape_from_folder(folder)))


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_fused_experts_are_those_that_transformers_writes_one_by_one(tmp_path: Path, shards: str) -> None:
    shape = dataclasses.replace(
        TINY, family="qwen3_moe", experts=3, experts_per_token=2, expert_ffn=5, norm_topk=True
    )
    config = hf_config(shape)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    for name, original in (("fused", False), ("single", True)):
        model.save_pretrained(tmp_path / name, save_original_format=original, max_shard_size=shards)
    fused, single = HfFolder(tmp_path / "fused"), HfFolder(tmp_path / "single")
    fused.check(shape_from_folder(tmp_path / "fused"))
    assert sorted(fused.names) == sorted(single.names) == sorted(hf_names(shape))
    assert all(torch.equal(fused.get(name), single.get(name)) for name in single.names)


def test_fused_experts_of_another_number_are_named(tmp_path: Path) -> None:
    experts = {"experts": 2, "experts_per_token": 1, "expert_ffn": 5, "norm_topk": True}
    folder = make(tmp_path / "f", dataclasses.replace(TINY, family="qwen3_moe", **experts))
    held = {n: t for n, t in load_file(folder / SINGLE).items() if ".experts." not in n}
    for layer in range(2):
        held[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.randn(2, 10, 12)
        held[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.randn(1 + layer, 12, 5)
    save_file(held, folder / SINGLE, {"format": "pt"})
    with pytest.raises(
        InputError, match=r"^[^;]*missing tensor model\.layers\.0\.mlp\.experts\.1\.down_proj\.weight\n"
    ):
        check_weights(ModelConfig(hf=str(folder)))


def test_the_way_out_of_a_token_beyond_the_embeddings_is_true(tmp_path: Path) -> None:
    """What the message tells to do: transformers' resize_token_embeddings, then save_pretrained."""
    pad_beyond(tmp_path / "f")
    with pytest.raises(InputError, match="resize_token_embeddings"):
        check_rows(str(tmp_path / "f"), shape_from_folder(tmp_path / "f").vocab, "here")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "f")
    model.resize_token_embeddings(tokenizer_size(str(tmp_path / "f")))
    model.save_pretrained(tmp_path / "f")
    check_rows(str(tmp_path / "f"), shape_from_folder(tmp_path / "f").vocab, "here")
    check_weights(ModelConfig(hf=str(tmp_path / "f")))


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"])
def test_what_is_no_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="not an index of shards"):
        HfFolder(tmp_path)


def theirs(config: dict[str, Any]) -> Any:
    """What transformers makes of a config.json; it changes what it is given."""
    return LlamaConfig(**copy.deepcopy(config))


def test_rope_that_is_said_twice() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, **LLAMA3_ROPE}
    config = hf_config(dataclasses.replace(TINY, family="llama", qk_norm=False, rope_theta=5e5))
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    same = config | {"rope_scaling": {"rope_type": "default"}, "rope_parameters": parameters}
    assert shape_from_hf(same).rope_theta == 5e5
    assert theirs(same).rope_parameters["rope_theta"] == 5e5
    both = config | {"rope_scaling": llama3, "rope_parameters": llama3 | {"rope_theta": 5e5}}
    assert shape_from_hf(both).rope_factor == theirs(both).rope_parameters["factor"] == 8.0
    with pytest.raises(InputError, match="beside rope_parameters"):
        shape_from_hf(config | {"rope_scaling": llama3, "rope_parameters": parameters})
    del same["rope_theta"]  # then transformers forgets it
    assert theirs(same).rope_parameters["rope_theta"] == 1e4
    with pytest.raises(InputError, match="beside rope_parameters"):
        shape_from_hf(same)
    with pytest.raises(
        InputError, match=r"rope scaling .*factor"
    ):  # of no type: a factor that nobody would use
        shape_from_hf(config | {"rope_parameters": None, "rope_scaling": {"factor": 4.0}})


def test_headers_are_checked_without_torch() -> None:
    code = "import sys, genac_megatron.models.hf_headers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
