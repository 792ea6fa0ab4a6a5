"""Make the tokenizer that `builtin:tiny` names: byte-level, a few whole words, a short chat template.

    python tools/make_tiny_tokenizer.py [FOLDER]

The vocabulary is the 256 bytes, whole words of the built-in task and of the critic's brief template,
and the special tokens. There are no merges: a pre-token that is in the vocabulary is one token
(`ignore_merges`), any other is spelled in bytes. So any text encodes and round-trips, and the files
depend on nothing but this script.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

DEFAULT_FOLDER = Path(__file__).parents[1] / "genac_megatron" / "tasks" / "tiny_tokenizer"

SPECIALS = ("<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
OBJECTS = tuple(f" {letter}" for letter in "abcdefgh")
PAIRS = tuple(f" {first}{second}" for first, second in combinations("abcdefgh", 2))
DIGITS = tuple(f" {digit}" for digit in range(10))
WORDS = (
    *OBJECTS,
    *PAIRS,
    *DIGITS,
    "10",
    " 10",
    # state tracking: problem, response, trace
    *("start", "swaps", " :", "answer", " answer", "left", " left", " ok", " bad", " part"),
    *("step", " row", "has"),
    # chat roles
    *("user", "assistant", "system"),
    # the critic's brief template and its answer
    *("judge", " judge", " actor", " critic", " p", " step", " used", " of", "verdict", " verdict"),
    *("<answer>", "</answer>", "problem", "response", "score", " score", " value", "value"),
    # arithmetic and a little English, for other small tasks
    *(" =", " +", " -", " *", " /", " the", " is", " to", " and", " in", " swap", "swap", " line"),
)

# A ten that stands alone is one token; the digits of any other number are one token each.
PRE_TOKENS = r" ?(?<![\d.])10(?![\d.])|</?[a-z]+>| ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    """The tokenizer itself, specials last so that byte ids stay 0-255."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [byte_level.pre_tokenize_str(word)[0][0] for word in WORDS]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    if len(set(pieces)) != len(pieces):
        raise ValueError("WORDS holds a word twice, or a single byte")
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write the Hugging Face tokenizer files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    write_tokenizer(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER)
