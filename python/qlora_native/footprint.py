"""What training holds in memory, by part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.memory import PagedPool
from qlora_native.nn.sharding import is_checkpointed_layer
from qlora_native.optim._optimizer import NativeOptimizer


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


CONTEXT_BYTES = 600 * 10**6
"""Of a CUDA context with the libraries that are loaded into it. Not measured here."""

UNUSABLE_SHARE = 0.02
"""Of what torch's allocator holds, with expandable segments: what lies between tensors. Not
measured here."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """What autograd keeps of one forward pass, in bytes.

    Attributes:
        layers: per layer that gradient checkpointing runs again: (its input, what is saved in it,
            the largest tensor that is saved in it).
        outside: what is saved outside of those layers but by the loss.
        loss: what the head and the loss save.
        logits: elements of the logits.
    """

    layers: tuple[tuple[int, int, int], ...]
    outside: int
    loss: int
    logits: int


class _Tape:
    """Counts what autograd saves while it is recording, by layer."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._seen: dict[int, Tensor] = {}
        self.place: int | str = "outside"
        self.sizes: dict[int | str, list[int]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """To be called with what is saved."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters and storage._cdata not in self._seen:
            # Kept: the identity of a storage is that of another one once it is gone.
            self._seen[storage._cdata] = tensor
            self.sizes.setdefault(self.place, []).append(storage.nbytes())
        return tensor


def trace(model: nn.Module, batch: int, length: int) -> Saved:
    """Runs a transformers model on the meta device, and counts what its backward pass would need.

    Args:
        model: on the meta device, in training mode and without gradient checkpointing.

    Raises:
        NotImplementedError: the forward pass depends on numbers, which a meta tensor has none of.
    """
    tape, inputs = _Tape(model), []
    layers = [m for m in model.modules() if is_checkpointed_layer(m)]
    head = model.get_output_embeddings()

    def enter(place: int | str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if isinstance(place, int):
                inputs.append(arguments[0].nbytes)
            tape.place = place

        return hook

    def leave(*_: Any) -> None:
        tape.place = "outside"

    handles = [head.register_forward_pre_hook(enter("loss"))]
    for i, layer in enumerate(layers):
        handles += [layer.register_forward_pre_hook(enter(i)), layer.register_forward_hook(leave)]
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(tape.pack, lambda tensor: tensor):
            logits = model(input_ids=ids, labels=ids, use_cache=False).logits
    except (RuntimeError, NotImplementedError) as error:
        raise NotImplementedError(
            f"{type(model).__name__} does not run without numbers: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    of = tape.sizes
    return Saved(
        layers=tuple(
            (size, sum(of.get(i, ())), max(of.get(i, (0,)))) for i, size in enumerate(inputs)
        ),
        outside=sum(of.get("outside", ())),
        loss=sum(of.get("loss", ())),
        logits=logits.numel(),
    )


def activation_bytes(saved: Saved, *, checkpointing: bool, loss_share: float = 1.0) -> int:
    """The most that a backward pass needs beside parameters and gradients.

    That is where the loss begins, or in a layer: what is saved until there, and the gradients that
    flow: of the logits in fp32 and in 16 bits, or three of a layer's largest tensor.

    Args:
        checkpointing: layers keep their inputs, and are run again one at a time.
        loss_share: of the tokens whose logits exist at a time.
    """
    kept = sum(layer[0] if checkpointing else layer[1] for layer in saved.layers)
    at_loss = loss_share * (saved.loss + 6 * saved.logits)
    in_layer = max(
        ((layer[1] if checkpointing else 0) + 3 * layer[2] for layer in saved.layers), default=0
    )
    return int(saved.outside + kept + max(at_loss, in_layer))


def estimate(
    model: nn.Module,
    optimizer: NativeOptimizer,
    saved: Saved | None,
    *,
    checkpointing: bool = True,
    loss_share: float = 1.0,
    staging: int = 0,
    shards: int = 1,
) -> Footprint:
    """What training would hold on each device.

    Args:
        model: with its adapters, on the meta device.
        optimizer: over its adapters. Paged state is counted in host memory.
        saved: of the forward pass; None: activations are not counted.
        checkpointing, loss_share: as in `activation_bytes`.
        staging: bytes of the staging cache of paged state.
        shards: ranks that the parameters, gradients and states are split over, as FSDP2 does: two
            layers are whole at a time, and what is outside of the layers always is.
    """
    whole = dataclasses.replace(held(model), gradients=nbytes(_trained(model)))
    state = optimizer.state_bytes()
    activations = 0
    if saved is not None:
        activations = activation_bytes(saved, checkpointing=checkpointing, loss_share=loss_share)
    parts = dataclasses.replace(
        whole,
        optimizer=staging if optimizer.is_paged else state,
        host=state if optimizer.is_paged else 0,
        activations=activations,
    )
    if shards > 1:
        parts = _sharded(model, parts, shards, paged=optimizer.is_paged)
    workspace = CONTEXT_BYTES + int(UNUSABLE_SHARE * (parts.total - staging))
    return dataclasses.replace(parts, workspace=workspace)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _sharded(model: nn.Module, parts: Footprint, shards: int, *, paged: bool) -> Footprint:
    def split(size: int) -> int:
        return -(-size // shards)

    layers = [held(m) for m in model.modules() if is_checkpointed_layer(m)]
    # Two at a time: the one that computes, and the one that is being gathered.
    widest = max(layers, key=lambda layer: layer.total, default=Footprint())
    rest = parts.dense - sum(layer.dense for layer in layers)
    return dataclasses.replace(
        parts,
        weights=split(parts.weights) + 2 * widest.weights,
        dense=split(parts.dense) + rest + 2 * widest.dense,
        adapters=split(parts.adapters) + 2 * widest.adapters,
        gradients=split(parts.gradients) + 2 * widest.adapters,
        optimizer=parts.optimizer if paged else split(parts.optimizer),
        host=split(parts.host),
    )
