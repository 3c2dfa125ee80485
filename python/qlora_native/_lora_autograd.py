"""Gradients of the linear layer with adapters, outside of the operator as in `_autograd`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qlora_native import _eager, _lora_ops
from qlora_native._eager import needs_grad
from qlora_native._library import LIBRARY
from qlora_native._lora_layers import Layer, layers_of, operator_lists

_ops = torch.ops.qlora_native

# What a layer is among a Function's arguments, which autograd sees only where they are no lists:
# bias, a, b, scaling and the eight of the weight.
_PER_LAYER = 12


def _flat(bias: Sequence[torch.Tensor | None], layers: Sequence[Layer]) -> list[Any]:
    return [
        part
        for one, layer in zip(bias, layers, strict=True)
        for part in (one, layer.a, layer.b, layer.scaling, *layer.weight)
    ]


def _unflat(flat: Sequence[Any]) -> tuple[list[torch.Tensor | None], list[Layer]]:
    chunks = [flat[i : i + _PER_LAYER] for i in range(0, len(flat), _PER_LAYER)]
    return [chunk[0] for chunk in chunks], [
        Layer(*chunk[1:4], tuple(chunk[4:])) for chunk in chunks
    ]


def _tensors(layers: Sequence[Layer]) -> list[torch.Tensor | None]:
    return [part for layer in layers for part in (layer.a, layer.b, *layer.weight[:4])]


def _run(
    function: Any,
    operator: Any,
    seen: Sequence[torch.Tensor | None],
    arguments: Sequence[Any],
    layers: Sequence[Layer],
) -> list[torch.Tensor]:
    """Compute by the function itself where nothing of torch has to see the operator."""
    if not _eager.is_traced() and _eager.is_plain(*seen, *_tensors(layers)):
        return function(*arguments, layers)
    return operator(*arguments, *operator_lists(layers))


class LinearLora(torch.autograd.Function):
    """Y_i = X W_i^T + bias_i + scaling_i T_i B_i^T with T = D(X) A^T; the results are all Y, and T.

    X, when an A needs a gradient, and T, when a B does, are all that is saved of the activations.
    """

    @staticmethod
    def forward(
        x: torch.Tensor, rng: torch.Tensor | None, dropout_p: float, *flat: Any
    ) -> tuple[torch.Tensor, ...]:
        bias, layers = _unflat(flat)
        return tuple(forward(x, rng, dropout_p, bias, layers))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, rng, dropout_p, *flat = inputs
        _, layers = _unflat(flat)
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        needs_a = any(layer.a.requires_grad for layer in layers)
        needs_b = any(layer.b.requires_grad for layer in layers)
        ctx.save_for_backward(
            x if needs_a else None, output[-1] if needs_b else None, rng, *_tensors(layers)
        )
        ctx.dropout_p = dropout_p
        ctx.leading = x.shape[:-1]
        ctx.scaling = [layer.scaling for layer in layers]
        ctx.formats = [layer.weight[4:] for layer in layers]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        x, t, rng, *tensors = ctx.saved_tensors
        layers = [
            Layer(
                tensors[6 * i],
                tensors[6 * i + 1],
                scaling,
                (*tensors[6 * i + 2 : 6 * i + 6], *rest),
            )
            for i, (scaling, rest) in enumerate(zip(ctx.scaling, ctx.formats, strict=True))
        ]
        needs = ctx.needs_input_grad
        wants = [needs[3 + i :: _PER_LAYER] for i in range(3)]
        dx, *parts = gradients(
            grads[:-1], x, t, rng, ctx.dropout_p, needs[0], wants, layers, ctx.leading
        )
        rest = [None] * (_PER_LAYER - 3)
        flat = [part for each in zip(*parts, strict=True) for part in (*each, *rest)]
        return (dx, None, None, *flat)


def gradients(
    grads: Sequence[torch.Tensor | None],
    x: torch.Tensor | None,
    t: torch.Tensor | None,
    rng: torch.Tensor | None,
    dropout_p: float,
    wants_dx: bool,
    wants: Sequence[Sequence[bool]],
    layers: Sequence[Layer],
    leading: Sequence[int],
) -> tuple[torch.Tensor | None, list[Any], list[Any], list[Any]]:
    """Return dx, and the lists of those of biases, A and B; None for what is not wanted.

    Args:
        grads: of every output, None for zeros.
        wants: which gradients of biases, A and B to compute.
        leading: the shape of the outputs but for their last dimension.
    """
    wants_bias, wants_a, wants_b = map(list, wants)
    given = next((grad for grad in grads if grad is not None), None)
    if given is None:  # nothing behind the outputs had a gradient
        nothing = [None] * len(layers)
        return None, nothing, nothing, nothing
    dy = [
        given.new_zeros(*leading, layer.b.shape[0]) if grad is None else grad
        for grad, layer in zip(grads, layers, strict=True)
    ]
    results = iter(())
    if wants_dx or any(wants_a) or any(wants_b):
        arguments = (dy, x, t, rng, dropout_p, wants_dx, wants_a, wants_b)
        operator = _ops.linear_4bit_lora_backward
        results = iter(_run(_lora_ops.backward, operator, [*dy, x, t], arguments, layers))
    dx = next(results) if wants_dx else None
    da = [next(results) if one else None for one in wants_a]
    db = [next(results) if one else None for one in wants_b]
    dbias = [
        one.reshape(-1, one.shape[-1]).sum(0) if is_wanted else None
        for one, is_wanted in zip(dy, wants_bias, strict=True)
    ]
    return dx, dbias, da, db


def forward(
    x: torch.Tensor,
    rng: torch.Tensor | None,
    dropout_p: float,
    bias: Sequence[torch.Tensor | None],
    layers: Sequence[Layer],
) -> list[torch.Tensor]:
    """Return y of every layer, and t; no gradients."""
    arguments = (x, rng, dropout_p, list(bias))
    return _run(_lora_ops.forward, _ops.linear_4bit_lora, [x, *bias], arguments, layers)


def linear_4bit_lora(
    x: torch.Tensor,
    rng: torch.Tensor | None,
    dropout_p: float,
    bias: Sequence[torch.Tensor | None],
    layers: Sequence[Layer],
) -> list[torch.Tensor]:
    """Return y of every layer: the operator, differentiable in x and every bias, A and B."""
    seen = [x, *bias, *_tensors(layers)]
    if not needs_grad(*seen):
        return forward(x, rng, dropout_p, bias, layers)[:-1]
    flat = _flat(bias, layers)
    return list(LinearLora.apply(x, rng, dropout_p, *flat)[:-1])


def _autograd_kernel(
    x: torch.Tensor,
    rng: torch.Tensor | None,
    dropout_p: float,
    bias: Sequence[torch.Tensor | None],
    *lists: Any,
) -> list[torch.Tensor]:
    layers = layers_of(*lists)
    if needs_grad(x, *bias, *_tensors(layers)):
        return list(LinearLora.apply(x, rng, dropout_p, *_flat(bias, layers)))
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.linear_4bit_lora(x, rng, dropout_p, bias, *lists)


LIBRARY.impl("linear_4bit_lora", _autograd_kernel, "Autograd")
