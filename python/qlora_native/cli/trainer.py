"""transformers' Trainer for a model of which only the adapter trains.

A checkpoint holds the adapter, the optimizer, the scheduler, the random state and the trainer's
state, never the base model. It is built under another name and renamed, so a folder that is called
checkpoint-<step> is whole, whenever the process is killed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader
from transformers.trainer_callback import TrainerCallback

import qlora_native as qn
from qlora_native import optim
from qlora_native.cli.data import Collator, Sequences
from qlora_native.cli.loss import mean_token_loss
from qlora_native.cli.packing import LEARNED, TOKENS, Batches
from qlora_native.cli.parallel import OPTIMIZER_SHARDS, Ranks
from qlora_native.hf.optimizers import OPTIMIZERS, optimizer_cls_and_kwargs
from qlora_native.training import GraphedStep, uses_chunked_loss

SCHEDULER_NAME = "scheduler.pt"
_STAGING = ".checkpoint-incomplete"


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _step_of(p))]
    return [path for _, path in sorted(found)]


def delete_incomplete(folder: Path) -> None:
    """Deletes what a killed process left of checkpoints that it was building or deleting."""
    for path in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_state(checkpoint: Path) -> transformers.TrainerState:
    """What Trainer knew when the checkpoint was made."""
    return transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _step_of(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


class AdapterTrainer(transformers.Trainer):
    """Saves and loads the adapter where Trainer would the model, and renames whole checkpoints."""

    def __init__(
        self,
        model: torch.nn.Module,
        args: transformers.TrainingArguments,
        train: Batches,
        evaluation: Sequences | None,
        collator: Collator,
        base_model: str,
        dtype: torch.dtype,
        optimizer: str,
        ranks: Ranks,
        sharded: bool = False,
        graphed: bool = False,
    ) -> None:
        """Takes the arguments of Trainer that a fine-tuning run has.

        Args:
            collator: of the batches for evaluation.
            ranks: the processes that train together.
            sharded: the model is split over them.
            graphed: forward and backward pass are a CUDA graph; all batches are of one shape.
        """
        args.dataloader_drop_last = train.drop_last
        super().__init__(
            model=model,
            args=args,
            train_dataset=train.rows,
            eval_dataset=evaluation.rows if evaluation else None,
            data_collator=train.collator,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(optimizer, args)
            if optimizer in OPTIMIZERS
            else None,
        )
        self._base_model = base_model
        self._dtype = dtype
        self._ranks = ranks
        self._sharded = sharded
        self._evaluation_collator = collator
        # How many are learned differs from batch to batch, which a graph could not follow.
        takes_learned = uses_chunked_loss(model) and not graphed
        self._not_for_the_model = {TOKENS} if takes_learned else {TOKENS, LEARNED}
        self._graphed = GraphedStep(self._step, self._trained()) if graphed else None
        if sharded:
            # It is in its places and reduces its gradients: nothing is to be put around it.
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, **_: prepare(
                model, device_placement=False, evaluation_mode=True
            )
        self._staging: Path | None = None
        self._paused = 0.0

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward pass; adds to the gradients."""
        batch = {n: value for n, value in inputs.items() if n not in self._not_for_the_model}
        if self._graphed is None:
            return super().training_step(model, batch, num_items_in_batch)
        return self._graphed({**batch, "num_items_in_batch": num_items_in_batch})

    def _step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = dict(batch)
        items = inputs.pop("num_items_in_batch")
        return super().training_step(self.model_wrapped, inputs, items)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        (tokens,) = self._ranks.sum([inputs[TOKENS]])
        self.state.num_input_tokens_seen += int(tokens)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The loss per token, weighted by token (Trainer's own weighs by batch)."""
        start = time.perf_counter()
        # A plain one: Trainer's would repeat sequences to give every rank as many.
        loader = DataLoader(
            eval_dataset or self.eval_dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self._evaluation_collator,
        )
        loss, tokens = mean_token_loss(self.model, loader, self._dtype, self._ranks)
        seconds = time.perf_counter() - start
        self._paused += seconds
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_tokens": tokens,
            f"{metric_key_prefix}_runtime": round(seconds, 3),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def training_seconds(self, total: float) -> float:
        """`total` less the time for evaluation and checkpoints since the last call."""
        paused, self._paused = self._paused, 0.0
        return total - paused

    def restore(self, checkpoint: Path) -> None:
        """Takes the adapter and the history of a checkpoint without training on.

        Trainer would train one step more than there are when it resumes a finished run.
        """
        self._load_from_checkpoint(str(checkpoint))
        self.state = load_state(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, of which every rank of a sharded model has a part."""
        target = Path(output_dir or self.args.output_dir)
        save_adapter(self.model, target, self._base_model, self._ranks, self._sharded)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optim.save_distributed(self.optimizer.optimizer, Path(output_dir) / OPTIMIZER_SHARDS)
        if self._ranks.is_main:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / OPTIMIZER_SHARDS).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optim.load_distributed(self.optimizer.optimizer, Path(checkpoint) / OPTIMIZER_SHARDS)
        state = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(state)
        # The shards have no hyperparameters, and the scheduler sets them with its next step only.
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        start = time.perf_counter()
        folder = Path(self.args.output_dir)
        final = folder / f"checkpoint-{self.state.global_step}"
        if final.exists():
            # A step has one state; it was saved when the step ended.
            return
        self._staging = folder / _STAGING
        with self._ranks.main_first():
            if self._ranks.is_main:
                shutil.rmtree(self._staging, ignore_errors=True)
                (self._staging / final.name).mkdir(parents=True)
        try:
            super()._save_checkpoint(model, trial)
            self._ranks.wait()
            if self._ranks.is_main:
                _sync_tree(self._staging / final.name)
                (self._staging / final.name).replace(final)
        finally:
            if self._ranks.is_main:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self._ranks.is_main:
            self._delete_old(folder)
        self._ranks.wait()
        self._paused += time.perf_counter() - start

    def _delete_old(self, folder: Path) -> None:
        limit = self.args.save_total_limit
        for path in checkpoints(folder)[:-limit] if limit else []:
            # Renamed first: a folder that is half deleted must not look like a checkpoint.
            doomed = folder / f"{_STAGING}-{path.name}"
            # A process that was killed here may have left one, and only an empty folder gives way.
            shutil.rmtree(doomed, ignore_errors=True)
            path.replace(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        # In place, so that the optimizer goes on holding the same parameters.
        qn.load_adapter(model or self.model, resume_from_checkpoint, trainable=True)


def save_adapter(
    model: torch.nn.Module, folder: Path, base_model: str, ranks: Ranks, sharded: bool
) -> None:
    """Writes the adapter on rank 0, with the parts of all ranks if the model is split over them."""
    arguments = {"base_model_name_or_path": base_model, "overwrite": True}
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        qn.save_adapter(model, folder, **arguments)
    elif sharded:
        # Every rank has to send its parts, and so comes to have all.
        with tempfile.TemporaryDirectory() as elsewhere:
            qn.save_adapter(model, elsewhere, **arguments)


def _sync_tree(folder: Path) -> None:
    """Forces the files to the disk, so that the rename cannot get there before them."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM, ends training after the step, with a checkpoint; a second one kills.

    Use as a context manager around `Trainer.train`.
    """

    def __init__(self, announce: Any, ranks: Ranks) -> None:
        self.received: int | None = None
        self._announce = announce
        self._owes_announcement = False
        self._ranks = ranks
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        self.received = number
        self._restore()
        try:
            self._announce()
        except RuntimeError:  # it came while stderr was being written, which nobody can enter twice
            self._owes_announcement = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Asks for a checkpoint and the end of training when a signal has come to any rank."""
        if self._owes_announcement:
            self._owes_announcement = False
            self._announce()
        if self._ranks.any(self.received is not None):
            self.received = self.received or signal.SIGTERM
            control.should_save = True
            control.should_training_stop = True
        return control
