"""Turning layers of dense experts into Experts4bit, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import _checks
from qlora_native.nn.experts import (
    PARTS,
    PROJECTIONS,
    Experts4bit,
    StackFormat,
    class_over,
    dense_class,
)


def is_experts(module: nn.Module) -> bool:
    """Whether the module is a layer of dense experts that can become an Experts4bit."""
    described = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed"))
    if not described or isinstance(module, Experts4bit) or not hasattr(module, "num_experts"):
        return False
    names = list(_stack_names(module))
    return len(names) == 2 and all(
        module._parameters[name].dim() == 3
        and module._parameters[name].dtype in _checks.FLOAT_DTYPES
        for name in names
    )


def reason_not_to_quantize(module: nn.Module) -> str | None:
    """Why a layer of experts (`is_experts`) has to stay dense; None when it can be quantized."""
    for name in _stack_names(module):
        shape = module._parameters[name].shape
        in_features = shape[1 if module.is_transposed else 2]
        if in_features % 2 or not math.prod(shape):
            return f"{name} {tuple(shape)}: in_features must be even and not 0"
    return None


def become_4bit(
    module: nn.Module,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    codebook: Sequence[float] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Experts4bit:
    """Makes a layer of experts an Experts4bit, in place, its stacks uninitialized on meta.

    Raises:
        ValueError, TypeError: a quantization setting that `quantize_4bit` refuses.
    """
    _checks.codebook(quant_type, codebook)
    _checks.check_block_size(block_size)
    formats = {}
    for name in list(_stack_names(module)):
        dense = module._parameters[name]
        experts, rows, cols = dense.shape
        shape = (experts, cols, rows) if module.is_transposed else (experts, rows, cols)
        formats[name] = StackFormat(shape, bool(module.is_transposed), dense.dtype)
    module.__class__ = class_over(type(module))
    module.formats = formats
    module.quant_type, module.block_size = quant_type, block_size
    module.double_quant = double_quant
    module.codebook = None if codebook is None else tuple(codebook)
    module.compute_dtype = compute_dtype
    module.adapters = {}
    for name, stack in formats.items():
        experts, rows, cols = stack.shape
        blocks = _checks.num_blocks(rows * cols, block_size)
        groups = _checks.num_groups(rows * cols, block_size)
        shapes = {
            "": (experts, rows, cols // 2),
            "_absmax": (experts, blocks if double_quant else 4 * blocks),
            "_absmax2": (experts, 4 * (groups + 1)) if double_quant else None,
        }
        for suffix, shape in shapes.items():
            empty = None if shape is None else torch.empty(shape, dtype=torch.uint8, device="meta")
            module._parameters[name + suffix] = (
                None if empty is None else nn.Parameter(empty, requires_grad=False)
            )
    return module


def quantize_experts(
    module: nn.Module,
    *,
    device: torch.device | str | None = None,
    check_finite: bool = True,
    **settings: Any,
) -> Experts4bit:
    """Quantizes a layer of dense experts in place, one expert at a time.

    Args:
        device: where to quantize and to keep the result; the stacks' own device when None.
        check_finite: raise ValueError when a weight holds NaN or infinity.
        settings: as in `become_4bit`.

    Raises:
        ValueError: a bad setting, non-finite values, or a stack on the meta device. The layer is
            then as it was.
    """
    dense = {name: module._parameters[name] for name in _stack_names(module)}
    for name, stack in dense.items():
        if stack.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no values")
    layer = become_4bit(module, **settings)
    state: dict[str, Tensor] = {}
    try:
        for name, stack in dense.items():
            values = stack.detach()
            state |= layer.pack_stack(
                name, lambda e, v=values: v[e].to(device), check_finite=check_finite
            )
    except BaseException:
        _become_dense(layer, dense)
        raise
    for key, value in state.items():
        layer._parameters[key] = nn.Parameter(value, requires_grad=False)
    return layer if device is None else layer.to(device)


def dequantize_experts(layer: Experts4bit, dtype: torch.dtype | None = None) -> nn.Module:
    """Makes an Experts4bit the dense layer again, in place, with the decoded weights."""
    stacks = {}
    for name in layer.formats:
        stacks[name] = nn.Parameter(layer.dequantize_stack(name, dtype), requires_grad=False)
    return _become_dense(layer, stacks)


def _become_dense(layer: Experts4bit, stacks: dict[str, nn.Parameter]) -> nn.Module:
    for name in layer.formats:
        for suffix in PARTS[1:]:
            del layer._parameters[name + suffix]
        layer._parameters[name] = stacks[name]
    for attribute in Experts4bit.__annotations__:
        delattr(layer, attribute)
    layer.__class__ = dense_class(layer)
    return layer


def _stack_names(module: nn.Module) -> Iterator[str]:
    return (name for name in PROJECTIONS if module._parameters.get(name) is not None)
