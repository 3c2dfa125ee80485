"""Paged memory on a GPU: order against streams, graphs, real movement, torch's own tensors.

Allocations of managed memory stay below 64 MiB each.
"""

import ctypes
import gc
import subprocess
import sys

import pytest
import torch

from qlora_native import memory
from qlora_native.memory import PagedPool

pytestmark = pytest.mark.gpu

MIB = 1 << 20
BACKINGS = ["managed", "pinned"]


def make_pool(backing, budget=4 * MIB):
    return PagedPool("cuda", backing, device_budget=budget, region_bytes=8 * MIB)


@pytest.mark.parametrize("backing", BACKINGS)
def test_busy_streams_are_waited_for_on_the_device_alone(backing):
    """Passes over four times the budget, while each stream is kept busy: nothing is lost."""
    pool = make_pool(backing)
    tensors = [pool.zeros(MIB // 8) for _ in range(32)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for t in tensors:  # the first uses make streams and load kernels
        with pool.acquired([t]) as (staged,):
            staged += 1
    torch.cuda.synchronize()
    finished = []
    for number, stream in enumerate(streams):
        stream.wait_stream(torch.cuda.current_stream())
        if number:
            stream.wait_stream(streams[0])
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            pool.plan(tensors)
            for t in tensors:
                with pool.acquired([t]) as (staged,):
                    staged *= 2
                    staged += number
            finished.append(stream.query())
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    pool.synchronize_to_host(tensors)
    assert finished == [False, False], "a call waited for the device"
    for t in tensors:
        assert torch.equal(t.cpu(), torch.full((MIB // 8,), 5.0))


@pytest.mark.parametrize("backing", BACKINGS)
def test_memory_that_died_in_use_is_not_reused(backing):
    pool = make_pool(backing, budget=32 * MIB)
    out = torch.zeros(MIB, device="cuda")
    for value in range(1, 6):
        t = pool.empty(MIB).fill_(value)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        (staged,) = pool.acquire([t], "read")
        torch.cuda._sleep(50_000_000)
        out += staged
        pool.release([t])
        del t, staged
        # Would be written at once by the host, or by another stream.
        fresh = pool.empty(MIB)
        with torch.cuda.stream(side):
            fresh.fill_(1000)
        torch.cuda.current_stream().wait_stream(side)
        del fresh
    torch.cuda.synchronize()
    assert torch.equal(out.cpu(), torch.full((MIB,), 15.0))


def test_managed_memory_moves_and_counts():
    pool = make_pool("managed")
    t = pool.empty(8 * MIB // 4).fill_(3)
    pool.evict([t])
    torch.cuda.synchronize()
    stats = pool.stats()
    assert stats.bytes_to_host == 8 * MIB and pool.resident_bytes("cuda") == 0
    assert pool.resident_bytes("cpu") == 8 * MIB
    pool.prefetch([t])
    with pool.acquired([t], "read") as (same,):
        assert same is t and same.sum().item() == 6 * MIB
    assert pool.resident_bytes("cuda") == 8 * MIB
    assert pool.stats().bytes_to_device == 8 * MIB


def test_a_graph_over_resident_managed_memory():
    pool = make_pool("managed")
    t = pool.zeros(1000)
    with pool.acquired([t]):
        t += 1
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pool.acquired([t]) as (staged,):
            staged += 1
        with pytest.raises(NotImplementedError, match="captured"):
            pool.empty(10)
        with pytest.raises(NotImplementedError, match="captured"):
            pool.evict([t])
    for _ in range(3):
        graph.replay()
    assert t.sum().item() == 4000


def test_the_pinned_backing_refuses_capture():
    pool = make_pool("pinned")
    t = pool.zeros(1000)
    x = torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(NotImplementedError, match="captured"):
            pool.acquire([t])
    graph.replay()
    assert x.sum().item() == 3
    with pool.acquired([t]) as (staged,):
        staged += 1
    pool.synchronize_to_host([t])
    assert t.sum() == 1000


def test_a_tensor_may_die_during_a_capture():
    pool = make_pool("managed")
    dying = pool.zeros(1000)
    x = torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        del dying
    graph.replay()
    torch.cuda.synchronize()
    pool.trim()
    assert pool.stats().used_bytes == 0 and pool.stats().reserved_bytes == 0


def test_pinned_tensors_are_pinned_and_bounded():
    pool = make_pool("pinned", budget=4 * MIB)
    tensors = [pool.zeros(MIB) for _ in range(4)]
    assert all(t.is_pinned() for t in tensors)
    with pool.acquired([tensors[0]]), pytest.raises(MemoryError, match="4194304 bytes"):
        pool.acquire([tensors[1]])
    before = torch.cuda.mem_get_info()[0]
    for t in tensors * 3:
        with pool.acquired([t]) as (staged,):
            staged += 1
    torch.cuda.synchronize()
    assert before - torch.cuda.mem_get_info()[0] < 2 * MIB, "nothing beyond the staging cache"
    pool.synchronize_to_host(tensors)
    assert all((t == 3).all() for t in tensors)


def test_torch_tensors_made_inside_paged_are_managed():
    with memory.paged():
        a = torch.arange(MIB, device="cuda", dtype=torch.float32)
        b = a * 2
    outside = b + 1
    # Managed memory is the host's too: read there at the same address, once the work is done.
    torch.cuda.synchronize()
    host = (ctypes.c_float * 4).from_address(b.data_ptr())
    assert list(host) == [0, 2, 4, 6]
    assert outside[-1].item() == 2 * (MIB - 1) + 1
    assert torch.equal(b.cpu(), torch.arange(MIB, dtype=torch.float32) * 2)
    del a, b
    gc.collect()
    with memory.paged("cuda:0"):
        assert torch.ones(10, device="cuda").sum().item() == 10


EXIT = """
import torch
from qlora_native import memory
managed = memory.PagedPool("cuda", "managed").zeros(1000)
pinned = memory.PagedPool("cuda", "pinned", device_budget=1 << 20).zeros(1000)
default = memory.default_pool("cuda").zeros(1000)
with memory.paged():
    inside = torch.zeros(1000, device="cuda")
keep = [managed, pinned, default, inside]
import sys
sys.keep = keep
print("done")
"""


def test_a_process_with_live_tensors_ends_in_peace():
    result = subprocess.run(
        [sys.executable, "-c", EXIT], capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n" and result.stderr == ""
