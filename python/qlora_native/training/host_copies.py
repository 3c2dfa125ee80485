"""Copies of a device's memory on the host, made and brought back beside its computation."""

from __future__ import annotations

import collections
import dataclasses
import threading

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_native.memory import PagedPool
from qlora_native.training.host_buffers import HostBuffers

_REGION_BYTES = 4096
"""Below a buffer's size, so that each has a region of its own, which is freed with it."""


@dataclasses.dataclass(frozen=True)
class OffloadStats:
    """What an `ActivationOffload` has moved, and what it holds."""

    tensors: int
    """Tensors moved to the host so far; one that several operations saved counts once."""
    to_host_bytes: int
    to_device_bytes: int
    """Less than `to_host_bytes`: what was saved last is still there when it is needed."""
    buffers: int
    """Buffers of pinned host memory, those that wait for the next step included."""
    buffer_bytes: int
    on_device_bytes: int
    """Device memory of moved tensors, on their way in either direction."""


def require_version(found: int, expected: int, shape: torch.Size) -> None:
    """torch's own check, which it leaves to hooks where there are any.

    Raises:
        RuntimeError: the two differ.
    """
    if found != expected:
        raise RuntimeError(
            f"a tensor of shape {tuple(shape)} was saved for the backward pass at version "
            f"{expected} and modified in place since: it is at version {found}"
        )


class _Record:
    """Memory that was moved: one storage at one version, whoever has saved it."""

    __slots__ = (
        "alias", "copied", "done_in", "handles", "host", "key", "nbytes", "next", "on_device",
        "previous", "round", "source", "stream", "unpacked", "version",
    )  # fmt: skip

    def __init__(self, tensor: Tensor, previous: _Record | None) -> None:
        storage = tensor.untyped_storage()
        self.version = tensor._version
        # Weak, and held so that no other storage gets the address while this one goes by it.
        self.source = StorageWeakRef(storage)
        self.key = _key(tensor)
        self.nbytes = storage.nbytes()
        self.host: Tensor | None = None
        self.on_device: Tensor | None = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        self.on_device.set_(storage)
        self.alias: Tensor | None = tensor.detach()
        """The memory as it was saved, for its version; None once it has left the device."""
        self.stream = torch.cuda.current_stream(tensor.device)
        """The stream that the memory on the device belongs to."""
        self.copied: torch.cuda.Event | None = None
        """The end of the last copy, in either direction."""
        self.handles = 0
        """How many saved tensors of it there are in graphs."""
        self.unpacked = 0
        """Of them, how many were asked for in this round, which ends when all have been."""
        self.round = 0
        self.done_in: int | None = None
        """The backward pass, by torch's number, that needs it no more."""
        self.previous, self.next = previous, None
        """Neighbours in the order of saving: the one before is the next to be needed."""
        if previous is not None:
            previous.next = self


def _key(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, tensor._version


class Handle:
    """A saved tensor as the graph holds it: a view of memory that was moved."""

    __slots__ = ("copies", "dtype", "offset", "record", "round", "shape", "stride")

    def __init__(self, copies: HostCopies, record: _Record, tensor: Tensor) -> None:
        self.copies = copies
        self.record = record
        self.round = -1
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.offset, self.dtype = tensor.storage_offset(), tensor.dtype

    def __del__(self) -> None:
        self.copies.forget(self)


class HostCopies:
    """The moved tensors of one device. Whoever calls holds `lock`, but for `forget` and `lock`.

    Copies in both directions are on one stream, so that a host buffer can be used again without
    asking whether its last copy is over.

    Args:
        window: so many of the records made last keep their memory on the device.
        lock: reentrant; the backward pass runs in other threads than the forward pass.
    """

    def __init__(self, device: torch.device, window: int, lock: threading.RLock) -> None:
        pool = PagedPool(device, "pinned", region_bytes=_REGION_BYTES)
        self._device = device
        self._window = window
        self._lock = lock
        self._side = torch.cuda.Stream(device)
        self._pool = pool
        self._buffers = HostBuffers(lambda nbytes: pool.empty(nbytes, torch.uint8))
        self._records: dict[tuple[int, int], _Record] = {}
        self._leaving: collections.deque[_Record] = collections.deque()
        self._newest: _Record | None = None
        self._dead: collections.deque[tuple[_Record, int]] = collections.deque()
        self._is_closed = False
        self._tensors = self._to_host = self._to_device = 0

    def save(self, tensor: Tensor) -> Handle:
        """Begins to move a tensor's memory to the host, unless that was done.

        Raises:
            MemoryError: there is no host memory for it.
        """
        self.settle()
        record = self._records.get(_key(tensor))
        if record is None:
            record = self._leave(tensor)
        record.handles += 1
        return Handle(self, record, tensor)

    def _leave(self, tensor: Tensor) -> _Record:
        with torch.cuda.stream(self._side):  # the buffer's too: it is freed after its copies
            host = self._buffers.take(tensor.untyped_storage().nbytes())
        record = _Record(tensor, self._newest)
        record.host = host
        self._records[record.key] = self._newest = record
        self._copy(host[: record.nbytes], record.on_device, record)
        self._tensors += 1
        self._to_host += record.nbytes
        self._leaving.append(record)
        while len(self._leaving) > self._window:
            self._release(self._leaving.popleft())
        return record

    def bring(self, handle: Handle) -> Tensor:
        """Returns a saved tensor, good for the current stream; begins to bring the next one.

        Raises:
            RuntimeError: it was modified in place before its copy was done.
        """
        self.settle()
        record = handle.record
        if record.alias is not None:
            require_version(record.alias._version, record.version, handle.shape)
        self._fetch(record)
        current = torch.cuda.current_stream(self._device)
        # Of memory that has not left yet as well: who gets it may be the last to hold it.
        current.wait_event(record.copied)
        if current != record.stream:
            record.on_device.record_stream(current)
        tensor = torch.empty(0, dtype=handle.dtype, device=self._device)
        storage = record.on_device.untyped_storage()
        tensor.set_(storage, handle.offset, handle.shape, handle.stride)
        if handle.round != record.round:
            handle.round = record.round
            record.unpacked += 1
        backward = torch._C._current_graph_task_id()
        if record.unpacked >= record.handles:
            record.done_in = backward
            self._release(record)
        self._prefetch(record.previous, backward)
        return tensor

    def _prefetch(self, record: _Record | None, backward: int) -> None:
        # An operation may ask for what it saved in any order: not for this one once more.
        while record is not None and record.done_in == backward:
            record = record.previous
        if record is not None:
            self._fetch(record)

    def _fetch(self, record: _Record) -> None:
        if record.on_device is not None or record.alias is not None:
            return
        record.stream = torch.cuda.current_stream(self._device)
        record.on_device = torch.empty(record.nbytes, dtype=torch.uint8, device=self._device)
        self._copy(record.on_device, record.host[: record.nbytes], record)
        self._to_device += record.nbytes

    def _copy(self, target: Tensor, source: Tensor, record: _Record) -> None:
        # Its stream may still write what is read here, or use what is written here.
        self._side.wait_stream(record.stream)
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            record.copied = self._side.record_event()

    def _release(self, record: _Record) -> None:
        """Lets go of the memory on the device, which its stream uses again after the copy."""
        record.unpacked = 0
        record.round += 1
        if record.on_device is None:
            return
        if record.alias is not None and record.alias._version == record.version:
            # Otherwise the copy may have what was written since, and the alias stays to tell.
            record.alias = None
        record.stream.wait_event(record.copied)
        record.on_device = None

    def leave_device(self) -> None:
        """Lets go of what is on the device beside its copy on the host."""
        while self._leaving:
            self._release(self._leaving.popleft())

    def forget(self, handle: Handle) -> None:
        """Notes that a saved tensor has died; in any thread, amid anything."""
        self._dead.append((handle.record, handle.round))
        if self._is_closed:  # nobody else comes to look after it
            with self._lock:
                self.settle()

    def settle(self) -> None:
        """Frees what the saved tensors that died since have left."""
        while self._dead:
            record, of_round = self._dead.popleft()
            record.handles -= 1
            record.unpacked -= of_round == record.round
            if record.handles == 0:
                self._finish(record)
            elif record.unpacked >= record.handles:
                self._release(record)
        if self._is_closed:
            self._buffers.clear()

    def _finish(self, record: _Record) -> None:
        if record.host is None:
            return
        host, record.host = record.host, None
        self._release(record)
        del self._records[record.key]
        if record in self._leaving:
            self._leaving.remove(record)
        if record.next is not None:
            record.next.previous = record.previous
        else:
            self._newest = record.previous
        if record.previous is not None:
            record.previous.next = record.next
        record.alias = record.previous = record.next = None
        self._buffers.give_back(host)

    def close(self) -> None:
        """Frees the buffers that no graph needs now, and the others when their graphs die."""
        self._is_closed = True
        self.leave_device()
        self.settle()

    def wait(self) -> None:
        """Waits for the copies; what was freed before then goes back to the system."""
        self._side.synchronize()
        self._pool.trim()

    def stats(self) -> OffloadStats:
        """Returns what was moved, and what is held."""
        self.settle()
        on_device = (r.nbytes for r in self._records.values() if r.on_device is not None)
        return OffloadStats(
            tensors=self._tensors,
            to_host_bytes=self._to_host,
            to_device_bytes=self._to_device,
            buffers=self._buffers.count,
            buffer_bytes=self._buffers.nbytes,
            on_device_bytes=sum(on_device),
        )
