"""linear_4bit_lora_group: one input for several layers."""

import pytest
import torch

import qlora_native as qn
from _dropout import drawn_factor
from _lora_case import DTYPES, IN, Case, relative_error, saved_activations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_group_is_its_layers(device, dtype, p):
    x = torch.randn(4, 9, IN, device=device).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    layers, biases, exact, leaves, exact_leaves = [], [], [], [x], [exact_x]
    torch.manual_seed(6)
    factor = drawn_factor(p, 36, IN).reshape(4, 9, IN).to(device)
    for i, (out, rank) in enumerate([(40, 8), (16, 3), (24, 8)]):
        q = qn.quantize_4bit(torch.randn(out, IN, device=device), quant_type=["nf4", "fp4"][i % 2])
        a = torch.randn(rank, IN, device=device, requires_grad=True)
        b = torch.randn(out, rank, device=device, requires_grad=True)
        bias = torch.randn(out, device=device).to(dtype).requires_grad_() if i == 1 else None
        layers.append((q, a, b, 0.5 + i))
        biases.append(bias)
        mine = [t for t in (a, b, bias) if t is not None]
        theirs = [t.detach().double().requires_grad_() for t in mine]
        leaves += mine
        exact_leaves += theirs
        w = q.dequantize(torch.float32).double()
        y = exact_x @ w.T + (0.5 + i) * ((exact_x * factor) @ theirs[0].T) @ theirs[1].T
        exact.append(y + theirs[2] if bias is not None else y)
    torch.manual_seed(6)
    outputs = qn.linear_4bit_lora_group(x, layers, biases=biases, dropout_p=p)
    dy = [torch.randn_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, dy)
    expected = torch.autograd.grad(exact, exact_leaves, [one.double() for one in dy])
    bound = 2e-6 if dtype == torch.float32 else 4 * 2**-8
    for got, want in zip((*outputs, *gradients), (*exact, *expected), strict=True):
        assert relative_error(got, want) < bound


def test_an_output_of_a_group_that_is_not_used(device):
    case = Case(device)
    other = Case(device)
    layers = [(c.q, c.a, c.b, 0.5) for c in (case, other)]
    first, _ = qn.linear_4bit_lora_group(case.x, layers)
    gradients = torch.autograd.grad(first.sum(), (case.x, case.a, other.a, other.b))
    alone = qn.linear_4bit_lora(case.x, case.q, case.a, case.b, 0.5)
    expected = torch.autograd.grad(alone.sum(), (case.x, case.a))
    for got, want in zip(gradients, expected, strict=False):
        torch.testing.assert_close(got, want)
    assert not gradients[2].any() and not gradients[3].any()


def test_a_group_with_a_frozen_adapter_saves_x_once(device):
    cases = [Case(device) for _ in range(3)]
    cases[1].a.requires_grad_(False)
    x = torch.nn.functional.gelu(cases[0].x)
    layers = [(c.q, c.a, c.b, 0.5) for c in cases]
    saved = saved_activations(lambda: qn.linear_4bit_lora_group(x, layers))
    assert [t.shape for t in saved].count(x.shape) == 1
    assert [t.shape for t in saved].count((15, 24)) == 1
    outputs = qn.linear_4bit_lora_group(x, layers)
    leaves = [cases[0].a, cases[2].a, cases[1].b]
    gradients = torch.autograd.grad([y.sum() for y in outputs], leaves)
    alone = [qn.linear_4bit_lora(x, *layer) for layer in layers]
    for got, want in zip(
        gradients, torch.autograd.grad([y.sum() for y in alone], leaves), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_bad_groups():
    case = Case("cpu")
    layer = (case.q, case.a, case.b, 0.5)
    with pytest.raises(ValueError, match="no layer"):
        qn.linear_4bit_lora_group(case.x, [])
    with pytest.raises(ValueError, match="2 biases are given for 1"):
        qn.linear_4bit_lora_group(case.x, [layer], biases=[None, None])
    other = (qn.quantize_4bit(torch.randn(4, IN + 32)), case.a, torch.zeros(4, 8), 0.5)
    with pytest.raises(ValueError, match=str(IN + 32)):
        qn.linear_4bit_lora_group(case.x, [layer, other])
