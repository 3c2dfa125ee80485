"""A small Llama, trained on the Python files that come with this Python, and kept for next time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import sysconfig
import time
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
# Tests and tables teach little English; the topics are what the demo fine-tunes on.
LEFT_OUT = {
    "__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data",
    "site-packages", "test", "tests",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BaseSettings:
    """Everything that the trained model depends on.

    `steps` takes two cores about three minutes. A machine too slow or too busy for that stops after
    `budget_seconds`, with the learning rate at the end of its schedule all the same.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    sequence: int = 256
    batch: int = 8
    steps: int = 280
    learning_rate: float = 4e-3
    seed: int = 0
    budget_seconds: float = 330
    max_files: int | None = None

    def key(self) -> str:
        """A name for the cache: the settings and the Python whose files are the text."""
        content = json.dumps([dataclasses.asdict(self), sys.version_info[:3]])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def standard_library_text(max_files: int | None = None) -> list[str]:
    """The sources of the standard library, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)
    )
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files[:max_files]]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_base_model(folder: Path, settings: BaseSettings) -> tuple[Path, dict]:
    """Trains the model, or finds it in `folder`; returns its path and how the training went."""
    target = folder / f"base-{settings.key()}"
    if not (target / "training.json").is_file():
        staging = folder / f".{target.name}-incomplete"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _train(staging, settings)
        staging.replace(target)
    return target, json.loads((target / "training.json").read_text())


def _train(folder: Path, settings: BaseSettings) -> None:
    start = time.perf_counter()
    torch.manual_seed(settings.seed)
    texts = standard_library_text(settings.max_files)
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    ids = [i for row in tokenizer(texts)["input_ids"] for i in [*row, tokenizer.eos_token_id]]
    chunks = torch.tensor(ids[: len(ids) // settings.sequence * settings.sequence])
    chunks = chunks.view(-1, settings.sequence)
    chunks = chunks[torch.randperm(len(chunks))]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            max_position_embeddings=2 * settings.sequence,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    losses = _optimize(model, chunks, settings)
    model.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    last = losses[-min(20, len(losses)) :]
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_loss": losses[0],
        "last_loss": sum(last) / len(last),
        "steps": len(losses),
        "tokens": len(losses) * settings.batch * settings.sequence,
        "seconds": time.perf_counter() - start,
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n")


def _optimize(model: LlamaForCausalLM, chunks: Tensor, settings: BaseSettings) -> list[float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    # Muon gets a model of this size in these few steps a whole nat further than AdamW alone.
    optimizers = [
        torch.optim.Muon(matrices, lr=5 * settings.learning_rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.95)),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    losses: list[float] = []
    start = time.perf_counter()
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("Training the base model", total=1.0)
        while (done := _progress(len(losses), start, settings)) < 1:
            warm_up, decay = min(1.0, (len(losses) + 1) / 20), min(1.0, (1 - done) / 0.6)
            first = len(losses) * settings.batch % (len(chunks) - settings.batch + 1)
            batch = chunks[first : first + settings.batch].to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * warm_up * decay
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            progress.update(task, completed=done, description=f"Training, loss {losses[-1]:.3f}")
    return losses


def _progress(steps: int, start: float, settings: BaseSettings) -> float:
    elapsed = time.perf_counter() - start
    return max(steps / settings.steps, elapsed / settings.budget_seconds if steps else 0.0)
