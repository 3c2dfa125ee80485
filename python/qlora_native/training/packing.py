"""Several sequences in one row, none of which sees another: less padding, or none.

A row is the sequences one after another, without an attention mask; `position_ids` begin at 0 with
each. transformers makes the mask of them that keeps the sequences apart; not while it fills a
key-value cache, so `config.use_cache` has to be off.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.training.modes import in_evaluation_mode

IGNORED = -100
"""The label of a token that is not learned."""

_PROBE_LENGTHS = (5, 3)
_PROBE_TOLERANCES = {torch.float32: 1e-4}
_PROBE_TOLERANCE_16_BITS = 2e-2


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts sequences into as few rows as best-fit decreasing needs.

    The longest come first, each into the fullest row that has room for it; the result depends on
    the lengths alone.

    Returns:
        Indices into `lengths`, by row.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"sequence {index} has {length} tokens, a row {capacity}")
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        rows[row].append(index)
        left = space - length
        if left > 0:
            if left not in with_space:
                bisect.insort(spaces, left)
            with_space.setdefault(left, []).append(row)
    return rows


def padding_share(lengths: Sequence[int], batch_size: int, seed: int = 0) -> float:
    """The share of padding in shuffled batches that are padded to their longest sequence."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    padded = 0
    for start in range(0, len(order), batch_size):
        batch = [lengths[i] for i in order[start : start + batch_size]]
        padded += max(batch) * len(batch)
    return 1 - sum(lengths) / padded if padded else 0.0


def packed_row(
    sequences: Sequence[dict[str, Sequence[int]]], pad: int = 0, length: int | None = None
) -> dict[str, Tensor]:
    """One row of several sequences.

    Args:
        sequences: each with `input_ids` and `labels`.
        pad: the token that fills the row up to `length`, as a sequence of its own.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64 [1, tokens]. The first label of every
        sequence is ignored: it would be predicted from the sequence before.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for sequence in sequences:
        ids += sequence["input_ids"]
        labels += [IGNORED, *sequence["labels"][1:]]
        positions += range(len(sequence["input_ids"]))
    missing = 0 if length is None else length - len(ids)
    if missing < 0:
        raise ValueError(f"the sequences have {len(ids)} tokens, the row {length}")
    ids += [pad] * missing
    labels += [IGNORED] * missing
    positions += range(missing)
    rows = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([row]) for name, row in rows.items()}


class LeakError(ValueError):
    """Sequences in one row would not be computed as they are alone."""


@torch.no_grad()
def check_isolation(model: nn.Module) -> None:
    """Tries on a few tokens whether a model keeps the sequences of a row apart.

    The logits of a sequence must not change with what lies before it in its row, and must be those
    of the sequence alone, up to rounding. A sharded model needs all its ranks for that.

    Raises:
        LeakError: it does not; the message says what was seen.
    """
    name = type(model).__name__
    device = model.get_input_embeddings().weight.device
    vocabulary = model.config.vocab_size
    first, second = _PROBE_LENGTHS
    ids = (torch.arange(first + second) * 7 + 3) % vocabulary
    other = torch.cat([(ids[:first] + 1) % vocabulary, ids[first:]])
    positions = torch.cat([torch.arange(first), torch.arange(second)])

    # Two rows, as some kinds of attention keep sequences apart in one only.
    def logits(tokens: Tensor, **arguments: Any) -> Tensor:
        output = model(input_ids=tokens.expand(2, -1).to(device), **arguments)
        return output.logits[:, -second:]

    try:
        with in_evaluation_mode(model):
            placed = {"position_ids": positions.expand(2, -1).to(device)}
            packed, beside_others = logits(ids, **placed), logits(other, **placed)
            alone = logits(ids[first:])
    except (RuntimeError, TypeError, ValueError) as error:
        raise LeakError(f"{name} does not run on packed sequences: {error}") from error
    # Not equal bits: with other tokens, experts get other numbers of rows, and round otherwise.
    tolerance = _PROBE_TOLERANCES.get(packed.dtype, _PROBE_TOLERANCE_16_BITS)
    allowed = tolerance * alone.float().abs().max().item()
    apart = (packed.float() - beside_others.float()).abs().max().item()
    if not apart <= allowed:
        raise LeakError(
            f"in {name} a sequence sees the one before it in its row: {apart:.3g} apart "
            f"(config.use_cache is {getattr(model.config, 'use_cache', None)})"
        )
    apart = (packed.float() - alone.float()).abs().max().item()
    if not apart <= allowed:
        raise LeakError(f"in {name} a packed sequence is not computed as alone: {apart:.3g} apart")
