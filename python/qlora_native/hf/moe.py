"""Layers of experts in 4 bits for transformers: loading them, and their forward by name.

A checkpoint may hold a matrix per expert, which transformers stacks while it loads. Here each is
packed as it comes, and no dense stack ever exists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora_native.hf.layer_kinds import KINDS, LayerKind
from qlora_native.hf.packing import current_observer, nothing_packed, packed_parameters
from qlora_native.nn.expert_conversion import (
    become_4bit,
    dequantize_experts,
    is_experts,
    reason_not_to_quantize,
)
from qlora_native.nn.experts import PROJECTIONS, Experts4bit

IMPLEMENTATION = "qlora_native"


class ExpertsKind(LayerKind):
    """Layers of experts that transformers keeps as stacks of matrices; they become Experts4bit."""

    def make(self, name: str, module: nn.Module, settings: dict[str, Any]) -> nn.Module | None:
        """The module itself, changed in place."""
        if not is_experts(module) or reason_not_to_quantize(module):
            return None
        return become_4bit(module, **settings)

    def owns(self, module: nn.Module) -> bool:
        """Whether it is an Experts4bit."""
        return isinstance(module, Experts4bit)

    def expect_dense(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Placeholders for the stacks in the shapes that the checkpoint has."""
        for name, stack in module.formats.items():
            placeholder = torch.empty(stack.dense_shape, dtype=dtype, device="meta")
            module._parameters[name] = nn.Parameter(placeholder, requires_grad=False)

    def is_dense(self, module: nn.Module, tensor_name: str) -> bool:
        """Whether it is a stack, not packed yet."""
        return tensor_name in module.formats and module._parameters[tensor_name].is_floating_point()

    def pack(self, module: nn.Module, tensor_name: str, value: Tensor) -> dict[str, Tensor]:
        """The stack's codes, absmax and, with double quantization, absmax2."""
        if tuple(value.shape) != module.formats[tensor_name].dense_shape:
            expected = module.formats[tensor_name].dense_shape
            raise ValueError(f"is {tuple(value.shape)} in the file and {expected} by config.json")
        _note_dtype(module, tensor_name, value.dtype)
        return module.pack_stack(tensor_name, value.__getitem__)

    def to_dense(self, module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        """The module itself, changed back."""
        return dequantize_experts(module, dtype)


class StackOnLoad(ConversionOps):
    """Packs the matrices of a stack one after another, where transformers would stack them.

    Stacks that stay dense, and failures, are treated as `PackOnLoad` treats them.
    """

    def __init__(self, operations: list[ConversionOps], failures: list[Exception]) -> None:
        self.operations = operations
        self.failures = failures

    def __deepcopy__(self, memo: dict[int, Any]) -> StackOnLoad:
        # transformers copies conversions for every tensor; failures are collected in one place.
        return StackOnLoad(self.operations, self.failures)

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **others: Any,
    ) -> dict[str, Tensor]:
        """{pattern: the matrices of all experts} to {full name of every part: uint8 parameter}."""
        module, name = get_module_from_name(model, full_layer_name)
        if not isinstance(module, Experts4bit) or name not in module.formats:
            for operation in self.operations:
                input_dict = operation.convert(
                    input_dict,
                    source_patterns=source_patterns,
                    target_patterns=target_patterns,
                    full_layer_name=full_layer_name,
                    model=model,
                    **others,
                )
            return input_dict
        # In the order of the patterns: gate before up.
        lists = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]

        def expert(index: int) -> Tensor:
            parts = [matrices[index] for matrices in lists]
            for matrices in lists:
                matrices[index] = None
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        def make() -> dict[str, Tensor]:
            _note_dtype(module, name, lists[0][0].dtype)
            return packed_parameters(full_layer_name, name, module.pack_stack(name, expert))

        try:
            counts = {len(matrices) for matrices in lists}
            if counts != {module.formats[name].shape[0]}:
                raise ValueError(
                    f"has {sorted(counts)} experts in the file and "
                    f"{module.formats[name].shape[0]} by config.json"
                )
            stack = torch.empty(
                module.formats[name].dense_shape, dtype=lists[0][0].dtype, device="meta"
            )
            return current_observer().pack(full_layer_name, stack, make)
        except ValueError as error:
            self.failures.append(ValueError(f"{full_layer_name} {error}"))
        except Exception as error:
            self.failures.append(error)
        return nothing_packed(model, full_layer_name)


def pack_while_stacking(
    conversions: Iterable[Any], model: nn.Module, failures: list[Exception]
) -> list[Any]:
    """The conversions of a model's checkpoint, with ours where experts that become 4-bit ones are
    stacked."""
    if not any(isinstance(module, Experts4bit) for module in model.modules()):
        return list(conversions)
    return [
        _with_operation(conversion, StackOnLoad(list(conversion.operations), failures))
        if _stacks_matrices(conversion)
        else conversion
        for conversion in conversions
    ]


def _with_operation(conversion: Any, operation: ConversionOps) -> WeightConverter:
    """The conversion with another operation; `WeightConverter.copy` is newer than 5.17."""
    made = WeightConverter(
        list(conversion._original_source_patterns),
        list(conversion._original_target_patterns),
        operations=[operation],
    )
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(conversion, name):
            setattr(made, name, getattr(conversion, name))
    return made


def keep_stacks_when_saving(model: nn.Module) -> None:
    """Has save_pretrained write packed stacks as they are: they cannot be split into experts.

    transformers keeps the conversions that a load has used, to reverse them.
    """
    used = getattr(model, "_weight_conversions", None)
    if used and any(isinstance(module, Experts4bit) for module in model.modules()):
        model._weight_conversions = [conversion for conversion in used if not _is_ours(conversion)]


def experts_forward(
    layer: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts implementation "qlora_native": 4-bit layers as ever, dense ones grouped."""
    if isinstance(layer, Experts4bit):
        return Experts4bit.forward(layer, hidden_states, top_k_index, top_k_weights)
    return grouped_mm_experts_forward(layer, hidden_states, top_k_index, top_k_weights)


def _stacks_matrices(conversion: Any) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    targets = conversion._original_target_patterns
    if len(targets) != 1 or targets[0].rpartition(".")[2] not in PROJECTIONS:
        return False
    kinds = [
        (type(operation), getattr(operation, "dim", None)) for operation in conversion.operations
    ]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def _is_ours(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(isinstance(operation, StackOnLoad) for operation in operations)


def _note_dtype(module: Experts4bit, name: str, dtype: torch.dtype) -> None:
    module.formats[name] = dataclasses.replace(module.formats[name], dtype=dtype)


# As this module is imported: its imports may run the quantizer's registration in turn.
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
KINDS.append(ExpertsKind())
