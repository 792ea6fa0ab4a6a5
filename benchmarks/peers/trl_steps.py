"""TRL's half of benchmarks/vs_trl.py, run by the interpreter of TRL's own environment: nothing of ours.

Reads settings as JSON from its argument. Prints seconds and sampled tokens per step, and peak_gib, as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


class Clock(TrainerCallback):
    """Seconds between the ends of steps: sampling, log-probs and the update are all inside."""

    def __init__(self) -> None:
        self.last, self.seconds = 0.0, []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(given["seed"])
    tokenizer = AutoTokenizer.from_pretrained(given["model"], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    prompts = json.loads(Path(given["prompts"]).read_text())
    counted: list[int] = []

    def reward(
        completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        counted.append(sum(len(ids) for ids in completion_ids))
        return [float(wanted in text) for text, wanted in zip(completions, answer, strict=True)]

    Config, Trainer = (GRPOConfig, GRPOTrainer) if given["algorithm"] == "grpo" else (RLOOConfig, RLOOTrainer)
    batch = given["count"] * given["samples"]
    config = Config(
        output_dir=given["out"],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_generations=given["samples"],
        max_completion_length=given["new_tokens"],
        max_steps=given["steps"],
        learning_rate=given["lr"],
        lr_scheduler_type="constant",
        temperature=1.0,
        top_k=0,
        beta=0.0,  # no reference model, as on our side
        num_iterations=1,
        gradient_checkpointing=False,  # its default saves memory and costs time
        save_strategy="no",
        logging_steps=1_000_000,
        report_to=[],
        disable_tqdm=True,
        seed=given["seed"],
    )
    clock = Clock()
    trainer = Trainer(
        model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer, callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": clock.seconds, "tokens": counted, "peak_gib": peak}))


if __name__ == "__main__":
    main()
