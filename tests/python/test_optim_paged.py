"""Paged state: the results of state that stays on the device, wherever it lies and moves."""

import copy
import gc
import pickle

import pytest
import torch

import qlora_native as qn
from _optim import ALL, SHAPES, assert_same, assert_same_states, parameters, run, through_a_file
from qlora_native.optim import _paging

# Larger than the staging cache of `pools`, so that pinned states come and go in every step.
MANY = [*SHAPES, (700, 700), (300, 500), (64, 64)]
BUDGET = 1 << 20


def pools(device):
    if device == "cpu":
        return [qn.memory.PagedPool("cpu", device_budget=BUDGET)]
    backings = ["managed", "pinned"]
    if qn.memory.automatic_backing(device)[0] != "managed":
        backings.remove("managed")
    return [qn.memory.PagedPool(device, backing, device_budget=BUDGET) for backing in backings]


@pytest.fixture
def moving(monkeypatch, device):
    """On a CPU nothing moves: there, a step goes in parts all the same, each of a few blocks."""
    if device == "cpu":
        monkeypatch.setattr(_paging.PagedStates, "is_moved", lambda *_: True)
        monkeypatch.setattr(_paging.PagedStates, "part_bytes", lambda *_: 5000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", ALL)
def test_paged_and_resident_steps_are_the_same(device, moving, cls, dtype):
    options = {"max_norm": 1.0, "min_8bit_size": 256}
    if dtype != torch.float32:
        options["master_weights" if cls.__name__.endswith("8bit") else "stochastic_rounding"] = True
    resident = parameters(MANY, dtype, device)
    reference = cls(resident, **options)
    run(reference, resident, 4)
    for pool in pools(device):
        params = parameters(MANY, dtype, device)
        optimizer = cls(params, paged=pool, **options)
        run(optimizer, params, 4)
        assert_same(params, resident)
        assert_same_states(optimizer, reference)
        assert pool.stats().used_bytes > sum(p.numel() for p in params)
        state = optimizer.state[params[0]]
        assert state["exp_avg"].device.type == pool.tensor_device.type
        assert state["step"].device == params[0].device


@pytest.mark.gpu
def test_the_budget_bounds_device_memory():
    params = parameters([(1000, 1000)] * 4, device="cuda")
    pool = qn.memory.PagedPool("cuda", "pinned", device_budget=BUDGET)
    optimizer = qn.optim.PagedAdamW(params, paged=pool)
    run(optimizer, params, 3)
    stats = pool.stats()
    assert stats.used_bytes >= 8 * 4_000_000
    assert stats.device_reserved_bytes <= BUDGET
    assert stats.bytes_to_device >= 2 * 32_000_000
    assert stats.bytes_to_host >= 32_000_000


@pytest.mark.gpu
def test_evicted_managed_state_comes_back():
    if qn.memory.automatic_backing("cuda")[0] != "managed":
        pytest.skip("no managed memory on this GPU")
    resident, params = (parameters(MANY, device="cuda") for _ in range(2))
    reference = qn.optim.AdamW(resident)
    pool = qn.memory.PagedPool("cuda", "managed")
    optimizer = qn.optim.AdamW(params, paged=pool)
    for step in range(3):
        run(reference, resident, 1, first=step)
        run(optimizer, params, 1, first=step)
        pool.evict([s["exp_avg"] for s in optimizer.state.values() if s["exp_avg"].numel()])
    assert_same(params, resident)


@pytest.mark.parametrize("cls", [qn.optim.PagedAdamW, qn.optim.PagedAdamW8bit])
def test_a_checkpoint_goes_back_to_paged_memory(device, moving, cls):
    for pool, other_pool in zip(pools(device), pools(device), strict=True):
        params = parameters(MANY, device=device)
        optimizer = cls(params, paged=pool)
        run(optimizer, params, 3)
        saved = through_a_file(optimizer.state_dict())
        resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = cls(resumed, paged=other_pool)
        other.load_state_dict(saved)
        assert other_pool.stats().used_bytes == pool.stats().used_bytes
        run(optimizer, params, 3, first=3)
        run(other, resumed, 3, first=3)
        assert_same(params, resumed)
        assert_same_states(optimizer, other)

        # Paged or not is no matter of the checkpoint.
        plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resident = qn.optim.AdamW(plain)
        resident.load_state_dict(optimizer.state_dict())
        run(optimizer, params, 1, first=6)
        run(resident, plain, 1, first=6)
        assert_same(params, plain)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_is_paged_too(device, moving, how):
    params = parameters(MANY, device=device)
    optimizer = qn.optim.PagedAdamW8bit(params)
    run(optimizer, params, 2)
    pool = qn.memory.default_pool(device)
    before = pool.stats().used_bytes
    twin, copied = how((params, optimizer))
    assert pool.stats().used_bytes == 2 * before or device == "cuda"
    run(optimizer, params, 2, first=2)
    run(copied, twin, 2, first=2)
    assert_same(params, twin)


def test_a_copy_stays_in_the_pool_that_was_given(device, moving):
    for pool in pools(device):
        params = parameters(MANY, device=device)
        optimizer = qn.optim.PagedAdamW8bit(params, paged=pool)
        run(optimizer, params, 2)
        used = pool.stats().used_bytes
        twin, copied = copy.deepcopy((params, optimizer))
        assert pool.stats().used_bytes == 2 * used
        run(optimizer, params, 2, first=2)
        run(copied, twin, 2, first=2)
        assert_same(params, twin)


def test_what_is_unpickled_has_a_pool_like_the_one_that_was_given(device, moving):
    default = qn.memory.default_pool(device)
    for pool in pools(device):
        params = parameters(MANY, device=device)
        optimizer = qn.optim.PagedAdamW8bit(params, paged=pool)
        run(optimizer, params, 2)
        used, used_by_default = pool.stats().used_bytes, default.stats().used_bytes
        twin, copied = pickle.loads(pickle.dumps((params, optimizer)))
        own = copied._paging.pool(default.device)
        assert (own.backing, own.device_budget) == (pool.backing, pool.device_budget)
        assert own.stats().used_bytes == pool.stats().used_bytes == used
        assert default.stats().used_bytes <= used_by_default  # others may have died
        run(optimizer, params, 2, first=2)
        run(copied, twin, 2, first=2)
        assert_same(params, twin)


def test_memory_is_returned(device):
    pool = pools(device)[0]
    for _ in range(3):
        params = parameters(MANY, device=device)
        optimizer = qn.optim.AdamW(params, paged=pool)
        run(optimizer, params, 2)
        optimizer.load_state_dict(optimizer.state_dict())
        assert pool.stats().used_bytes > 0
        del params, optimizer
        gc.collect()
        assert pool.stats().used_bytes == 0


def test_parameters_that_come_later_are_paged(device, moving):
    for pool in pools(device):
        ours, theirs = parameters(MANY, device=device), parameters(MANY, device=device)
        a, b = qn.optim.AdamW(ours[:4], paged=pool), qn.optim.AdamW(theirs[:4])
        run(a, ours, 2)
        run(b, theirs, 2)
        for optimizer, params in ((a, ours), (b, theirs)):
            optimizer.add_param_group({"params": params[4:], "lr": 1e-2})
            run(optimizer, params, 2, first=2)
        assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("cls", "base", "dtype"),
    [
        ("PagedAdamW", "AdamW", torch.float32),
        ("PagedAdamW32bit", "AdamW", torch.float32),
        ("PagedAdamW8bit", "AdamW8bit", torch.uint8),
        ("PagedLion", "Lion", torch.float32),
        ("PagedLion32bit", "Lion", torch.float32),
        ("PagedLion8bit", "Lion8bit", torch.uint8),
    ],
)
def test_the_names_of_bitsandbytes(device, cls, base, dtype):
    ours, theirs = (parameters([(64, 80)], device=device) for _ in range(2))
    a = getattr(qn.optim, cls)(ours, lr=1e-3)
    b = getattr(qn.optim, base)(theirs, lr=1e-3)
    run(a, ours, 2)
    run(b, theirs, 2)
    assert_same(ours, theirs)
    assert a.state[ours[0]]["exp_avg"].dtype == dtype
