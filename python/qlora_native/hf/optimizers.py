"""The optimizers for transformers' Trainer."""

from __future__ import annotations

import importlib.util
from typing import Any

from qlora_native import optim

OPTIMIZERS: dict[str, type[optim.AdamW] | type[optim.Lion]] = {
    "adamw": optim.AdamW,
    "adamw8bit": optim.AdamW8bit,
    "paged_adamw": optim.PagedAdamW,
    "paged_adamw8bit": optim.PagedAdamW8bit,
    "lion": optim.Lion,
    "lion8bit": optim.Lion8bit,
    "paged_lion": optim.PagedLion,
    "paged_lion8bit": optim.PagedLion8bit,
}
"""By the names that `qlora-native finetune --optim` takes."""

# Values of transformers' OptimizerNames that mean bitsandbytes' optimizers, and ours for them.
_IN_PLACE_OF_BITSANDBYTES = {
    "adamw_bnb_8bit": "adamw8bit",
    "adamw_8bit": "adamw8bit",
    "paged_adamw_32bit": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw8bit",
    "lion_32bit": "lion",
    "lion_8bit": "lion8bit",
    "paged_lion_32bit": "paged_lion",
    "paged_lion_8bit": "paged_lion8bit",
}


def optimizer_cls_and_kwargs(name: str, args: Any, **kwargs: Any) -> tuple[type, dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes.

    Args:
        name: one of `OPTIMIZERS`: "paged_adamw", ...
        args: transformers' TrainingArguments: its learning rate, betas and epsilon are used.
            Trainer applies its weight decay and its clipping.
        **kwargs: of the optimizer, besides.

    Raises:
        ValueError: there is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer named {name!r}; there are: {', '.join(OPTIMIZERS)}")
    cls = OPTIMIZERS[name]
    options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
    if issubclass(cls, optim.AdamW):
        options["eps"] = args.adam_epsilon
    return cls, {**options, **kwargs}


def use_as_paged_optimizers() -> list[str]:
    """Let Trainer make our optimizers where a script asks for bitsandbytes'; return their names.

    From then on ``--optim paged_adamw_8bit``, ``paged_adamw_32bit``, ``paged_lion_8bit`` and the
    like need no bitsandbytes. Process-wide.

    Raises:
        RuntimeError: this version of transformers keeps its optimizers elsewhere.
    """
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
    except ImportError as error:
        raise RuntimeError(
            "this version of transformers has no table of optimizers; pass "
            "optimizer_cls_and_kwargs(...) to Trainer instead"
        ) from error
    for name, ours in _IN_PLACE_OF_BITSANDBYTES.items():
        _OPTIMIZER_HANDLERS[name] = lambda context, ours=ours: optimizer_cls_and_kwargs(
            ours, context.args
        )
    return list(_IN_PLACE_OF_BITSANDBYTES)


def stand_in_for_bitsandbytes() -> None:
    """The same where bitsandbytes is not installed, so that scripts that name it run unchanged."""
    if importlib.util.find_spec("bitsandbytes") is None:
        use_as_paged_optimizers()
