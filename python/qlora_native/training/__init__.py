"""What a training step is made of: its loss, its graph, its memory."""

from __future__ import annotations

from qlora_native.training.causal_lm import (
    UnsupportedModelError,
    learned_tokens,
    restore_plain_loss,
    use_chunked_loss,
    uses_chunked_loss,
)
from qlora_native.training.checkpointing import use_checkpointing
from qlora_native.training.cross_entropy import chunked_cross_entropy, linear_cross_entropy
from qlora_native.training.graphs import GraphedStep
from qlora_native.training.host_copies import OffloadStats
from qlora_native.training.offloading import ActivationOffload, offload_activations
from qlora_native.training.packing import (
    LeakError,
    best_fit,
    check_isolation,
    packed_row,
    padding_share,
)

__all__ = [
    "ActivationOffload",
    "GraphedStep",
    "LeakError",
    "OffloadStats",
    "UnsupportedModelError",
    "best_fit",
    "check_isolation",
    "chunked_cross_entropy",
    "learned_tokens",
    "linear_cross_entropy",
    "offload_activations",
    "packed_row",
    "padding_share",
    "restore_plain_loss",
    "use_checkpointing",
    "use_chunked_loss",
    "uses_chunked_loss",
]
