"""LoRA over a whole model: adding adapters, freezing the rest, switching, preparing to train."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_native.nn.embedding import Embedding4bit
from qlora_native.nn.experts import Experts4bit
from qlora_native.nn.linear import Linear4bit
from qlora_native.nn.lora import LoraLinear, LoraSettings, check_adapter
from qlora_native.nn.targets import (
    linear_layers,
    lora_layers,
    match_targets,
    replace_everywhere,
    replace_module,
    require_unmerged,
)


@dataclass(frozen=True)
class LoraReport:
    """What `add_lora` did.

    Attributes:
        targets: names of the adapted layers, in the model's order.
        trainable: number of parameters that now require gradients.
        total: number of parameters of the model with its adapters, a 4-bit weight [out, in]
            counted as out * in.
        unmatched: entries of `target_modules` that matched nothing.
    """

    targets: tuple[str, ...]
    trainable: int
    total: int
    unmatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        text = (
            f"LoRA on {len(self.targets)} layers: {self.trainable:,} of {self.total:,} parameters "
            f"train ({share:.3f} %)"
        )
        return text + (f"; matched nothing: {list(self.unmatched)}" if self.unmatched else "")


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] | None = None,
    bias: str = "none",
    use_rslora: bool = False,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
) -> LoraReport:
    """Adds a LoRA adapter to linear layers of `model`, in place, and freezes everything else.

    The new adapter becomes the only active one; adapters that were there before stay, frozen.

    Args:
        r, alpha, dropout, bias, use_rslora: see `LoraSettings`.
        target_modules: None or "all-linear" for every Linear4bit and nn.Linear but the output
            head; a list of names, each matching the layers whose path is it or ends in "." + it;
            another string is a regular expression that must match a layer's whole path.
        adapter_name: a name without dots.
        adapter_dtype: dtype of the adapter's weights, fp32 when None; products run in the
            activations' dtype in any case.

    Raises:
        ValueError: a bad setting, an adapter name that is taken, no layer matched, or only modules
            that LoRA cannot adapt; the model is then as it was.
    """
    settings = LoraSettings(r, alpha, dropout, use_rslora, bias)
    targets, unmatched = match_targets(model, target_modules)
    report = install_adapter(
        model, dict.fromkeys(targets, settings), adapter_name, dtype=adapter_dtype
    )
    return LoraReport(report.targets, report.trainable, report.total, unmatched)


def install_adapter(
    model: nn.Module,
    settings: Mapping[str, LoraSettings],
    adapter_name: str,
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = True,
) -> LoraReport:
    """Adds an adapter to the layers named by `settings`; the rest is as in `add_lora`.

    Raises:
        ValueError: the name is taken, or biases are to train while other adapters exist (the
            biases are the base model's, so adapters would share them).
        RuntimeError: adapters are merged.
        In every case the model is as it was.
    """
    require_unmerged(model, "adding an adapter")
    layers = linear_layers(model)
    existing = sorted({a for _, layer in lora_layers(model) for a in layer.settings})
    dtype = dtype or torch.float32
    check_adapter(adapter_name, dtype, existing)
    if existing and any(s.bias != "none" for s in settings.values()):
        raise ValueError(f"an adapter with biases must be the only one; there are {existing}")
    wrapped: dict[int, LoraLinear] = {}
    for name, layer_settings in settings.items():
        layer = layers[name]
        if not isinstance(layer, LoraLinear):
            # The same module object may be reached by several paths; it is wrapped once.
            if id(layer) not in wrapped:
                wrapped[id(layer)] = LoraLinear(layer).train(layer.training)
            layer = wrapped[id(layer)]
            replace_module(model, name, layer)
        if adapter_name not in layer.settings:
            layer.add_adapter(adapter_name, layer_settings, dtype)
    set_adapter(model, adapter_name, trainable=trainable)
    trainable_count, total = count_parameters(model)
    return LoraReport(tuple(settings), trainable_count, total)


def lora_parameters(model: nn.Module, adapter_name: str | None = None) -> Iterator[nn.Parameter]:
    """The weights A and B of one adapter, or of all of them."""
    for _, layer in lora_layers(model):
        for name in layer.settings if adapter_name is None else (adapter_name,):
            if name in layer.settings:
                yield layer.lora_A[name].weight
                yield layer.lora_B[name].weight


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, a 4-bit weight counted by its elements."""
    trainable = total = 0
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += _elements(module, name, parameter)
            trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def _elements(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """What a parameter counts: packed codes as elements, their constants as nothing."""
    if isinstance(module, (Linear4bit, Embedding4bit)) and name != "bias":
        return module.in_features * module.out_features if name == "weight" else 0
    if isinstance(module, Experts4bit) and not parameter.is_floating_point():
        return math.prod(module.formats[name].shape) if name in module.formats else 0
    return parameter.numel()


def set_adapter(model: nn.Module, names: str | Sequence[str], *, trainable: bool = True) -> None:
    """Activates exactly these adapters, and with `trainable` makes them all that trains.

    A layer that lacks one of them runs with the others. With bias="lora_only" or "all" the biases
    train as well.

    Raises:
        KeyError: no layer has an adapter of that name.
        RuntimeError: adapters are merged.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    layers = [layer for _, layer in lora_layers(model)]
    known = {a for layer in layers for a in layer.settings}
    for name in names:
        if name not in known:
            raise KeyError(f"no adapter {name!r}; there are {sorted(known)}")
    require_unmerged(model, "set_adapter")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    biases: set[str] = set()
    for layer in layers:
        active = [name for name in names if name in layer.settings]
        layer.set_adapter(active)
        for name in active:
            biases.add(layer.settings[name].bias)
            layer.lora_A[name].weight.requires_grad_(trainable)
            layer.lora_B[name].weight.requires_grad_(trainable)
    for mode in biases:
        for _, parameter in bias_parameters(model, mode):
            parameter.requires_grad_(trainable)


def bias_parameters(model: nn.Module, mode: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base model that train under a bias mode, with their paths."""
    if mode == "lora_only":
        for name, layer in lora_layers(model):
            if layer.bias is not None:
                yield f"{name}.base_layer.bias", layer.bias
    elif mode == "all":
        # "bias" anywhere in the path is PEFT's rule; its files hold these parameters.
        for name, parameter in model.named_parameters():
            if "bias" in name and "lora_" not in name and parameter.is_floating_point():
                yield name, parameter


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes as its base does (biases that were trained stay).

    Raises:
        RuntimeError: adapters are merged.
    """
    require_unmerged(model, "disable_adapters")
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.adapters_enabled for layer in layers]
    for layer in layers:
        layer.adapters_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapters_enabled = enabled


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes an adapter from every layer; a layer left without any is its base layer again.

    Raises:
        KeyError: no layer has it.
        RuntimeError: adapters are merged.
    """
    layers = [layer for _, layer in lora_layers(model) if name in layer.settings]
    if not layers:
        raise KeyError(f"no adapter {name!r} in the model")
    require_unmerged(model, "delete_adapter")
    for layer in layers:
        layer.delete_adapter(name)
        if not layer.settings:
            replace_everywhere(model, layer, layer.base_layer)


def prepare_for_training(
    model: nn.Module, *, gradient_checkpointing: bool = True, use_reentrant: bool = False
) -> None:
    """Sets up a transformers model for adapter training; before or after `add_lora`.

    Turns on gradient checkpointing, makes the embeddings' output require gradients (a reentrant
    checkpoint whose inputs do not would give the adapters none) and turns off the key-value cache,
    which checkpointing cannot use. Nothing is cast and nothing is frozen.

    Raises:
        NotImplementedError: `gradient_checkpointing` on a model without transformers' interface.
        RuntimeError: adapters are merged, so there is nothing to train.
    """
    require_unmerged(model, "prepare_for_training")
    if not gradient_checkpointing:
        return
    # transformers 5.23 renamed the method and deprecated the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    require_grads = getattr(model, "enable_input_require_grads", None)
    if enable is None or require_grads is None:
        raise NotImplementedError(
            f"{type(model).__name__} has no gradient_checkpointing_enable: call "
            "torch.utils.checkpoint in its forward and pass gradient_checkpointing=False here"
        )
    # enable() registers the hooks that make the embeddings' output require gradients in some
    # versions and for some models only, and anew every time.
    if hasattr(model, "_require_grads_hooks"):
        model.disable_input_require_grads()
    enable({"use_reentrant": use_reentrant})
    if not getattr(model, "_require_grads_hooks", None):
        require_grads()
    if getattr(model, "config", None) is not None:
        model.config.use_cache = False
