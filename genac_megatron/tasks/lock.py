"""Locks: a hidden code is found by trying, a symbol in each turn. A game of many turns with an exact teacher.

    lock 17 : 3 of a b in 8      the problem: its number, the code's length, its symbols, the turns there are
    a                            a turn of the actor's: the symbol that it tries next
    step 1 ok left 7             the answer: how many of the code stand now, whether it was right, turns left
    b
    step 0 bad left 6            a wrong one throws everything back

The code is hidden, and an answer says no more than whether a symbol was right: a player has to remember what
it has found, and what it has tried. Values are exact: of a player that plays right with a known chance in
each turn, and else names any symbol, the chance to open the lock follows by dynamic programming over what it
can know (`chance`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from genac_megatron.escaping import read_transcript
from genac_megatron.recipe.tasks import LockTask
from genac_megatron.records import Prompt
from genac_megatron.tasks.base import GeneratedTask, Problem, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = "abcdefgh"
BISECTIONS = 40  # of the chance to play right: to 1e-12


@dataclass(frozen=True)
class Lock:
    """The parsed problem."""

    number: int
    length: int
    symbols: tuple[str, ...]
    turns: int

    def text(self) -> str:
        return f"lock {self.number} : {self.length} of {' '.join(self.symbols)} in {self.turns}"


def parse_lock(text: str) -> Lock:
    """The lock that `Lock.text` wrote."""
    words = text.split()
    return Lock(int(words[1]), int(words[3]), tuple(words[5:-2]), int(words[-1]))


def answer(stands: int, right: bool, left: int) -> str:
    """What a try is answered with: how many symbols of the code stand, and how many turns are left."""
    return f"step {stands} {'ok' if right else 'bad'} left {left}"


@dataclass
class Known:
    """What a player of a lock can know after the turns it has had."""

    lock: Lock
    stands: int = 0  # symbols of the code that stand now
    found: list[str] = field(default_factory=list)  # the code's first symbols
    tried: set[str] = field(default_factory=set)  # wrong ones behind those
    left: int = 0

    def __post_init__(self) -> None:
        self.left = self.left or self.lock.turns

    def learn(self, said: str, right: bool) -> None:
        """A try and whether it was right."""
        self.left -= 1
        at_edge = self.stands == len(self.found)
        if right:
            if at_edge:
                self._find(said)
            self.stands += 1
            return
        if at_edge and said in self.lock.symbols:
            self.tried.add(said)
            rest = [symbol for symbol in self.lock.symbols if symbol not in self.tried]
            if len(rest) == 1:
                self._find(rest[0])
        self.stands = 0

    def _find(self, symbol: str) -> None:
        self.found.append(symbol)
        self.tried = set()

    def good(self) -> list[str]:
        """The symbols that a player who plays right chooses from."""
        if self.stands < len(self.found):
            return [self.found[self.stands]]
        return [symbol for symbol in self.lock.symbols if symbol not in self.tried]

    def chance(self, skill: float) -> float:
        """That the lock is opened from here on, by a player who plays right with the chance `skill`."""
        shape = len(self.lock.symbols), self.lock.length
        return chance(*shape, skill, self.stands, len(self.found), len(self.tried), self.left)


@lru_cache(maxsize=1 << 16)
def chance(symbols: int, length: int, skill: float, stands: int, found: int, tried: int, left: int) -> float:
    """The chance to open a lock in `left` turns: `stands` of the code's `length` symbols stand, `found` are
    known, and of the next one `tried` that it is not.

    Each turn the player, with the chance `skill`, names the known symbol, or any that may be right; else any.
    """
    if stands == length:
        return 1.0
    if left == 0:
        return 0.0

    def after(stands: int, found: int, tried: int) -> float:
        return chance(symbols, length, skill, stands, found, tried, left - 1)

    slip = 1.0 - skill
    if stands < found:
        right = skill + slip / symbols
        return right * after(stands + 1, found, tried) + (1.0 - right) * after(0, found, tried)
    open_ = symbols - tried  # that may be right
    right = skill / open_ + slip / symbols
    fresh = (open_ - 1) * right  # each of these is named as often as the right one
    stale = 1.0 - right - fresh  # tried before
    learnt = after(0, found + 1, 0) if open_ == 2 else after(0, found, tried + 1)
    return right * after(stands + 1, found + 1, 0) + fresh * learnt + stale * after(0, found, tried)


class LockTeacher(Teacher):
    """Plays, and judges by what a player can know; never sees a code."""

    plays = True

    def __init__(self, config: LockTask) -> None:
        self.slip_rate, self._config = config.slip_rate, config

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        raise NotImplementedError("a lock is played in turns: `turn`")

    def turn(self, prompt: Prompt, partial: str, rng: random.Random) -> str:
        """A right try, or with the chance `slip_rate` any."""
        known, _ = survey(prompt, partial)
        slips = rng.random() < self.slip_rate
        return rng.choice(list(known.lock.symbols) if slips else known.good())

    def trace(self, prompt: Prompt, partial: str, p_bar: float, rng: random.Random) -> tuple[str, int]:
        """What stands, what is known, turns left, and the exact value in tenths.

        step 1 of 3 left 5
        row a b has c
        """
        known, _ = survey(prompt, partial)
        row, tried = " ".join(known.found) or "-", " ".join(sorted(known.tried)) or "-"
        words = f"step {known.stands} of {known.lock.length} left {known.left}\nrow {row} has {tried}"
        return words, round(10 * self.value(prompt, partial, p_bar))

    def value(self, prompt: Prompt, partial: str, p_bar: float) -> float:
        """Exact, of a player who opens as many locks of the task as `p_bar` says."""
        known, said = survey(prompt, partial)
        skill = self.skill(p_bar)
        if said is None:
            return known.chance(skill)
        return _tried(known, said, skill)

    def skill(self, p_bar: float) -> float:
        """The chance to play right of a player who opens this share of the task's locks."""
        config = self._config
        return _skill(
            config.symbols, tuple(range(config.min_length, config.max_length + 1)), config.turns, p_bar
        )


def _tried(known: Known, said: str, skill: float) -> float:
    """The chance once a symbol is named and not answered yet."""
    good = known.good() if known.stands <= len(known.found) else []
    right = 1.0 / len(good) if said in good else 0.0
    found = 0.0
    for is_right, share in ((True, right), (False, 1.0 - right)):
        if share:
            after = Known(known.lock, known.stands, list(known.found), set(known.tried), known.left)
            after.learn(said, is_right)
            found += share * after.chance(skill)
    return found


@lru_cache(maxsize=1024)
def _skill(symbols: int, lengths: tuple[int, ...], turns: int, p_bar: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        opened = sum(chance(symbols, length, middle, 0, 0, 0, turns) for length in lengths) / len(lengths)
        low, high = (middle, high) if opened < p_bar else (low, middle)
    chance.cache_clear()  # of skills that nobody asks about again
    return (low + high) / 2


def survey(prompt: Prompt, partial: str) -> tuple[Known, str | None]:
    """What a player can know from a transcript, and its last try, if that is not answered yet."""
    known, said = Known(parse_lock(prompt.problem)), None
    for role, text in read_transcript(partial):
        if role == "actor":
            said = text.strip()
        elif said is not None:
            known.learn(said, _right(text))
            said = None
    return known, said or None


def _right(observation: str) -> bool:
    return observation.split()[2:3] == ["ok"]


class LockTasks(GeneratedTask):
    """The task of this module; `reference` is the code. It is played by environments/lock.py."""

    success = "the actor finds the lock's hidden code in the turns it has"

    def __init__(self, config: LockTask, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        self._config, self._seed = config, seed
        super().__init__(tokenizer, config.train_size, config.heldout_size)
        self.teacher: LockTeacher = LockTeacher(config)

    def draw(self, number: int) -> Problem:
        rng, config = random.Random(f"lock/{self._seed}/{number}"), self._config
        symbols: Sequence[str] = NAMES[: config.symbols]
        length = rng.randint(config.min_length, config.max_length)
        lock = Lock(number, length, tuple(symbols), config.turns)
        return Problem(lock.text(), reference="".join(rng.choices(symbols, k=length)))

    def verify(self, prompt: Prompt, text: str) -> float:
        """0: a lock that was not opened in its turns is opened by no text."""
        return 0.0
