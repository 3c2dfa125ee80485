"""One LoRA layer over a 4-bit or dense one: values, gradients, dtypes, compilation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qlora_native as qn
from _adapted import adapted, base_layer, dense_weight
from _dropout import drawn_factor
from _models import randomize_adapters
from qlora_native import _eager
from qlora_native.nn import (
    Linear4bit,
    LoraLinear,
    LoraSettings,
    lora_parameters,
)
from qlora_native.nn import adapted as adapted_module


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_a_new_adapter_changes_nothing(kind):
    base = base_layer(kind)
    x = torch.randn(3, 37)
    expected = base(x)
    layer = LoraLinear(base)
    layer.add_adapter("default", LoraSettings(r=4))
    layer.set_adapter("default")
    assert torch.equal(layer(x), expected)
    a = layer.lora_A["default"].weight
    assert a.shape == (4, 37)
    # kaiming_uniform with a = sqrt(5) is uniform in +-1/sqrt(in_features).
    assert 0.8 / math.sqrt(37) < a.abs().max() <= 1 / math.sqrt(37)
    assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_values_and_gradients_against_dense_fp64(kind, bias, rslora):
    layer = adapted(kind, bias, use_rslora=rslora)
    x = torch.randn(2, 3, 37, requires_grad=True)
    g = torch.randn(2, 3, 10)
    y = layer(x)
    y.backward(g)

    scaling = 8 / math.sqrt(4) if rslora else 8 / 4
    w = dense_weight(layer.base_layer).double()
    a = layer.lora_A["default"].weight.detach().double().requires_grad_()
    b = layer.lora_B["default"].weight.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    bias64 = layer.bias.detach().double() if bias else None
    y64 = F.linear(x64, w + scaling * (b @ a), bias64)
    y64.backward(g.double())
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y.double(), y64, **close)
    torch.testing.assert_close(x.grad.double(), x64.grad, **close)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad.double(), a.grad, **close)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad.double(), b.grad, **close)


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_products_run_in_the_activations_dtype(kind):
    layer = LoraLinear(base_layer(kind, dtype=torch.bfloat16))
    layer.add_adapter("default", LoraSettings(r=4))
    layer.set_adapter("default")
    randomize_adapters(layer)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == torch.float32
    x = torch.randn(2, 37, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert b.grad.dtype == torch.float32
    with torch.no_grad():
        for factor in (a, b):
            factor.copy_(factor.bfloat16())
    assert torch.equal(layer(x), y), "the factors were not rounded to bfloat16 before"


def test_compute_dtype_reaches_the_adapter():
    torch.manual_seed(0)
    base = Linear4bit.from_linear(nn.Linear(64, 8), compute_dtype=torch.bfloat16)
    layer = LoraLinear(base)
    layer.add_adapter("default", LoraSettings(r=4))
    layer.set_adapter("default")
    randomize_adapters(layer)
    x = torch.randn(2, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())
    assert torch.equal(layer(x.bfloat16().float()), y)
    update = F.linear(F.linear(x, layer.lora_A["default"].weight), layer.lora_B["default"].weight)
    torch.testing.assert_close(y, base(x) + update * (32 / 4), rtol=0.02, atol=0.02)


def test_dropout_acts_in_training_on_the_adapter_only():
    layer = adapted("4bit", dropout=0.5)
    x = torch.randn(64, 37)
    layer.eval()
    quiet = layer(x)
    assert torch.equal(quiet, layer(x))
    layer.train()
    torch.manual_seed(1)
    noisy = layer(x)
    torch.manual_seed(1)
    dropped = x * drawn_factor(0.5, 64, 37).float()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(noisy, layer.base_layer(x) + F.linear(F.linear(dropped, a), b) * 2)
    assert not torch.equal(noisy, quiet)


@pytest.fixture
def operations(monkeypatch):
    """Counts what goes through the one operation."""
    calls = []
    for name in ("linear_4bit_lora", "_around_dispatcher"):
        function = getattr(adapted_module, name)
        counted = lambda *a, f=function, **k: (f(*a, **k), calls.append(f))[0]  # noqa: E731
        monkeypatch.setattr(adapted_module, name, counted)
    return calls


def general_path(layer, x):
    """y by torch's products beside the base layer's."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer(x) + F.linear(F.linear(x, a), b) * layer.settings["default"].scaling


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_one_adapter_over_a_4bit_layer_is_one_operation(operations, grad, rows):
    layer = adapted("4bit")
    x = torch.randn(rows, 37)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x), general_path(layer, x), rtol=1e-5, atol=1e-5)
    assert operations


def test_the_eager_operation_is_the_operator():
    layer = LoraLinear(Linear4bit.from_linear(nn.Linear(64, 10)))
    layer.add_adapter("default", LoraSettings(r=4, alpha=8))
    layer.set_adapter("default")
    randomize_adapters(layer)
    x = torch.randn(2, 2, 64)
    before = _eager.OPS.calls
    with torch.no_grad():
        y = layer(x)
        assert _eager.OPS.calls == before + bool(_eager.OPS.has_exchange_api)
        adapter = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, 2.0)
        q, bias = layer.base_layer.quantized_weight(), layer.bias
        torch.testing.assert_close(qn.linear_4bit_lora(x, q, *adapter, bias=bias), y)
        # Unusual layouts of a factor, and what something watches, go the long way.
        wide = torch.stack([adapter[0], adapter[0]], dim=-1)[..., 0]
        torch.testing.assert_close(qn.linear_4bit_lora(x, q, wide, *adapter[1:], bias=bias), y)
        with FlopCounterMode(display=False):
            torch.testing.assert_close(layer(x), y)
        for bad in (adapter[0][:, :-1], adapter[0][:-1], adapter[0].double()[:, 1:]):
            with pytest.raises((ValueError, TypeError)):
                qn.linear_4bit_lora(x, q, bad, *adapter[1:], bias=bias)


def test_watched_and_replaced_layers_take_the_general_path(operations):
    def general(change):
        layer = adapted("4bit")
        layer.eval()
        x = torch.randn(3, 37)
        expected = general_path(layer, x)
        change(layer)
        operations.clear()
        torch.testing.assert_close(layer(x), expected)
        assert not operations

    seen = []
    general(lambda layer: layer.base_layer.register_forward_hook(lambda *_: seen.append(1)))
    general(lambda layer: layer.base_layer.register_forward_pre_hook(lambda *_: seen.append(1)))
    assert seen == [1, 1]

    def replace_forward(layer):
        forward = layer.base_layer.forward
        layer.base_layer.forward = lambda x: forward(x)

    general(replace_forward)
    general(lambda layer: layer.lora_dropout.update({"default": nn.Sequential()}))
    general(lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5, True).eval()}))

    def subclass(layer):
        layer.base_layer.__class__ = type("Subclass", (Linear4bit,), {})

    general(subclass)


@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_another_dtype(adapter_dtype):
    layer = LoraLinear(base_layer("4bit"))
    layer.add_adapter("default", LoraSettings(r=4), adapter_dtype)
    layer.set_adapter("default")
    randomize_adapters(layer)
    x = torch.randn(3, 37)
    y = layer(x)
    a, b = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
    torch.testing.assert_close(y, layer.base_layer(x) + F.linear(F.linear(x, a), b) * 8)
    y.sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == adapter_dtype


def test_only_packed_tensors_are_saved_for_backward():
    layer = adapted("4bit")
    x = torch.randn(6, 37)
    numel = 37 * 10
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert saved
    dense = [t for t in saved if t.is_floating_point() and t.numel() >= numel]
    assert dense == []
    packed = {p.untyped_storage().data_ptr() for p in layer.base_layer.parameters()}
    assert any(t.untyped_storage().data_ptr() in packed for t in saved)


def test_several_adapters():
    layer = adapted("4bit")
    layer.add_adapter("other", LoraSettings(r=2, alpha=3), torch.bfloat16)
    with torch.no_grad():
        layer.lora_B["other"].weight.normal_()
    x = torch.randn(3, 37)
    base = layer.base_layer(x)
    first = layer(x)
    layer.set_adapter("other")
    second = layer(x)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), first + second - base)
    layer.set_adapter([])
    assert torch.equal(layer(x), base)
    with pytest.raises(KeyError, match="third"):
        layer.set_adapter("third")
    with pytest.raises(ValueError, match="already exists"):
        layer.add_adapter("other", LoraSettings())
    with pytest.raises(ValueError, match=r"'a\.b'"):
        layer.add_adapter("a.b", LoraSettings())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend):
    layer = adapted("4bit")
    x = torch.randn(4, 37, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    expected = [p.grad.clone() for p in (x, *lora_parameters(layer))]
    x.grad = None
    layer.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    out = compiled(x)
    torch.testing.assert_close(out, y)
    out.square().sum().backward()
    for a, b in zip(expected, (x, *lora_parameters(layer)), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-5)


def test_autocast():
    layer = adapted("4bit")
    x = torch.randn(4, 37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)
