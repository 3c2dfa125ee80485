"""AdamW with fp32 or 8-bit state."""

from __future__ import annotations

from typing import Any

import torch

from qlora_native.memory import PagedPool
from qlora_native.optim._optimizer import NativeOptimizer


class AdamW(NativeOptimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), as `torch.optim.AdamW`.

    The arithmetic is fp32 in torch's order: with fp32 state and parameters the results are torch's
    but for the last bits. 8-bit state (Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization", 2022) is blocks of 256 elements in bitsandbytes' format.

    Args:
        params: parameters, groups of them, or ``model.named_parameters()``. Parameters are
            contiguous float32, float16 or bfloat16 on cpu or cuda devices; gradients are of the
            same dtype or float32.
        lr: a number, or a tensor of one element; one on the parameters' GPU is read there, which a
            captured graph needs to follow a schedule.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
        bits: of the state, 32 or 8. With parameters that are split over ranks (DTensors),
            `state_dict` is for 32-bit states that are not paged; `save_distributed` for all.
        paged: keep the state in paged memory, in the pool of its device that the process shares, or
            in the pool that is given (`qlora_native.memory.PagedPool`, for another backing or
            budget). It can then leave the GPU, and a step brings what is not there, in parts, while
            others are updated. Results are the same. On a CPU the memory is paged by the system.
        min_8bit_size: a parameter of fewer elements (in all, when it is a sharded DTensor) keeps a
            32-bit state.
        master_weights: keep an fp32 copy of 16-bit parameters in the state. It is what is updated;
            the parameter is its rounded copy.
        stochastic_rounding: round 16-bit parameters up or down at random, so that updates far below
            their spacing add up. Reproducible: the random numbers depend on `seed`, the step, and
            the element's place.
        seed: of the stochastic rounding.
        max_norm: above 0, clip the global norm of all gradients to it, as
            `torch.nn.utils.clip_grad_norm_` would before the step. The gradients stay as they are.
            Not for DTensors that are split over ranks.
        skip_nonfinite: do nothing in a step with a NaN or an infinity in any gradient. Decided on
            the device. Not for DTensors that are split over ranks.
        maximize: ascend.

    Raises:
        ValueError: a hyperparameter is out of its range.
    """

    algorithm = "adamw"
    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
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


class AdamW8bit(AdamW):
    """`AdamW` with 8-bit state."""

    def __init__(self, params: Any, *args: Any, bits: int = 8, **kwargs: Any) -> None:
        super().__init__(params, *args, bits=bits, **kwargs)


class PagedAdamW(AdamW):
    """`AdamW` with paged state, of 32 bits unless `bits` says otherwise."""

    def __init__(
        self, params: Any, *args: Any, paged: bool | PagedPool = True, **kwargs: Any
    ) -> None:
        super().__init__(params, *args, paged=paged, **kwargs)


class PagedAdamW8bit(AdamW8bit):
    """`AdamW` with paged 8-bit state."""

    def __init__(
        self, params: Any, *args: Any, paged: bool | PagedPool = True, **kwargs: Any
    ) -> None:
        super().__init__(params, *args, paged=paged, **kwargs)


PagedAdamW32bit = PagedAdamW
"""bitsandbytes' name for paged 32-bit state."""
