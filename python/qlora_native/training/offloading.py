"""Activations in host memory between the forward and the backward pass."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_native.training.host_copies import HostCopies, OffloadStats, require_version

MIN_BYTES = 1 << 20
"""Smaller tensors stay on the device: starting two copies would take longer than they do."""

WINDOW = 2
"""Of the tensors saved last so many are on the device as well."""


class ActivationOffload:
    """A context manager: large CUDA tensors saved for the backward pass inside wait on the host.

    A tensor goes to pinned memory on a stream of its own while what follows is computed; when the
    backward pass asks for one, the one saved before it begins to come back. Nothing waits for the
    device on the host, the gradients are the same bit for bit, and device memory does not depend on
    how fast the copies are: the current stream waits for them when they fall behind by `window`.

    Only memory that the graph alone would keep is moved: neither parameters and views of them, nor
    leaves that require gradients, nor what is saved during a backward pass, as by a layer that runs
    again. Tensors in one memory go together, once. On the CPU nothing is moved.

    It may be entered for every step, or by `use_checkpointing` for every layer; the backward pass
    may come after its end. Host memory is kept for the next step, as much as the largest step has
    needed, until `close` or until nobody holds the object and its graphs. It is a `PagedPool`'s
    pinned memory: torch's own allocator rounds a buffer up to a power of two and keeps it for good,
    which at tens of gigabytes is too much.

    Args:
        min_bytes: smaller tensors stay.
        window: so many of the tensors saved last stay on the device too, so that their copies have
            the time of as many layers.

    Raises:
        ValueError: an argument is less than 1.
        RuntimeError: on entering, a CUDA graph is being captured; in the backward pass, a tensor
            was modified in place after it was saved.
        MemoryError: in the forward pass, there is no host memory left that could be pinned.
    """

    def __init__(self, min_bytes: int = MIN_BYTES, window: int = WINDOW) -> None:
        self._copies: dict[torch.device, HostCopies] = {}
        # The backward pass runs in a thread for each device, and not in the forward pass's.
        self._lock = threading.RLock()
        for name, value in (("min_bytes", min_bytes), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        self.min_bytes = min_bytes
        self.window = window

    def __enter__(self) -> ActivationOffload:
        _refuse_capture()
        with self._lock:
            for copies in self._copies.values():
                copies.settle()
        # torch keeps a stack of them for each thread.
        saved_tensors_hooks(self._pack, self._unpack).__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        saved_tensors_hooks(self._pack, self._unpack).__exit__()
        with self._lock:
            for copies in self._copies.values():
                if kind is not None:
                    copies.leave_device()
                copies.settle()

    def close(self) -> None:
        """Frees the host memory, after waiting for its copies.

        Graphs whose backward pass is still to come keep theirs until then. Entered again, the
        object begins anew.
        """
        with self._lock:
            for copies in self._end():
                copies.wait()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> list[HostCopies]:
        ended = list(self._copies.values())
        self._copies = {}
        for copies in ended:
            copies.close()
        return ended

    def stats(self) -> OffloadStats:
        """Returns what was moved since the beginning or the last `close`, and what is held."""
        with self._lock:
            found = [copies.stats() for copies in self._copies.values()]
        names = [field.name for field in dataclasses.fields(OffloadStats)]
        return OffloadStats(**{n: sum(getattr(stats, n) for stats in found) for n in names})

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model has layers with a copy of this: of the settings, not of streams.
        return type(self), (self.min_bytes, self.window)

    def __repr__(self) -> str:
        return f"ActivationOffload(min_bytes={self.min_bytes}, window={self.window})"

    def _pack(self, tensor: Tensor) -> Any:
        if not (tensor.is_cuda and is_activation(tensor, self.min_bytes)) or _in_backward():
            return _Kept(tensor)
        with self._lock:
            copies = self._copies.get(tensor.device)
            if copies is None:
                copies = HostCopies(tensor.device, self.window, self._lock)
                self._copies[tensor.device] = copies
            return copies.save(tensor)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, _Kept):
            return packed.get()
        with self._lock:
            return packed.copies.bring(packed)


def offload_activations(min_bytes: int = MIN_BYTES, window: int = WINDOW) -> ActivationOffload:
    """Returns what moves activations to the host: a context manager over a step's forward pass.

    `use_checkpointing` takes it as `offload` to move what checkpointed layers keep, and that alone.
    """
    return ActivationOffload(min_bytes, window)


def is_activation(tensor: Tensor, min_bytes: int) -> bool:
    """Whether a saved tensor is memory of that size which the graph would be the last to hold."""
    return (
        type(tensor) is Tensor  # neither a parameter nor a subclass, whose memory may be elsewhere
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not (tensor.is_leaf and tensor.requires_grad)
        and not isinstance(tensor._base, nn.Parameter)
        and tensor.untyped_storage().nbytes() >= min_bytes
    )


def _in_backward() -> bool:
    # Also within what a checkpoint runs again, whose results are needed at once.
    return torch._C._current_graph_task_id() != -1


def _refuse_capture() -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream()
        raise RuntimeError(
            f"a CUDA graph is being captured on {stream}, and activations cannot be offloaded in "
            "it: when their memory is free again would be decided once, for all replays; capture "
            "the step without offloading"
        )


class _Kept:
    """A saved tensor that stays where it is."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: one that holds its own node, which holds this, would never die.
        self._tensor = tensor.detach()
        self._version = tensor._version

    def get(self) -> Tensor:
        require_version(self._tensor._version, self._version, self._tensor.shape)
        return self._tensor
