"""LoraLinear: low-rank adapters over a Linear4bit or a dense nn.Linear.

    y = W0 x + bias + sum over the active adapters of  scaling * B(A(dropout(x)))

A is [r, in_features], B [out_features, r]; scaling is alpha / r, or alpha / sqrt(r) with
use_rslora. Submodules are named as PEFT names them (base_layer, lora_A.<adapter>,
lora_B.<adapter>), so state dict keys agree.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.nn.adapted import (
    LowRank,
    adapted_linear,
    children,
    computing_device,
    parameter,
)
from qlora_native.nn.linear import Linear4bit

# Under this key a state dict's metadata says which adapters its base weight contains.
_MERGED_KEY = "merged_adapters"

BIAS_MODES = ("none", "lora_only", "all")


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is besides its weights.

    Attributes:
        r: rank, >= 1.
        alpha: numerator of the scaling.
        dropout: probability in [0, 1) of zeroing an element of the adapter's input in training.
        use_rslora: scaling is alpha / sqrt(r) instead of alpha / r.
        bias: which biases of the base model train with the adapter: "none", "lora_only" (those of
            the adapted layers) or "all".
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be a positive integer, got {self.r!r}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, got {self.alpha!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.bias not in BIAS_MODES:
            raise ValueError(f"bias must be one of {BIAS_MODES}, got {self.bias!r}")

    @property
    def scaling(self) -> float:
        """The factor of B A in the sum."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Module):
    """Adapters by name over one linear layer, which keeps its own parameters as `base_layer`."""

    def __init__(self, base_layer: nn.Linear) -> None:
        """Wraps `base_layer` with no adapter yet.

        Raises:
            TypeError: `base_layer` is neither a Linear4bit nor exactly an nn.Linear. A subclass
                may compute something else than W x, which merging would then break.
        """
        super().__init__()
        if not is_adaptable(base_layer):
            raise TypeError(
                f"LoRA adapts Linear4bit and nn.Linear layers, got {type(base_layer).__name__}"
            )
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.settings: dict[str, LoraSettings] = {}
        self.active_adapters: tuple[str, ...] = ()
        self.adapters_enabled = True
        self.merged_adapters: tuple[str, ...] = ()
        # The base weight's tensors from before the merge, so that unmerge restores them exactly.
        self._unmerged: dict[str, Tensor] = {}

    # What callers read off a linear layer goes on working when it is wrapped.
    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """The last dimension of the input."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """The last dimension of the output."""
        return self.base_layer.out_features

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into the base weight."""
        return bool(self.merged_adapters)

    def add_adapter(
        self, name: str, settings: LoraSettings, dtype: torch.dtype | None = None
    ) -> None:
        """Adds an adapter with A ~ kaiming_uniform(a=sqrt(5)) and B = 0, and leaves it inactive.

        Args:
            dtype: floating dtype of A and B, fp32 when None. The product runs in the input's
                dtype whatever this is.

        Raises:
            ValueError: the name is taken or holds a "." (it becomes part of state dict keys).
            TypeError: `dtype` is not floating.
        """
        dtype = dtype or torch.float32
        check_adapter(name, dtype, self.settings)
        place = {"device": computing_device(self.base_layer), "dtype": dtype}
        lora_a = nn.Linear(self.in_features, settings.r, bias=False, **place)
        lora_b = nn.Linear(settings.r, self.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(lora_b.weight)
        self.lora_A[name] = lora_a
        self.lora_B[name] = lora_b
        self.lora_dropout[name] = (
            nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
        )
        self.lora_dropout[name].train(self.training)
        self.settings[name] = settings

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            KeyError: there is no such adapter.
            RuntimeError: it is merged.
        """
        self._require(name)
        self._require_unmerged("delete an adapter")
        for adapters in (self.lora_A, self.lora_B, self.lora_dropout, self.settings):
            del adapters[name]
        self.active_adapters = tuple(a for a in self.active_adapters if a != name)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Makes exactly these adapters take part in the forward.

        Raises:
            KeyError: there is no such adapter.
            RuntimeError: adapters are merged.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            self._require(name)
        self._require_unmerged("choose adapters")
        self.active_adapters = names

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] for x [..., in_features]."""
        return adapted_linear(self._modules["base_layer"], x, self.plain_adapters())

    def plain_adapters(self) -> Sequence[LowRank]:
        """The adapters that take part in the forward."""
        if self.merged_adapters or not self.adapters_enabled:
            return ()
        lora_a, lora_b = children(self, "lora_A"), children(self, "lora_B")
        dropouts = children(self, "lora_dropout")
        return [
            LowRank(
                parameter(lora_a[name], "weight"),
                parameter(lora_b[name], "weight"),
                self.settings[name].scaling,
                dropouts[name],
            )
            for name in self.active_adapters
        ]

    def delta_weight(self, names: str | Sequence[str]) -> Tensor:
        """The fp32 sum over the adapters of scaling * B A: [out_features, in_features]."""
        names = (names,) if isinstance(names, str) else names
        device = computing_device(self.base_layer)
        delta = torch.zeros(self.out_features, self.in_features, device=device)
        for name in names:
            self._require(name)
            a, b = self.lora_A[name].weight.detach(), self.lora_B[name].weight.detach()
            delta.add_(b.float() @ a.float(), alpha=self.settings[name].scaling)
        return delta

    def merged_weight(
        self, names: Sequence[str] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The dense weight with adapters added in fp32, then rounded once to `dtype`.

        Args:
            names: adapters to add; the active ones when None. With none of either, the base weight.
            dtype: the base weight's own (logical) dtype when None.
        """
        base = self.base_layer
        quantized = isinstance(base, Linear4bit)
        dtype = dtype or (base.weight_dtype if quantized else base.weight.dtype)
        names = self.active_adapters if names is None else names
        if not names:
            return base.dequantize(dtype) if quantized else base.weight.detach().to(dtype)
        weight = base.dequantize(torch.float32) if quantized else base.weight.detach()
        return self.delta_weight(names).add_(weight).to(dtype)

    @torch.no_grad()
    def merge(self, names: Sequence[str] | None = None) -> None:
        """Adds adapters (the active ones when None) to the base weight, requantizing a 4-bit one.

        The original tensors are kept until `unmerge`, which costs the base layer's size again.
        Merging into 4 bits rounds the sum to the nearest code; `merged_weight` gives it exactly.

        Raises:
            RuntimeError: already merged.
            ValueError: nothing to merge, or the sum is not finite; the layer is then as it was.
        """
        self._require_unmerged("merge again")
        names = self.active_adapters if names is None else tuple(names)
        if not names:
            raise ValueError("no adapter to merge: none is named and none is active")
        base = self.base_layer
        kept = {n: p.detach().clone() for n, p in base.named_parameters() if n != "bias"}
        if isinstance(base, Linear4bit):
            base.requantize_(self.merged_weight(names, torch.float32))
        else:
            weight = self.merged_weight(names)
            if not weight.isfinite().all():
                bad = weight.numel() - int(weight.isfinite().sum())
                raise ValueError(f"the merged weight has {bad} non-finite values")
            base.weight.copy_(weight)
        self._unmerged = kept
        self.merged_adapters = names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the base weight of before `merge`, bit for bit; does nothing without one."""
        for name, tensor in self._unmerged.items():
            getattr(self.base_layer, name).copy_(tensor)
        self._unmerged = {}
        self.merged_adapters = ()

    @torch.no_grad()
    def to_dense(
        self, dtype: torch.dtype | None = None, names: Sequence[str] | None = None
    ) -> nn.Linear:
        """An nn.Linear with adapters merged; arguments as in `merged_weight`.

        A layer that is merged already gives its merged weight, whatever `names` says.
        """
        weight = self.merged_weight(() if self.merged else names, dtype)
        return dense_linear(weight, self.base_layer)

    def extra_repr(self) -> str:
        """The names of the active and the merged adapters, as `print(model)` shows them."""
        return f"active={list(self.active_adapters)}, merged={list(self.merged_adapters)}"

    # ---- state dict ----

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # A plain dict given by the caller has no place for metadata.
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][_MERGED_KEY] = self.merged_adapters

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
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        name = prefix[:-1] or type(self).__name__
        if self.merged:
            # Unmerging would put the old base weight over the loaded one.
            error_msgs.append(
                f"{name}: adapters {list(self.merged_adapters)} are merged into this layer; "
                "unmerge before loading"
            )
            return
        merged = tuple(local_metadata.get(_MERGED_KEY, ()))
        if merged:
            # The layer would add the adapters to a base weight that contains them.
            error_msgs.append(
                f"{name}: the state dict was saved with adapters {list(merged)} merged into the "
                "base weight; unmerge before saving"
            )

    def _require(self, name: str) -> None:
        if name not in self.settings:
            raise KeyError(f"no adapter {name!r}; there are {list(self.settings)}")

    def _require_unmerged(self, action: str) -> None:
        if self.merged:
            raise RuntimeError(
                f"adapters {list(self.merged_adapters)} are merged: unmerge before you {action}"
            )


def check_adapter(name: str, dtype: torch.dtype, existing: Collection[str]) -> None:
    """Raises what `LoraLinear.add_adapter` documents, for a name beside `existing` ones."""
    if name in existing:
        raise ValueError(f"adapter {name!r} already exists; there are {sorted(existing)}")
    if not name or "." in name:
        raise ValueError(f"an adapter name is not empty and has no '.', got {name!r}")
    if not dtype.is_floating_point:
        raise TypeError(f"adapter dtype must be floating, got {dtype}")


def is_adaptable(module: nn.Module) -> bool:
    """Whether `LoraLinear` can wrap the module."""
    return isinstance(module, Linear4bit) or type(module) is nn.Linear


def dense_linear(weight: Tensor, like: nn.Linear) -> nn.Linear:
    """An nn.Linear that holds `weight` [out, in] itself and `like`'s bias in the same dtype."""
    layer = nn.Linear(like.in_features, like.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if like.bias is not None:
        layer.bias = nn.Parameter(like.bias.detach().to(weight.dtype), like.bias.requires_grad)
    return layer.train(like.training)
