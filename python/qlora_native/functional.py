"""The operations on tensors: quantize, dequantize, and the linear layer over a 4-bit weight.

Formats are those of the core (``quantized.h``, ``codebook.h``): blocks of `block_size` elements of
the flattened tensor share one absmax; with double quantization the absmax values are 8-bit codes
themselves, 256 of them to an fp32 `absmax2`, around an fp32 `offset`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from qlora_native import _autograd, _checks, _eager, _lora_eager
from qlora_native._checks import QUANT_TYPES
from qlora_native._lora_layers import Layer

__all__ = [
    "QUANT_TYPES",
    "QuantizedStack",
    "QuantizedTensor",
    "dequantize_4bit",
    "grouped_linear_4bit",
    "linear_4bit",
    "linear_4bit_lora",
    "linear_4bit_lora_group",
    "quantize_4bit",
]

_ops = torch.ops.qlora_native
_run_linear_4bit = _eager.OPS.linear_4bit
_run_linear_4bit_lora = _eager.OPS.linear_4bit_lora
_is_traced = _eager.is_traced


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A 4-bit tensor: a value, not a Parameter. Its parts are plain tensors on one device.

    Attributes:
        packed: uint8 ``[(n + 1) // 2]`` for n elements, row-major; the first of a pair of elements
            is the high nibble. Any shape with that many bytes is accepted.
        absmax: float32 ``[blocks]``; with double quantization uint8 ``[blocks]``.
        absmax2: float32 ``[ceil(blocks / 256)]``, or None without double quantization.
        offset: float32 scalar, or None without double quantization.
        shape: the logical shape.
        dtype: the dtype that was quantized, which `dequantize` returns by default.
        quant_type: "nf4", "fp4", "int4" or "custom".
        block_size: elements that share an absmax.
        codebook: the 16 ascending values of quant_type "custom", else None.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor | None
    offset: torch.Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str = "nf4"
    block_size: int = 64
    codebook: tuple[float, ...] | None = None

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are quantized too."""
        return self.offset is not None

    @property
    def device(self) -> torch.device:
        """The device of all parts."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.packed, self.absmax, self.absmax2, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    def numel(self) -> int:
        """Return the number of logical elements."""
        return _checks.numel_of(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the dense tensor; see `dequantize_4bit`."""
        return dequantize_4bit(self, dtype)

    def to(self, device: torch.device | str | int) -> QuantizedTensor:
        """Return the same value on another device. The parts keep their dtypes."""
        return dataclasses.replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            absmax2=None if self.absmax2 is None else self.absmax2.to(device),
            offset=None if self.offset is None else self.offset.to(device),
        )

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor(shape={tuple(self.shape)}, quant_type={self.quant_type!r}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, "
            f"dtype={self.dtype}, device={self.device})"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedStack:
    """Matrices of one shape, each quantized by itself, as the experts of a layer are.

    Attributes:
        packed: uint8 ``[E, ...]``, the codes of matrix e in row e.
        absmax: float32 ``[E, blocks]``; with double quantization uint8.
        absmax2: float32 ``[E, groups]``, or None without double quantization.
        offset: float32 ``[E]``, or None without double quantization.
        shape: ``[E, out_features, in_features]``.
        dtype, quant_type, block_size, codebook: as in `QuantizedTensor`.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor | None
    offset: torch.Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str = "nf4"
    block_size: int = 64
    codebook: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> QuantizedTensor:
        """Return one matrix; its parts are views."""
        return QuantizedTensor(
            packed=self.packed[index],
            absmax=self.absmax[index],
            absmax2=None if self.absmax2 is None else self.absmax2[index],
            offset=None if self.offset is None else self.offset[index],
            shape=self.shape[1:],
            dtype=self.dtype,
            quant_type=self.quant_type,
            block_size=self.block_size,
            codebook=self.codebook,
        )


def _weight_arguments(q: QuantizedTensor | QuantizedStack) -> tuple[Any, ...]:
    """Return the arguments by which every operator takes a 4-bit weight."""
    return (
        q.packed, q.absmax, q.absmax2, q.offset, q.shape, q.block_size, q.quant_type, q.codebook
    )  # fmt: skip


def quantize_4bit(
    w: torch.Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    codebook: Sequence[float] | None = None,
    check_finite: bool = False,
    offset: torch.Tensor | float | None = None,
) -> QuantizedTensor:
    """Quantize a tensor of any shape to 4 bits.

    Args:
        w: float32, float16 or bfloat16, on a CPU or a CUDA device.
        quant_type: "nf4", "fp4", "int4", or "custom" with a `codebook`.
        block_size: elements that share an absmax: a power of two from 32 to 4096.
        double_quant: quantize the absmax values too (0.127 instead of 0.5 bits per element at 64).
        codebook: 16 finite, ascending values for "custom"; weights are scaled to [-1, 1].
        check_finite: raise ValueError when `w` holds a NaN or an infinity (waits for the device).
            Without it such a block decodes to NaN; with double quantization, its group of 256
            blocks does.
        offset: the fp32 centre of the double quantization, instead of the mean of the absmax.

    Raises:
        TypeError: `w` is not one of the float types.
        ValueError: another argument is out of its range, or `check_finite` found bad values.
    """
    _checks.check_block_size(block_size)
    if check_finite and w.numel() > 0:
        bad = int((~torch.isfinite(w)).sum())
        if bad:
            raise ValueError(
                f"the tensor to quantize, of shape {tuple(w.shape)}, holds {bad} values that are "
                "NaN or infinite"
            )
    if offset is not None and not isinstance(offset, torch.Tensor):
        offset = torch.tensor(offset, dtype=torch.float32, device=w.device)
    values = None if codebook is None else tuple(float(value) for value in codebook)
    packed, absmax, absmax2, out_offset = _ops.quantize_4bit(
        w.detach(), quant_type, block_size, double_quant, values, offset
    )
    return QuantizedTensor(
        packed=packed,
        absmax=absmax,
        absmax2=absmax2 if double_quant else None,
        offset=out_offset if double_quant else None,
        shape=w.shape,
        dtype=w.dtype,
        quant_type=quant_type,
        block_size=block_size,
        codebook=values,
    )


def dequantize_4bit(q: QuantizedTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the dense tensor: ``code value * absmax`` in fp32, rounded once to `dtype`.

    Args:
        q: the tensor to decode.
        dtype: float32, float16 or bfloat16; `q.dtype` when None.

    Raises:
        TypeError, ValueError: the parts of `q` do not fit each other, or `dtype` is no such float.
    """
    return _eager.dequantize_4bit(*_weight_arguments(q), dtype or q.dtype)


def linear_4bit(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``x @ W.T + bias`` for a 4-bit weight W.

    Differentiable in `x` and `bias`; W is frozen, and only its packed form is kept for the backward
    pass. Our kernels accumulate in fp32; where torch's matrix product over the decoded weight is
    faster (see `kernels.selected_for`), its settings hold.

    Args:
        x: ``[..., in_features]`` float32, float16 or bfloat16, on `q`'s device. Under autocast it
            is cast to the autocast dtype first, as torch's linear does.
        q: a weight of shape ``[out_features, in_features]``.
        bias: ``[out_features]``, cast to x's dtype, or None.

    Returns:
        ``[..., out_features]`` of x's (or the autocast) dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; the message holds them.
    """
    if not _is_traced():
        y = _run_linear_4bit(
            x, bias, q.packed, q.absmax, q.absmax2, q.offset, q.shape, q.block_size, q.quant_type,
            q.codebook, True,
        )  # fmt: skip
        if y is not None:
            return y
    x = _eager.autocast(x)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return _autograd.linear_4bit(x, bias, *_weight_arguments(q))


def grouped_linear_4bit(
    x: torch.Tensor,
    group_ends: torch.Tensor,
    stack: QuantizedStack,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x[start:end] @ W_e.T + bias_e`` for every group of rows, in one tensor.

    Differentiable in `x` and `bias`. No matrix is decoded as a whole on a GPU, no more than one at
    a time on a CPU, and none of a group without rows is read. On a GPU all groups are one launch,
    which reads `group_ends` there: the host does not wait, and a CUDA graph can hold it.

    Args:
        x: ``[S, in_features]`` float32, float16 or bfloat16, the rows of group 0 first, on the
            stack's device. Under autocast it is cast to the autocast dtype first.
        group_ends: int32 or int64 ``[E]`` on the same device: where the rows of each group end, as
            torch's ``grouped_mm`` takes its ``offs``. They ascend from 0 to at most S.
        stack: weights of shape ``[E, out_features, in_features]``.
        bias: ``[E, out_features]``, cast to x's dtype, or None.

    Returns:
        ``[S, out_features]`` of x's (or the autocast) dtype; rows beyond the last group are zero.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit or, on a CPU, the ends do not
            ascend; the message holds them. A GPU takes an end that is out of order for the nearest
            that is not.
    """
    x = _eager.autocast(x)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return _autograd.grouped_linear_4bit(x, group_ends, bias, *_weight_arguments(stack))


def linear_4bit_lora(
    x: torch.Tensor,
    q: QuantizedTensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return ``x @ W.T + bias + scaling * (dropout(x) @ A.T) @ B.T`` for a 4-bit weight W.

    Differentiable, once, in `x`, `bias`, `a` and `b`. Of the activations, x and the adapter's
    ``dropout(x) @ A.T`` are kept for the backward pass, x only if `a` needs a gradient. The mask of
    the dropout is not: it is a function of a seed and an offset (``dropout.h``), which are drawn on
    the CPU without waiting for a device. So torch.manual_seed repeats it, on every device, and so
    does checkpointing, which puts the CPU's generator back.

    Args:
        x, q, bias: as in `linear_4bit`.
        a: ``[r, in_features]``, of any float type. The products run in x's dtype whatever it is.
        b: ``[out_features, r]``, likewise.
        scaling: the factor of the adapter's product, a number.
        dropout_p: the probability by which elements of the adapter's x are zeroed; the others are
            multiplied by ``1 / (1 - dropout_p)``. In steps of 1 / 65536.
        generator: of the CPU, for the seed and the offset; torch's default one when None.

    Returns:
        ``[..., out_features]`` of x's (or the autocast) dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; the message holds them.
        RuntimeError: dropout while a CUDA graph is captured, which would repeat one mask for ever.
    """
    if dropout_p == 0.0 and not _is_traced():
        if _lora_eager.needs_grad(x, bias, a, b):
            y = _lora_eager.linear_4bit_lora(x, bias, a, b, scaling, _weight_arguments(q))
        else:
            y = _run_linear_4bit_lora(
                x, bias, a, b, scaling, q.packed, q.absmax, q.absmax2, q.offset, q.shape,
                q.block_size, q.quant_type, q.codebook,
            )  # fmt: skip
        if y is not None:
            return y
    return linear_4bit_lora_group(
        x, [(q, a, b, scaling)], biases=[bias], dropout_p=dropout_p, generator=generator
    )[0]


def linear_4bit_lora_group(
    x: torch.Tensor,
    layers: Sequence[tuple[QuantizedTensor, torch.Tensor, torch.Tensor, float]],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return `linear_4bit_lora` of one `x` for several layers, as queries, keys and values have.

    x is read once for all adapters and saved once, and its gradient is summed in place. One mask
    of the dropout holds for all of them.

    Args:
        x, dropout_p, generator: as in `linear_4bit_lora`.
        layers: (q, a, b, scaling) of each, as in `linear_4bit_lora`.
        biases: the bias of each layer, or None; None: of none.

    Raises:
        As `linear_4bit_lora`.
    """
    if not layers:
        raise ValueError("there is no layer")
    x = _eager.autocast(x)
    biases = [None] * len(layers) if biases is None else list(biases)
    if len(biases) != len(layers):
        raise ValueError(f"{len(biases)} biases are given for {len(layers)} layers")
    _checks.float_dtype_code("x", x.dtype)
    rng = _draw(x, generator) if dropout_p > 0.0 else None
    return tuple(
        _lora_eager.linear_4bit_lora_group(
            x,
            rng,
            dropout_p,
            [None if bias is None else bias.to(x.dtype) for bias in biases],
            [
                Layer(
                    _lora_eager.factor(a, x),
                    _lora_eager.factor(b, x),
                    float(scaling),
                    _weight_arguments(q),
                )
                for q, a, b, scaling in layers
            ],
        )
    )


def _draw(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Return a seed and an offset of dropout: a tensor, for compiled graphs draw them anew."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device="cpu", generator=generator)
