"""A recipe's chat template, per role; reasoning told apart from answers in actor's and critic's texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from genac_megatron.conversion.assets import Assets
from genac_megatron.critic.prompt import _chat_frame
from genac_megatron.critic.score import parse_score
from genac_megatron.errors import InputError
from genac_megatron.models.registry import hf_config, shape_of
from genac_megatron.recipe.schema import ModelConfig, ModelShape
from genac_megatron.recipe.tasks import JsonlTask
from genac_megatron.tasks import make_task
from genac_megatron.tasks.reasoning import opened_reasoning, usual, written
from genac_megatron.tasks.tokenizer import TINY_FOLDER, chat_ids, load_tokenizer, role_tokenizer

ASK = [{"role": "user", "content": "2+2?"}]
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
OPENING = PLAIN.replace("assistant:", "assistant: <scratch>\n")
OWN = ("<scratch>", "</scratch>")
FIVE = {"layers": 1, "hidden": 8, "ffn": 8, "heads": 1, "kv_heads": 1}


def base(path: Path) -> str:
    """The built-in tokenizer without a chat template, as base models have it."""
    shutil.copytree(TINY_FOLDER, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").unlink(missing_ok=True)
    return str(path)


def test_a_base_model_has_the_recipes_template_by_text_and_by_file(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    with pytest.raises(InputError, match=r"no chat template(.|\n)*model\.chat_template"):
        chat_ids(load_tokenizer(folder), ASK)
    with pytest.raises(InputError, match=r"roles\.critic\.model\.chat_template"):
        _chat_frame(load_tokenizer(folder))
    (tmp_path / "plain.jinja").write_text(PLAIN)
    for given in (PLAIN, str(tmp_path / "plain.jinja")):
        tokenizer = role_tokenizer("actor", ModelConfig(tokenizer=folder, chat_template=given))
        assert tokenizer.decode(chat_ids(tokenizer, ASK)) == "user: 2+2?\nassistant:"
        assert tokenizer.decode(_chat_frame(tokenizer).tail) == "\nassistant:"


def test_a_recipes_template_takes_the_place_of_the_folders_and_has_variables(tmp_path: Path) -> None:
    switch = PLAIN.replace("assistant:", "assistant:{{ ' /no_think' if not thinking }}")
    config = ModelConfig(
        tokenizer="builtin:tiny", chat_template=switch, chat_template_kwargs={"thinking": False}
    )
    tokenizer = role_tokenizer("critic", config)
    assert tokenizer.decode(chat_ids(tokenizer, ASK)) == "user: 2+2?\nassistant: /no_think"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "nowhere.jinja",
            r"model\.chat_template: cannot read the chat template nowhere\.jinja: No such file",
        ),
        ("{% for m in %}", r"model\.chat_template: the chat template cannot be read"),
        ("{{ message }}", r"does not read `messages`(.|\n)*for example"),
    ],
)
def test_what_is_no_template_is_refused(given: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_tokenizer("builtin:tiny", None, None, given)


def test_a_converted_folder_has_the_recipes_template(tmp_path: Path) -> None:
    folder = Path(base(tmp_path / "base"))
    shape = shape_of(ModelConfig(family="llama", shape=ModelShape(**FIVE), tokenizer=str(folder)), 355)
    (tmp_path / "out").mkdir()
    import torch

    Assets(folder, None, PLAIN).write(tmp_path / "out", shape, torch.bfloat16)
    assert hf_config(shape)
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.decode(chat_ids(tokenizer, ASK)) == "user: 2+2?\nassistant:"


def test_a_converted_folder_has_the_recipes_template_variables(tmp_path: Path) -> None:
    """With them its prompts are those that the model was trained on."""
    folder = Path(base(tmp_path / "base"))
    shape = shape_of(ModelConfig(family="llama", shape=ModelShape(**FIVE), tokenizer=str(folder)), 355)
    (tmp_path / "out").mkdir()
    import torch

    template = "{{ mode | default('plain') }}: {{ messages[0].content }}"
    Assets(folder, None, template, {"mode": "brief"}).write(tmp_path / "out", shape, torch.bfloat16)
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.decode(chat_ids(tokenizer, ASK)) == "brief: 2+2?"


@pytest.mark.parametrize(
    ("text", "opened", "value"),
    [
        ("so <answer>7</answer>", False, 0.7),
        ("<think>first <answer>9</answer></think>\nno: <answer>2</answer>", False, 0.2),
        ("<think>it is <answer>9</answer></think>", False, None),
        ("<think>it is <answer>9</answer>", False, None),  # cut off while it reasons
        ("it is <answer>9</answer>", True, None),  # likewise, the template having opened it
        ("hm </think><answer>3</answer>", True, 0.3),
        ("<answer>3</answer> [THINK] or [/THINK] <answer>4</answer>", False, 0.4),
    ],
)
def test_a_critics_score_stands_after_its_reasoning(text: str, opened: bool, value: float | None) -> None:
    assert parse_score(text, opened) == value


def test_a_models_own_tags_are_read_for_answer_and_score(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("builtin:tiny", None, None, OPENING)
    assert opened_reasoning(tokenizer, chat_ids(tokenizer, ASK), OWN)
    assert not opened_reasoning(tokenizer, chat_ids(tokenizer, ASK))
    assert parse_score(usual("<answer>9</answer></scratch><answer>1</answer>", OWN), opened=True) == 0.1
    rows = "".join(json.dumps({"question": f"{n}+1?", "answer": str(n + 1)}) + "\n" for n in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    config = JsonlTask(
        kind="jsonl",
        path=str(tmp_path / "rows.jsonl"),
        verifier="exact",
        heldout_size=2,
        answer_forms=["tag"],
    )
    cases = ["<answer>{}</answer></scratch>", "<answer>0</answer></scratch>\n<answer>{}</answer>"]
    for tags, wanted in ((OWN, [0.0, 1.0]), (None, [1.0, 1.0])):
        task = make_task(config, tokenizer, 0, reasoning_tags=tags)
        prompt = task.prompt("train", 0)
        assert [task.verify(prompt, case.format(prompt.reference)) for case in cases] == wanted
        task.close()


def test_tags_that_are_special_tokens_are_kept_in_what_is_read(tmp_path: Path) -> None:
    from transformers import AddedToken

    tokenizer = load_tokenizer("builtin:tiny")
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("[THINK]", "[/THINK]", "<pause>")],
        special_tokens=True,
    )
    ids = tokenizer.encode("[THINK]9<pause>[/THINK]<answer>4</answer><|im_end|>", add_special_tokens=False)
    assert written(tokenizer, ids) == "[THINK]9[/THINK]<answer>4</answer>"
    assert written(tokenizer, ids, ("<pause>", "</pause>")) == "[THINK]9<pause>[/THINK]<answer>4</answer>"
    assert parse_score(written(tokenizer, ids)) == 0.4
