"""LoRA of PEFT on 4-bit experts, which its configs name by `target_parameters`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qlora_native.nn.experts import PARTS, ExpertAdapter, Experts4bit


class ParamWrapper(StockParamWrapper):
    """PEFT's wrapper of one stack of experts, over a 4-bit stack.

    The stock class adds the low-rank products to the whole dense stack in every forward. Here the
    layer of experts adds them to what it computes, for which dropout is possible too, and merges
    go expert by expert. Files are the stock class's. Its name is, too: PEFT compares it.
    """

    _unmerged: dict[str, Tensor] | None = None
    """State of the stack from before the merge; costs its size again while merged."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, config: LoraConfig, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def update_layer(
        self, adapter_name: str, *args: Any, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Adds an adapter, as PEFT's wrapper does; with dropout, which that refuses."""
        super().update_layer(adapter_name, *args, config=_without_dropout(config), **kwargs)
        self._set_dropout(adapter_name, config)

    def _set_dropout(self, adapter_name: str, config: LoraConfig) -> None:
        if config.lora_dropout:
            dropout = nn.Dropout(config.lora_dropout).train(self.training)
            self.lora_dropout[adapter_name] = dropout

    def get_param(self) -> Tensor:
        """What the dense stack would be: its shape, dtype and device, without memory."""
        layer = self.get_base_layer()
        stack = layer.formats[self.parameter_name]
        device = layer._parameters[self.parameter_name].device
        return torch.empty((), dtype=stack.dtype, device=device).expand(stack.dense_shape)

    def expert_adapter(self, name: str) -> ExpertAdapter:
        """The adapter `name` with a matrix A and B for each expert."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        # PEFT's layout: A has the experts' ranks one after another, B has them interleaved.
        a = a.view(self.num_experts, -1, a.shape[1])
        b = b.view(b.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return ExpertAdapter(a, b, self.scaling[name], self.lora_dropout[name])

    @contextmanager
    def _activate_lora(self, active_adapters: Sequence[str]) -> Iterator[None]:
        adapters = [self.expert_adapter(name) for name in active_adapters if name in self.lora_A]
        layer = self.get_base_layer()
        layer.adapters[self.parameter_name] = adapters
        try:
            yield
        finally:
            del layer.adapters[self.parameter_name]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Adds adapters to every expert in fp32; the sum of all merged ones is quantized once.

        Raises:
            ValueError: a sum is not finite, with `safe_merge` or without; nothing has changed.
        """
        names = check_adapters_to_merge(self, adapter_names) or []
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        state = self._state()
        if self._unmerged is not None:
            self._restore(self._unmerged)
        try:
            self._add([*self.merged_adapters, *names])
        except BaseException:
            self._restore(state)
            raise
        self._unmerged = self._unmerged or state
        self.merged_adapters = [*self.merged_adapters, *names]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the stack of before the merge, bit for bit."""
        if self._unmerged is not None:
            self._restore(self._unmerged)
        self._unmerged = None
        self.merged_adapters = []

    def _add(self, names: Sequence[str]) -> None:
        layer, adapters = self.get_base_layer(), [self.expert_adapter(name) for name in names]
        quantized = layer.quantized_stack(self.parameter_name)
        for expert in range(self.num_experts):
            weight = quantized[expert].dequantize(torch.float32)
            for a, b, scaling, _ in adapters:
                weight.add_(b[expert].float() @ a[expert].float(), alpha=scaling)
            layer.requantize_expert_(self.parameter_name, expert, weight)

    def _state(self) -> dict[str, Tensor]:
        parameters = self.get_base_layer()._parameters
        names = (self.parameter_name + part for part in PARTS)
        return {
            name: parameters[name].detach().clone()
            for name in names
            if parameters[name] is not None
        }

    def _restore(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            self.get_base_layer()._parameters[name].copy_(value)


def _without_dropout(config: LoraConfig) -> LoraConfig:
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


def is_packed_stack(module: nn.Module, parameter_name: str) -> bool:
    """Whether the parameter is a stack of experts in 4 bits."""
    return isinstance(module, Experts4bit) and parameter_name in module.formats
