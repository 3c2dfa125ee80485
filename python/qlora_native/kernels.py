"""The kernels behind each operation: list them, ask which one would run, force one."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator, Sequence

import torch

from qlora_native import _C, _checks

__all__ = ["force", "last", "list", "selected_for"]

DENSE = "dequantize_4bit + torch.matmul"
"""What `selected_for` returns where a dense matrix product beats every kernel of this library."""


def list(op: str | None = None) -> builtins.list[_C.KernelInfo]:
    """Return every kernel of this build, or of one `op`, in the order in which they are tried.

    Each has ``op``, ``device``, ``name``, ``usable`` and ``why_not``.
    """
    kernels = _C.list_kernels()
    if op is not None and op not in {kernel.op for kernel in kernels}:
        known = sorted({kernel.op for kernel in kernels})
        raise ValueError(f"no operation named {op!r}; there are: {', '.join(known)}")
    return [kernel for kernel in kernels if op in (None, kernel.op)]


@contextlib.contextmanager
def force(op: str, name: str, device: str = "cpu") -> Iterator[None]:
    """Run `op` on devices of type `device` with the kernel `name` only, in the whole process.

    Inside, a call that the kernel does not support raises NotImplementedError, and a matrix product
    never goes to torch.

    Raises:
        ValueError: there is no such operation, device type or kernel.
    """
    previous = _C.forced_kernel(op, device)
    _C.force_kernel(op, device, name)
    try:
        yield
    finally:
        _C.force_kernel(op, device, previous)


def last(op: str) -> str:
    """Return the kernel that the process's last call of `op` ran, "" before the first."""
    return _C.last_kernel(op)


def selected_for(
    op: str,
    shape: Sequence[int],
    *,
    m: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    codebook: Sequence[float] | None = None,
) -> str:
    """Return the name of the kernel that would run, or `DENSE`.

    Args:
        op: as in `list`.
        shape: ``[out_features, in_features]`` of the weight.
        m: rows of the activations, for the matrix products; of a single group, for those of groups.
        dtype: of the activations, or of the dense tensor.
        device: where the weight is.
        quant_type, block_size, double_quant, codebook: the weight's format.
    """
    rows, cols = shape
    device = torch.device(device)
    name, dense = _C.selected_kernel(
        op,
        m=m,
        rows=rows,
        cols=cols,
        dtype=_checks.float_dtype_code("dtype", dtype),
        block_size=block_size,
        double_quant=double_quant,
        codebook=_checks.codebook(quant_type, codebook),
        device=-1 if device.type == "cpu" else device.index or 0,
    )
    return DENSE if dense else name
