"""The product of a linear layer with the low-rank adapters over it: one place for all callers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_native import _lora_eager
from qlora_native._eager import OPS, is_traced
from qlora_native.functional import linear_4bit_lora
from qlora_native.nn.linear import Linear4bit

_STATE = {"weight", "weight_absmax", "weight_absmax2", "bias"}
_run_linear_4bit_lora = OPS.linear_4bit_lora_of_layer


class LowRank(NamedTuple):
    """What one adapter adds: scaling * B A dropout(x).

    Attributes:
        a: [r, in_features], of any floating dtype.
        b: [out_features, r], likewise.
        scaling: the factor of the product.
        dropout: an nn.Dropout or nn.Identity for the adapter's input.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: nn.Module


def adapted_linear(base_layer: nn.Linear, x: Tensor, adapters: Sequence[LowRank]) -> Tensor:
    """y = base_layer(x) + the sum over `adapters`, [..., out_features] in the base layer's dtype.

    The adapters' products run in the dtype in which the base layer computes (its `compute_dtype`,
    else the dtype of `x`), whatever dtype A and B are stored in. One adapter over a plain
    Linear4bit is one operation, `linear_4bit_lora`.
    """
    compute_dtype = getattr(base_layer, "compute_dtype", None)
    inner = x if compute_dtype is None else x.to(compute_dtype)
    if len(adapters) == 1 and is_one_operation(base_layer, inner, adapters[0]):
        y = _one_operation(base_layer, x, inner, adapters[0])
        return y if compute_dtype is None else y.to(x.dtype)
    y = base_layer(x)
    for a, b, scaling, dropout in adapters:
        if a.is_meta and not inner.is_meta:  # torch multiplies by nothing without an error
            raise ValueError(f"A is on {a.device}, the activations on {inner.device}")
        dropped = inner if type(dropout) is nn.Identity else dropout(inner)
        # fp32 masters must not pull the products into fp32.
        update = F.linear(F.linear(dropped, a.to(inner.dtype)), b.to(inner.dtype))
        y = y + (update * scaling).to(y.dtype)
    return y


def _one_operation(base_layer: Linear4bit, x: Tensor, inner: Tensor, adapter: LowRank) -> Tensor:
    a, b, scaling, dropout = adapter
    dropout_p = 0.0 if type(dropout) is nn.Identity else _probability(dropout)
    if dropout_p == 0.0 and not is_traced() and base_layer.has_plain_weight():
        y = _around_dispatcher(base_layer, x, inner, adapter)
        if y is not None:
            return y
    q, bias = base_layer.quantized_weight(), base_layer.bias
    return linear_4bit_lora(inner, q, a, b, scaling, bias=bias, dropout_p=dropout_p)


def _around_dispatcher(
    base_layer: Linear4bit, x: Tensor, inner: Tensor, adapter: LowRank
) -> Tensor | None:
    a, b, scaling, _ = adapter
    parameters = base_layer._parameters
    bias = parameters.get("bias")
    if not _lora_eager.needs_grad(inner, bias, a, b):
        return _run_linear_4bit_lora(
            inner, a, b, scaling, parameters, base_layer.out_features, base_layer.in_features,
            base_layer.block_size, base_layer.quant_type, base_layer.codebook,
        )  # fmt: skip
    weight = eager_weight(base_layer)
    if weight is None:
        return None
    together = base_layer.__dict__.get("_together")
    if together is not None:
        y = together.output(base_layer, x, inner, adapter)
        if y is not None:
            return y
    return _lora_eager.linear_4bit_lora(inner, bias, a, b, scaling, weight)


def eager_weight(base_layer: Linear4bit) -> tuple[Any, ...] | None:
    """The weight as `_weight.operator_parts` takes it, None when it is not what is stored."""
    parameters = base_layer._parameters
    if not (parameters.keys() >= _STATE and base_layer.has_plain_weight()):
        return None  # some are elsewhere, or computed from others
    return (
        parameters["weight"], parameters["weight_absmax"], parameters["weight_absmax2"],
        (base_layer.out_features, base_layer.in_features), base_layer.block_size,
        base_layer.quant_type, base_layer.codebook,
    )  # fmt: skip


def _probability(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def is_one_operation(base_layer: nn.Linear, x: Tensor, adapter: LowRank) -> bool:
    """Whether nothing replaces or watches the base layer's product or the adapter's dropout."""
    dropout = adapter.dropout
    return (
        type(base_layer) is Linear4bit
        and is_bare(base_layer)
        and (
            type(dropout) is nn.Identity
            or (type(dropout) is nn.Dropout and not dropout.inplace and is_bare(dropout))
        )
        and x.device.type in ("cpu", "cuda", "meta")
        # A graph that is captured needs torch's dropout, whose state is on the device; and one that
        # is compiled may be captured later.
        and not (_probability(dropout) > 0.0 and _may_be_captured(x))
        # The operation has one derivative and no rule for batches.
        and (is_traced() or not torch._C._are_functorch_transforms_active())
    )


def children(module: nn.Module, name: str) -> Mapping[str, nn.Module]:
    """What the ModuleDict `name` holds: each of nn.Module's lookups takes a microsecond."""
    return module._modules[name]._modules


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """`getattr(module, name)`, without nn.Module's lookup where it is an ordinary parameter."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def computing_device(layer: nn.Module) -> torch.device:
    """Where `layer` computes: with its weight, or where accelerate brings that for a call.

    Of a layer that is offloaded to host memory or to the disk only placeholders are left, without
    data; its adapters train, and have to be where its output is.
    """
    device = parameter(layer, "weight").device
    if device.type != "meta":
        return device
    hook = getattr(layer, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # accelerate's SequentialHook has several
        brings_to = getattr(one, "execution_device", None)
        if brings_to is not None:
            return torch.device(brings_to)
    return device


def is_offloaded(layer: nn.Module) -> bool:
    """Whether `layer` is a Linear4bit that has its weight during its calls alone."""
    return (
        isinstance(layer, Linear4bit)
        and computing_device(layer) != parameter(layer, "weight").device
    )


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module is its class's forward, which nobody watches or changes."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _may_be_captured(x: Tensor) -> bool:
    return x.is_cuda and (is_traced() or torch.cuda.is_current_stream_capturing())
