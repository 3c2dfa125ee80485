"""What a training step is made of: its loss, its graph, its memory."""

from __future__ import annotations

from qlora_native.training.causal_lm import (
    UnsupportedModelError,
    restore_plain_loss,
    use_chunked_loss,
)
from qlora_native.training.cross_entropy import chunked_cross_entropy, linear_cross_entropy
from qlora_native.training.graphs import GraphedStep

__all__ = [
    "GraphedStep",
    "UnsupportedModelError",
    "chunked_cross_entropy",
    "linear_cross_entropy",
    "restore_plain_loss",
    "use_chunked_loss",
]
