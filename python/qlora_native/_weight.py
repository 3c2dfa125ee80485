"""A 4-bit weight as the kernels take it: addresses for the core, dense matrices for torch."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from qlora_native import _C, _checks

_DENSE_PANEL_BYTES = 8 << 20
"""On a CPU the dense forward decodes the weight in row panels of about this size: they stay in the
caches, and need little memory."""

_SCRATCH_BYTES = 64 << 20
"""Each thread keeps at most this much memory for dense weights on a CPU. Fresh memory costs four
times the decoding in page faults: glibc gives large blocks back to the system at once."""

_thread = threading.local()


def device_code(device: torch.device) -> int:
    """Return the core's code of a device: -1 is the CPU, i >= 0 is CUDA device i."""
    if device.type == "cpu":
        return -1
    if device.type == "cuda":
        return device.index
    raise NotImplementedError(f"qlora_native runs on cpu and cuda devices, not on {device.type}")


def stream_and_threads(device: torch.device) -> int:
    """Return the handle of torch's current stream; on a CPU, follow torch.set_num_threads."""
    if device.type == "cuda":
        return torch._C._cuda_getCurrentRawStream(device.index)
    _C.set_cpu_threads(torch.get_num_threads())
    return 0


def address(tensor: torch.Tensor | None) -> int:
    """Return where a tensor's elements are, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def as_fp32(raw: torch.Tensor) -> torch.Tensor:
    """The fp32 values whose bytes a uint8 tensor holds in its last dimension."""
    # Misaligned only when put in place around register_parameter. The compiler cannot trace the
    # question, and checks the alignment of its inputs itself.
    if not torch.compiler.is_compiling() and raw.storage_offset() % 4:
        raw = raw.clone()
    return raw.view(torch.float32)


def operator_parts(weight: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the eight arguments by which every operator takes a 4-bit weight.

    Args:
        weight: these, or what nn.Linear4bit keeps: weight, weight_absmax, weight_absmax2 or None,
            shape, block_size, quant_type, codebook.
    """
    if len(weight) == 8:
        return weight
    packed, absmax, absmax2, *rest = weight
    offset = None
    if absmax2 is None:
        absmax = as_fp32(absmax)
    else:
        constants = as_fp32(absmax2)
        absmax2, offset = constants[:-1], constants[-1]
    return (packed.view(-1), absmax, absmax2, offset, *rest)


class Weight:
    """The parts of a 4-bit matrix, checked, and the core's view of them."""

    def __init__(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        absmax2: torch.Tensor | None,
        offset: torch.Tensor | None,
        shape: Sequence[int],
        block_size: int,
        codebook: _C.Codebook,
    ) -> None:
        rows, cols = shape if len(shape) == 2 else (1, _checks.numel_of(shape))
        self.parts = (packed, absmax, absmax2, offset)
        self.shape, self.rows, self.cols = shape, rows, cols
        self.block_size, self.codebook = block_size, codebook
        self.device = packed.device
        self.view = _C.WeightView.make(
            packed=packed.data_ptr(),
            absmax=absmax.data_ptr(),
            absmax2=address(absmax2),
            offset=address(offset),
            double_quant=offset is not None,
            rows=rows,
            cols=cols,
            block_size=block_size,
            codebook=codebook,
            device=device_code(packed.device),
        )

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense matrix."""
        return self.dequantize_to(
            torch.empty(self.rows, self.cols, dtype=dtype, device=self.device)
        )

    def dequantize_to(self, out: torch.Tensor) -> torch.Tensor:
        """Decode to `out`, contiguous and of `rows * cols` elements; return it."""
        _C.dequantize_4bit(
            self.view,
            output=out.data_ptr(),
            dtype=_checks.FLOAT_DTYPES[out.dtype],
            stream=stream_and_threads(self.device),
        )
        return out

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense matrix, on a CPU in scratch memory that the next call may overwrite."""
        if self.device.type != "cpu":
            return self.dequantize(dtype)
        buffer = _cpu_scratch(self.rows * self.cols, dtype)
        return self.dequantize_to(buffer.view(self.rows, self.cols))

    def dense_panels(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, dense rows) over the whole matrix, which is one panel on a GPU.

        The rows are in a buffer that the next panel overwrites. Panels start at a group's (or a
        block's) boundary.
        """
        packed, absmax, absmax2, offset = self.parts
        unit = self.block_size * (_C.GROUP_SIZE if offset is not None else 1)
        step = unit // math.gcd(unit, self.cols)
        step *= max(1, _DENSE_PANEL_BYTES // (step * self.cols * dtype.itemsize))
        if self.device.type != "cpu" or step >= self.rows:
            yield 0, self.dense(dtype)
            return
        buffer = _cpu_scratch(step * self.cols, dtype).view(step, self.cols)
        for first in range(0, self.rows, step):
            rows = min(step, self.rows - first)
            begin, numel = first * self.cols, rows * self.cols
            blocks = slice(begin // self.block_size, None)
            panel = Weight(
                packed.view(-1)[begin // 2 : begin // 2 + _checks.packed_bytes(numel)],
                absmax.view(-1)[blocks],
                None if absmax2 is None else absmax2[begin // unit :],
                offset,
                (rows, self.cols),
                self.block_size,
                self.codebook,
            )
            yield first, panel.dequantize_to(buffer[:rows])


def _cpu_scratch(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return `numel` elements of memory that the calling thread will use again."""
    size_bytes = numel * dtype.itemsize
    if size_bytes > _SCRATCH_BYTES:
        return torch.empty(numel, dtype=dtype)
    kept = getattr(_thread, "scratch", None)
    if kept is None or kept.numel() < size_bytes:
        kept = _thread.scratch = torch.empty(size_bytes, dtype=torch.uint8)
    return kept[:size_bytes].view(dtype)


class WeightStack:
    """The parts of 4-bit matrices that are quantized one by one, checked, and the core's view."""

    def __init__(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        absmax2: torch.Tensor | None,
        offset: torch.Tensor | None,
        shape: Sequence[int],
        block_size: int,
        codebook: _C.Codebook,
    ) -> None:
        self.parts = (packed, absmax, absmax2, offset)
        self.shape, self.block_size, self.codebook = shape, block_size, codebook
        self.device = packed.device
        first = _C.WeightView.make(
            packed=packed.data_ptr(),
            absmax=absmax.data_ptr(),
            absmax2=address(absmax2),
            offset=address(offset),
            double_quant=offset is not None,
            rows=shape[1],
            cols=shape[2],
            block_size=block_size,
            codebook=codebook,
            device=device_code(packed.device),
        )
        self.view = _C.WeightStackView.make(
            first=first,
            count=shape[0],
            packed_stride=packed.stride(0),
            absmax_stride=absmax.stride(0),
            absmax2_stride=0 if absmax2 is None else absmax2.stride(0),
            offset_stride=0 if offset is None else offset.stride(0),
        )

    def __getitem__(self, index: int) -> Weight:
        """Return one matrix."""
        parts = (None if part is None else part[index] for part in self.parts)
        return Weight(*parts, self.shape[1:], self.block_size, self.codebook)
