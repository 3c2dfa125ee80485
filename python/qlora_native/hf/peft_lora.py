"""LoRA of PEFT over a Linear4bit."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from qlora_native.hf.peft_dense import Over4bit, dense_base
from qlora_native.nn import Linear4bit
from qlora_native.nn.adapted import LowRank, adapted_linear, children, is_bare, parameter

_INITS_WITHOUT_WEIGHT = (True, False, None, "gaussian", "eva")


class Linear(Over4bit, LoraLinear):
    """PEFT's LoRA layer, with everything it can do; plain adapters take our product.

    Initializations that read the base weight (PiSSA, OLoRA, CorDA, LoRA-GA, MiCA, orthogonal) read
    the decoded one, and what they leave in the base is quantized again. So is a merge, whose
    reversal restores the bytes.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., out_features] for x [..., in_features]."""
        adapters = None if args or kwargs else self.plain_adapters()
        if adapters is None:
            return super().forward(x, *args, **kwargs)
        return adapted_linear(self._modules["base_layer"], x, adapters)

    def plain_adapters(self) -> list[LowRank] | None:
        """The active adapters, or None when one needs more than y + scaling * B A dropout(x)."""
        if (
            self.disable_adapters
            or self.merged_adapters
            or not self.cast_input_dtype_enabled
            or not isinstance(self._modules["base_layer"], Linear4bit)
        ):
            return None
        adapters = []
        lora_a, lora_b = children(self, "lora_A"), children(self, "lora_B")
        for name in self.active_adapters:
            if name not in lora_a:
                continue
            a, b = lora_a[name], lora_b[name]
            if (
                name in self.lora_variant
                or not (_is_plain(a) and _is_plain(b))
                or parameter(b, "bias") is not None
            ):
                return None
            dropout = children(self, "lora_dropout")[name]
            a, b = parameter(a, "weight"), parameter(b, "weight")
            adapters.append(LowRank(a, b, self.scaling[name], dropout))
        return adapters

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Adds an adapter, as PEFT's layer does.

        Raises:
            NotImplementedError: init_lora_weights="loftq", which needs the original weight.
        """
        init = config.init_lora_weights
        if init == "loftq":
            raise NotImplementedError(
                "init_lora_weights='loftq' needs the weights from before quantization, and this "
                "model holds 4-bit ones: make the adapter with init_lora_weights=True and call "
                "qlora_native.hf.init_loftq(model, checkpoint)"
            )
        if init in _INITS_WITHOUT_WEIGHT and config.kasa_config is None:
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
            return
        if self.merged_adapters:
            raise RuntimeError(
                f"init_lora_weights={init!r} reads the base weight, into which adapters "
                f"{self.merged_adapters} are merged: unmerge first"
            )
        with dense_base(self, keep=True):
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module is F.linear with its weight, which nobody watches or changes."""
    return type(module) is nn.Linear and is_bare(module)
