"""Numbers side by side in memory: of a token id 4 bytes and of a log-prob 8, where a tuple has 40 and 32."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload

if TYPE_CHECKING:
    from numpy.typing import NDArray

N = TypeVar("N", int, float)
IDS: Final = "i"  # 4 bytes
FIGURES: Final = "d"  # 8


class Compact(Sequence[N]):
    """Numbers that nobody changes. Equal to a tuple or a list of the same numbers, and hashed as that tuple.

    A slice is one too. One by one they are Python's own numbers, and numpy takes all at once.
    """

    __slots__ = ("_held",)

    def __init__(self, kind: str, numbers: Iterable[N] | memoryview) -> None:
        """numbers: of a view of that kind no copy is made."""
        self._held: Any = numbers if isinstance(numbers, memoryview) else array(kind, numbers)

    @overload
    def __getitem__(self, at: int) -> N: ...
    @overload
    def __getitem__(self, at: slice) -> Compact[N]: ...
    def __getitem__(self, at: int | slice) -> N | Compact[N]:
        found: Any = self._held[at]
        return Compact(self._kind, found) if isinstance(at, slice) else found

    @property
    def _kind(self) -> str:
        return memoryview(self._held).format

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

    def __reduce__(self) -> tuple[Any, ...]:
        return (ids_in if self._kind == IDS else figures_in), (self._held.tobytes(),)

    def __repr__(self) -> str:
        return repr(tuple(self._held))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        import numpy as np

        found: NDArray[Any] = np.array(self._held, dtype)
        return found


def ids_in(held: memoryview | bytes) -> Compact[int]:
    """The token ids that some bytes are, where they lie."""
    return Compact(IDS, memoryview(held).cast(IDS))


def figures_in(held: memoryview | bytes) -> Compact[float]:
    """The floats that some bytes are, where they lie."""
    return Compact(FIGURES, memoryview(held).cast(FIGURES))


def ids(numbers: Iterable[int]) -> Compact[int]:
    """Token ids; those that are compact already as they are."""
    return numbers if isinstance(numbers, Compact) else Compact(IDS, numbers)


def figures(numbers: Iterable[float]) -> Compact[float]:
    """Floats; those that are compact already as they are."""
    return numbers if isinstance(numbers, Compact) else Compact(FIGURES, numbers)
