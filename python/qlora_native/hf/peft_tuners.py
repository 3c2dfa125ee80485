"""The other methods of PEFT over Linear4bit layers.

Which of them read the base weight, and when, differs from method to method and from version to
version. Each therefore makes its layer around the decoded weight; afterwards the layer stands over
the 4-bit one, and its forward decodes anew unless the method is known to leave the weight alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora_native.hf.peft_dense import Over4bit, dense_base, dense_stand_in, write_back
from qlora_native.nn import Embedding4bit, Experts4bit, Linear4bit
from qlora_native.nn.adapted import computing_device, is_offloaded

# The tests compare each of these with itself over the decoded weights. The forward of the first is
# base_layer(x) and something beside it, whatever its options.
FORWARD_LEAVES_WEIGHT_ALONE = frozenset(
    {
        PeftType.ADALORA,
        PeftType.FOURIERFT,
        PeftType.IA3,
        PeftType.LOHA,
        PeftType.LOKR,
        PeftType.OFT,
        PeftType.RANDLORA,
        PeftType.VBLORA,
        PeftType.VERA,
        PeftType.WAVEFT,
    }
)
TRIED = FORWARD_LEAVES_WEIGHT_ALONE | {
    PeftType.BEFT,
    PeftType.BOFT,
    PeftType.C3A,
    PeftType.DEFT,
    PeftType.DELORA,
    PeftType.GLORA,
    PeftType.GRALORA,
    PeftType.HIRA,
    PeftType.HRA,
    PeftType.LILY,
    PeftType.LN_TUNING,
    PeftType.LORA,
    PeftType.MISS,
    PeftType.OSF,
    PeftType.PEANUT,
    PeftType.POLY,
    PeftType.PSOFT,
    PeftType.PVERA,
    PeftType.ROAD,
    PeftType.SHADOW,
    PeftType.SHIRA,
    PeftType.SUPERTUNING,
    PeftType.TINYLORA,
    PeftType.TRAINABLE_TOKENS,
    PeftType.UNILORA,
    PeftType.XLORA,
}

_PACKED = (Embedding4bit, Experts4bit, Linear4bit)
_METHODS_THAT_READ_WEIGHT = ("update_layer", "update_scaling", "get_delta_weight")


class _Other4bit(Over4bit):
    """Mixin before a tuner layer's class: everything but a few forwards on the decoded weight."""

    _forward_reads_weight = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged_adapters:
            self.unmerge()
        if not self._forward_reads_weight or not isinstance(self.base_layer, Linear4bit):
            return super().forward(x, *args, **kwargs)
        forward = super().forward

        def run(x: Tensor) -> Tensor:
            with dense_base(self, self.base_layer.compute_dtype or x.dtype):
                return forward(x, *args, **kwargs)

        # Decoded again in the backward: the graph would keep every layer's dense weight.
        if torch.is_grad_enabled():
            return checkpoint(run, x, use_reentrant=False)
        return run(x)


def _on_decoded_weight(method: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.base_layer
        with dense_base(self, getattr(base, "weight_dtype", torch.float32), keep=True):
            return method(self, *args, **kwargs)

    return functools.wraps(method)(run)


@functools.cache
def _class_over_4bit(tuner_class: type, forward_reads_weight: bool) -> type:
    # PEFT compares names of classes in places.
    members = {"__module__": tuner_class.__module__, "_forward_reads_weight": forward_reads_weight}
    for name in _METHODS_THAT_READ_WEIGHT:
        if hasattr(tuner_class, name):
            members[name] = _on_decoded_weight(getattr(tuner_class, name))
    return type(tuner_class.__name__, (_Other4bit, tuner_class), members)


def refuse_untried(model: nn.Module, config: Any) -> None:
    """Raises NotImplementedError for a method that may read packed bytes of `model`."""
    packed = {type(m) for m in model.modules() if isinstance(m, _PACKED)}
    for one in config.values() if isinstance(config, dict) else (config,):
        if packed and one.peft_type not in TRIED:
            raise NotImplementedError(
                f"{one.peft_type} is not known to leave 4-bit weights alone or to decode them "
                f"first; with 4-bit layers, use one of {sorted(t.value for t in TRIED)}"
            )
        if Embedding4bit in packed and getattr(one, "trainable_token_indices", None):
            raise NotImplementedError(
                "trainable_token_indices over an Embedding4bit is not implemented: leave the "
                "embeddings out of quantization"
            )


@contextmanager
def _seen_where_it_computes(layer: nn.Module) -> Iterator[None]:
    """PEFT moves a new layer to the device of its base's `qweight`, else of its weight.

    Of a base that is offloaded that is a placeholder, to which the adapter would be lost.
    """
    if not is_offloaded(layer):
        yield
        return
    device = computing_device(layer)
    layer.qweight = torch.empty(0, dtype=layer.weight.dtype, device=device)
    try:
        yield
    finally:
        del layer.qweight


def create_and_replace_over_4bit(
    create_and_replace: Callable[..., None],
    config: Any,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    """A tuner's `_create_and_replace`, with 4-bit targets looked after.

    Raises:
        NotImplementedError: a second kind of adapter over one 4-bit layer.
    """

    def run(target: nn.Module) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        with _seen_where_it_computes(base):
            create_and_replace(config, adapter_name, target, target_name, parent, *args, **kwargs)

    if isinstance(target, BaseTunerLayer) and isinstance(target.get_base_layer(), Linear4bit):
        run(target)
        if getattr(parent, target_name) is not target:
            setattr(parent, target_name, target)
            raise NotImplementedError(
                f"{target_name!r} is a 4-bit layer with a {type(target).__name__} adapter: a "
                f"second kind of adapter over it ({config.peft_type}) is not supported"
            )
        return
    if isinstance(target, Embedding4bit) and config.peft_type != PeftType.LORA:
        raise NotImplementedError(
            f"{config.peft_type} on an Embedding4bit ({target_name!r}) is not implemented"
        )
    if not isinstance(target, Linear4bit) or config.peft_type == PeftType.LORA:
        run(target)
        return
    dense = dense_stand_in(target, target.weight_dtype)
    try:
        run(dense)
    except BaseException:
        setattr(parent, target_name, target)
        raise
    created = getattr(parent, target_name)
    if not isinstance(created, BaseTunerLayer) or created.base_layer is not dense:
        setattr(parent, target_name, target)
        raise NotImplementedError(
            f"{config.peft_type} puts a {type(created).__name__} in the place of {target_name!r}, "
            "a 4-bit layer: it is not known how to keep the weight in 4 bits there"
        )
    write_back(dense, target)
    created._modules["base_layer"] = target
    created.__class__ = _class_over_4bit(
        type(created), config.peft_type not in FORWARD_LEAVES_WEIGHT_ALONE
    )
