"""Layers with adapters that multiply one input, computed together in training.

Queries, keys and values of an attention have one input, and so have gate and values of an MLP. The
first of them that is called computes all: the input is cast once, the adapters' first products are
one product, and the gradient of the input is one sum in place.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import _eager, _lora_eager
from qlora_native._eager import is_traced
from qlora_native._lora_layers import Layer
from qlora_native.nn.adapted import LowRank, eager_weight, is_bare, is_one_operation
from qlora_native.nn.linear import Linear4bit

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What transformers calls layers that have one input in attentions and MLPs like Llama's."""


def share_inputs(model: nn.Module, groups: Sequence[Sequence[str]] = GROUPS) -> int:
    """Lets adapted layers that are called with one tensor be computed together; returns how many.

    For layers of `add_lora` and of PEFT over a Linear4bit, in eager steps with gradients. A layer
    goes on by itself whenever it could make a difference: under hooks, with dropout, with no or
    several adapters, in compiled graphs, without gradients, in a checkpoint that begins inside of
    the module that holds the layers. Results differ by rounding; the adapters of a layer whose
    output is not used get gradients of zero in place of None.

    Layers that turn out to have different inputs, as in cross attention, are computed together once
    and then no more. Not so under hooks for saved tensors, as within `torch.utils.checkpoint`: a
    recomputation has to repeat its forward pass, so what held in the first such call holds for
    good, and results that nobody takes cost time in every step. Let `groups` name layers of one
    input alone, or have one step without checkpointing first.

    Call it again when adapters have been added or replaced. The modules that hold the layers get
    hooks; what they return does not change.

    Args:
        groups: names of layers, each for layers of one module.
    """
    count = 0
    for parent in model.modules():
        _forget(parent)
        found = [_adapted_children(parent, names) for names in groups]
        together = [Together(layers) for layers in found if len(layers) > 1]
        if not together:
            continue
        for group in together:
            count += len(group.layers())
        handles = (
            parent.register_forward_pre_hook(_begin),
            parent.register_forward_hook(_end, always_call=True),
        )
        parent.__dict__[_GROUPS] = (tuple(together), handles)
    return count


# Attributes of a base layer, and of the module that holds adapted layers.
_GROUP, _GROUPS = "_together", "_groups_together"


def _forget(parent: nn.Module) -> None:
    groups, handles = parent.__dict__.pop(_GROUPS, ((), ()))
    for handle in handles:
        handle.remove()
    for group in groups:
        for layer in group.layers():
            layer.base_layer.__dict__.pop(_GROUP, None)


def _adapted_children(parent: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The adapted layers of these names; none unless their inputs can be the same."""
    layers = [
        child
        for name, child in parent._modules.items()
        if name in names
        and hasattr(child, "plain_adapters")
        and type(child._modules.get("base_layer")) is Linear4bit
    ]
    inputs = {(layer.base_layer.in_features, layer.base_layer.compute_dtype) for layer in layers}
    return layers if len(inputs) == 1 else []


# What is computed ahead is for one call of the parent: between two of them anything may change.


def _begin(parent: nn.Module, args: Any) -> None:
    if not is_traced():
        for group in parent.__dict__[_GROUPS][0]:
            group.begin()


def _end(parent: nn.Module, args: Any, output: Any) -> None:
    if not is_traced():
        for group in parent.__dict__[_GROUPS][0]:
            group.end(has_returned=output is not None)


class _Ahead:
    """What a thread's call of the parent has computed for layers that are still to be called."""

    def __init__(self, hooks: Any) -> None:
        self.hooks = hooks
        self.x: Tensor | None = None
        self.version = 0
        self.is_autocast = False
        self.outputs: dict[nn.Module, tuple[LowRank, Tensor]] = {}


class Link:
    """What a base layer knows of its group, which a copy of the layer alone leaves behind."""

    def __init__(self, group: Together | None = None) -> None:
        self.group = None if group is None else weakref.ref(group)

    def __reduce__(self) -> tuple[type[Link], tuple[()]]:
        return Link, ()

    def output(self, base: Linear4bit, x: Tensor, inner: Tensor, adapter: LowRank) -> Tensor | None:
        """See `Together.output`."""
        group = None if self.group is None else self.group()
        return None if group is None else group.output(base, x, inner, adapter)


class Together:
    """Layers that are expected to be called with one tensor.

    Their holder owns the layers, and this: adapters that are taken off are not kept alive here. A
    copy of the holder has a group of the layers' copies.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Takes layers that have `base_layer` and `plain_adapters()`."""
        self.__setstate__({"layers": tuple(layers)})
        self._link()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": tuple(self.layers())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The layers may still be without their attributes here: `begin` links them.
        self._layers = [weakref.ref(layer) for layer in state["layers"]]
        self._is_linked = False
        self.is_off = False
        self._is_off_under_hooks: bool | None = None
        self._thread = threading.local()

    def layers(self) -> list[nn.Module]:
        """Those that still exist."""
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def _link(self) -> None:
        for layer in self.layers():
            layer.base_layer.__dict__[_GROUP] = Link(self)
        self._is_linked = True

    def begin(self) -> None:
        """Starts a call of the parent on this thread.

        Forgets one that an interrupt, on which hooks do not run, has left without its end.
        """
        self._thread.ahead = None
        if not torch.is_grad_enabled():
            return
        if not self._is_linked:
            self._link()
        hooks = _saved_tensors_hooks()
        is_off = self.is_off
        if hooks is not None:
            # Perhaps a checkpoint's: its recomputation, whenever it comes, has to do the same.
            if self._is_off_under_hooks is None:
                self._is_off_under_hooks = is_off
            is_off = self._is_off_under_hooks
        if not is_off:
            self._thread.ahead = _Ahead(hooks)

    def end(self, has_returned: bool) -> None:
        """Ends it. Outputs that nobody took say that the layers do not belong together.

        Unless it raised an error: the others might have been called.
        """
        ahead = getattr(self._thread, "ahead", None)
        self._thread.ahead = None
        if has_returned and ahead is not None and ahead.hooks is None and ahead.outputs:
            self.is_off = True

    def output(self, base: Linear4bit, x: Tensor, inner: Tensor, adapter: LowRank) -> Tensor | None:
        """y of `base` and its adapter, or None: it is to be computed alone.

        Args:
            x: the layer's input, by which the others' are known.
            inner: the same in the dtype of the products.
        """
        ahead = getattr(self._thread, "ahead", None)
        if ahead is None or not _are_same_hooks(ahead.hooks, _saved_tensors_hooks()):
            return None  # the latter: a checkpoint within the parent, which recomputes without it
        if x.is_inference():  # such a tensor does not tell whether it has changed
            return None
        if ahead.x is None:
            ahead.x, ahead.version = x, x._version
            ahead.is_autocast = torch._C._is_any_autocast_enabled()
            ahead.outputs = self._compute(base, inner, adapter)
        taken = ahead.outputs.get(base)
        if (
            taken is None
            or ahead.x is not x
            or ahead.version != x._version
            or ahead.is_autocast != torch._C._is_any_autocast_enabled()
            or not _is_same(taken[0], adapter)
        ):
            return None
        del ahead.outputs[base]
        return taken[1]

    def _compute(
        self, base: Linear4bit, x: Tensor, adapter: LowRank
    ) -> dict[nn.Module, tuple[LowRank, Tensor]]:
        bases: list[Linear4bit] = []
        adapters: list[LowRank] = []
        if not _eager.is_ordinary(x, adapter.a, adapter.b):
            return {}
        for layer in self.layers():
            other = layer._modules["base_layer"]
            found = [adapter] if other is base else _ready(layer, other, x)
            if found:
                bases.append(other)
                adapters += found
        if base not in bases or len(bases) < 2:  # a replica of the layer, or all others are unready
            return {}
        x = _eager.autocast(x)
        biases, layers = [], []
        for other, (a, b, scaling, _) in zip(bases, adapters, strict=True):
            bias = other._parameters["bias"]
            biases.append(None if bias is None else bias.to(x.dtype))
            factors = _lora_eager.factor(a, x), _lora_eager.factor(b, x)
            layers.append(Layer(*factors, float(scaling), eager_weight(other)))
        outputs = _lora_eager.linear_4bit_lora_group(x, None, 0.0, biases, layers)
        return dict(zip(bases, zip(adapters, outputs, strict=True), strict=True))


def _ready(layer: nn.Module, base: Linear4bit, x: Tensor) -> list[LowRank] | None:
    """The adapter of a layer that is nothing but its product, in a list; else nothing."""
    adapters = layer.plain_adapters() if is_bare(layer) else None
    if not adapters or len(adapters) > 1:
        return None
    (adapter,) = adapters
    is_dropping = type(adapter.dropout) is not nn.Identity and adapter.dropout.training
    if (
        is_dropping
        or not is_one_operation(base, x, adapter)
        or eager_weight(base) is None
        or not _eager.is_ordinary(adapter.a, adapter.b)
    ):
        return None
    return adapters


def _saved_tensors_hooks() -> tuple[Any, Any] | None:
    """The pair of functions through which autograd saves tensors now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _are_same_hooks(one: tuple[Any, Any] | None, other: tuple[Any, Any] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[0] is other[0] and one[1] is other[1]


def _is_same(one: LowRank, other: LowRank) -> bool:
    return one.a is other.a and one.b is other.b and one.scaling == other.scaling
