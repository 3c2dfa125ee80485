"""Kinds of modules that become 4-bit ones, and what a loaded tensor becomes in them.

A kind makes the 4-bit module in place of a dense one on the meta device, packs a dense tensor that
a checkpoint holds into that module's state, and gives the dense module back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.functional import QuantizedTensor, quantize_4bit
from qlora_native.nn.embedding import Embedding4bit, dense_embedding
from qlora_native.nn.linear import Linear4bit, state_of
from qlora_native.nn.lora import dense_linear


def stays_dense(name: str, entries: Iterable[str]) -> bool:
    """Whether `modules_to_not_convert` names the module: by its path or the path of a module around
    it, either as a pattern, or by the end of its path.

    transformers has such a function, whose older versions (5.10) take "layers.1" for "layers.11"
    as well: a stored model would mean something else there.
    """
    return any(
        re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(entry)
        for entry in entries
    )


class LayerKind:
    """What the quantizer asks of a kind of module."""

    def make(self, name: str, module: nn.Module, settings: dict[str, Any]) -> nn.Module | None:
        """A 4-bit module on the meta device for `module`, or None when it is of another kind.

        `settings` are the arguments of Linear4bit by name.
        """
        raise NotImplementedError

    def owns(self, module: nn.Module) -> bool:
        """Whether the module is a 4-bit one of this kind."""
        raise NotImplementedError

    def expect_dense(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Puts dense placeholders (meta) where tensors are to be packed while loading.

        They tell transformers the dtype to read a tensor in, which would cast it to uint8 else.
        """
        raise NotImplementedError

    def is_dense(self, module: nn.Module, tensor_name: str) -> bool:
        """Whether the parameter holds, or is a placeholder for, a dense tensor to be packed."""
        raise NotImplementedError

    def pack(self, module: nn.Module, tensor_name: str, value: Tensor) -> dict[str, Tensor]:
        """The module's state {name in the module: uint8 tensor} for a dense tensor.

        Raises:
            ValueError: the tensor has NaN or infinity, or another shape than the module; the
                message goes on from the tensor's name.
        """
        raise NotImplementedError

    def to_dense(self, module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        """An ordinary module with the decoded weights."""
        raise NotImplementedError


class LinearKind(LayerKind):
    """nn.Linear, and transformers' Conv1D, which is a transposed one; both become Linear4bit."""

    def make(self, name: str, module: nn.Module, settings: dict[str, Any]) -> nn.Module | None:
        """A Linear4bit for exactly these classes: a subclass may compute something else."""
        transposed = _is_conv1d(module)
        if type(module) is not nn.Linear and not transposed:
            return None
        shape = module.weight.shape if transposed else module.weight.shape[::-1]
        layer = Linear4bit(
            *shape, bias=module.bias is not None, device="meta", dtype=module.weight.dtype,
            **settings,
        )  # fmt: skip
        if transposed:
            layer.loads_transposed = True
        return layer.train(module.training)

    def owns(self, module: nn.Module) -> bool:
        """Whether it is a Linear4bit."""
        return isinstance(module, Linear4bit)

    def expect_dense(self, module: nn.Module, dtype: torch.dtype) -> None:
        """A placeholder for the weight in the shape that the checkpoint has."""
        shape = (module.out_features, module.in_features)
        if getattr(module, "loads_transposed", False):
            shape = shape[::-1]
        placeholder = torch.empty(shape, dtype=dtype, device="meta")
        module.weight = nn.Parameter(placeholder, requires_grad=False)

    def is_dense(self, module: nn.Module, tensor_name: str) -> bool:
        """Whether it is the weight, not packed yet."""
        return tensor_name == "weight" and module.weight.is_floating_point()

    def pack(self, module: nn.Module, tensor_name: str, value: Tensor) -> dict[str, Tensor]:
        """weight, weight_absmax and, with double quantization, weight_absmax2."""
        if getattr(module, "loads_transposed", False):
            value = value.t().contiguous()
        module.weight_dtype = value.dtype
        return packed_state(module, value, (module.out_features, module.in_features))

    def to_dense(self, module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        """An nn.Linear, for what was a Conv1D too."""
        return dense_linear(module.dequantize(dtype), module)


class EmbeddingKind(LayerKind):
    """nn.Embedding becomes Embedding4bit, where the quantizer chooses it."""

    def make(self, name: str, module: nn.Module, settings: dict[str, Any]) -> nn.Module | None:
        """An Embedding4bit for exactly this class."""
        if type(module) is not nn.Embedding or module.max_norm is not None:
            return None
        layer = Embedding4bit(
            *module.weight.shape, module.padding_idx, "meta", module.weight.dtype, **settings
        )
        return layer.train(module.training)

    def owns(self, module: nn.Module) -> bool:
        """Whether it is an Embedding4bit."""
        return isinstance(module, Embedding4bit)

    def expect_dense(self, module: nn.Module, dtype: torch.dtype) -> None:
        """A placeholder for the table."""
        shape = (module.num_embeddings, module.embedding_dim)
        placeholder = torch.empty(shape, dtype=dtype, device="meta")
        module.weight = nn.Parameter(placeholder, requires_grad=False)

    def is_dense(self, module: nn.Module, tensor_name: str) -> bool:
        """Whether it is the table, not packed yet."""
        return tensor_name == "weight" and module.weight.is_floating_point()

    def pack(self, module: nn.Module, tensor_name: str, value: Tensor) -> dict[str, Tensor]:
        """weight, weight_absmax and, with double quantization, weight_absmax2."""
        module.weight_dtype = value.dtype
        return packed_state(module, value, (module.num_embeddings, module.embedding_dim))

    def to_dense(self, module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        """An nn.Embedding with the decoded table."""
        return dense_embedding(module, dtype)


KINDS: list[LayerKind] = [LinearKind(), EmbeddingKind()]


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a 4-bit module; None for other modules."""
    return next((kind for kind in KINDS if kind.owns(module)), None)


def packed_state(module: Any, value: Tensor, shape: tuple[int, int]) -> dict[str, Tensor]:
    """The state of a 4-bit module with the settings of Linear4bit, for a dense matrix [shape].

    Raises:
        ValueError: another shape, NaN or infinity.
    """
    if tuple(value.shape) != shape:
        raise ValueError(f"is {tuple(value.shape)} in the file and {shape} by config.json")
    q = quantize_4bit(
        value,
        quant_type=module.quant_type,
        block_size=module.block_size,
        double_quant=module.double_quant,
    )
    _require_finite(q, value)
    return state_of(q)


def _require_finite(q: QuantizedTensor, value: Tensor) -> None:
    # A NaN or an infinity spoils the absmax of its block or group: far fewer numbers to look at.
    if bool(torch.isfinite(q.absmax2 if q.double_quant else q.absmax).all()):
        return
    bad = value.numel() - int(value.isfinite().sum())
    raise ValueError(f"{tuple(value.shape)} holds {bad} values that are NaN or infinite")


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D
