"""Token embeddings of transformers models in 4 bits, and the output heads that are tied to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from qlora_native.hf.layer_kinds import stays_dense
from qlora_native.nn.embedding import Embedding4bit

_PARTS = ("_absmax", "_absmax2")


def token_embeddings(model: Any, modules_to_not_convert: Sequence[str] | None) -> set[str]:
    """Paths of the token embeddings and of the modules that are tied to them.

    Raises:
        ValueError: one of them is to stay as it is: they have one weight. Or the embeddings are of
            a class of their own, whose forward may read the weight or its dtype.
    """
    embeddings = model.get_input_embeddings()
    if type(embeddings) not in (nn.Embedding, Embedding4bit):
        raise ValueError(
            "quantize_embeddings=True, but the token embeddings are a "
            f"{type(embeddings).__name__}, which computes more than nn.Embedding: leave them dense"
        )
    names = {name for name, module in model.named_modules() if module is embeddings}
    for target, source in _tied(model).items():
        pair = {target.rpartition(".")[0], source.rpartition(".")[0]}
        if names & pair:
            names |= pair
    kept = [
        entry
        for entry in modules_to_not_convert or ()
        if any(stays_dense(name, [entry]) for name in names)
    ]
    if kept:
        raise ValueError(
            f"quantize_embeddings=True, but modules_to_not_convert has {kept}: "
            f"{sorted(names)} have one weight, in 4 bits or not"
        )
    return names


def tie_parts(model: Any) -> None:
    """Has transformers tie the scales of 4-bit embeddings as it ties their weights."""
    tied = _tied(model)
    for target, source in list(tied.items()):
        module = model.get_submodule(source.rpartition(".")[0])
        if isinstance(module, Embedding4bit) and source.endswith(".weight"):
            parts = [part for part in _PARTS if getattr(module, f"weight{part}") is not None]
            model.all_tied_weights_keys |= {target + part: source + part for part in parts}


def _tied(model: Any) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}
