"""The rivals, behind one interface: this library, bitsandbytes, torchao and a dense weight."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import torch

OPS = ("quantize", "dequantize", "linear", "linear_backward")
PRODUCTS = ("linear", "linear_backward")
NAMES = ("qlora_native", "bitsandbytes", "bitsandbytes packed", "torchao", "dense")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What every rival is asked for."""

    quant_type: str
    block_size: int
    dtype: torch.dtype
    device: torch.device


class Implementation(Protocol):
    """A way to hold a weight W[N, K] and to multiply with it."""

    name: str
    ops: tuple[str, ...]
    eager_ops: tuple[str, ...]
    """Operations that a CUDA graph cannot hold: they are timed eagerly instead."""

    def quantize(self, weight: torch.Tensor) -> Any:
        """Return what the implementation keeps of a dense weight."""

    def result(self, quantized: Any) -> torch.Tensor:
        """Return the main tensor of what `quantize` returned."""

    def dequantize(self, quantized: Any) -> torch.Tensor:
        """Return the dense weight in the setting's dtype."""

    def exact(self, quantized: Any) -> torch.Tensor:
        """Return the dense weight that the codes stand for, in fp32 where that can be had."""

    def linear(self, x: torch.Tensor, quantized: Any) -> torch.Tensor:
        """Return x @ W.T."""

    def clone(self, quantized: Any) -> Any:
        """Return the same weight in other memory."""

    def nbytes(self, quantized: Any) -> int:
        """Return the bytes that the weight takes."""

    def kernel(self, op: str, shape: tuple[int, int], m: int | None) -> str:
        """Return the name of what does the work, "" where that is not known."""


class Ours:
    """qlora_native."""

    name = "qlora_native"
    ops = OPS
    eager_ops = ()

    _CORE_OPS = {  # noqa: RUF012
        "quantize": "quantize_4bit",
        "dequantize": "dequantize_4bit",
        "linear": "matmul_4bit",
        "linear_backward": "matmul_4bit_transposed",
    }

    def __init__(self, setting: Setting) -> None:
        import qlora_native

        self._qn = qlora_native
        self._setting = setting

    def quantize(self, weight: torch.Tensor) -> Any:
        return self._qn.quantize_4bit(
            weight,
            quant_type=self._setting.quant_type,
            block_size=self._setting.block_size,
            double_quant=True,
        )

    def result(self, quantized: Any) -> torch.Tensor:
        return quantized.packed

    def dequantize(self, quantized: Any) -> torch.Tensor:
        return self._qn.dequantize_4bit(quantized)

    def exact(self, quantized: Any) -> torch.Tensor:
        return self._qn.dequantize_4bit(quantized, torch.float32)

    def linear(self, x: torch.Tensor, quantized: Any) -> torch.Tensor:
        return self._qn.linear_4bit(x, quantized)

    def clone(self, quantized: Any) -> Any:
        parts = ("packed", "absmax", "absmax2", "offset")
        return dataclasses.replace(
            quantized, **{part: getattr(quantized, part).clone() for part in parts}
        )

    def nbytes(self, quantized: Any) -> int:
        return quantized.nbytes

    def kernel(self, op: str, shape: tuple[int, int], m: int | None) -> str:
        return self._qn.kernels.selected_for(
            self._CORE_OPS[op],
            shape,
            m=m or 1,
            dtype=self._setting.dtype,
            device=self._setting.device,
            quant_type=self._setting.quant_type,
            block_size=self._setting.block_size,
        )


class _Peer:
    """What the rivals share."""

    eager_ops: tuple[str, ...] = ()

    def kernel(self, op: str, shape: tuple[int, int], m: int | None) -> str:
        return ""


class BitsAndBytes(_Peer):
    """bitsandbytes' functional API, nested statistics."""

    name = "bitsandbytes"
    ops = OPS
    # Its quantization kernels run on the legacy default stream: a capture would not see them.
    eager_ops = ("quantize",)

    def __init__(self, bnb: ModuleType, setting: Setting) -> None:
        self._bnb = bnb
        self._setting = setting

    def quantize(self, weight: torch.Tensor) -> Any:
        return self._bnb.functional.quantize_4bit(
            weight,
            blocksize=self._setting.block_size,
            compress_statistics=True,
            quant_type=self._setting.quant_type,
        )

    def result(self, quantized: Any) -> torch.Tensor:
        return quantized[0]

    def dequantize(self, quantized: Any) -> torch.Tensor:
        return self._bnb.functional.dequantize_4bit(*quantized)

    def exact(self, quantized: Any) -> torch.Tensor:
        packed, state = quantized
        state = copy.copy(state)
        state.dtype = torch.float32
        return self._bnb.functional.dequantize_4bit(packed, state)

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


class BitsAndBytesPacked(_Peer):
    """bitsandbytes' layer in inference on a CPU with AVX-512 BF16.

    Its first forward pass repacks the weight in place, with bf16 scales and no nested statistics;
    so it has a weight of its own here. It has no gradients.
    """

    name = "bitsandbytes packed"
    ops = ("linear",)

    def __init__(self, plain: BitsAndBytes, bnb: ModuleType) -> None:
        self._plain = plain
        self._bnb = bnb

    @staticmethod
    def runs(bnb: ModuleType, setting: Setting) -> bool:
        """Whether this processor and this version have the path, which computes in bf16 only."""
        has_it = getattr(bnb.functional, "has_avx512bf16", bool)()
        fits = setting.dtype == torch.bfloat16 and setting.block_size == 64
        return bool(setting.device.type == "cpu" and has_it and fits)

    def quantize(self, weight: torch.Tensor) -> Any:
        rows, cols = weight.shape
        layer = self._bnb.nn.Linear4bit(
            cols, rows, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
        layer.weight = self._bnb.nn.Params4bit(
            weight.clone(),
            requires_grad=False,
            quant_type=self._plain._setting.quant_type,
            module=layer,
        )
        layer = layer.to("cpu").eval()
        with torch.no_grad():
            layer(weight.new_zeros(1, cols))
        if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError("bitsandbytes did not repack the weight")
        return layer, self._plain.quantize(weight)

    def result(self, quantized: Any) -> torch.Tensor:
        return quantized[0].weight

    def dequantize(self, quantized: Any) -> torch.Tensor:
        return self._plain.dequantize(quantized[1])

    def exact(self, quantized: Any) -> torch.Tensor:
        return self._plain.exact(quantized[1])

    def linear(self, x: torch.Tensor, quantized: Any) -> torch.Tensor:
        return quantized[0](x)

    def clone(self, quantized: Any) -> Any:
        return copy.deepcopy(quantized)

    def nbytes(self, quantized: Any) -> int:
        weight = quantized[0].weight
        return weight.nbytes + weight.quant_state.absmax.nbytes


class TorchAo(_Peer):
    """torchao's NF4Tensor: its own double quantization, made of torch's operations."""

    name = "torchao"
    ops = OPS
    eager_ops = OPS

    def __init__(self, to_nf4: Callable[..., Any], setting: Setting) -> None:
        self._to_nf4 = to_nf4
        self._setting = setting

    def quantize(self, weight: torch.Tensor) -> Any:
        return self._to_nf4(weight, block_size=self._setting.block_size, scaler_block_size=256)

    def result(self, quantized: Any) -> torch.Tensor:
        return quantized.quantized_data

    def dequantize(self, quantized: Any) -> torch.Tensor:
        return quantized.get_original_weight()

    def exact(self, quantized: Any) -> torch.Tensor:
        return quantized.get_original_weight().float()

    def linear(self, x: torch.Tensor, quantized: Any) -> torch.Tensor:
        return torch.nn.functional.linear(x, quantized)

    def clone(self, quantized: Any) -> Any:
        return quantized.clone()

    def nbytes(self, quantized: Any) -> int:
        return sum(getattr(quantized, part).nbytes for part in quantized.__tensor_flatten__()[0])


class Dense(_Peer):
    """torch's linear over the unquantized weight."""

    name = "dense"
    ops = PRODUCTS

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def result(self, quantized: torch.Tensor) -> torch.Tensor:
        return quantized

    def dequantize(self, quantized: torch.Tensor) -> torch.Tensor:
        return quantized

    def exact(self, quantized: torch.Tensor) -> torch.Tensor:
        return quantized.float()

    def linear(self, x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, quantized)

    def clone(self, quantized: torch.Tensor) -> torch.Tensor:
        return quantized.clone()

    def nbytes(self, quantized: torch.Tensor) -> int:
        return quantized.nbytes


def find_to_nf4() -> Callable[..., Any] | None:
    """Return torchao's `to_nf4`, wherever its version keeps it, or None."""
    if importlib.util.find_spec("torchao") is None:
        return None
    for name in ("torchao.quantization", "torchao.dtypes"):
        found = getattr(importlib.import_module(name), "to_nf4", None)
        if found is not None:
            return found
    return None


def available(setting: Setting) -> Iterator[Implementation]:
    """Yield the implementations that this environment has, ours first."""
    yield Ours(setting)
    if setting.quant_type in ("nf4", "fp4") and importlib.util.find_spec("bitsandbytes"):
        bnb = importlib.import_module("bitsandbytes")
        plain = BitsAndBytes(bnb, setting)
        yield plain
        if BitsAndBytesPacked.runs(bnb, setting):
            yield BitsAndBytesPacked(plain, bnb)
    to_nf4 = find_to_nf4()
    if to_nf4 is not None and setting.quant_type == "nf4":
        yield TorchAo(to_nf4, setting)
    yield Dense()
