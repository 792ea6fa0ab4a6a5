"""Rules over more than one block of a recipe, each broken once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genac_megatron.errors import InputError
from genac_megatron.recipe.loader import check, load_recipe
from genac_megatron.recipe.rules import read_shape
from genac_megatron.recipe.schema import ModelConfig
from genac_megatron.tasks.tokenizer import tokenizer_size

RECIPE = """\
name: tiny
world: {ranks: 4}
roles:
  actor: &role
    model:
      family: qwen3
      tokenizer: builtin:tiny
      shape: {layers: 4, hidden: 64, ffn: 128, heads: 4, kv_heads: 2}
  critic: *role
task: {kind: state_tracking}
stages:
  - {kind: sft, name: demos, role: actor, data: demonstrations}
  - {kind: sft, name: traces, role: critic, data: traces, start_from: actor}
  - {kind: reinforce}
  - {kind: ppo}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=''", "has an empty part"), ("name=a//b", "has an empty part"), ("name=/tmp/x", "is a path"),
        ("name=.", "no folder of its own"), ("name=../up", "is a path"), ("name=a/..", "no fold"),
        ('name="a\\nb"', "line break"), ('name="a\\0b"', "control character"), ("name=a\udce4", "not YAML"),
        (f"name={'n' * 201}", "longer than 200 bytes"), ("name=a/" + 67 * "\u2602", "longer than 200"),
        ("stages.0.name=a/b", "has a slash"), ("stages.0.name=.a", "begins with a dot"),
        ("stages.0.name=''", "empty"), (f"stages.0.name={'n' * 201}", "longer than"),
    ],
)  # fmt: skip
def test_names_that_no_folder_can_have(path: Path, override: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        check(load_recipe(path, [override]))
    assert "name" in str(raised.value)


@pytest.mark.parametrize(
    "name", ["a/b", "it's", "'say \"x\"'", "Gr\u00f6\u00dfe \u5b9f\u9a13", "-x", "n" * 200, ".x"]
)
def test_names_that_folders_have(path: Path, name: str) -> None:
    assert load_recipe(path, [f"name={name}"]).name == name.strip("'" if name[0] == "'" else "")


def test_a_home_in_runs_is_the_users(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of runs=~/x as it is; a folder called ~ is nobody's wish."""
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_recipe(path, ["runs=~/x"]).runs == "/home/somebody/x"
    assert load_recipe(path, ["runs=x~"]).runs == "x~"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["roles.critic.layout={pp: 2, vpp: 2}", "roles.actor.layout={tp: 2}"],
        ["roles.actor.layout={count: 2}", "roles.critic.layout={first_rank: 2, tp: 2}"],
        ["roles.actor.layout={first_rank: 1, count: 2}"],
        ["task.min_swaps=5"],
        ["stages.3.rollout.max_new_tokens=4095", "judging.max_new_tokens=4095"],
        ["stages.0.rollout.max_new_tokens=9999"],  # demonstrations are not rolled out
        ["roles.actor.engine.kind=sglang"],  # the limits' defaults go together
        ["world.timeout_s=60"],  # without servers
    ],
)
def test_what_fits_passes(path: Path, overrides: list[str]):
    check(load_recipe(path, overrides))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("roles.actor.layout.tp=3", "4 ranks, no multiple of tp * pp * cp = 3 * 1 * 1 = 3"),
        ("roles.actor.layout.first_rank=4", "a world of 4"),
        ("roles.actor.layout={first_rank: 2, count: 4}", "ranks 2 to 5"),
        ("roles.actor.model.shape={layers: 4, hidden: 60, ffn: 128, heads: 3, kv_heads: 3}",
         "has 'critic' start from 'actor', and their shapes differ: hidden 60 and 64, heads 3 and 4"),
        ("roles.actor.layout={tp: 2, pp: 2, vpp: 4}", "does not divide the model's 4 layers"),
        ("roles.actor.layout={pp: 4, pipeline_model_parallel_layout: Ett|tL}", "2 stages, and pp * vpp = 4"),
        ("roles.actor.layout={pp: 2, pipeline_model_parallel_layout: Ett|tL}", "has 3 layers, the model 4"),
        ("roles.actor.layout={pp: 2, pipeline_model_parallel_layout: Et*4|L}", "a stage without a layer"),
        ("roles.actor.layout={pp: 2, pipeline_model_parallel_layout: ttt|tL}", "is not an E"),
        ("roles.actor={layout: {cp: 4}, training: {specs: torch}, model: {family: qwen3, "
         "tokenizer: 'builtin:tiny', shape: {layers: 4, hidden: 96, ffn: 128, heads: 6, kv_heads: 2}}}",
         "cp 4 of 'actor' does not divide its 6 heads / tp 1"),
        ("roles.actor.layout.vpp=2", "without pipeline stages"),
        ("roles.critic.engine.routing_replay=true", "experts replayed, and its model has none"),
        ("stages.3.rollout.max_new_tokens=4096", "no room for a prompt in the 4096 positions of actor's"),
        ("stages.1.rollout.max_new_tokens=5000", "no room for a prompt in the 4096 positions of actor's"),
        ("judging.max_new_tokens=4096", "no room for a prompt in the 4096 positions of critic's"),
        ("roles.actor.layout.ep=2", "no experts"),
        ("stages.0.turns=all", "turns is about conversations that are read"),
        ("roles.actor.layout.sequence_parallel=true", "sequence_parallel with tp 1"),
        ("roles.actor.training={fp8: delayed, specs: torch}", "fp8 with torch's layers"),
        ("roles.actor.training={fp8: delayed, dtype: fp32}", "fp8 in fp32"),
        ("roles.actor={model: {hf: ./nowhere}}", "cannot read"),
        ("roles.actor.model.hf=x", "not both"),
        ("roles.actor.model={family: llama}", "not given"),
        ("roles.actor.model.tokenizer=null", "needs a tokenizer"),
        ("roles.actor.model.tokenizer=builtin:small", "builtin:tiny"),
        ("roles.actor.model.shape.vocab=10", "only 10 embeddings"),
        ("roles.actor.model.family=mamba", "supported are llama, qwen2, qwen3"),
        ("roles.actor.model.shape.head_dim=15", "head_dim 15 is odd"),
        ("roles.actor.model.shape.hidden=66", "not a multiple of heads"),
        ("roles.actor.model.shape={layers: 4, hidden: 64, ffn: 128, heads: 4, kv_heads: 3}", "kv_heads"),
        ("task.min_swaps=6", "above max_swaps"),
        ("task={kind: jsonl, path: x.jsonl}", "math"),
        ("task={kind: datasets, name: some/set}", "exact"),
        ("task={kind: jsonl, path: x.jsonl, verifier: math}", "no file x.jsonl"),
        ("task={kind: datasets, name: x, verifier: math, answer_forms: [tag]}", "add boxed to task.answer"),
        ("task={kind: datasets, name: x, verifier: math, instruction: 'End with #### N.'}", "add hashes to"),
        ("task={kind: datasets, name: x, verifier: math, instruction: '<answer>N</answer>', "
         "answer_forms: [boxed]}", "asks for '<answer>'"),
        ("judging.template=mine.txt", "no file mine.txt"),
        ("stages=[{kind: ppo}, {kind: ppo}]", "2 stages are called 'ppo'"),
        ("roles={actor: {model: {family: llama, tokenizer: 'builtin:tiny', shape: "
         "{layers: 1, hidden: 8, ffn: 8, heads: 1, kv_heads: 1}}}}", "'critic'"),
        ("roles={}", "no roles"),
        ("stages.demos.role=teacher", "the roles are: actor, critic"),
        ("stages.demos.start_from=teacher", "'teacher'"),
        ("stages.demos.start_from=actor", "from itself"),
        ("stages.demos.path=x.jsonl", "reads no path"),
        ("stages.demos.heldout={metric: exact_match, target: 2}", "a chance of at most 1"),
        ("stages.demos.heldout={min_delta: 0.1}", "which only patience reads"),
        ("stages.demos.data=jsonl", "has no path"),
        ("task={kind: reasoning_gym, name: chain_sum}", "no teacher"),
        ("stages.traces.teacher={kind: endpoint}", "url"),
        ("roles.actor.engine={kind: sglang, request_timeout_s: 1800}",
         "roles.actor.engine.request_timeout_s is 1800 s and world.timeout_s 1800 s"),
        ("roles.critic={engine: {kind: sglang, start_timeout_s: 2000}, model: {family: llama, tokenizer: "
         "'builtin:tiny', shape: {layers: 4, hidden: 8, ffn: 8, heads: 1, kv_heads: 1}}}",
         "roles.critic.engine.start_timeout_s is 2000 s"),
        ("roles.actor={engine: {kind: sglang}, publication: {send_s: 1e4}, model: {family: llama, tokenizer: "
         "'builtin:tiny', shape: {layers: 4, hidden: 8, ffn: 8, heads: 1, kv_heads: 1}}}",
         "roles.actor.publication.send_s is 10000 s and world.timeout_s 1800 s"),
        ("roles.actor.engine={kind: sglang, engines: 3, nodes: [0, 1]}", "3 servers of 'actor' over nodes"),
        ("roles.actor.engine={kind: sglang, engines: 2, nodes: [1, 1]}", "2 servers of 'actor' over nodes"),
        ("roles.actor.engine={kind: sglang, engines: 2, nodes: [0, 1], host: 10.0.0.1}", "leave host out"),
        ("roles.actor.engine={kind: sglang, nodes: [1], urls: ['http://x']}", "take nodes out"),
        ("roles.actor.engine={kind: sglang, engines: 2, tp: 2, gpus: [0, 1]}", "names 2 GPUs, its 2 servers"),
        ("stages.3.critic_loss.clip_low=0.1", "unknown key 'stages.3.critic_loss.clip_low'"),
        ("stages.2.loss.kl_coef=0.1", "unknown key 'stages.2.loss.kl_coef'"),
        ("stages.2.loss.aggregate=constant", "one of token, sequence"),
        ("stages.3.actor_loss.dual_clip=0.9", "more than 1"),
        ("stages=[{kind: policy, algorithm: {kind: grpo}, critic_optimizer: {lr: 1e-5}}]", "no critic that"),
        ("stages=[{kind: policy, algorithm: {kind: dapo, overlong: {cache: 200}}, rollout: "
         "{max_new_tokens: 100}}]", "lower algorithm.overlong.cache, for example to 25"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_where_it_stands(path: Path, override: str, said: str):
    with pytest.raises(InputError) as caught:
        load_recipe(path, [override])
    assert said in str(caught.value)
    assert caught.value.where.startswith((str(path), "override"))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("{kind: policy, algorithm: {kind: ppo, value: {at_cuts: true}}}", "at_cuts moves the places"),
        ("{kind: value, value: {at_cuts: true}}", "at_cuts moves the places"),
        ("{kind: value, value: {lam_actor: 0.9}}", "unknown key 'stages.0.value.lam_actor'"),
        (
            "{kind: policy, algorithm: {kind: vapo, value: {lam_actor: 0.9}}}",
            "lam_actor 0.9 and length_alpha",
        ),
        (
            "{kind: policy, algorithm: {kind: vc_ppo, value: {length_alpha: 0.1}}}",
            "lam_actor 0.95 and length",
        ),
    ],
)
def test_what_a_scalar_critic_would_not_read_is_refused(path: Path, stage: str, said: str):
    scalar = ["roles.critic.model.head=value"]
    kept = "{kind: policy, algorithm: {kind: vapo, value: {lam_actor: 0.9, length_alpha: null}}}"
    check(load_recipe(path, [*scalar, f"stages=[{kept}]"]))
    with pytest.raises(InputError) as caught:
        load_recipe(path, [*scalar, f"stages=[{stage}]"])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ("roles.critic.engine.release=kv_cache", "roles.critic.engine.release"),
        ("roles.critic.training.offload=true", "roles.critic.training.offload"),
    ],
)
def test_what_gives_memory_back_does_not_overlap(path: Path, more: str, key: str):
    """One of the two generates, or trains, while the other does."""
    served = [f"roles.{role}.engine.kind=sglang" for role in ("actor", "critic")]
    load_recipe(path, [*served, more])
    with pytest.raises(InputError, match="overlap") as raised:
        load_recipe(path, [*served, more, "stages.3.overlap=true"])
    assert key in raised.value.where


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("name=x", "of the actor waits for all that is under way"),
        ("roles.actor.publication.mode=in_flight", "of the critic waits for all that is under way"),
    ],
)
def test_several_batches_ahead_go_on_over_publications(path: Path, more: str, message: str):
    served = [f"roles.{role}.engine.kind=sglang" for role in ("actor", "critic")]
    assert load_recipe(path, [*served, more, "stages.3.overlap=true"]).stages[3].overlap == 1
    with pytest.raises(InputError, match=message):
        load_recipe(path, [*served, more, "stages.3.overlap=2"])
    flight = [f"roles.{role}.publication.mode=in_flight" for role in ("actor", "critic")]
    assert load_recipe(path, [*served, *flight, "stages.3.overlap=2"]).stages[3].overlap == 2
    frozen = [flight[0], "stages.3.overlap=2", "stages.3.train_critic=false"]
    assert load_recipe(path, [*served, *frozen]).stages[3].overlap == 2, "which is not published"


def test_traces_of_the_exact_teacher_need_a_task_that_has_one(path: Path):
    overrides = [
        "task={kind: reasoning_gym, name: chain_sum}",
        "stages=[{kind: sft, role: critic, data: traces}]",
    ]
    with pytest.raises(InputError, match="exact teacher"):
        load_recipe(path, overrides)
    check(load_recipe(path, [*overrides, "stages.sft.teacher={kind: self}"]))


def hf_folder(folder: Path, **changes: object) -> Path:
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    kept = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def test_the_layout_is_checked_against_a_folder_too(path: Path, tmp_path: Path):
    hf_folder(tmp_path / "model", num_hidden_layers=5)
    with pytest.raises(InputError, match="5 layers"):
        load_recipe(path, [f"roles.actor.model={{hf: {tmp_path}/model}}", "roles.actor.layout.pp=2"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "family 'mamba'"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "wide"}, "'hidden_size' is 'wide', not a positive number"),
        (
            {"head_dim": None, "model_type": "llama", "hidden_size": 31},
            "hidden 31 is not a multiple of heads",
        ),
        ({"num_attention_heads": 0}, "'num_attention_heads' is 0, not a positive number"),
        ({"num_key_value_heads": 5}, "heads 32 is no multiple of kv_heads 5"),
        ({"attention_bias": True}, "attention_bias: True is not supported"),
        ({"rope_scaling": {"type": "llama3"}}, "rope scaling"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, changes: dict, said: str):
    folder = hf_folder(tmp_path / "model", **changes)
    with pytest.raises(InputError, match=said) as caught:
        read_shape(ModelConfig(hf=str(folder)))
    assert str(folder) in caught.value.where


def test_a_broken_config_names_its_line(tmp_path: Path):
    (tmp_path / "config.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(InputError, match="not JSON") as caught:
        read_shape(ModelConfig(hf=str(tmp_path)))
    assert caught.value.where == f"{tmp_path}/config.json:3"


def test_the_builtin_tokenizers_size_is_what_its_library_says():
    from genac_megatron.tasks.tokenizer import load_tokenizer

    assert tokenizer_size("builtin:tiny") == len(load_tokenizer("builtin:tiny"))


def test_three_heads_fit_where_tp_divides_them(path: Path):
    shape = "model.shape={layers: 4, hidden: 60, ffn: 128, heads: 3, kv_heads: 3}"
    both = [f"roles.{role}.{shape}" for role in ("actor", "critic")]
    check(load_recipe(path, both))
    with pytest.raises(InputError, match="heads 3"):
        load_recipe(path, [*both, "roles.actor.layout.tp=2"])


STARTED = """
name: started
task: {kind: state_tracking}
roles:
  actor:
    model:
      family: llama
      tokenizer: builtin:tiny
      shape: &shape {layers: 2, hidden: 32, ffn: 64, heads: 2, kv_heads: 2}
  critic: {model: {family: llama, head: value, tokenizer: builtin:tiny, shape: *shape}}
  reference: {model: {family: llama, tokenizer: builtin:tiny, shape: *shape}, training: {frozen: true}}
stages:
  - {kind: value, start_from: actor}
  - {kind: policy, algorithm: {kind: ppo, loss: {kl_coef: 0.1}}, start_from: actor}
"""


@pytest.mark.parametrize(
    ("role", "told"),
    [("critic", "the stage 'value' (value) has 'critic' start from"), ("reference", "kl_coef of the stage")],
)
def test_who_starts_as_a_copy_has_the_shape_of_it(tmp_path: Path, role: str, told: str):
    """A scalar critic's head is its own. The reference of a KL term is a copy too."""
    path = tmp_path / "recipe.yaml"
    path.write_text(STARTED)
    check(load_recipe(path, []))
    with pytest.raises(InputError, match="layers 2 and 3") as raised:
        load_recipe(path, [f"roles.{role}.model.shape.layers=3"])
    assert told in str(raised.value)
    assert "recipe.yaml:" in str(raised.value)


def test_experts_of_allgather_want_one_length(tmp_path: Path) -> None:
    path = tmp_path / "experts.yaml"
    path.write_text(
        RECIPE.replace("family: qwen3", "family: qwen3_moe").replace(
            "kv_heads: 2}", "kv_heads: 2, experts: 4, experts_per_token: 2, expert_ffn: 24, norm_topk: true}"
        )
    )
    allgather = "roles.actor.training={moe_dispatcher: allgather, variable_seq_lengths: true}"
    with pytest.raises(InputError, match="wants one length"):
        check(load_recipe(path, [allgather]))


def test_adapters_want_whole_heads_of_keys(path: Path) -> None:
    check(load_recipe(path, ["roles.actor.layout.tp=4"]))
    with pytest.raises(InputError, match="tp 4 for 2 heads of keys"):
        check(load_recipe(path, ["roles.actor.layout.tp=4", "roles.actor.training.adapter={rank: 2}"]))
