"""Paged memory: for state that is large and rarely touched, such as an optimizer's.

A pool makes tensors out of a few large regions of memory that can leave the GPU. Its backing says
how they come and go:

* "managed": unified memory. The tensors are CUDA tensors like any other; the pool moves pages in
  bulk (`PagedPool.prefetch`, `PagedPool.evict`), the driver moves whatever nobody asked for.
* "pinned": pinned host memory. The tensors are CPU tensors; work on the device sees copies of them
  in a staging cache of a fixed size (`PagedPool.acquired`): a hard bound on device memory.
* "host": the CPU's memory, for pools of the CPU, which the operating system pages.

Nothing here waits for the device, except `PagedPool.synchronize_to_host` and freed regions.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

import torch

from qlora_native import _C
from qlora_native._weight import device_code

__all__ = ["PagedPool", "PagedPoolStats", "automatic_backing", "default_pool", "paged"]

PagedPoolStats = _C.PagedPoolStats

REGION_BYTES = 64 << 20
DEVICE_BUDGET_BYTES = 256 << 20

# DLPack's code and bits of an element type.
_DTYPES = {
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.bool: (6, 8),
}
_MAX_BYTES = 2**63 - 1


def _indexed(device: torch.device | str | int | None) -> torch.device:
    """Return a device with its index; None is the current GPU, or the CPU where there is none."""
    if device is None:
        device = "cpu" if _C.cuda_unavailable_reason() else "cuda"
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    obstacle = _C.cuda_unavailable_reason()
    if obstacle:
        raise ValueError(f"no paged memory on {device}: {obstacle}")
    return torch.device("cuda", torch.cuda.current_device())


def automatic_backing(device: torch.device | str | int | None = None) -> tuple[str, str]:
    """Return the backing that "auto" stands for on a device, and why."""
    return _C.automatic_backing(device_code(_indexed(device)))


class PagedPool:
    """Makes tensors of paged memory.

    The memory of a tensor returns to the pool when the last tensor that shares it dies, and the
    pool's regions to the system when neither the pool nor a tensor of it is left. Until then one
    region without tensors is kept for reuse (`trim`). A pool may be used from several threads; a
    forked child makes its own.

    Args:
        device: where the tensors are worked on; None: the current GPU, or the CPU without one.
        backing: "auto", "managed", "pinned", or "host"; see the module. A pool of the CPU has
            "host", whichever is asked for.
        device_budget: bytes of device memory of the pinned backing's staging cache. Movement
            overlaps work in both directions when the ranges of a plan are an eighth of it or less.
        region_bytes: tensors share regions of this size; a larger one has a region of its own.

    Raises:
        ValueError: there is no such device or backing, or a size is too small.
        NotImplementedError: the device does not have the backing.
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        backing: str = "auto",
        device_budget: int | None = None,
        region_bytes: int = REGION_BYTES,
    ) -> None:
        self.device = _indexed(device)
        self.device_budget = DEVICE_BUDGET_BYTES if device_budget is None else device_budget
        """Bytes of device memory of the pinned backing's staging cache."""
        self._pool = _C.PagedPool.make(
            device=device_code(self.device),
            backing=backing,
            region_bytes=region_bytes,
            device_budget_bytes=self.device_budget,
        )

    @property
    def backing(self) -> str:
        """How memory moves: "managed", "pinned" or "host"."""
        return self._pool.backing

    @property
    def tensor_device(self) -> torch.device:
        """The device that the pool's tensors say they are on: the CPU, but for managed memory."""
        return self.device if self.backing == "managed" else torch.device("cpu")

    @property
    def core(self) -> _C.PagedPool:
        """The pool as the extension module takes it."""
        return self._pool

    def empty(self, shape: Sequence[int] | int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return an uninitialized, contiguous tensor.

        It is used on the stream that is current now, or on the CPU; on others the caller orders its
        death as its other uses. A tensor without elements has no memory, and none of the pool's.

        Raises:
            MemoryError: there is no memory for it; names the size and the state of the pool.
            TypeError: `dtype` is not supported.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        code, bits = _dlpack_dtype(dtype)
        size_bytes = bits // 8
        for size in shape:
            if size < 0:
                raise ValueError(f"a dimension of {shape} is negative")
            size_bytes *= size
        if size_bytes == 0:
            return torch.empty(shape, dtype=dtype, device=self.tensor_device)
        if size_bytes > _MAX_BYTES:
            raise MemoryError(f"a tensor of shape {shape} and {dtype} has {size_bytes} bytes")
        capsule = self._pool.empty_tensor(
            shape=shape, code=code, bits=bits, size_bytes=size_bytes, stream=self._stream()
        )
        return torch.from_dlpack(capsule)

    def zeros(self, shape: Sequence[int] | int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a tensor of zeros; see `empty`."""
        tensor = self.empty(shape, dtype)
        if self.backing != "managed":
            return tensor.zero_()
        # Acquired first: fresh pages come to the device together, not one fault at a time.
        with self.acquired([tensor], "write"):
            return tensor.zero_()

    def prefetch(self, tensors: Sequence[torch.Tensor]) -> None:
        """Begin to bring tensors to the device, beside what is queued on the current stream."""
        self._pool.prefetch(*_ranges(tensors), stream=self._stream())

    def evict(self, tensors: Sequence[torch.Tensor]) -> None:
        """Move tensors off the device after what is queued on the current stream."""
        self._pool.evict(*_ranges(tensors), stream=self._stream())

    def plan(self, tensors: Sequence[torch.Tensor]) -> None:
        """Say in which order tensors are going to be acquired, once.

        From now on, acquiring one begins to bring those that follow, as far as there is room.
        """
        self._pool.plan(*_ranges(tensors))

    def acquire(
        self, tensors: Sequence[torch.Tensor], access: str = "readwrite"
    ) -> list[torch.Tensor]:
        """Return tensors on the device through which the current stream works on `tensors`.

        They are good until `release`, for work on the current stream: with the pinned backing they
        are staged copies, otherwise `tensors` themselves.

        Args:
            tensors: tensors of the pool, or views of them; all of them are acquired, or none.
            access: "read", "write" (every element, and none is read before) or "readwrite".

        Raises:
            ValueError: a tensor is not of this pool.
            MemoryError: the staging cache has no room beside what is acquired.
        """
        if access == "write" and not all(tensor.is_contiguous() for tensor in tensors):
            access = "readwrite"  # what lies between the elements is kept
        addresses = self._pool.acquire(*_ranges(tensors), access=access, stream=self._stream())
        if self.backing != "pinned":
            return list(tensors)
        return [
            self._staged(tensor, address)
            for tensor, address in zip(tensors, addresses, strict=True)
        ]

    def release(self, tensors: Sequence[torch.Tensor]) -> None:
        """End an `acquire` of the same tensors, after what is queued on the current stream.

        Raises:
            ValueError: a tensor is not acquired.
        """
        self._pool.release(*_ranges(tensors), stream=self._stream())

    @contextlib.contextmanager
    def acquired(
        self, tensors: Sequence[torch.Tensor], access: str = "readwrite"
    ) -> Iterator[list[torch.Tensor]]:
        """`acquire` tensors, and `release` them at the end."""
        staged = self.acquire(tensors, access)
        try:
            yield staged
        finally:
            self.release(tensors)

    def synchronize_to_host(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the tensors' own memory hold the newest bytes, and wait for that.

        To be called before the host reads or writes tensors of the pinned backing that were
        acquired before, for a checkpoint for instance. It may do so until they are next acquired,
        prefetched or planned.

        Raises:
            ValueError: a tensor is acquired, or not of this pool.
        """
        self._pool.synchronize_to_host(*_ranges(tensors), stream=self._stream())

    def trim(self) -> None:
        """Return the memory of regions without tensors."""
        self._pool.trim()

    def stats(self) -> PagedPoolStats:
        """Return what the pool holds, and what it has moved so far."""
        return self._pool.stats()

    def resident_bytes(self, device: torch.device | str | int) -> int:
        """Return how many bytes of tensors are on a device, as far as the pool knows."""
        return self._pool.resident_bytes(device_code(_indexed(device)))

    def __repr__(self) -> str:
        return f"PagedPool(device={str(self.device)!r}, backing={self.backing!r})"

    def _stream(self) -> int:
        if self.device.type == "cpu":
            return 0
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def _staged(self, tensor: torch.Tensor, address: int) -> torch.Tensor:
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        code, bits = _dlpack_dtype(tensor.dtype)
        capsule = self._pool.staged_tensor(
            address=address, shape=tensor.shape, strides=tensor.stride(), code=code, bits=bits
        )
        return torch.from_dlpack(capsule)


def _dlpack_dtype(dtype: torch.dtype) -> tuple[int, int]:
    try:
        return _DTYPES[dtype]
    except KeyError:
        known = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise TypeError(f"paged tensors of {dtype} are not supported; there are {known}") from None


def _ranges(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[int]]:
    """Return where tensors begin, and how many bytes lie from their first to their last element."""
    if isinstance(tensors, torch.Tensor):
        raise TypeError("a sequence of tensors is expected, not one tensor")
    sizes = []
    for tensor in tensors:
        if tensor.is_contiguous():
            sizes.append(tensor.nbytes)
        elif tensor.numel() == 0:
            sizes.append(0)
        else:
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            sizes.append((sum((n - 1) * step for n, step in steps) + 1) * tensor.itemsize)
    return [tensor.data_ptr() for tensor in tensors], sizes


class _Shared:
    """What the process shares: pools by device, and torch's pools of managed memory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pools: dict[torch.device, PagedPool] = {}
        self.torch_pools: dict[int, tuple[torch.cuda.MemPool, object]] = {}


_shared = _Shared()
if hasattr(os, "register_at_fork"):
    # The pools are the parent's, and a thread that the child lacks may hold the lock.
    os.register_at_fork(after_in_child=lambda: _shared.__init__())


def default_pool(device: torch.device | str | int | None = None) -> PagedPool:
    """Return the process's pool of a device, which everybody shares; made at the first call."""
    device = _indexed(device)
    with _shared.lock:
        if device not in _shared.pools:
            _shared.pools[device] = PagedPool(device)
        return _shared.pools[device]


@contextlib.contextmanager
def paged(device: torch.device | str | int | None = None) -> Iterator[None]:
    """Make every CUDA tensor that this thread creates inside one of managed memory.

    Such tensors are CUDA tensors like any other, and stay so outside. Their memory can leave the
    GPU: the driver moves it to the host when others need the room, and back when it is used. torch
    keeps what dead tensors leave for the next `paged` of the process.

    On a machine without a GPU nothing changes: there are no CUDA tensors, and the memory of CPU
    tensors is paged by the operating system.

    Args:
        device: the GPU whose tensors are meant; None: the current one.

    Raises:
        NotImplementedError: the GPU cannot page managed memory while it computes.
        ValueError: `device` is named, and is not a GPU that can be used.
    """
    if device is None and _C.cuda_unavailable_reason():
        yield
        return
    device = _indexed(device)
    if device.type != "cuda":
        raise ValueError(f"paged() is about the tensors of a GPU, not of {device}")
    with torch.cuda.use_mem_pool(_torch_pool(device), device=device):
        yield


def _torch_pool(device: torch.device) -> torch.cuda.MemPool:
    with _shared.lock:
        if device.index not in _shared.torch_pools:
            backing, reason = automatic_backing(device)
            if backing != "managed":
                raise NotImplementedError(f"no managed memory on {device}: {reason}")
            allocator = torch.cuda.memory.CUDAPluggableAllocator(
                _C.__file__, "qn_torch_managed_allocate", "qn_torch_managed_free"
            )
            with torch.cuda.device(device):
                pool = torch.cuda.MemPool(allocator.allocator())
            # Neither is let go of: their tensors may outlive every user of `paged`.
            _shared.torch_pools[device.index] = (pool, allocator)
        return _shared.torch_pools[device.index][0]
