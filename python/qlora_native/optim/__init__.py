"""Optimizers whose state is fp32 or 8-bit.

All are `torch.optim.Optimizer`s. A step costs a few launches whatever the number of parameters,
waits for nothing, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from qlora_native.optim.adamw import AdamW, AdamW8bit
from qlora_native.optim.lion import Lion, Lion8bit

__all__ = ["AdamW", "AdamW8bit", "Lion", "Lion8bit"]
