"""Cross-entropy of a linear layer's outputs that never holds all of them.

A language model's logits are its largest tensor: [tokens, vocabulary] in 16 bits, in fp32, and once
more as a gradient. Here they exist for a chunk of tokens at a time. Whatever the chunks, every
token's loss is computed alone and the sum is taken over all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 1 << 29
"""Of fp32 logits at a time: so many rows that their products still fill a GPU."""

_CHUNK_ROWS = 128
"""Chunks are multiples of it, which is a multiple of what tensor cores multiply at once."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross-entropy per token of `logits = hidden @ weight.T + bias`, by chunks of tokens.

    The logits are scaled and capped (`softcap * tanh(scale * logits / softcap)`) in fp32. The
    gradient of `hidden` is computed on the way, where it is needed, so that a frozen head is
    multiplied twice; a backward pass then is one product with a vector. Where `weight` or `bias`
    needs a gradient, chunks are computed again in the backward pass.

    Under autocast the products are in its dtype, as those of a linear layer are.

    Args:
        hidden: floating point [..., in], on the device of `weight`.
        weight: floating point [out, in].
        labels: int64 [...]; tokens whose label is `ignore_index` have no loss and no gradient.
        bias: [out].
        chunk_tokens: rows of logits that exist at a time; None: what fits into `CHUNK_BYTES`.

    Returns:
        fp32 [...], 0 for ignored tokens. Differentiable once.

    Raises:
        ValueError: shapes disagree, or `chunk_tokens` is less than 1.
    """
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)} and weight {tuple(weight.shape)}")
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains and torch.is_grad_enabled():
        return chunked_cross_entropy(
            lambda rows: F.linear(rows, weight, bias), weight.shape[0], hidden, labels,
            ignore_index=ignore_index, scale=scale, softcap=softcap, chunk_tokens=chunk_tokens,
        )  # fmt: skip
    rows, targets, chunk = _flattened(hidden, labels, weight.shape[0], chunk_tokens)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    elif rows.dtype != weight.dtype:
        raise ValueError(f"hidden is {rows.dtype} and weight {weight.dtype}")
    losses = _FrozenHead.apply(rows, weight, bias, targets, chunk, ignore_index, scale, softcap)
    return losses.view(labels.shape)


def _keeps_random(hidden: Tensor) -> bool:
    """Whether a rerun can draw the same random numbers: not while a CUDA graph records."""
    if torch.compiler.is_compiling() or not hidden.is_cuda:
        return True
    return not torch.cuda.is_current_stream_capturing()


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor],
    vocabulary: int,
    hidden: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`linear_cross_entropy` of any head: 4-bit, with adapters, trained.

    Chunks are computed again in the backward pass (one product more), from which all parameters of
    the head have their gradients.

    Args:
        head: takes [rows, in] and returns logits [rows, vocabulary].

    Returns:
        fp32 [...], 0 for ignored tokens.
    """
    rows, targets, chunk = _flattened(hidden, labels, vocabulary, chunk_tokens)

    def losses(some: Tensor, their_targets: Tensor) -> Tensor:
        logits = transform_logits(head(some), scale, softcap)
        return F.cross_entropy(logits, their_targets, ignore_index=ignore_index, reduction="none")

    parts = zip(rows.split(chunk), targets.split(chunk), strict=True)
    if torch.is_grad_enabled():
        found = [
            checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=_keeps_random(hidden))
            for part in parts
        ]
    else:
        found = [losses(*part) for part in parts]
    return torch.cat(found).view(labels.shape)


def transform_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The logits in fp32, scaled and capped."""
    logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def chunk_rows(tokens: int, vocabulary: int) -> int:
    """How many of the tokens' logits to hold at a time: chunks of about one size, none tiny."""
    fitting = max(CHUNK_BYTES // (4 * vocabulary) // _CHUNK_ROWS, 1) * _CHUNK_ROWS
    chunks = max(-(-tokens // fitting), 1)
    return max(-(-tokens // (chunks * _CHUNK_ROWS)), 1) * _CHUNK_ROWS


def _flattened(
    hidden: Tensor, labels: Tensor, vocabulary: int, chunk_tokens: int | None
) -> tuple[Tensor, Tensor, int]:
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"hidden is {tuple(hidden.shape)} and labels {tuple(labels.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected 1 or more")
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows, labels.reshape(-1), chunk_tokens or chunk_rows(rows.shape[0], vocabulary)


class _FrozenHead(torch.autograd.Function):
    """Losses [rows], with the gradient of `rows` computed beside them."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        ignore_index: int,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        counted = targets != ignore_index
        # A label that is neither one of the vocabulary nor ignored is for gather to refuse.
        targets = torch.where(counted, targets, 0)
        differentiates = ctx.needs_input_grad[0]
        parts = zip(rows.split(chunk), targets.split(chunk), strict=True)
        found = [
            _loss_and_gradient(*p, weight, bias, scale, softcap, differentiates) for p in parts
        ]
        losses, gradients = zip(*found, strict=True)
        if differentiates:
            ctx.save_for_backward(torch.cat(gradients), counted)
        return torch.where(counted, torch.cat(losses), 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Any, ...]:
        gradient, counted = ctx.saved_tensors
        # Not a product with 0: what an average over no token gives is not finite.
        d_losses = torch.where(counted, d_losses, 0.0)[:, None]
        d_rows = torch.mul(gradient, d_losses, out=torch.empty_like(gradient))
        return (d_rows, *(None for _ in range(7)))


def _loss_and_gradient(
    rows: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    differentiates: bool,
) -> tuple[Tensor, Tensor | None]:
    """The losses of a chunk and the gradient of their sum. No tensor of logits outlives it."""
    index = targets[:, None]
    logits = F.linear(rows, weight, bias)
    as_they_are = scale == 1.0 and softcap is None
    if as_they_are:
        # Where torch has a kernel from 16 bits to fp32, fp32 logits are never written.
        log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    else:
        transformed = transform_logits(logits, scale, softcap)
        log_p = torch.log_softmax(transformed, -1)
    of_target = log_p.gather(1, index)
    losses = -of_target[:, 0]
    if not differentiates:
        return losses, None
    # Of the target it is p - 1, rounded once from fp32: 16 bits would have lost it.
    at_target = torch.expm1(of_target)
    if as_they_are:
        d_logits = torch.exp(log_p, out=torch.empty_like(logits))
        d_logits.scatter_(1, index, at_target.to(logits.dtype))
    else:
        d_logits = log_p.exp_().scatter_(1, index, at_target).mul_(scale)
        if softcap is not None:
            d_logits.mul_(1 - (transformed / softcap).square_())
        d_logits = d_logits.to(logits.dtype)
    return losses, d_logits @ weight
