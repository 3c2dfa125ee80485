"""Optimizers whose state is fp32 or 8-bit, on the device or paged.

Each is a `torch.optim.Optimizer`. A step costs a few launches whatever the number of parameters,
waits for nothing, and can be captured in a CUDA graph.

The names that begin with Paged are those that bitsandbytes has, for scripts that come from there.
"""

from __future__ import annotations

from qlora_native.optim._distributed import load_distributed, save_distributed
from qlora_native.optim.adamw import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
from qlora_native.optim.lion import Lion, Lion8bit, PagedLion, PagedLion8bit, PagedLion32bit

__all__ = [
    "AdamW",
    "AdamW8bit",
    "Lion",
    "Lion8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "load_distributed",
    "save_distributed",
]
