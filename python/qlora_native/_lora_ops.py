"""The linear layer over 4-bit weights with low-rank adapters: operators, kernels and fakes.

The operators take a group of layers that share their input (one layer is a group of one), so that
the input is read once for all adapters, and saved once. Lists have an entry for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from qlora_native import _C, _checks, _library, _lora_layers
from qlora_native._lora_layers import Layer, all_a, layers_of, rank_slices, weight_of
from qlora_native._weight import address, device_code, stream_and_threads

# Results: y of every layer, then t [M, the sum of the ranks], which the backward pass takes.
FORWARD = (
    "linear_4bit_lora(Tensor x, Tensor? rng, float dropout_p, Tensor?[] bias, "
    f"{_lora_layers.SCHEMA}) -> Tensor[]"
)
# Results: dx, every da, every db, without those that are not wanted.
BACKWARD = (
    "linear_4bit_lora_backward(Tensor[] dy, Tensor? x, Tensor? t, Tensor? rng, float dropout_p, "
    f"bool wants_dx, bool[] wants_da, bool[] wants_db, {_lora_layers.SCHEMA}) -> Tensor[]"
)


def _check_layers(
    x: torch.Tensor, rng: torch.Tensor | None, dropout_p: float, layers: Sequence[Layer]
) -> None:
    _checks.check_dropout(dropout_p, rng)
    for layer in layers:
        *parts, quant_type, codebook = layer.weight
        _checks.check_weight(*parts)
        _checks.codebook(quant_type, codebook)
        _checks.check_activation("x", x, parts[4], "in", parts[0].device)
        _checks.check_adapter(layer.a, layer.b, x, parts[4])
        if not math.isfinite(layer.scaling):
            raise ValueError(f"scaling is {layer.scaling}, expected a finite number")


NO_DROPOUT = _C.Dropout.make(p=0.0, seed=0, offset=0)
"""What `host_dropout` returns where nothing is dropped."""


def host_dropout(p: float, rng: torch.Tensor | None) -> _C.Dropout:
    """Return the dropout of probability `p` with the seed and offset in `rng`, on the host."""
    if rng is None:
        return NO_DROPOUT
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "linear_4bit_lora cannot drop while a CUDA graph is captured: its seed and offset are "
            "numbers of the host, so every replay would have the same mask"
        )
    seed, offset = rng.tolist()
    return _C.Dropout.make(p=p, seed=seed, offset=offset)


def _rows(x: torch.Tensor, cols: int) -> torch.Tensor:
    return _library.as_rows(x, cols)[0]


def _matrix(x: torch.Tensor) -> _C.MatrixView:
    """The core's view of a matrix whose rows are contiguous."""
    rows, cols = x.shape
    return _C.MatrixView.make(
        data=x.data_ptr(),
        rows=rows,
        cols=cols,
        row_stride=x.stride(0) if rows > 1 else cols,
        dtype=_checks.FLOAT_DTYPES[x.dtype],
        device=device_code(x.device),
    )


def _is_torchs(op: str, x: torch.Tensor, dropout: _C.Dropout) -> bool:
    """Whether a pass is a product of torch: without dropout it is faster than any kernel of ours.

    The core would say so too (`<pass>_plan`); asking it takes the host as long as the product.
    """
    return dropout is NO_DROPOUT and not _C.forced_kernel(op, x.device.type)


def _run_pass(
    plan: Callable[..., int], run: Callable[..., None], device: torch.device, **arguments: Any
) -> None:
    """Run the core's kernel."""
    stream = stream_and_threads(device)
    size_bytes = plan(**arguments)
    workspace = _library.workspace(size_bytes, device)
    run(**arguments, workspace=address(workspace), workspace_bytes=size_bytes, stream=stream)


# The passes over a big matrix. Products into given memory are none that autocast casts.


def _project(
    x: torch.Tensor,
    factor: torch.Tensor,
    factor_transposed: bool,
    scaling: float,
    dropout: _C.Dropout,
    t: torch.Tensor,
) -> None:
    """t = scaling D(x) factor^T, or scaling D(x) factor when it is transposed."""
    if _is_torchs("lora_project", x, dropout):
        factor = factor.to(x.dtype)
        other = factor if factor_transposed else factor.t()
        torch.addmm(t, x, other, beta=0, alpha=scaling, out=t)
        return
    factor = _rows(factor, factor.shape[1])
    _run_pass(
        _C.lora_project_plan, _C.lora_project, x.device, x=_matrix(x), factor=_matrix(factor),
        factor_transposed=factor_transposed, scaling=scaling, dropout=dropout, t=_matrix(t),
    )  # fmt: skip


def _update(
    t: torch.Tensor,
    factor: torch.Tensor,
    factor_transposed: bool,
    scaling: float,
    dropout: _C.Dropout,
    y: torch.Tensor,
) -> None:
    """y += D(scaling t factor^T), or D(scaling t factor) when it is transposed."""
    if _is_torchs("lora_update", y, dropout):
        _add_low_rank(y, t, factor, factor_transposed, scaling, y)
        return
    factor = _rows(factor, factor.shape[1])
    _run_pass(
        _C.lora_update_plan, _C.lora_update, y.device, t=_matrix(t), factor=_matrix(factor),
        factor_transposed=factor_transposed, scaling=scaling, dropout=dropout, y=_matrix(y),
    )  # fmt: skip


def _add_low_rank(
    start: torch.Tensor | None,
    t: torch.Tensor,
    factor: torch.Tensor,
    factor_transposed: bool,
    scaling: float,
    y: torch.Tensor,
) -> None:
    """y = start + scaling t factor^T by torch. `start` is y, a row, or None for zeros."""
    factor = factor.to(y.dtype)
    other = factor if factor_transposed else factor.t()
    beta = 0 if start is None else 1
    torch.addmm(y if start is None else start, t, other, beta=beta, alpha=scaling, out=y)


def _gradient(
    s: torch.Tensor,
    v: torch.Tensor,
    transposed: bool,
    scaling: float,
    dropout: _C.Dropout,
    like: torch.Tensor,
) -> torch.Tensor:
    """Return scaling s^T D(v), or its transpose, of the dtype of `like`."""
    shape = (v.shape[1], s.shape[1]) if transposed else (s.shape[1], v.shape[1])
    if _is_torchs("lora_gradient", v, dropout):
        left, right = (v.t(), s) if transposed else (s.t(), v)
        if v.is_cuda and v.dtype != like.dtype == torch.float32:
            grad = torch.mm(left, right, out_dtype=torch.float32)
            return grad if scaling == 1.0 else grad.mul_(scaling)
        out = v.new_empty(shape)
        return torch.addmm(out, left, right, beta=0, alpha=scaling, out=out).to(like.dtype)
    grad = like.new_empty(shape)
    _run_pass(
        _C.lora_gradient_plan, _C.lora_gradient, v.device, s=_matrix(s), v=_matrix(v),
        transposed=transposed, scaling=scaling, dropout=dropout, grad=_matrix(grad),
    )  # fmt: skip
    return grad


def forward(
    x: torch.Tensor,
    rng: torch.Tensor | None,
    dropout_p: float,
    bias: Sequence[torch.Tensor | None],
    layers: Sequence[Layer],
) -> list[torch.Tensor]:
    """Compute the operator `linear_4bit_lora` on a CPU or a CUDA device."""
    results = _empty_results(x, rng, dropout_p, bias, layers)
    *outputs, t = results
    rows, row_stride = _library.as_rows(x, x.shape[-1])
    dropout = host_dropout(dropout_p, rng)
    _project(rows, all_a(layers, x.dtype), False, 1.0, dropout, t)
    for y, one_bias, layer, ranks in zip(outputs, bias, layers, rank_slices(layers), strict=True):
        y = y.view(rows.shape[0], y.shape[-1])
        one_bias = None if one_bias is None else one_bias.contiguous()
        weight, low_rank = weight_of(layer), (t[:, ranks], layer.b, False, layer.scaling)
        if _library.ran_product(rows, row_stride, one_bias, weight, y):
            _update(*low_rank, NO_DROPOUT, y)
        elif _is_torchs("lora_update", y, NO_DROPOUT):
            # A dense product adds on its way out, and saves the low-rank one a pass over y.
            _add_low_rank(one_bias, *low_rank, y)
            _library.dense_product(rows, y, weight, y)
        else:
            _library.dense_product(rows, one_bias, weight, y)
            _update(*low_rank, NO_DROPOUT, y)
    return results


def _empty_results(
    x: torch.Tensor,
    rng: torch.Tensor | None,
    dropout_p: float,
    bias: Sequence[torch.Tensor | None],
    layers: Sequence[Layer],
) -> list[torch.Tensor]:
    _check_layers(x, rng, dropout_p, layers)
    outputs = []
    for layer, one_bias in zip(layers, bias, strict=True):
        out_features = layer.b.shape[0]
        _checks.check_bias(one_bias, x, out_features)
        outputs.append(x.new_empty(*x.shape[:-1], out_features))
    ranks = sum(layer.a.shape[0] for layer in layers)
    return [*outputs, x.new_empty(math.prod(x.shape[:-1]), ranks)]


def backward(
    dy: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    rng: torch.Tensor | None,
    dropout_p: float,
    wants_dx: bool,
    wants_da: Sequence[bool],
    wants_db: Sequence[bool],
    layers: Sequence[Layer],
) -> list[torch.Tensor]:
    """Compute the operator `linear_4bit_lora_backward` on a CPU or a CUDA device."""
    _check_backward(dy, x, t, rng, dropout_p, wants_da, wants_db, layers)
    slices = rank_slices(layers)
    dropout = host_dropout(dropout_p, rng)
    rows = [_rows(one, one.shape[-1]) for one in dy]
    grads = []
    if wants_dx or any(wants_da):
        u = rows[0].new_empty(rows[0].shape[0], slices[-1].stop)
        for one, layer, ranks in zip(rows, layers, slices, strict=True):
            _project(one, layer.b, True, layer.scaling, NO_DROPOUT, u[:, ranks])
    if wants_dx:
        dx = dy[0].new_empty(*dy[0].shape[:-1], layers[0].a.shape[1])
        _set_dx(rows, layers, u, dropout, dx.view(rows[0].shape[0], dx.shape[-1]))
        grads.append(dx)
    if any(wants_da):
        x_rows = _rows(x, x.shape[-1])
        wanted = [i for i, wants in enumerate(wants_da) if wants]
        if len(wanted) == 1:
            (i,) = wanted
            grads.append(_gradient(u[:, slices[i]], x_rows, False, 1.0, dropout, layers[i].a))
        else:
            # One pass over x for all; copied apart, for results of an operator do not share memory.
            like = max((layers[i].a for i in wanted), key=lambda a: a.dtype.itemsize)
            grad = _gradient(u, x_rows, False, 1.0, dropout, like)
            grads += [torch.empty_like(layers[i].a).copy_(grad[slices[i]]) for i in wanted]
    for one, layer, ranks, wants in zip(rows, layers, slices, wants_db, strict=True):
        if wants:
            grads.append(_gradient(t[:, ranks], one, True, layer.scaling, NO_DROPOUT, layer.b))
    return grads


def _set_dx(
    dy: Sequence[torch.Tensor],
    layers: Sequence[Layer],
    u: torch.Tensor,
    dropout: _C.Dropout,
    dx: torch.Tensor,
) -> None:
    """dx = the sum of all dY_i W_i, and D(u A); all are matrices."""
    low_rank = (u, all_a(layers, dx.dtype), True, 1.0)
    row_strides = [one.stride(0) if one.shape[0] > 1 else one.shape[1] for one in dy]
    weights = [weight_of(layer) for layer in layers]
    if not _library.ran_product_dx(dy[0], row_strides[0], weights[0], dx):
        # As in `forward`: what a dense product can add to comes first.
        begins = _is_torchs("lora_update", dx, dropout)
        if begins:
            _add_low_rank(None, *low_rank, dx)
        _library.dense_product_dx(dy[0], weights[0], dx, adds=begins)
    else:
        begins = False
    for one, row_stride, weight in zip(dy[1:], row_strides[1:], weights[1:], strict=True):
        _library.product_dx(one, row_stride, weight, dx, adds=True)
    if not begins:
        _update(*low_rank, dropout, dx)


def _empty_gradients(
    dy: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    rng: torch.Tensor | None,
    dropout_p: float,
    wants_dx: bool,
    wants_da: Sequence[bool],
    wants_db: Sequence[bool],
    layers: Sequence[Layer],
) -> list[torch.Tensor]:
    _check_backward(dy, x, t, rng, dropout_p, wants_da, wants_db, layers)
    grads = []
    if wants_dx:
        grads.append(dy[0].new_empty(*dy[0].shape[:-1], layers[0].a.shape[1]))
    for layer, wants in zip(layers, wants_da, strict=True):
        if wants:
            grads.append(layer.a.new_empty(layer.a.shape))
    for layer, wants in zip(layers, wants_db, strict=True):
        if wants:
            grads.append(layer.b.new_empty(layer.b.shape))
    return grads


def _check_backward(
    dy: Sequence[torch.Tensor],
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    rng: torch.Tensor | None,
    dropout_p: float,
    wants_da: Sequence[bool],
    wants_db: Sequence[bool],
    layers: Sequence[Layer],
) -> None:
    _checks.check_dropout(dropout_p, rng)
    if any(wants_da) and x is None:
        raise ValueError("the gradients of A need x, which is None")
    if any(wants_db) and t is None:
        raise ValueError("the gradients of B need t, which is None")
    rows = math.prod(dy[0].shape[:-1])
    ranks = sum(layer.a.shape[0] for layer in layers)
    if t is not None and tuple(t.shape) != (rows, ranks):
        raise ValueError(f"t has shape {tuple(t.shape)}, expected ({rows}, {ranks})")
    for one, layer in zip(dy, layers, strict=True):
        *parts, quant_type, codebook = layer.weight
        _checks.check_weight(*parts)
        _checks.codebook(quant_type, codebook)
        _checks.check_activation("dy", one, parts[4], "out", parts[0].device)
        _checks.check_adapter(layer.a, layer.b, one, parts[4])
        if one.shape[:-1] != dy[0].shape[:-1] or one.dtype != dy[0].dtype:
            raise ValueError(
                f"the gradients of the outputs are {tuple(dy[0].shape)} {dy[0].dtype} and "
                f"{tuple(one.shape)} {one.dtype}"
            )
        if x is not None:
            _checks.check_activation("x", x, parts[4], "in", parts[0].device)
            if x.dtype != one.dtype or math.prod(x.shape[:-1]) != rows:
                raise ValueError(
                    f"x is {tuple(x.shape)} {x.dtype}, dy {tuple(one.shape)} {one.dtype}"
                )


def _of_lists(function: Callable[..., Any], before: int) -> Callable[..., Any]:
    """Return `function` as an operator's, which takes lists after the first `before` arguments."""
    return lambda *arguments: function(*arguments[:before], layers_of(*arguments[before:]))


# Inductor keeps such operators out of its CUDA graphs: these read seed and offset on the host.
_TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
_library.register(FORWARD, _of_lists(forward, 4), _of_lists(_empty_results, 4), _TAGS)
_library.register(BACKWARD, _of_lists(backward, 8), _of_lists(_empty_gradients, 8), _TAGS)


@register_flop_formula(torch.ops.qlora_native.linear_4bit_lora)
def _forward_flops(x_shape, rng_shape, p, bias_shapes, a_shapes, b_shapes, *rest, **kwargs) -> int:
    rows = math.prod(x_shape[:-1])
    weights = sum(a[1] * b[0] for a, b in zip(a_shapes, b_shapes, strict=True))
    factors = sum(math.prod(factor) for factor in (*a_shapes, *b_shapes))
    return 2 * rows * (weights + factors)


@register_flop_formula(torch.ops.qlora_native.linear_4bit_lora_backward)
def _backward_flops(
    dy_shapes, x_shape, t_shape, rng_shape, p, wants_dx, wants_da, wants_db, a_shapes, b_shapes,
    *rest, **kwargs,
) -> int:  # fmt: skip
    rows = math.prod(dy_shapes[0][:-1])
    flops = 0
    for a, b, da, db in zip(a_shapes, b_shapes, wants_da, wants_db, strict=True):
        size_a, size_b = math.prod(a), math.prod(b)
        flops += (size_b if wants_dx or da else 0) + (size_a if da else 0) + (size_b if db else 0)
        flops += a[1] * b[0] + size_a if wants_dx else 0
    return 2 * rows * flops
