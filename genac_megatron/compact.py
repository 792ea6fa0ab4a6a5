"""Numbers side by side in memory: of a token id 4 bytes and of a log-prob 8, where a tuple has 40 and 32."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from numpy.typing import NDArray

N = TypeVar("N", int, float)
IDS, FIGURES = "i", "d"  # 4 and 8 bytes


class Compact(Sequence[N]):
    """Numbers that nobody changes. Equal to a tuple or a list of the same numbers, and hashed as that tuple.

    A slice is one too. One by one they are Python's own numbers, and numpy takes all at once.
    """

    __slots__ = ("_held",)

    def __init__(self, kind: str, numbers: Iterable[N]) -> None:
        self._held: array[Any] = array(kind, numbers)

    @overload
    def __getitem__(self, at: int) -> N: ...
    @overload
    def __getitem__(self, at: slice) -> Compact[N]: ...
    def __getitem__(self, at: int | slice) -> N | Compact[N]:
        found: Any = self._held[at]
        return Compact(self._held.typecode, found) if isinstance(at, slice) else found

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[N]:
        return iter(self._held)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Compact):
            return self._held == other._held
        if isinstance(other, tuple | list):
            return len(self) == len(other) and all(map(operator.eq, self._held, other))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._held))

    def __repr__(self) -> str:
        return repr(tuple(self._held))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        import numpy as np

        found: NDArray[Any] = np.array(self._held, dtype)
        return found


def ids(numbers: Iterable[int]) -> Compact[int]:
    """Token ids; those that are compact already as they are."""
    return numbers if isinstance(numbers, Compact) else Compact(IDS, numbers)


def figures(numbers: Iterable[float]) -> Compact[float]:
    """Floats; those that are compact already as they are."""
    return numbers if isinstance(numbers, Compact) else Compact(FIGURES, numbers)
