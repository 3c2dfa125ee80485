"""A 4-bit layer with an adapter, its twin in fp64, and what is expected of the two."""

from __future__ import annotations

import torch

import qlora_native as qn

IN, OUT = 96, 40
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def relative_error(actual, expected):
    scale = expected.norm().item() or 1.0
    return (actual.double() - expected).norm().item() / scale


class Case:
    """A 4-bit layer with an adapter, and the same in fp64 over the decoded weight."""

    def __init__(self, device, dtype=torch.float32, rank=8, lead=(3, 5), adapter_dtype=None):
        adapter_dtype = adapter_dtype or torch.float32
        self.q = qn.quantize_4bit(torch.randn(OUT, IN, device=device))
        self.x = torch.randn(*lead, IN, device=device).to(dtype).requires_grad_()
        self.a = torch.randn(rank, IN, device=device).to(adapter_dtype).requires_grad_()
        self.b = torch.randn(OUT, rank, device=device).to(adapter_dtype).requires_grad_()
        self.bias = torch.randn(OUT, device=device).to(dtype).requires_grad_()
        self.scaling = 0.75

    @property
    def leaves(self):
        return (self.x, self.a, self.b, self.bias)

    def run(self, p=0.0, **arguments):
        return qn.linear_4bit_lora(
            self.x, self.q, self.a, self.b, self.scaling, bias=self.bias, dropout_p=p, **arguments
        )

    def exact(self, factor=1.0):
        """Return (y, leaves) in fp64; `factor` multiplies the elements of the adapter's x."""
        x, a, b, bias = (t.detach().double().requires_grad_() for t in self.leaves)
        w = self.q.dequantize(torch.float32).double()
        y = x @ w.T + bias + self.scaling * ((x * factor) @ a.T) @ b.T
        return y, (x, a, b, bias)


def assert_step(case, actual, factor=1.0, bound=None):
    """`actual` is y; its gradients and those in fp64 agree."""
    bound = bound or {torch.float32: 2e-6}.get(case.x.dtype, 4 * 2**-8)
    expected, exact_leaves = case.exact(factor)
    dy = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, case.leaves, dy)
    expected_gradients = torch.autograd.grad(expected, exact_leaves, dy.double())
    assert actual.dtype == case.x.dtype
    assert relative_error(actual, expected) < bound
    for name, got, want, leaf in zip(
        ("x", "a", "b", "bias"), gradients, expected_gradients, case.leaves, strict=True
    ):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        assert relative_error(got, want) < bound, name


def saved_activations(run):
    """Return the floating tensors that a call saves, other than leaves."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = run()
    del y
    return [t for t in saved if t.is_floating_point() and not isinstance(t, torch.nn.Parameter)]
