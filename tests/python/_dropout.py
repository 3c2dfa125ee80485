"""The dropout of the adapters' operations, written a second time from its description, in numpy."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def _philox(counter, seed):
    """Philox4x32-10 of counters [n, 4], as uint64 numbers below 2^32."""
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    c = [counter[:, i] for i in range(4)]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> _32) ^ c[1] ^ key[0], b & _LOW, (a >> _32) ^ c[3] ^ key[1], a & _LOW]
        key = [
            (key[0] + np.uint64(0x9E3779B9)) & _LOW,
            (key[1] + np.uint64(0xBB67AE85)) & _LOW,
        ]
    return np.stack(c, axis=1)


def dropout_factor(p: float, seed: int, offset: int, rows: int, cols: int) -> torch.Tensor:
    """Return what the elements of a [rows, cols] matrix are multiplied by, in fp64."""
    units = -(-cols // 8)
    index = np.arange(rows * units, dtype=np.uint64)
    ends = np.full_like(index, offset & 0xFFFFFFFF), np.full_like(index, offset >> 32)
    words = _philox(np.stack([index & _LOW, index >> _32, *ends], axis=1), seed)
    numbers = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], axis=2)
    numbers = numbers.reshape(rows, units * 8)[:, :cols]
    threshold = round(p * 65536)
    scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    return torch.from_numpy(np.where(numbers >= threshold, scale, 0.0))


def drawn_factor(p: float, rows: int, cols: int) -> torch.Tensor:
    """Return the factors that the next operation draws from torch's generator."""
    seed, offset = torch.randint(2**63 - 1, (2,)).tolist()
    return dropout_factor(p, seed, offset, rows, cols)


class CounterDropout(nn.Module):
    """Drops in training what the adapters' operation drops."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        factor = drawn_factor(self.p, x.shape[:-1].numel(), x.shape[-1])
        return x * factor.reshape(x.shape).to(x.dtype)
