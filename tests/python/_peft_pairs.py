"""Pairs of PEFT models, over 4-bit layers and over dense ones of the same weights."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from _hf import dense_twin, fill, quantized
from qlora_native.hf import peft_lora

ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
KINDS = ["llama", "opt", "qwen"]


def adapted_model(base: nn.Module, config: LoraConfig, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return fill(get_peft_model(base, copy.deepcopy(config), **arguments))


def pair(
    kind: str = "llama", dtype: torch.dtype = torch.float32, **options: object
) -> tuple[nn.Module, nn.Module]:
    base = quantized(kind, dtype)
    twin = dense_twin(base)
    config = LoraConfig(**(ALL | options))
    return adapted_model(base, config), adapted_model(twin, config)


def two_adapters(kind: str = "llama") -> tuple[nn.Module, nn.Module]:
    models = pair(kind)
    for model in models:
        torch.manual_seed(5)
        model.add_adapter("second", LoraConfig(**(ALL | {"r": 4, "use_rslora": True})))
        model.set_adapter("second")
        fill(model, seed=6)
    return models


def ours_in(model: nn.Module) -> list[peft_lora.Linear]:
    return [m for m in model.modules() if isinstance(m, peft_lora.Linear)]
