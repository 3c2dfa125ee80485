"""From options to a model on its device, dense or in 4 bits, by transformers' from_pretrained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

import qlora_native as qn
from qlora_native.cli.config_file import RUN_FILE, read_yaml
from qlora_native.cli.errors import InputError, allocating, is_out_of_memory, require
from qlora_native.cli.loading import Placement, first_line, hub_arguments, load_config
from qlora_native.hf import QLoRANativeConfig
from qlora_native.hf.bitsandbytes_models import bitsandbytes_config
from qlora_native.hf.config import QUANT_METHOD
from qlora_native.hf.meta import meta_model
from qlora_native.hf.packing import PackObserver, observe_packing
from qlora_native.nn import Linear4bit

_SETTINGS = ("quant_type", "block_size", "double_quant", "skip_modules")


@dataclasses.dataclass(frozen=True)
class FourBitLayers:
    """The 4-bit layers of a model: how many, and the bits that a weight of theirs takes."""

    count: int
    bits_per_weight: float


def four_bit_layers(model: torch.nn.Module) -> FourBitLayers:
    """Counts the 4-bit linear layers of `model`."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    elements = sum(layer.in_features * layer.out_features for layer in layers)
    size = sum(layer.quantized_weight().nbytes for layer in layers)
    return FourBitLayers(len(layers), 8 * size / elements if elements else 0.0)


def stored_quantization(model: str) -> QLoRANativeConfig | None:
    """How the model is stored in 4 bits; None for a dense one.

    Raises:
        InputError: it is quantized by something that is not read here.
    """
    stored = getattr(load_config(model), "quantization_config", None)
    if stored is None:
        return None
    if stored.get("quant_method") == QUANT_METHOD:
        return QLoRANativeConfig.from_dict(stored)
    if stored.get("load_in_4bit"):
        return QLoRANativeConfig.from_bnb(stored, checkpoint_format="bitsandbytes")
    raise InputError(
        f"--model {model}: it is quantized by {stored.get('quant_method')}, which is not read; "
        "give the dense model, or one in 4 bits of bitsandbytes"
    )


def adopt_quantization(options: Any) -> str | None:
    """Sets the quantization that the model or else the adapter has, where the user gave none.

    A model that is stored in 4 bits says its own. What an adapter was trained over is known for the
    output folder of `finetune` and for the checkpoints in it.

    Returns:
        What to tell a user who gave another quantization than that; usually None.

    Raises:
        InputError: settings cannot be read.
    """
    given = getattr(options, "given", frozenset())
    stored = stored_quantization(options.model)
    if stored is not None:
        found = {name: getattr(stored, name) for name in _SETTINGS[:3]}
        warning = _adopt(options, found, given, "the model is stored with", "they stay")
        # Also where others were given: what is recorded of a run is what it had.
        for name, value in found.items():
            setattr(options, name, value)
        return warning
    adapter = getattr(options, "adapter", None)
    if adapter is None or not options.quantize:
        return None
    folder = adapter.parent if adapter.name.startswith("checkpoint-") else adapter
    if not (folder / RUN_FILE).is_file():
        return None
    settings = read_yaml(folder / RUN_FILE, "--adapter")
    found = {name: settings[name] for name in _SETTINGS if name in settings}
    return _adopt(options, found, given, "the adapter was trained over", "results will differ")


def _adopt(
    options: Any, found: dict[str, Any], given: frozenset[str], whose: str, consequence: str
) -> str | None:
    others = []
    for name, value in found.items():
        asked = getattr(options, name)
        if value == asked:
            continue
        if name in given:
            others.append(f"{name} {value}, not {asked}")
        else:
            setattr(options, name, value)
    return f"Warning: {whose} {'; '.join(others)}: {consequence}." if others else None


def quantization_config(options: Any, **settings: Any) -> QLoRANativeConfig:
    """What the options say, for from_pretrained."""
    names = [name.strip() for name in options.skip_modules.split(",") if name.strip()]
    arguments = {
        "quant_type": options.quant_type,
        "block_size": options.block_size,
        "double_quant": options.double_quant,
        "modules_to_not_convert": names,
    }
    return QLoRANativeConfig(**(arguments | settings))


def load_model(
    model: str,
    where: Placement,
    config: QLoRANativeConfig | None,
    progress: PackObserver | None = None,
    **arguments: Any,
) -> Any:
    """The model on its device; quantized by `config`, unless that is None or it is already.

    Weights are mapped from the files and quantized one by one on the device.

    Args:
        progress: sees what is quantized.
        arguments: of from_pretrained.

    Raises:
        InputError: weights are missing or not finite, or their shapes disagree with the
            configuration.
        OutOfMemoryError: the model does not fit.
    """
    stored = stored_quantization(model)
    if stored is not None and stored.checkpoint_format == "bitsandbytes":
        arguments["config"] = bitsandbytes_config(model, **hub_arguments(model))
    elif stored is None and config is not None:
        arguments["quantization_config"] = config
    what = f"loading {model}" if config is None else f"loading {model} in 4 bits"
    with (
        allocating(
            f"{what} on {where.device}",
            "use a machine with more memory, --device cpu, or a smaller model.",
        ),
        observe_packing(progress or PackObserver()),
    ):
        try:
            loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
                model,
                dtype=where.dtype,
                device_map={"": where.device},
                output_loading_info=True,
                # Its own exception does not name the tensors; the check below does.
                ignore_mismatched_sizes=True,
                **arguments,
                **hub_arguments(model),
            )
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise InputError(f"--model {model}: {first_line(error)}") from error
    _check_loaded(model, info)
    if stored is not None and config is None:
        loaded = loaded.dequantize(where.dtype)
    return loaded


def _check_loaded(model: str, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    require(
        not missing,
        f"--model {model}: its files lack {len(missing)} tensors: {', '.join(missing[:3])}",
    )
    mismatched = [
        f"{name} is {tuple(in_file)} in the file and {tuple(in_model)} by config.json"
        for name, in_file, in_model in sorted(info["mismatched_keys"])
    ]
    require(
        not mismatched,
        f"--model {model}: {len(mismatched)} tensors have another shape than the model: "
        f"{'; '.join(mismatched[:3])}",
    )


def load_quantized(options: Any, where: Placement, progress: PackObserver | None) -> Any:
    """The model in 4 bits by the options, computing in the dtype of `where`.

    Raises:
        InputError: as `load_model`, or there is nothing to quantize.
    """
    config = quantization_config(options, compute_dtype=where.dtype)
    model = load_model(options.model, where, config, progress)
    require(
        four_bit_layers(model).count > 0,
        f"--model {options.model}: it has no linear layer to quantize",
    )
    for module in model.modules():
        # A model that was stored in 4 bits has its own; a run has one.
        if isinstance(module, Linear4bit):
            module.compute_dtype = where.dtype
    return model


def without_weights(options: Any, where: Placement) -> Any:
    """The model that `load_quantized` gives, on the meta device."""
    return meta_model(
        load_config(options.model),
        own_quantization(options, where.dtype),
        where.dtype,
        counts=False,
    )


def own_quantization(options: Any, compute_dtype: Any = None) -> QLoRANativeConfig:
    """How the model is stored in 4 bits, all of it; where it is dense, by the options."""
    stored = stored_quantization(options.model)
    if stored is None:
        return quantization_config(options, compute_dtype=compute_dtype)
    if compute_dtype is not None:
        stored.compute_dtype = compute_dtype
    return stored


def load_for_inference(options: Any, where: Placement, progress: PackObserver | None) -> Any:
    """The model, quantized unless the options say otherwise, with the adapter when there is one.

    Raises:
        InputError: as `load_model`, or the adapter does not fit the model.
    """
    from qlora_native.cli.loading import check_adapter

    if options.adapter is not None:
        check_adapter(options.adapter)
    if options.quantize:
        model = load_quantized(options, where, progress)
    else:
        model = load_model(options.model, where, None)
    if options.adapter is not None:
        load_adapter(model, options.adapter)
    return model.eval()


def load_adapter(model: Any, folder: Path) -> None:
    """Reads the adapter into the model.

    Raises:
        InputError: it does not fit.
    """
    try:
        qn.load_adapter(model, folder)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"--adapter {folder}: {error}") from error
