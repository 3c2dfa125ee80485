"""Linear4bit: an `nn.Linear` whose weight is stored in 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import _checks, _eager
from qlora_native._weight import as_fp32
from qlora_native.functional import QuantizedTensor, dequantize_4bit, linear_4bit, quantize_4bit
from qlora_native.nn.settings import other_settings, write_settings

_STATE = ("weight", "weight_absmax", "weight_absmax2")


class Linear4bit(nn.Linear):
    """`y = x W^T + bias` with a frozen 4-bit `W` [out_features, in_features].

    The packed state is frozen uint8 parameters, so that casts, sharding and serialization move
    bytes only.

    Attributes:
        weight: packed codes, [out_features, in_features / 2]; flat [(n + 1) // 2], n = out * in,
            when in_features is odd.
        weight_absmax: 8-bit codes [blocks] with double quantization, else the raw bytes of the
            fp32 absmax [4 * blocks].
        weight_absmax2: the raw bytes of the fp32 absmax2 of every group, then of the offset
            [4 * (groups + 1)]; None without double quantization.
        bias: an ordinary parameter [out_features], or None.

    `weight_dtype` is the dtype of the weight that was quantized. It is only the default of
    `dequantize()`: `.to(dtype)`, `.half()` and `.bfloat16()` change the bias and leave the packed
    state and `weight_dtype` alone, and the output has the dtype of the input.

    A uint8 tensor cannot require a gradient, so `model.requires_grad_(True)` on a model that holds
    this layer raises in torch; on the layer itself it reaches the bias alone.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        codebook: Sequence[float] | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Makes a layer whose state is uninitialized: load a state dict into it before use.

        Args:
            dtype: dtype of the bias and of `weight_dtype`; torch's default dtype when None.
            quant_type, block_size, double_quant, codebook: as in `quantize_4bit`.
            compute_dtype: dtype that inputs are cast to before the product (and outputs back);
                None computes in the input's dtype.

        Raises:
            ValueError, TypeError: a quantization setting that `quantize_4bit` refuses.
        """
        _checks.codebook(quant_type, codebook)
        _checks.check_block_size(block_size)
        # Not nn.Linear's: it would allocate and initialize a dense weight.
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        self.codebook = None if codebook is None else tuple(codebook)
        self.compute_dtype = compute_dtype
        self.weight_dtype = dtype or torch.get_default_dtype()
        numel = in_features * out_features
        blocks = _checks.num_blocks(numel, block_size)
        groups = _checks.num_groups(numel, block_size)

        def frozen(*shape: int) -> nn.Parameter:
            return _frozen(torch.empty(shape, dtype=torch.uint8, device=device))

        self.weight = frozen(*_packed_shape(out_features, in_features))
        self.weight_absmax = frozen(blocks if double_quant else 4 * blocks)
        self.register_parameter(
            "weight_absmax2", frozen(4 * (groups + 1)) if double_quant else None
        )
        dense_bias = None
        if bias:
            dense_bias = nn.Parameter(
                torch.empty(out_features, device=device, dtype=self.weight_dtype)
            )
        self.register_parameter("bias", dense_bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        codebook: Sequence[float] | None = None,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        check_finite: bool = True,
    ) -> Linear4bit:
        """Quantizes the weight of `linear` (fp32, fp16 or bf16), which is left as it was.

        The bias Parameter itself is taken over, so optimizers and ties that know it stay valid;
        on another `device` it is copied.

        Args:
            device: where to quantize and to keep the result; the weight's own device when None.
            check_finite: raise ValueError when the weight holds NaN or infinity.

        Raises:
            TypeError: `linear` is not a dense nn.Linear.
            ValueError: a bad setting, non-finite values, or a weight on the meta device.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
            raise TypeError(f"expected a dense nn.Linear, got {type(linear).__name__}")
        if linear.weight.is_meta:
            raise ValueError(f"the weight of {linear} is on the meta device: it has no values")
        with torch.no_grad():
            q = quantize_4bit(
                linear.weight.detach().to(device),
                quant_type=quant_type,
                block_size=block_size,
                double_quant=double_quant,
                codebook=codebook,
                check_finite=check_finite,
            )
        bias = linear.bias
        if bias is not None and bias.device != q.packed.device:
            bias = nn.Parameter(bias.detach().to(q.packed.device), bias.requires_grad)
        layer = cls.from_quantized(q, bias, compute_dtype=compute_dtype)
        return layer.train(linear.training)

    @classmethod
    def from_quantized(
        cls,
        q: QuantizedTensor,
        bias: nn.Parameter | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> Linear4bit:
        """Makes a layer around the tensors of `q` (shape [out, in]), without copying the codes.

        Raises:
            ValueError: `q` is not a matrix, or `bias` is not [out].
        """
        if len(q.shape) != 2:
            raise ValueError(f"expected a quantized matrix [out, in], got shape {tuple(q.shape)}")
        out_features, in_features = q.shape
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out_features},)")
        layer = cls(
            in_features,
            out_features,
            bias=False,
            device="meta",
            dtype=q.dtype,
            quant_type=q.quant_type,
            block_size=q.block_size,
            double_quant=q.double_quant,
            codebook=q.codebook,
            compute_dtype=compute_dtype,
        )
        for name, value in state_of(q).items():
            setattr(layer, name, _frozen(value))
        layer.bias = bias
        return layer

    @property
    def W_q(self) -> nn.Parameter:  # noqa: N802
        """The packed weight. PEFT looks for this name beside `dequantize()` to read a weight."""
        return self.weight

    def quantized_weight(self) -> QuantizedTensor:
        """The weight as a value; its tensors are views of the parameters."""
        if self.double_quant:
            constants = as_fp32(self.weight_absmax2)
            absmax, absmax2, offset = self.weight_absmax, constants[:-1], constants[-1]
        else:
            absmax, absmax2, offset = as_fp32(self.weight_absmax), None, None
        return QuantizedTensor(
            packed=self.weight.view(-1),
            absmax=absmax,
            absmax2=absmax2,
            offset=offset,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.weight_dtype,
            quant_type=self.quant_type,
            block_size=self.block_size,
            codebook=self.codebook,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [out, in] in `dtype`, by default `weight_dtype`."""
        return dequantize_4bit(self.quantized_weight(), dtype=dtype)

    @torch.no_grad()
    def requantize_(self, w: Tensor, *, check_finite: bool = True) -> Linear4bit:
        """Quantizes `w` [out, in] with this layer's settings into its existing storage.

        Raises:
            ValueError: another shape, or non-finite values with `check_finite`; the layer is then
                as it was.
        """
        if tuple(w.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"weight has shape {tuple(w.shape)}, "
                f"expected ({self.out_features}, {self.in_features})"
            )
        q = quantize_4bit(
            w.detach().to(self.weight.device),
            quant_type=self.quant_type,
            block_size=self.block_size,
            double_quant=self.double_quant,
            codebook=self.codebook,
            check_finite=check_finite,
        )
        for name, value in state_of(q).items():
            getattr(self, name).copy_(value)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] in the dtype of `x` [..., in_features]."""
        if self.compute_dtype is None:
            return self._product(x)
        return self._product(x.to(self.compute_dtype)).to(x.dtype)

    def has_plain_weight(self) -> bool:
        """Whether the parameters are the weight, of which a subclass may have another idea."""
        return (
            type(self) is Linear4bit
            and "quantized_weight" not in self.__dict__
            and Linear4bit.quantized_weight is _quantized_weight
        )

    def _product(self, x: Tensor) -> Tensor:
        if self.has_plain_weight() and not _is_traced():
            y = _run_linear_4bit(
                x,
                self._parameters,
                self.out_features,
                self.in_features,
                self.block_size,
                self.quant_type,
                self.codebook,
            )
            if y is not None:
                return y
        return linear_4bit(x, self.quantized_weight(), self.bias)

    def requires_grad_(self, requires_grad: bool = True) -> Linear4bit:
        """Sets the flag of the bias; the packed state cannot have gradients."""
        if self.bias is not None:
            self.bias.requires_grad_(requires_grad)
        return self

    def reset_parameters(self) -> None:
        """Refused: a 4-bit weight is loaded or quantized, never initialized."""
        raise NotImplementedError(
            "Linear4bit has no initialization: use from_linear, requantize_ or load_state_dict"
        )

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quant_type={self.quant_type}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}"
        )
        return text if self.compute_dtype is None else f"{text}, compute_dtype={self.compute_dtype}"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; fp32 bytes at an address that is no multiple of 4 are copied."""
        # A file mapped into memory may place them anywhere; copied here once, they can be viewed
        # as fp32 in every forward.
        if name != "weight" and name in _STATE and param is not None and is_misaligned(param):
            copy = _frozen(param.detach().clone())
            copy.__dict__.update(param.__dict__)
            param = copy
        super().register_parameter(name, param)

    # ---- state dict ----

    def _metadata(self) -> dict[str, Any]:
        return {
            "quant_type": self.quant_type,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "codebook": self.codebook,
            "in_features": self.in_features,
            "out_features": self.out_features,
        }

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        write_settings(destination, prefix, self._metadata())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems = self._state_dict_problems(state_dict, prefix, local_metadata)
        if problems:
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _state_dict_problems(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> list[str]:
        """What torch would let pass (other settings, casts to uint8), and shapes, in our words."""
        problems = other_settings(f"{prefix}weight", local_metadata, self._metadata())
        if problems:
            return problems
        for name in _STATE:
            value = state_dict.get(prefix + name)
            if value is None:
                continue
            if value.dtype != torch.uint8:
                problems.append(
                    f"{prefix}{name} is {value.dtype}, expected packed torch.uint8: load dense "
                    "weights before quantizing, or use requantize_"
                )
                continue
            expected = getattr(self, name)
            if expected is not None and value.shape != expected.shape:
                problems.append(
                    f"{prefix}{name} has shape {tuple(value.shape)}, expected "
                    f"{tuple(expected.shape)} for [{self.out_features}, {self.in_features}] with "
                    f"block_size={self.block_size}, double_quant={self.double_quant}"
                )
        return problems


_quantized_weight = Linear4bit.quantized_weight
_run_linear_4bit = _eager.OPS.linear_4bit_of_layer
_is_traced = _eager.is_traced


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _packed_shape(out_features: int, in_features: int) -> tuple[int, ...]:
    if in_features % 2 == 0:
        return (out_features, in_features // 2)
    return (_checks.packed_bytes(out_features * in_features),)


def state_of(q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of `q`, a matrix, as the uint8 tensors that a Linear4bit keeps, by name."""
    state = {"weight": q.packed.view(_packed_shape(*q.shape))}
    if q.double_quant:
        state["weight_absmax"] = q.absmax
        constants = torch.cat((q.absmax2, q.offset.reshape(1)))
        state["weight_absmax2"] = constants.view(torch.uint8)
    else:
        state["weight_absmax"] = q.absmax.view(torch.uint8)
    return state


def is_misaligned(param: Tensor) -> bool:
    """Whether the bytes of fp32 values lie where they cannot be read as such."""
    if param.storage_offset() % 4:
        return True
    # Fake, sharded and other wrapper tensors have no address of their own.
    return type(param) in (Tensor, nn.Parameter) and param.data_ptr() % 4 != 0
