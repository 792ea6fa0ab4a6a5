"""The exact teacher of reasoning-gym's tower_of_hanoi: it writes plans, and checks them move by move.

A plan is a line `Move disk X from Peg Y to Peg Z` per move between answer tags. reasoning-gym executes it: 0
where a move is illegal or misspelt, 0.05 where the disks do not end on the target, else fewest / made moves.
"""

from __future__ import annotations

import random
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from genac_megatron.records import Prompt
from genac_megatron.tasks.base import Teacher

SURE = 0.98  # p_bar is kept within [1 - SURE, SURE] before powers are taken of it
_MOVE = re.compile(r"Move disk (\d+) from Peg (\d+) to Peg (\d+)")

Pegs = tuple[int, ...]  # the peg of each disk, the smallest first
Move = tuple[int, int, int]  # disk, from, to


@dataclass(frozen=True)
class Puzzle:
    """Where the disks start and end."""

    disks: int
    pegs: int
    start: int
    target: int

    @classmethod
    def of(cls, prompt: Prompt) -> Puzzle:
        """The puzzle of a prompt, by its entry's metadata."""
        data: dict[str, Any] = prompt.reference["metadata"]
        return cls(data["num_disks"], data["num_pegs"], data["start_peg"], data["target_peg"])

    @property
    def first(self) -> Pegs:
        return (self.start,) * self.disks

    def apply(self, at: Pegs, move: Move) -> Pegs | None:
        """The disks after a move; None where it is illegal. To stay is legal, to reasoning-gym."""
        disk, source, target = move
        if not (1 <= disk <= self.disks and 1 <= target <= self.pegs):
            return None
        smaller = at[: disk - 1]
        if at[disk - 1] != source or source in smaller or target in smaller:
            return None
        return (*smaller, target, *at[disk:])

    def solve(self, at: Pegs) -> list[Move]:
        """A shortest way from there to the target."""
        goal = (self.target,) * self.disks
        before: dict[Pegs, tuple[Pegs, Move]] = {}
        waiting = deque([at])
        while waiting and at != goal and goal not in before:
            here = waiting.popleft()
            for move in self._moves(here):
                after = self.apply(here, move)
                if after is not None and after != at and after not in before:
                    before[after] = here, move
                    waiting.append(after)
        moves: list[Move] = []
        while goal != at:
            goal, move = before[goal]
            moves.append(move)
        return moves[::-1]

    def _moves(self, at: Pegs) -> list[Move]:
        pegs = range(1, self.pegs + 1)
        return [(disk, at[disk - 1], to) for disk in range(1, self.disks + 1) for to in pegs]


def read_plan(text: str) -> list[Move | None]:
    """The moves of a response, perhaps unfinished, by its whole lines; None for a line that is none."""
    body = text.rpartition("<answer>")[2] if "<answer>" in text else ""
    lines = body.partition("</answer>")[0].split("\n")
    if "</answer>" not in body:
        lines = lines[:-1]  # the last line may be cut
    moves: list[Move | None] = []
    for line in lines:
        if line.strip():
            found = _MOVE.fullmatch(line.strip())
            moves.append((int(found[1]), int(found[2]), int(found[3])) if found else None)
    return moves


class HanoiTeacher(Teacher):
    """Shortest plans, and verdicts on partial ones."""

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        puzzle = Puzzle.of(prompt)
        moves = (f"Move disk {d} from Peg {a} to Peg {b}" for d, a, b in puzzle.solve(puzzle.first))
        return "\n".join(("<answer>", *moves, "</answer>"))

    def trace(self, prompt: Prompt, partial: str, p_bar: float, rng: random.Random) -> tuple[str, int]:
        """Where the disks are, and how many moves are left.

            made 2 legal
            disk 1 peg 3 disk 2 peg 1
            left 1 best 3

        Exact on the plan so far: after an illegal move the score is 0. Each move left succeeds with the
        chance that gives a shortest plan p_bar; a detour costs its share of the score.
        """
        puzzle = Puzzle.of(prompt)
        moves, at = read_plan(partial), puzzle.first
        for number, move in enumerate(moves, 1):
            after = None if move is None else puzzle.apply(at, move)
            if after is None:
                return f"made {number} illegal", 0
            at = after
        left, best = len(puzzle.solve(at)), len(puzzle.solve(puzzle.first))
        places = " ".join(f"disk {disk} peg {peg}" for disk, peg in enumerate(at, 1))
        words = f"made {len(moves)} legal\n{places}\nleft {left} best {best}"
        if "</answer>" in partial and left:
            return words, 0
        per_move = min(max(p_bar, 1 - SURE), SURE) ** (1 / best)
        return words, round(10 * per_move**left * best / max(best, len(moves) + left))
