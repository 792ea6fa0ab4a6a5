"""Storages that go to host memory and come back in place; on a CPU host memory is memory of the process."""

from __future__ import annotations

import resource
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.errors import GenacError
from genac_megatron.training import offload
from genac_megatron.training.offload import HostCopy, storages_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does it with a device")


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 33), st.integers(1, 3))
def test_every_view_is_what_and_where_it_was(sizes: list[int], block: int, times: int) -> None:
    """Whatever the sizes, of storages and of the blocks that they are cut into."""
    before, offload.BLOCK = offload.BLOCK, block
    try:
        flats = [torch.arange(size, dtype=torch.float32) * 1.5 for size in sizes]
        views = [flat[size // 3 :].view(-1, 1) for flat, size in zip(flats, sizes, strict=True)]
        wanted = [view.clone() for view in views]
        copy = HostCopy()
        for _ in range(times):
            storages = storages_of([*flats, *views])
            copy.take(storages)
            assert copy.nbytes == 4 * sum(sizes)
            assert not any(storage.nbytes() for storage in storages)
            copy.take(storages_of([torch.ones(3)]))  # some are away already
            copy.give_back()
            copy.give_back()
            assert copy.nbytes == 0
            assert all(torch.equal(view, old) for view, old in zip(views, wanted, strict=True))
            assert all(
                view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
                for view, flat in zip(views, flats, strict=True)
            )
        for flat in flats:  # what grew since the last time
            flat.add_(1)
        more = torch.ones(50)
        copy.take(storages_of([*flats, more]))
        copy.give_back()
        assert all(torch.equal(view, old + 1) for view, old in zip(views, wanted, strict=True))
        assert torch.equal(more, torch.ones(50))
    finally:
        offload.BLOCK = before


def test_a_storage_is_taken_once_and_others_are_left_alone() -> None:
    flat, other = torch.ones(8), torch.ones(4)
    assert len(storages_of([flat, flat[2:4], other, torch.empty(0)])) == 2
    assert len(storages_of([flat, other[1:]], apart=[other])) == 1
    assert storages_of([torch.ones(4, device="meta")]) == []


def test_what_is_dropped_stays_away() -> None:
    tensor, copy = torch.ones(8), HostCopy()
    copy.take(storages_of([tensor]))
    copy.drop()
    copy.give_back()
    assert tensor.untyped_storage().nbytes() == 0


def test_without_host_memory_nothing_moves() -> None:
    tensor, copy = torch.ones(1 << 26), HostCopy()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limits[1]))
    try:
        with pytest.raises(GenacError, match=r"0\.25 GiB of host memory") as raised:
            copy.take(storages_of([tensor]))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "training.offload" in raised.value.way_out
    assert copy.nbytes == 0
    assert tensor.sum() == 1 << 26


def test_a_stand_in_for_an_fp8_tensor_gives_its_data_and_scales() -> None:
    """Not its master weight or gradient, which Megatron hangs on it, nor a copy that is on the host."""
    from genac_megatron.platform import fp8

    plain: Any = torch.nn.Parameter(torch.ones(4))
    plain.main_grad = torch.ones(4)
    assert [held is plain for held in fp8.data_tensors(plain)] == [True]
    standing_in = SimpleNamespace(_data=torch.ones(2), _scale_inv=torch.ones(1), main_param=torch.ones(2))
    assert fp8.data_tensors(standing_in) == [standing_in._data, standing_in._scale_inv]
