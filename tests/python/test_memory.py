"""Pools of paged memory as PyTorch sees them."""

import copy
import gc
import io
import os
import threading

import pytest
import torch

import qlora_native as qn
from qlora_native import memory
from qlora_native.memory import PagedPool

MIB = 1 << 20


@pytest.fixture(
    params=[
        ("cpu", "host"),
        pytest.param(("cuda", "pinned"), marks=pytest.mark.gpu),
        pytest.param(("cuda", "managed"), marks=pytest.mark.gpu),
    ],
    ids=lambda param: param[1],
)
def pool(request):
    device, backing = request.param
    return PagedPool(device, backing, device_budget=MIB, region_bytes=MIB)


def used(pool):
    gc.collect()
    return pool.stats().used_bytes


def test_tensors_lie_in_the_pool_and_say_where_they_are(pool):
    t = pool.zeros((3, 5, 7), dtype=torch.bfloat16)
    assert t.shape == (3, 5, 7) and t.dtype == torch.bfloat16 and t.is_contiguous()
    assert t.device == pool.tensor_device
    assert t.device.type == ("cuda" if pool.backing == "managed" else "cpu")
    assert t.data_ptr() % 256 == 0
    assert not t.any()
    assert used(pool) == 256 and pool.stats().allocations == 1
    assert pool.resident_bytes("cpu") + pool.resident_bytes(pool.device) >= 256


@pytest.mark.parametrize("dtype", list(memory._DTYPES), ids=str)
def test_every_dtype_holds_its_values(pool, dtype):
    t = pool.empty(300, dtype)
    expected = torch.arange(300).remainder(100).to(dtype)
    t.copy_(expected)
    assert t.dtype == dtype
    assert torch.equal(t.cpu(), expected)


def test_an_unsupported_dtype_is_refused(pool):
    with pytest.raises(TypeError, match="complex64"):
        pool.empty(3, torch.complex64)


def test_memory_returns_with_the_last_view(pool):
    t = pool.zeros(1000)
    view = t[10:].view(-1, 10)[::3]
    storage = t.untyped_storage()
    del t
    view.fill_(2)
    assert used(pool) == 4096
    del view
    assert used(pool) == 4096
    del storage
    assert used(pool) == 0


def test_tensors_outlive_their_pool():
    pool = PagedPool("cpu", region_bytes=MIB)
    t = pool.zeros(1000)
    core = pool.core
    del pool
    t += 1
    assert t.sum() == 1000
    assert core.stats().used_bytes == 4096
    del core
    t += 1
    assert t.sum() == 2000


def test_nothing_leaks_in_ten_thousand_cycles(pool):
    for i in range(10_000):
        t = pool.empty((i % 50, 7))
        v = t[1:] if i % 2 else t
        del t, v
    stats = pool.stats()
    assert stats.used_bytes == 0 and stats.allocations == 0
    assert stats.reserved_bytes <= MIB
    if pool.device.type == "cuda":
        torch.cuda.synchronize()
    pool.trim()
    assert pool.stats().reserved_bytes == 0


def test_an_unused_capsule_returns_its_memory(pool):
    capsule = pool.core.empty_tensor(shape=[4], code=2, bits=32, size_bytes=16, stream=0)
    assert used(pool) == 256
    del capsule
    assert used(pool) == 0


def test_copies_are_ordinary_tensors(pool):
    t = pool.zeros(100)
    t += 3
    stream = io.BytesIO()
    torch.save({"t": t, "view": t[50:]}, stream)
    stream.seek(0)
    loaded = torch.load(stream)
    copies = [t.clone(), copy.deepcopy(t), t + 0, loaded["t"]]
    before = used(pool)
    del t
    assert before == 512 and used(pool) == 0
    for other in copies:
        assert other.sum().item() == 300
    assert loaded["view"].sum().item() == 150


def test_a_parameter_may_live_there(pool):
    weight = torch.nn.Parameter(pool.empty((4, 3)).fill_(0.5))
    y = (weight * 2).sum()
    y.backward()
    assert torch.equal(weight.grad.cpu(), torch.full((4, 3), 2.0))
    with torch.no_grad():
        weight -= weight.grad
    assert weight.sum().item() == -18


def test_sizes_at_the_edges(pool):
    for shape in (0, (0,), (3, 0, 5)):
        t = pool.zeros(shape)
        assert t.numel() == 0 and t.device == pool.tensor_device
        pool.prefetch([t])
        (staged,) = pool.acquire([t])
        assert staged.shape == t.shape
        pool.release([t])
    assert pool.empty(()).shape == ()
    assert used(pool) == 0
    with pytest.raises(ValueError, match="negative"):
        pool.empty((2, -1))
    t = pool.empty(5)
    for shape, size_bytes in ((2**58, 2**60), ((2**40, 2**40), 2**82)):
        with pytest.raises(MemoryError, match=str(size_bytes)):
            pool.empty(shape)
    assert pool.stats().allocations == 1
    del t


def test_work_goes_through_acquire(pool):
    tensors = [pool.zeros(MIB // 32) for _ in range(32)]  # four times the budget, an eighth each
    for step in range(1, 4):
        pool.plan(tensors)
        for t in tensors:
            with pool.acquired([t]) as (staged,):
                assert staged.device.type == pool.device.type
                staged += step
    pool.synchronize_to_host(tensors)
    for t in tensors:
        assert torch.equal(t.cpu(), torch.full_like(t, 6, device="cpu"))
    stats = pool.stats()
    if pool.device.type == "cuda":
        assert stats.bytes_to_device >= 4 * MIB
    if pool.backing == "pinned":  # managed tensors have stayed on the device since they were zeroed
        assert stats.prefetches > 0
        assert stats.device_reserved_bytes == MIB and stats.bytes_to_host >= 8 * MIB
        assert pool.resident_bytes("cuda") <= MIB


def test_evicted_and_prefetched_tensors_keep_their_values(pool):
    tensors = [pool.empty((64, 100)).copy_(torch.randn(64, 100)) for _ in range(4)]
    expected = [t.clone() for t in tensors]
    for _ in range(3):
        pool.prefetch(tensors)
        with pool.acquired(tensors, "read") as staged:
            for s, e in zip(staged, expected, strict=True):
                assert torch.equal(s.cpu(), e.cpu())
        pool.evict(tensors)
    if pool.device.type == "cuda":
        assert pool.stats().evictions >= 12
        assert pool.resident_bytes("cuda") == 0


def test_views_are_acquired_as_they_are(pool):
    t = pool.zeros((8, 16))
    view = t.t()[2:5]
    with pool.acquired([view], "write") as (staged,):
        assert staged.shape == view.shape and staged.stride() == view.stride()
        staged.fill_(1)
    pool.synchronize_to_host([t])
    expected = torch.zeros(8, 16)
    expected.t()[2:5] = 1
    assert torch.equal(t.cpu(), expected)


def test_mistakes_are_refused(pool):
    t = pool.zeros(10)
    for call in (pool.acquire, pool.release, pool.prefetch, pool.evict, pool.plan):
        with pytest.raises(ValueError, match="does not lie in one live allocation"):
            call([torch.zeros(10, device=pool.tensor_device)])
        with pytest.raises(TypeError, match="sequence"):
            call(t)
    with pytest.raises(ValueError, match="not acquired"):
        pool.release([t])
    with pytest.raises(ValueError, match="unknown access 'append'"):
        pool.acquire([t], "append")
    pool.acquire([t])
    with pytest.raises(ValueError, match="acquired"):
        pool.synchronize_to_host([t])
    pool.release([t])


def test_options_are_checked():
    with pytest.raises(ValueError, match="unknown backing 'magic'"):
        PagedPool("cpu", "magic")
    with pytest.raises(ValueError, match="region_bytes is 0"):
        PagedPool("cpu", region_bytes=0)
    with pytest.raises(ValueError, match="device_budget_bytes is 1,"):
        PagedPool("cpu", device_budget=1)
    with pytest.raises(NotImplementedError, match="meta"):
        PagedPool("meta")
    assert PagedPool("cpu", "managed").backing == "host"


def test_the_automatic_backing_is_explained(device):
    backing, reason = memory.automatic_backing(device)
    assert backing in (("host",) if device == "cpu" else ("managed", "pinned"))
    assert reason
    assert PagedPool(device).backing == backing


def test_the_default_pool_is_shared(device):
    pools = []
    threads = [
        threading.Thread(target=lambda: pools.append(memory.default_pool(device))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, pools))) == 1
    assert pools[0].device.type == device


def test_threads_share_a_pool(pool):
    errors = []

    def work(number):
        try:
            for i in range(100):
                t = pool.empty(1 + i).fill_(number)
                with pool.acquired([t], "read") as (staged,):
                    assert (staged == number).all()
                pool.synchronize_to_host([t])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert used(pool) == 0


def _in_child(body):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if body() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_is_told_and_can_have_its_own():
    shared = memory.default_pool("cpu")
    pool = PagedPool("cpu", region_bytes=MIB)
    t = pool.zeros(100)

    def body():
        nonlocal t
        try:
            pool.empty(1)
        except RuntimeError as error:
            told = "forked" in str(error)
        readable = t.sum().item() == 0
        t = None  # dies in the child: the parent's memory stays
        own = memory.default_pool("cpu")
        return told and readable and own is not shared and own.zeros(3).sum().item() == 0

    assert _in_child(body) == 0
    t += 1
    assert t.sum() == 100 and pool.stats().allocations == 1


def test_paged_without_a_gpu_changes_nothing():
    if not qn.cuda_unavailable_reason():
        pytest.skip("there is a GPU")
    with memory.paged():
        t = torch.ones(3)
    assert t.device.type == "cpu"
    with pytest.raises(ValueError, match=r"no paged memory on cuda"), memory.paged("cuda"):
        raise SystemError("not refused")
    with pytest.raises(ValueError, match="GPU"), memory.paged("cpu"):
        raise SystemError("not refused")
