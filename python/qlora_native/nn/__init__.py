"""Modules: layers with 4-bit weights, and LoRA adapters over the linear ones."""

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
from qlora_native.nn.embedding import Embedding4bit
from qlora_native.nn.expert_conversion import dequantize_experts, quantize_experts
from qlora_native.nn.experts import Experts4bit
from qlora_native.nn.linear import Linear4bit
from qlora_native.nn.lora import LoraLinear, LoraSettings
from qlora_native.nn.merging import merge_lora, unmerge_lora
from qlora_native.nn.shared_inputs import share_inputs

__all__ = [
    "Embedding4bit",
    "Experts4bit",
    "Linear4bit",
    "LoraLinear",
    "LoraReport",
    "LoraSettings",
    "add_lora",
    "count_parameters",
    "delete_adapter",
    "dequantize_experts",
    "disable_adapters",
    "lora_parameters",
    "merge_lora",
    "prepare_for_training",
    "quantize_experts",
    "set_adapter",
    "share_inputs",
    "unmerge_lora",
]
