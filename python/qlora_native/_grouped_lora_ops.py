"""Low-rank products of groups of rows, an adapter for each group: operators, kernels and fakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from qlora_native import _checks
from qlora_native._dense_groups import groups_of
from qlora_native._library import register


def forward(
    x: Tensor, group_ends: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The operator's kernel: y and t, which the backward pass takes."""
    if not len(x):
        return _forward_fake(x, group_ends, a, b, scaling)
    _check(x, group_ends, a, b, "in")
    groups = groups_of(x, group_ends, a.shape[1])
    t = groups.product(x.contiguous(), _like(a, x).transpose(1, 2)).mul(scaling)
    return groups.product(t, _like(b, x).transpose(1, 2)).contiguous(), t


def _forward_fake(
    x: Tensor, group_ends: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    _check(x, group_ends, a, b, "in")
    return x.new_empty(x.shape[0], b.shape[1]), x.new_empty(x.shape[0], a.shape[1])


def backward(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    group_ends: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    wants_dx: bool,
    wants_da: bool,
    wants_db: bool,
) -> list[Tensor]:
    """The operator's kernel: dx, da and db, without those that are not wanted."""
    arguments = (dy, x, t, group_ends, a, b, scaling, wants_dx, wants_da, wants_db)
    if not len(dy):
        return [result.zero_() for result in _backward_fake(*arguments)]
    _check_backward(*arguments)
    groups, dy = groups_of(dy, group_ends, a.shape[1]), dy.contiguous()
    results = []
    if wants_dx or wants_da:
        dt = groups.product(dy, _like(b, dy)).mul(scaling)
    if wants_dx:
        results.append(groups.product(dt, _like(a, dy)).contiguous())
    if wants_da:
        results.append(groups.outer(dt, x.contiguous()).to(a.dtype).contiguous())
    if wants_db:
        results.append(groups.outer(dy, t).to(b.dtype).contiguous())
    return results


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    group_ends: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    wants_dx: bool,
    wants_da: bool,
    wants_db: bool,
) -> list[Tensor]:
    _check_backward(dy, x, t, group_ends, a, b, scaling, wants_dx, wants_da, wants_db)
    results = [dy.new_empty(dy.shape[0], a.shape[2])] if wants_dx else []
    factors = [factor for factor, wants in ((a, wants_da), (b, wants_db)) if wants]
    return results + [factor.new_empty(factor.shape) for factor in factors]


def _like(factor: Tensor, x: Tensor) -> Tensor:
    """The factors of all groups, one after another in the dtype of `x`."""
    return factor.to(x.dtype).contiguous()


def _check(x: Tensor, group_ends: Tensor, a: Tensor, b: Tensor, features: str) -> None:
    what = "x" if features == "in" else "dy"
    _checks.float_dtype_code(what, x.dtype)
    if a.dim() != 3 or b.dim() != 3 or (a.shape[0], a.shape[1]) != (b.shape[0], b.shape[2]):
        raise ValueError(
            f"A has shape {tuple(a.shape)} and B {tuple(b.shape)}, expected [groups, r, "
            "in_features] and [groups, out_features, r]"
        )
    _checks.check_groups(what, x, group_ends, (a.shape[0], b.shape[1], a.shape[2]), features)
    if a.shape[0] == 0 and x.shape[0] > 0:
        raise ValueError(f"{what} has {x.shape[0]} rows, but there is no group")
    for name, factor in (("A", a), ("B", b)):
        if not factor.is_floating_point():
            raise TypeError(f"{name} is {factor.dtype}, expected a floating dtype")
        if factor.device != x.device:
            raise ValueError(f"{name} is on {factor.device}, {what} on {x.device}")


def _check_backward(
    dy: Tensor,
    x: Tensor | None,
    t: Tensor | None,
    group_ends: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    wants_dx: bool,
    wants_da: bool,
    wants_db: bool,
) -> None:
    _check(dy, group_ends, a, b, "out")
    if wants_da:
        _check_saved("x", x, dy, a.shape[2])
    if wants_db:
        _check_saved("t", t, dy, a.shape[1])


def _check_saved(what: str, value: Tensor | None, dy: Tensor, cols: int) -> None:
    if value is None or value.shape != (dy.shape[0], cols) or value.dtype != dy.dtype:
        found = "None" if value is None else f"{tuple(value.shape)} {value.dtype}"
        raise ValueError(f"{what} is {found}, expected ({dy.shape[0]}, {cols}) {dy.dtype}")


register(
    "grouped_lora(Tensor x, Tensor group_ends, Tensor a, Tensor b, float scaling) "
    "-> (Tensor y, Tensor t)",
    forward,
    _forward_fake,
)
register(
    "grouped_lora_backward(Tensor dy, Tensor? x, Tensor? t, Tensor group_ends, Tensor a, Tensor b, "
    "float scaling, bool wants_dx, bool wants_da, bool wants_db) -> Tensor[]",
    backward,
    _backward_fake,
)


@register_flop_formula(torch.ops.qlora_native.grouped_lora)
def _flops(x_shape: Any, ends_shape: Any, a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * a_shape[1] * (a_shape[2] + b_shape[1])


@register_flop_formula(torch.ops.qlora_native.grouped_lora_backward)
def _backward_flops(
    dy_shape: Any,
    x_shape: Any,
    t_shape: Any,
    ends_shape: Any,
    a_shape: Any,
    b_shape: Any,
    scaling: Any,
    wants_dx: bool,
    wants_da: bool,
    wants_db: bool,
    **_: Any,
) -> int:
    rows, rank = dy_shape[0], a_shape[1]
    of_a, of_b = 2 * rows * rank * a_shape[2], 2 * rows * rank * b_shape[1]
    return of_b * (wants_dx or wants_da) + of_a * (wants_dx + wants_da) + of_b * wants_db
