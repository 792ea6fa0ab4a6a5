"""What SFT teaches: the ids behind the prompt where both are one text, as the chat template writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, normalizers
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from genac_megatron.critic.traces import to_sample
from genac_megatron.tasks.tokenizer import chat_ids, chat_text, load_tokenizer, reply_lead
from tests.unit.test_critic_score import merging

PIECES = ("▁so", "so", "▁▁", "\n", "1")
TEMPLATES = {
    "llama 2": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "behind a special token": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "no lead": "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
}


def spaced(path: Path, template: str, kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of Llama 2's kind, with <assistant> as a special token."""
    inner = merging(PIECES)
    if kind == "first":
        inner.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    inner.add_special_tokens([AddedToken("<assistant>", special=True, normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(path)
    (path / "chat_template.jinja").write_text(template)
    return load_tokenizer(str(path))


@pytest.mark.parametrize("kind", ["every", "first", "none"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("reply", ["so it is 11", "11", "(so)"])
def test_a_reply_has_the_ids_that_it_has_in_the_whole_text(
    tmp_path: Path, kind: str, name: str, reply: str
) -> None:
    if kind == "none":
        tokenizer = load_tokenizer("builtin:tiny")
        tokenizer.chat_template = TEMPLATES[name]
    else:
        tokenizer = spaced(tmp_path / "t", TEMPLATES[name], kind)
    asked = [{"role": "user", "content": "5+6?"}]
    prompt = chat_ids(tokenizer, asked)
    sample = to_sample(tokenizer, prompt, reply)
    text = chat_text(tokenizer, [*asked, {"role": "assistant", "content": reply}], generation=False)
    text = text[: text.rindex(reply) + len(reply)]
    assert sample.tokens[:-1] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sample.tokens[: sample.start] == list(prompt)
    assert sample.tokens[-1] == tokenizer.eos_token_id


def test_the_lead_is_the_templates_own() -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    assert reply_lead(tokenizer) == ""
    tokenizer.chat_template = TEMPLATES["llama 2"]
    assert reply_lead(tokenizer) == " "
    # One that writes an empty thought before a reply, and not behind its generation prompt.
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ '<think>' if m.role == 'assistant' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert reply_lead(tokenizer) == ""
