"""The layout of shared buffers: two mappings of one memory agree on it, and no two buffers overlap."""

from __future__ import annotations

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.distributed.edges.shared_ring import ALIGNMENT, SharedRing, memory_bytes


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5), slots=st.integers(1, 3))
def test_what_one_rank_fills_the_other_reads_where_it_belongs(sizes: list[int], slots: int) -> None:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, memory_bytes(sizes, slots=slots))
    here, there = SharedRing(descriptor, sizes, slots=slots), SharedRing(descriptor, sizes, slots=slots)
    os.close(descriptor)
    filled = {
        (slot, boundary): torch.randint(0, 256, (size,), dtype=torch.uint8)
        for slot in range(slots)
        for boundary, size in enumerate(sizes)
    }
    here.token.fill_(77)
    for (slot, boundary), content in filled.items():
        here.fill(slot, boundary, content)
    assert int(there.token) == 77
    for (slot, boundary), content in filled.items():
        found = there.buffer(slot, boundary)
        assert torch.equal(found[: len(content)], content)
        assert found.data_ptr() % ALIGNMENT == 0


def test_a_tensor_is_copied_in_memory_order() -> None:
    tensor = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4).to(memory_format=torch.channels_last)
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, memory_bytes([tensor.nbytes], slots=1))
    ring = SharedRing(descriptor, [tensor.nbytes], slots=1)
    os.close(descriptor)
    ring.fill(0, 0, tensor)
    assert torch.equal(ring.buffer(0, 0).view(torch.float32), tensor.permute(0, 2, 3, 1).reshape(-1))
