"""How far products are from fp64, as relative errors of whole matrices.

The exact product is that of the weight which the codes stand for, so the error of quantizing itself
is not in it. Next to a rival's own product stands the plain way: decode the weight to the dtype of
the activations, then torch's dense product.
"""

from __future__ import annotations

from typing import Any

import torch

from implementations import Implementation

_MOST_ROWS = 64
_CHUNK_ELEMENTS = 2**24


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the exact matrix."""
    return float((got.double() - exact).norm() / exact.norm())


def product_fp64(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right in fp64, over so many columns at a time that memory is no matter."""
    columns = max(1, _CHUNK_ELEMENTS // right.shape[0])
    wide = left.double()
    parts = [wide @ part.double() for part in right.split(columns, dim=1)]
    return torch.cat(parts, dim=1)


def _sample(rows: torch.Tensor) -> torch.Tensor:
    count = min(len(rows), _MOST_ROWS)
    return torch.linspace(0, len(rows) - 1, count, device=rows.device).long()


def errors(
    op: str, implementation: Implementation, x: torch.Tensor, dy: torch.Tensor, quantized: Any
) -> tuple[float, float]:
    """Return the errors of the rival's product (dX for linear_backward) and of the plain way.

    Over up to 64 rows of the activations, each with all of its outputs.
    """
    if op == "linear":
        left, right = x, implementation.exact(quantized).t()
        got = implementation.linear(x, quantized)
        plain = torch.nn.functional.linear(x, implementation.dequantize(quantized))
    else:
        left, right = dy, implementation.exact(quantized)
        leaf = x.detach().clone().requires_grad_()
        (got,) = torch.autograd.grad(implementation.linear(leaf, quantized), leaf, dy)
        plain = dy @ implementation.dequantize(quantized)
    rows = _sample(left)
    exact = product_fp64(left[rows], right)
    return relative_error(got[rows], exact), relative_error(plain[rows], exact)
