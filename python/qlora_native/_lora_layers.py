"""Layers that share an input, each a 4-bit weight with its adapter, as the operators take them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from qlora_native import _checks
from qlora_native._weight import Weight

SCHEMA = (
    "Tensor[] a, Tensor[] b, float[] scaling, "
    "Tensor[] packed, Tensor[] absmax, Tensor?[] absmax2, Tensor?[] offset, "
    "SymInt[] shapes, int[] block_sizes, str[] quant_types, float[] codebooks"
)


class Layer(NamedTuple):
    """One 4-bit weight and its adapter.

    Attributes:
        a: [r, in_features], of x's dtype or fp32.
        b: [out_features, r], likewise.
        scaling: the factor of the adapter's product.
        weight: the arguments by which every operator takes a 4-bit weight.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    weight: tuple[Any, ...]


def operator_lists(layers: Sequence[Layer]) -> tuple[list[Any], ...]:
    """Return the arguments that `SCHEMA` declares."""
    a, b, scaling, weights = zip(*layers, strict=True)
    packed, absmax, absmax2, offset, shapes, block_sizes, quant_types, books = zip(
        *weights, strict=True
    )
    return (
        list(a), list(b), list(scaling), list(packed), list(absmax), list(absmax2), list(offset),
        [size for shape in shapes for size in shape], list(block_sizes), list(quant_types),
        [value for book in books if book is not None for value in book],
    )  # fmt: skip


def layers_of(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scaling: Sequence[float],
    packed: Sequence[torch.Tensor],
    absmax: Sequence[torch.Tensor],
    absmax2: Sequence[torch.Tensor | None],
    offset: Sequence[torch.Tensor | None],
    shapes: Sequence[int],
    block_sizes: Sequence[int],
    quant_types: Sequence[str],
    codebooks: Sequence[float],
) -> list[Layer]:
    """Return the layers that `operator_lists` made lists of."""
    books = iter(codebooks)
    layers = []
    for i, quant_type in enumerate(quant_types):
        book = [next(books) for _ in range(16)] if quant_type == "custom" else None
        weight = (
            packed[i], absmax[i], absmax2[i], offset[i], shapes[2 * i : 2 * i + 2],
            block_sizes[i], quant_type, book,
        )  # fmt: skip
        layers.append(Layer(a[i], b[i], scaling[i], weight))
    return layers


def weight_of(layer: Layer) -> Weight:
    """Return the weight, checked."""
    *parts, quant_type, codebook = layer.weight
    return Weight(*parts, _checks.codebook(quant_type, codebook))


def rank_slices(layers: Sequence[Layer]) -> list[slice]:
    """Return which columns of t, rows of all A, are of which layer."""
    ends = [0]
    for layer in layers:
        ends.append(ends[-1] + layer.a.shape[0])
    return [slice(*ends) for ends in pairwise(ends)]


def all_a(layers: Sequence[Layer], dtype: torch.dtype) -> torch.Tensor:
    """Return the A of all layers, one below the other, in their own dtype if they have one."""
    if len(layers) == 1:
        return layers[0].a
    dtypes = {layer.a.dtype for layer in layers}
    return torch.cat([layer.a if len(dtypes) == 1 else layer.a.to(dtype) for layer in layers])
