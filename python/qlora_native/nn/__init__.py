"""Modules: a linear layer with a 4-bit weight, and LoRA adapters over it."""

from qlora_native.nn.adapters import (
    LoraReport,
    add_lora,
    count_parameters,
    delete_adapter,
    disable_adapters,
    lora_parameters,
    prepare_for_training,
    set_adapter,
)
from qlora_native.nn.linear import Linear4bit
from qlora_native.nn.lora import LoraLinear, LoraSettings
from qlora_native.nn.merging import merge_lora, unmerge_lora

__all__ = [
    "Linear4bit",
    "LoraLinear",
    "LoraReport",
    "LoraSettings",
    "add_lora",
    "count_parameters",
    "delete_adapter",
    "disable_adapters",
    "lora_parameters",
    "merge_lora",
    "prepare_for_training",
    "set_adapter",
    "unmerge_lora",
]
