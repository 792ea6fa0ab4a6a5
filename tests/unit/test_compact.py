"""Numbers held side by side are what a tuple of them is, in a sixth of its memory."""

from __future__ import annotations

import pickle
import tracemalloc
from array import array
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron import compact
from genac_megatron.records import Completion, Judgement, Prompt, Rollout, State, sample_of

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=40)
FLOATS = st.lists(st.floats(allow_nan=False), max_size=40)


@given(ids=IDS, floats=FLOATS, begin=st.integers(-50, 50), end=st.integers(-50, 50))
def test_it_is_what_a_tuple_is(ids: list[int], floats: list[float], begin: int, end: int) -> None:
    lies_in = array("i", ids).tobytes(), array("d", floats).tobytes()
    for held, given_ in (
        (compact.ids(ids), tuple(ids)),
        (compact.figures(floats), tuple(floats)),
        (compact.ids_in(lies_in[0]), tuple(ids)),
        (compact.figures_in(memoryview(b"." + lies_in[1])[1:]), tuple(floats)),  # wherever that is
    ):
        numbers: Sequence[float] = held
        assert numbers == given_
        assert numbers == list(given_)
        assert hash(numbers) == hash(given_)
        assert tuple(numbers) == given_
        assert numbers[begin:end] == given_[begin:end]
        assert numbers != (*given_, 0)
        assert (len(numbers), bool(numbers)) == (len(given_), bool(given_))
        assert [type(x) for x in numbers] == [type(x) for x in given_], "Python's own, as JSON wants them"
        assert pickle.loads(pickle.dumps(numbers)) == numbers
        assert np.asarray(numbers).tolist() == list(given_), "to the last bit"
        assert torch.tensor(numbers, dtype=torch.float64).tolist() == [float(x) for x in given_]
        assert repr(numbers) == repr(given_)


def test_where_they_lie_makes_no_difference() -> None:
    held, view = compact.ids([3, 4, 5]), compact.ids_in(array("i", [3, 4, 5]).tobytes())
    assert held == view == held
    assert view[1:] == held[1:]
    assert {held: 1}[view] == 1


def test_an_id_that_is_none_is_refused() -> None:
    with pytest.raises(OverflowError):
        compact.ids([2**31])


def test_what_is_compact_is_shared() -> None:
    completion = Completion((3, 4, 5), (-0.1, -0.2, -0.3), "stop")
    sample = sample_of((1, 2), completion, {"behaviour": completion.logprobs})
    assert sample.fields["behaviour"] is completion.logprobs
    assert sample.tokens == [1, 2, 3, 4, 5]
    assert np.asarray(sample.tokens[:-1], ">u4").tolist() == [1, 2, 3, 4]


def test_a_completion_takes_a_sixth_of_what_tuples_take() -> None:
    """12 bytes a token where Python's own numbers take 72; a judgement's prompt 4 where they take 40."""
    count = 20_000
    ids, logprobs = np.arange(count) + 10_000, -np.arange(count) / 7

    def made() -> Completion:
        return Completion(tuple(ids.tolist()), tuple(logprobs.tolist()), "stop")

    tracemalloc.start()
    try:
        tuples = tuple(ids.tolist()), tuple(logprobs.tolist())
        plain, _ = tracemalloc.get_traced_memory()
        completion = made()
        both, _ = tracemalloc.get_traced_memory()
        state = State(Rollout(Prompt("p", (), "", None), 0, completion, ""), 0, 0, count)
        judgement = Judgement(state, tuple(ids.tolist()), completion, "", 0.5)
        last, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tuples == (completion.ids, completion.logprobs)
    assert judgement.prompt_ids == tuples[0]
    assert plain / count > 70
    assert (both - plain) / count < 13
    assert (last - both) / count < 5
