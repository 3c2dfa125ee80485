"""What the tests of the command line share: a tiny model with a tokenizer, data, a runner."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

datasets = pytest.importorskip("datasets")

# The data of tests does not belong into the user's cache: not from this process, nor from others.
CACHE = tempfile.mkdtemp(prefix="qlora-native-test-datasets-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = CACHE
datasets.config.HF_DATASETS_CACHE = Path(CACHE)

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards brew quartz potions"
WORDS = TEXT.split()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def run_cli(*arguments: object) -> Outcome:
    """Runs the command in this process."""
    from typer.testing import CliRunner

    from qlora_native.cli import app

    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Text with a rule to learn: each word is followed by one of two others."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        at, words = int(torch.randint(len(WORDS), (), generator=generator)), []
        for step in torch.randint(1, 3, (24,), generator=generator).tolist():
            words.append(WORDS[at % len(WORDS)])
            at += step
        rows.append(" ".join(words) + ".")
    return rows


def make_model(folder: Path) -> Path:
    """A random Llama of two layers whose head is not tied, with a trained tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(50), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def finetune_arguments(model: Path, data: Path, output: Path, **changes: object) -> list[object]:
    """A short run in fp32 that logs every step; `changes` are option names with underscores."""
    options: dict[str, object] = {
        "model": model,
        "data": data,
        "output": output,
        "device": "cpu",
        "max_seq_length": 32,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-3,
        "max_steps": 6,
        "logging_steps": 1,
        "lora_dropout": 0.1,
        "lora_r": 4,
        "seed": 7,
    } | changes
    arguments: list[object] = ["finetune", "--no-bf16", "--no-gradient-checkpointing"]
    for name, value in options.items():
        if value is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, value]
    return arguments
