"""LoRA adapters as files in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT loads what is written here onto the dense model, and adapters that PEFT wrote load here as long
as they are plain LoRA: an option that would change the result and is not implemented is refused by
name. Keys are `base_model.model.<path of the layer>.lora_A.weight` [r, in] and `.lora_B.weight`
[out, r]; biases that were trained are `<path>.base_layer.bias` for adapted layers and their plain
path for others.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native._files import atomic_write
from qlora_native.nn.adapters import (
    LoraReport,
    bias_parameters,
    count_parameters,
    install_adapter,
    set_adapter,
)
from qlora_native.nn.lora import BIAS_MODES, LoraLinear, LoraSettings
from qlora_native.nn.sharding import copy_whole_, whole
from qlora_native.nn.targets import is_or_ends_in, linear_layers, lora_layers

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_WEIGHT_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<part>[AB])\.weight")

# Options that say nothing about the result once the keys and shapes in the file are known.
_IRRELEVANT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights"}
# Initializations that leave the base weight as it is; PiSSA, OLoRA, LoftQ and others replace it.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base_model_name_or_path: str | None = None,
    adapter_name: str = "default",
    overwrite: bool = False,
) -> None:
    """Writes an adapter of `model` to the folder `path`, which is made when missing.

    Both files are complete under temporary names before either takes its place. Of a model that is
    split over ranks every rank calls it, each with a folder of its own: all have the whole adapter.

    Args:
        base_model_name_or_path: what the config names as the base; the transformers config's
            `_name_or_path` when None.
        overwrite: replace an adapter that is in the folder.

    Raises:
        KeyError: no layer has an adapter of that name.
        FileExistsError: the folder holds an adapter, without `overwrite`.
        NotADirectoryError: `path` is a file.
    """
    layers = {n: layer for n, layer in lora_layers(model) if adapter_name in layer.settings}
    if not layers:
        raise KeyError(f"no adapter {adapter_name!r} in the model: nothing to save")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder for the adapter")
    existing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if (folder / name).exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{folder} already holds {existing}; pass overwrite=True to replace")
    config = _config_of(model, layers, adapter_name, base_model_name_or_path)
    tensors = _adapter_tensors(model, layers, adapter_name)
    safetensors = _safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    with (
        atomic_write(folder / CONFIG_NAME) as config_path,
        atomic_write(folder / WEIGHTS_NAME) as weights_path,
    ):
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        safetensors.torch.save_file(tensors, weights_path, metadata={"format": "pt"})


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    adapter_dtype: torch.dtype | None = None,
) -> LoraReport:
    """Reads an adapter from the folder `path` into `model`, and makes it the only active one.

    An adapter of that name that is there already gets the new values in place, if it is on the same
    layers with the same settings; optimizers that hold its parameters stay valid. Biases in the
    file replace those of the base model. Everything but the adapter is frozen.

    Args:
        trainable: whether the adapter (and its biases) require gradients.
        adapter_dtype: dtype of the adapter's weights; the file's when None.

    Raises:
        FileNotFoundError: a file is missing.
        NotImplementedError: the adapter is of another kind or uses an option that is not
            implemented; the message names it.
        ValueError: a file is damaged or holds NaN or infinity, or its keys or shapes do not fit
            the model or the config.
        RuntimeError: adapters are merged.
        In every case the model is as it was.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG_NAME)
    settings = _settings_of(config, folder / CONFIG_NAME)
    tensors = _read_tensors(folder / WEIGHTS_NAME)
    weights, biases = _match_tensors(model, tensors, settings, folder / WEIGHTS_NAME)
    _check_all_targets(model, config, weights, folder / WEIGHTS_NAME)
    existing = {n: layer for n, layer in lora_layers(model) if adapter_name in layer.settings}
    if existing:
        _check_same(existing, weights, settings, adapter_name, adapter_dtype)
        set_adapter(model, adapter_name, trainable=trainable)
        report = LoraReport(tuple(weights), *count_parameters(model))
    else:
        dtype = adapter_dtype or next(iter(weights.values()))[0].dtype
        report = install_adapter(
            model, dict.fromkeys(weights, settings), adapter_name, dtype=dtype, trainable=trainable
        )
    layers = linear_layers(model)
    for name, (a, b) in weights.items():
        copy_whole_(layers[name].lora_A[adapter_name].weight, a)
        copy_whole_(layers[name].lora_B[adapter_name].weight, b)
    for parameter, value in biases:
        copy_whole_(parameter, value)
    return report


# ---- writing ----


def _file_path(name: str) -> str:
    """The path of a module in the model that was compiled, if it was."""
    return name.replace("_orig_mod.", "")


def _config_of(
    model: nn.Module,
    layers: Mapping[str, LoraLinear],
    adapter_name: str,
    base_model_name_or_path: str | None,
) -> dict[str, Any]:
    settings = next(iter(layers.values())).settings[adapter_name]
    others = [n for n, layer in layers.items() if layer.settings[adapter_name] != settings]
    if others:
        raise NotImplementedError(
            f"adapter {adapter_name!r} has other settings on {others[0]!r} than on "
            f"{next(iter(layers))!r}: rank_pattern and alpha_pattern are not implemented"
        )
    if base_model_name_or_path is None:
        # transformers leaves an empty string on a model that was not loaded from anywhere.
        base_model_name_or_path = (
            getattr(getattr(model, "config", None), "_name_or_path", "") or None
        )
    is_causal_lm = type(model).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal_lm else None,
        "base_model_name_or_path": base_model_name_or_path,
        "r": settings.r,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "bias": settings.bias,
        "target_modules": _target_modules(model, layers),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _target_modules(model: nn.Module, layers: Mapping[str, LoraLinear]) -> list[str] | str:
    """What makes PEFT choose exactly these layers: short names if they do, else a pattern."""
    inside = tuple(f"{name}." for name, _ in lora_layers(model))
    chosen = {_file_path(name) for name in layers}
    modules = {_file_path(n) for n, _ in model.named_modules() if n and not n.startswith(inside)}
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in chosen})
    meant = {n for n in modules if n.rsplit(".", 1)[-1] in suffixes}
    return suffixes if meant == chosen else "|".join(map(re.escape, sorted(chosen)))


def _adapter_tensors(
    model: nn.Module, layers: Mapping[str, LoraLinear], adapter_name: str
) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_A[adapter_name].weight
        tensors[f"{name}.lora_B.weight"] = layer.lora_B[adapter_name].weight
    mode = next(iter(layers.values())).settings[adapter_name].bias
    tensors |= dict(bias_parameters(model, mode))
    # Copies: safetensors refuses tensors that share storage, as tied biases do.
    return {
        _PREFIX + _file_path(name): whole(tensor.detach()).cpu().contiguous().clone()
        for name, tensor in tensors.items()
    }


# ---- reading ----


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: not a folder with an adapter")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected an object")
    return config


def _settings_of(config: Mapping[str, Any], path: Path) -> LoraSettings:
    if config.get("peft_type") != "LORA":
        raise NotImplementedError(
            f"{path}: peft_type={config.get('peft_type')!r}; only LORA is read"
        )
    for option, value in config.items():
        # PEFT writes every option it knows; the unused ones are null, false or empty.
        if value and option not in _IRRELEVANT | _READ:
            raise NotImplementedError(f"{path}: option {option}={value!r} is not implemented")
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise NotImplementedError(
            f"{path}: init_lora_weights={init!r} changes the base weights, which is not implemented"
        )
    try:
        return LoraSettings(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            use_rslora=bool(config.get("use_rslora", False)),
            bias=config.get("bias", BIAS_MODES[0]),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no option {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _safetensors() -> ModuleType:
    """Return safetensors, which only files need: the core needs torch and numpy alone."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("adapter files need safetensors: pip install safetensors") from error
    return safetensors


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found (pickled adapter_model.bin files are not read)")
    safetensors = _safetensors()
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _match_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], settings: LoraSettings, path: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[tuple[nn.Parameter, Tensor]]]:
    """({path of a layer: (A, B)}, [(bias, value)]), all shapes checked against the model."""
    layers = {_file_path(name): (name, layer) for name, layer in linear_layers(model).items()}
    biases = _biases_of(model) if settings.bias != "none" else {}
    weights: dict[str, dict[str, Tensor]] = {}
    bias_values: list[tuple[nn.Parameter, Tensor]] = []
    unknown: list[str] = []
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _WEIGHT_KEY.fullmatch(name)
        if match and match["path"] in layers and key != name:
            layer_name, layer = layers[match["path"]]
            shapes = {"A": (settings.r, layer.in_features), "B": (layer.out_features, settings.r)}
            _check_tensor(path, key, tensor, shapes[match["part"]])
            weights.setdefault(layer_name, {})[match["part"]] = tensor
        elif name in biases and key != name:
            _check_tensor(path, key, tensor, tuple(biases[name].shape))
            bias_values.append((biases[name], tensor))
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} of {len(tensors)} tensors have no place in the model, such as "
            f"{unknown[0]!r} {tuple(tensors[unknown[0]].shape)}; bias={settings.bias!r}; the "
            f"model's linear layers are such as {next(iter(layers), None)!r}"
        )
    incomplete = [n for n, parts in weights.items() if len(parts) != 2]
    if incomplete:
        missing = "B" if "A" in weights[incomplete[0]] else "A"
        raise ValueError(f"{path}: {_PREFIX}{incomplete[0]}.lora_{missing}.weight is missing")
    if not weights:
        raise ValueError(f"{path} holds no LoRA weights")
    return {n: (parts["A"], parts["B"]) for n, parts in weights.items()}, bias_values


def _check_all_targets(
    model: nn.Module, config: Mapping[str, Any], weights: Mapping[str, object], path: Path
) -> None:
    """Raises ValueError when a layer that the config targets has no weights in the file."""
    targets = config.get("target_modules")
    # These choose among the targets, by rules of PEFT's; the file alone says which it chose.
    if not targets or config.get("layers_to_transform") or config.get("exclude_modules"):
        return
    for name in linear_layers(model):
        plain = _file_path(name)
        if isinstance(targets, str):
            is_target = re.fullmatch(targets, plain)
        else:
            is_target = any(is_or_ends_in(plain, entry) for entry in targets)
        if is_target and name not in weights:
            raise ValueError(
                f"{path}: {_PREFIX}{plain}.lora_A.weight is missing, though the config's "
                f"target_modules={targets!r} means that layer"
            )


def _biases_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating parameters with "bias" in their path, by the path an adapter file gives them.

    The bias of a linear layer is known by both paths, since the layer may not be adapted yet.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if "bias" in name and parameter.is_floating_point():
            plain = _file_path(name).replace(".base_layer.", ".")
            found[plain] = parameter
            found[re.sub(r"\.bias$", ".base_layer.bias", plain)] = parameter
    return found


def _check_tensor(path: Path, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{path}: {key} has shape {tuple(tensor.shape)}, the model and config need {expected}"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{path}: {key} is {tensor.dtype}, expected a floating dtype")
    # As fp64, which holds every dtype's values: not all of the 8-bit ones have isfinite.
    bad = tensor.numel() - int(tensor.double().isfinite().sum())
    if bad:
        raise ValueError(f"{path}: {key} has {bad} NaN or infinite values of {tensor.numel()}")


def _check_same(
    existing: Mapping[str, LoraLinear],
    weights: Mapping[str, object],
    settings: LoraSettings,
    adapter_name: str,
    adapter_dtype: torch.dtype | None,
) -> None:
    if set(existing) != set(weights):
        name = sorted(set(existing) ^ set(weights))[0]
        side = "model" if name in existing else "file"
        raise ValueError(
            f"adapter {adapter_name!r} exists on other layers: {name!r} has it in the {side} only"
        )
    for name, layer in existing.items():
        if layer.settings[adapter_name] != settings:
            raise ValueError(
                f"adapter {adapter_name!r} exists on {name!r} with "
                f"{layer.settings[adapter_name]}, the file has {settings}"
            )
        dtype = layer.lora_A[adapter_name].weight.dtype
        if adapter_dtype not in (None, dtype):
            raise ValueError(
                f"adapter {adapter_name!r} exists in {dtype}, but adapter_dtype={adapter_dtype}"
            )
