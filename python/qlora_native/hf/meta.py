"""Models from their configuration alone, with 4-bit layers and without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native.hf.config import QLoRANativeConfig
from qlora_native.hf.import_hook import require

_ATTENTION = "qlora_native_meta"


def meta_model(
    config: Any, quantization: QLoRANativeConfig, dtype: torch.dtype, *, counts: bool = True
) -> Any:
    """The model of a configuration on the meta device, with 4-bit layers by `quantization`.

    Args:
        config: of transformers, of a causal language model.
        dtype: of what is not in 4 bits.
        counts: the model is for counting: its attention saves what a fused kernel does, and
            computes nothing. torch's own takes other kernels on the meta device than on a GPU.

    Raises:
        ValueError: transformers has no such model.
    """
    require("transformers.quantizers")
    import transformers

    from qlora_native.hf.quantizer import QLoRANativeQuantizer

    transformers.AttentionInterface.register(_ATTENTION, _attention)
    config = type(config).from_dict(config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    arguments = {"dtype": dtype} | ({"attn_implementation": _ATTENTION} if counts else {})
    with torch.device("meta"):
        try:
            model = transformers.AutoModelForCausalLM.from_config(config, **arguments)
        except ValueError as error:
            if _ATTENTION not in str(error):
                raise
            # One that does not ask the interface; its own attention is counted.
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        quantizer = QLoRANativeQuantizer(quantization, pre_quantized=True)
        quantizer.preprocess_model(model, device_map=None, dtype=dtype)
    # As from_pretrained leaves it: Trainer asks it whether the model can be trained.
    model.hf_quantizer = quantizer
    return model


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        log_sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    return _FusedAttention.apply(query, key, value), None
