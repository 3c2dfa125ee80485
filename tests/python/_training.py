"""Runs of transformers' Trainer over tiny 4-bit models, for the tests of it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def texts(count: int = 24, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Sequences with something to learn: each token is the one before it plus one or two."""
    generator = torch.Generator().manual_seed(7)
    steps = torch.randint(1, 3, (count, length), generator=generator)
    ids = steps.cumsum(1) % 64
    return [{"input_ids": row, "labels": row} for row in ids]


class Losses(TrainerCallback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **others):
        if "loss" in logs:
            self.values.append(logs["loss"])


def arguments(folder: Path, **options: object) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 10,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
    }
    return TrainingArguments(**(settings | options))


def trainer(model: nn.Module, args: TrainingArguments, **others: object) -> Trainer:
    return Trainer(model=model, args=args, train_dataset=texts(), callbacks=[Losses()], **others)


def losses(run: Trainer) -> list[float]:
    return next(c for c in run.callback_handler.callbacks if isinstance(c, Losses)).values


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy({n: p for n, p in model.state_dict().items() if "lora_" in n})
