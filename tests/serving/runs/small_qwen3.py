"""A small model in Qwen3's format that can do both roles' work: folder, tokenizer, template and weights.

It is taught in seconds, so that a recipe's own gates can pass. Its actor counts the things, and is
right, or guesses, and is wrong; its first line says which, and its critic knows what that means.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from genac_megatron.critic.icc import IccState
from genac_megatron.critic.prompt import prompt_text
from genac_megatron.recipe.schema import JudgingConfig
from genac_megatron.records import Prompt
from genac_megatron.tasks.questions import BOXED

THINGS = ("pens", "cups", "keys")
NAMES = ("Tom", "Ann", "Bo")
COUNTS = range(2, 6)
SHORT, WHOLE, WINDOW, LR = 140, 110, 110, 8e-3  # steps on ends, on whole samples; tokens of an end
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<think>", "</think>")  # in Qwen3's tokenizer they are tokens, and not special
# Qwen3's, as far as one turn goes: thinking is on unless it is switched off, by an empty thought.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def questions(count: int, seed: int) -> list[dict[str, str]]:
    """Rows as GSM8K's: the final answer stands behind ####."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        name, thing, many = draw.choice(NAMES), draw.choice(THINGS), draw.choice(COUNTS)
        text = f"{name} has {many} {thing} in box {number}. How many {thing} has {name}?"
        rows.append({"question": text, "answer": f"{name} has {many}.\n#### {many}"})
    return rows


def lesson(judging: JudgingConfig, draw: random.Random) -> tuple[str, str]:
    """(what a role is asked, what it answers)."""
    row = questions(1, draw.randrange(10**9))[0]
    right = row["answer"].rpartition(" ")[2]
    counts = draw.random() < 0.6
    said = right if counts else str(draw.choice([many for many in COUNTS if str(many) != right]))
    how = "I count them one by one" if counts else "I just guess it now"
    lines = [f"{how}.\n", f"So it is \\boxed{{{said}}}."]
    if draw.random() < 0.5:
        return f"{row['question']}\n\n{BOXED}", "".join(lines)
    shown = draw.randrange(len(lines) + 1)
    score = (6 if not shown else 9 if counts else 1) + draw.randint(-1, 1)
    told = IccState(draw.random(), draw.randrange(3), actor="actor")
    problem, partial = Prompt("", (), row["question"], None), "".join(lines[:shown])
    limit = draw.randrange(24, 100)
    asked = prompt_text(judging, told, problem, partial, shown and draw.randrange(5, 24), limit)
    return "".join(asked), f"It {'goes well' if score > 5 else 'went wrong'}.\n<answer>{score}</answer>"


def make_tokenizer(folder: Path, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the texts, with Qwen3's names."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(MARKS))
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make_model(folder: Path, seed: int = 0, *, taught: bool = True) -> None:
    """config.json, safetensors, tokenizer and generation_config.json of a taught model: 25 s of a core."""
    draw, judging = random.Random(seed), JudgingConfig()
    lessons = [lesson(judging, draw) for _ in range(2000)]
    tokenizer = make_tokenizer(folder, [text for pair in lessons[:200] for text in pair])
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        max_position_embeddings=2048, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if not taught:
        config.architectures = [Qwen3ForCausalLM.__name__]
        config.save_pretrained(folder)
        return
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=SHORT + WHOLE, pct_start=0.1)
    samples = [_encoded(tokenizer, *pair, number % 2 == 0) for number, pair in enumerate(lessons)]
    for step in range(SHORT + WHOLE):  # what they go by is near their ends: most steps have these alone
        room, size = (WINDOW, 16) if step < SHORT else (10**6, 8)
        batch = [
            (ids[-room:], max(at - max(0, len(ids) - room), 0)) for ids, at in draw.sample(samples, size)
        ]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [tokenizer.pad_token_id] * (longest - len(i)) for i, _ in batch])
        labels = torch.tensor([[-100] * at + i[at:] + [-100] * (longest - len(i)) for i, at in batch])
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)


def _encoded(
    tokenizer: PreTrainedTokenizerFast, asked: str, answer: str, thinks: bool
) -> tuple[list[int], int]:
    """Ids of both, and where the answer begins: behind an empty thought, unless it may think."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True,
        enable_thinking=thinks,
    )  # fmt: skip
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids + tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False), len(ids)


def make_place(folder: Path, model: str, train: int = 64, heldout: int = 16, *, taught: bool = True) -> None:
    """A folder to run recipes from: models/MODEL, and GSM8K's form of data under its name.

    taught: else there are no weights, which dry runs do not look at.
    """
    make_model(folder / "models" / model, taught=taught)
    data = folder / "openai" / "gsm8k" / "main"
    data.mkdir(parents=True)
    for split, count, seed in (("train", train, 1), ("test", heldout, 2)):
        rows = "".join(json.dumps(row) + "\n" for row in questions(count, seed))
        (data / f"{split}.jsonl").write_text(rows)
    files = "".join(f"  - split: {split}\n    path: main/{split}.jsonl\n" for split in ("train", "test"))
    head = f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n"
    (folder / "openai" / "gsm8k" / "README.md").write_text(head)
