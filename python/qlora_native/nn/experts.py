"""Experts4bit: the experts of a mixture, kept by transformers as stacks of matrices, in 4 bits.

A layer of experts holds a Parameter [E, out, in] per projection ("gate_up_proj" or "up_proj", and
"down_proj"; [E, in, out] where `is_transposed`), beside attributes that say how they are used. It
stays what it is, an instance of a subclass of its class; each stack becomes uint8 Parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_native._grouped_lora import grouped_lora
from qlora_native.functional import QuantizedStack, grouped_linear_4bit, quantize_4bit
from qlora_native.nn.linear import as_fp32, is_misaligned, state_of
from qlora_native.nn.settings import other_settings, write_settings

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
PARTS = ("", "_absmax", "_absmax2")
"""What is appended to a projection's name for the parts of its state."""


@dataclass(frozen=True)
class StackFormat:
    """How a stack of matrices is kept.

    Attributes:
        shape: (E, out_features, in_features), whichever way the dense Parameter lay.
        transposed: the dense Parameter is [E, in_features, out_features].
        dtype: the dtype that was quantized.
    """

    shape: tuple[int, int, int]
    transposed: bool
    dtype: torch.dtype

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense Parameter."""
        experts, rows, cols = self.shape
        return (experts, cols, rows) if self.transposed else self.shape


class ExpertAdapter(NamedTuple):
    """Low-rank matrices for every expert of a stack: scaling * B_e A_e dropout(x).

    Attributes:
        a: [E, r, in_features], of any floating dtype.
        b: [E, out_features, r], likewise.
        scaling: the factor of the product.
        dropout: an nn.Dropout or nn.Identity for the adapter's input.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: nn.Module


class Experts4bit(nn.Module):
    """Mixin before the class of a layer of experts, whose stacks it keeps in 4 bits.

    The state of a projection ``NAME`` is frozen uint8 parameters with a row for each expert:

    * ``NAME``: packed codes [E, out_features, in_features / 2].
    * ``NAME_absmax``: 8-bit codes [E, blocks] with double quantization, else the raw bytes of the
      fp32 absmax [E, 4 * blocks].
    * ``NAME_absmax2``: raw bytes of the fp32 absmax2 of every group and of the offset
      [E, 4 * (groups + 1)]; None without double quantization.

    Each expert is quantized by itself, the matrix [out_features, in_features] row by row. Biases
    are ordinary parameters.
    """

    formats: dict[str, StackFormat]
    quant_type: str
    block_size: int
    double_quant: bool
    codebook: tuple[float, ...] | None
    compute_dtype: torch.dtype | None
    adapters: dict[str, Sequence[ExpertAdapter]]
    """By projection, what whoever holds adapters wants added to it for the time of a forward."""

    def quantized_stack(self, name: str) -> QuantizedStack:
        """The stack of a projection as a value; its tensors are views of the parameters."""
        stack = self.formats[name]
        absmax = self._parameters[f"{name}_absmax"]
        absmax2 = offset = None
        if self.double_quant:
            constants = as_fp32(self._parameters[f"{name}_absmax2"])
            absmax2, offset = constants[:, :-1], constants[:, -1]
        else:
            absmax = as_fp32(absmax)
        return QuantizedStack(
            packed=self._parameters[name],
            absmax=absmax,
            absmax2=absmax2,
            offset=offset,
            shape=torch.Size(stack.shape),
            dtype=stack.dtype,
            quant_type=self.quant_type,
            block_size=self.block_size,
            codebook=self.codebook,
        )

    def dequantize_stack(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The dense stack, as its Parameter lay, in `dtype` or the dtype that was quantized."""
        stack, quantized = self.formats[name], self.quantized_stack(name)
        dense = torch.empty(
            stack.dense_shape, dtype=dtype or stack.dtype, device=quantized.packed.device
        )
        for expert, target in enumerate(dense):
            weight = quantized[expert].dequantize(dense.dtype)
            target.copy_(weight.t() if stack.transposed else weight)
        return dense

    @torch.no_grad()
    def requantize_expert_(self, name: str, expert: int, weight: Tensor) -> None:
        """Quantizes `weight` [out_features, in_features] into the place of one expert.

        Raises:
            ValueError: non-finite values; the expert is as it was.
        """
        for suffix, value in self._packed(weight, check_finite=True).items():
            self._parameters[name + suffix][expert].copy_(value)

    def pack_stack(
        self, name: str, expert: Callable[[int], Tensor], *, check_finite: bool = True
    ) -> dict[str, Tensor]:
        """The state of a projection, {parameter name: uint8 tensor}, from one expert at a time.

        Args:
            expert: returns matrix e as the dense Parameter holds it; asked once for each, in order.

        Raises:
            ValueError: an expert has another shape or, with `check_finite`, NaN or infinity.
        """
        stack = self.formats[name]
        state: dict[str, Tensor] = {}
        for index in range(stack.shape[0]):
            weight = expert(index)
            if tuple(weight.shape) != stack.dense_shape[1:]:
                raise ValueError(
                    f"{name} of expert {index} has shape {tuple(weight.shape)}, the model "
                    f"{stack.dense_shape[1:]}"
                )
            try:
                packed = self._packed(weight.t() if stack.transposed else weight, check_finite)
            except ValueError as error:
                raise ValueError(f"{name} of expert {index}: {error}") from error
            del weight
            for suffix, value in packed.items():
                if index == 0:
                    rows = (stack.shape[0], *value.shape)
                    state[name + suffix] = torch.empty(rows, dtype=value.dtype, device=value.device)
                state[name + suffix][index].copy_(value)
        return state

    def _packed(self, weight: Tensor, check_finite: bool) -> dict[str, Tensor]:
        q = quantize_4bit(
            weight.detach().contiguous(),
            quant_type=self.quant_type,
            block_size=self.block_size,
            double_quant=self.double_quant,
            codebook=self.codebook,
        )
        # A NaN or an infinity spoils the absmax of its block or group: far fewer to look at.
        constants = q.absmax2 if q.double_quant else q.absmax
        if check_finite and not bool(torch.isfinite(constants).all()):
            bad = weight.numel() - int(weight.isfinite().sum())
            raise ValueError(
                f"the matrix {tuple(weight.shape)} holds {bad} values that are NaN or infinite"
            )
        return {key.removeprefix("weight"): value for key, value in state_of(q).items()}

    # ---- forward ----

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum over the chosen experts, [tokens, hidden], as the dense layer's.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], the experts of every token.
            top_k_weights: [tokens, k].

        Raises:
            NotImplementedError: the layer is one rank's part of expert parallelism.
        """
        if getattr(self, "_is_expert_parallel", False):
            raise NotImplementedError("expert parallelism over 4-bit experts is not implemented")
        tokens, chosen = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = torch.searchsorted(
            experts, torch.arange(self.num_experts, device=experts.device), right=True
        )
        x = hidden_states if self.compute_dtype is None else hidden_states.to(self.compute_dtype)
        x = self._project(self._first_projection, x[order // chosen], ends)
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = self._project("down_proj", x, ends)
        if getattr(self, "has_post_expert_norm", False):
            x = self.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        # Back to the order of the tokens, whose sums then need no atomic additions.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        return x[back].view(tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)

    @property
    def _first_projection(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def _project(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        y = grouped_linear_4bit(x, ends, self.quantized_stack(name), bias)
        for a, b, scaling, dropout in self.adapters.get(name, ()):
            # In the dtype of the base product, which autocast may have chosen.
            y = y + grouped_lora(dropout(x).to(y.dtype), ends, a, b, scaling)
        return y

    # ---- as a module ----

    def requires_grad_(self, requires_grad: bool = True) -> Experts4bit:
        """Sets the flag of the biases; the packed state cannot have gradients."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(requires_grad)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; fp32 bytes at an address that is no multiple of 4 are copied."""
        if name.partition("_absmax")[1] and param is not None and is_misaligned(param):
            copy = nn.Parameter(param.detach().clone(), requires_grad=False)
            copy.__dict__.update(param.__dict__)
            param = copy
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """The shapes and settings, as `print(model)` shows them."""
        shapes = ", ".join(f"{name}={stack.shape}" for name, stack in self.formats.items())
        return (
            f"{shapes}, quant_type={self.quant_type}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no name under which it could be found again.
        return _new, (dense_class(self),), self.__getstate__()

    # ---- state dict ----

    def _metadata(self) -> dict[str, Any]:
        return {
            "quant_type": self.quant_type,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "codebook": self.codebook,
            **{name: tuple(stack.shape) for name, stack in self.formats.items()},
        }

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        write_settings(destination, prefix, self._metadata())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        problems = self._state_dict_problems(state_dict, prefix, local_metadata)
        if problems:
            others[-1].extend(problems)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def _state_dict_problems(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> list[str]:
        """What torch would let pass (other settings, casts to uint8), and shapes, in our words."""
        problems = other_settings(
            f"{prefix}{next(iter(self.formats))}", local_metadata, self._metadata()
        )
        if problems:
            return problems
        for name, stack in self.formats.items():
            for part in PARTS:
                value, expected = (
                    state_dict.get(f"{prefix}{name}{part}"),
                    self._parameters[name + part],
                )
                if value is None or expected is None:
                    continue
                if value.dtype != torch.uint8:
                    problems.append(
                        f"{prefix}{name}{part} is {value.dtype}, expected packed torch.uint8: load "
                        "dense weights before quantizing"
                    )
                elif value.shape != expected.shape:
                    problems.append(
                        f"{prefix}{name}{part} has shape {tuple(value.shape)}, expected "
                        f"{tuple(expected.shape)} for {stack.shape} with "
                        f"block_size={self.block_size}, double_quant={self.double_quant}"
                    )
        return problems


def dense_class(layer: Experts4bit) -> type[nn.Module]:
    """The class that an Experts4bit had before."""
    order = type(layer).__mro__
    return order[order.index(Experts4bit) + 1]


@functools.cache
def class_over(experts_class: type[nn.Module]) -> type[nn.Module]:
    """The class of 4-bit layers in the place of `experts_class`."""
    members = {"__module__": experts_class.__module__, "__doc__": experts_class.__doc__}
    return type(experts_class.__name__, (Experts4bit, experts_class), members)


def _new(experts_class: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(class_over(experts_class))
