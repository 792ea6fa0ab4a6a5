"""The built-in tokenizer: any text, cheap words, the files as the tool makes them."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genac_megatron.errors import InputError
from genac_megatron.tasks.tokenizer import (
    TINY_FOLDER,
    chat_ids,
    completion_ids,
    load_tokenizer,
    stop_token_ids,
)

TINY = load_tokenizer("builtin:tiny")
TOOL = Path(__file__).parents[2] / "tools" / "make_tiny_tokenizer.py"


def pieces(text: str) -> list[str]:
    return [TINY.decode([token]) for token in TINY.encode(text, add_special_tokens=False)]


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(text: str) -> None:
    ids = TINY.encode(text, add_special_tokens=False)
    assert TINY.decode(ids, skip_special_tokens=False) == text


@given(st.text(alphabet="<|>im_endstar pad/asw10 \n", max_size=40))
@settings(max_examples=300, deadline=None)
def test_text_about_special_tokens_round_trips(text: str) -> None:
    assert TINY.decode(TINY.encode(text, add_special_tokens=False)) == text


def test_each_number_and_word_of_the_brief_form_is_cheap() -> None:
    assert pieces("<answer>7</answer>") == ["<answer>", "7", "</answer>"]
    assert pieces("<answer>10</answer>") == ["<answer>", "10", "</answer>"]
    assert pieces("judge actor p 0.10 step 123") == [
        *("judge", " actor", " p", " 0", ".", "1", "0", " step", " 1", "2", "3"),
    ]
    assert pieces("10 ac : a d\n") == ["10", " ac", " :", " a", " d", "\n"]
    assert pieces("left 2 ok bad") == ["left", " 2", " ok", " bad"]


def test_sizes_and_special_tokens() -> None:
    assert len(TINY) <= 448
    assert TINY.eos_token == "<|im_end|>"
    assert TINY.pad_token == "<pad>"
    ids = {TINY.convert_tokens_to_ids(t) for t in ("<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    assert len(ids) == 4
    assert stop_token_ids(TINY)[0] == TINY.eos_token_id


def test_chat_and_completion_ids() -> None:
    ids = chat_ids(TINY, ({"role": "user", "content": "start a b"},))
    assert TINY.decode(ids) == "<|im_start|>user\nstart a b<|im_end|>\n<|im_start|>assistant\n"
    assert TINY.decode(completion_ids(TINY, "answer a b")) == "answer a b<|im_end|>"


def test_files_are_what_the_tool_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(TOOL), str(tmp_path)], check=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in TINY_FOLDER.iterdir())
    assert filecmp.cmpfiles(tmp_path, TINY_FOLDER, names, shallow=False)[0] == names


def test_bad_specs_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="builtin:tiny"):
        load_tokenizer("builtin:huge")
    with pytest.raises(InputError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_needs_somebodys_code_is_refused_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "tokenizer_class": "TheirTokenizer",
        "auto_map": {"AutoTokenizer": ["theirs.TheirTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.setattr("builtins.input", lambda *shown: pytest.fail(f"asked: {shown}"))
    with pytest.raises(InputError, match="cannot load a tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "is not run here" in caught.value.way_out


def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path) -> None:
    plain = load_tokenizer("builtin:tiny")
    plain.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        chat_ids(plain, ({"role": "user", "content": "x"},))
