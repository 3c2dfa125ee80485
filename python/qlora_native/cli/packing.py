"""How sequences become batches for training: padded, in one row, or in rows of one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from qlora_native.cli.data import Collator
from qlora_native.cli.errors import require
from qlora_native.cli.options import FinetuneOptions
from qlora_native.training import (
    LeakError,
    best_fit,
    check_isolation,
    learned_tokens,
    packed_row,
    padding_share,
)

_WORTH_IT = 0.05
"""The share of padding above which sequences are put together: their attention costs a mask."""

_LONGEST_FLAT_ROW = 8192
"""Tokens. The mask of a row is its square, and so is the work of attention."""


TOKENS = "num_tokens"
"""What a batch for training has beside the arguments of a model."""

LEARNED = "learned_tokens"
"""What it has for a model with the loss by chunks."""


@dataclasses.dataclass(frozen=True)
class Batches:
    """What Trainer takes batches from."""

    rows: Any
    """A map-style dataset."""
    collator: Callable[[list[Any]], dict[str, Any]]
    """The arguments of a model, `TOKENS` and `LEARNED`."""
    words: str
    drop_last: bool = False


class PackedRows:
    """A dataset of rows, each a list of sequences."""

    def __init__(self, sequences: Dataset, rows: Sequence[Sequence[int]]) -> None:
        self._sequences = sequences
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[dict[str, list[int]]]:
        return [self._sequences[i] for i in self._rows[index]]


class CountingCollator:
    """Batches of another collator, with what is counted in them here, on the host.

    No step has to ask the device then: how many tokens are not padding, which of them are learned.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Tensor]]) -> None:
        self._collator = collator

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Adds an int under `TOKENS`, and int64 positions under `LEARNED`."""
        sequences = [s for row in rows for s in (row if isinstance(row, list) else [row])]
        tokens = sum(len(sequence["input_ids"]) for sequence in sequences)
        batch = self._collator(rows)
        return {**batch, TOKENS: tokens, LEARNED: learned_tokens(batch["labels"])}


class RowCollator:
    """Batches of packed rows: `input_ids`, `labels` and `position_ids`, int64 [batch, length]."""

    def __init__(self, pad: int, length: int) -> None:
        self._pad, self._length = pad, length

    def __call__(self, rows: list[list[dict[str, list[int]]]]) -> dict[str, Tensor]:
        """Each row filled up; no mask, as positions say what belongs together."""
        packed = [packed_row(row, self._pad, self._length) for row in rows]
        return {name: torch.cat([row[name] for row in packed]) for name in packed[0]}


class FixedCollator:
    """Batches of one length without a mask: what pads a sequence comes after all that learns."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """As `Collator` with a length, less the mask, which causal attention does not need."""
        batch = self._collator(rows)
        del batch["attention_mask"]
        return batch


def choose(
    options: FinetuneOptions, sequences: Dataset, model: nn.Module, tokenizer: Any
) -> Batches:
    """The batches by --packing, their tokens counted; raises as `_choose` does."""
    batches = _choose(options, sequences, model, tokenizer)
    return dataclasses.replace(batches, collator=CountingCollator(batches.collator))


def _choose(
    options: FinetuneOptions, sequences: Dataset, model: nn.Module, tokenizer: Any
) -> Batches:
    """What --packing says; "auto" is what saves tokens and changes no number.

    Raises:
        InputError: the model does not keep packed sequences apart, and was asked to; or --packing
            rows leaves less than a batch.
    """
    lengths = [len(ids) for part in sequences.iter(1000) for ids in part["input_ids"]]
    size, capacity = options.per_device_train_batch_size, options.max_seq_length
    share = padding_share(lengths, size, options.seed)
    mode, why = options.packing, ""
    if mode == "auto":
        if options.cuda_graph:
            share = 1 - sum(lengths) / (capacity * len(lengths))
        mode, why = _automatic(options, share, size * max(lengths))
    if mode != "none":
        try:
            check_isolation(model)
        except LeakError as error:
            require(options.packing == "auto", f"--packing {options.packing}: {error}")
            mode, why = "none", f" ({error})"
    collator = Collator(tokenizer)
    if mode == "flat":
        return Batches(
            sequences, packed_row, f"flat: a batch is one row; {share:.0%} would be padding"
        )
    if mode == "rows":
        rows = best_fit(lengths, capacity)
        filled = sum(lengths) / (len(rows) * capacity)
        require(
            not options.cuda_graph or len(rows) >= size,
            f"--cuda-graph: the data fills {len(rows)} rows, less than "
            f"--per-device-train-batch-size {size}",
        )
        words = (
            f"rows: {len(lengths):,} sequences in {len(rows):,} rows of {capacity:,} tokens, "
            f"{filled:.0%} full; a batch is {size} rows"
        )
        packed = PackedRows(sequences, rows)
        row_collator = RowCollator(collator.pad, capacity)
        return Batches(packed, row_collator, words, drop_last=options.cuda_graph)
    words = f"none, {share:.0%} of the tokens are padding{why}"
    if not options.cuda_graph:
        return Batches(sequences, collator, words)
    require(
        len(lengths) >= size,
        f"--cuda-graph: there are {len(lengths)} sequences, less than "
        f"--per-device-train-batch-size {size}",
    )
    fixed = FixedCollator(Collator(tokenizer, length=capacity))
    return Batches(sequences, fixed, words, drop_last=True)


def _automatic(options: FinetuneOptions, share: float, longest: int) -> tuple[str, str]:
    if share < _WORTH_IT:
        return "none", ""
    if options.cuda_graph:
        return "rows", ""
    if longest > _LONGEST_FLAT_ROW:
        return "none", f" (a flat batch could have {longest:,} tokens; --packing rows has none)"
    return "flat", ""
