"""Make the conversations that recipes/environments teaches its small models by: scripted players play.

    python tools/make_played_data.py [FOLDER]

simon.jsonl: of three rows two are said right. guess.jsonl: any number of those that can still be it. The
texts are the environments' own, so this needs what plays them: GENAC_ENVIRONMENTS_PYTHON, as
`make environments-env` prints it. Their conversations are of training prompts alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genac_megatron.environments import Environments, make_environment
from genac_megatron.environments.host import Job, digest
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.records import Prompt
from genac_megatron.tasks import make_task

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "environments"
COUNT = 160
SLIPS = 1 / 3
Message = dict[str, str]
Player = Callable[[Sequence[Message], random.Random], str]


def simon(messages: Sequence[Message], rng: random.Random) -> str:
    """The row so far; now and then its last letter is any."""
    row = [message["content"] for message in messages if message["role"] == "user"]
    return " ".join([*row[:-1], rng.choice("abcd") if rng.random() < SLIPS else row[-1]])


def guesser(messages: Sequence[Message], rng: random.Random) -> str:
    """Any number that the hints leave."""
    low, high = 1, 20
    for said, answered in zip(messages[1::2], messages[2::2], strict=True):
        guess = int(said["content"].strip("[]"))
        low, high = (low, guess - 1) if "lower" in answered["content"] else (guess + 1, high)
    return f"[{rng.randint(low, high)}]"


async def played(
    environment: Environments, prompt: Prompt, player: Player, rng: random.Random
) -> list[Message]:
    """A conversation, up to the player's last turn."""
    messages, turns, seen = [dict(message) for message in prompt.messages], list[str](), list[str]()
    while True:
        turns.append(player(messages, rng))
        messages.append({"role": "assistant", "content": turns[-1]})
        answer = await environment.ask(Job(prompt.id, prompt, 0, tuple(turns), digest(None), tuple(seen)))
        if answer.step is None:
            raise SystemExit(f"{prompt.id}: the environment {answer.failure}")
        if answer.step.done:
            return messages
        seen.append(digest(answer.step.messages))
        messages += [{"role": role, "content": text} for role, text in answer.step.messages]


def make(recipe_name: str, file: Path, player: Player) -> None:
    (FOLDER / file.name).touch()  # which the recipe names
    recipe = load_recipe(FOLDER / recipe_name)
    assert recipe.environment is not None
    task = make_task(recipe.task, None, recipe.seed)
    environment = make_environment(recipe.environment, recipe.task, recipe.seed)
    rng = random.Random(71)
    try:
        prompts = [task.prompt("train", number % task.train_size) for number in range(COUNT)]
        lines = [asyncio.run(played(environment, prompt, player, rng)) for prompt in prompts]
    finally:
        environment.close()
        task.close()
    file.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if arguments else FOLDER
    make("verifiers.yaml", folder / "simon.jsonl", simon)
    make("textarena.yaml", folder / "guess.jsonl", guesser)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
