"""States of parameters in paged memory: packed into allocations that move as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from qlora_native import memory
from qlora_native.optim._state import Entries, State, local_part

_ALIGNMENT = 256
_ALLOCATION_BYTES = 16 << 20
"""States of small parameters share allocations of about this size."""

_MANAGED_PART_BYTES = 1 << 30
"""Of state that is brought at a time: few launches where all of it may be on the device already."""

_STAGES = 8
"""A staging cache that holds so many parts copies in both directions while a part is updated."""

ON_DEVICE = ("step",)
"""What is small, and read in every step, stays on the parameter's device."""


class GivenPool:
    """A user's pool, as an optimizer keeps it.

    A deep copy shares the pool: its budget of device memory is meant for all that uses it. Where it
    is unpickled, perhaps in another process, a pool like it is made when a state needs one.
    """

    def __init__(self, pool: memory.PagedPool) -> None:
        self.device = pool.device
        self._backing = pool.backing
        self._device_budget = pool.device_budget
        self._pool: memory.PagedPool | None = pool

    def get(self) -> memory.PagedPool:
        """Return the pool."""
        if self._pool is None:
            self._pool = memory.PagedPool(self.device, self._backing, self._device_budget)
        return self._pool

    def __deepcopy__(self, memo: dict[int, Any]) -> GivenPool:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}


class PagedStates:
    """The pools of an optimizer, one for each device, and the states that it keeps there."""

    def __init__(self, given: GivenPool | None) -> None:
        self._given = given
        self._pools: dict[torch.device, memory.PagedPool] = {}

    def pool(self, device: torch.device) -> memory.PagedPool:
        """Return the pool of a device: the one that was given, or the process's."""
        if device not in self._pools:
            given = self._given
            fits = given is not None and given.device == device
            self._pools[device] = given.get() if fits else memory.default_pool(device)
        return self._pools[device]

    def part_bytes(self, device: torch.device) -> int:
        """Return how much state a step brings at a time."""
        pool = self.pool(device)
        if pool.backing != "pinned":
            return _MANAGED_PART_BYTES
        return max(pool.device_budget // _STAGES, 1)

    def is_moved(self, device: torch.device) -> bool:
        """Return whether states of a device move at all: a CPU's do not."""
        return self.pool(device).backing != "host"

    def keeps_state_on_host(self) -> bool:
        """Return whether any pool's tensors are CPU tensors of a GPU's parameters."""
        return any(pool.backing == "pinned" for pool in self._pools.values())

    def place(self, params: Sequence[torch.Tensor], entries: Sequence[Entries]) -> list[State]:
        """Return states of paged memory with the given contents."""
        states: list[State] = [{} for _ in params]
        batch: list[int] = []
        for i, param in enumerate(params):
            device = local_part(param).device
            limit = min(_ALLOCATION_BYTES, self.part_bytes(device))
            if batch and (
                local_part(params[batch[0]]).device != device
                or sum(_size(entries[j]) for j in (*batch, i)) > limit
            ):
                self._place_batch(params, entries, batch, states)
                batch = []
            batch.append(i)
        if batch:
            self._place_batch(params, entries, batch, states)
        return states

    def _place_batch(
        self,
        params: Sequence[torch.Tensor],
        entries: Sequence[Entries],
        batch: Sequence[int],
        states: Sequence[State],
    ) -> None:
        device = local_part(params[batch[0]]).device
        # One for each dtype: torch.save refuses tensors of several dtypes over one storage.
        totals: dict[torch.dtype, int] = {}
        for i in batch:
            for name, entry in entries[i].items():
                if name not in ON_DEVICE:
                    size = totals.get(entry.dtype, 0)
                    totals[entry.dtype] = size + _aligned(entry.size_bytes)
        free = {
            dtype: self.pool(device).empty(size_bytes // dtype.itemsize, dtype)
            for dtype, size_bytes in totals.items()
        }
        for i in batch:
            for name, entry in entries[i].items():
                if name in ON_DEVICE:
                    states[i][name] = entry.make(device)
                    continue
                rest = free[entry.dtype]
                numel = entry.size_bytes // entry.dtype.itemsize
                states[i][name] = entry.fill(rest[:numel].view(entry.shape))
                free[entry.dtype] = rest[_aligned(entry.size_bytes) // entry.dtype.itemsize :]

    def allocations(
        self, states: Iterable[Mapping[str, torch.Tensor]], device: torch.device
    ) -> list[tuple[int, int]]:
        """Return the addresses and sizes of the allocations that hold states of a device."""
        found = {}
        for state in states:
            if "step" not in state or state["step"].device != device:
                continue
            for name, tensor in state.items():
                if name not in ON_DEVICE and tensor.numel():
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
        return list(found.items())

    def synchronize_to_host(self, states: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Make tensors that the host can read hold the newest bytes, and wait for that."""
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for state in states:
            if "step" not in state:
                continue
            device = state["step"].device
            if device in self._pools and self._pools[device].backing == "pinned":
                tensors = by_device.setdefault(device, [])
                tensors += [t for name, t in state.items() if name not in ON_DEVICE]
        for device, tensors in by_device.items():
            self._pools[device].synchronize_to_host(tensors)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT


def _size(entries: Entries) -> int:
    return sum(_aligned(e.size_bytes) for name, e in entries.items() if name not in ON_DEVICE)
