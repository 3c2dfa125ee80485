"""Fine-tune large language models in 4 bits: NF4 and QLoRA for PyTorch, on CPU and CUDA."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qlora_native import hf, kernels, nn
from qlora_native._C import CudaError, __version__, cuda_unavailable_reason, list_devices
from qlora_native.functional import (
    QUANT_TYPES,
    QuantizedStack,
    QuantizedTensor,
    dequantize_4bit,
    grouped_linear_4bit,
    linear_4bit,
    linear_4bit_lora,
    linear_4bit_lora_group,
    quantize_4bit,
)
from qlora_native.nn import add_lora, merge_lora, prepare_for_training, unmerge_lora

if TYPE_CHECKING:
    from qlora_native import memory, optim, training
    from qlora_native.checkpoint import load_adapter, save_adapter
    from qlora_native.convert import quantize_model
    from qlora_native.hf.config import QLoRANativeConfig

__all__ = [
    "QUANT_TYPES",
    "CudaError",
    "QLoRANativeConfig",
    "QuantizedStack",
    "QuantizedTensor",
    "__version__",
    "add_lora",
    "build_info",
    "cuda_unavailable_reason",
    "dequantize_4bit",
    "grouped_linear_4bit",
    "hf",
    "kernels",
    "linear_4bit",
    "linear_4bit_lora",
    "linear_4bit_lora_group",
    "list_devices",
    "load_adapter",
    "memory",
    "merge_lora",
    "nn",
    "optim",
    "prepare_for_training",
    "quantize_4bit",
    "quantize_model",
    "save_adapter",
    "training",
    "unmerge_lora",
]

# Imported when they are asked for, from these modules (submodules from the package itself): `import
# qlora_native` is to cost little, and transformers not to be needed.
_LATER = {
    "QLoRANativeConfig": "qlora_native.hf.config",
    "load_adapter": "qlora_native.checkpoint",
    "memory": "qlora_native",
    "optim": "qlora_native",
    "quantize_model": "qlora_native.convert",
    "save_adapter": "qlora_native.checkpoint",
    "training": "qlora_native",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LATER[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def build_info() -> dict[str, str]:
    """Return how the core was built: version, compiler, cuda_toolkit and cuda_architectures."""
    from qlora_native import _C

    return dict(_C.build_info)
