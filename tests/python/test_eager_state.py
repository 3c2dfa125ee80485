"""Eager calls: parameters that change, arguments that are wrong, a torch without DLPack's table."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

import qlora_native as qn
from _eager_calls import direct, needs_table, weight
from qlora_native.nn import Linear4bit

pytestmark = needs_table


class Everything(TorchFunctionMode):
    """Wants to see every function, and changes none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


# ---- the state of a layer ----


def changed_layers():
    """Yield the name of a change, a layer after it, and the layer that it should equal."""
    torch.manual_seed(1)
    a, b = (torch.nn.Linear(128, 48) for _ in range(2))
    for name in ("data", "load_state_dict", "setattr", "requantize", "copy", "deepcopy"):
        layer, other = (Linear4bit.from_linear(copy.deepcopy(m)) for m in (a, b))
        with torch.no_grad():
            layer(torch.ones(1, 128))  # what a cache would remember
        if name == "data":
            for parameter, new in zip(layer.parameters(), other.parameters(), strict=True):
                parameter.data = new.data.clone()
        elif name == "load_state_dict":
            layer.load_state_dict(other.state_dict())
        elif name == "setattr":
            for key, new in other.named_parameters():
                setattr(layer, key, torch.nn.Parameter(new.detach().clone(), requires_grad=False))
        elif name == "requantize":
            layer.requantize_(b.weight)
            layer.bias = other.bias
        elif name == "copy":
            with torch.no_grad():
                for parameter, new in zip(layer.parameters(), other.parameters(), strict=True):
                    parameter.copy_(new)
        else:
            layer = copy.deepcopy(other)
            del other.weight
            other = Linear4bit.from_linear(copy.deepcopy(b))
        yield name, layer, other


@torch.no_grad()
def test_changed_parameters_are_honoured():
    x = torch.randn(1, 128)
    for name, layer, other in changed_layers():
        expected = qn.linear_4bit(x, other.quantized_weight(), other.bias)
        assert torch.equal(direct(lambda layer=layer: layer(x)), expected), name


@torch.no_grad()
def test_functional_call_swaps_the_parameters():
    layer, other = (Linear4bit.from_linear(torch.nn.Linear(128, 48)) for _ in range(2))
    x = torch.randn(1, 128)
    y = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert torch.equal(y, other(x))


@torch.no_grad()
def test_a_parameter_that_is_computed_is_honoured():
    class Doubled(torch.nn.Module):
        def forward(self, bias):
            return bias * 2

    layer = Linear4bit.from_linear(torch.nn.Linear(128, 48))
    x = torch.randn(1, 128)
    expected = qn.linear_4bit(x, layer.quantized_weight(), layer.bias * 2)
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_a_subclass_may_have_another_weight():
    q = weight()

    class Other(Linear4bit):
        def quantized_weight(self):
            return q

    layer = Other.from_linear(torch.nn.Linear(128, 48, bias=False))
    x = torch.randn(1, 128)
    assert torch.equal(layer(x), qn.linear_4bit(x, q))


@torch.no_grad()
def test_scales_at_an_odd_address():
    layer = Linear4bit.from_linear(torch.nn.Linear(128, 48, bias=False))
    x = torch.randn(1, 128)
    expected = layer(x)
    raw = torch.empty(layer.weight_absmax2.numel() + 1, dtype=torch.uint8)
    raw[1:] = layer.weight_absmax2
    layer.weight_absmax2.data = raw[1:]
    assert torch.equal(direct(lambda: layer(x)), expected)  # by way of a copy


# ---- arguments that are wrong ----


def wrong_arguments():
    q = weight()
    x = torch.randn(1, 128)
    replaced = {
        name: copy.copy(q) for name in ("packed", "absmax", "absmax2", "offset", "block", "type")
    }
    for name, value in (
        ("packed", q.packed[:-1]), ("absmax", q.absmax.float()), ("absmax2", None),
        ("offset", q.offset.double()),
    ):  # fmt: skip
        object.__setattr__(replaced[name], name, value)
    object.__setattr__(replaced["block"], "block_size", 63)
    object.__setattr__(replaced["type"], "quant_type", "nf5")
    yield from ((x, value, None) for value in replaced.values())
    yield torch.randn(1, 127), q, None
    yield torch.tensor(1.0), q, None
    yield x.double(), q, None
    yield x.long(), q, None
    yield x, q, torch.randn(47)
    yield x, q, torch.randn(1, 48)
    yield x, qn.quantize_4bit(torch.randn(128)), None
    yield x.to("meta"), q, None
    yield x.to_sparse(), q, None


@torch.no_grad()
def test_errors_are_the_operators():
    for x, q, bias in wrong_arguments():
        errors = []
        for mode in (torch.no_grad(), Everything()):
            with mode, pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
                qn.linear_4bit(x, q, bias)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    with pytest.raises(AttributeError):
        qn.linear_4bit(None, weight())
    with pytest.raises(AttributeError):
        qn.linear_4bit([1.0] * 128, weight())


# ---- a torch without the table of DLPack functions ----

WITHOUT_TABLE = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import qlora_native as qn
from qlora_native import _eager, _library

assert not _eager.OPS.has_exchange_api
q = qn.quantize_4bit(torch.randn(48, 128))
x = torch.randn(2, 128)
w = q.dequantize()
kernels = []
kernel = _library.linear_4bit
_library.linear_4bit = lambda *arguments: kernels.append("by itself") or kernel(*arguments)
torch.testing.assert_close(qn.linear_4bit(x, q), x @ w.T, rtol=1e-4, atol=1e-4)
layer = qn.nn.Linear4bit.from_quantized(q)
torch.testing.assert_close(layer(x), x @ w.T, rtol=1e-4, atol=1e-4)
assert len(kernels) == 2
x.requires_grad_()
(dx,) = torch.autograd.grad(qn.linear_4bit(x, q).sum(), x)
torch.testing.assert_close(dx, w.sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)
assert len(kernels) == 3
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    qn.linear_4bit(x.detach(), q)
assert counter.get_total_flops() == 2 * 2 * 48 * 128
qn.linear_4bit(torch._neg_view(x.detach()), q)
assert len(kernels) == 3
assert _eager.OPS.calls == 0
"""


def test_without_the_table_the_kernel_is_called_by_itself():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TABLE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
