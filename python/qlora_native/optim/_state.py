"""The state of one parameter: how it is made, and how it is read from other optimizers' dicts.

A state is a plain dict of plain tensors: ``step`` (fp32, one element, on the parameter's device),
``exp_avg`` and, for AdamW, ``exp_avg_sq``, of the parameter's shape. 8-bit ones are uint8 codes,
with an fp32 absmax per 256 elements in ``exp_avg_absmax`` and ``exp_avg_sq_absmax``. ``master`` is
the parameter in fp32. The 32-bit names are torch's own, so its state dicts load as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from qlora_native import _C

State = dict[str, torch.Tensor]


@dataclasses.dataclass
class Entry:
    """A tensor of a state before it has memory: what it is to hold."""

    content: float | torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    sharded_as: torch.Tensor | None = None
    """A DTensor; the tensor is sharded in the same way. `shape` is the shard's."""

    @property
    def size_bytes(self) -> int:
        """Return the size of the tensor, or of its shard."""
        return math.prod(self.shape) * self.dtype.itemsize

    def make(self, device: torch.device) -> torch.Tensor:
        """Return it in ordinary memory of a device."""
        if isinstance(self.content, torch.Tensor):
            return self.content.detach().to(device, self.dtype, copy=True).contiguous()
        if self.sharded_as is not None:
            return torch.full_like(self.sharded_as, self.content, dtype=self.dtype)
        return torch.full(self.shape, self.content, dtype=self.dtype, device=device)

    def fill(self, memory: torch.Tensor) -> torch.Tensor:
        """Give `memory`, of its shape and dtype, its content; return it."""
        if isinstance(self.content, torch.Tensor):
            return memory.copy_(local_part(self.content).detach())
        return memory.fill_(self.content)


Entries = dict[str, Entry]

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


def is_split(tensor: torch.Tensor) -> bool:
    """Return whether other ranks hold other parts of a tensor: a DTensor that is not replicated."""
    # The cheap test first: most parameters of most models are of exactly this type.
    if type(tensor) is torch.nn.Parameter or local_part(tensor) is tensor:
        return False
    mesh = tensor.device_mesh
    return any(
        mesh.size(i) > 1 and not placement.is_replicate()
        for i, placement in enumerate(tensor.placements)
    )


def require_resharding(states: Mapping[Any, Any]) -> None:
    """Refuse states that a checkpoint of all ranks would keep one rank's part of.

    Such checkpoints take a plain tensor for the same on every rank. Blocks and allocations begin
    anew in every rank's part, so a DTensor of scales or of paged memory would not be right either:
    other numbers of ranks would cut it elsewhere.

    Raises:
        NotImplementedError: there is one.
    """
    for param, state in states.items():
        if not isinstance(param, torch.Tensor) or not is_split(param):
            continue
        # The step is the same on every rank.
        plain = [name for name, t in state.items() if name != "step" and local_part(t) is t]
        if plain:
            raise NotImplementedError(
                f"the state of a parameter of shape {tuple(param.shape)} that is split over ranks "
                f"(a DTensor) has {', '.join(plain)} as plain tensors, which distributed "
                "checkpoints take for the same on every rank: use optim.save_distributed, or "
                "bits=32 and paged=False"
            )


def num_blocks(numel: int) -> int:
    """Return the number of absmax values of an 8-bit state."""
    return -(-numel // _C.STATE_BLOCK_SIZE)


def fresh_entries(
    param: torch.Tensor, moments: tuple[str, ...], bits: int, master: bool
) -> Entries:
    """Return the state before the first step: zeros, and the master copy of a 16-bit parameter."""
    local = local_part(param)
    sharded_as = param.detach() if local is not param else None
    scales = torch.Size([num_blocks(local.numel())])
    entries = {"step": Entry(0.0, torch.Size(), torch.float32)}
    for name in moments:
        if bits == 32:
            entries[name] = Entry(0.0, local.shape, torch.float32, sharded_as)
            continue
        entries[name] = Entry(_ZERO_CODES[name], local.shape, torch.uint8, sharded_as)
        entries[name + ABSMAX_SUFFIX] = Entry(0.0, scales, torch.float32)
    if master and param.dtype != torch.float32:
        entries["master"] = Entry(param.detach(), local.shape, torch.float32)
    return entries


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


def saved_entries(
    param: torch.Tensor, moments: tuple[str, ...], saved: Mapping[str, Any]
) -> Entries:
    """Return what a saved state holds, in its own dtypes.

    Raises:
        ValueError: the state is another algorithm's, or of a parameter of another size.
    """
    known = (*moments, *(name + ABSMAX_SUFFIX for name in moments), "master")
    entries: Entries = {}
    for key, value in from_bitsandbytes(saved).items():
        if key == "step":
            value = torch.as_tensor(value, dtype=torch.float32).reshape(())
        elif key not in known or not isinstance(value, torch.Tensor):
            raise ValueError(f"a saved state has {key!r}; this optimizer's has step, {moments}")
        is_coded = key in moments and value.dtype == torch.uint8
        dtype = torch.uint8 if is_coded else torch.float32
        entries[key] = Entry(value, local_part(value).shape, dtype)
    _check(local_part(param), moments, entries)
    return entries


def _check(param: torch.Tensor, moments: tuple[str, ...], entries: Entries) -> None:
    sizes = {"step": 1}
    for name in moments:
        sizes[name] = param.numel()
        if name in entries and entries[name].dtype == torch.uint8:
            sizes[name + ABSMAX_SUFFIX] = num_blocks(param.numel())
    if "master" in entries:
        sizes["master"] = param.numel()
    for key, numel in sizes.items():
        found = math.prod(entries[key].shape) if key in entries else None
        if found != numel:
            raise ValueError(
                f"{key!r} of a saved state has {found} elements, expected {numel} for a parameter "
                f"of shape {tuple(param.shape)}"
            )
