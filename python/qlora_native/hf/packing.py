"""Packing the dense tensors of a checkpoint while transformers loads it, and watching that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora_native.hf.layer_kinds import kind_of

State = dict[str, Tensor]


class PackObserver:
    """Sees every tensor that is packed. Override what is of interest."""

    def begin(self, tensors: int) -> None:
        """Loading starts; so many tensors are to be packed."""

    def pack(self, name: str, value: Tensor, make: Callable[[], State]) -> State:
        """Returns `make()`, the parts of the tensor `name` by their full names, or its equal."""
        return make()


_observer: ContextVar[PackObserver | None] = ContextVar("qlora_native_packing", default=None)


@contextlib.contextmanager
def observe_packing(observer: PackObserver) -> Iterator[None]:
    """Inside the block, `from_pretrained` calls of this thread show `observer` what they pack."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def current_observer() -> PackObserver:
    """The observer of the surrounding `observe_packing`, or one that does nothing."""
    return _observer.get() or PackObserver()


class PackOnLoad(ConversionOps):
    """Packs a dense tensor of a checkpoint into the state of the 4-bit module it belongs to.

    What goes wrong is raised after loading: transformers would put a traceback per tensor into its
    log and raise an error that says nothing of it. Until then no further tensor is packed.
    """

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> State:
        """{full name: dense tensor} to {full name of every part: uint8 parameter}."""
        packed: State = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not tensor.is_floating_point():  # packed already, as experts are while stacked
                packed[name] = value
                continue
            if any(not isinstance(failure, ValueError) for failure in self.failures):
                packed |= nothing_packed(model, name)
                continue
            try:
                packed |= pack(model, name, tensor)
            except Exception as error:
                self.failures.append(error)
                packed |= nothing_packed(model, name)
        return packed


def pack(model: Any, name: str, value: Tensor) -> State:
    """{full name of every part: uint8 parameter} for the dense tensor `name` of the model.

    Raises:
        ValueError: the tensor is not finite or has another shape; the message names it.
        OutOfMemoryError: as torch's.
    """
    module, tensor_name = get_module_from_name(model, name)

    def make() -> State:
        state = kind_of(module).pack(module, tensor_name, value)
        return packed_parameters(name, tensor_name, state)

    try:
        return current_observer().pack(name, value, make)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"{name} {tuple(value.shape)}: {error}") from error


def packed_parameters(name: str, tensor_name: str, state: State) -> State:
    """The parts of the tensor `tensor_name`, of full name `name`, as parameters by full names."""
    prefix = name.removesuffix(tensor_name)
    return {prefix + key: nn.Parameter(t, requires_grad=False) for key, t in state.items()}


def pack_new_weights(model: Any) -> None:
    """Packs the weights that no checkpoint had, which transformers has initialized."""
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None:
            continue
        for tensor_name, value in list(module.named_parameters(recurse=False)):
            if kind.is_dense(module, tensor_name) and not value.is_meta:
                for key, parameter in pack(model, f"{name}.{tensor_name}", value.data).items():
                    setattr(module, key.rpartition(".")[2], parameter)


def raise_first(failures: list[Exception]) -> None:
    """Raises what went wrong, values that cannot be packed all in one sentence."""
    for failure in failures:
        if not isinstance(failure, ValueError):
            raise failure
    if failures:
        shown = "; ".join(str(failure) for failure in failures[:5])
        raise ValueError(shown + ("; ..." if failures[5:] else ""))


def nothing_packed(model: Any, name: str) -> State:
    """Parameters without memory, so that transformers does not initialize dense ones instead."""
    module, tensor_name = get_module_from_name(model, name)
    prefix = name.removesuffix(tensor_name)
    return {
        prefix + key: nn.Parameter(
            torch.zeros((), dtype=torch.uint8).expand(part.shape), requires_grad=False
        )
        for key, part in module.named_parameters(recurse=False)
        if key.startswith(tensor_name)
    }
