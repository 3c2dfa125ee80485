"""The product of a linear layer with the low-rank adapters over it: one place for all callers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


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
    else the dtype of `x`), whatever dtype A and B are stored in.
    """
    y = base_layer(x)
    compute_dtype = getattr(base_layer, "compute_dtype", None)
    if compute_dtype is not None:
        x = x.to(compute_dtype)
    for a, b, scaling, dropout in adapters:
        dropped = x if type(dropout) is nn.Identity else dropout(x)
        # fp32 masters must not pull the products into fp32.
        update = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
        y = y + (update * scaling).to(y.dtype)
    return y
