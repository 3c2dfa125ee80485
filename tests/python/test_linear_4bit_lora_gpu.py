"""Layers with adapters in CUDA graphs, and against the CPU."""

import contextlib

import pytest
import torch
from torch import nn

import qlora_native as qn
from _eager_calls import Everything
from _graphs import captured
from _lora_case import Case, assert_step
from qlora_native.nn import Linear4bit, LoraLinear, LoraSettings

pytestmark = pytest.mark.gpu


def test_the_dropout_is_the_cpus():
    case = Case("cpu")
    torch.manual_seed(1)
    expected = case.run(0.5)
    torch.manual_seed(1)
    leaves = [t.detach().cuda() for t in case.leaves]
    y = qn.linear_4bit_lora(
        leaves[0], case.q.to("cuda"), *leaves[1:3], case.scaling, bias=leaves[3], dropout_p=0.5
    )
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scaling", [1.0, 0.75])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_float32_factors_are_not_rounded_to_16_bits(dtype, scaling):
    case = Case("cuda", dtype, lead=(70,))
    case.scaling = scaling
    assert_step(case, case.run())
    for mode in (contextlib.nullcontext(), Everything()):  # in one call, and by the operators
        with mode:
            gradients = torch.autograd.grad(case.run().float().sum(), (case.a, case.b))
        for gradient in gradients:
            assert gradient.dtype == torch.float32
            assert not torch.equal(gradient, gradient.to(dtype).float())


def test_a_step_without_dropout_is_captured():
    case = Case("cuda")
    dy = torch.randn(3, 5, case.b.shape[0], device="cuda")

    def step():
        y = case.run()
        return (y, *torch.autograd.grad(y, case.leaves, dy))

    graph, results = captured(step)
    with torch.no_grad():
        for leaf in case.leaves:
            leaf.normal_()
    graph.replay()
    for actual, expected in zip(results, step(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_dropout_is_refused_while_capturing():
    case = Case("cuda")
    with pytest.raises(RuntimeError, match="same mask"):
        captured(lambda: case.run(0.5))


def test_a_module_that_is_captured_drops_anew_in_every_replay():
    layer = LoraLinear(Linear4bit.from_linear(nn.Linear(128, 64, device="cuda")))
    layer.add_adapter("default", LoraSettings(r=8, dropout=0.5))
    layer.set_adapter("default")
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x = torch.randn(16, 128, device="cuda")
    graph, y = captured(lambda: layer(x))
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
