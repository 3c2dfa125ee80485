"""Eager calls and what goes on around them: other threads, autocast, replaced methods."""

import threading
import time
import weakref

import pytest
import torch

import qlora_native as qn
from _eager_calls import calls_of, direct, indirect, needs_table, parts_of, weight
from qlora_native import _C, _eager
from qlora_native.nn import Linear4bit

pytestmark = needs_table

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# ---- other threads ----


@pytest.mark.parametrize("double_quant", [False, True])
@torch.no_grad()
def test_parameters_replaced_during_a_call_live_until_its_end(monkeypatch, double_quant):
    layer = Linear4bit.from_linear(torch.nn.Linear(128, 48), double_quant=double_quant)
    x = torch.randn(1, 128)
    expected = layer(x)
    references = [weakref.ref(parameter) for parameter in layer.parameters()]
    alive, empty_strided = [], torch.empty_strided

    def replace_first(*arguments, **keywords):
        # The result is allocated when all is read, before the kernel: another thread's turn.
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(parameter.clone(), requires_grad=False))
        del parameter
        alive.extend(reference() is not None for reference in references)
        return empty_strided(*arguments, **keywords)

    monkeypatch.setattr(torch, "empty_strided", replace_first)
    ops = _eager.make(torch.Tensor.__dlpack_c_exchange_api__)
    y = ops.linear_4bit_of_layer(
        x, layer._parameters, 48, 128, layer.block_size, layer.quant_type, layer.codebook
    )
    assert alive == [True] * (4 if double_quant else 3)
    assert torch.equal(y, expected)
    assert all(reference() is None for reference in references)


@pytest.fixture
def threads():
    """Sets torch's threads, and leaves the core with another number from before."""
    before = torch.get_num_threads()

    def change(first, then):
        _C.set_cpu_threads(first)
        torch.set_num_threads(then)

    yield change
    torch.set_num_threads(before)
    _C.set_cpu_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "cols", "m"), [(1024, 1024, 16), (260, 256, 100)])
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (1, 8), (8, 1)])
@torch.no_grad()
def test_the_number_of_threads_changes(threads, dtype, rows, cols, m, first, then):
    q = weight(rows=rows, cols=cols)
    x, dy = torch.randn(m, cols).to(dtype), torch.randn(m, rows).to(dtype)
    for call in (
        lambda: qn.linear_4bit(x, q),
        lambda: _eager.linear_4bit_dx(dy, *parts_of(q)),
        q.dequantize,
    ):
        threads(first, then)
        call()
        assert _C.cpu_threads() == then


@pytest.mark.gpu
@torch.no_grad()
def test_a_full_queue_stops_no_other_thread():
    q, x = weight("cuda"), torch.randn(1, 128, device="cuda")
    qn.linear_4bit(x, q)
    torch.cuda.synchronize()
    longest, stop = 0.0, threading.Event()

    def tick():
        nonlocal longest
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.perf_counter()
        torch.cuda._sleep(3_000_000_000)  # more than a second; the queue holds some 1000 launches
        for _ in range(4000):
            qn.linear_4bit(x, q)
        elapsed = time.perf_counter() - start
    finally:
        stop.set()
        thread.join()
        torch.cuda.synchronize()
    assert elapsed > 0.8 and longest < elapsed / 2


# ---- negated values ----


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_values_of_any_dtype_may_be_negated(dtype):
    q, x, bias = weight(), torch.randn(2, 128).to(dtype), torch.randn(48).to(dtype)
    layer = Linear4bit.from_quantized(q)
    expected = qn.linear_4bit(-x, q)
    assert torch.equal(indirect(lambda: qn.linear_4bit(torch._neg_view(x), q)), expected)
    assert torch.equal(indirect(lambda: layer(torch._neg_view(x))), expected)
    y = indirect(lambda: qn.linear_4bit(x, q, torch._neg_view(bias)))
    assert torch.equal(y, qn.linear_4bit(x, q, -bias))
    dy = torch.randn(2, 48).to(dtype)
    dx = indirect(lambda: _eager.linear_4bit_dx(torch._neg_view(dy), *parts_of(q)))
    assert torch.equal(dx, _eager.linear_4bit_dx(-dy, *parts_of(q)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_negated_values(dtype):
    q, x = weight(), torch.randn(2, 128).to(dtype)
    y = indirect(lambda: qn.linear_4bit(torch._neg_view(x).requires_grad_(), q))
    assert torch.equal(y, qn.linear_4bit(-x, q))


# ---- autocast ----


@pytest.mark.parametrize("m", [1, 64, 600])
@torch.no_grad()
def test_products_below_the_functions_ignore_autocast(device, m):
    q = weight(device)
    x, dy = torch.randn(m, 128, device=device), torch.randn(m, 48, device=device)
    w = q.dequantize()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = _eager.linear_4bit(x, None, *parts_of(q))
        dx = _eager.linear_4bit_dx(dy, *parts_of(q))
    torch.testing.assert_close(y, x @ w.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dx, dy @ w, rtol=1e-5, atol=1e-4)


def test_a_backward_pass_inside_autocast_has_the_dtype_of_its_forward(device):
    q, x = weight(device), torch.randn(600, 128, device=device, requires_grad=True)
    dy = torch.randn(600, 48, device=device)
    y = qn.linear_4bit(x, q)
    with torch.autocast(device, dtype=torch.bfloat16):
        (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ q.dequantize(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_dense_product_in_panels_ignores_autocast(bias):
    q, x = weight(rows=1500, cols=4096), torch.randn(512, 4096)
    arguments = (x, torch.randn(1500) if bias else None, *parts_of(q))
    expected, calls = calls_of(lambda: _eager.linear_4bit(*arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_eager.linear_4bit(*arguments), expected)
    assert calls == 0


# ---- another idea of the weight ----


@torch.no_grad()
def test_a_layer_may_have_its_method_replaced(monkeypatch):
    layer, x = Linear4bit.from_linear(torch.nn.Linear(128, 48, bias=False)), torch.randn(1, 128)
    expected, q = layer(x), weight()
    layer.quantized_weight = lambda: q
    assert torch.equal(layer(x), qn.linear_4bit(x, q))
    del layer.quantized_weight
    assert torch.equal(direct(lambda: layer(x)), expected)
    monkeypatch.setattr(Linear4bit, "quantized_weight", lambda self: q)
    assert torch.equal(layer(x), qn.linear_4bit(x, q))


@torch.no_grad()
def test_a_subclass_may_compute_its_attributes():
    q, twice = weight(), torch.randn(48)

    class Computed(Linear4bit):
        @property
        def weight_absmax2(self):
            return self.parts["weight_absmax2"]

        @property
        def bias(self):
            return twice

    layer, x = Linear4bit.from_quantized(q), torch.randn(1, 128)
    layer.parts = {"weight_absmax2": torch.zeros_like(layer.weight_absmax2)}
    layer.__class__ = Computed
    expected = qn.linear_4bit(x, layer.quantized_weight(), twice)
    assert torch.equal(layer(x), expected)
