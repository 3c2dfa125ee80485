"""Products of groups of rows with a 4-bit matrix each: operators, kernels and fakes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from qlora_native import _C, _checks
from qlora_native._library import (
    WEIGHT_SCHEMA,
    as_rows,
    product,
    product_dx,
    ran_our_product,
    register,
)
from qlora_native._weight import WeightStack, address


def grouped_linear_4bit(
    x: torch.Tensor, group_ends: torch.Tensor, bias: torch.Tensor | None, *parts: Any
) -> torch.Tensor:
    """The operator's kernel on a CPU and on CUDA devices."""
    y = _grouped_linear_4bit_fake(x, group_ends, bias, *parts)
    stack = _stack(*parts)
    rows, row_stride = as_rows(x, stack.shape[2])
    group_ends = group_ends.contiguous()
    bias = None if bias is None else bias.contiguous()
    arguments = {
        "x": rows.data_ptr(),
        "m": rows.shape[0],
        "row_stride": row_stride,
        "dtype": _checks.FLOAT_DTYPES[x.dtype],
        "ends": group_ends.data_ptr(),
        "index_bytes": group_ends.itemsize,
        "bias": address(bias),
        "y": y.data_ptr(),
    }
    if not ran_our_product(_C.grouped_matmul_4bit_plan, _C.grouped_matmul_4bit, stack, arguments):
        for group, part in _groups(group_ends, y):
            one_bias = None if bias is None else bias[group]
            product(rows[part], row_stride, one_bias, stack[group], y[part])
    return y


def _stack(*parts: Any) -> WeightStack:
    *tensors, shape, block_size, quant_type, codebook = parts
    return WeightStack(*tensors, shape, block_size, _checks.codebook(quant_type, codebook))


def _groups(group_ends: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield (group, its rows) of all that have rows, on a CPU; clear the rows of none in `out`."""
    start = 0
    for group, end in enumerate(group_ends.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = end
    out[start:].zero_()


def _grouped_linear_4bit_fake(
    x: torch.Tensor, group_ends: torch.Tensor, bias: torch.Tensor | None, *parts: Any
) -> torch.Tensor:
    shape = _check_groups("x", x, group_ends, parts, "in")
    _checks.check_group_bias(bias, x, shape)
    return x.new_empty(x.shape[0], shape[1])


def grouped_linear_4bit_dx(dy: torch.Tensor, group_ends: torch.Tensor, *parts: Any) -> torch.Tensor:
    """The operator's kernel on a CPU and on CUDA devices."""
    dx = _grouped_linear_4bit_dx_fake(dy, group_ends, *parts)
    stack = _stack(*parts)
    rows, row_stride = as_rows(dy, stack.shape[1])
    group_ends = group_ends.contiguous()
    arguments = {
        "dy": rows.data_ptr(),
        "m": rows.shape[0],
        "row_stride": row_stride,
        "dtype": _checks.FLOAT_DTYPES[dy.dtype],
        "ends": group_ends.data_ptr(),
        "index_bytes": group_ends.itemsize,
        "dx": dx.data_ptr(),
    }
    if not ran_our_product(
        _C.grouped_matmul_4bit_transposed_plan,
        _C.grouped_matmul_4bit_transposed,
        stack,
        arguments,
    ):
        for group, part in _groups(group_ends, dx):
            product_dx(rows[part], row_stride, stack[group], dx[part])
    return dx


def _grouped_linear_4bit_dx_fake(
    dy: torch.Tensor, group_ends: torch.Tensor, *parts: Any
) -> torch.Tensor:
    shape = _check_groups("dy", dy, group_ends, parts, "out")
    return dy.new_empty(dy.shape[0], shape[2])


def _check_groups(
    what: str, x: torch.Tensor, group_ends: torch.Tensor, parts: Sequence[Any], features: str
) -> Sequence[int]:
    *stack, quant_type, codebook = parts
    _checks.check_stack(*stack)
    _checks.codebook(quant_type, codebook)
    packed, shape = stack[0], stack[4]
    _checks.float_dtype_code(what, x.dtype)
    _checks.check_groups(what, x, group_ends, shape, features)
    if x.device != packed.device:
        raise ValueError(f"{what} is on {x.device}, the 4-bit weights on {packed.device}")
    return shape


register(
    f"grouped_linear_4bit(Tensor x, Tensor group_ends, Tensor? bias, {WEIGHT_SCHEMA}) -> Tensor",
    grouped_linear_4bit,
    _grouped_linear_4bit_fake,
)
register(
    f"grouped_linear_4bit_dx(Tensor dy, Tensor group_ends, {WEIGHT_SCHEMA}) -> Tensor",
    grouped_linear_4bit_dx,
    _grouped_linear_4bit_dx_fake,
)


@register_flop_formula(torch.ops.qlora_native.grouped_linear_4bit)
@register_flop_formula(torch.ops.qlora_native.grouped_linear_4bit_dx)
def _grouped_linear_flops(x_shape, ends_shape, *weight_shapes, out_shape, **kwargs) -> int:
    return 2 * math.prod(x_shape) * out_shape[-1]
