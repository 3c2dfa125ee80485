"""Low-rank products of groups of rows, differentiable: an adapter for each expert of a mixture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import _eager, _grouped_lora_ops
from qlora_native._eager import needs_grad
from qlora_native._library import LIBRARY

_ops = torch.ops.qlora_native


class GroupedLora(torch.autograd.Function):
    """y = t B_e^T with t = scaling x A_e^T, for the rows of every group e; the results are both."""

    @staticmethod
    def forward(
        x: Tensor, group_ends: Tensor, a: Tensor, b: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        return _run(_grouped_lora_ops.forward, _ops.grouped_lora, x, group_ends, a, b, scaling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, group_ends, a, b, ctx.scaling = inputs
        _, t = output
        ctx.mark_non_differentiable(t)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if a.requires_grad else None, t if b.requires_grad else None, group_ends, a, b
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        wants_dx, _, wants_da, wants_db, _ = wanted = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(wanted)
        results = iter(
            _run(
                _grouped_lora_ops.backward,
                _ops.grouped_lora_backward,
                dy,
                *ctx.saved_tensors,
                ctx.scaling,
                wants_dx,
                wants_da,
                wants_db,
            )
        )
        return tuple(next(results) if wants else None for wants in wanted)


def _run(kernel: Any, operator: Any, *arguments: Any) -> Any:
    """Compute by the kernel itself where nothing of torch has to see the operator."""
    tensors = [part for part in arguments if part is None or isinstance(part, Tensor)]
    if not _eager.is_traced() and _eager.is_plain(*tensors):
        return kernel(*arguments)
    return operator(*arguments)


def grouped_lora(x: Tensor, group_ends: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return ``scaling * x[start:end] @ A_e.T @ B_e.T`` for every group of rows, in one tensor.

    Differentiable, once, in `x`, `a` and `b`, always with the same bits. x is kept for the backward
    pass only if `a` needs a gradient. On a GPU the host does not wait for `group_ends`.

    Args:
        x: ``[S, in_features]`` float32, float16 or bfloat16, the rows of group 0 first.
        group_ends: int32 or int64 ``[E]`` on the same device: where the rows of each group end.
            They ascend from 0 to S.
        a: ``[E, r, in_features]``, of any float type. The products run in x's dtype.
        b: ``[E, out_features, r]``, likewise.
        scaling: the factor of the product.

    Returns:
        ``[S, out_features]`` of x's dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit or, on a CPU, the ends do not
            ascend to S; the message holds them.
    """
    if needs_grad(x, a, b):
        return GroupedLora.apply(x, group_ends, a, b, scaling)[0]
    return _run(_grouped_lora_ops.forward, _ops.grouped_lora, x, group_ends, a, b, scaling)[0]


def _autograd_kernel(
    x: Tensor, group_ends: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    if needs_grad(x, a, b):
        return GroupedLora.apply(x, group_ends, a, b, scaling)
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.grouped_lora(x, group_ends, a, b, scaling)


LIBRARY.impl("grouped_lora", _autograd_kernel, "Autograd")
