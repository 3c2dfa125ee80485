"""Finding, choosing and replacing the layers of a model that adapters can go on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from qlora_native.nn.lora import LoraLinear, is_adaptable


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Every adapted layer of `model` with its path, each module object once."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that can have an adapter, by path: Linear4bit, nn.Linear and LoraLinear.

    A layer inside a LoraLinear is not listed; one reached by several paths is, under each.
    """
    layers: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside):
            continue
        if isinstance(module, LoraLinear):
            inside = (*inside, f"{name}." if name else "")
            layers[name] = module
        elif is_adaptable(module):
            layers[name] = module
    return layers


def match_targets(
    model: nn.Module, target_modules: str | Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(paths of the layers that `target_modules` means, entries that match nothing).

    Raises:
        ValueError: nothing matches, or an entry matches only modules that LoRA cannot adapt.
    """
    layers = linear_layers(model)
    if target_modules is None or target_modules == "all-linear":
        head = _output_head(model)
        targets = [n for n, m in layers.items() if m is not head and n.split(".")[-1] != "lm_head"]
        unmatched: list[str] = []
    elif isinstance(target_modules, str):
        targets = [n for n in layers if re.fullmatch(target_modules, n)]
        unmatched = [] if targets else [target_modules]
    else:
        wanted = list(dict.fromkeys(target_modules))
        targets = [n for n in layers if any(is_or_ends_in(n, w) for w in wanted)]
        unmatched = [w for w in wanted if not any(is_or_ends_in(n, w) for n in layers)]
        for entry in unmatched:
            _reject_other_modules(model, entry)
    if not targets:
        raise ValueError(
            f"target_modules={target_modules!r} matches no linear layer; there are: "
            f"{_summary(layers) or 'none'}"
        )
    return tuple(targets), tuple(unmatched)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at the path `name`.

    Raises:
        ValueError: the path is empty: the model itself cannot be replaced in place.
    """
    if not name:
        raise ValueError(f"the model itself is a {type(model).__name__}: wrap it in a module")
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` at every path that leads to `old`."""
    for path in [n for n, m in model.named_modules(remove_duplicate=False) if m is old]:
        replace_module(model, path, new)


def is_or_ends_in(name: str, entry: str) -> bool:
    """Whether a path is `entry` or ends in it after a dot: how lists of targets match."""
    return name == entry or name.endswith(f".{entry}")


def _reject_other_modules(model: nn.Module, entry: str) -> None:
    others = [
        (n, type(m).__name__)
        for n, m in model.named_modules()
        if is_or_ends_in(n, entry) and not isinstance(m, LoraLinear)
    ]
    if others:
        name, kind = others[0]
        raise ValueError(
            f"target_modules entry {entry!r} matches {name!r}, a {kind}: LoRA adapts Linear4bit "
            "and nn.Linear layers"
        )


def _output_head(model: nn.Module) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if callable(get_head) else None


def _summary(layers: Mapping[str, nn.Module]) -> str:
    """The last components of the paths, which is what a target list usually names."""
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))


def require_unmerged(model: nn.Module, action: str) -> None:
    """Raises RuntimeError, naming `action`, when adapters are merged into a layer."""
    for name, layer in lora_layers(model):
        if layer.merged:
            raise RuntimeError(
                f"{action}: adapters {list(layer.merged_adapters)} are merged into {name!r}; "
                "call unmerge_lora first"
            )
