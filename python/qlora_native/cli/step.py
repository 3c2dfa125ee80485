"""How a training step runs: its loss, what it keeps, what of it is recorded, in words as well."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from torch import nn

from qlora_native.cli.errors import InputError, require
from qlora_native.cli.loading import Placement
from qlora_native.cli.options import FinetuneOptions
from qlora_native.hf.liger import use_liger_kernels
from qlora_native.training import (
    UnsupportedModelError,
    offload_activations,
    restore_plain_loss,
    use_checkpointing,
    use_chunked_loss,
)
from qlora_native.training.checkpointing import MODES

LOSSES = ("auto", "chunked", "liger", "plain")
PACKINGS = ("auto", "none", "flat", "rows")


def check(options: FinetuneOptions, where: Placement, processes: int) -> None:
    """Refuses what cannot be, before anything is read.

    Raises:
        InputError: see the messages.
    """
    for name, known in (("loss", LOSSES), ("packing", PACKINGS)):
        value = getattr(options, name)
        require(value in known, f"--{name} {value}: expected one of {', '.join(known)}")
    mode, _ = checkpointing(options)
    require(
        mode != "none" or not options.offload_activations,
        "--offload-activations: with --checkpointing none no layer runs again from its input; "
        "full, selective or a number goes with it",
    )
    if not options.cuda_graph:
        return
    require(
        where.device.type == "cuda",
        f"--cuda-graph: the run is on the {where.device.type}; a CUDA graph needs a GPU",
    )
    require(processes == 1, f"--cuda-graph: for one process, and there are {processes}")
    require(
        not options.offload_activations,
        "--cuda-graph --offload-activations: what moves to the host cannot be recorded",
    )
    require(
        options.packing != "flat",
        "--cuda-graph --packing flat: a graph has one shape, and every flat batch has its own; "
        "--packing rows fills rows of --max-seq-length",
    )


def checkpointing(options: FinetuneOptions) -> tuple[str, int]:
    """What --checkpointing says: the mode, and of how many layers one is checkpointed.

    Raises:
        InputError: it is neither a mode nor a number.
    """
    asked = options.checkpointing
    if asked == "auto":
        return ("full" if options.gradient_checkpointing else "none"), 1
    if asked.isdecimal() and int(asked) > 0:
        return "full", int(asked)
    require(
        asked in MODES,
        f"--checkpointing {asked}: expected auto, {', '.join(MODES)}, or a number N for every "
        "N-th layer",
    )
    return asked, 1


def apply_checkpointing(model: nn.Module, options: FinetuneOptions) -> str:
    """Sets it up; returns it in words.

    Raises:
        InputError: the model cannot, or dropout would not drop the same in a graph.
    """
    mode, every = checkpointing(options)
    if options.cuda_graph and mode != "none":
        found = [f"--lora-dropout {options.lora_dropout}"] if options.lora_dropout else []
        found += [f"its {name} {value}" for name, value in _dropouts(model.config)]
        require(
            not found,
            f"--cuda-graph: with {', '.join(found)} a layer that runs again would drop other "
            "elements; use --checkpointing none",
        )
    offload = offload_activations() if options.offload_activations else None
    try:
        use_checkpointing(
            model,
            mode,
            every=every,
            preserve_rng_state=not options.cuda_graph,
            offload=offload,
        )
    except NotImplementedError as error:
        raise InputError(f"--checkpointing {options.checkpointing}: {error}") from error
    # Not only where layers run again: a model that fills a cache does not read packed rows as such.
    model.config.use_cache = False
    layers = "every layer" if every == 1 else f"one layer in {every}"
    return {
        "none": "none: activations are kept",
        "full": f"{layers} runs again in the backward pass",
        "selective": "attention and narrow products are kept, the rest of a layer runs again",
    }[mode]


def _dropouts(config: Any) -> list[tuple[str, float]]:
    values = config.to_dict().items()
    return [(n, v) for n, v in values if ("dropout" in n or n.endswith("pdrop")) and v]


def apply_loss(model: nn.Module, options: FinetuneOptions) -> str:
    """Sets up the loss and liger-kernel's layers; returns it in words.

    Raises:
        InputError: what was asked for does not apply to the model.
    """
    with_liger = options.liger or options.loss == "liger"
    layers = "; liger-kernel's norms, rotary embedding and gates" if with_liger else ""
    if with_liger:
        try:
            use_liger_kernels(model, loss=options.loss == "liger")
        except UnsupportedModelError as error:
            asked = "--loss liger" if options.loss == "liger" else "--liger"
            raise InputError(f"{asked}: {error}") from error
    if options.loss == "liger":
        return f"liger-kernel's{layers}"
    if options.loss == "plain":
        restore_plain_loss(model)
        return f"transformers' own, over all logits{layers}"
    try:
        use_chunked_loss(model, in_evaluation=True)
    except UnsupportedModelError as error:
        require(options.loss == "auto", f"--loss chunked: {error}")
        return f"transformers' own, over all logits ({error}){layers}"
    return f"by chunks of tokens, whose logits exist one after another{layers}"


def table(rows: dict[str, str]) -> Table:
    """What the run has chosen, a line each."""
    result = Table(
        title="Training step", show_header=False, title_style="bold", title_justify="left"
    )
    result.add_column(style="cyan", no_wrap=True)
    result.add_column()
    for name, words in rows.items():
        result.add_row(name, words)
    return result


def offload_in_words(options: FinetuneOptions, device: torch.device) -> str:
    """Whether the inputs of layers that run again wait in host memory."""
    if not options.offload_activations:
        return "off"
    if device.type == "cpu":
        return "off (on the CPU they are in host memory)"
    return "inputs of layers that run again are in pinned host memory until then"


def graph_in_words(options: FinetuneOptions, device: torch.device) -> str:
    """Whether forward and backward pass are recorded."""
    if options.cuda_graph:
        return "forward and backward pass, recorded once"
    return "off" if device.type == "cuda" else "off (there is none on the CPU)"
