"""Counts the operations that go around torch's dispatcher, and makes them go through it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_native as qn
from qlora_native import _eager

needs_table = pytest.mark.skipif(
    not _eager.OPS.has_exchange_api, reason="this torch has no table of DLPack functions"
)


class Everything(TorchDispatchMode):
    """Wants to see every operator of both passes, and changes none."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def calls_of(function):
    """Return the function's result and how many operations ran around the dispatcher in it."""
    before = _eager.OPS.calls
    return function(), _eager.OPS.calls - before


def direct(function):
    """Return the function's result; its one operation ran around the dispatcher."""
    result, calls = calls_of(function)
    assert calls == 1
    return result


def indirect(function):
    """Return the function's result; no operation ran around the dispatcher."""
    result, calls = calls_of(function)
    assert calls == 0
    return result


def parts_of(q):
    return (
        q.packed, q.absmax, q.absmax2, q.offset, q.shape, q.block_size, q.quant_type, q.codebook
    )  # fmt: skip


def weight(device="cpu", rows=48, cols=128, **settings):
    return qn.quantize_4bit(torch.randn(rows, cols, device=device), **settings)
