"""quantize_model: replaces the linear layers of a model by 4-bit ones, one layer at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_native import _checks
from qlora_native.nn.expert_conversion import (
    is_experts,
    quantize_experts,
    reason_not_to_quantize,
)
from qlora_native.nn.experts import Experts4bit
from qlora_native.nn.linear import Linear4bit
from qlora_native.nn.targets import lora_layers, replace_module


@dataclass(frozen=True)
class ConversionReport:
    """What `quantize_model` did.

    Attributes:
        converted: (path, shape) of every weight that is now in 4 bits: (out_features, in_features)
            of a Linear4bit, (experts, out_features, in_features) of a stack of experts.
        skipped: (path, reason) of every other module that holds parameters of its own.
        bits_per_parameter: bits of packed state per weight element over the converted layers;
            0.0 when there is none.
        bytes_before, bytes_after: bytes of the model's parameters and buffers, shared ones once.
    """

    converted: tuple[tuple[str, tuple[int, ...]], ...]
    skipped: tuple[tuple[str, str], ...]
    bits_per_parameter: float
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        elements = sum(math.prod(shape) for _, shape in self.converted)
        lines = [
            f"{_named(self.converted)}, {elements:,} weights, quantized to "
            f"{self.bits_per_parameter:.3f} bits per weight; the model went from "
            f"{_mebibytes(self.bytes_before)} to {_mebibytes(self.bytes_after)}"
        ]
        for reason, count in Counter(reason for _, reason in self.skipped).most_common():
            names = [name for name, why in self.skipped if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"  left alone ({reason}): {count}: {shown}")
        return "\n".join(lines)


def quantize_model(
    model: nn.Module,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    codebook: Sequence[float] | None = None,
    skip: Sequence[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check_finite: bool = True,
    progress: Callable[[int, int, str], object] | None = None,
) -> ConversionReport:
    """Replaces every plain nn.Linear of `model` by a Linear4bit, in place, and packs experts.

    Layers of experts, which transformers keeps as stacks of matrices, become an `Experts4bit`.

    Each dense weight is dropped as soon as its packed form exists, so the peak is the quantized
    model and one dense layer (given that nobody else holds the weights); weights mapped from a file
    are read one at a time.

    Left alone, with a reason in the report: layers under `skip`; a weight that is shared with
    another module (an output head tied to the embeddings); subclasses of nn.Linear, which may
    compute something else; layers with hooks, which conversion would lose; dtypes other than fp32,
    fp16 and bf16; LoRA adapters (the layers under them are converted); everything that is not a
    Linear.

    Args:
        quant_type, block_size, double_quant, codebook: as in `quantize_4bit`.
        skip: names of modules to leave alone with all they contain: a path, or a part of one
            between dots ("lm_head", "vision_tower", "layers.0").
        compute_dtype: see `Linear4bit`.
        device: where each layer is moved before it is quantized, and the whole model in the end.
        check_finite: raise ValueError on NaN and infinity.
        progress: called with (layers done, layers in all, path) after every conversion.

    Raises:
        ValueError: a bad setting (the model is untouched), or non-finite values or a weight on the
            meta device: the message names the tensor, layers before it are already converted.
        torch.OutOfMemoryError: the message names the layer and its shape; as above.
        RuntimeError: adapters are merged into a layer to convert; the model is untouched.
    """
    _checks.codebook(quant_type, codebook)
    _checks.check_block_size(block_size)
    if isinstance(skip, str):
        raise TypeError(f"skip is a sequence of names, got the string {skip!r}")
    bytes_before = _tensor_bytes(model)
    names, skipped = _plan(model, skip)
    converted: list[tuple[str, tuple[int, ...]]] = []
    packed_bytes = 0
    for done, paths in enumerate(names, 1):
        layer = _quantize_layer(
            model.get_submodule(paths[0]),
            paths[0],
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double_quant,
            codebook=codebook,
            compute_dtype=compute_dtype,
            device=device,
            check_finite=check_finite,
        )
        for path in paths:
            replace_module(model, path, layer)
        packed_bytes += sum(p.nbytes for p in layer.parameters() if p.dtype == torch.uint8)
        if isinstance(layer, Experts4bit):
            stacks = layer.formats.items()
            converted += [(f"{paths[0]}.{name}", stack.shape) for name, stack in stacks]
        else:
            converted.append((paths[0], (layer.out_features, layer.in_features)))
        if progress is not None:
            progress(done, len(names), paths[0])
    if device is not None:
        model.to(device)
    elements = sum(math.prod(shape) for _, shape in converted)
    return ConversionReport(
        converted=tuple(converted),
        skipped=tuple(skipped),
        bits_per_parameter=8 * packed_bytes / elements if elements else 0.0,
        bytes_before=bytes_before,
        bytes_after=_tensor_bytes(model),
    )


def _plan(model: nn.Module, skip: Sequence[str]) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """(the paths of each layer to convert, (path, reason) of the rest).

    Names only: a list of modules would keep every dense weight alive to the end.
    """
    owners = _owners(model)
    # One module object may be reached by several paths.
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    adapters = _adapter_modules(model)
    to_convert, skipped = [], []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        reason = _reason_to_skip(name, module, skip, owners, adapters)
        if reason:
            skipped.append((name, reason))
        else:
            to_convert.append(paths[id(module)])
    _require_unmerged_bases(model, {path for group in to_convert for path in group})
    return to_convert, skipped


def _adapter_modules(model: nn.Module) -> dict[int, str]:
    """Modules that belong to adapters, by id, with the reason to leave them alone."""
    found = {
        id(module): "part of a LoRA adapter"
        for _, layer in lora_layers(model)
        for part in (layer.lora_A, layer.lora_B)
        for module in part.values()
    }
    for module in model.modules():
        if _is_peft_layer(module):
            # The base layer too: the adapter was made for a dense one, and merges into that.
            reason = "in an adapter of PEFT: quantize first, then add adapters"
            found |= dict.fromkeys(map(id, module.modules()), reason)
    return found


def _is_peft_layer(module: nn.Module) -> bool:
    # By name: PEFT is optional, and must not be imported to be asked.
    return any(
        kind.__name__ == "BaseTunerLayer" and kind.__module__.startswith("peft.")
        for kind in type(module).__mro__
    )


def _require_unmerged_bases(model: nn.Module, to_convert: set[str]) -> None:
    # Unmerging restores the dense tensors that were kept, which a 4-bit layer has no place for.
    for name, layer in lora_layers(model):
        base = f"{name}.base_layer" if name else "base_layer"
        if layer.merged and base in to_convert:
            raise RuntimeError(
                f"cannot quantize {name!r}: adapters {list(layer.merged_adapters)} are merged into "
                "it; call unmerge_lora first"
            )


def _reason_to_skip(
    name: str,
    module: nn.Module,
    skip: Sequence[str],
    owners: dict[int, list[str]],
    adapters: dict[int, str],
) -> str | None:
    entry = next((entry for entry in skip if f".{entry}." in f".{name}."), None)
    if entry is not None:
        return f"named by skip={entry!r}"
    if id(module) in adapters:
        return adapters[id(module)]
    if isinstance(module, (Linear4bit, Experts4bit)):
        return "already quantized"
    if is_experts(module):
        return _reason_to_skip_experts(name, module, owners)
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is not a Linear"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of Linear"
    if not name:
        return "the model itself: use Linear4bit.from_linear"
    # Hooks first: the old weight_norm is one, and keeps the weight outside the parameters.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "has hooks"
    shared = [owner for owner in owners[id(module.weight)] if owner != f"{name}.weight"]
    if shared:
        return f"weight shared with {shared[0]}"
    if module.weight.dtype not in _checks.FLOAT_DTYPES:
        return f"weight is {module.weight.dtype}"
    if module.weight.numel() == 0:
        return "weight has no elements"
    return None


def _reason_to_skip_experts(
    name: str, module: nn.Module, owners: dict[int, list[str]]
) -> str | None:
    if not name:
        return "the model itself: use quantize_experts"
    for own, parameter in module._parameters.items():
        shared = [o for o in owners.get(id(parameter), ()) if o != f"{name}.{own}"]
        if shared:
            return f"{own} shared with {shared[0]}"
    return reason_not_to_quantize(module)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Paths of every parameter, by its id; a module reached by several paths counts once."""
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{module_name}.{name}")
    return owners


def _quantize_layer(layer: nn.Module, name: str, **settings: object) -> Linear4bit | Experts4bit:
    if not isinstance(layer, nn.Linear):
        try:
            return quantize_experts(layer, **settings)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from error
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{name}: {error}") from error
    try:
        return Linear4bit.from_linear(layer, **settings)
    except ValueError as error:
        raise ValueError(f"{name}.weight: {error}") from error
    except torch.OutOfMemoryError as error:
        shape = (layer.out_features, layer.in_features)
        raise torch.OutOfMemoryError(f"{name}.weight {shape}: {error}") from error


def _named(converted: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    stacks = sum(len(shape) == 3 for _, shape in converted)
    named = f"{len(converted) - stacks} linear layers"
    return f"{named} and {stacks} stacks of experts" if stacks else named


def _tensor_bytes(model: nn.Module) -> int:
    tensors: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
