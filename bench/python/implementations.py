"""The rivals, behind one interface: this library, bitsandbytes and a dense weight."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from typing import Any, Protocol

import torch


class Implementation(Protocol):
    """A way to hold a weight W[N, K] and to multiply with it."""

    name: str
    quantizes: bool
    quantize_is_capturable: bool

    def quantize(self, weight: torch.Tensor) -> Any:
        """Return what the implementation keeps of a dense weight."""

    def result(self, quantized: Any) -> torch.Tensor:
        """Return the main tensor of what `quantize` returned."""

    def dequantize(self, quantized: Any) -> torch.Tensor:
        """Return the dense weight."""

    def linear(self, x: torch.Tensor, quantized: Any) -> torch.Tensor:
        """Return x @ W.T."""

    def clone(self, quantized: Any) -> Any:
        """Return the same weight in other memory."""

    def nbytes(self, quantized: Any) -> int:
        """Return the bytes that the weight takes."""


class Ours:
    """qlora_native."""

    name = "qlora_native"
    quantizes = True
    quantize_is_capturable = True

    def __init__(self, quant_type: str, block_size: int) -> None:
        import qlora_native

        self._qn = qlora_native
        self._settings = {"quant_type": quant_type, "block_size": block_size, "double_quant": True}

    def quantize(self, weight: torch.Tensor) -> Any:
        return self._qn.quantize_4bit(weight, **self._settings)

    def result(self, quantized: Any) -> torch.Tensor:
        return quantized.packed

    def dequantize(self, quantized: Any) -> torch.Tensor:
        return self._qn.dequantize_4bit(quantized)

    def linear(self, x: torch.Tensor, quantized: Any) -> torch.Tensor:
        return self._qn.linear_4bit(x, quantized)

    def clone(self, quantized: Any) -> Any:
        parts = ("packed", "absmax", "absmax2", "offset")
        return dataclasses.replace(
            quantized, **{part: getattr(quantized, part).clone() for part in parts}
        )

    def nbytes(self, quantized: Any) -> int:
        return quantized.nbytes


class BitsAndBytes:
    """bitsandbytes' functional API, nested statistics."""

    name = "bitsandbytes"
    quantizes = True
    # Its quantization kernels run on the legacy default stream: a capture would not see them.
    quantize_is_capturable = False

    def __init__(self, quant_type: str, block_size: int) -> None:
        import bitsandbytes

        self._bnb = bitsandbytes
        self._quant_type, self._block_size = quant_type, block_size

    @staticmethod
    def is_installed() -> bool:
        return importlib.util.find_spec("bitsandbytes") is not None

    def quantize(self, weight: torch.Tensor) -> Any:
        return self._bnb.functional.quantize_4bit(
            weight,
            blocksize=self._block_size,
            compress_statistics=True,
            quant_type=self._quant_type,
        )

    def result(self, quantized: Any) -> torch.Tensor:
        return quantized[0]

    def dequantize(self, quantized: Any) -> torch.Tensor:
        return self._bnb.functional.dequantize_4bit(*quantized)

    def linear(self, x: torch.Tensor, quantized: Any) -> torch.Tensor:
        packed, state = quantized
        return self._bnb.matmul_4bit(x, packed.t(), quant_state=state)

    def clone(self, quantized: Any) -> Any:
        packed, state = quantized
        return packed.clone(), copy.deepcopy(state)

    def nbytes(self, quantized: Any) -> int:
        packed, state = quantized
        tensors = (packed, state.absmax, state.state2.absmax, state.offset)
        return sum(tensor.nbytes for tensor in tensors)


class Dense:
    """torch's linear over the unquantized weight."""

    name = "dense"
    quantizes = False
    quantize_is_capturable = True

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def result(self, quantized: torch.Tensor) -> torch.Tensor:
        return quantized

    def dequantize(self, quantized: torch.Tensor) -> torch.Tensor:
        return quantized

    def linear(self, x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, quantized)

    def clone(self, quantized: torch.Tensor) -> torch.Tensor:
        return quantized.clone()

    def nbytes(self, quantized: torch.Tensor) -> int:
        return quantized.nbytes


def available(quant_type: str, block_size: int) -> list[Implementation]:
    """Return the implementations that this environment has."""
    found: list[Implementation] = [Ours(quant_type, block_size)]
    if BitsAndBytes.is_installed() and quant_type in ("nf4", "fp4"):
        found.append(BitsAndBytes(quant_type, block_size))
    found.append(Dense())
    return found
