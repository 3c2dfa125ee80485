"""Folding the adapters of a model into its base weights, for good or until further notice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qlora_native.nn.embedding import Embedding4bit, dense_embedding
from qlora_native.nn.expert_conversion import dequantize_experts
from qlora_native.nn.experts import Experts4bit
from qlora_native.nn.linear import Linear4bit
from qlora_native.nn.lora import LoraLinear, dense_linear
from qlora_native.nn.targets import linear_layers, lora_layers, replace_everywhere


def merge_lora(
    model: nn.Module,
    *,
    dense: bool = False,
    dtype: torch.dtype | None = None,
    adapter_names: Sequence[str] | None = None,
) -> int:
    """Folds adapters into the base weights, in place; returns the number of layers changed.

    By default the sum is quantized again into the existing storage, adapters stay beside it and
    `unmerge_lora` restores the original bytes. With `dense` the model is exported: every LoraLinear
    and every Linear4bit becomes an nn.Linear that holds the exact sum, 4-bit embeddings and experts
    become dense, and there is no way back.

    Args:
        dtype: of the dense weights and their biases; each layer's own when None. Only with `dense`.
        adapter_names: adapters to merge; the active ones when None.

    Raises:
        ValueError: nothing to merge, non-finite adapter weights (named), or a dense base weight
            that other modules share. The model is then as it was.
        RuntimeError: adapters are merged already (without `dense`).
    """
    if dtype is not None and not dense:
        raise ValueError("dtype is the dtype of the dense export: it needs dense=True")
    layers = list(lora_layers(model))
    _check_mergeable(model, layers, adapter_names)
    return _export_dense(model, adapter_names, dtype) if dense else _merge(layers, adapter_names)


def unmerge_lora(model: nn.Module) -> int:
    """Restores the weights of before `merge_lora`, bit for bit; returns the number of layers."""
    merged = [layer for _, layer in lora_layers(model) if layer.merged]
    for layer in merged:
        layer.unmerge()
    return len(merged)


def _check_mergeable(
    model: nn.Module,
    layers: Sequence[tuple[str, LoraLinear]],
    adapter_names: Sequence[str] | None,
) -> None:
    for adapter in adapter_names or ():
        if not any(adapter in layer.settings for _, layer in layers):
            raise ValueError(f"no adapter {adapter!r} to merge")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers:
        shared = owners[id(layer.base_layer.weight)]
        if len(shared) > 1 and not layer.merged:
            raise ValueError(f"cannot merge into {name!r}: its weight is shared by {shared}")
        for adapter in layer.settings:
            for part in (layer.lora_A, layer.lora_B):
                bad = part[adapter].weight.numel() - int(part[adapter].weight.isfinite().sum())
                if bad:
                    raise ValueError(
                        f"adapter {adapter!r} of {name!r} has {bad} non-finite values: not merged"
                    )


def _names_in(layer: LoraLinear, adapter_names: Sequence[str] | None) -> tuple[str, ...]:
    names = layer.active_adapters if adapter_names is None else adapter_names
    return tuple(name for name in names if name in layer.settings)


def _merge(layers: Sequence[tuple[str, LoraLinear]], adapter_names: Sequence[str] | None) -> int:
    for name, layer in layers:
        if layer.merged:
            raise RuntimeError(f"{name!r} is merged already; call unmerge_lora first")
    chosen = [(layer, _names_in(layer, adapter_names)) for _, layer in layers]
    chosen = [(layer, names) for layer, names in chosen if names]
    if not chosen:
        raise ValueError("no adapter to merge: the model has none that is active or named")
    try:
        for layer, names in chosen:
            layer.merge(names)
    except BaseException:
        for layer, _ in chosen:
            layer.unmerge()
        raise
    return len(chosen)


def _export_dense(
    model: nn.Module, adapter_names: Sequence[str] | None, dtype: torch.dtype | None
) -> int:
    exported = _export_embeddings(model, dtype)
    # Names, not modules: a list of modules would keep every packed weight alive to the end.
    for name in list(linear_layers(model)):
        layer = model.get_submodule(name)
        if isinstance(layer, LoraLinear):
            dense = layer.to_dense(dtype, _names_in(layer, adapter_names))
        elif isinstance(layer, Linear4bit):
            dense = dense_linear(layer.dequantize(dtype), layer)
        else:
            continue
        replace_everywhere(model, layer, dense)
        exported += 1
    for module in list(model.modules()):
        if isinstance(module, Experts4bit):
            dequantize_experts(module, dtype)
            exported += 1
    if not exported:
        raise ValueError("nothing to export: the model has neither adapters nor 4-bit layers")
    return exported


def _export_embeddings(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Makes 4-bit embeddings dense, and the heads that are tied to them, which stay tied."""
    exported = 0
    for name in [n for n, m in model.named_modules() if isinstance(m, Embedding4bit)]:
        embedding = model.get_submodule(name)
        if not isinstance(embedding, Embedding4bit):
            continue  # tied to an earlier one
        dense = dense_embedding(embedding, dtype)
        packed = [m for m in model.modules() if isinstance(m, (Embedding4bit, Linear4bit))]
        tied = [m for m in packed if m.weight is embedding.weight]
        for module in tied:
            if isinstance(module, Embedding4bit):
                twin = dense if module is embedding else dense_embedding(module, dtype)
            else:
                twin = dense_linear(dense.weight, module)
            # One parameter, as it was: the head would be stored a second time else.
            twin.weight = dense.weight
            replace_everywhere(model, module, twin)
            exported += 1
    return exported
