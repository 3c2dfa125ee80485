"""The state of one parameter: how it is made, and how it is read from other optimizers' dicts.

A state is a plain dict of plain tensors: ``step`` (fp32, one element, on the parameter's device),
``exp_avg`` and, for AdamW, ``exp_avg_sq``, of the parameter's shape. 8-bit ones are uint8 codes,
with an fp32 absmax per 256 elements in ``exp_avg_absmax`` and ``exp_avg_sq_absmax``. ``master`` is
the parameter in fp32. The 32-bit names are torch's own, so its state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qlora_native import _C

State = dict[str, torch.Tensor]

ABSMAX_SUFFIX = "_absmax"
_ZERO_CODES = {"exp_avg": _C.SIGNED_DYNAMIC_ZERO_CODE, "exp_avg_sq": 0}

# bitsandbytes' names, and the key under which it hides them from FSDP.
_WRAPPED = "__bnb_optimizer_quant_state__"
_BITSANDBYTES = {
    "state1": "exp_avg",
    "state2": "exp_avg_sq",
    "absmax1": "exp_avg_absmax",
    "absmax2": "exp_avg_sq_absmax",
}
_BITSANDBYTES_MAPS = {"qmap1": _C.signed_dynamic_map, "qmap2": _C.unsigned_dynamic_map}
_MAP_TOLERANCE = 1e-6
"""Relative: bitsandbytes computes its maps, whose last digit depends on the machine."""


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor's shard, any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def num_blocks(numel: int) -> int:
    """Return the number of absmax values of an 8-bit state."""
    return -(-numel // _C.STATE_BLOCK_SIZE)


def make_state(param: torch.Tensor, moments: tuple[str, ...], bits: int, master: bool) -> State:
    """Return the state before the first step: zeros, and the master copy of a 16-bit parameter."""
    device = local_part(param).device
    state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    for name in moments:
        if bits == 32:
            state[name] = torch.zeros_like(
                param, dtype=torch.float32, memory_format=torch.contiguous_format
            )
            continue
        codes = torch.zeros_like(param, dtype=torch.uint8, memory_format=torch.contiguous_format)
        state[name] = codes.fill_(_ZERO_CODES[name])
        blocks = num_blocks(local_part(param).numel())
        state[name + ABSMAX_SUFFIX] = torch.zeros(blocks, dtype=torch.float32, device=device)
    if master and param.dtype != torch.float32:
        state["master"] = param.detach().to(torch.float32).contiguous()
    return state


def from_bitsandbytes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return bitsandbytes' state of a parameter under our names; any other state as it is.

    Raises:
        ValueError: it was quantized with another map than the dynamic ones.
    """
    state = {**state, **state.get(_WRAPPED, {})}
    state.pop(_WRAPPED, None)
    if "state1" not in state:
        return state
    for key, own_map in _BITSANDBYTES_MAPS.items():
        theirs = state.pop(key, None)
        if theirs is None:
            continue
        ours = torch.tensor(own_map())
        if not torch.allclose(theirs.float().cpu(), ours, rtol=_MAP_TOLERANCE, atol=0):
            raise ValueError(
                f"{key} of the state is not the dynamic 8-bit map, the only one that is supported"
            )
    # max_unorm, which it clips updates by, is a state of nothing.
    state.pop("unorm_vec", None)
    return {_BITSANDBYTES.get(key, key): value for key, value in state.items()}


def loaded_state(param: torch.Tensor, moments: tuple[str, ...], saved: Mapping[str, Any]) -> State:
    """Return copies of a saved state's tensors on the parameter's device, in their own dtypes.

    Raises:
        ValueError: the state is another algorithm's, or of a parameter of another size.
    """
    saved = from_bitsandbytes(saved)
    local = local_part(param)
    state: State = {}
    for key, value in saved.items():
        dtype = torch.float32
        if key in moments and isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
            dtype = torch.uint8
        if key == "step":
            state[key] = torch.as_tensor(value, dtype=dtype).to(local.device, copy=True).reshape(())
            continue
        if not isinstance(value, torch.Tensor) or key.removesuffix(ABSMAX_SUFFIX) not in (
            *moments,
            "master",
        ):
            raise ValueError(f"a saved state has {key!r}; this optimizer's has step, {moments}")
        state[key] = value.detach().to(local.device, dtype, copy=True).contiguous()
    _check(local, moments, state)
    return state


def _check(param: torch.Tensor, moments: tuple[str, ...], state: State) -> None:
    sizes = {}
    for name in moments:
        sizes[name] = param.numel()
        if name in state and state[name].dtype == torch.uint8:
            sizes[name + ABSMAX_SUFFIX] = num_blocks(param.numel())
    if "master" in state:
        sizes["master"] = param.numel()
    for key, numel in {"step": 1, **sizes}.items():
        found = local_part(state[key]).numel() if key in state else None
        if found != numel:
            raise ValueError(
                f"{key!r} of a saved state has {found} elements, expected {numel} for a parameter "
                f"of shape {tuple(param.shape)}"
            )
