"""The command `finetune`: a quantized base model, LoRA adapters, transformers' Trainer."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import qlora_native as qn
from qlora_native.cli import data, loading, models, packing, parallel, report, step
from qlora_native.cli.errors import InputError, Interrupted, allocating, require
from qlora_native.cli.options import FinetuneOptions
from qlora_native.cli.progress import LayerProgress, TrainingProgress, stderr, stdout
from qlora_native.cli.run_folder import check_output, how_to_resume, settings, start_output
from qlora_native.cli.trainer import (
    AdapterTrainer,
    StopOnSignal,
    delete_incomplete,
    load_state,
    save_adapter,
)
from qlora_native.hf.optimizers import OPTIMIZERS
from qlora_native.nn.sharding import shard_from_rank_0


def finetune(options: FinetuneOptions) -> None:
    """Checks everything that can be checked first, then loads, trains and reports.

    Raises:
        InputError: see the messages; the output folder is as it was.
        OutOfMemoryError, Interrupted: the output folder has whole checkpoints only.
    """
    _check_numbers(options)
    loading.check_quantization(options)
    options = dataclasses.replace(options, fsdp=options.fsdp or parallel.accelerate_asks_for_fsdp())
    with parallel.ranks(options.device, options.rank_timeout) as ranks:
        _finetune(options, ranks)


def _finetune(options: FinetuneOptions, ranks: parallel.Ranks) -> None:
    started = time.perf_counter()
    where = loading.placement(options)
    loading.check_model_path(options.model)
    if warning := models.adopt_quantization(options):
        stderr.print(warning, highlight=False, soft_wrap=True)
    options = dataclasses.replace(
        options, bf16=where.dtype == torch.bfloat16, fp16=where.dtype == torch.float16
    )
    resume_from = check_output(options)
    sharded = options.fsdp and ranks.size > 1
    step.check(options, where, ranks.size)
    parallel.check_run(ranks, sharded, options.optim, resume_from)
    data.check_files(options.data, "--data")
    data.check_files(options.eval_data or [], "--eval-data")
    loading.check_context(options.model, options.max_seq_length)
    arguments = _training_arguments(options, where)
    tokenizer = loading.load_tokenizer(options.model)
    transformers.set_seed(options.seed)
    with ranks.main_first():  # the others find what it has cached
        train, evaluation = _read(options, tokenizer)
    if warning := loading.unused_gpu(options, where):
        stderr.print(warning, highlight=False, soft_wrap=True)
    stderr.print(
        f"{len(train):,} training and {len(evaluation or ()):,} held-out sequences; loss on "
        f"{train.loss_on}; {where.device.type} in {str(where.dtype).removeprefix('torch.')}",
        highlight=False,
    )
    if train.dropped:
        stderr.print(
            f"{train.dropped:,} conversations have nothing to learn within --max-seq-length",
            highlight=False,
        )
    if where.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where.device)
    model, quantized, adapters = _build(options, where, ranks, sharded)
    kept = step.apply_checkpointing(model, options)
    if sharded:
        _shard(model, where)
    batches = packing.choose(options, train.rows, model, tokenizer)
    chosen = {
        "loss": step.apply_loss(model, options),
        "packing": batches.words,
        "checkpointing": kept,
        "offload": step.offload_in_words(options, where.device),
        "CUDA graph": step.graph_in_words(options, where.device),
        "optimizer": options.optim,
    }
    stderr.print(step.table(chosen))
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train=batches,
        evaluation=evaluation,
        collator=data.Collator(tokenizer),
        base_model=options.model,
        dtype=where.dtype,
        optimizer=options.optim,
        ranks=ranks,
        sharded=sharded,
        graphed=options.cuda_graph,
    )
    ranks.wait()  # all have looked at the folder as it was
    if ranks.is_main:
        if resume_from is None:
            start_output(options)
        delete_incomplete(options.output)
    losses = _train(trainer, options, resume_from, ranks)
    memory, memory_of = report.peak_memory(where.device)
    content = {
        "title": f"{Path(options.model).name}: {options.quant_type} base, LoRA r={options.lora_r}",
        **losses,
        "train_loss": [[e["step"], e["loss"]] for e in trainer.state.log_history if "loss" in e],
        "steps": trainer.state.global_step,
        "resumed_from": resume_from.name if resume_from else None,
        "peak_memory_bytes": memory,
        "peak_memory_of": memory_of,
        "trainable_parameters": adapters.trainable,
        "total_parameters": adapters.total,
        "bits_per_weight": quantized.bits_per_weight,
        "quantized_layers": quantized.count,
        "loss_on": train.loss_on,
        "sequences": {"train": len(train), "eval": len(evaluation or ())},
        "device": report.device_name(where.device),
        "dtype": str(where.dtype).removeprefix("torch."),
        "processes": ranks.size,
        "wall_seconds": time.perf_counter() - started,
        "versions": report.versions(),
        "step": chosen,
        "settings": settings(options),
    }
    save_adapter(model, options.output, options.model, ranks, sharded)
    if ranks.is_main:
        _save_results(options.output, tokenizer, content)
    stdout.print(report.table(content))
    stdout.print(
        f"Saved to {options.output}: adapter, tokenizer, report.json, loss.png", soft_wrap=True
    )


def _check_numbers(options: FinetuneOptions) -> None:
    for name in (
        "lora_r", "max_seq_length", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "logging_steps", "save_total_limit", "rank_timeout",
    ):  # fmt: skip
        value = getattr(options, name)
        require(value >= 1, f"--{name.replace('_', '-')} {value}: must be 1 or more")
    require(options.max_seq_length >= 2, "--max-seq-length 1: must be 2 or more")
    for name in ("eval_steps", "save_steps", "learning_rate", "warmup_steps", "weight_decay"):
        value = getattr(options, name)
        require(value >= 0, f"--{name.replace('_', '-')} {value}: must not be negative")
    require(
        0 <= options.lora_dropout < 1, f"--lora-dropout {options.lora_dropout}: must be in [0, 1)"
    )
    require(
        0 <= options.eval_fraction < 1,
        f"--eval-fraction {options.eval_fraction}: must be in [0, 1)",
    )
    require(
        options.max_steps > 0 or options.num_train_epochs > 0,
        f"--num-train-epochs {options.num_train_epochs}: must be positive",
    )


def _training_arguments(
    options: FinetuneOptions, where: loading.Placement
) -> transformers.TrainingArguments:
    evaluates = bool(options.eval_steps) and (options.eval_data or options.eval_fraction)
    same_name = (
        "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm",
        "num_train_epochs", "max_steps", "per_device_train_batch_size",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "seed",
        "logging_steps", "save_total_limit",
    )  # fmt: skip
    try:
        arguments = transformers.TrainingArguments(
            output_dir=str(options.output),
            **{name: getattr(options, name) for name in same_name},
            # Of our own optimizers the trainer is told apart.
            optim="adamw_torch" if options.optim in OPTIMIZERS else options.optim,
            use_cpu=where.device.type == "cpu",
            bf16=where.dtype == torch.bfloat16,
            fp16=where.dtype == torch.float16,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=options.eval_steps or None,
            save_strategy="steps" if options.save_steps else "no",
            save_steps=options.save_steps or 1,
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=where.device.type == "cuda",
            remove_unused_columns=False,
            # It waits for the device in every step, and hides a NaN from the log.
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
        )
    except (ValueError, ImportError) as error:
        ours = f" (or of ours: {', '.join(OPTIMIZERS)})" if options.optim in str(error) else ""
        raise InputError(" ".join(str(error).split()) + ours) from error
    if where.device.type == "cuda":
        # With several GPUs Trainer would replicate the model in threads, one per GPU.
        _ = arguments.n_gpu
        arguments._n_gpu = 1
    return arguments


def _read(options: FinetuneOptions, tokenizer: Any) -> tuple[data.Sequences, data.Sequences | None]:
    documents = data.read_documents(options.data, "--data")
    length = options.max_seq_length
    if options.eval_data:
        held_out = data.read_documents(options.eval_data, "--eval-data")
        return data.tokenize(documents, tokenizer, length), data.tokenize(
            held_out, tokenizer, length
        )
    if options.eval_fraction:
        return data.split(documents, tokenizer, length, options.eval_fraction, options.seed)
    return data.tokenize(documents, tokenizer, length), None


def _build(
    options: FinetuneOptions, where: loading.Placement, ranks: parallel.Ranks, sharded: bool
) -> tuple[Any, Any, Any]:
    # Of a model that is going to be split, rank 0 has all in host memory, the others nothing.
    first = dataclasses.replace(where, device=torch.device("cpu")) if sharded else where
    if sharded and not ranks.is_main:
        model = models.without_weights(options, where)
    else:
        with LayerProgress() as progress:
            model = models.load_quantized(options, first, progress)
    quantized = models.four_bit_layers(model)
    targets: Any = options.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    try:
        adapters = qn.add_lora(
            model,
            r=options.lora_r,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            target_modules=targets,
            use_rslora=options.use_rslora,
            adapter_dtype=torch.float32,
        )
    except ValueError as error:
        raise InputError(f"--target-modules {options.target_modules}: {error}") from error
    require(
        not adapters.unmatched,
        f"--target-modules: {', '.join(adapters.unmatched)} matches no linear layer of the model",
    )
    return model, quantized, adapters


def _shard(model: Any, where: loading.Placement) -> None:
    try:
        shard_from_rank_0(model, where.device)
    except ValueError as error:
        raise InputError(f"--fsdp: {error}") from error


def _train(
    trainer: AdapterTrainer,
    options: FinetuneOptions,
    resume_from: Path | None,
    ranks: parallel.Ranks,
) -> dict[str, Any]:
    """Trains, evaluates before and after, and gives the figures of both."""
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    show = TrainingProgress()
    stop = StopOnSignal(
        lambda: stderr.print("\nStopping after this step; once more stops at once."), ranks
    )
    trainer.add_callback(show)
    trainer.add_callback(stop)
    held_out = trainer.eval_dataset is not None
    batch, length = options.per_device_train_batch_size, options.max_seq_length
    remedy = (
        "reduce --per-device-train-batch-size or --max-seq-length, or use --checkpointing full or "
        "--offload-activations."
    )
    with allocating(f"evaluating and training with {batch} x {length} tokens per step:", remedy):
        try:
            before = trainer.evaluate()["eval_loss"] if held_out else None
            trainer.training_seconds(0)
            earlier = load_state(resume_from) if resume_from else None
            seconds = 0.0
            if earlier and earlier.global_step >= earlier.max_steps:
                trainer.restore(resume_from)
            else:
                with stop:
                    start = time.perf_counter()
                    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
                    seconds = trainer.training_seconds(time.perf_counter() - start)
            if stop.received is None:
                after = _last_loss(trainer) if held_out else None
        except KeyboardInterrupt:
            raise Interrupted(how_to_resume(options)) from None
        finally:
            show.close()
    if stop.received is not None:
        raise Interrupted(how_to_resume(options))
    curve = [[e["step"], e["eval_loss"]] for e in trainer.state.log_history if "eval_loss" in e]
    if held_out:
        curve = [[0, before], *[point for point in curve if point[0] > 0]]
    tokens = trainer.state.num_input_tokens_seen - (earlier.num_input_tokens_seen if earlier else 0)
    return {
        "eval_loss_before": before,
        "eval_loss_after": after,
        "eval_loss": curve,
        "tokens_per_second": tokens / seconds if seconds else None,
        "train_tokens": trainer.state.num_input_tokens_seen,
        "train_seconds": seconds,
    }


def _last_loss(trainer: AdapterTrainer) -> float:
    """The held-out loss of the trained model, which the last step may already have measured."""
    for entry in trainer.state.log_history:
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return entry["eval_loss"]
    return trainer.evaluate()["eval_loss"]


def _save_results(folder: Path, tokenizer: Any, content: dict[str, Any]) -> None:
    # The tokenizer writes several files by itself; they are moved in one by one, each whole.
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder) as temporary:
        tokenizer.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            path.replace(folder / path.name)
    report.plot(folder / "loss.png", content)
    report.write_json(folder / "report.json", content)
