"""What is put in the place of PEFT's own once PEFT has been imported.

PEFT has no registry for quantized layers. Each replacement looks at its arguments and hands over to
the original when no 4-bit layer is among them.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import peft
import peft.tuners.lora.model as lora_model
import peft.utils.other as peft_other
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from qlora_native.hf.peft_dense import dense_copy
from qlora_native.hf.peft_experts import ParamWrapper, is_packed_stack
from qlora_native.hf.peft_lora import Linear
from qlora_native.hf.peft_tuners import create_and_replace_over_4bit, refuse_untried
from qlora_native.nn import (
    Embedding4bit,
    Experts4bit,
    Linear4bit,
    count_parameters,
    prepare_for_training,
)

_MARK = "_qlora_native_original"


def install() -> None:
    """Makes the replacements; a second call does nothing.

    Raises:
        AttributeError, TypeError: this version of PEFT has other internals; nothing is replaced.
    """
    if hasattr(BaseTuner.inject_adapter, _MARK):
        return
    _require_parameters(lora_model.dispatch_default, "target", "adapter_name", "config")
    _require_parameters(BaseTuner.__init__, "model", "peft_config", "adapter_name")
    _require_parameters(BaseTuner.inject_adapter, "model", "adapter_name")
    _require_parameters(peft_other.ModulesToSaveWrapper.update, "adapter_name")
    _require_parameters(
        BaseTuner._create_and_replace, "target", "target_name", "parent", "current_key"
    )
    dispatch_default = lora_model.dispatch_default
    initialize, inject_adapter = BaseTuner.__init__, BaseTuner.inject_adapter
    update_copy = peft_other.ModulesToSaveWrapper.update
    prepare = peft_other.prepare_model_for_kbit_training
    count = peft.PeftModel.get_nb_trainable_parameters

    @functools.wraps(dispatch_default)
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        parameter = kwargs.get("parameter_name")
        if parameter is None and isinstance(base, Linear4bit):
            return Linear(target, adapter_name, config=config, **kwargs)
        if parameter is None and isinstance(base, Embedding4bit):
            raise NotImplementedError(
                "LoRA on an Embedding4bit is not implemented: leave it out of target_modules, or "
                "out of quantization"
            )
        if parameter is not None and is_packed_stack(base, parameter):
            return ParamWrapper(target, adapter_name, config=config, **kwargs)
        if parameter is not None and getattr(base, parameter).dtype == torch.uint8:
            raise NotImplementedError(
                f"target_parameters names {parameter!r} of a {type(base).__name__}, which holds "
                "packed bytes: name the layer in target_modules"
            )
        return dispatch_default(target, adapter_name, config=config, **kwargs)

    @functools.wraps(initialize)
    def init(
        self: BaseTuner, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        # Before anything of the method looks at the model.
        refuse_untried(model, peft_config)
        initialize(self, model, peft_config, *args, **kwargs)

    @functools.wraps(inject_adapter)
    def inject(
        self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        refuse_untried(model, self.peft_config[adapter_name])
        # On the instance: every tuner has a method of its own.
        self.__dict__["_create_and_replace"] = functools.partial(
            create_and_replace_over_4bit, self._create_and_replace
        )
        try:
            return inject_adapter(self, model, adapter_name, *args, **kwargs)
        finally:
            del self.__dict__["_create_and_replace"]

    @functools.wraps(update_copy)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A copy to train is dense: packed codes have no gradients.
        original = self.original_module
        self._modules["original_module"] = dense_copy(original)
        try:
            return update_copy(self, *args, **kwargs)
        finally:
            original.requires_grad_(False)
            self._modules["original_module"] = original

    @functools.wraps(count)
    def count_elements(self: peft.PeftModel) -> tuple[int, int]:
        # Of packed bytes, PEFT would count half as many as there are weights.
        return count_parameters(self) if _has_4bit_layers(self) else count(self)

    @functools.wraps(prepare)
    def prepare_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        prepared = prepare(model, *args, **kwargs)
        _checkpoint_as_asked(prepared, inspect.signature(prepare).bind(model, *args, **kwargs))
        return prepared

    lora_model.dispatch_default = _marked(dispatch, dispatch_default)
    BaseTuner.__init__ = _marked(init, initialize)
    BaseTuner.inject_adapter = _marked(inject, inject_adapter)
    peft_other.ModulesToSaveWrapper.update = _marked(update, update_copy)
    peft.PeftModel.get_nb_trainable_parameters = _marked(count_elements, count)
    for module in (peft_other, peft.utils, peft):
        _replace(module, prepare, _marked(prepare_model, prepare))


def _checkpoint_as_asked(model: nn.Module, call: inspect.BoundArguments) -> None:
    """What PEFT does for the quantization methods it knows."""
    call.apply_defaults()
    if (
        getattr(model, "is_loaded_in_4bit", False)
        or not call.arguments["use_gradient_checkpointing"]
    ):
        return
    if _has_4bit_layers(model):
        options = call.arguments["gradient_checkpointing_kwargs"] or {}
        prepare_for_training(model, use_reentrant=options.get("use_reentrant", True))


def _has_4bit_layers(model: nn.Module) -> bool:
    return any(
        isinstance(module, (Embedding4bit, Experts4bit, Linear4bit)) for module in model.modules()
    )


def _require_parameters(function: Any, *names: str) -> None:
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise TypeError(f"{function.__qualname__} takes no {', '.join(missing)}")


def _marked(replacement: Any, original: Any) -> Any:
    setattr(replacement, _MARK, original)
    return replacement


def _replace(module: ModuleType, original: Any, replacement: Any) -> None:
    for name, value in list(vars(module).items()):
        if value is original:
            setattr(module, name, replacement)
