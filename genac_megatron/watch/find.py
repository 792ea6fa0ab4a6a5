"""Kept rollouts found by stage, outcome, what the critic made of them, and text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from genac_megatron.watch.follow import Brief, Followed

OF = {"": "all", "training": "training batches", "heldout": "held out"}
OUTCOMES = {"": "any", "right": "right", "wrong": "wrong", "partly": "partly right", "cut": "cut off"}
CRITICS = {"": "any", "unread": "a score that cannot be read", "off": "off by half or more"}
OFF = 0.5
MOST_TEXT = 500  # characters of a search


@dataclass(frozen=True)
class Query:
    """What is looked for; "" for anything."""

    stage: str = ""
    of: str = ""
    outcome: str = ""
    critic: str = ""
    text: str = ""

    @staticmethod
    def read(words: Mapping[str, str]) -> Query:
        """Of an address. A choice that there is not is taken for none."""
        return Query(
            words.get("stage", ""),
            _one_of(words.get("of", ""), OF),
            _one_of(words.get("outcome", ""), OUTCOMES),
            _one_of(words.get("critic", ""), CRITICS),
            words.get("text", "")[:MOST_TEXT],
        )

    def words(self) -> dict[str, str]:
        """For an address."""
        return {key: value for key, value in asdict(self).items() if value}

    def fits(self, brief: Brief) -> bool:
        """Whether a rollout is as asked, its text apart."""
        if self.stage and brief.stage != self.stage:
            return False
        if self.of and brief.of != self.of:
            return False
        if self.critic == "unread" and not brief.unread:
            return False
        if self.critic == "off" and (brief.error is None or brief.error < OFF):
            return False
        return _outcome_fits(self.outcome, brief)


def _outcome_fits(wanted: str, brief: Brief) -> bool:
    if wanted == "cut":
        return brief.truncated
    if not wanted:
        return True
    if brief.outcome is None:
        return False
    kind = "right" if brief.outcome >= 1 else "wrong" if brief.outcome <= 0 else "partly"
    return kind == wanted


def _one_of(word: str, known: Mapping[str, str]) -> str:
    return word if word in known else ""


def search(run: Followed, query: Query, below: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of the rollouts that fit, newest first, from below a number."""
    briefs = run.rollouts()
    wanted = query.text.casefold()
    for at in range(min(len(briefs), below if below is not None else len(briefs)) - 1, -1, -1):
        if not query.fits(briefs[at]):
            continue
        row = run.rollout(briefs[at])
        if row is not None and (not wanted or wanted in _words(row)):
            yield at, row


def _words(row: Mapping[str, Any]) -> str:
    """What a person would look for something in."""
    parts = [str(row.get(key) or "") for key in ("problem", "response", "prompt", "reference")]
    parts += [_plain(m.get("content")) for m in row.get("messages") or [] if isinstance(m, dict)]
    parts += [str(s.get("text") or "") for s in row.get("states") or [] if isinstance(s, dict)]
    return "\n".join(parts).casefold()


def _plain(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
