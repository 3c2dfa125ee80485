"""What transformers asks of a quantization method, for models loaded with QLoRANativeConfig.

Loading builds the model on the meta device, puts 4-bit modules in place of dense ones, and packs
each tensor as it is read: no more than the packed model and one dense tensor are in memory.
"""

from __future__ import annotations

import re
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import logging

from qlora_native.hf import bitsandbytes_models, moe
from qlora_native.hf.config import QUANT_METHOD, QLoRANativeConfig
from qlora_native.hf.embeddings import tie_parts, token_embeddings
from qlora_native.hf.layer_kinds import KINDS, kind_of, stays_dense
from qlora_native.hf.model_card import attach_card
from qlora_native.hf.packing import (
    PackOnLoad,
    current_observer,
    pack_new_weights,
    raise_first,
)
from qlora_native.nn.adapters import count_parameters
from qlora_native.nn.experts import Experts4bit
from qlora_native.nn.lora import LoraLinear

logger = logging.get_logger("qlora_native")


_OLDEST, _TOO_NEW = (5, 10), (6,)
_OVERRIDDEN = (
    "_dequantize",
    "_process_model_after_weight_loading",
    "_process_model_before_weight_loading",
    "adjust_max_memory",
    "get_quantize_ops",
    "get_state_dict_and_metadata",
    "get_weight_conversions",
    "is_serializable",
    "param_element_size",
    "param_needs_quantization",
    "update_device_map",
    "validate_environment",
)


def register() -> None:
    """Makes transformers know the method. Calling it again changes nothing.

    Raises:
        RuntimeError: the version of transformers is outside of what is supported.
        AttributeError: it does not ask a quantizer what it used to.
    """
    # Not at the top: this module may be imported before transformers has put its lazy module in its
    # own place.
    import transformers

    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if not _OLDEST <= version < _TOO_NEW:
        raise RuntimeError(
            f"transformers {transformers.__version__} is not one of 5.10 to 5.x, as supported"
        )
    moved = [name for name in _OVERRIDDEN if not hasattr(HfQuantizer, name)]
    if moved:
        raise AttributeError(f"transformers' HfQuantizer has no {', '.join(moved)} any more")
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, QLoRANativeConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, QLoRANativeQuantizer)


class QLoRANativeQuantizer(HfQuantizer):
    """Loads, saves and dequantizes models whose linear layers are in 4 bits."""

    requires_calibration = False
    quantization_config: QLoRANativeConfig

    def __init__(self, quantization_config: Any, **arguments: Any) -> None:
        super().__init__(quantization_config, **arguments)
        self.failures: list[Exception] = []
        self._shapes: dict[str, torch.Size] = {}
        self._model: weakref.ref[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None}

    # ---- before loading ----

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuses what transformers cannot do.

        Raises:
            ValueError: weights are to be quantized and offloaded to the disk at once.
        """
        if not self.pre_quantized and isinstance(device_map, dict):
            self._refuse_disk(device_map)

    def _refuse_disk(self, device_map: dict[str, Any]) -> None:
        modules = [
            name or "the whole model" for name, where in device_map.items() if where == "disk"
        ]
        if modules:
            # transformers would go on reading the dense tensor of the original file.
            raise ValueError(
                f"device_map puts {len(modules)} modules on the disk ({modules[0]}, ...), which "
                "transformers cannot do while quantizing. Quantize once and save (qlora-native "
                "quantize MODEL OUT, or save_pretrained), then load that with the same device_map."
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Without a device_map: the current GPU, or the CPU when there is none."""
        if device_map is not None:
            return device_map
        if torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return {"": "cpu"}

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leaves a tenth of each device for the dense tensors that pass through it."""
        return {
            device: value * 0.9 if isinstance(value, (int, float)) else value
            for device, value in max_memory.items()
        }

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element on the device: a placeholder of a dense weight will take 4 bits."""
        if not self.pre_quantized and self.param_needs_quantization(model, param_name):
            return 0.5
        return param.element_size()

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, **_: Any
    ) -> None:
        self._model = weakref.ref(model)
        config = self.quantization_config
        skip = self.get_modules_to_not_convert(
            model, config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        tied = _tied_modules(model)
        embeddings = set()
        if config.quantize_embeddings:
            embeddings = token_embeddings(model, config.modules_to_not_convert)
        self.modules_to_not_convert = skip
        replaced = 0
        for name, module in list(model.named_modules()):
            if name not in embeddings and (
                isinstance(module, nn.Embedding) or name in tied or stays_dense(name, skip)
            ):
                continue
            layer = self._make(name, module)
            if layer is None:
                continue
            model.set_submodule(name, layer)
            replaced += 1
            if self.pre_quantized:
                # Uninitialized bytes are no weight: what is missing is told after loading.
                layer._is_hf_initialized = True
                self._expect_packed(name, layer)
            else:
                kind_of(layer).expect_dense(layer, _dense_dtype(layer, dtype))
        tie_parts(model)
        if not self.pre_quantized:
            current_observer().begin(replaced)
        if not replaced:
            logger.warning(
                f"{type(model).__name__} has no layer to quantize outside of {sorted(skip)}"
            )

    def _make(self, name: str, module: nn.Module) -> nn.Module | None:
        settings = self.quantization_config.layer_settings(name)
        for kind in KINDS:
            if self._reads_bitsandbytes and isinstance(kind, moe.ExpertsKind):
                continue  # its checkpoints hold them dense
            layer = kind.make(name, module, settings)
            if layer is not None:
                return layer
        return None

    def _expect_packed(self, name: str, layer: nn.Module) -> None:
        storage = self.quantization_config.quant_storage
        if not self._reads_bitsandbytes:
            parts = layer.named_parameters(recurse=False)
            self._shapes |= {f"{name}.{key}": part.shape for key, part in parts}
        elif storage != torch.uint8:
            bitsandbytes_models.expect_storage(layer, storage)

    @property
    def _reads_bitsandbytes(self) -> bool:
        return self.pre_quantized and self.quantization_config.checkpoint_format == "bitsandbytes"

    # ---- while loading ----

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether the parameter is the placeholder of a dense tensor to pack.

        For a checkpoint of bitsandbytes: whether it is of a 4-bit module, for transformers does not
        compare the shapes of such parameters, and the checkpoint's are others.
        """
        module, tensor_name = get_module_from_name(model, param_name)
        kind = kind_of(module)
        if kind is None:
            return False
        if self.pre_quantized:
            return self._reads_bitsandbytes and tensor_name != "bias"
        return kind.is_dense(module, tensor_name)

    def get_weight_conversions(self) -> list[Any]:
        """The operations that read another format than ours."""
        return bitsandbytes_models.weight_converters(self) if self._reads_bitsandbytes else []

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> list[Any]:
        """The conversions of the model's checkpoint; experts are packed before they are stacked."""
        # The model is not passed before transformers 5.18.
        conversions = super().update_weight_conversions(weight_conversions, *model)
        if self.pre_quantized:
            return conversions
        return moe.pack_while_stacking(conversions, self._model(), self.failures)

    def get_quantize_ops(self) -> ConversionOps:
        """The operation for one parameter."""
        return PackOnLoad(self.failures)

    # ---- after loading ----

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        raise_first(self.failures)
        if self.pre_quantized:
            _require_loaded(model, self._shapes)
            if self._reads_bitsandbytes:
                bitsandbytes_models.settle(model, self.quantization_config)
        else:
            self._refuse_disk(getattr(model, "hf_device_map", {}))
            pack_new_weights(model)
            moe.keep_stacks_when_saving(model)
        model.num_parameters = types.MethodType(num_parameters, model)
        attach_card(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # Saving leaves the dtype of a configuration as a name.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, module in list(model.named_modules()):
            kind = kind_of(module)
            if kind is not None:
                model.set_submodule(name, kind.to_dense(module, dtype))
        model.tie_weights()
        for name in ("num_parameters", "save_pretrained"):
            model.__dict__.pop(name, None)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict]:
        """(what save_pretrained writes, metadata of the files); None: the model's state dict."""
        if self.quantization_config.checkpoint_format == "bitsandbytes":
            return bitsandbytes_models.bitsandbytes_state_dict(model), {}
        return None, {}

    def is_serializable(self, **_: Any) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters over the model train."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer is to take the model without PEFT: when it has adapters of ours."""
        model = self._model() if self._model is not None else None
        return model is not None and any(isinstance(m, LoraLinear) for m in model.modules())

    @property
    def is_compileable(self) -> bool:
        """torch.compile works, also inside of generate with a static cache."""
        return True


class BitsAndBytesQuantizer(QLoRANativeQuantizer):
    """The same for models with a BitsAndBytesConfig, in 4 bits."""

    def __init__(self, quantization_config: Any, **arguments: Any) -> None:
        pre_quantized = arguments.get("pre_quantized", True)
        config = QLoRANativeConfig.from_bnb(
            quantization_config, checkpoint_format="bitsandbytes" if pre_quantized else "native"
        )
        super().__init__(config, **arguments)


def num_parameters(
    model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Number of parameters, a 4-bit weight counted by its elements and not by its bytes."""
    trainable, total = count_parameters(model)
    count = trainable if only_trainable else total
    if not exclude_embeddings:
        return count
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    parts = [count_parameters(module) for module in embeddings]
    return count - sum(part[0] if only_trainable else part[1] for part in parts)


def _require_loaded(model: Any, shapes: dict[str, torch.Size]) -> None:
    advice = "it is incomplete, or config.json's quantization_config does not describe it"
    parts = {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if kind_of(module) is not None
        for key, parameter in module.named_parameters(recurse=False)
        # What was offloaded to the disk is still on the meta device.
        if not parameter.is_meta
    }
    missing = [n for n, part in parts.items() if not getattr(part, "_is_hf_initialized", False)]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors of 4-bit layers, such as {missing[0]}: "
            f"{advice}"
        )
    # Not all versions of transformers compare shapes in a quantized model.
    for name, part in parts.items():
        if part.shape != shapes.get(name, part.shape):
            raise ValueError(
                f"the checkpoint's {name} has shape {tuple(part.shape)}, the model "
                f"{tuple(shapes[name])}: {advice}"
            )


def _dense_dtype(layer: nn.Module, dtype: torch.dtype | None) -> torch.dtype:
    if isinstance(layer, Experts4bit):
        return dtype or next(iter(layer.formats.values())).dtype
    return dtype or layer.weight_dtype


def _tied_modules(model: Any) -> set[str]:
    """Paths of the modules that share a weight with another one."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name.rpartition(".")[0] for name in (*tied.keys(), *tied.values())}
