"""The torch operators: schemas, kernels for CPU and CUDA, fakes. The only user of torch.library.

Gradients are in `_autograd`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from qlora_native import _C, _checks, _threads
from qlora_native._weight import Weight, WeightStack, address, device_code, stream_and_threads

WEIGHT_SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, "
    "SymInt[] shape, int block_size, str quant_type, float[]? codebook"
)
LIBRARY = torch.library.Library("qlora_native", "DEF")

_threads.share_torch_threads()


def _check_parts(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    codebook: Sequence[float] | None,
) -> tuple[torch.device, Sequence[int]]:
    """Check the arguments that `WEIGHT_SCHEMA` declares; return the weight's device and shape."""
    _checks.check_weight(packed, absmax, absmax2, offset, shape, block_size)
    _checks.codebook(quant_type, codebook)
    return packed.device, shape


def _checked_weight(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: Sequence[int],
    block_size: int,
    quant_type: str,
    codebook: Sequence[float] | None,
) -> Weight:
    _checks.check_weight(packed, absmax, absmax2, offset, shape, block_size)
    book = _checks.codebook(quant_type, codebook)
    return Weight(packed, absmax, absmax2, offset, shape, block_size, book)


def workspace(size_bytes: int, device: torch.device) -> torch.Tensor | None:
    """Return scratch memory for a kernel, None for none."""
    return torch.empty(size_bytes, dtype=torch.uint8, device=device) if size_bytes > 0 else None


def as_rows(x: torch.Tensor, cols: int) -> tuple[torch.Tensor, int]:
    """Return x as [M, cols] with contiguous rows, and the row stride in elements."""
    rows = x.reshape(-1, cols) if cols > 0 else x.new_empty(math.prod(x.shape[:-1]), 0)
    if rows.shape[0] <= 1 or rows.stride(1) != 1 or rows.stride(0) < cols:
        rows = rows.contiguous()
    return rows, rows.stride(0) if rows.shape[0] > 1 else cols


def _quantize_4bit(
    input: torch.Tensor,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    codebook: Sequence[float] | None,
    offset: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = _quantize_4bit_fake(input, quant_type, block_size, double_quant, codebook, offset)
    packed, absmax, absmax2, out_offset = outputs
    if input.numel() == 0:
        return packed, absmax, absmax2, out_offset.zero_()
    input = input.contiguous()
    view = _C.WeightView.make(
        packed=packed.data_ptr(),
        absmax=absmax.data_ptr(),
        absmax2=absmax2.data_ptr(),
        offset=out_offset.data_ptr(),
        double_quant=double_quant,
        rows=1,
        cols=input.numel(),
        block_size=block_size,
        codebook=_checks.codebook(quant_type, codebook),
        device=device_code(input.device),
    )
    arguments = {
        "input": input.data_ptr(),
        "dtype": _checks.FLOAT_DTYPES[input.dtype],
        "pinned_offset": address(offset),
    }
    stream = stream_and_threads(input.device)
    size_bytes = _C.quantize_4bit_workspace_bytes(view, **arguments)
    scratch = workspace(size_bytes, input.device)
    _C.quantize_4bit(
        view,
        **arguments,
        workspace=address(scratch),
        workspace_bytes=size_bytes,
        stream=stream,
    )
    return outputs


def _quantize_4bit_fake(
    input: torch.Tensor,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    codebook: Sequence[float] | None,
    offset: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _checks.float_dtype_code("the tensor to quantize", input.dtype)
    _checks.check_block_size(block_size)
    _checks.codebook(quant_type, codebook)
    if offset is not None:
        if not double_quant:
            raise ValueError("an offset is given, but double_quant is off")
        if offset.dtype != torch.float32 or offset.numel() != 1 or offset.device != input.device:
            raise ValueError(
                f"offset must be one float32 on {input.device}, got {tuple(offset.shape)} "
                f"{offset.dtype} on {offset.device}"
            )
    numel = input.numel()
    blocks = _checks.num_blocks(numel, block_size)
    groups = _checks.num_groups(numel, block_size) if double_quant else 0
    packed = input.new_empty(_checks.packed_bytes(numel), dtype=torch.uint8)
    absmax = input.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32)
    absmax2 = input.new_empty(groups, dtype=torch.float32)
    out_offset = input.new_empty(() if double_quant else (0,), dtype=torch.float32)
    return packed, absmax, absmax2, out_offset


def _dequantize_4bit(*arguments: Any) -> torch.Tensor:
    *parts, dtype = arguments
    _checks.float_dtype_code("the output", dtype)
    weight = _checked_weight(*parts)
    return weight.dequantize(dtype).view(weight.shape)


def _dequantize_4bit_fake(*arguments: Any) -> torch.Tensor:
    *parts, dtype = arguments
    _checks.float_dtype_code("the output", dtype)
    device, shape = _check_parts(*parts)
    return torch.empty(list(shape), dtype=dtype, device=device)


def linear_4bit(x: torch.Tensor, bias: torch.Tensor | None, *parts: Any) -> torch.Tensor:
    """The operator's kernel on a CPU and on CUDA devices."""
    weight = _checked_weight(*parts)
    _checks.check_activation("x", x, weight.shape, "in", weight.device)
    _checks.check_bias(bias, x, weight.rows)
    bias = None if bias is None else bias.contiguous()
    rows, row_stride = as_rows(x, weight.cols)
    # Not a view of something: autograd forbids in-place changes of those, and callers add to it.
    out = x.new_empty(*x.shape[:-1], weight.rows)
    y = out.view(rows.shape[0], weight.rows)
    product(rows, row_stride, bias, weight, y)
    return out


def product(
    x: torch.Tensor, row_stride: int, bias: torch.Tensor | None, weight: Weight, y: torch.Tensor
) -> None:
    """Write x W^T + bias to `y`, both matrices."""
    if not ran_product(x, row_stride, bias, weight, y):
        dense_product(x, bias, weight, y)


def ran_product(
    x: torch.Tensor, row_stride: int, bias: torch.Tensor | None, weight: Weight, y: torch.Tensor
) -> bool:
    """`product` by the core's kernel; return False where a dense product is faster."""
    arguments = {
        "x": x.data_ptr(),
        "m": x.shape[0],
        "row_stride": row_stride,
        "dtype": _checks.FLOAT_DTYPES[x.dtype],
        "bias": address(bias),
        "y": y.data_ptr(),
    }
    return y.numel() == 0 or ran_our_product(_C.matmul_4bit_plan, _C.matmul_4bit, weight, arguments)


def ran_our_product(
    plan: Callable[..., int],
    run: Callable[..., None],
    weight: Weight | WeightStack,
    arguments: dict[str, int],
) -> bool:
    """Run the core's kernel and return True; return False where a dense product is faster."""
    stream = stream_and_threads(weight.device)
    size_bytes = plan(weight.view, **arguments)
    if size_bytes == _C.PREFER_DENSE:
        return False
    scratch = workspace(size_bytes, weight.device)
    run(
        weight.view,
        **arguments,
        workspace=address(scratch),
        workspace_bytes=size_bytes,
        stream=stream,
    )
    return True


def dense_product(
    x: torch.Tensor, start: torch.Tensor | None, weight: Weight, y: torch.Tensor
) -> None:
    """Write `start` + x W^T to `y` [M, N]. `start` is `y` itself, [N], or None for zeros."""
    for first, dense in weight.dense_panels(x.dtype):
        columns = slice(first, first + dense.shape[0])
        # Products into given memory are none that autocast casts.
        out = y if dense.shape[0] == weight.rows else y.new_empty(len(y), dense.shape[0])
        if start is None:
            torch.mm(x, dense.t(), out=out)
        else:
            torch.addmm(start if out is y else start[..., columns], x, dense.t(), out=out)
        if out is not y:
            y[:, columns] = out


def _linear_4bit_fake(x: torch.Tensor, bias: torch.Tensor | None, *parts: Any) -> torch.Tensor:
    device, shape = _check_parts(*parts)
    _checks.check_activation("x", x, shape, "in", device)
    _checks.check_bias(bias, x, shape[0])
    return x.new_empty(*x.shape[:-1], shape[0])


def linear_4bit_dx(dy: torch.Tensor, *parts: Any) -> torch.Tensor:
    """The operator's kernel on a CPU and on CUDA devices."""
    weight = _checked_weight(*parts)
    _checks.check_activation("dy", dy, weight.shape, "out", weight.device)
    rows, row_stride = as_rows(dy, weight.rows)
    out = dy.new_empty(*dy.shape[:-1], weight.cols)
    product_dx(rows, row_stride, weight, out.view(rows.shape[0], weight.cols))
    return out


def product_dx(
    dy: torch.Tensor, row_stride: int, weight: Weight, dx: torch.Tensor, adds: bool = False
) -> None:
    """Write dy W to `dx`, or add it; both are matrices."""
    out = torch.empty_like(dx) if adds else dx
    if not ran_product_dx(dy, row_stride, weight, out):
        dense_product_dx(dy, weight, dx, adds)
    elif adds:
        dx.add_(out)


def ran_product_dx(dy: torch.Tensor, row_stride: int, weight: Weight, dx: torch.Tensor) -> bool:
    """Write dy W to `dx` by the core's kernel; return False where a dense product is faster."""
    arguments = {
        "dy": dy.data_ptr(),
        "m": dy.shape[0],
        "row_stride": row_stride,
        "dtype": _checks.FLOAT_DTYPES[dy.dtype],
        "dx": dx.data_ptr(),
    }
    return dx.numel() == 0 or ran_our_product(
        _C.matmul_4bit_transposed_plan, _C.matmul_4bit_transposed, weight, arguments
    )


def dense_product_dx(dy: torch.Tensor, weight: Weight, dx: torch.Tensor, adds: bool) -> None:
    """Write dy W to `dx`, or add it; both are matrices."""
    # One contraction over all of N: summing panels would round dX once a panel.
    torch.addmm(dx, dy, weight.dense(dy.dtype), beta=int(adds), out=dx)


def _linear_4bit_dx_fake(dy: torch.Tensor, *parts: Any) -> torch.Tensor:
    device, shape = _check_parts(*parts)
    _checks.check_activation("dy", dy, shape, "out", device)
    return dy.new_empty(*dy.shape[:-1], shape[1])


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define an operator: `kernel` computes it on a CPU and on CUDA devices."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=tags)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"qlora_native::{name}", fake)


register(
    "quantize_4bit(Tensor input, str quant_type, int block_size, bool double_quant, "
    "float[]? codebook, Tensor? offset) "
    "-> (Tensor packed, Tensor absmax, Tensor absmax2, Tensor offset)",
    _quantize_4bit,
    _quantize_4bit_fake,
)
register(
    f"dequantize_4bit({WEIGHT_SCHEMA}, ScalarType dtype) -> Tensor",
    _dequantize_4bit,
    _dequantize_4bit_fake,
)
register(
    f"linear_4bit(Tensor x, Tensor? bias, {WEIGHT_SCHEMA}) -> Tensor",
    linear_4bit,
    _linear_4bit_fake,
)
register(
    f"linear_4bit_dx(Tensor dy, {WEIGHT_SCHEMA}) -> Tensor", linear_4bit_dx, _linear_4bit_dx_fake
)


@register_flop_formula(torch.ops.qlora_native.linear_4bit)
def _linear_flops(x_shape, bias_shape, *weight_shapes, out_shape, **kwargs) -> int:
    return 2 * math.prod(x_shape) * out_shape[-1]


@register_flop_formula(torch.ops.qlora_native.linear_4bit_dx)
def _linear_dx_flops(dy_shape, *weight_shapes, out_shape, **kwargs) -> int:
    return 2 * math.prod(dy_shape) * out_shape[-1]
