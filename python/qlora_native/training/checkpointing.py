"""Which activations a training step keeps, and which it computes again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qlora_native.nn.adapters import prepare_for_training
from qlora_native.nn.sharding import is_checkpointed_layer
from qlora_native.training.offloading import ActivationOffload

MODES = ("none", "full", "selective")

_POLICIES = (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_SAVE)


def use_checkpointing(
    model: nn.Module,
    mode: str = "full",
    *,
    every: int = 1,
    preserve_rng_state: bool = True,
    offload: ActivationOffload | None = None,
) -> None:
    """Sets up a transformers model for training with that much of activation checkpointing.

    - "none": everything is kept.
    - "full": of a layer its input is kept, and all of it runs again in the backward pass.
    - "selective": besides, the results of attention and of products whose output is not wider than
      their input are kept: of a layer of Llama gate, up and what is elementwise run again, half of
      the work, and about a quarter of the activations is kept.

    Calling it again with another mode takes the place of the first.

    Args:
        every: "full" and "selective" in every so many layers; the others keep everything.
        preserve_rng_state: whether dropout drops the same when a layer runs again. Without dropout
            it can be False, as a step in a CUDA graph needs it.
        offload: takes the inputs of the layers that run again to the host until then; nothing else.
            It is in use until another call, or whoever else sets the model's checkpointing up.

    Raises:
        ValueError: there is no such mode, `every` is less than 1, or `offload` comes with "none".
        NotImplementedError: the model has no layers that transformers would run again.
        RuntimeError: adapters are merged, so there is nothing to train.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    if every < 1:
        raise ValueError(f"every is {every}, expected 1 or more")
    if mode == "none" and offload is not None:
        raise ValueError(
            f"offload is {offload} and mode is 'none', which keeps everything and not layers' "
            "inputs; to offload that, enter it around the forward pass"
        )
    layers = [module for module in model.modules() if is_checkpointed_layer(module)]
    prepare_for_training(model, gradient_checkpointing=mode != "none")
    if mode == "none":
        for layer in layers:
            layer.gradient_checkpointing = False
        return
    asked = every > 1 or mode == "selective" or not preserve_rng_state or offload is not None
    if asked and not layers:
        raise NotImplementedError(f"{type(model).__name__} names no layers: only mode 'full' works")
    arguments: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    if mode == "selective":
        arguments["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    run: Callable[..., Any] = functools.partial(checkpoint, **arguments)
    if offload is not None:
        run = functools.partial(_offloaded, offload, run)
    for number, layer in enumerate(layers, 1):
        layer.gradient_checkpointing = number % every == 0
        layer._gradient_checkpointing_func = run


def _offloaded(offload: ActivationOffload, run: Callable[..., Any], *args: Any) -> Any:
    # Within the layer the checkpoint's own hooks are in force: what it is given is all that moves.
    with offload:
        return run(*args)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _POLICIES[_is_kept(operator, args)]


def _is_kept(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether its result costs much to compute, for its size."""
    namespace, _, name = operator.name().partition("::")
    if namespace == "qlora_native":
        return name.startswith("linear_4bit") and _is_narrow(args)
    if namespace == "aten":
        if "scaled_dot_product" in name:
            return True
        if name in ("mm", "addmm", "bmm"):
            columns, rows = args[-1].shape[-1], args[-1].shape[-2]
            return columns <= rows
    return False


def _is_narrow(args: tuple[Any, ...]) -> bool:
    """Whether a 4-bit layer's output is not wider than its input, which is its first tensor."""
    tensors = list(_tensors(args))
    packed = [t.numel() for t in tensors if t.dtype == torch.uint8]
    width = tensors[0].shape[-1]
    # The codes, two to a byte, are the largest of a layer's bytes.
    return bool(packed) and 2 * max(packed) <= width * width


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
