"""Gradients of the operators.

The functions that users call apply these Functions themselves: a Function outside of the operator
costs a third of one inside. The operators have them too, under the Autograd key, for graphs that
hold the bare operator: an exported program must train, or at least not be silently wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qlora_native import _eager
from qlora_native._eager import needs_grad
from qlora_native._library import LIBRARY

_ops = torch.ops.qlora_native


class Linear4bit(torch.autograd.Function):
    """Y = X W^T + bias."""

    @staticmethod
    def forward(x: torch.Tensor, bias: torch.Tensor | None, *weight: Any) -> torch.Tensor:
        return _eager.linear_4bit(x, bias, *weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _save_weight(ctx, inputs[2:])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        weight = _saved_weight(ctx)
        # The operator, not its Function, which Dynamo cannot trace inside of another's backward.
        dx = _eager.linear_4bit_dx(dy, *weight) if ctx.needs_input_grad[0] else None
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return (dx, dbias, *(None for _ in weight))


class Linear4bitDx(torch.autograd.Function):
    """dX = dY W. A Function of its own, so that gradients of gradients exist."""

    @staticmethod
    def forward(dy: torch.Tensor, *weight: Any) -> torch.Tensor:
        return _eager.linear_4bit_dx(dy, *weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _save_weight(ctx, inputs[1:])

    @staticmethod
    def backward(ctx: Any, ddx: torch.Tensor) -> tuple[Any, ...]:
        weight = _saved_weight(ctx)
        return (_eager.linear_4bit(ddx, None, *weight), *(None for _ in weight))


class GroupedLinear4bit(torch.autograd.Function):
    """Y = X W_e^T + bias_e, for the rows of every group e."""

    @staticmethod
    def forward(
        x: torch.Tensor, group_ends: torch.Tensor, bias: torch.Tensor | None, *weight: Any
    ) -> torch.Tensor:
        return _eager.grouped_linear_4bit(x, group_ends, bias, *weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, group_ends, bias, *weight = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        _save_groups(ctx, group_ends, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        group_ends, *weight = _saved_weight(ctx)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _eager.grouped_linear_4bit_dx(dy, group_ends, *weight)
        if ctx.needs_input_grad[2]:
            dbias = _sum_by_group(dy, group_ends).to(ctx.bias_dtype)
        return (dx, None, dbias, *(None for _ in weight))


class GroupedLinear4bitDx(torch.autograd.Function):
    """dX = dY W_e, for the rows of every group e."""

    @staticmethod
    def forward(dy: torch.Tensor, group_ends: torch.Tensor, *weight: Any) -> torch.Tensor:
        return _eager.grouped_linear_4bit_dx(dy, group_ends, *weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, group_ends, *weight = inputs
        _save_groups(ctx, group_ends, weight)

    @staticmethod
    def backward(ctx: Any, ddx: torch.Tensor) -> tuple[Any, ...]:
        group_ends, *weight = _saved_weight(ctx)
        ddy = _eager.grouped_linear_4bit(ddx, group_ends, None, *weight)
        return (ddy, None, *(None for _ in weight))


def _save_groups(ctx: Any, group_ends: torch.Tensor, weight: Sequence[Any]) -> None:
    ctx.save_for_backward(group_ends, *weight[:4])
    ctx.weight_format = weight[4:]


def _sum_by_group(dy: torch.Tensor, group_ends: torch.Tensor) -> torch.Tensor:
    """The sums over the rows of every group in fp32, always added in the same order."""
    rows = torch.arange(dy.shape[0], dtype=group_ends.dtype, device=dy.device)
    group = torch.searchsorted(group_ends, rows, right=True)
    # The last of the sums is that of the rows of no group.
    sums = dy.new_zeros(group_ends.shape[0] + 1, dy.shape[1], dtype=torch.float32)
    return sums.index_put((group,), dy.float(), accumulate=True)[:-1]


def _save_weight(ctx: Any, weight: tuple[Any, ...]) -> None:
    """Save the packed tensors where saved-tensor hooks and checkpointing see them."""
    ctx.save_for_backward(*weight[:4])
    ctx.weight_format = weight[4:]


def _saved_weight(ctx: Any) -> tuple[Any, ...]:
    return (*ctx.saved_tensors, *ctx.weight_format)


# What Function.apply comes to where no transform of torch.func is active. Binding the arguments to
# forward's signature, which apply does first, takes longer than everything else.
_apply_linear_4bit = super(torch.autograd.Function, Linear4bit).apply


def linear_4bit(x: torch.Tensor, bias: torch.Tensor | None, *weight: Any) -> torch.Tensor:
    """The operator, differentiable in `x` and `bias`."""
    if not needs_grad(x, bias):
        return _eager.linear_4bit(x, bias, *weight)
    if not _eager.is_traced() and _eager.is_plain(x, bias, *weight[:4]):
        return _apply_linear_4bit(x, bias, *weight)
    return Linear4bit.apply(x, bias, *weight)


def _linear_4bit_autograd(x: torch.Tensor, bias: torch.Tensor | None, *weight: Any) -> torch.Tensor:
    if needs_grad(x, bias):
        return Linear4bit.apply(x, bias, *weight)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.linear_4bit(x, bias, *weight)


def _linear_4bit_dx_autograd(dy: torch.Tensor, *weight: Any) -> torch.Tensor:
    if needs_grad(dy):
        return Linear4bitDx.apply(dy, *weight)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.linear_4bit_dx(dy, *weight)


def grouped_linear_4bit(
    x: torch.Tensor, group_ends: torch.Tensor, bias: torch.Tensor | None, *weight: Any
) -> torch.Tensor:
    """The operator, differentiable in `x` and `bias`."""
    if needs_grad(x, bias):
        return GroupedLinear4bit.apply(x, group_ends, bias, *weight)
    return _eager.grouped_linear_4bit(x, group_ends, bias, *weight)


def _grouped_linear_4bit_autograd(
    x: torch.Tensor, group_ends: torch.Tensor, bias: torch.Tensor | None, *weight: Any
) -> torch.Tensor:
    if needs_grad(x, bias):
        return GroupedLinear4bit.apply(x, group_ends, bias, *weight)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.grouped_linear_4bit(x, group_ends, bias, *weight)


def _grouped_linear_4bit_dx_autograd(
    dy: torch.Tensor, group_ends: torch.Tensor, *weight: Any
) -> torch.Tensor:
    if needs_grad(dy):
        return GroupedLinear4bitDx.apply(dy, group_ends, *weight)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.grouped_linear_4bit_dx(dy, group_ends, *weight)


LIBRARY.impl("grouped_linear_4bit", _grouped_linear_4bit_autograd, "Autograd")
LIBRARY.impl("grouped_linear_4bit_dx", _grouped_linear_4bit_dx_autograd, "Autograd")
LIBRARY.impl("linear_4bit", _linear_4bit_autograd, "Autograd")
LIBRARY.impl("linear_4bit_dx", _linear_4bit_dx_autograd, "Autograd")
