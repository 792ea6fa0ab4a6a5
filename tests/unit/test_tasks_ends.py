"""What ends a turn, what a chat template shows: folders as people have them, from the built-in tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from genac_megatron.conversion.assets import Assets
from genac_megatron.critic.prompt import _chat_frame
from genac_megatron.critic.traces import to_sample
from genac_megatron.errors import InputError
from genac_megatron.evaluation.bank import rendered_digest
from genac_megatron.evaluation.trial import _digest
from genac_megatron.models.families.base import Shape
from genac_megatron.models.registry import hf_config
from genac_megatron.recipe.schema import ModelConfig
from genac_megatron.records import Prompt
from genac_megatron.tasks.tokenizer import (
    TINY_FOLDER,
    chat_ids,
    completion_ids,
    load_tokenizer,
    prints_date,
    read_ends,
    role_tokenizer,
    stop_token_ids,
    without_opened,
)

PAD, ENDOFTEXT, IM_START, IM_END, NEW = 351, 352, 353, 354, 355
ASK = [{"role": "user", "content": "2+2?"}]


def folder(
    path: Path,
    *,
    eos: str | None = "<|im_end|>",
    generation: Any = None,
    config: Any = None,
    template: str | None = None,
    special: bool = True,
) -> Path:
    """The built-in tokenizer with a token <end_of_turn> more, and what else a folder says of ends."""
    shutil.copytree(TINY_FOLDER, path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": NEW, "content": "<end_of_turn>", "special": special, **flags})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((path / "tokenizer_config.json").read_text()) | {"eos_token": eos}
    if template is not None:
        settings.pop("chat_template", None)
        (path / "chat_template.jinja").write_text(template)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<end_of_turn>\n{% endfor %}"


@pytest.mark.parametrize(
    ("given", "taught", "stops"),
    [
        # generation_config has one more; several more; another than the tokenizer's.
        ({"generation": {"eos_token_id": [IM_END, NEW]}}, IM_END, {IM_END, NEW}),
        ({"generation": {"eos_token_id": [NEW, ENDOFTEXT]}, "eos": "<|endoftext|>"}, ENDOFTEXT, {NEW}),
        ({"generation": {"eos_token_id": NEW}}, NEW, {NEW, IM_END}),
        ({"generation": {"eos_token_id": 17}}, IM_END, {17, IM_END}),
        # As SmolLM2's: the tokenizer's eos opens turns.
        ({"generation": {"eos_token_id": IM_END}, "eos": "<|im_start|>"}, IM_END, {IM_END, IM_START}),
        ({"eos": "<|im_start|>"}, IM_END, {IM_END, IM_START}),
        ({"eos": "<|endoftext|>"}, IM_END, {IM_END, ENDOFTEXT}),
        ({"eos": None, "generation": {"eos_token_id": NEW}}, NEW, {NEW}),
        # A template whose turns end otherwise than the list's first.
        (
            {"generation": {"eos_token_id": [ENDOFTEXT, NEW]}, "template": TURNS},
            NEW,
            {ENDOFTEXT, NEW, IM_END},
        ),
        # No generation_config, or one that says nothing: config.json's, as transformers takes.
        ({"config": {"eos_token_id": [NEW]}}, NEW, {NEW, IM_END}),
        ({"config": {"eos_token_id": 2}}, IM_END, {IM_END}),
        ({"generation": {"top_p": 0.6}, "config": {"eos_token_id": [NEW, IM_END]}}, IM_END, {NEW}),
        ({"generation": {"eos_token_id": None}}, IM_END, {IM_END}),
    ],
)  # fmt: skip
def test_every_named_end_ends_a_turn_and_one_of_them_is_taught(
    tmp_path: Path, given: dict[str, Any], taught: int, stops: set[int]
) -> None:
    tokenizer = load_tokenizer(str(folder(tmp_path / "f", **given)))
    found = stop_token_ids(tokenizer)
    assert found[0] == tokenizer.eos_token_id == taught
    assert set(found) == stops | {ENDOFTEXT, IM_END}
    assert to_sample(tokenizer, (1, 2), "4").tokens[-1] == taught
    assert completion_ids(tokenizer, "4")[-1] == taught
    assert tokenizer.decode(completion_ids(tokenizer, "4"), skip_special_tokens=True) == "4"


def test_an_end_that_is_no_special_token_is_left_out_of_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(
        str(folder(tmp_path / "f", generation={"eos_token_id": [IM_END, NEW]}, special=False))
    )
    four = tokenizer.encode("4", add_special_tokens=False)
    assert tokenizer.decode([*four, NEW], skip_special_tokens=True) == "4"
    assert len(tokenizer) == NEW + 1


def test_a_models_folder_says_what_ends_a_turn_where_the_tokenizer_is_its_own_elsewhere(
    tmp_path: Path,
) -> None:
    model = folder(tmp_path / "model", generation={"eos_token_id": [NEW, IM_END]})
    bare = folder(tmp_path / "tokenizer")
    config = ModelConfig(hf=str(model), tokenizer=str(bare))
    tokenizer = role_tokenizer("actor", config)
    assert NEW in stop_token_ids(tokenizer, config.hf)
    assert tokenizer.eos_token_id == IM_END
    # Ids of a model with another tokenizer are other tokens' here.
    (model / "tokenizer.json").write_text((TINY_FOLDER / "tokenizer.json").read_text())
    assert NEW not in stop_token_ids(role_tokenizer("actor", config), config.hf)
    (model / "tokenizer.json").unlink()
    assert NEW in stop_token_ids(role_tokenizer("actor", config), config.hf)


@pytest.mark.parametrize("eos", ["</s>", [1, "</s>"], -1, True, {"a": 1}, 1.5])
def test_an_end_that_is_no_id_is_refused_by_file(tmp_path: Path, eos: Any) -> None:
    path = folder(tmp_path / "f", generation={"eos_token_id": eos})
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is"):
        load_tokenizer(str(path))
    (path / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json: cannot be read"):
        load_tokenizer(str(path))


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="names no eos_token"):
        load_tokenizer(str(folder(tmp_path / "f", eos=None)))


# --- exports -------------------------------------------------------------------------------------

SHAPE = Shape(
    family="llama", layers=1, hidden=8, ffn=8, heads=2, kv_heads=2, head_dim=4, vocab=NEW + 1, tie=True,
    rope_theta=1e4, norm_eps=1e-6, max_positions=64, init_std=0.02,
)  # fmt: skip


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {"eos": "<|im_start|>", "generation": {"eos_token_id": IM_END, "top_p": 0.9}},
        {"eos": "<|im_start|>"},
        {"eos": "<|endoftext|>"},
        {"eos": "<|im_start|>", "generation": {"eos_token_id": 2, "top_p": 0.9}},
        {"generation": {"top_p": 0.9}},
    ],
)
def test_an_export_stops_at_what_sft_teaches(
    tmp_path: Path, given: dict[str, Any], with_config: bool
) -> None:
    import torch

    config = hf_config(SHAPE) if with_config else None
    path = folder(tmp_path / "f", config=config, **given)
    out = tmp_path / "out"
    out.mkdir()
    Assets(path, path if with_config else None).write(out, SHAPE, torch.float32)
    taught = to_sample(load_tokenizer(str(path)), (), "4").tokens[-1]
    assert taught == IM_END
    assert taught in read_ends(out / "generation_config.json")
    assert load_tokenizer(str(out)).eos_token_id == taught
    if with_config and "generation" in given:
        assert json.loads((out / "generation_config.json").read_text())["top_p"] == 0.9


# --- chat templates ------------------------------------------------------------------------------

HEADER = "<|im_start|>assistant\n"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"
)
SWITCH = CHAT.replace(
    "OPEN",
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
)
DATED = "{{ date_string or strftime_now('%d %b %Y') }}\n" + CHAT.replace("OPEN", "")


@pytest.mark.parametrize(
    ("opened", "written", "whole"),
    [
        ("<think>\n", "<think>\n2+2 is 4\n</think>\n4", "<think>\n2+2 is 4\n</think>\n4"),
        ("<think>\n", "\n<think>2+2 is 4</think>4", "<think>\n2+2 is 4</think>4"),
        ("<think>\n", "2+2 is 4\n</think>\n4", "<think>\n2+2 is 4\n</think>\n4"),
        ("<think>", "<think>\n2+2\n</think>4", "<think>\n2+2\n</think>4"),
        ("<reason>\n", "<reason>\n2+2\n</reason>4", "<reason>\n2+2\n</reason>4"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n4", "<think>\n\n</think>\n\n4"),
        ("<think>\n\n</think>\n\n", "4", "<think>\n\n</think>\n\n4"),
        ("", "<think>\n2+2\n</think>\n4", "<think>\n2+2\n</think>\n4"),
        ("", "assistant\n4", "assistant\n4"),
    ],
)
def test_what_the_prompt_opens_is_not_doubled(tmp_path: Path, opened: str, written: str, whole: str) -> None:
    tokenizer = load_tokenizer(str(folder(tmp_path / "f", template=CHAT.replace("OPEN", opened))))
    sample = to_sample(tokenizer, chat_ids(tokenizer, ASK), written)
    text = tokenizer.decode(sample.tokens)
    assert text == f"<|im_start|>user\n2+2?<|im_end|>\n{HEADER}{whole}<|im_end|>"
    assert tokenizer.decode(sample.tokens[: sample.start]).endswith(HEADER + opened)


def test_a_thought_behind_a_closed_one_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(
        str(folder(tmp_path / "f", template=CHAT.replace("OPEN", "<think>\n\n</think>\n\n")))
    )
    with pytest.raises(InputError, match=r"2\+2 is 4(.|\n)*chat_template_kwargs"):
        without_opened(tokenizer, chat_ids(tokenizer, ASK), "<think>\n2+2 is 4\n</think>\n4")
    with pytest.raises(InputError, match=r"^rows\.jsonl:7: an answer begins with <think>"):
        to_sample(tokenizer, chat_ids(tokenizer, ASK), "<think>\n2+2\n</think>\n4", where="rows.jsonl:7")


def test_variables_of_a_chat_template_reach_every_prompt(tmp_path: Path) -> None:
    path = folder(tmp_path / "f", template=SWITCH)
    config = ModelConfig(hf=str(path), chat_template_kwargs={"enable_thinking": False})
    tokenizer, plain = role_tokenizer("actor", config), load_tokenizer(str(path))
    assert tokenizer.decode(chat_ids(tokenizer, ASK)).endswith(HEADER + "<think>\n\n</think>\n\n")
    assert tokenizer.decode(chat_ids(plain, ASK)).endswith(HEADER)
    assert tokenizer.decode(_chat_frame(tokenizer).tail).endswith(HEADER + "<think>\n\n</think>\n\n")
    assert tokenizer.decode(_chat_frame(plain).tail).endswith(HEADER)


@pytest.mark.parametrize(
    "value", [True, None, 3, -1.5, 'it\'s "so" %} {{ x }} \\n é 😀', ["a", {"b": None}], {"k": [1, False]}]
)
def test_a_variable_keeps_its_value(tmp_path: Path, value: Any) -> None:
    path = folder(tmp_path / "f", template="{{ note | tojson }}")
    tokenizer = load_tokenizer(str(path), None, {"note": value})
    assert json.loads(tokenizer.apply_chat_template(ASK, tokenize=False)) == value


@pytest.mark.parametrize(
    "template", ["\n {{ a }}", "  {% if a %}\n x{% endif %}\n", "{{ a }}", "\n\n{%- set b = a %}{{ b }}"]
)
def test_a_variable_changes_nothing_else_of_a_template(tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(str(folder(tmp_path / "f", template=template)))
    wanted = tokenizer.apply_chat_template(ASK, tokenize=False, a="yes")
    held = load_tokenizer(str(tmp_path / "f"), None, {"a": "yes"})
    assert held.apply_chat_template(ASK, tokenize=False) == wanted


@pytest.mark.parametrize("name", ["enable_thinkng", "messages", "add_generation_prompt", "is", "a b"])
def test_a_variable_that_the_template_does_not_read_is_refused(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "f", template=SWITCH)
    with pytest.raises(InputError, match=f"chat_template_kwargs sets '{name}'"):
        load_tokenizer(str(path), None, {name: False})


def test_a_template_that_prints_the_date_is_found_and_can_be_held(tmp_path: Path) -> None:
    path = folder(tmp_path / "f", template=DATED)
    assert prints_date(load_tokenizer(str(path)))
    held = load_tokenizer(str(path), None, {"date_string": "26 Jul 2024"})
    assert not prints_date(held)
    assert held.decode(chat_ids(held, ASK)).startswith("26 Jul 2024\n")
    for other in ("builtin:tiny", str(folder(tmp_path / "g", template=SWITCH))):
        assert not prints_date(load_tokenizer(other))
    unused = "{% if tools %}{{ strftime_now('%d') }}{% endif %}" + SWITCH
    assert not prints_date(load_tokenizer(str(folder(tmp_path / "h", template=unused))))


def test_a_plans_digest_holds_what_was_rendered(tmp_path: Path) -> None:
    path = folder(tmp_path / "f", template=DATED)
    days = []
    for day in ("26 Jul 2024", "27 Jul 2024"):
        tokenizer = load_tokenizer(str(path), None, {"date_string": day})
        days.append(Prompt("p", tuple(ASK), "2+2?", "4", chat_ids(tokenizer, ASK)))
    assert _digest(days[:1]) != _digest(days[1:])
    assert _digest(days[:1]) == _digest(days[:1])
    assert rendered_digest([days[0].ids]) != rendered_digest([days[1].ids])
