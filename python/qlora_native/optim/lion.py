"""Lion with fp32 or 8-bit state."""

from __future__ import annotations

from typing import Any

import torch

from qlora_native.memory import PagedPool
from qlora_native.optim._optimizer import NativeOptimizer


class Lion(NativeOptimizer):
    """Lion: the sign of an interpolated momentum (Chen et al., 2023), with decoupled weight decay.

    One state. Its steps are all of size `lr`: use a third to a tenth of AdamW's, and as many times
    its weight decay. The arguments are `AdamW`'s.
    """

    algorithm = "lion"
    moments = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        bits: int = 32,
        paged: bool | PagedPool = False,
        min_8bit_size: int = 4096,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        max_norm: float = 0.0,
        skip_nonfinite: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(
            params,
            defaults,
            bits=bits,
            paged=paged,
            min_8bit_size=min_8bit_size,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            max_norm=max_norm,
            skip_nonfinite=skip_nonfinite,
        )


class Lion8bit(Lion):
    """`Lion` with 8-bit state."""

    def __init__(self, params: Any, *args: Any, bits: int = 8, **kwargs: Any) -> None:
        super().__init__(params, *args, bits=bits, **kwargs)


class PagedLion(Lion):
    """`Lion` with paged state, of 32 bits unless `bits` says otherwise."""

    def __init__(
        self, params: Any, *args: Any, paged: bool | PagedPool = True, **kwargs: Any
    ) -> None:
        super().__init__(params, *args, paged=paged, **kwargs)


class PagedLion8bit(Lion8bit):
    """`Lion` with paged 8-bit state."""

    def __init__(
        self, params: Any, *args: Any, paged: bool | PagedPool = True, **kwargs: Any
    ) -> None:
        super().__init__(params, *args, paged=paged, **kwargs)


PagedLion32bit = PagedLion
"""bitsandbytes' name for paged 32-bit state."""
