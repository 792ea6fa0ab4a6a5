"""Whether a question is one of a benchmark's: word for word, whatever its writing, or by shared n-grams.

A question is taken for a benchmark's where it, or a paragraph of it (prompts may have an instruction around
the question), is the same words, or where it shares a large part of the benchmark question's n-grams (it was
changed in a few places). Words are compared without case, punctuation, LaTeX's spaces and dollar signs; what
is shorter than an n-gram is the same only as a whole. Written here: kept libraries for near duplicates
(datasketch) estimate by hashes what is counted exactly at this size.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SPACING = re.compile(r"\\(?:[,;:! ]|quad\b|qquad\b|left\b|right\b|displaystyle\b|text\b|mathrm\b)|[${}~]")
_FRACTION = re.compile(r"\\[dt]frac\b")
_WORD = re.compile(r"\\[a-z]+|\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>]")


def words(text: str) -> tuple[str, ...]:
    """What of a text is compared: words, numbers, signs and LaTeX's commands, in order."""
    plain = _FRACTION.sub(r"\\frac", _SPACING.sub(" ", text)).lower()
    return tuple(_WORD.findall(plain))


@dataclass(frozen=True)
class Found:
    """A question of the looked-for that a text is, and how it was told."""

    name: str  # of the set that it is in
    text: str
    share: float  # of its n-grams that the other has; 1.0 where it stands there whole


class Looked:
    """Questions to be looked for in others, by name of the set that they are of."""

    def __init__(self, sets: Iterable[tuple[str, Sequence[str]]], ngram: int, overlap: float) -> None:
        """sets: (name, its questions' texts). ngram: words in a row; overlap: share of them, above 0."""
        self._ngram, self._overlap = ngram, overlap
        self._texts: list[tuple[str, str, tuple[str, ...]]] = []
        self._whole: dict[tuple[str, ...], int] = {}
        self._grams: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        self._counts: list[int] = []
        for name, texts in sets:
            for text in texts:
                self._add(name, text)

    def _add(self, name: str, text: str) -> None:
        found, number = words(text), len(self._texts)
        if found in self._whole or not found:
            return
        self._whole[found] = number
        self._texts.append((name, text, found))
        grams = self._of(found)
        self._counts.append(len(grams))
        for gram in grams:
            self._grams[gram].append(number)

    def _of(self, found: tuple[str, ...]) -> set[tuple[str, ...]]:
        return {found[at : at + self._ngram] for at in range(len(found) - self._ngram + 1)}

    def same(self, text: str) -> Found | None:
        """The looked-for question that a text or one of its paragraphs is word for word; None: it is none."""
        for part in (text, *text.split("\n\n")):
            if (number := self._whole.get(words(part))) is not None:
                return self._found(number, 1.0)
        return None

    def find(self, text: str) -> Found | None:
        """The looked-for question that a text is, the one that it shares most with; None where it is none."""
        if (same := self.same(text)) is not None:
            return same
        shared: Counter[int] = Counter()
        for gram in self._of(words(text)):
            shared.update(self._grams.get(gram, ()))
        best = max(shared, key=lambda number: (shared[number] / self._counts[number], -number), default=None)
        if best is None:
            return None
        share = shared[best] / self._counts[best]
        return self._found(best, share) if share >= self._overlap else None

    def _found(self, number: int, share: float) -> Found:
        name, text, _ = self._texts[number]
        return Found(name, text, share)
