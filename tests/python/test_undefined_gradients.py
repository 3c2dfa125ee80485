"""Gradients that do not exist: a function behind an operation returned None for it."""

import torch

from _lora_case import Case
from qlora_native._grouped_lora import grouped_lora


class Nothing(torch.autograd.Function):
    """Its input has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_of_adapters_on_groups():
    x = torch.randn(5, 8, requires_grad=True)
    a, b = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    y = grouped_lora(x, torch.tensor([2, 5]), a, b, 1.0)
    (Nothing.apply(y).sum() + x.sum()).backward()
    assert a.grad is None and b.grad is None
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_of_a_layer_with_an_adapter(device):
    case = Case(device)
    (Nothing.apply(case.run()).sum() + case.x.sum()).backward()
    assert case.a.grad is None and case.b.grad is None and case.bias.grad is None
    torch.testing.assert_close(case.x.grad, torch.ones_like(case.x))
