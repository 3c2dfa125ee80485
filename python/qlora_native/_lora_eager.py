"""Layers with adapters in eager calls that need gradients and that nothing traces or transforms.

The Function of `_lora_autograd` in another form, for what it costs the host: it is bound to no
signature, has few arguments, and each pass is one call of C++ (`_C.EagerOps`), which multiplies by
torch's products or by the core's kernels. What C++ does not take, where it answers None, goes the
other form's way: so observers see the operators, and autograd records the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qlora_native import _checks, _eager, _lora_autograd
from qlora_native._lora_layers import Layer
from qlora_native._lora_ops import NO_DROPOUT, host_dropout
from qlora_native._weight import operator_parts

_is_ordinary = _eager.is_ordinary
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_forward = _eager.OPS.lora_forward
_backward = _eager.OPS.lora_backward

# What a layer is among the Function's arguments: bias, a, b and (scaling, weight), which autograd
# need not look into. The weight is a tuple that `operator_parts` takes, its tensors first.
_PER_LAYER = 4
_FIRST_LAYER = 3
_FORMAT = -4


def _unflat(flat: Sequence[Any]) -> tuple[list[torch.Tensor | None], list[Layer]]:
    bias, layers = [], []
    for i in range(0, len(flat), _PER_LAYER):
        one, a, b, (scaling, weight) = flat[i : i + _PER_LAYER]
        bias.append(one)
        layers.append(Layer(a, b, scaling, operator_parts(weight)))
    return bias, layers


class EagerLinearLora(torch.autograd.Function):
    """y of one layer, or a tuple of those of several: see `_lora_autograd.LinearLora`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rng: torch.Tensor | None, dropout_p: float, *flat: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        dropout = NO_DROPOUT if rng is None else host_dropout(dropout_p, rng)
        results = _forward(x, dropout, flat)
        if results is None:
            results = _lora_autograd.forward(x, rng, dropout_p, *_unflat(flat))
        *outputs, t = results
        needs = ctx.needs_input_grad
        saved = [
            rng,
            x if True in needs[_FIRST_LAYER + 1 :: _PER_LAYER] else None,
            t if True in needs[_FIRST_LAYER + 2 :: _PER_LAYER] else None,
        ]
        settings = []
        for i in range(0, len(flat), _PER_LAYER):
            scaling, weight = flat[i + 3]
            saved += flat[i + 1 : i + 3]
            saved += weight[:_FORMAT]
            settings.append((scaling, weight[_FORMAT:], len(weight) + _FORMAT))
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        ctx.dropout, ctx.dropout_p = dropout, dropout_p
        ctx.leading = x.shape[:-1]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        # `once_differentiable` costs as much as a product, and matters to graphs of graphs alone.
        gradients = _refusing_gradients if torch.is_grad_enabled() else _gradients
        return gradients(ctx, *grads)


def _gradients(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    rng, x, t, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    flat: list[Any] = []
    first = 0
    for scaling, weight_format, count in ctx.settings:
        a, b, *parts = tensors[first : first + 2 + count]
        first += 2 + count
        flat += (None, a, b, (scaling, (*parts, *weight_format)))
    results = _backward(grads, x, t, ctx.dropout, tuple(flat), needs)
    if results is not None:
        return results
    wants = [needs[_FIRST_LAYER + i :: _PER_LAYER] for i in range(3)]
    dx, *parts = _lora_autograd.gradients(
        grads, x, t, rng, ctx.dropout_p, needs[0], wants, _unflat(flat)[1], ctx.leading
    )
    return (dx, None, None, *(one for each in zip(*parts, strict=True) for one in (*each, None)))


_refusing_gradients = torch.autograd.function.once_differentiable(_gradients)

# What Function.apply comes to where no transform of torch.func is active.
_apply = super(torch.autograd.Function, EagerLinearLora).apply


def needs_grad(
    x: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor
) -> bool:
    """Return whether autograd has to see a layer, at the least cost."""
    return torch.is_grad_enabled() and (
        b.requires_grad
        or a.requires_grad
        or x.requires_grad
        or (bias is not None and bias.requires_grad)
    )


def linear_4bit_lora(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    weight: tuple[Any, ...],
) -> torch.Tensor | None:
    """Return y of one layer without dropout, which needs a gradient; None: go the general way.

    Args:
        x, bias, a, b, scaling: as `functional.linear_4bit_lora` takes them, checked or not.
        weight: what `operator_parts` takes.
    """
    if not _is_ordinary(x, bias, a, b):
        return None
    if _is_autocast_enabled():
        x = _eager.autocast(x)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return _apply(x, None, 0.0, bias, factor(a, x), factor(b, x), (float(scaling), weight))


def factor(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return a factor of an adapter in a dtype that the core takes beside x."""
    return a if a.dtype in (torch.float32, x.dtype) else a.to(x.dtype)


def linear_4bit_lora_group(
    x: torch.Tensor,
    rng: torch.Tensor | None,
    dropout_p: float,
    bias: Sequence[torch.Tensor | None],
    layers: Sequence[Layer],
) -> Sequence[torch.Tensor]:
    """`_lora_autograd.linear_4bit_lora`, around what costs time where it is not needed.

    The layers' weights are what `operator_parts` takes.
    """
    seen = [x, *bias, *(part for layer in layers for part in layer[:2])]
    if _eager.is_traced() or not _eager.needs_grad(*seen) or not _is_ordinary(*seen):
        layers = [layer._replace(weight=operator_parts(layer.weight)) for layer in layers]
        return _lora_autograd.linear_4bit_lora(x, rng, dropout_p, bias, layers)
    _checks.check_dropout(dropout_p, rng)
    flat = [
        part
        for one, layer in zip(bias, layers, strict=True)
        for part in (one, layer.a, layer.b, (layer.scaling, layer.weight))
    ]
    y = _apply(x, rng, dropout_p, *flat)
    return (y,) if isinstance(y, torch.Tensor) else y
