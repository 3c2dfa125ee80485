"""PEFT's layers over a Linear4bit, by way of its decoded weight.

Whatever PEFT does to a weight it does to `base_layer.weight`, as a float matrix. So a layer whose
method reads or writes the weight runs that method with a dense layer in the place of its base, one
layer at a time; what changed is quantized again. Nothing computes on packed bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from qlora_native.nn import Linear4bit
from qlora_native.nn.adapted import computing_device, is_offloaded
from qlora_native.nn.lora import dense_linear
from qlora_native.nn.targets import replace_module


def dense_stand_in(
    layer: Linear4bit, dtype: torch.dtype, *, for_forward: bool = False
) -> nn.Linear:
    """An nn.Linear with the decoded weight of `layer` and its very bias; exactly that class.

    With `for_forward` the bias is cast to `dtype` as Linear4bit casts it, and gradients flow to it.

    Raises:
        NotImplementedError: the layer is offloaded, and has no weight between its calls.
    """
    if is_offloaded(layer):
        raise NotImplementedError(
            f"this reads the weight of a {type(layer).__name__} of {layer.in_features} to "
            f"{layer.out_features} features, which is offloaded: load the model without that"
        )
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    bias = layer.bias
    if for_forward and bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    # Around register_parameter, which PEFT replaces while it makes layers without memory.
    dense._parameters.update(weight=weight, bias=bias)
    return dense.train(layer.training)


def dense_copy(module: nn.Module) -> nn.Module:
    """`module` itself, or where it holds 4-bit layers a copy with dense ones."""
    paths = [name for name, part in module.named_modules() if isinstance(part, Linear4bit)]
    if not paths:
        return module
    holder = nn.ModuleDict({"copy": copy.deepcopy(module)})
    for path in paths:
        name = f"copy.{path}" if path else "copy"
        layer = holder.get_submodule(name)
        replace_module(holder, name, dense_linear(layer.dequantize(), layer))
    return holder["copy"]


def write_back(dense: nn.Linear, layer: Linear4bit) -> None:
    """Quantizes the weight of a stand-in into its layer if it has changed; hands the bias over.

    Raises:
        ValueError: the weight holds NaN or infinity; the layer is as it was.
    """
    if not torch.equal(dense.weight, layer.dequantize(dense.weight.dtype)):
        layer.requantize_(dense.weight)
    layer._parameters["bias"] = dense.bias


@contextmanager
def dense_base(
    tuner_layer: nn.Module, dtype: torch.dtype = torch.float32, *, keep: bool = False
) -> Iterator[None]:
    """Inside the block, the base layer of `tuner_layer` is dense, in `dtype`.

    Afterwards it is the Linear4bit again. With `keep`, a weight that was changed is quantized into
    it, unless the block raised; without, the stand-in is fit for a forward.
    """
    layer = tuner_layer.base_layer
    if not isinstance(layer, Linear4bit):
        yield
        return
    dense = dense_stand_in(layer, dtype, for_forward=not keep)
    tuner_layer._modules["base_layer"] = dense
    try:
        yield
        if keep:
            write_back(dense, layer)
    finally:
        tuner_layer._modules["base_layer"] = layer


class Over4bit:
    """Mixin before a tuner layer's class: merging into the 4-bit base, and back exactly."""

    _unmerged: dict[str, Tensor | None] | None = None
    """State of the base layer from before the merge; costs its size again while merged."""

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # To where PEFT finds the weight, which is a placeholder where the layer is offloaded.
        base = self.get_base_layer()
        if device is None and isinstance(base, Linear4bit):
            device = computing_device(base)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """PEFT's merge in fp32; the sum of all merged adapters is quantized once.

        Raises:
            ValueError: the sum is not finite, with `safe_merge` or without; nothing has changed.
        """
        base = self.base_layer
        if not isinstance(base, Linear4bit):  # a method of PEFT's, inside of dense_base
            return super().merge(safe_merge, adapter_names)
        before = list(self.merged_adapters)
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return None
        state = _state_of(base)
        if self._unmerged is not None:
            _restore(base, self._unmerged)
        self.merged_adapters = []
        try:
            with dense_base(self, keep=True):
                super().merge(safe_merge, [*before, *names])
        except BaseException:
            _restore(base, state)
            self.merged_adapters = before
            raise
        if self.merged_adapters and self._unmerged is None:
            self._unmerged = state
        return None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the base layer of before the merge, bit for bit."""
        if self._unmerged is None or not isinstance(self.base_layer, Linear4bit):
            return super().unmerge()
        with dense_base(self):
            super().unmerge()  # for what it keeps beside the weight
        _restore(self.base_layer, self._unmerged)
        self._unmerged = None
        return None


def _state_of(layer: Linear4bit) -> dict[str, Tensor | None]:
    return {
        name: None if parameter is None else parameter.detach().clone()
        for name, parameter in layer._parameters.items()
    }


def _restore(layer: Linear4bit, state: dict[str, Tensor | None]) -> None:
    for name, value in state.items():
        if value is None:
            layer._parameters[name] = None
        else:
            layer._parameters[name].data.copy_(value)
