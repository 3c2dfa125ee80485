"""What training holds in memory, by part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qlora_native.memory import PagedPool


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes of device memory at the peak of a training step, and what paging keeps beside it.

    Attributes:
        weights: frozen 4-bit weights: codes and their constants.
        dense: frozen parameters that are not in 4 bits (embeddings, norms, the head), and buffers.
        adapters: parameters that train.
        gradients: of the adapters.
        optimizer: its state on the device, with the staging cache of paged state.
        activations: what autograd keeps, and what the step computes with.
        workspace: the CUDA context, libraries' workspaces, and what the allocator cannot give out.
        host: optimizer state in host memory; not a part of `total`.
    """

    weights: int = 0
    dense: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    workspace: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All parts on the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes of each part on the device, by name."""
        values = dataclasses.asdict(self)
        del values["host"]
        return values


def held(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    pools: Sequence[PagedPool] = (),
) -> Footprint:
    """Counts the tensors that a model and its optimizer hold now; no activations, no workspace.

    A tensor that several modules share counts once.

    Args:
        optimizer: one that has its state, so after its first step.
        pools: those of its paged state, for their staging caches.
    """
    parameters = list(model.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    trained = [p for p in parameters if p.requires_grad]
    packed = [p for p in frozen if p.dtype == torch.uint8]
    dense = [p for p in frozen if p.dtype != torch.uint8]
    on_device, on_host = [], []
    for parameter, state in optimizer.state.items() if optimizer is not None else ():
        for value in state.values():
            if isinstance(value, Tensor):
                there = value.device.type == parameter.device.type
                (on_device if there else on_host).append(value)
    staged = sum(pool.stats().device_reserved_bytes for pool in pools if pool.backing == "pinned")
    return Footprint(
        weights=nbytes(packed),
        dense=nbytes([*dense, *model.buffers()]),
        adapters=nbytes(trained),
        gradients=nbytes(p.grad for p in trained if p.grad is not None),
        optimizer=nbytes(on_device) + staged,
        host=nbytes(on_host),
    )


def nbytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors, each counted once."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in tensors}.values())
