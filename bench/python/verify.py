"""Checks that every rival is right on the very tensors that are timed next."""

from __future__ import annotations

import torch

from implementations import Implementation

_HALF_WIDEST_GAP = {"nf4": 0.152, "fp4": 0.167, "int4": 0.072}
"""Half the widest distance between neighbouring code values, in units of absmax, rounded up."""

_DOUBLE_QUANT_ERROR = 0.08
"""More than double quantization moves an absmax of a normal weight, relative to that absmax."""

_SAMPLED = 48
"""Outputs of a product that are compared with fp64, a spread over all columns."""


class WrongResultError(AssertionError):
    """A rival's output is not what it must be; nothing is timed."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise WrongResultError(message)


def check_dequantized(
    name: str, weight: torch.Tensor, dequantized: torch.Tensor, quant_type: str, block_size: int
) -> None:
    """Raise unless every element is as near to the original as its block's code allows."""
    _require(
        dequantized.shape == weight.shape and dequantized.dtype == weight.dtype,
        f"{name}: dequantized to {tuple(dequantized.shape)} {dequantized.dtype}, "
        f"expected {tuple(weight.shape)} {weight.dtype}",
    )
    rows = max(1, 2**24 // weight.shape[1])
    worst = 0.0
    for first in range(0, weight.shape[0], rows):
        original = weight[first : first + rows].float().reshape(-1, block_size)
        error = (dequantized[first : first + rows].float().reshape(-1, block_size) - original).abs()
        worst = max(worst, float((error.amax(1) / original.abs().amax(1)).max()))
    limit = _HALF_WIDEST_GAP[quant_type] + _DOUBLE_QUANT_ERROR
    _require(worst <= limit, f"{name}: an element is {worst:.3f} absmax off, more than {limit:.3f}")


def _spread(size: int, device: torch.device) -> torch.Tensor:
    return torch.linspace(0, size - 1, min(size, _SAMPLED), device=device).long()


def check_product(
    name: str, product: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> None:
    """Raise unless `product` = left @ right, by fp64 over a sample of its columns."""
    columns = _spread(right.shape[1], right.device)
    exact = left.double() @ right[:, columns].double()
    scale = left.double().norm(dim=1, keepdim=True) * right[:, columns].double().norm(dim=0)
    # What the terms add up to when their signs are random, as those of their roundings are.
    spread = (left.double().square() @ right[:, columns].double().square()).sqrt()
    got = product[:, columns].double()
    # One rounding of the result; before it, in one or the other, rounded weights and fp32 sums.
    unit = torch.finfo(product.dtype).eps
    limit = unit * (exact.abs() + 5 * spread) + 1e-5 * scale
    excess = ((got - exact).abs() - limit).max()
    _require(
        bool(torch.isfinite(got).all()) and float(excess) <= 0,
        f"{name}: a product is off fp64 by {float(excess):.3g} more than rounding explains",
    )


def check_linear(
    implementation: Implementation, x: torch.Tensor, dy: torch.Tensor, quantized: object
) -> None:
    """Raise unless forward, and dX if any, agree with fp64 over the rival's dequantized weight."""
    name = implementation.name
    dense = implementation.dequantize(quantized)
    check_product(name, implementation.linear(x, quantized), x, dense.t())
    if "linear_backward" not in implementation.ops:
        return
    leaf = x.detach().clone().requires_grad_()
    (dx,) = torch.autograd.grad(implementation.linear(leaf, quantized), leaf, dy)
    check_product(f"{name} dX", dx, dy, dense)
