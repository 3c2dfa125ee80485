"""The loss of a language model over held-out sequences."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision in `dtype`; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@torch.no_grad()
def mean_token_loss(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], dtype: torch.dtype
) -> tuple[float, int]:
    """Mean cross-entropy per predicted token in nats, and the number of those tokens.

    Every token weighs the same, however sequences fall into batches. Sums are fp64, so that the
    same batches give the same number in another process.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        tokens = int((batch["labels"][:, 1:] >= 0).sum())
        with autocast(model.device, dtype):
            loss = model(**batch).loss
        total += loss.double().item() * tokens
        count += tokens
    model.train(was_training)
    return total / count, count


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
