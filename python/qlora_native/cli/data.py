"""From files to token sequences with labels.

Text becomes chunks of `max_seq_length` tokens, documents one after another with the
end-of-sequence token between them; no token is padding. A conversation becomes one sequence. Its
labels cover the assistant's turns where the chat template is such that the text up to a turn is a
prefix of the whole; otherwise they cover all of it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset

from qlora_native.cli.errors import InputError, require
from qlora_native.training.packing import IGNORED

# Used when the tokenizer brings no chat template of its own.
PLAIN_CHAT_TEMPLATE = (
    "{% for m in messages %}### {{ m['role'] | capitalize }}:\n{{ m['content'] }}"
    "{{ eos_token or '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)

_READERS = {
    ".txt": lambda path: Dataset.from_text(path, sample_by="document", keep_linebreaks=True),
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".parquet": Dataset.from_parquet,
}


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Token sequences and what their labels cover, in words."""

    rows: Dataset
    loss_on: str
    dropped: int

    def __len__(self) -> int:
        return len(self.rows)


def check_files(paths: list[Path], what: str) -> None:
    """Raises InputError unless every path is a non-empty file of a known format."""
    for path in paths:
        require(path.exists(), f"{what} {path}: no such file")
        require(path.is_file(), f"{what} {path}: not a file")
        require(
            path.suffix.lower() in _READERS,
            f"{what} {path}: unknown extension `{path.suffix}`; expected {', '.join(_READERS)}",
        )
        require(path.stat().st_size > 0, f"{what} {path}: the file is empty")


def read_documents(paths: list[Path], what: str) -> Dataset:
    """One row per document, with the single column `text` or `messages`.

    Raises:
        InputError: a file cannot be parsed, has neither column, or the files mix both.
    """
    check_files(paths, what)
    parts, column = [], None
    for path in paths:
        try:
            part = _READERS[path.suffix.lower()](str(path))
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            cause = error.__cause__ or error
            raise InputError(
                f"{what} {path}: cannot be read as {path.suffix}: {type(cause).__name__}: {cause}"
            ) from error
        found = [name for name in ("messages", "text") if name in part.column_names]
        require(
            bool(found),
            f"{what} {path}: needs a column `text` or `messages`, has "
            f"{', '.join(part.column_names) or 'none'}",
        )
        require(
            column in (None, found[0]),
            f"{what} {path}: has `{found[0]}` where the files before it have `{column}`",
        )
        column = found[0]
        kind = part.features[column]
        is_text = isinstance(kind, datasets.Value) and "string" in kind.dtype
        require(
            is_text or column == "messages",
            f"{what} {path}: `text` must be strings, is {getattr(kind, 'dtype', kind)}",
        )
        parts.append(part.select_columns([column]))
    rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    rows = rows.filter(lambda row: _has_content(row[column]))
    require(len(rows) > 0, f"{what} {', '.join(map(str, paths))}: there is no text in it")
    return rows


def _has_content(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def tokenize(documents: Dataset, tokenizer: Any, max_seq_length: int) -> Sequences:
    """Token sequences of at most `max_seq_length`, with `input_ids` and `labels`.

    Raises:
        InputError: nothing is left to learn from.
    """
    if "text" in documents.column_names:
        sequences = _pack_text(documents, tokenizer, max_seq_length)
    else:
        sequences = _render_conversations(documents, tokenizer, max_seq_length)
    require(len(sequences) > 0, "the data has no sequence of two tokens or more to learn from")
    return sequences


def _pack_text(documents: Dataset, tokenizer: Any, max_seq_length: int) -> Sequences:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        stream: list[int] = []
        for ids in tokenizer(batch["text"], verbose=False)["input_ids"]:
            stream += ids if ids[-len(end) :] == end else ids + end
        chunks = [stream[i : i + max_seq_length] for i in range(0, len(stream), max_seq_length)]
        # A lone token has nothing to predict.
        chunks = [chunk for chunk in chunks if len(chunk) > 1]
        return {"input_ids": chunks, "labels": chunks}

    rows = documents.map(pack, batched=True, remove_columns=documents.column_names)
    return Sequences(rows, "all tokens", 0)


def _render_conversations(documents: Dataset, tokenizer: Any, max_seq_length: int) -> Sequences:
    template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    source = "the tokenizer's chat template" if tokenizer.chat_template else "the plain chat format"

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        # Arrow gives every message every key that any message has.
        messages = [{k: v for k, v in m.items() if v is not None} for m in row["messages"]]
        text, spans = _assistant_spans(messages, tokenizer, template)
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
        )
        ids = encoded["input_ids"][:max_seq_length]
        masked = spans is not None and tokenizer.is_fast
        labels = ids
        if masked:
            labels = [
                token if any(a < end and start < b for a, b in spans) else IGNORED
                for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=False)
            ]
        return {"input_ids": ids, "labels": labels, "masked": masked}

    try:
        rows = documents.map(encode, remove_columns=documents.column_names)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"`messages` must be lists of {{role, content}}: {type(error).__name__}: {error}"
        ) from error
    # Trainer shifts labels by one, so the first of them is never predicted.
    kept = rows.filter(lambda row: any(label != IGNORED for label in row["labels"][1:]))
    masked = sum(kept["masked"])
    loss_on = {len(kept): "the assistant's turns", 0: "all tokens"}.get(
        masked, f"the assistant's turns in {masked} of {len(kept)} conversations, else all tokens"
    )
    return Sequences(kept.remove_columns("masked"), f"{loss_on} ({source})", len(rows) - len(kept))


def _assistant_spans(
    messages: list[dict[str, Any]], tokenizer: Any, template: str
) -> tuple[str, list[tuple[int, int]] | None]:
    """The rendered conversation, and where in it the assistant speaks (None: cannot be told)."""

    def render(upto: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:upto], chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    full = render(len(messages), False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, True), render(i + 1, False)
        if not (full.startswith(before) and full.startswith(after)):
            return full, None
        spans.append((len(before), len(after)))
    return full, spans or None


def split(
    documents: Dataset, tokenizer: Any, max_seq_length: int, eval_fraction: float, seed: int
) -> tuple[Sequences, Sequences]:
    """Training and held-out sequences: by document where there are enough, else by sequence.

    Raises:
        InputError: there is too little data to hold any of it out.
    """
    held_out = round(len(documents) * eval_fraction)
    if 0 < held_out < len(documents):
        parts = documents.train_test_split(test_size=held_out, seed=seed)
        return (
            tokenize(parts["train"], tokenizer, max_seq_length),
            tokenize(parts["test"], tokenizer, max_seq_length),
        )
    whole = tokenize(documents, tokenizer, max_seq_length)
    held_out = max(1, round(len(whole) * eval_fraction))
    require(
        held_out < len(whole),
        f"the data gives {len(whole)} sequence of {max_seq_length} tokens, too little to hold out "
        "any; give --eval-data, a shorter --max-seq-length, or --eval-fraction 0",
    )
    # The end of the text, not a random choice: neighbouring chunks share their document.
    cut = len(whole) - held_out
    return (
        dataclasses.replace(whole, rows=whole.rows.select(range(cut))),
        dataclasses.replace(whole, rows=whole.rows.select(range(cut, len(whole)))),
    )


class Collator:
    """Batches of `input_ids`, `attention_mask` and `labels`, int64 [batch, longest or `length`]."""

    def __init__(self, tokenizer: Any, length: int | None = None) -> None:
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(token for token in candidates if token is not None)
        self._length = length

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Pads on the right; padding is neither attended to nor learned."""
        longest = self._length or max(len(row["input_ids"]) for row in rows)

        def batch(values: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([v + [fill] * (longest - len(v)) for v in values])

        return {
            "input_ids": batch([row["input_ids"] for row in rows], self.pad),
            "attention_mask": batch([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": batch([row["labels"] for row in rows], IGNORED),
        }
