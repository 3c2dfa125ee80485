"""The operators called around torch's dispatcher, where nothing of torch has to see them.

A call through torch's dispatcher to a kernel in Python costs tens of microseconds, more than the
kernel. Here C++ reads the tensors, allocates the result and runs the kernel, or decodes the weight
for torch's product, in one function (`_C.EagerOps`). It answers None for every call that is not
plainly equivalent: a mode, a transform, a tracer or the profiler is active, an argument is no
ordinary tensor or of an unusual layout, a gradient is needed, or something is wrong. Such a call
goes the long way, which words the errors.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import forward_ad

from qlora_native import _C, _checks, _grouped_ops, _library

_ops = torch.ops.qlora_native

is_traced = torch.compiler.is_dynamo_compiling
"""Whether Dynamo reads the caller: it cannot look into C++, and must find the operator."""


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's linear, which autocast leaves alone.

    The result is no view, to which autograd forbids adding in place.
    """
    if torch._C._is_any_autocast_enabled():
        # Products into given memory are none that autocast casts.
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        out = y.view(-1, weight.shape[0])
        torch.addmm(
            out if bias is None else bias, x.reshape(-1, x.shape[-1]), weight.t(),
            beta=int(bias is not None), out=out,
        )  # fmt: skip
        return y
    if bias is None or x.dim() < 3 or x.numel() == 0:
        return torch.nn.functional.linear(x, weight, bias)
    y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t())
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def _matmul(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch's product, which autocast leaves alone."""
    if not torch._C._is_any_autocast_enabled():
        return torch.matmul(dy, weight)
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1])
    torch.mm(dy.reshape(-1, dy.shape[-1]), weight, out=dx.view(-1, weight.shape[1]))
    return dx


def make(exchange_api: object) -> _C.EagerOps:
    """Return the eager operations over a table of DLPack functions; None: all go the long way."""
    functions = SimpleNamespace(
        exchange_api=exchange_api,
        tensor_types=(torch.Tensor, torch.nn.Parameter),
        observers=(
            torch._C._is_torch_function_mode_enabled,
            torch._C._len_torch_dispatch_stack,
            torch._C._are_functorch_transforms_active,
            torch._C._is_tracing,
            torch._C._autograd._profiler_enabled,
        ),
        forward_ad=forward_ad,
        is_autocast_enabled=torch._C._is_any_autocast_enabled,
        is_grad_enabled=torch.is_grad_enabled,
        is_neg=torch.Tensor.is_neg,
        num_threads=torch.get_num_threads,
        empty_strided=torch.empty_strided,
        device=torch.device,
        float_dtypes=tuple(_checks.FLOAT_DTYPES),
        uint8=torch.uint8,
        codebook=_checks.codebook,
        linear=_linear,
        matmul=_matmul,
        linear_of_rows=torch._C._nn.linear,
        mm=torch.mm,
        mm_to_float32=functools.partial(torch.mm, out_dtype=torch.float32),
        addmm=torch.addmm,
        add=torch.Tensor.add_,
        mul=torch.Tensor.mul_,
        cat=torch.cat,
        sum=torch.sum,
        narrow=torch.Tensor.narrow,
        to=torch.Tensor.to,
        transpose=torch.Tensor.t,
        view=torch.Tensor.view,
    )
    return _C.EagerOps(functions)


OPS = make(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))


def _is_ordinary(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.is_neg()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _is_plain(*tensors: torch.Tensor | None) -> bool:
    """`OPS.is_plain`, where torch has no table of functions."""
    return not OPS.is_observed() and all(t is None or _is_ordinary(t) for t in tensors)


is_plain = OPS.is_plain if OPS.has_exchange_api else _is_plain
"""Whether nothing wants to see operators, and each tensor is what its memory on a CPU or a CUDA
device holds: the operator's kernel may then be called by itself, if no gradient is needed."""

_TRACING_MODES = tuple(
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
)


def is_transformed() -> bool:
    """Whether operations are traced or transformed, and not only observed as by a profiler."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING_MODES)
        )
    )


def is_ordinary(*tensors: torch.Tensor | None) -> bool:
    """`is_plain` whoever observes: what autograd records must not depend on observers.

    Else a checkpoint of which only the recomputation is profiled would save other tensors then.
    """
    return is_plain(*tensors) or (
        not is_transformed() and all(t is None or _is_ordinary(t) for t in tensors)
    )


def autocast(x: torch.Tensor) -> torch.Tensor:
    """Return x as torch's linear would take it."""
    device_type = x.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    if autocast and x.dtype.is_floating_point:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Return whether autograd has to see an operation on these tensors."""
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        # The Functions have no forward mode and say so; the bare operator would drop the tangents.
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear_4bit(x: torch.Tensor, bias: torch.Tensor | None, *weight: Any) -> torch.Tensor:
    """The operator `linear_4bit`."""
    if not is_traced():
        y = OPS.linear_4bit(x, bias, *weight, False)
        if y is not None:
            return y
        if is_plain(x, bias, *weight[:4]) and not needs_grad(x, bias):
            return _library.linear_4bit(x, bias, *weight)
    return _ops.linear_4bit(x, bias, *weight)


def linear_4bit_dx(dy: torch.Tensor, *weight: Any) -> torch.Tensor:
    """The operator `linear_4bit_dx`."""
    if not is_traced():
        dx = OPS.linear_4bit_dx(dy, *weight)
        if dx is not None:
            return dx
        if is_plain(dy, *weight[:4]) and not needs_grad(dy):
            return _library.linear_4bit_dx(dy, *weight)
    return _ops.linear_4bit_dx(dy, *weight)


def grouped_linear_4bit(
    x: torch.Tensor, group_ends: torch.Tensor, bias: torch.Tensor | None, *weight: Any
) -> torch.Tensor:
    """The operator `grouped_linear_4bit`."""
    arguments = (x, group_ends, bias, *weight)
    if not is_traced() and is_plain(*arguments[:7]) and not needs_grad(x, bias):
        return _grouped_ops.grouped_linear_4bit(*arguments)
    return _ops.grouped_linear_4bit(*arguments)


def grouped_linear_4bit_dx(
    dy: torch.Tensor, group_ends: torch.Tensor, *weight: Any
) -> torch.Tensor:
    """The operator `grouped_linear_4bit_dx`."""
    arguments = (dy, group_ends, *weight)
    if not is_traced() and is_plain(*arguments[:6]) and not needs_grad(dy):
        return _grouped_ops.grouped_linear_4bit_dx(*arguments)
    return _ops.grouped_linear_4bit_dx(*arguments)


def dequantize_4bit(*arguments: Any) -> torch.Tensor:
    """The operator `dequantize_4bit`."""
    if not is_traced():
        dense = OPS.dequantize_4bit(*arguments)
        if dense is not None:
            return dense
    return _ops.dequantize_4bit(*arguments)
