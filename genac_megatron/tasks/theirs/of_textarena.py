"""Games of textarena for one player (main.py): a row is a seed.

What the player is shown is what the game tells it, message by message, as a conversation grows; the wrappers
of a game's id that show everything again each turn are stepped around, those that read actions are not.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib.metadata
import random
import sys
from collections.abc import Iterable
from typing import Any

from __main__ import Refused  # main.py

PLAYER = 0
WORDS = (
    "put NLTK's data where it looks for them (words, averaged_perceptron_tagger_eng; NLTK_DATA names the "
    "folder), or choose a game without words"
)


class Game:
    """A game by its id, in as many forms as there are seeds."""

    def __init__(self, ta: Any, made: Any, request: dict[str, Any]) -> None:
        self._ta, self._made, self._request = ta, made, request

    def rows(self) -> dict[str, Any]:
        """What each seed begins with, training ones first, and the most turns there are."""
        train, heldout = (
            [self._row(f"{self._request['seed']}/{split}/{number}") for number in range(size)]
            for split, size in (("train", self._request["train"]), ("heldout", self._request["heldout"]))
        )
        turns = getattr(self.begin(train[0]["row"])._state, "max_turns", None)
        version = importlib.metadata.version("textarena")
        return {"train": train, "heldout": heldout, "turns": turns, "version": version}

    def _row(self, seed: str) -> dict[str, Any]:
        # 31 bits: numpy takes no more
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") >> 1
        episode = Episode(self._ta, self._fresh(number), None)
        row = {"seed": number, "shown": _digest(episode.shown)}
        messages = [{"role": "user", "content": episode.shown}]
        return {"messages": messages, "row": row, "same": str(number)}

    def begin(self, row: dict[str, Any]) -> Episode:
        return Episode(self._ta, self._fresh(row["seed"]), row["shown"])

    def _fresh(self, seed: int) -> Any:
        made = copy.deepcopy(self._made)  # some hold a dictionary that is long to make
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed)
        made.reset(num_players=1, seed=seed)
        return made


class Episode:
    """One game under way."""

    def __init__(self, ta: Any, made: Any, shown: str | None) -> None:
        """shown: a digest of what it began with when its row was made."""
        self._ta, self._made, self._base = ta, made, _base(ta, made)
        self.shown = self._told()
        if shown is not None and _digest(self.shown) != shown:
            raise Refused("begins otherwise with the same seed")

    @property
    def _state(self) -> Any:
        return self._base.state

    def step(self, request: dict[str, Any]) -> dict[str, Any]:
        done, _ = self._made.step(request["turn"])
        shown = self._told()
        if not done:
            return {"observation": shown}
        info = self._state.game_info[PLAYER]
        reward, invalid = self._state.rewards[PLAYER], bool(info.get("invalid_move"))
        shown = "\n".join(filter(None, (shown, info.get("reason"))))
        parts = {"reward": reward, "invalid": float(invalid)}
        # A move that no rule allows costs what the game's author put there, often less than any loss: `least`
        return {"observation": shown, "done": True, "reward": reward, "least": invalid, "parts": parts}

    def close(self) -> None:
        """Nothing is held."""

    def _told(self) -> str:
        """What the game has said since it was last asked; the player's own words are its turn."""
        own = self._ta.ObservationType.PLAYER_ACTION
        given: Iterable[Any] = self._base.get_observation()[1]
        return "\n".join(str(text).strip("\n") for who, text, kind in given if (who, kind) != (PLAYER, own))


def load(request: dict[str, Any]) -> Game:
    """The game. Raises Refused."""
    try:
        import textarena as ta
        from textarena.envs.registration import ENV_REGISTRY
    except ModuleNotFoundError as error:
        if error.name != "textarena":
            raise
        raise Refused("textarena is not installed there") from None
    name = request["id"]
    if name not in ENV_REGISTRY:
        near = difflib.get_close_matches(name, ENV_REGISTRY, 3) or sorted(ENV_REGISTRY)[:3]
        raise Refused(f"textarena has no game {name!r}", f"did you mean {', '.join(near)}?")
    try:
        made = ta.make(name, **request["args"])
    except LookupError as error:
        raise Refused(f"{name} wants words that are not on this machine: {_first(error)}", WORDS) from error
    _need_one_player(ta, name, made)
    return Game(ta, made, request)


def _need_one_player(ta: Any, name: str, made: Any) -> None:
    tried = copy.deepcopy(made)
    several = f"{name} is a game of several players, and a conversation has one: the actor"
    way_out = "choose a game of one player (textarena's list of games says which are)"
    try:
        tried.reset(num_players=1, seed=0)
    except AssertionError:
        raise Refused(several, way_out) from None
    if not isinstance(_base(ta, tried).state, ta.SinglePlayerState):
        raise Refused(several, way_out)


def _base(ta: Any, made: Any) -> Any:
    """The game without its wrappers."""
    while isinstance(made, ta.Wrapper):
        made = made.env
    return made


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _first(error: BaseException) -> str:
    lines = [line.strip(" *\t") for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)
