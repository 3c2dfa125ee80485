"""Models in bitsandbytes' 4-bit checkpoints: loading them without it, and writing them for it.

There are two doors, since transformers gives such a checkpoint to bitsandbytes by itself:
`bitsandbytes_config(path)` is passed to one `from_pretrained`, and `use_in_place_of_bitsandbytes()`
takes every one of the process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora_native.functional import QuantizedTensor
from qlora_native.hf.bitsandbytes_format import COMPANIONS, read_quantized, write_quantized
from qlora_native.hf.config import QLoRANativeConfig
from qlora_native.hf.layer_kinds import kind_of
from qlora_native.nn.linear import Linear4bit, state_of

_METHOD = "bitsandbytes_4bit"
_SETTINGS = ("quant_type", "block_size", "double_quant")


def bitsandbytes_config(path: str | os.PathLike[str], **arguments: Any) -> Any:
    """The configuration of a model that bitsandbytes quantized to 4 bits, for loading it here.

        config = qlora_native.hf.bitsandbytes_config(path)
        model = AutoModelForCausalLM.from_pretrained(path, config=config)

    Args:
        path: a folder or a model id of the hub.
        arguments: of AutoConfig.from_pretrained.

    Raises:
        ValueError: the model was not quantized by bitsandbytes, or to 8 bits.
    """
    config = AutoConfig.from_pretrained(path, **arguments)
    # A model of several parts may keep it with its text model.
    holder = config
    if getattr(holder, "quantization_config", None) is None:
        holder = config.get_text_config(decoder=True)
    theirs = getattr(holder, "quantization_config", None)
    if not isinstance(theirs, Mapping) or theirs.get("quant_method") != "bitsandbytes":
        raise ValueError(f"{path}: config.json says that bitsandbytes quantized it nowhere")
    ours = QLoRANativeConfig.from_bnb(theirs)
    holder.quantization_config = {
        **ours.to_dict(),
        "checkpoint_format": "bitsandbytes",
        "bnb_4bit_quant_storage": theirs.get("bnb_4bit_quant_storage"),
    }
    return config


def use_in_place_of_bitsandbytes(enabled: bool = True) -> None:
    """Has `from_pretrained` come here for all that BitsAndBytesConfig means in 4 bits, or not.

    That is checkpoints which bitsandbytes wrote, and BitsAndBytesConfig(load_in_4bit=True) as
    `quantization_config`. 8 bits are left to bitsandbytes. Affects the whole process.
    """
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    from qlora_native.hf.quantizer import BitsAndBytesQuantizer

    AUTO_QUANTIZER_MAPPING[_METHOD] = BitsAndBytesQuantizer if enabled else Bnb4BitHfQuantizer


def save_for_bitsandbytes(model: Any, folder: str | os.PathLike[str], **arguments: Any) -> None:
    """Saves a 4-bit transformers model in bitsandbytes' format, which transformers then loads.

    Args:
        arguments: of `save_pretrained`.

    Raises:
        ValueError: the model is not in 4 bits, or has parts that bitsandbytes cannot store.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, QLoRANativeConfig):
        raise ValueError(
            f"{type(model).__name__} was not loaded with QLoRANativeConfig: nothing to save in "
            "bitsandbytes' format"
        )
    before = config.checkpoint_format
    config.checkpoint_format = "bitsandbytes"
    try:
        model.save_pretrained(folder, **arguments)
    finally:
        config.checkpoint_format = before


def bitsandbytes_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model` with every Linear4bit as bitsandbytes stores it.

    Raises:
        ValueError: another module is in 4 bits, or a quantization type is not bitsandbytes'.
    """
    state: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    ours = {f"{name}.{key}" for name in layers for key in ("weight_absmax", "weight_absmax2")}
    for name, tensor in model.state_dict().items():
        path, _, key = name.rpartition(".")
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded; load the model without a disk to save it")
        if name in ours:
            continue
        if key == "weight" and path in layers:
            try:
                packed, companions = write_quantized(layers[path].quantized_weight())
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            state[name] = packed
            state |= {f"{name}.{part}": value for part, value in companions.items()}
        elif tensor.dtype == torch.uint8 and kind_of(model.get_submodule(path)) is not None:
            raise ValueError(f"{name} is in 4 bits, which bitsandbytes does for linear layers only")
        else:
            state[name] = tensor
    return state


class ReadBitsandbytes(ConversionOps):
    """Makes the state of a Linear4bit of the tensors that bitsandbytes stored for it."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadBitsandbytes:
        # transformers copies the operation for every tensor; the quantizer collects the failures.
        return self

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """{pattern: tensor} of one weight to {full name: parameter}."""
        tensors = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        weight = tensors.pop("weight", None)
        companions = {key.removeprefix("weight."): value for key, value in tensors.items()}
        module, _ = get_module_from_name(model, full_layer_name)
        if not companions and not isinstance(module, Linear4bit):
            dtype = model.get_parameter_or_buffer(full_layer_name).dtype
            return {"weight": weight.to(dtype) if weight.is_floating_point() else weight}
        try:
            state = self._read(module, weight, companions)
        except ValueError as error:
            self.hf_quantizer.failures.append(ValueError(f"{full_layer_name}: {error}"))
            return {}
        if missing_keys is not None and module.weight_absmax2 is None:
            missing_keys.discard(f"{full_layer_name}_absmax2")
        prefix = full_layer_name.removesuffix("weight")
        return {prefix + key: nn.Parameter(t, requires_grad=False) for key, t in state.items()}

    def _read(
        self, module: nn.Module, weight: Tensor | None, companions: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if not isinstance(module, Linear4bit):
            raise ValueError("it is in 4 bits, but config.json says that it is not")
        if weight is None or not companions:
            raise ValueError("config.json says that it is in 4 bits, but parts of that are missing")
        q = read_quantized(weight, companions)
        if tuple(q.shape) != (module.out_features, module.in_features):
            raise ValueError(
                f"the checkpoint has shape {tuple(q.shape)}, the model "
                f"({module.out_features}, {module.in_features})"
            )
        _adopt(module, q)
        return state_of(q)


def weight_converters(quantizer: Any) -> list[WeightConverter]:
    """What has transformers collect the tensors of each weight for `ReadBitsandbytes`."""
    # "weight" last: it is a part of all the others, and the first match counts.
    patterns = [*(f"weight.{name}" for name in COMPANIONS), "weight"]
    return [WeightConverter(patterns, "weight", operations=[ReadBitsandbytes(quantizer)])]


def settle(model: Any, config: QLoRANativeConfig) -> None:
    """Makes the configuration say what was read, and saving come out in our format."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    found = {n: tuple(getattr(m, key) for key in _SETTINGS) for n, m in layers.items()}
    config.checkpoint_format = "native"
    if found:
        usual = Counter(found.values()).most_common(1)[0][0]
        config.quant_type, config.block_size, config.double_quant = usual
        config.overrides = {
            name: dict(zip(_SETTINGS, values, strict=True))
            for name, values in found.items()
            if values != usual
        }
    # Undone on saving otherwise, which is for tensors in the format that was loaded.
    model._weight_conversions = [
        conversion
        for conversion in model._weight_conversions
        if not any(isinstance(op, ReadBitsandbytes) for op in getattr(conversion, "operations", ()))
    ]


def expect_storage(layer: Linear4bit, storage: torch.dtype) -> None:
    """A placeholder (meta) for packed bytes that are declared as another dtype than uint8.

    transformers would convert the numbers of a floating tensor to the dtype of the placeholder.
    """
    elements = layer.weight.numel() // storage.itemsize
    placeholder = torch.empty(elements, 1, dtype=storage, device="meta")
    layer.weight = nn.Parameter(placeholder, requires_grad=False)


def _adopt(layer: Linear4bit, q: QuantizedTensor) -> None:
    """Gives the layer the settings of `q`, which a bitsandbytes config does not fully say."""
    layer.quant_type, layer.block_size = q.quant_type, q.block_size
    layer.weight_dtype, layer.double_quant = q.dtype, q.double_quant
    if not q.double_quant:
        layer.weight_absmax2 = None
    elif layer.weight_absmax2 is None:
        empty = torch.empty(0, dtype=torch.uint8, device="meta")
        layer.weight_absmax2 = nn.Parameter(empty, requires_grad=False)
