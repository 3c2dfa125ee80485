"""Checks of shapes, dtypes and devices, shared by the eager kernels, the fake ones and autograd.

They run on real and on fake tensors alike (no data is read) and raise before anything is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch

from qlora_native import _C

FLOAT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Element types of unquantized tensors, with the code by which the core knows them."""

QUANT_TYPES = ("nf4", "fp4", "int4", "custom")


def float_dtype_code(what: str, dtype: torch.dtype) -> int:
    """Return the core's code of `dtype`; TypeError when it is not a supported float."""
    code = FLOAT_DTYPES.get(dtype)
    if code is None:
        raise TypeError(f"{what} is {dtype}; supported are float32, float16 and bfloat16")
    return code


@lru_cache(maxsize=64)
def _cached_codebook(quant_type: str, values: tuple[float, ...] | None) -> _C.Codebook:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"unknown quant_type {quant_type!r}; known are {', '.join(QUANT_TYPES)}")
    if quant_type != "custom":
        if values is not None:
            raise ValueError(f"quant_type {quant_type!r} has a codebook of its own; pass 'custom'")
        return _C.named_codebook(quant_type)
    if values is None:
        raise ValueError("quant_type 'custom' needs a codebook of 16 ascending values")
    if len(values) != 16:
        raise ValueError(f"a codebook has 16 values, this one has {len(values)}")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"codebook values must be finite: {values}")
    if any(low >= high for low, high in pairwise(values)):
        raise ValueError(f"codebook values must ascend: {values}")
    return _C.custom_codebook(values)


def codebook(quant_type: str, values: Sequence[float] | None) -> _C.Codebook:
    """Return the core's codebook for a quant_type and, for "custom", its 16 values."""
    return _cached_codebook(quant_type, None if values is None else tuple(values))


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is a power of two from 32 to 4096."""
    if not isinstance(block_size, int) or not _C.is_valid_block_size(block_size):
        raise ValueError(f"block_size {block_size!r} is not a power of two from 32 to 4096")


def numel_of(shape: Sequence[int]) -> int:
    """Return the number of elements of a tensor of this shape."""
    return math.prod(shape)


def packed_bytes(numel: int) -> int:
    """Return the bytes that `numel` 4-bit codes take."""
    return (numel + 1) // 2


def num_blocks(numel: int, block_size: int) -> int:
    """Return the number of blocks, the last of which may be short."""
    return -(-numel // block_size)


def num_groups(numel: int, block_size: int) -> int:
    """Return the number of groups of blocks that share an absmax2."""
    return -(-num_blocks(numel, block_size) // _C.GROUP_SIZE)


def _check_part(
    what: str, part: torch.Tensor, dtype: torch.dtype, numel: int, device: torch.device
) -> None:
    if part.dtype != dtype:
        raise TypeError(f"{what} is {part.dtype}, expected {dtype}")
    if part.numel() != numel:
        raise ValueError(f"{what} has {part.numel()} elements, expected {numel}")
    if part.device != device:
        raise ValueError(f"{what} is on {part.device}, the packed weight on {device}")
    if not part.is_contiguous():
        raise ValueError(f"{what} is not contiguous: strides {tuple(part.stride())}")


def check_weight(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: Sequence[int],
    block_size: int,
) -> None:
    """Raise unless the parts of a 4-bit weight fit its logical shape and each other."""
    check_block_size(block_size)
    numel = numel_of(shape)
    device = packed.device
    what = f"of a {tuple(shape)} weight in blocks of {block_size}"
    _check_part(f"packed {what}", packed, torch.uint8, packed_bytes(numel), device)
    blocks = num_blocks(numel, block_size)
    if (absmax2 is None) != (offset is None):
        raise ValueError("absmax2 and offset come together: one of them is None")
    if absmax2 is None or offset is None:
        _check_part(f"absmax {what}", absmax, torch.float32, blocks, device)
        return
    groups = num_groups(numel, block_size)
    _check_part(f"absmax {what}, double-quantized,", absmax, torch.uint8, blocks, device)
    _check_part(f"absmax2 {what}", absmax2, torch.float32, groups, device)
    _check_part(f"offset {what}", offset, torch.float32, 1, device)


def check_stack(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: Sequence[int],
    block_size: int,
) -> None:
    """Raise unless the parts are those of a stack of 4-bit matrices, `shape` [E, out, in].

    Each matrix has its own blocks and groups: what a part holds of one is a row of the part.
    """
    if len(shape) != 3:
        raise ValueError(f"a stack of weights has three dimensions, this one {tuple(shape)}")
    for what, part in (("packed", packed), ("absmax", absmax), ("absmax2", absmax2)):
        if part is not None and (part.dim() < 2 or part.shape[0] != shape[0]):
            raise ValueError(
                f"{what} has shape {tuple(part.shape)}, expected a row for each of {shape[0]} "
                "matrices"
            )
    if offset is not None and offset.shape != (shape[0],):
        raise ValueError(f"offset has shape {tuple(offset.shape)}, expected ({shape[0]},)")
    if shape[0] > 0:
        parts = (None if part is None else part[0] for part in (packed, absmax, absmax2, offset))
        check_weight(*parts, shape[1:], block_size)


def check_groups(
    what: str, x: torch.Tensor, group_ends: torch.Tensor, shape: Sequence[int], features: str
) -> None:
    """Raise unless `x` is [S, features] and `group_ends` has an integer for each matrix."""
    if x.dim() != 2:
        raise ValueError(f"{what} has shape {tuple(x.shape)}, expected rows sorted by group")
    if group_ends.dtype not in (torch.int32, torch.int64) or group_ends.shape != (shape[0],):
        raise ValueError(
            f"group_ends is {tuple(group_ends.shape)} {group_ends.dtype}, expected ({shape[0]},) "
            "torch.int32 or torch.int64"
        )
    if group_ends.device != x.device:
        raise ValueError(f"group_ends is on {group_ends.device}, {what} on {x.device}")
    if x.shape[1] != shape[2 if features == "in" else 1]:
        raise ValueError(
            f"{what} has shape {tuple(x.shape)}, but the weights are {tuple(shape)} "
            "[matrices, out_features, in_features]"
        )


def check_group_bias(bias: torch.Tensor | None, x: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise unless `bias` has a row for each matrix of a stack of `shape`, applied to `x`."""
    if bias is None:
        return
    if bias.shape != (shape[0], shape[1]):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({shape[0]}, {shape[1]})")
    if bias.dtype != x.dtype:
        raise TypeError(f"bias is {bias.dtype}, x is {x.dtype}")
    if bias.device != x.device:
        raise ValueError(f"bias is on {bias.device}, x on {x.device}")


def check_activation(
    what: str, x: torch.Tensor, shape: Sequence[int], features: str, device: torch.device
) -> None:
    """Raise unless `x` fits the "in" or "out" `features` of a weight of `shape`."""
    float_dtype_code(what, x.dtype)
    if len(shape) != 2:
        raise ValueError(f"a linear layer's weight has two dimensions, this one {tuple(shape)}")
    expected = shape[1] if features == "in" else shape[0]
    if x.dim() == 0 or x.shape[-1] != expected:
        raise ValueError(
            f"{what} has shape {tuple(x.shape)}, but the weight is {tuple(shape)} "
            f"[out_features, in_features]: the last dimension must be {expected}"
        )
    if x.device != device:
        raise ValueError(f"{what} is on {x.device}, the 4-bit weight on {device}")


def check_bias(bias: torch.Tensor | None, x: torch.Tensor, out_features: int) -> None:
    """Raise unless `bias` fits a layer with `out_features`, applied to `x`."""
    if bias is None:
        return
    if bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_features},)")
    if bias.dtype != x.dtype:
        raise TypeError(f"bias is {bias.dtype}, x is {x.dtype}")
    if bias.device != x.device:
        raise ValueError(f"bias is on {bias.device}, x on {x.device}")


def check_adapter(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise unless A [r, in] and B [out, r] adapt a weight of `shape` for activations like `x`."""
    if a.dim() != 2 or b.dim() != 2 or (b.shape[0], a.shape[1]) != tuple(shape):
        raise ValueError(
            f"A has shape {tuple(a.shape)} and B {tuple(b.shape)}, but the weight is "
            f"{tuple(shape)} [out_features, in_features]"
        )
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"A has rank {a.shape[0]}, B {b.shape[1]}")
    for what, factor in (("A", a), ("B", b)):
        if factor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{what} is {factor.dtype}, expected {x.dtype} or torch.float32")
        if factor.device != x.device:
            raise ValueError(f"{what} is on {factor.device}, the activations on {x.device}")


def check_dropout(p: float, rng: torch.Tensor | None) -> None:
    """Raise unless `p` is a probability and `rng` the seed and offset that it takes, if any."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p is {p}, expected 0 <= p <= 1")
    if rng is None:
        if p > 0.0:
            raise ValueError(f"dropout_p is {p}, but there is no seed")
    elif rng.dtype != torch.int64 or rng.shape != (2,) or rng.device.type != "cpu":
        raise ValueError(
            f"seed and offset are two int64 on the CPU, not {tuple(rng.shape)} {rng.dtype} on "
            f"{rng.device}"
        )
