"""Bad inputs by the real command line, in this process: one message each with its place, code 2, nothing of
pydantic's or Python's words. Nothing is begun.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genac_megatron import cli

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"
NOBODYS_WORDS = ("Traceback", "pydantic", "input should", "Input should", "ValidationError", "<class")
ACTOR, PPO = "roles.actor", "stages.ppo"

OVERRIDES = (
    # of the issue
    ("runs=afile", "afile/quickstart", "is a file, and no folder"),
    (f"{ACTOR}.optimizer.lr=.inf", f"{ACTOR}.optimizer.lr", "must be a finite number"),
    (f"{ACTOR}.optimizer.lr=1e400", f"{ACTOR}.optimizer.lr", "must be a finite number"),
    ("name=../x", "name=../x", "the run's name is a path"),
    ("seed=-1", "'seed'", "must be at least 0"),
    ("cluster.time_limit=abc", "time_limit", "hours:minutes:seconds"),
    (f"{ACTOR}.training.tokens_per_microbatch=8", "tokens_per_microbatch=8", "raise it"),
    ("roles.critic.training.tokens_per_microbatch=16", "tokens_per_microbatch=16", "judging.max_new_tokens"),
    ("evaluation.prompts=1000", "evaluation.prompts", "256 are held out"),
    ("judging.template=bad.txt", "bad.txt", "lacks {actor}"),
    ("judging.template=twice.txt", "twice.txt", "twice"),
    # kinds of values, in our words
    ("seed=abc", "'seed'", "must be a whole number (it is 'abc')"),
    ("seed=1.5", "'seed'", "must be a whole number"),
    ("seed=99999999999999999999999", "'seed'", "must be less than"),
    ("name=", "'name'", "must be text"),
    ("world=3", "'world'", "must be a block of keys"),
    ("stages=[]", "'stages'", "must have at least 1 entry"),
    (f"{PPO}=5", "stages.3", "must be a block of keys"),
    (f"{PPO}.steps=-1", "stages.3.steps", "must be at least 1"),
    (f"{PPO}.steps=true", "stages.3.steps", "must not be true or false"),
    ("checkpoint.every=true", "checkpoint.every", "must not be true or false"),
    ("observe.tensorboard=maybe", "observe.tensorboard", "must be true or false"),
    (f"{PPO}.rollout.temperature=.inf", "temperature", "must be a finite number"),
    (f"{PPO}.rollout.temperature=0", "temperature", "must be more than 0"),
    (f"{ACTOR}.optimizer.beta2=1.5", "beta2", "must be at most 1"),
    (f"{ACTOR}.training.dtype=bf61", "dtype", "did you mean 'bf16'?"),
    ("world.timeout_s=.nan", "world.timeout_s", "must be a finite number"),
    # names and places
    ("name=.", "name=.", "names no folder of its own"),
    ("name=a//b", "name=a//b", "has an empty part"),
    ("runs=alink", "alink/quickstart", "a link to nothing"),
    ("runs=afile/deeper", "afile", "is a file, and no folder"),
    (f"{PPO}.name=a/b", "a/b", "has a slash"),
    (f"{PPO}.stepz=1", "stages.3.stepz", "did you mean 'steps'?"),
    ("stages.9.steps=1", "stages.9", "no such entry"),
    ("nonsense", "nonsense", "write key.path=value"),
    (f"{ACTOR}.model.tokenizer=builtin:nope", "builtin:nope", "use builtin:tiny"),
    (f"{ACTOR}.model={{hf: models/Nobody-1B}}", "models/Nobody-1B", "hf download OWNER/Nobody-1B"),
    (f"{ACTOR}.model.shape.heads=5", "quickstart.yaml:17", "no multiple of kv_heads"),
    ("judging.template=nosuch", "nosuch", "there is no file"),
    ("judging.template=afolder", "afolder", ""),
    ("judging.icc_momentum=2", "judging.icc_momentum", "must be at most 1"),
    ("task={kind: jsonl, path: none.jsonl, verifier: exact}", "none.jsonl", "no file"),
    ("task={kind: jsonl, path: afolder, verifier: exact}", "afolder", ""),
)  # fmt: skip

# Twenty of unlike kinds, found by a second look.
FURTHER = (
    (("run", "zero.yaml"), "zero.yaml:1", "a mapping of keys"),
    (("run", "utf16.yaml"), "utf16.yaml", "save it as UTF-8"),
    (("run", "tab.yaml"), "tab.yaml:2", "cannot start any token"),
    (("run", "double.yaml"), "double.yaml:2", "here twice"),
    (("run", "{recipe}", "--dry-run", "world.ranks=1000000000"), "world.ranks", "at most 65536"),
    (("run", "{recipe}", "--dry-run", "stages.ppo.steps=1e30"), "stages.3.steps", "a whole number"),
    (("run", "{recipe}", "--dry-run", "stages.3.name=reinforce"), "quickstart.yaml", "2 stages are called"),
    (("run", "{recipe}", "--dry-run", "roles.critic=null"), "roles.critic", "a block of keys"),
    (("run", "{recipe}", "--dry-run", "stages.0.role=acter"), "stages.0.role", "the roles are: actor"),
    (("run", "{recipe}", "--dry-run", "name=a\0b"), "name=a", "special characters are not allowed"),
    (("run", "{recipe}", "--dry-run", f"name={'x' * 300}"), "name=x", "longer than 200 bytes"),
    (("run", "{recipe}", "--dry-run", "cluster.gpu=h1000"), "cluster.gpu", "known are a100-40g"),
    (("run", "{recipe}", "--dry-run", "roles.actor.model={{hf: afolder}}"), "afolder", "config.json"),
    (("run", "rows.yaml", "--dry-run", "task.path=latin.yaml"), "latin.yaml", "UTF-8"),
    (("score", "gone.jsonl", "{recipe}", "--out", "o", "--p-bar", "0.5"), "gone.jsonl", "No such file"),
    (("score", "keys.jsonl", "{recipe}", "--out", "o", "--p-bar", "0.5"), "keys.jsonl:1", "no problem and"),
    (("score", "good.jsonl", "{recipe}", "--out", "o", "--p-bar", "0.5", "--url", "http://x/v1"), "--url",
     "name it by --model"),
    (("study", "{recipe}"), "quickstart.yaml", "is no key of a study"),
    (("study", "zero.yaml"), "zero.yaml", "must be a block of keys"),
    (("traces", "ask", "{recipe}", "--out", "o", "--stage", "nobody"), "stage nobody", "there are: "),
    (("parity", "nobody", "{recipe}"), "roles", "one of: actor, critic"),
    (("evaluate", "bank", "score", "nowhere", "{recipe}"), "nowhere", "genac evaluate bank build makes one"),
    (("evaluate", "bank", "build", "{recipe}", "--out", "afile"), "afile", "name another with --out"),
    (("evaluate", "bank", "build", "{recipe}", "--checkpoint", "nowhere", "--out", "o"), "nowhere",
     "a run folder"),
    # by a third look
    (("evaluate", "pass-rates", "{recipe}", "--out", "afile"), "afile", "name another with --out"),
    (("evaluate", "pass-rates", "{recipe}", "--out", "o", "--checkpoint", "nowhere"), "nowhere", "a run"),
    (("evaluate", "gradients", "{recipe}", "--out", "afile"), "afile", "name another with --out"),
    (("evaluate", "gradients", "{recipe}", "--out", "o", "--scalar", "nowhere"), "nowhere", "a run folder"),
    (("evaluate", "task", "math500", "{recipe}", "--out", "afile"), "afile", "name another with --out"),
    (("evaluate", "task", "math500", "{recipe}", "--out", "o", "--path", "gone"), "--path", "BENCHMARK=FILE"),
    (("traces", "ask", "{recipe}", "--out", "afile"), "afile", "name another with --out"),
    (("run", "rows.yaml", "--dry-run", "task={{kind: datasets, name: gone.parquet, verifier: exact}}"),
     "gone.parquet", "relative to the recipe"),
    (("run", "rows.yaml", "--dry-run", "task={{kind: datasets, name: math, path: gone/math}}"),
     "no file or folder gone/math", "relative to the recipe"),
    (("run", "rows.yaml", "--dry-run", "task.path=good.jsonl", 'task.verifier={{python: "./none.py:score"}}'),
     "none.py", "no function 'score'"),
    (("run", "rows.yaml", "--dry-run", "task.path=good.jsonl", "roles.actor.model.share={{a: 1}}"),
     "roles.actor.model.share", "must be text"),
    (("run", "rows.yaml", "--dry-run", "task.path=good.jsonl", "roles.actor.engine.share=[]"),
     "roles.actor.engine.share", "must be text"),
)  # fmt: skip
COMMANDS = (
    (("run", "nope.yaml"), "nope.yaml", "No such file"),
    (("run", "afolder"), "afolder", "Is a directory"),
    (("run", "broken.yaml"), "broken.yaml:2", "not YAML"),
    (("run", "list.yaml"), "list.yaml:1", "a mapping of keys"),
    (("run", "circle.yaml"), "circle.yaml", "in a circle"),
    (("run", "orphan.yaml"), "orphan.yaml:1", "there is no such file"),
    (("run", "latin.yaml"), "latin.yaml", "not UTF-8"),
    (("run", "{recipe}", "--resume", "name=never"), "runs/never", "without --resume"),
    (("run", "{recipe}", "roles.actor.model.checkpoint=nowhere"), "checkpoint, nowhere", "a run folder"),
    (("run", "{recipe}", "roles.actor.model.checkpoint=afile"), "checkpoint, afile", "a run folder"),
    (("report", "afile"), "afile", "the folder of a run"),
    (("report", "nowhere"), "nowhere", "the folder of a run"),
    (("status", "nowhere"), "nowhere", "the folder of a run"),
    (("inspect", "nowhere"), "nowhere", "a run folder"),
    (("convert", "to-hf", "nowhere", "x"), "nowhere", "a run folder"),
    (("convert", "to-megatron", "afile", "x"), "afile", "a local folder"),
    (("run", "rows.yaml", "--dry-run", "task.path=broken.jsonl"), "broken.jsonl:2", "JSON"),
    (("run", "rows.yaml", "--dry-run", "task.path=empty.jsonl"), "empty.jsonl", "no "),
    (("run", "rows.yaml", "--dry-run", "task.path=keys.jsonl"), "keys.jsonl:1", "'question'"),
    (("slurm", "{recipe}", "--dry-run", "cluster.time_limit=1h"), "time_limit", "hours:minutes:seconds"),
)  # fmt: skip

ROWS = """
name: rows
task: {kind: jsonl, path: x.jsonl, verifier: exact, heldout_size: 1}
roles:
  actor:
    model:
      family: qwen3
      tokenizer: "builtin:tiny"
      shape: {layers: 1, hidden: 32, ffn: 64, heads: 2, kv_heads: 2}
    training: {dtype: fp32}
    engine: {dtype: fp32}
stages: [{kind: policy, name: pg, steps: 1, algorithm: {kind: grpo}}]
"""
FILES = {
    "afile": "x",
    "bad.txt": "{problem} {partial} {actr}",
    "twice.txt": "{actor} {p_bar} {problem} {problem} {partial} {used} {limit}",
    "broken.jsonl": '{"question": "1+1?", "answer": "2"}\n{"question": \n',
    "empty.jsonl": "",
    "broken.yaml": "name: a\n  b: [\n",
    "list.yaml": "- name\n",
    "circle.yaml": "extends: circle.yaml\n",
    "keys.jsonl": '{"q": "1+1?", "answer": "2"}\n' * 3,
    "rows.yaml": ROWS,
    "orphan.yaml": "extends: gone.yaml\n",
    "zero.yaml": "",
    "none.py": "score = 3\n",
    "tab.yaml": "name: a\n\troles: 3\n",
    "double.yaml": "name: a\nname: b\n",
    "good.jsonl": '{"problem": "2+2?", "response": "4"}\n',
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "utf16.yaml").write_bytes("name: a\n".encode("utf-16"))
    (tmp_path / "latin.yaml").write_bytes("name: größe\n".encode("latin-1"))
    (tmp_path / "afolder").mkdir()
    os.symlink("gone", tmp_path / "alink")
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], place: str, said: str) -> None:
    assert cli.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("genac: error: ") == 1
    assert place in err
    assert said in err
    assert not [word for word in NOBODYS_WORDS if word in err], err
    assert len(err.splitlines()) <= 4
    assert sorted(path.name for path in Path.cwd().iterdir()) == sorted(
        [*FILES, "latin.yaml", "utf16.yaml", "afolder", "alink"]
    ), "nothing is begun"


@pytest.mark.parametrize(("override", "place", "said"), OVERRIDES, ids=[case[0] for case in OVERRIDES])
def test_a_bad_value(override: str, place: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ("run", str(RECIPE), "--dry-run", override), place, said)


ALL = (*COMMANDS, *FURTHER)


@pytest.mark.parametrize(("words", "place", "said"), ALL, ids=[" ".join(case[0])[:80] for case in ALL])
def test_a_bad_command(
    words: tuple[str, ...], place: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, tuple(word.format(recipe=RECIPE) for word in words), place, said)


@pytest.mark.parametrize("good", ["30", "1:30", "24:00:00", "3-12", "3-12:30:00", "UNLIMITED"])
def test_slurms_own_times(good: str) -> None:
    assert cli.load_recipe(RECIPE, [f"cluster.time_limit={good!r}"]).cluster.time_limit == good
