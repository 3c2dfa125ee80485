"""The loss of a language model over held-out sequences."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.cli.parallel import Ranks
from qlora_native.training import learned_tokens, uses_chunked_loss


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision in `dtype`; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@torch.no_grad()
def mean_token_loss(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    dtype: torch.dtype,
    ranks: Ranks | None = None,
) -> tuple[float, int]:
    """Mean cross-entropy per predicted token in nats, and the number of those tokens.

    Every token weighs the same, however sequences fall into batches. Sums are fp64, so that the
    same batches give the same number in another process.

    Args:
        ranks: those that share the work, with the same batches each.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    chunked = uses_chunked_loss(model)
    for batch, is_counted in _share(batches, ranks):
        learned = learned_tokens(batch["labels"])
        tokens = len(learned)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        if chunked:
            batch["learned_tokens"] = learned
        with autocast(model.device, dtype):
            loss = model(**batch).loss
        if is_counted:
            total += loss.double().item() * tokens
            count += tokens
    model.train(was_training)
    if ranks is not None:
        total, counted = ranks.sum([total, count])
        count = int(counted)
    return total / count, count


def _share(
    batches: Iterable[dict[str, Tensor]], ranks: Ranks | None
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """A rank's batches, as many on each: a sharded model needs all ranks in every forward pass.

    In the last turn, those for whom no batch is left run another one, which does not count.
    """
    if ranks is None or ranks.size == 1:
        for batch in batches:
            yield batch, True
        return
    turn: list[dict[str, Tensor]] = []
    for batch in batches:
        turn.append(batch)
        if len(turn) == ranks.size:
            yield turn[ranks.rank], True
            turn = []
    if turn:
        yield turn[min(ranks.rank, len(turn) - 1)], ranks.rank < len(turn)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
