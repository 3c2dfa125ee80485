"""At home in Hugging Face: what extends transformers and PEFT, imported when they are.

Importing this package imports neither; it asks to be called when they have been imported.
"""

from __future__ import annotations

import importlib
from typing import Any

from qlora_native.hf.import_hook import IntegrationError, after_import

# Public name: the module that defines it.
_EXPORTS = {
    "LoftqReport": "qlora_native.hf.peft_init",
    "QLoRANativeConfig": "qlora_native.hf.config",
    "bitsandbytes_config": "qlora_native.hf.bitsandbytes_models",
    "save_for_bitsandbytes": "qlora_native.hf.bitsandbytes_models",
    "use_in_place_of_bitsandbytes": "qlora_native.hf.bitsandbytes_models",
    "init_loftq": "qlora_native.hf.peft_init",
    "optimizer_cls_and_kwargs": "qlora_native.hf.optimizers",
    "use_as_paged_optimizers": "qlora_native.hf.optimizers",
    "use_liger_kernels": "qlora_native.hf.liger",
}

# (what is imported, what runs then as "module:function").
_HOOKS: tuple[tuple[str, str], ...] = (
    ("transformers.quantizers", "qlora_native.hf.quantizer:register"),
    ("peft", "qlora_native.hf.peft_hooks:install"),
    ("transformers.trainer_optimizer", "qlora_native.hf.optimizers:stand_in_for_bitsandbytes"),
)

__all__ = ["IntegrationError", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


for _module, _action in _HOOKS:
    after_import(_module, _action)
