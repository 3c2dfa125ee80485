"""Host memory that is used again from step to step."""

from __future__ import annotations

import bisect
from collections.abc import Callable

from torch import Tensor


class HostBuffers:
    """Buffers of bytes, taken and given back; those given back are kept for the next taker.

    The smallest that suffices is taken. A new one is allocated where none does, in place of free
    ones of as many bytes: the buffers never hold more than was taken at once, whatever sizes the
    batches of a run have.

    Args:
        allocate: makes a contiguous tensor of that many bytes.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._free: list[Tensor] = []  # the smallest first
        self.count = 0
        """Buffers, taken ones included."""
        self.nbytes = 0
        """Their bytes."""

    def take(self, nbytes: int) -> Tensor:
        """Returns a buffer of that many bytes or more.

        Raises:
            MemoryError: there is no memory for another one.
        """
        position = bisect.bisect_left(self._free, nbytes, key=_size)
        if position < len(self._free):
            return self._free.pop(position)
        discarded = 0
        while self._free and discarded < nbytes:
            discarded += self._drop(self._free.pop())
        buffer = self._allocate(nbytes)
        self.count += 1
        self.nbytes += buffer.nbytes
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """Takes a buffer back; its content may be overwritten from now on."""
        bisect.insort(self._free, buffer, key=_size)

    def clear(self) -> None:
        """Frees the buffers that are not taken."""
        while self._free:
            self._drop(self._free.pop())

    def _drop(self, buffer: Tensor) -> int:
        self.count -= 1
        self.nbytes -= buffer.nbytes
        return buffer.nbytes


def _size(buffer: Tensor) -> int:
    return buffer.nbytes
