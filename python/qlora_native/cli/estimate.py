"""The command `estimate`: what a fine-tuning run would hold in memory, by part."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from rich.table import Table

import qlora_native as qn
from qlora_native import footprint, memory
from qlora_native.cli import loading, models
from qlora_native.cli.errors import InputError, require
from qlora_native.cli.options import EstimateOptions
from qlora_native.cli.progress import stderr, stdout
from qlora_native.footprint import Footprint
from qlora_native.hf.meta import meta_model
from qlora_native.hf.optimizers import OPTIMIZERS
from qlora_native.training import UnsupportedModelError, restore_plain_loss, use_chunked_loss
from qlora_native.training.cross_entropy import chunk_rows

_DTYPES = ("float32", "bfloat16", "float16")


def estimate(options: EstimateOptions) -> bool | None:
    """Prints the parts; returns whether they fit, or None when nobody said into what.

    Raises:
        InputError: see the messages.
    """
    _check(options)
    if warning := models.adopt_quantization(options):
        stderr.print(warning, highlight=False, soft_wrap=True)
    model = _meta_model(options)
    optimizer = OPTIMIZERS[options.optim]([p for p in model.parameters() if p.requires_grad])
    try:
        saved = footprint.trace(model, options.per_device_train_batch_size, options.max_seq_length)
        note = None
    except NotImplementedError as error:
        saved, note = None, f"activations are not counted: {loading.first_line(error)}"
    variants = {"one GPU" if options.gpus == 1 else "each GPU, DDP": 1}
    if options.gpus > 1:
        variants["each GPU, FSDP2"] = options.gpus
    parts = {
        name: footprint.estimate(
            model,
            optimizer,
            saved,
            checkpointing=options.gradient_checkpointing,
            loss_share=_loss_share(model, options),
            staging=memory.DEVICE_BUDGET_BYTES if optimizer.is_paged else 0,
            shards=shards,
        )
        for name, shards in variants.items()
    }
    room = _room(options)
    fits = {
        name: None if room is None or saved is None else found.total <= room
        for name, found in parts.items()
    }
    trainable, total = qn.nn.count_parameters(model)
    if options.json:
        content = {
            "parameters": total,
            "trainable_parameters": trainable,
            "memory_bytes": room,
            "note": note,
            "estimates": {
                name: {**found.parts(), "host": found.host, "total": found.total,
                       "fits": fits[name]}
                for name, found in parts.items()
            },
        }  # fmt: skip
        print(json.dumps(content, indent=2))
    else:
        stdout.print(
            f"{options.model}: {total / 1e9:.2f} B parameters, {trainable / 1e6:.1f} M train",
            highlight=False,
            soft_wrap=True,
        )
        stdout.print(_table(parts, room, fits))
        if note:
            stdout.print(note, highlight=False, soft_wrap=True)
    return None if None in fits.values() else any(fits.values())


def _check(options: EstimateOptions) -> None:
    loading.check_quantization(options)
    for name in ("gpus", "max_seq_length", "per_device_train_batch_size", "lora_r"):
        value = getattr(options, name)
        require(value >= 1, f"--{name.replace('_', '-')} {value}: must be 1 or more")
    require(
        options.optim in OPTIMIZERS,
        f"--optim {options.optim}: unknown; there are {', '.join(OPTIMIZERS)}",
    )
    for name in ("dtype", "adapter_dtype"):
        value = getattr(options, name)
        option = name.replace("_", "-")
        require(value in _DTYPES, f"--{option} {value}: expected one of {', '.join(_DTYPES)}")
    require(
        options.gpu_memory is None or options.gpu_memory > 0,
        f"--gpu-memory {options.gpu_memory}: must be more than 0",
    )


def _meta_model(options: EstimateOptions) -> Any:
    config = loading.load_config(options.model)
    quantization = models.own_quantization(options)
    try:
        model = meta_model(config, quantization, getattr(torch, options.dtype))
    except ValueError as error:
        raise InputError(f"--model {options.model}: {loading.first_line(error)}") from error
    targets: Any = options.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    try:
        qn.add_lora(
            model,
            r=options.lora_r,
            target_modules=targets,
            adapter_dtype=getattr(torch, options.adapter_dtype),
        )
    except ValueError as error:
        raise InputError(f"--target-modules {options.target_modules}: {error}") from error
    return model.train()


def _loss_share(model: Any, options: EstimateOptions) -> float:
    """The share of the tokens whose logits `finetune` has at a time."""
    try:
        use_chunked_loss(model)
    except UnsupportedModelError:
        return 1.0
    restore_plain_loss(model)
    tokens = options.per_device_train_batch_size * options.max_seq_length
    return min(chunk_rows(tokens, model.config.vocab_size) / tokens, 1.0)


def _room(options: EstimateOptions) -> int | None:
    """Bytes of one GPU: as given, or of the one that is here."""
    if options.gpu_memory is not None:
        return int(options.gpu_memory * 1e9)
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return None


def _table(parts: dict[str, Footprint], room: int | None, fits: dict[str, bool | None]) -> Table:
    table = Table()
    table.add_column("GB", style="cyan")
    for name in parts:
        table.add_column(name, justify="right")
    for part in dataclasses.fields(Footprint):
        if part.name != "host":
            table.add_row(part.name, *(_gb(getattr(found, part.name)) for found in parts.values()))
    table.add_section()
    table.add_row("total", *(_gb(found.total) for found in parts.values()))
    if any(found.host for found in parts.values()):
        table.add_row("in host memory", *(_gb(found.host) for found in parts.values()))
    if room is not None:
        answers = {True: "[green]yes", False: "[red]no", None: "-"}
        table.add_row(f"fits {room / 1e9:.1f}", *(answers[fits[name]] for name in parts))
    return table


def _gb(size: int) -> str:
    return f"{size / 1e9:,.3f}"
