"""Causal language models of transformers whose loss is computed by chunks of tokens."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_native.training.cross_entropy import (
    chunked_cross_entropy,
    linear_cross_entropy,
    transform_logits,
)
from qlora_native.training.modes import in_evaluation_mode

_SETTINGS = "_qlora_native_chunked_loss"
_SCALES = {
    "lm_head_multiplier": lambda value: value,
    "logit_scale": lambda value: value,
    "logits_scaling": lambda value: 1 / value,
}
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 1e-2
"""Of the largest logit. In bf16 both ways round by 4e-3; a scale or cap that was missed is more."""


class UnsupportedModelError(ValueError):
    """The loss of a model is not one that can be computed by chunks; the model is as it was."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    plain_forward: Callable[..., Any]
    had_own_forward: bool
    scale: float
    softcap: float | None
    in_evaluation: bool
    chunk_tokens: int | None


def use_chunked_loss(
    model: nn.Module, *, in_evaluation: bool = False, chunk_tokens: int | None = None
) -> None:
    """Makes `model(..., labels=...)` compute its loss without holding all logits, in place.

    The loss is that of transformers' ForCausalLMLoss: the mean over predicted tokens, or the sum
    over `num_items_in_batch`; `shift_labels` and `ignore_index` mean the same. The output has no
    `logits` then. Without labels, or asked for what needs the logits (`logits_to_keep`,
    `output_router_logits`, `return_dict=False`), the model computes what it always does: so does a
    Trainer with label smoothing, which takes the labels away from the model.

    With `learned_tokens=learned_tokens(labels)` no other tokens go through the head: of
    conversations whose answers are learned, that is a part of its work.

    Any head is right: a frozen dense one is multiplied twice, any other (4-bit, with adapters,
    trained) three times. That this model's logits are what is taken for them is tried on a few
    tokens first; a sharded model needs all its ranks for that.

    Args:
        model: of transformers, or one of PEFT's over it; adapters may come later.
        in_evaluation: also while `model.training` is False, where callers often want the logits.
        chunk_tokens: as in `linear_cross_entropy`.

    Raises:
        UnsupportedModelError: it does not apply; the message says why.
    """
    model = _transformers_model(model)
    restore_plain_loss(model)
    plain = model.forward
    settings = _Settings(
        plain_forward=plain,
        had_own_forward="forward" in vars(model),
        scale=_scale(model.config),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        in_evaluation=in_evaluation,
        chunk_tokens=chunk_tokens,
    )
    _probe(model, settings)
    setattr(model, _SETTINGS, settings)

    # With the signature that Trainer reads, and a method, so that a copy of the model runs itself.
    @functools.wraps(getattr(plain, "__func__", plain))
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def uses_chunked_loss(model: nn.Module) -> bool:
    """Whether `use_chunked_loss` was applied to a model, or to one under it.

    A model that was pickled computes its plain loss, until it is applied again.
    """
    return any(_SETTINGS in vars(module) and _has_own_forward(module) for module in model.modules())


def _has_own_forward(module: nn.Module) -> bool:
    # Not that it is ours: Trainer wraps it. A method of a pickled model is its class's.
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def learned_tokens(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Where the tokens are that predict a label, for `model(..., labels=, learned_tokens=)`.

    To be called on the host, as a GPU would be waited for.

    Args:
        labels: int64 [batch, length].

    Returns:
        int64 [tokens], in the batch's rows laid one after another.
    """
    return (_shifted(labels, ignore_index) != ignore_index).flatten().nonzero()[:, 0]


def restore_plain_loss(model: nn.Module) -> None:
    """Undoes `use_chunked_loss`; does nothing to a model that it was not applied to."""
    for module in model.modules():
        settings = vars(module).pop(_SETTINGS, None)
        if settings is None:
            continue
        if settings.had_own_forward:
            module.forward = settings.plain_forward
        else:
            vars(module).pop("forward", None)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    settings: _Settings = getattr(self, _SETTINGS)
    if not _chunks(self, settings, args, kwargs):
        kwargs.pop("learned_tokens", None)
        return settings.plain_forward(*args, **kwargs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    labels = kwargs.pop("labels")
    of_loss = ("num_items_in_batch", "shift_labels", "ignore_index", "learned_tokens")
    loss_arguments = {name: kwargs.pop(name) for name in of_loss if name in kwargs}
    outputs = _base(self)(*args, **kwargs)
    loss = _loss(self, settings, outputs.last_hidden_state, labels, **loss_arguments)
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.get("past_key_values"),
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )


def _chunks(model: Any, settings: _Settings, args: Any, kwargs: dict[str, Any]) -> bool:
    keep = kwargs.get("logits_to_keep", 0)
    return (
        (model.training or settings.in_evaluation)
        and kwargs.get("labels") is not None
        # Behind the first, positions differ between a model and its base.
        and len(args) <= 1
        and isinstance(keep, int)
        and keep == 0
        and kwargs.get("return_dict") is not False
        and not kwargs.get("output_router_logits")
        # It may have been set since: the routers' loss is not in the chunks'.
        and not getattr(model.config, "output_router_logits", False)
    )


def _loss(
    model: Any,
    settings: _Settings,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    learned_tokens: Tensor | None = None,
) -> Tensor:
    targets = _shifted(labels, ignore_index) if shift_labels is None else shift_labels
    targets = targets.to(hidden.device)
    if learned_tokens is not None:
        index = learned_tokens.to(hidden.device)
        hidden, targets = hidden.flatten(0, -2)[index], targets.flatten()[index]
    losses = _token_losses(model, settings, hidden, targets, ignore_index)
    if num_items_in_batch is None:
        return losses.sum() / (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch


def _shifted(labels: Tensor, ignore_index: int) -> Tensor:
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _token_losses(
    model: Any, settings: _Settings, hidden: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    head = model.get_output_embeddings()
    arguments: dict[str, Any] = {
        "ignore_index": ignore_index,
        "scale": settings.scale,
        "softcap": settings.softcap,
        "chunk_tokens": settings.chunk_tokens,
    }
    if not _is_plain_linear(head):
        return chunked_cross_entropy(head, model.config.vocab_size, hidden, targets, **arguments)
    with _unsharded(head):
        return linear_cross_entropy(hidden, head.weight, targets, head.bias, **arguments)


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether calling it is one product with its weight: frozen, not packed, without hooks."""
    return (
        isinstance(head, nn.Linear)
        and type(head).forward is nn.Linear.forward
        and "forward" not in vars(head)
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not any(map(_is_of_others, head._forward_hooks.values()))
        and not any(map(_is_of_others, head._forward_pre_hooks.values()))
    )


def _is_of_others(hook: Callable[..., Any]) -> bool:
    """Whether a hook is none of those by which FSDP2 gathers what it split: see `_unsharded`."""
    return not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")


def _is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "unshard")


@contextmanager
def _unsharded(head: nn.Module) -> Iterator[None]:
    """Within it a head that FSDP2 splits is whole; the gradient is computed within, too."""
    if not _is_sharded(head):
        yield
        return
    head.unshard()
    try:
        yield
    finally:
        head.reshard()


def _base(model: Any) -> nn.Module:
    return getattr(model, model.base_model_prefix)


def _transformers_model(model: nn.Module) -> Any:
    """The causal language model itself, under PEFT's.

    Raises:
        UnsupportedModelError: it is something else.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    name = type(model).__name__
    if not hasattr(model, "base_model_prefix") or not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedModelError(f"{name} is no causal language model of transformers")
    if getattr(model.loss_function, "__name__", "") != "ForCausalLMLoss":
        raise UnsupportedModelError(f"{name} has a loss of its own: {model.loss_function}")
    if getattr(model.config, "output_router_logits", False):
        raise UnsupportedModelError(f"the loss of {name} has a part for its routers")
    if not isinstance(model.get_output_embeddings(), nn.Module):
        raise UnsupportedModelError(f"{name} names no output embeddings")
    if getattr(model, model.base_model_prefix, None) is None:
        raise UnsupportedModelError(f"{name} has no {model.base_model_prefix}")
    return model


def _scale(config: Any) -> float:
    scale = 1.0
    for name, factor in _SCALES.items():
        value = getattr(config, name, None)
        scale *= factor(value) if isinstance(value, (int, float)) else 1.0
    return scale


@torch.no_grad()
def _probe(model: Any, settings: _Settings) -> None:
    """Raises UnsupportedModelError unless logits and loss of a few tokens are what we make them."""
    name = type(model).__name__
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        return
    ids = torch.arange(_PROBE_TOKENS, device=device)[None] % model.config.vocab_size
    try:
        with in_evaluation_mode(model):
            expected = model(input_ids=ids, labels=ids, use_cache=False)
            # Through the model itself: its hooks place what is split or offloaded.
            found = _run_in_place_of_forward(model, _probed, settings, ids)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(f"{name} cannot be tried on a few tokens: {error}") from error
    logits, loss = found
    allowed = _PROBE_TOLERANCE * expected.logits.float().abs().max().item()
    apart = (logits - expected.logits.float()).abs().max().item()
    if logits.shape != expected.logits.shape or not apart <= allowed:
        raise UnsupportedModelError(f"the logits of {name} are not those of its head: {apart:.3g}")
    if not abs(loss.item() - expected.loss.item()) <= _PROBE_TOLERANCE * expected.loss.item():
        raise UnsupportedModelError(
            f"the loss of {name} is not the cross-entropy of its logits: {expected.loss.item():.4f}"
            f" in place of {loss.item():.4f}"
        )


def _probed(self: Any, settings: _Settings, ids: Tensor) -> tuple[Tensor, Tensor]:
    hidden = _base(self)(input_ids=ids, use_cache=False).last_hidden_state
    logits = transform_logits(
        self.get_output_embeddings()(hidden), settings.scale, settings.softcap
    )
    return logits, _loss(self, settings, hidden, ids)


def _run_in_place_of_forward(model: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    own = vars(model).get("forward")
    model.forward = types.MethodType(function, model)
    try:
        return model(*arguments)
    finally:
        del model.forward
        if own is not None:
            model.forward = own
