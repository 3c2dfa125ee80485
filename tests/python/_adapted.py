"""Layers and models with adapters that the LoRA tests share."""

from __future__ import annotations

import copy

import torch
from torch import nn

from _models import randomize_adapters, tiny_net
from qlora_native.convert import quantize_model
from qlora_native.nn import (
    Linear4bit,
    LoraLinear,
    LoraSettings,
    add_lora,
)

SUFFIXES = ["q_proj", "down_proj"]


def base_layer(kind: str, bias: bool = True, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(37, 10, bias=bias, dtype=dtype)
    return linear if kind == "dense" else Linear4bit.from_linear(linear)


def dense_weight(layer: nn.Linear) -> torch.Tensor:
    if isinstance(layer, Linear4bit):
        return layer.dequantize(torch.float32)
    return layer.weight.detach().float()


def adapted(kind: str, bias: bool = True, **settings) -> LoraLinear:
    layer = LoraLinear(base_layer(kind, bias))
    layer.add_adapter("default", LoraSettings(**({"r": 4, "alpha": 8} | settings)))
    layer.set_adapter("default")
    randomize_adapters(layer)
    return layer


def quantized_net(**arguments):
    model = tiny_net(**arguments)
    quantize_model(model)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained_net(net=None, **settings) -> nn.Module:
    """A model with an adapter whose values (and trainable biases) make a difference."""
    model = net or tiny_net()
    add_lora(model, **({"r": 3, "alpha": 5, "target_modules": SUFFIXES} | settings))
    randomize_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.25)
    return model.eval()
