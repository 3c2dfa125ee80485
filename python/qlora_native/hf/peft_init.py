"""LoftQ: adapters that start as the best low-rank correction of the quantization error.

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization" (arXiv 2310.08659), algorithm 1. The
original weights come from a checkpoint, one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# First: importing PEFT brings `peft_lora`, which must not be half imported itself by then.
import peft  # noqa: F401
import torch
from torch import Tensor, nn

from qlora_native.hf.peft_lora import Linear

_WRAPPERS = "base_model.model."
# Beyond this the full decomposition takes minutes a layer; the largest singular values are enough.
_FULL_SVD_SIZE = 512


@dataclass(frozen=True)
class LoftqReport:
    """What `init_loftq` did.

    Attributes:
        errors: by path of the layer, the Frobenius norm of W - W_4bit relative to that of W, before
            and with the adapter.
    """

    errors: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        before, after = (sum(pair[i] for pair in self.errors.values()) for i in (0, 1))
        count = len(self.errors)
        return (
            f"LoftQ on {count} layers: mean relative error of the weights "
            f"{before / count:.4f} -> {after / count:.4f}"
        )


@torch.no_grad()
def init_loftq(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    adapter_name: str = "default",
    iterations: int = 1,
) -> LoftqReport:
    """Sets LoRA weights to what makes the 4-bit weights closest to the original ones.

    scaling * B A becomes the best approximation of rank r to W - dequantize(W_4bit).

    Args:
        model: a PEFT model with LoRA over 4-bit layers.
        source: the original weights: a safetensors file, a folder with one or with an index of
            several, or a mapping from names to tensors (another model's state dict).
        iterations: with more than 1, W - scaling * B A is quantized into the base in turn, which
            reduces the error further; the adapter is then worth something over this base only.

    Raises:
        ValueError: no 4-bit layer has that adapter, its scaling is 0, `iterations` < 1, or adapters
            are merged.
        KeyError: `source` lacks a layer's weight; layers before it are already set.
        FileNotFoundError: there is no safetensors file.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(f"no 4-bit layer of the model has a LoRA adapter {adapter_name!r}")
    for name, layer in layers.items():
        if layer.merged_adapters:
            raise ValueError(f"adapters {layer.merged_adapters} are merged into {name!r}: unmerge")
        if layer.scaling[adapter_name] == 0:
            raise ValueError(f"the scaling of {adapter_name!r} in {name!r} is 0: nothing can show")
    errors = {}
    with _reader(source) as read:
        for name, layer in layers.items():
            path = name.removeprefix(_WRAPPERS)
            weight = read(_candidates(model, path)).to(layer.weight.device, torch.float32)
            errors[path] = _fit(layer, weight, adapter_name, iterations)
    return LoftqReport(errors)


def _fit(layer: Linear, weight: Tensor, adapter: str, iterations: int) -> tuple[float, float]:
    base, scaling, rank = layer.base_layer, layer.scaling[adapter], layer.r[adapter]
    norm = weight.norm()
    before = (weight - base.dequantize(torch.float32)).norm() / norm
    correction = torch.zeros_like(weight)
    for step in range(iterations):
        if step > 0:
            base.requantize_(weight - correction)
        a, b = _low_rank(weight - base.dequantize(torch.float32), rank)
        correction = b @ a
    # scaling * B A is the correction; a negative scaling goes into B.
    root = abs(scaling) ** 0.5
    layer.lora_A[adapter].weight.copy_(a / root)
    layer.lora_B[adapter].weight.copy_(b / math.copysign(root, scaling))
    after = (weight - base.dequantize(torch.float32) - correction).norm() / norm
    return float(before), float(after)


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with B A nearest to `matrix` [out, in]."""
    if min(matrix.shape) <= max(_FULL_SVD_SIZE, 2 * rank):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, q=2 * rank, niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _candidates(model: nn.Module, path: str) -> list[str]:
    """Names that a checkpoint may have for the weight of the layer at `path`."""
    names = [f"{path}.weight"]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = getattr(inner, "base_model_prefix", "")
    if prefix:
        names += [names[0].removeprefix(f"{prefix}."), f"{prefix}.{names[0]}"]
    return names


@contextmanager
def _reader(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
) -> Iterator[Callable[[list[str]], Tensor]]:
    """Yield what returns the first tensor there is under one of the names."""
    if isinstance(source, Mapping):
        yield lambda names: _first(names, source, "the given tensors", source.__getitem__)
        return
    from safetensors import safe_open

    files = _safetensors_files(Path(source))
    opened: dict[Path, object] = {}

    def tensor(name: str) -> Tensor:
        file = files[name]
        if file not in opened:
            opened[file] = safe_open(file, framework="pt")
        return opened[file].get_tensor(name)

    yield lambda names: _first(names, files, str(source), tensor)


def _first(
    names: list[str], known: Mapping[str, object], where: str, get: Callable[[str], Tensor]
) -> Tensor:
    for name in names:
        if name in known:
            return get(name)
    raise KeyError(
        f"{where} has no tensor {names[0]!r}; there are such as {next(iter(known), None)!r}"
    )


def _safetensors_files(path: Path) -> dict[str, Path]:
    """The file of every tensor in a safetensors file or in a folder of them."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        return {name: path / file for name, file in names.items()}
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} is no safetensors file and no folder with one")
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found
